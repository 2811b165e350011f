"""What the scale-out benchmark makes of its samples."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from benchmarks.chaos.streams import Answer
from benchmarks.scale_figures import (
    MIN_PHASE_S,
    Change,
    Record,
    Sample,
    answered,
    level,
    phases_of,
    plot,
    report,
    waits_of,
)
from benchmarks.scale_out import Meter

FILL_S = 2.0


def record(later_s: float = 0.01) -> Record:
    """100 tokens a second whose queue age is 40 ms, and another from second 22 on; their joins take 10 ms more. Three
    workers are asked for at second 20 and there at second 21. One stream with a token every half second."""
    result = Record("1 expert worker", began=0.0, ended=40.0)
    age, tokens = 0.0, 0.0
    for tick in range(81):
        result.samples.append(Sample(tick / 2, age, tokens, age + 0.01 * tokens, tokens))
        age, tokens = age + 50 * (0.04 if tick / 2 < 22 else later_s), tokens + 50
    result.changes.append(Change("3 expert workers", 20.0, 21.0))
    times = [tick / 2 for tick in range(80)]
    result.answers.append(Answer(200, [7] * 80, times, "length", {"completion_tokens": 80}))
    return result


def test_waits_are_means_over_a_window() -> None:
    waits = dict(waits_of(record().samples))
    assert min(waits) == 2.0, "not before a window is full"
    assert waits[20.0] == pytest.approx(0.04)
    assert waits[23.0] == pytest.approx(0.025)
    assert waits[30.0] == pytest.approx(0.01)
    assert dict(waits_of(record().samples, "join"))[30.0] == pytest.approx(0.02)


def test_a_level_is_of_windows_that_lie_within() -> None:
    waits = waits_of(record().samples)
    assert level(waits, 2.0, 20.0) == pytest.approx(0.04)
    assert level(waits, 22.0, 40.0) == pytest.approx(0.01)
    assert math.isnan(level(waits, 22.0, 24.0))


def test_when_it_was_half_way() -> None:
    seen = record()
    how = answered(waits_of(seen.samples), seen.changes[0], FILL_S, seen.ended)
    assert (how.before, how.after) == (pytest.approx(0.04), pytest.approx(0.01))
    assert how.seconds == pytest.approx(3.5)  # one window after the change at second 22, and a sample


def test_it_may_get_worse_and_it_may_stay() -> None:
    seen = record(0.08)
    assert answered(waits_of(seen.samples), seen.changes[0], FILL_S, seen.ended).seconds == pytest.approx(3.5)
    seen = record(0.042)
    assert answered(waits_of(seen.samples), seen.changes[0], FILL_S, seen.ended).seconds is None
    assert answered([], seen.changes[0], FILL_S, seen.ended).seconds is None


def test_a_moment_on_the_other_side_is_not_half_way() -> None:
    seen = record()
    waits = [(at, 0.001 if at == 20.5 else wait) for at, wait in waits_of(seen.samples)]
    assert answered(waits, seen.changes[0], FILL_S, seen.ended).seconds == pytest.approx(3.5)


def test_phases() -> None:
    before, meanwhile, after = phases_of(record(), FILL_S)
    assert [phase.title for phase in (before, meanwhile, after)] == [
        "1 expert worker",
        "... 3 expert workers",
        "3 expert workers",
    ]
    assert (before.age_ms, before.wait_ms) == (pytest.approx(40), pytest.approx(50))
    assert after.age_ms == pytest.approx(10)
    assert after.tokens_per_s == pytest.approx(2.0, abs=0.1)
    assert before.itl_p50_ms == before.itl_p99_ms == pytest.approx(500)
    assert meanwhile.seconds == 1.0 < MIN_PHASE_S
    assert math.isnan(meanwhile.tokens_per_s) and math.isnan(meanwhile.itl_p50_ms), "too short to say anything"


def test_a_phase_without_answers_has_no_figures() -> None:
    seen = record()
    seen.answers.clear()
    assert math.isnan(phases_of(seen, FILL_S)[0].itl_p50_ms)


def test_a_report_and_a_picture(tmp_path: Path) -> None:
    seen = record()
    text = report(seen, FILL_S)
    assert "| ... 3 expert workers | 1.0 | – | – | – | – | – |" in text
    assert "done after 1.0 s; the queue age went from 40.0 to 10.0 ms, half of the way after 3.5 s" in text
    assert text.endswith("- 1 requests, none failed")
    seen.complaints.append("status 500")
    assert report(seen, FILL_S).endswith("- 1 requests, 1 failed: status 500")
    plot(tmp_path / "scale.png", seen)
    assert (tmp_path / "scale.png").stat().st_size > 1000


def test_what_a_worker_has_counted_stays_when_it_goes() -> None:
    def series(name: str, worker: str, value: float, **labels: str) -> tuple[str, dict[str, str], float]:
        return name, {"worker": worker} | labels, value

    told = [
        [
            series("expert_wait_token_seconds_total", "1", 5.0),
            series("block_batch_size_sum", "1", 9.0, block="experts"),
        ],
        [series("expert_wait_token_seconds_total", w, 6.0) for w in "12"],
        [series("expert_wait_token_seconds_total", "1", 7.0), series("join_wait_seconds_sum", "0", 3.0)],
        [series("expert_wait_token_seconds_total", w, 2.0) for w in "12"],  # new lives
    ]
    meter = Meter(cast(Any, SimpleNamespace(series=lambda: told.pop(0))))
    samples = [meter.read() for _ in range(4)]
    assert [one.age_s for one in samples] == [5.0, 12.0, 13.0, 15.0]
    assert [one.tokens for one in samples] == [9.0] * 4
    assert samples[-1].join_s == 3.0
