"""What is observed of one request, and what follows from many of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Float64Array = npt.NDArray[np.float64]

INTERRUPTED = "interrupted"


@dataclass(slots=True)
class RequestRecord:
    """One request as its client saw it. Times are seconds of one monotonic clock.

    Attributes:
        started_at: just before the request was sent.
        finished_at: after its last byte, or its failure.
        arrivals: of the pieces of the answer that brought tokens.
        tokens: [len(arrivals)] tokens that each brought.
        prompt_tokens, output_tokens: as the server counted them.
        requested_tokens: output tokens that were asked for.
        failure: kind of failure, None if the answer is complete; `INTERRUPTED` if nobody waited for it.
    """

    started_at: float
    finished_at: float = 0.0
    arrivals: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    prompt_tokens: int = 0
    output_tokens: int = 0
    requested_tokens: int = 0
    failure: str | None = None

    @property
    def time_to_first_token(self) -> float:
        """Seconds; NaN if there was none."""
        return self.arrivals[0] - self.started_at if self.arrivals else float("nan")

    @property
    def time_per_output_token(self) -> float:
        """Seconds per token after the first piece; NaN if nothing came after it."""
        later = sum(self.tokens[1:])
        return (self.arrivals[-1] - self.arrivals[0]) / later if later else float("nan")

    @property
    def inter_token_latencies(self) -> Float64Array:
        """Seconds between tokens: a piece of k tokens counts as k gaps of a k-th of its wait each."""
        if len(self.arrivals) < 2:
            return np.empty(0, np.float64)
        counts = np.asarray(self.tokens[1:])
        return np.repeat(np.diff(self.arrivals) / counts, counts)


@dataclass(frozen=True, kw_only=True, slots=True)
class Latency:
    """Distribution of a latency over `count` observations, in milliseconds; NaN if there is none."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float
    max: float

    @classmethod
    def of_seconds(cls, values: npt.ArrayLike) -> Latency:
        """Summarise seconds; NaN values are not observations."""
        milliseconds = np.asarray(values, np.float64) * 1e3
        milliseconds = milliseconds[~np.isnan(milliseconds)]
        if not len(milliseconds):
            nan = float("nan")
            return cls(count=0, mean=nan, p50=nan, p90=nan, p99=nan, max=nan)
        p50, p90, p99 = (float(p) for p in np.percentile(milliseconds, (50, 90, 99)))
        mean, largest = float(milliseconds.mean()), float(milliseconds.max())
        return cls(count=len(milliseconds), mean=mean, p50=p50, p90=p90, p99=p99, max=largest)


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """What a run shows. Latencies, tokens and throughput are those of completed requests.

    Attributes:
        duration_s: from the first request sent to the last one answered.
        completed, failed, interrupted: requests.
        failures: failed requests by kind.
        short: completed requests with fewer tokens than asked for.
        prompt_tokens, output_tokens: counted by the server.
        requests_per_s, output_tokens_per_s, total_tokens_per_s: over `duration_s`; total is prompt and output.
        time_to_first_token, inter_token_latency, time_per_output_token, end_to_end: per request, ITL per token.
        mean_concurrency: requests under way, averaged over `duration_s`.
    """

    duration_s: float
    completed: int
    failed: int
    interrupted: int
    failures: dict[str, int]
    short: int
    prompt_tokens: int
    output_tokens: int
    requests_per_s: float
    output_tokens_per_s: float
    total_tokens_per_s: float
    mean_concurrency: float
    time_to_first_token: Latency
    inter_token_latency: Latency
    time_per_output_token: Latency
    end_to_end: Latency


def summarise(records: Sequence[RequestRecord]) -> Figures:
    """Figures of a run; those of an empty run are 0 and NaN."""
    done = [r for r in records if r.failure is None]
    failures = Counter(r.failure for r in records if r.failure not in (None, INTERRUPTED))
    started = min((r.started_at for r in records), default=0.0)
    duration = max((r.finished_at for r in records), default=0.0) - started
    prompt_tokens, output_tokens = sum(r.prompt_tokens for r in done), sum(r.output_tokens for r in done)
    gaps = [r.inter_token_latencies for r in done]

    def per_second(amount: float) -> float:
        return amount / duration if duration > 0 else 0.0

    return Figures(
        duration_s=duration,
        completed=len(done),
        failed=failures.total(),
        interrupted=sum(r.failure == INTERRUPTED for r in records),
        failures={str(kind): count for kind, count in failures.most_common()},
        short=sum(r.output_tokens < r.requested_tokens for r in done),
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        requests_per_s=per_second(len(done)),
        output_tokens_per_s=per_second(output_tokens),
        total_tokens_per_s=per_second(prompt_tokens + output_tokens),
        mean_concurrency=per_second(sum(r.finished_at - r.started_at for r in records)),
        time_to_first_token=Latency.of_seconds([r.time_to_first_token for r in done]),
        inter_token_latency=Latency.of_seconds(np.concatenate(gaps) if gaps else []),
        time_per_output_token=Latency.of_seconds([r.time_per_output_token for r in done]),
        end_to_end=Latency.of_seconds([r.finished_at - r.started_at for r in done]),
    )
