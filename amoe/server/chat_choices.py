"""`choices[]` of a chat completion, whole or in parts: OpenAI's shapes, and vLLM's extras where they are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from amoe.engine.generation import GenerationDelta
from amoe.server.conversation import ChatChoice, ChatDelta, ChatJob, ToolCall, ToolCallDelta
from amoe.server.logprobs import chat_logprobs, prompt_logprobs_json
from amoe.server.routed_experts import npy_base64
from amoe.server.template_input import text_of


def echoed_text(job: ChatJob) -> str:
    """What `echo` puts before the answer: the last message, if it is of the assistant."""
    messages = job.request.messages
    if not job.request.echo or messages[-1].role != "assistant":
        return ""
    return text_of(messages[-1].content, f"messages.{len(messages) - 1}.content")


def prompt_extras(job: ChatJob, delta: GenerationDelta) -> dict[str, Any]:
    """What is told of the prompt, for the whole response or the first part of a stream.

    Args:
        delta: of the first choice, its first part included.
    """
    extras: dict[str, Any] = {}
    if job.request.return_token_ids:
        extras["prompt_token_ids"] = job.prompt_token_ids
    if job.request.prompt_logprobs is not None:
        extras["prompt_logprobs"] = prompt_logprobs_json(
            job.prompt_token_ids, delta.prompt_logprobs, job.request.prompt_logprobs, job.tokenizer.token_bytes
        )
    return extras


def _logprobs(job: ChatJob, delta: GenerationDelta) -> dict[str, Any] | None:
    """`choices[].logprobs` of a delta, if asked for."""
    body = job.request
    if not body.logprobs:
        return None
    as_ids = body.return_tokens_as_token_ids
    return chat_logprobs(delta.token_ids, delta.logprobs, body.top_logprobs or 0, job.tokenizer.token_bytes, as_ids)


def _routed_experts(job: ChatJob, raw: bytes) -> dict[str, Any]:
    model = job.model_info
    return {"routed_experts": npy_base64(raw, model.num_moe_layers, model.pairs_per_token)}


def _reasoning(text: str | None) -> dict[str, Any]:
    """Under both names: vLLM went from one to the other, and its clients with it or not."""
    return {"reasoning": text, "reasoning_content": text}


def whole_choice(job: ChatJob, choice: ChatChoice) -> dict[str, Any]:
    """A choice of a response that is no stream."""
    extras: dict[str, Any] = {}
    if job.request.return_token_ids:
        extras["token_ids"] = choice.raw.token_ids
    if job.request.return_routed_experts:
        extras |= _routed_experts(job, bytes(choice.raw.routed_experts))
    return {
        "index": choice.index,
        "message": _message(job, choice),
        "logprobs": _logprobs(job, choice.raw),
        "finish_reason": choice.finish_reason,
        "stop_reason": choice.raw.stop_reason,
        **extras,
    }


def _message(job: ChatJob, choice: ChatChoice) -> dict[str, Any]:
    content: str | None = echoed_text(job) + choice.content
    if not content and (choice.tool_calls or choice.reasoning):
        content = None
    message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
    if job.answers.reasoning is not None and job.request.include_reasoning:
        message |= _reasoning(choice.reasoning or None)
    if choice.tool_calls:
        message["tool_calls"] = [_whole_call(call) for call in choice.tool_calls]
    return message


def _whole_call(call: ToolCall) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _call_piece(piece: ToolCallDelta) -> dict[str, Any]:
    if piece.id is None:
        return {"index": piece.index, "function": {"arguments": piece.arguments}}
    function = {"name": piece.name, "arguments": piece.arguments}
    return {"index": piece.index, "id": piece.id, "type": "function", "function": function}


class ChoiceStream:
    """Writes the deltas of one choice as parts of `choices[index]`."""

    def __init__(self, job: ChatJob) -> None:
        self._job = job
        self._is_first = True
        self._routed_experts = bytearray()

    def parts(self, delta: ChatDelta) -> list[dict[str, Any]]:
        """What `delta` adds. One part for each kind of text, since clients look for one at a time; log-probabilities
        and tokens go with the first of them, even if their text is yet to come."""
        parts = [self._part(delta, piece) for piece in _pieces(delta)]
        if delta.raw.token_ids and (self._job.request.logprobs or self._job.request.return_token_ids):
            parts = parts or [self._part(delta, {"content": ""})]
            self._tell_tokens(parts[0], delta.raw)
        self._routed_experts += delta.raw.routed_experts
        if delta.finish_reason is not None:
            parts.append(self._last(delta))
        if self._is_first:
            self._is_first = False
            parts.insert(0, self._part(delta, {"role": "assistant", "content": echoed_text(self._job)}))
        return parts

    def _part(self, delta: ChatDelta, piece: dict[str, Any]) -> dict[str, Any]:
        return {"index": delta.index, "delta": piece, "logprobs": None, "finish_reason": None}

    def _last(self, delta: ChatDelta) -> dict[str, Any]:
        part = self._part(delta, {})
        part |= {"finish_reason": delta.finish_reason, "stop_reason": delta.raw.stop_reason}
        if self._job.request.return_routed_experts:
            part |= _routed_experts(self._job, bytes(self._routed_experts))
        return part

    def _tell_tokens(self, part: dict[str, Any], raw: GenerationDelta) -> None:
        part["logprobs"] = _logprobs(self._job, raw)
        if self._job.request.return_token_ids:
            part["token_ids"] = raw.token_ids


def _pieces(delta: ChatDelta) -> Sequence[dict[str, Any]]:
    pieces: list[dict[str, Any]] = []
    if delta.reasoning:
        pieces.append(_reasoning(delta.reasoning))
    if delta.content:
        pieces.append({"content": delta.content})
    if delta.tool_calls:
        pieces.append({"tool_calls": [_call_piece(piece) for piece in delta.tool_calls]})
    return pieces
