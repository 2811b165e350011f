"""Log-probabilities in the two formats of OpenAI's API."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from amoe.types import TokenLogprobs

LOWEST_LOGPROB = -9999.0  # JSON has no minus infinity

TokenBytes = Callable[[int], bytes]


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST_LOGPROB)


def chat_logprobs(
    token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs], num_top: int, token_bytes: TokenBytes
) -> dict[str, Any]:
    """`choices[].logprobs` of a chat completion."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        raw = token_bytes(token_id)
        return {"token": raw.decode("utf-8", "replace"), "logprob": _finite(logprob), "bytes": list(raw)}

    content = []
    for token_id, position in zip(token_ids, logprobs, strict=True):
        best = list(zip(position.top_ids, position.top_logprobs, strict=True))[:num_top]
        content.append(
            {
                **entry(token_id, position.logprob),
                "top_logprobs": [entry(top_id, top_logprob) for top_id, top_logprob in best],
            }
        )
    return {"content": content, "refusal": None}


class CompletionLogprobs:
    """`choices[].logprobs` of a text completion; keeps the text offset between the chunks of a stream."""

    def __init__(self, num_top: int, token_bytes: TokenBytes, text_offset: int = 0) -> None:
        self._num_top = num_top
        self._token_bytes = token_bytes
        self._text_offset = text_offset

    def _name(self, token_id: int) -> str:
        """The token's text; OpenAI's `bytes:...` where it is no text by itself, so that names stay distinct."""
        raw = self._token_bytes(token_id)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def format(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs | None]) -> dict[str, Any]:
        """The next tokens. None is told as null: nothing comes before the first token of a prompt."""
        tokens, values, tops, offsets = [], [], [], []
        for token_id, position in zip(token_ids, logprobs, strict=True):
            tokens.append(self._name(token_id))
            values.append(None if position is None else _finite(position.logprob))
            tops.append(None if position is None else self._top(token_id, position))
            offsets.append(self._text_offset)
            self._text_offset += len(self._token_bytes(token_id).decode("utf-8", "replace"))
        return {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}

    def _top(self, token_id: int, position: TokenLogprobs) -> dict[str, float]:
        """The best tokens and the one that is there, by name, best first."""
        best = list(zip(position.top_ids, position.top_logprobs, strict=True))[: self._num_top]
        top = {self._name(top_id): _finite(logprob) for top_id, logprob in reversed(best)}  # the better one stays
        top[self._name(token_id)] = _finite(position.logprob)
        return dict(sorted(top.items(), key=lambda item: -item[1]))
