"""From a conversation to the prompt: its template, and what the template is given."""

from __future__ import annotations

import asyncio
import functools
from dataclasses import dataclass
from typing import Any

from amoe.engine.chat_template import ChatTemplate
from amoe.engine.tokenizer import Tokenizer
from amoe.errors import CheckpointError, RequestError
from amoe.server.chat_options import ChatOptions
from amoe.server.chat_schemas import ChatPrompt
from amoe.server.context import SHORT_TEXT_CHARS, ServerContext
from amoe.server.parsers.formats import ToolFormat
from amoe.server.template_input import template_messages
from amoe.server.tool_text import with_tools_as_text
from amoe.server.tools import ToolPlan, plan_tools

# Put behind the last message that the model is to continue, to find where that ends in the prompt. Of the private use
# area, so that no tokenizer and no template knows it.
_END = "\ue000\ue0ff\ue000"


FEW_MESSAGES = 16  # not worth a thread


@dataclass(frozen=True, slots=True)
class RenderedChat:
    """A conversation as text.

    Attributes:
        text: the prompt.
        plan: what it says about tools.
        tools: how the model writes calls of them.
    """

    text: str
    plan: ToolPlan
    tools: ToolFormat


async def render_chat(context: ServerContext, body: ChatPrompt, *, parallel: bool = True) -> RenderedChat:
    """Render a conversation.

    Args:
        parallel: several tools may be called at once.

    Raises:
        RequestError: naming the field.
    """
    arguments = (context.engine.tokenizer, context.chat, body, parallel)
    if body.tools or body.chat_template or not _is_short(body):  # schemas to check, or a template takes its time
        return await asyncio.to_thread(_render, *arguments)
    return _render(*arguments)


def _is_short(body: ChatPrompt) -> bool:
    """A conversation that is rendered in well under a millisecond."""
    return len(body.messages) <= FEW_MESSAGES and all(
        isinstance(message.content, str) and len(message.content) <= SHORT_TEXT_CHARS and not message.tool_calls
        for message in body.messages
    )


async def chat_prompt_ids(context: ServerContext, body: ChatPrompt) -> list[int]:
    """Token ids of the prompt of a conversation.

    Raises:
        RequestError: naming the field.
    """
    rendered = await render_chat(context, body)
    return await context.tokenize(rendered.text, body.add_special_tokens, "messages")


def _render(tokenizer: Tokenizer, options: ChatOptions, body: ChatPrompt, parallel: bool) -> RenderedChat:
    plan = plan_tools(body, parallel=parallel)
    if plan.mode == "auto" and not options.auto_tool_choice:
        raise RequestError(
            "tool_choice must be none, required, or name a function at this server (--enable-auto-tool-choice would "
            "let the model decide)",
            param="tool_choice",
        )
    template = _template(tokenizer, options, body, plan)
    format_ = options.tool_format(template)
    tools = plan.for_template()
    messages = template_messages(body.messages)
    if not template.knows_tools:
        messages = with_tools_as_text(messages, tools, format_)
    if body.continue_final_message:
        messages[-1] = {**messages[-1], "content": messages[-1]["content"] + _END}
    text = tokenizer.render_chat(messages, _variables(body, tools), template)
    if body.continue_final_message:
        text, end, _ = text.rpartition(_END)
        if not end:
            raise RequestError(
                "the chat template leaves out the last message, so that it cannot be continued",
                param="continue_final_message",
            )
    return RenderedChat(text, plan, format_)


def _template(tokenizer: Tokenizer, options: ChatOptions, body: ChatPrompt, plan: ToolPlan) -> ChatTemplate:
    if body.chat_template is None:
        return tokenizer.chat_template(with_tools=plan.mode != "none")
    if not options.trust_request_chat_template:
        raise RequestError(
            "chat_template is not taken from requests by this server (--trust-request-chat-template would allow it)",
            param="chat_template",
        )
    try:
        return _compiled(body.chat_template)
    except CheckpointError as error:
        raise RequestError(str(error), param="chat_template") from error


@functools.lru_cache(maxsize=32)  # a client that brings one brings it every time
def _compiled(source: str) -> ChatTemplate:
    return ChatTemplate(source, "the request", trusted=False)


def _variables(body: ChatPrompt, tools: list[dict[str, Any]] | None) -> dict[str, Any]:
    variables: dict[str, Any] = {
        "add_generation_prompt": body.add_generation_prompt,
        "documents": body.documents,
        "tools": tools,
    }
    for name in ("reasoning_effort", "verbosity"):  # templates test whether they are defined
        value = getattr(body, name)
        if value is not None:
            variables[name] = value
    return variables | (body.chat_template_kwargs or {})
