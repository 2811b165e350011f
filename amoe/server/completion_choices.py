"""`choices[]` of a text completion, whole or in parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from amoe.engine.async_engine import ModelInfo
from amoe.engine.generation import GenerationDelta
from amoe.server.completion_schemas import CompletionRequest
from amoe.server.logprobs import CompletionLogprobs, TokenBytes, prompt_logprobs_json
from amoe.server.routed_experts import npy_base64


class ChoiceWriter:
    """Writes the deltas of one choice, or their sum, as parts of `choices[index]`.

    What is told of the prompt comes with the first part, and what is told of all tokens with the last one.

    Args:
        prompt: its tokens.
        echo: its text, if that is part of the answer.
    """

    def __init__(
        self,
        index: int,
        request: CompletionRequest,
        prompt: Sequence[int],
        echo: str,
        model: ModelInfo,
        token_bytes: TokenBytes,
    ) -> None:
        self._index = index
        self._request = request
        self._prompt = prompt
        self._echo = echo
        self._model = model
        self._token_bytes = token_bytes
        self._logprobs: CompletionLogprobs | None = None
        if request.logprobs is not None:
            self._logprobs = CompletionLogprobs(request.logprobs, token_bytes, request.return_tokens_as_token_ids)
        self._is_first = True
        self._routed_experts = bytearray()
        self._tells_more = (
            request.return_token_ids or request.return_routed_experts or request.prompt_logprobs is not None
        )

    @property
    def scores_prompt(self) -> bool:
        """The next part names all tokens of the prompt, which takes 10 µs each."""
        return self._is_first and (
            self._request.prompt_logprobs is not None or (self._request.echo and self._logprobs is not None)
        )

    def part(self, delta: GenerationDelta) -> dict[str, Any] | None:
        """What `delta` adds; None: nothing that can be seen (half a character, or what may become a stop string)."""
        is_first = self._is_first
        text = self._echo + delta.text if is_first else delta.text
        choice = {
            "index": self._index,
            "text": text,
            "logprobs": self._logprobs_of(delta),
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }
        more = self._more(delta) if self._tells_more else None
        if more:
            choice |= more
        elif not (text or delta.finish_reason or choice["logprobs"]):
            return None
        self._is_first = False
        return choice

    def _logprobs_of(self, delta: GenerationDelta) -> dict[str, Any] | None:
        if self._logprobs is None:
            return None
        if not (self._is_first and self._request.echo):
            return self._logprobs.format(delta.token_ids, delta.logprobs)
        tokens, positions = [*self._prompt, *delta.token_ids], [None, *delta.prompt_logprobs, *delta.logprobs]
        return self._logprobs.format(tokens, positions)

    def _more(self, delta: GenerationDelta) -> dict[str, Any]:
        """vLLM's fields, which are there only where they are asked for."""
        request = self._request
        more: dict[str, Any] = {}
        if request.return_token_ids:
            if self._is_first:
                more["prompt_token_ids"] = list(self._prompt)
            more["token_ids"] = delta.token_ids
        if request.prompt_logprobs is not None and self._is_first:
            more["prompt_logprobs"] = self._prompt_logprobs(delta, request.prompt_logprobs)
        if request.return_routed_experts:
            self._routed_experts += delta.routed_experts
            if delta.finish_reason is not None:
                more["routed_experts"] = npy_base64(
                    bytes(self._routed_experts), self._model.num_moe_layers, self._model.pairs_per_token
                )
        return more

    def _prompt_logprobs(self, delta: GenerationDelta, num_top: int) -> list[dict[str, Any] | None] | None:
        """Of the first choice of each prompt only: they are the same for the others."""
        if self._index % self._request.n:
            return None
        return prompt_logprobs_json(self._prompt, delta.prompt_logprobs, num_top, self._token_bytes)
