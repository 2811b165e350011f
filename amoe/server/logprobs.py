"""Log-probabilities in the two formats of OpenAI's API, and those of prompts in vLLM's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from amoe.types import TokenLogprobs

LOWEST_LOGPROB = -9999.0  # JSON has no minus infinity
FEW_LOGPROBS = 32  # told in a few milliseconds at most: not worth a thread

TokenBytes = Callable[[int], bytes]


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST_LOGPROB)


def id_name(token_id: int) -> str:
    """How a token is called where `return_tokens_as_token_ids` is asked for."""
    return f"token_id:{token_id}"


def chat_logprobs(
    token_ids: Sequence[int],
    logprobs: Sequence[TokenLogprobs],
    num_top: int,
    token_bytes: TokenBytes,
    as_ids: bool = False,
) -> dict[str, Any]:
    """`choices[].logprobs` of a chat completion; `as_ids`: tokens are named by their numbers."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        raw = token_bytes(token_id)
        name = id_name(token_id) if as_ids else raw.decode("utf-8", "replace")
        return {"token": name, "logprob": _finite(logprob), "bytes": list(raw)}

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


def prompt_logprobs_json(
    prompt: Sequence[int], logprobs: Sequence[TokenLogprobs], num_top: int, token_bytes: TokenBytes
) -> list[dict[str, Any] | None]:
    """vLLM's `prompt_logprobs`: for each token of the prompt, by id, itself and the `num_top` best; null for the first,
    which nothing comes before.

    Args:
        logprobs: one per token of the prompt but the first.
    """

    def entry(token_id: int, logprob: float, rank: int) -> dict[str, Any]:
        text = token_bytes(token_id).decode("utf-8", "replace")
        return {"logprob": _finite(logprob), "rank": rank, "decoded_token": text}

    told: list[dict[str, Any] | None] = [None]
    for token_id, position in zip(prompt[1:], logprobs, strict=True):
        here = {str(token_id): entry(token_id, position.logprob, position.rank)}
        best = list(zip(position.top_ids, position.top_logprobs, strict=True))[:num_top]
        for rank, (top_id, logprob) in enumerate(best, 1):
            here.setdefault(str(top_id), entry(top_id, logprob, rank))
        told.append(here)
    return told


class CompletionLogprobs:
    """`choices[].logprobs` of a text completion; keeps the text offset between the chunks of a stream.

    Args:
        num_top: best tokens to tell.
        as_ids: tokens are named by their numbers.
    """

    def __init__(self, num_top: int, token_bytes: TokenBytes, as_ids: bool = False) -> None:
        self._num_top = num_top
        self._token_bytes = token_bytes
        self._as_ids = as_ids
        self._text_offset = 0

    def _name(self, token_id: int) -> str:
        """The token's text; OpenAI's `bytes:...` where it is no text by itself, so that names stay distinct."""
        if self._as_ids:
            return id_name(token_id)
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
