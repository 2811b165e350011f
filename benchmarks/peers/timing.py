"""What is measured of a system, and the figures that follow: the same arithmetic for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from amoe.errors import AmoeError


@dataclass(frozen=True, slots=True)
class Point:
    """What is asked for at once: `batch` prompts of `input_len` random tokens, `output_len` tokens after each."""

    batch: int
    input_len: int
    output_len: int

    @property
    def key(self) -> tuple[int, int, int]:
        """Its numbers, for a seed."""
        return self.batch, self.input_len, self.output_len

    def prompts(self, rng: np.random.Generator, vocab_size: int) -> list[list[int]]:
        """[batch][input_len] token ids; always new ones, so that no cache of prompts helps anybody."""
        return rng.integers(0, vocab_size, size=(self.batch, self.input_len)).tolist()


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """One run of a point.

    Attributes:
        prefill_tokens: of all prompts.
        prefill_s: from the start until every sequence has its first token.
        decode_tokens, decode_s: that came, and how long it was, from then until the first sequence has its last token.
        total_s: from the start to the last token of all.
    """

    prefill_tokens: int
    prefill_s: float
    decode_tokens: int
    decode_s: float
    total_s: float

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens per second."""
        return self.prefill_tokens / self.prefill_s

    @property
    def decode_rate(self) -> float:
        """Generated tokens per second while all sequences generate; NaN if that never was."""
        return self.decode_tokens / self.decode_s if self.decode_s > 0 else float("nan")


def timing_of(point: Point, started_at: float, arrivals: Sequence[Sequence[float]]) -> Timing:
    """The timing of a run from when each token arrived.

    Args:
        started_at: seconds.
        arrivals: [batch][output_len] seconds of the same clock.

    Raises:
        AmoeError: not every sequence has as many tokens as were asked for.
    """
    lengths = {len(times) for times in arrivals}
    if len(arrivals) != point.batch or lengths != {point.output_len}:
        raise AmoeError(f"{point} was answered by {len(arrivals)} sequences of {sorted(lengths)} tokens")
    times = np.asarray(arrivals)
    all_started, first_ended = float(times[:, 0].max()), float(times[:, -1].min())
    return Timing(
        prefill_tokens=point.batch * point.input_len,
        prefill_s=all_started - started_at,
        decode_tokens=int(((times > all_started) & (times <= first_ended)).sum()),
        decode_s=max(0.0, first_ended - all_started),
        total_s=float(times.max()) - started_at,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One run of one system.

    Attributes:
        round: number, from 0.
        memory_bandwidth: bytes per second that two threads read from memory just before.
    """

    system: str
    point: Point
    round: int
    timing: Timing
    memory_bandwidth: float

    @property
    def end_to_end(self) -> float:
        """Generated tokens per second from the start to the last token, prefill included."""
        return self.point.batch * self.point.output_len / self.timing.total_s
