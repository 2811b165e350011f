"""What the scale-out benchmark makes of its samples."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from benchmarks.chaos.streams import Answer
from benchmarks.scale_out import Change, Record, Sample, fell_after, phases_of, plot, report, waits_of

ENDED = 40.0


def record() -> Record:
    """100 tokens a second that wait 40 ms each, and 10 ms from second 22 on: three workers are asked for at second 20
    and there at second 21. One stream with a token every half second."""
    result = Record(began=0.0)
    waited = 0.0
    for tick in range(81):
        at = tick / 2
        result.samples.append(Sample(at, waited, 50.0 * tick))
        waited += 50 * (0.04 if at < 22 else 0.01)
    result.changes.append(Change("3 expert workers", 20.0, 21.0))
    times = [tick / 2 for tick in range(80)]
    result.answers.append(Answer(200, [7] * 80, times, "length", {"completion_tokens": 80}))
    return result


def test_waits_are_means_over_the_last_second() -> None:
    waits = dict(waits_of(record().samples))
    assert waits[20.0] == pytest.approx(0.04)
    assert waits[22.5] == pytest.approx(0.025)
    assert waits[30.0] == pytest.approx(0.01)


def test_when_it_fell() -> None:
    seen = record()
    fell = fell_after(waits_of(seen.samples), seen.changes[0], ENDED)
    assert fell == pytest.approx(2.0, abs=0.6)
    assert fell_after([], seen.changes[0], ENDED) is None


def test_phases() -> None:
    before, meanwhile, after = phases_of(record(), ENDED)
    assert [phase.title for phase in (before, meanwhile, after)] == [
        "1 expert worker",
        "... 3 expert workers",
        "3 expert workers: done",
    ]
    assert before.wait_ms == pytest.approx(40)
    assert after.wait_ms == pytest.approx(10)
    assert after.tokens_per_s == pytest.approx(2.0, abs=0.1)
    assert before.itl_p50_ms == before.itl_p99_ms == pytest.approx(500)
    assert meanwhile.seconds == 1.0


def test_an_empty_phase_has_no_figures() -> None:
    seen = record()
    seen.answers.clear()
    assert math.isnan(phases_of(seen, ENDED)[0].itl_p50_ms)


def test_a_report_and_a_picture(tmp_path: Path) -> None:
    seen = record()
    text = report(seen, ENDED, 80)
    assert "- 1 requests, 0 failed" in text
    assert "done after 1.0 s; the wait had changed half of its way after" in text
    plot(tmp_path / "scale.png", seen)
    assert (tmp_path / "scale.png").stat().st_size > 1000
