"""From a request of /v1/messages to the chat completion that it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from amoe.errors import RequestError
from amoe.server import fields
from amoe.server.chat_schemas import ChatCompletionRequest
from amoe.server.field_names import FieldNames
from amoe.server.fields import shared_extras
from amoe.server.messages.blocks import MessageBuilder
from amoe.server.messages.schemas import MessagesPrompt, MessagesRequest

# Fields that Anthropic has and this server does not, and fields of chat completions that have another name here or
# would bring something that a message has no place for. Null and values of no effect are accepted.
NOT_HERE: Mapping[str, str] = {
    "container": "it is not supported by this server",
    "context_management": "it is not supported by this server",
    "mcp_servers": "it is not supported by this server",
    "max_completion_tokens": "it is called max_tokens here",
    "stop": "it is called stop_sequences here",
    "response_format": "it is called output_config.format here",
    "reasoning_effort": "it is called output_config.effort here",
    "parallel_tool_calls": "it is called tool_choice.disable_parallel_tool_use here",
    "logprobs": "it belongs to chat completions",
    "top_logprobs": "it belongs to chat completions",
    "echo": "it belongs to chat completions",
    "include_reasoning": "it belongs to chat completions",
    "prompt_logprobs": "it belongs to chat completions",
    "return_token_ids": "it belongs to chat completions",
    "return_tokens_as_token_ids": "it belongs to chat completions",
    "return_routed_experts": "it belongs to chat completions",
    "continue_final_message": "end with a message of the assistant, which the model continues",
    "add_generation_prompt": "end with a message of the assistant, which the model continues",
}

_RENAMED = {
    "stop": "stop_sequences",
    "response_format": "output_config.format",
    "response_format.json_schema": "output_config.format",
    "reasoning_effort": "output_config.effort",
    "tool_choice.function": "tool_choice",
    "continue_final_message": "messages",
}

_TOOL_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


def _tools(body: MessagesPrompt, names: dict[str, str]) -> dict[str, Any]:
    """`tools`, `tool_choice` and `parallel_tool_calls` of the chat completion, as far as they are asked for."""
    tools: list[dict[str, Any]] = []
    for index, tool in enumerate(body.tools):
        if tool.is_function:
            path = f"tools.{len(tools)}"
            own = f"tools.{index}"
            names |= {path: own, f"{path}.function": own, f"{path}.function.parameters": f"{own}.input_schema"}
            function: dict[str, Any] = {"name": tool.name, "parameters": tool.input_schema}
            if tool.description is not None:
                function["description"] = tool.description
            if tool.strict is not None:
                function["strict"] = tool.strict
            tools.append({"type": "function", "function": function})
    result: dict[str, Any] = {"tools": tools} if tools else {}
    choice = body.tool_choice
    if choice is None or (not tools and choice.type in ("auto", "none")):
        return result
    if choice.type == "tool":
        result["tool_choice"] = {"type": "function", "function": {"name": choice.name}}
    else:
        result["tool_choice"] = _TOOL_CHOICES[choice.type]
    return result | {"parallel_tool_calls": not choice.disable_parallel_tool_use}


def _thinking(body: MessagesPrompt, extras: dict[str, Any]) -> dict[str, Any]:
    """Templates are told by a variable, of which they know two names. What the client says itself stands."""
    if body.thinking is None or body.thinking.type not in ("enabled", "disabled"):
        return {}
    thinks = body.thinking.type == "enabled"
    own = extras.pop("chat_template_kwargs", None) or {}
    if not isinstance(own, dict):
        raise RequestError("chat_template_kwargs must be an object", param="chat_template_kwargs")
    return {"chat_template_kwargs": {"enable_thinking": thinks, "thinking": thinks, **own}}


def _output(body: MessagesPrompt) -> dict[str, Any]:
    config = body.output_config
    result: dict[str, Any] = {}
    if config is not None and config.effort is not None:
        result["reasoning_effort"] = config.effort
    if config is not None and config.format is not None:
        schema = {"name": "output", "schema": config.format.json_schema}
        result["response_format"] = {"type": "json_schema", "json_schema": schema}
    return result


def _generation(body: MessagesPrompt) -> dict[str, Any]:
    """What says how tokens come out, which `count_tokens` has not."""
    if not isinstance(body, MessagesRequest):
        return {}
    given = {
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": body.top_k,
        "request_id": body.request_id,
        "stop": body.stop_sequences or None,
    }
    return {"max_tokens": body.max_tokens, **{name: value for name, value in given.items() if value is not None}}


def _continuation(messages: list[dict[str, Any]]) -> dict[str, Any]:
    """An answer that the client has begun is continued.

    Raises:
        RequestError: it ends with a call whose result is missing.
    """
    last = messages[-1]
    if last["role"] != "assistant":
        return {}
    if last.get("tool_calls"):
        raise RequestError("messages: the last one has a tool_use block, but no tool_result follows", param="messages")
    return {"continue_final_message": True, "add_generation_prompt": False}


def translate(body: MessagesPrompt) -> tuple[ChatCompletionRequest, FieldNames]:
    """The chat completion that `body` asks for, and what its fields are called in `body`.

    Raises:
        RequestError, RequestValidationError: naming the field of `body`.
    """
    extras = shared_extras(body.model_extra or {}, NOT_HERE, "/v1/messages")
    builder = MessageBuilder()
    if body.system:
        builder.add_system(body.system)
    for index, message in enumerate(body.messages):
        builder.add(message, f"messages.{index}")
    renamed = {**_RENAMED, **builder.names}
    content = {
        **_tools(body, renamed),
        **_thinking(body, extras),
        **_output(body),
        **_generation(body),
        **_continuation(builder.messages),
        "model": body.model,
        "messages": builder.messages,
    }
    names = FieldNames(renamed)
    with names.told():
        chat = ChatCompletionRequest.model_validate({**extras, **content})
        fields.refuse_unsupported(chat.model_extra or {}, fields.CHAT)
    return chat, names
