"""Thoughts apart from the answer: `<think>...</think>` and its kin."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from amoe.server.parsers.base import partial_marker


@dataclass(frozen=True, kw_only=True, slots=True)
class ReasoningFormat:
    """How a family of models marks its thoughts.

    Attributes:
        start, end: the marks.
        starts_inside: the model thinks from its first token on, with or without the first mark.
    """

    start: str
    end: str
    starts_inside: bool = False

    def is_inside(self, prompt: str) -> bool | None:
        """Where the answer to `prompt` starts. Templates may open the thoughts, or open and close them, themselves.

        Returns:
            True: among thoughts. False: behind them. None: the answer's first mark will tell.
        """
        prompt = prompt.rstrip()
        if prompt.endswith(self.start):
            return True
        if prompt.endswith(self.end):
            return False
        return True if self.starts_inside else None


REASONING_FORMATS: Mapping[str, ReasoningFormat] = {
    "deepseek_r1": ReasoningFormat(start="<think>", end="</think>", starts_inside=True),
    "qwen3": ReasoningFormat(start="<think>", end="</think>"),
    "mistral": ReasoningFormat(start="[THINK]", end="[/THINK]"),
}


class ReasoningParser:
    """Splits a text into thoughts and answer. White space next to a mark is part of neither.

    Args:
        inside: as `ReasoningFormat.is_inside` says.
    """

    def __init__(self, marks: ReasoningFormat, inside: bool | None) -> None:
        self._marks = marks
        self._text = ""
        self._reasoning = ""
        self._space = ""  # at the end of the thoughts so far
        self._strips = False  # white space that comes now is next to a mark
        self._mode: Callable[[], str | None] = self._read_answer if inside is False else self._read_start
        self._needs_mark = inside is None

    def push(self, text: str) -> tuple[str, str]:
        """The next piece of text. Returns the thoughts and the answer in it."""
        self._text += text
        return self._run()

    def finish(self) -> tuple[str, str]:
        """The text has ended: what looked like a mark is none."""
        reasoning, answer = self._run()
        rest, self._text = self._text, ""
        if self._mode == self._read_thoughts or (self._mode == self._read_start and not self._needs_mark):
            return reasoning + self._thoughts(rest), answer
        return reasoning, answer + rest

    def _run(self) -> tuple[str, str]:
        answers: list[str] = []
        mode = None
        while self._text and mode != self._mode:  # until a mode has taken what it can, and goes on itself
            mode = self._mode
            answers.append(mode() or "")
        reasoning, self._reasoning = self._reasoning, ""
        return reasoning, "".join(answers)

    def _read_start(self) -> str | None:
        text = self._text.lstrip()
        if text.startswith(self._marks.start):
            self._text = text[len(self._marks.start) :]
            self._mode, self._strips = self._read_thoughts, True
        elif text and not self._marks.start.startswith(text):
            self._mode = self._read_answer if self._needs_mark else self._read_thoughts
            self._strips = not self._needs_mark
        return None

    def _read_thoughts(self) -> str | None:
        at = self._text.find(self._marks.end)
        if at < 0:
            sure = len(self._text) - partial_marker(self._text, (self._marks.end,))
            self._reasoning += self._thoughts(self._text[:sure])
            self._text = self._text[sure:]
            return None
        self._reasoning += self._thoughts(self._text[:at])
        self._text = self._text[at + len(self._marks.end) :]
        self._mode, self._strips = self._read_answer, True
        return None

    def _thoughts(self, text: str) -> str:
        """What of thoughts may go out: white space only once more comes behind it."""
        text = self._space + text
        if self._strips:
            text = text.lstrip()
            self._strips = not text
        written = text.rstrip()
        self._space = text[len(written) :]
        return written

    def _read_answer(self) -> str | None:
        text, self._text = self._text, ""
        if self._strips:
            text = text.lstrip()
            self._strips = not text
        return text


class ReasoningTokens:
    """Counts the tokens of thoughts, marks included. By their bytes, since text may lag behind tokens.

    Args:
        token_bytes: the UTF-8 bytes of a token.
    """

    def __init__(self, marks: ReasoningFormat, inside: bool | None, token_bytes: Callable[[int], bytes]) -> None:
        self._start, self._end = marks.start.encode(), marks.end.encode()
        self._token_bytes = token_bytes
        self._tail = b""
        self._state = inside
        self._num_seen = 0
        self.count = 0

    def push(self, token_ids: Sequence[int]) -> None:
        """The next tokens."""
        for token_id in token_ids:
            if self._state is False:
                return
            self._num_seen += 1
            self._tail += self._token_bytes(token_id)
            if self._state is None:
                self._look_for_start()
            if self._state:
                self.count = self._num_seen
                self._look_for_end()

    def _look_for_start(self) -> None:
        text = self._tail.lstrip()
        if text.startswith(self._start):
            self._state = True
        elif not self._start.startswith(text):
            self._state = False

    def _look_for_end(self) -> None:
        if self._end in self._tail:
            self._state = False
        self._tail = self._tail[-len(self._end) :]
