"""OpenAI's Responses API over the same conversation as /v1/chat/completions.

`schemas` reads a request, `translate` (with `items`) makes a chat completion of it, `run` drives that one and
`assembler` (with `output`) makes items and events of its deltas; `store` and `background` keep what outlives a request.
"""

from amoe.server.responses.routes import responses_router

__all__ = ["responses_router"]
