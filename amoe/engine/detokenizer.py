"""From token ids to text, one token at a time: never half a character, never a piece of a stop string.

`Detokenizer` = a decoder (ids to text) followed by a `StopFilter` (text to text). Both cost O(1) per token.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from typing import Protocol

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class TokenDecoder(Protocol):
    """Decodes a growing sequence of tokens."""

    def push(self, token_id: int) -> str:
        """Text that `token_id` makes certain; may be empty."""
        ...

    def flush(self) -> str:
        """What is left at the end: half a character becomes U+FFFD."""
        ...


class ByteDecoder:
    """For vocabularies whose tokens are byte strings: exact, since UTF-8 itself says where a character ends."""

    def __init__(self, token_bytes: Callable[[int], bytes]) -> None:
        self._token_bytes = token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        return self._utf8.decode(self._token_bytes(token_id))

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class WindowDecoder:
    """For any other vocabulary: decodes a short window of tokens and takes what is new.

    The window starts one emitted piece early, because some decoders treat the first token of a text differently (they
    strip its leading space).
    """

    # A character has at most 4 bytes: more tokens than this that still end in U+FFFD are broken text, not half a one.
    MAX_PENDING = 8

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._num_emitted = 0  # leading ids of the window whose text is out
        self._emitted = ""

    def push(self, token_id: int) -> str:
        self._ids.append(token_id)
        text = self._decode(self._ids)
        if text.endswith(REPLACEMENT) and len(self._ids) - self._num_emitted < self.MAX_PENDING:
            return ""
        return self._emit(text)

    def flush(self) -> str:
        return self._emit(self._decode(self._ids))

    def _emit(self, text: str) -> str:
        delta = text[len(self._emitted) :]
        tail = self._ids[self._num_emitted :]
        tail_text = self._decode(tail)
        if tail_text:
            self._ids, self._emitted = tail, tail_text
        else:  # a window that decodes to nothing would make the next token look like the first one
            self._emitted = text
        self._num_emitted = len(self._ids)
        return delta


class StopFilter:
    """Passes text on until a stop string is complete; holds back what may yet become one.

    The string that is complete first wins, whatever the pieces in which the text comes; of two that end together, the
    longer one.
    """

    def __init__(self, stops: Sequence[str], include_stop: bool = False) -> None:
        self._stops = tuple(stops)
        self._include_stop = include_stop
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """Text that may go out. After a match `matched` is set and nothing more comes."""
        if self.matched is not None:
            return ""
        if not self._stops:
            return text
        text = self._held + text
        found = self._first_match(text)
        if found is not None:
            start, stop = found
            self.matched = stop
            self._held = ""
            return text[: start + len(stop)] if self._include_stop else text[:start]
        keep = self._held_length(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """The text has ended: what was held back is no stop string."""
        held, self._held = self._held, ""
        return held

    def _first_match(self, text: str) -> tuple[int, str] | None:
        matches = [(start + len(stop), start, stop) for stop in self._stops if (start := text.find(stop)) >= 0]
        if not matches:
            return None
        _, start, stop = min(matches)
        return start, stop

    def _held_length(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        longest = 0
        for stop in self._stops:
            at = text.find(stop[0], max(0, len(text) - len(stop) + 1))
            while at >= 0 and not stop.startswith(text[at:]):
                at = text.find(stop[0], at + 1)
            if at >= 0:
                longest = max(longest, len(text) - at)
        return longest


class Detokenizer:
    """Text of one sequence, token by token.

    Args:
        decoder: ids to text.
        stops: stop strings, looked for only in text that comes after the first `min_tokens` tokens.
        include_stop: the stop string is part of the text.
    """

    def __init__(
        self, decoder: TokenDecoder, stops: Sequence[str] = (), include_stop: bool = False, min_tokens: int = 0
    ) -> None:
        self._decoder = decoder
        self._filter = StopFilter(stops, include_stop)
        self._tokens_before_stop = min_tokens

    @property
    def stop_string(self) -> str | None:
        """The stop string that ended the text, once one has."""
        return self._filter.matched

    def push(self, token_id: int) -> str:
        """Text that may go out now."""
        text = self._decoder.push(token_id)
        if self._tokens_before_stop > 0:
            self._tokens_before_stop -= 1
            return text
        return self._filter.push(text)

    def flush(self) -> str:
        """The rest of the text, at the end of the sequence."""
        if self._filter.matched is not None:
            return ""
        tail = self._decoder.flush()
        if self._tokens_before_stop > 0:
            return tail
        return self._filter.push(tail) + self._filter.flush()
