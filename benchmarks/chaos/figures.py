"""From streams to figures: pure functions of what the client saw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from benchmarks.chaos.faults import Incident
from benchmarks.chaos.run import Run
from benchmarks.chaos.streams import Answer

Float64Array = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """What a run with faults did to its streams.

    Attributes:
        num_failed: that did not end as they were asked to.
        num_identical: of the others, with the tokens of the undisturbed run.
        num_streams: in all.
        noticed_s: from each fault until the server took the workers for dead; None: it did not.
        serving_s: from the first fault until all workers served again; None: they did not.
        silence_s: longest time behind the last fault in which no stream at all got a token.
        resumed_s: from the last fault until the first token after the longest silence behind it.
        p99_before_ms, p99_during_ms, p99_after_ms: of inter-token latency: gaps that ended before the first fault,
            that overlap the time until all workers served again, and the rest; nan: there were none.
        longest_gap_s: between two tokens of one stream.
        seconds: of the run.
    """

    num_failed: int
    num_identical: int
    num_streams: int
    noticed_s: tuple[float | None, ...]
    serving_s: float | None
    silence_s: float
    resumed_s: float
    p99_before_ms: float
    p99_during_ms: float
    p99_after_ms: float
    longest_gap_s: float
    seconds: float


def figures(run: Run, oracle: Sequence[Answer], max_tokens: int) -> Figures:
    """Sum a run up.

    Args:
        oracle: the answers of an undisturbed run of the same load.
    """
    answers, incidents = run.answers, run.incidents
    complaints = [answer.complaint(max_tokens) for answer in answers]
    pairs = zip(answers, oracle, complaints, strict=True)
    first, last = incidents[0].began, max(incident.began for incident in incidents)
    healed = _all_healed(incidents)
    gaps = gaps_of(answers)
    all_times = np.sort(np.array([time for answer in answers for time in answer.times]))
    before = gaps[:, 1] <= first
    during = ~before & (gaps[:, 0] < (np.inf if healed is None else healed))
    silence_s, resumed = _longest_silence(np.append(last, all_times[all_times >= last]))
    return Figures(
        num_failed=sum(bool(complaint) for complaint in complaints),
        num_identical=sum(not bad and a.token_ids == o.token_ids for a, o, bad in pairs),
        num_streams=len(answers),
        noticed_s=tuple(None if i.noticed is None else i.noticed - i.began for i in incidents),
        serving_s=None if healed is None else healed - first,
        silence_s=silence_s,
        resumed_s=resumed - last,
        p99_before_ms=_p99_ms(gaps[before]),
        p99_during_ms=_p99_ms(gaps[during]),
        p99_after_ms=_p99_ms(gaps[~before & ~during]),
        longest_gap_s=float((gaps[:, 1] - gaps[:, 0]).max(initial=0.0)),
        seconds=float(all_times[-1]) - run.began if len(all_times) else float("nan"),
    )


def gaps_of(answers: Sequence[Answer]) -> Float64Array:
    """[num_gaps, 2] when each gap between two tokens of one stream began and ended."""
    gaps = [gap for answer in answers for gap in pairwise(answer.times)]
    return np.array(gaps, np.float64).reshape(-1, 2)


def throughput(answers: Sequence[Answer], began: float, width_s: float) -> tuple[Float64Array, Float64Array]:
    """Tokens per second over time.

    Returns:
        [n] the middles of intervals of `width_s`, in seconds since `began`; [n] the rates within them.
    """
    times = np.array([time for answer in answers for time in answer.times]) - began
    edges = np.arange(0.0, times.max(initial=0.0) + width_s, width_s)
    counts, _ = np.histogram(times, edges)
    return (edges[:-1] + edges[1:]) / 2, counts / width_s


def _all_healed(incidents: Sequence[Incident]) -> float | None:
    healed = [incident.healed for incident in incidents if incident.healed is not None]
    return max(healed) if len(healed) == len(incidents) else None


def _longest_silence(times: Float64Array) -> tuple[float, float]:
    """How long the longest time without any token was, and when it ended; nan without two tokens."""
    if len(times) < 2:
        return float("nan"), float("nan")
    silences = np.diff(times)
    index = int(silences.argmax())
    return float(silences[index]), float(times[index + 1])


def _p99_ms(gaps: Float64Array) -> float:
    return float(np.percentile(gaps[:, 1] - gaps[:, 0], 99)) * 1e3 if len(gaps) else float("nan")
