"""Anthropic's Messages API over the same conversation as /v1/chat/completions.

`schemas` reads a request, `translate` (with `blocks`) makes a chat completion of it, and `assembler` makes content
blocks and events of that one's deltas. `errors` has errors in Anthropic's shape.
"""

from amoe.server.messages.errors import AnthropicErrors
from amoe.server.messages.routes import messages_router

__all__ = ["AnthropicErrors", "messages_router"]
