"""What is asked of the virtual workers, and when. The same seed gives the same requests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from amoe.errors import ConfigError
from amoe.sim.worker import NewRequest
from amoe.types import SamplingParams

LengthKind = Literal["fixed", "uniform", "lognormal"]
LOG_NORMAL_CUT = 8  # no length is more than this times the mean: buffers are made for the longest


@dataclass(frozen=True, kw_only=True, slots=True)
class Lengths:
    """A distribution of lengths in tokens, at least 1.

    Attributes:
        mean: of the distribution.
        kind: `fixed`; `uniform` in [mean (1 - spread), mean (1 + spread)]; `lognormal` with σ = spread, cut off at
            `LOG_NORMAL_CUT` times the mean.
        spread: 0 is fixed, whatever the kind.
    """

    mean: int
    kind: LengthKind = "fixed"
    spread: float = 0.0

    def __post_init__(self) -> None:
        if self.mean < 1:
            raise ConfigError(f"a length must be at least 1, not {self.mean}")
        if self.kind not in get_args(LengthKind):
            raise ConfigError(f"lengths are {', '.join(get_args(LengthKind))}, not {self.kind!r}")
        if self.spread < 0 or (self.kind == "uniform" and self.spread > 1):
            raise ConfigError(f"the spread of {self.kind} lengths cannot be {self.spread}")

    @property
    def longest(self) -> int:
        """No length is greater."""
        if self.kind == "fixed" or self.spread == 0:
            return self.mean
        return round(self.mean * (1 + self.spread)) if self.kind == "uniform" else self.mean * LOG_NORMAL_CUT

    def draw(self, rng: np.random.Generator) -> int:
        """One length."""
        if self.kind == "fixed" or self.spread == 0:
            return self.mean
        if self.kind == "uniform":
            low = max(1, round(self.mean * (1 - self.spread)))
            return int(rng.integers(low, self.longest, endpoint=True))
        length = self.mean * np.exp(self.spread * rng.standard_normal() - self.spread**2 / 2)
        return int(np.clip(round(float(length)), 1, self.longest))


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """Requests: either a closed loop or Poisson arrivals.

    Attributes:
        concurrency: closed loop of so many sequences, dealt to the attention workers in turn; whenever one ends, the
            same worker gets the next.
        request_rate: Poisson arrivals per second; each goes to the attention worker with the fewest requests.
        num_requests: no more than these; None: without end.
        input, output: lengths of prompts and answers.
        context_offset: tokens of context that every sequence is taken to have before its prompt. They cost attention
            time, but are neither computed nor stored: for decode at a given context without its prefill.
        stagger: the first sequences of a closed loop are taken to be under way: of their answers, a uniform share is
            still to come. Without it, sequences of fixed length end all at once.
    """

    concurrency: int | None = None
    request_rate: float | None = None
    num_requests: int | None = None
    input: Lengths = Lengths(mean=512)
    output: Lengths = Lengths(mean=128)
    context_offset: int = 0
    stagger: bool = False

    def __post_init__(self) -> None:
        if (self.concurrency is None) == (self.request_rate is None):
            raise ConfigError("a workload has either a concurrency or a request rate")
        if self.concurrency is not None and self.concurrency < 1:
            raise ConfigError(f"the concurrency must be at least 1, not {self.concurrency}")
        if self.request_rate is not None and not self.request_rate > 0:
            raise ConfigError(f"the request rate must be greater than 0, not {self.request_rate}")
        if self.num_requests is not None and self.num_requests < 1:
            raise ConfigError(f"the number of requests must be at least 1, not {self.num_requests}")
        if self.context_offset < 0:
            raise ConfigError("context_offset must not be negative")

    @property
    def max_model_len(self) -> int:
        """Tokens of the longest sequence."""
        return self.input.longest + self.output.longest


class RequestSource:
    """Draws the requests of a workload, one after the other."""

    def __init__(self, workload: Workload, vocab_size: int, rng: np.random.Generator) -> None:
        self._workload = workload
        self._vocab_size = vocab_size
        self._rng = rng
        self.num_drawn = 0

    @property
    def is_empty(self) -> bool:
        """There are no more."""
        limit = self._workload.num_requests
        return limit is not None and self.num_drawn >= limit

    def draw(self) -> NewRequest:
        """The next request; prompts are random ids."""
        workload, rng = self._workload, self._rng
        prompt = rng.integers(0, self._vocab_size, size=workload.input.draw(rng), dtype=np.int32)
        max_tokens = workload.output.draw(rng)
        if workload.stagger and self.num_drawn < (workload.concurrency or 0):
            max_tokens = int(rng.integers(1, max_tokens, endpoint=True))
        request = NewRequest(self.num_drawn, prompt, SamplingParams(max_tokens=max_tokens, ignore_eos=True))
        self.num_drawn += 1
        return request

    def next_gap(self) -> float:
        """Seconds until the next arrival of a Poisson process."""
        assert self._workload.request_rate is not None, "a closed loop has no arrivals"
        return float(self._rng.exponential(1.0 / self._workload.request_rate))
