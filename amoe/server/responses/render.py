"""The response object: what it repeats of its request, and how its tokens are counted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from amoe.server.responses.schemas import ResponsesRequest
from amoe.server.responses.translate import function_tools
from amoe.server.sampling import SamplingDefaults


def response_head(
    body: ResponsesRequest, response_id: str, model: str, created: int, defaults: SamplingDefaults
) -> dict[str, Any]:
    """All fields of a response that has no output yet."""
    return {
        "id": response_id,
        "object": "response",
        "created_at": created,
        "completed_at": None,
        "status": "queued",
        "background": body.background,
        "error": None,
        "incomplete_details": None,
        "model": model,
        "output": [],
        "usage": None,
        **_echo(body, defaults),
    }


def _echo(body: ResponsesRequest, defaults: SamplingDefaults) -> dict[str, Any]:
    """What was asked for, or what stands for it."""
    text: dict[str, Any] = {"format": {"type": "text"} if body.text.format is None else body.text.format.as_json()}
    if body.text.verbosity is not None:
        text["verbosity"] = body.text.verbosity
    return {
        "instructions": body.instructions,
        "previous_response_id": body.previous_response_id,
        "store": body.store,
        "tools": [_tool(tool) for _, tool in function_tools(body)],
        "tool_choice": "auto" if body.tool_choice is None else body.tool_choice,
        "parallel_tool_calls": body.parallel_tool_calls,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": body.max_tool_calls,
        "temperature": defaults.temperature if body.temperature is None else body.temperature,
        "top_p": defaults.top_p if body.top_p is None else body.top_p,
        "presence_penalty": body.presence_penalty,
        "frequency_penalty": body.frequency_penalty,
        "top_logprobs": body.top_logprobs or 0,
        "text": text,
        "reasoning": {"effort": body.reasoning.effort, "summary": body.reasoning.summary},
        "truncation": body.truncation,
        "metadata": body.metadata,
        "user": body.user,
        "safety_identifier": body.safety_identifier,
        "prompt_cache_key": body.prompt_cache_key,
        "service_tier": "default",
    }


def _tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "type": "function",
        "name": tool.get("name"),
        "description": tool.get("description"),
        "parameters": tool.get("parameters"),
        "strict": tool.get("strict"),
    }


def response_usage(usage: Mapping[str, Any], reasoning_tokens: int) -> dict[str, Any]:
    """`usage` of a chat completion in the words of a response; what capacity has done stays as it is."""
    extra = {"capacity": usage["capacity"]} if "capacity" in usage else {}
    return {
        "input_tokens": usage["prompt_tokens"],
        # Nothing is charged for writing to the prefix cache, and so nothing is counted as written.
        "input_tokens_details": {
            "cached_tokens": usage["prompt_tokens_details"]["cached_tokens"],
            "cache_write_tokens": 0,
        },
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": reasoning_tokens},
        "total_tokens": usage["total_tokens"],
        **extra,
    }
