"""From a request of /v1/responses to the chat completion that it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from amoe.errors import RequestError
from amoe.server import fields
from amoe.server.chat_schemas import ChatCompletionRequest
from amoe.server.field_names import FieldNames
from amoe.server.fields import shared_extras
from amoe.server.responses.items import MessageBuilder, completed, kind_of, user_message
from amoe.server.responses.schemas import Item, ResponsesRequest

# Fields that OpenAI has and this server does not, and fields of chat completions that have another name here or would
# bring something that a response has no place for. Null and values of no effect are accepted.
NOT_HERE: Mapping[str, str] = {
    "conversation": "it is not supported by this server: use previous_response_id",
    "context_management": "it is not supported by this server",
    "moderation": "it is not supported by this server",
    "prompt": "prompt templates are not supported by this server: use instructions and input",
    "messages": "it is called input here",
    "max_tokens": "it is called max_output_tokens here",
    "max_completion_tokens": "it is called max_output_tokens here",
    "response_format": "it is called text.format here",
    "reasoning_effort": "it is called reasoning.effort here",
    "verbosity": "it is called text.verbosity here",
    "logprobs": "ask with include=['message.output_text.logprobs']",
    "echo": "it belongs to chat completions",
    "include_reasoning": "it belongs to chat completions",
    "prompt_logprobs": "it belongs to chat completions",
    "return_token_ids": "it belongs to chat completions",
    "return_tokens_as_token_ids": "it belongs to chat completions",
    "return_routed_experts": "it belongs to chat completions",
    "continue_final_message": "it belongs to chat completions",
}

_RENAMED = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text.format",
    "response_format.json_schema": "text.format",
    "reasoning_effort": "reasoning.effort",
    "verbosity": "text.verbosity",
    "tool_choice.function": "tool_choice",
}

FindItem = Callable[[str], Item | None]


def input_items(body: ResponsesRequest, find_item: FindItem) -> list[Item]:
    """The request's own items, references replaced by what they mean, in the order given.

    Raises:
        RequestError: naming a reference to nothing.
    """
    if isinstance(body.input, str):
        return [user_message(body.input)]
    return [_resolved(item, f"input.{index}", find_item) for index, item in enumerate(body.input)]


def _resolved(item: Item, where: str, find_item: FindItem) -> Item:
    if kind_of(item) != "item_reference":
        return item
    found = find_item(item["id"]) if isinstance(item.get("id"), str) else None
    if found is None:
        raise RequestError(
            f"{where}.id: there is no stored item {item.get('id')!r}; it may have been forgotten, or never stored",
            param=f"{where}.id",
        )
    return found


def as_stored(items: Sequence[Item]) -> list[Item]:
    """`items`, which have been translated without an error, as the store keeps them."""
    return [completed(item) for item in items]


def function_tools(body: ResponsesRequest) -> list[tuple[int, dict[str, Any]]]:
    """The tools that are functions, each with its place among all. Other types are skipped: agents offer their own
    kinds of tools to every server."""
    return [(index, tool) for index, tool in enumerate(body.tools) if tool["type"] == "function"]


def _tools(body: ResponsesRequest, names: dict[str, str]) -> list[dict[str, Any]]:
    tools = []
    for place, (index, tool) in enumerate(function_tools(body)):
        names |= {f"tools.{place}": f"tools.{index}", f"tools.{place}.function": f"tools.{index}"}
        function = {key: tool[key] for key in ("name", "description", "parameters", "strict") if key in tool}
        tools.append({"type": "function", "function": function})
    return tools


def _tool_choice(choice: str | dict[str, Any] | None) -> Any:
    """As in chat completions, where names lie one level deeper.

    Raises:
        RequestError: it asks for a tool that is no function.
    """
    if not isinstance(choice, dict):
        return choice
    kind = choice.get("type")
    if kind == "function":
        return {"type": "function", "function": {"name": choice.get("name")}}
    if kind == "allowed_tools":
        tools = choice.get("tools")
        if not isinstance(tools, list):
            raise RequestError("tool_choice.tools must be a list", param="tool_choice.tools")
        functions = [tool for tool in tools if isinstance(tool, dict) and tool.get("type") == "function"]
        return {**choice, "tools": [{"type": "function", "function": {"name": f.get("name")}} for f in functions]}
    raise RequestError(
        f"tool_choice.type: {kind!r} is not supported by this server, which calls functions only",
        param="tool_choice.type",
    )


def _response_format(body: ResponsesRequest) -> dict[str, Any]:
    text_format = body.text.format
    if text_format is None or text_format.type == "text":
        return {}
    if text_format.type == "json_object":
        return {"response_format": {"type": "json_object"}}
    schema = {key: value for key, value in text_format.as_json().items() if key != "type" and value is not None}
    return {"response_format": {"type": "json_schema", "json_schema": schema}}


def _optional(body: ResponsesRequest) -> dict[str, Any]:
    """Fields that are passed on only where they are given: the others' defaults are those of chat completions."""
    values = {
        "temperature": body.temperature,
        "top_p": body.top_p,
        "max_completion_tokens": body.max_output_tokens,
        "reasoning_effort": body.reasoning.effort,
        "verbosity": body.text.verbosity,
        "request_id": body.request_id,
    }
    return {name: value for name, value in values.items() if value is not None}


def translate(
    body: ResponsesRequest, history: Sequence[Item], items: Sequence[Item]
) -> tuple[ChatCompletionRequest, FieldNames]:
    """The chat completion that `body` asks for, and what its fields are called in `body`.

    Args:
        history: items of the previous responses, oldest first.
        items: the request's own, with no references left.

    Raises:
        RequestError, RequestValidationError: naming the field of `body`.
    """
    extras = shared_extras(body.model_extra or {}, NOT_HERE, "/v1/responses")
    messages = MessageBuilder()
    if body.instructions:
        messages.add_text("system", body.instructions, "instructions")
    for item in history:
        messages.add(item, "previous_response_id")
    for index, item in enumerate(items):
        messages.add(item, "input" if isinstance(body.input, str) else f"input.{index}")
    messages.finish()
    renamed = {**_RENAMED, **messages.names}
    tools = _tools(body, renamed)
    names = FieldNames(renamed)
    with names.told():
        chat = ChatCompletionRequest.model_validate(
            {
                **extras,
                **_optional(body),
                **_response_format(body),
                "model": body.model,
                "messages": messages.messages,
                "presence_penalty": body.presence_penalty,
                "frequency_penalty": body.frequency_penalty,
                "parallel_tool_calls": body.parallel_tool_calls,
                "logprobs": body.wants_logprobs,
                "top_logprobs": (body.top_logprobs or 0) if body.wants_logprobs else None,
                **({"tools": tools} if tools else {}),
                **({} if body.tool_choice is None else {"tool_choice": _tool_choice(body.tool_choice)}),
            }
        )
        fields.refuse_unsupported(chat.model_extra or {}, fields.CHAT)
    return chat, names
