"""What the chaos benchmark makes of what its clients saw."""

from __future__ import annotations

import math
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from benchmarks.chaos.faults import Fault, Incident
from benchmarks.chaos.figures import figures, gaps_of, throughput
from benchmarks.chaos.report import Row, plot, table
from benchmarks.chaos.residue import Residue, lasting_descriptors
from benchmarks.chaos.run import Run
from benchmarks.chaos.streams import Answer, make_load

KILL = Fault(kind="kill", workers=("expert 0",))


def answer(token_ids: list[int], times: list[float], error: str = "") -> Answer:
    return Answer(
        status=200,
        token_ids=token_ids,
        times=times,
        finish_reason="length",
        usage={"completion_tokens": len(token_ids)},
        error=error,
    )


def disturbed_run(healed: float | None = 7.0) -> Run:
    """Two streams that wait from second 3 to 5 for a worker killed at second 4 (it is told late), and a failed one."""
    first = answer([1, 2, 3, 4], [1.0, 2.0, 6.0, 8.0])
    second = answer([5, 6, 7, 9], [1.5, 3.0, 6.5, 8.5])
    return Run(0.5, [first, second, Answer(error="connection lost")], [Incident(KILL, 4.0, healed, noticed=4.25)])


ORACLE = [answer([1, 2, 3, 4], []), answer([5, 6, 7, 8], []), answer([1], [])]


def test_figures() -> None:
    result = figures(disturbed_run(), ORACLE, 4)
    assert (result.num_failed, result.num_identical, result.num_streams) == (1, 1, 3)
    assert result.serving_s == 3.0
    assert result.noticed_s == (0.25,)
    assert result.longest_gap_s == 4.0
    assert result.silence_s == 2.0  # of the times from the fault on: 4, 6, 6.5, 8, 8.5
    assert result.resumed_s == 2.0
    assert result.seconds == 8.0
    assert result.p99_before_ms == pytest.approx(1500, abs=6)
    assert result.p99_during_ms == pytest.approx(4000, abs=25)
    assert math.isnan(result.p99_after_ms)  # the last gaps begin before second 7


def test_a_cluster_that_never_heals_has_no_time_after() -> None:
    result = figures(disturbed_run(healed=None), ORACLE, 4)
    assert result.serving_s is None
    assert math.isnan(result.p99_after_ms)


def test_gaps_and_throughput() -> None:
    answers = disturbed_run().answers
    assert gaps_of(answers).tolist() == [[1, 2], [2, 6], [6, 8], [1.5, 3], [3, 6.5], [6.5, 8.5]]
    times, rates = throughput(answers, 0.5, 2.0)
    assert rates.sum() * 2.0 == 8
    assert np.allclose(times, [1.0, 3.0, 5.0, 7.0, 9.0][: len(times)])


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (Answer(status=503), "status 503"),
        (Answer(status=200, error="lost"), "lost"),
        (answer([1, 2], [1, 2]), "2 of 3 tokens"),
        (Answer(status=200, token_ids=[1, 2, 3], finish_reason="length"), "usage"),
        (Answer(status=200, token_ids=[1, 2, 3], finish_reason="stop"), "finish_reason stop"),
    ],
)
def test_complaints(wrong: Answer, words: str) -> None:
    assert words in wrong.complaint(3)
    assert answer([1, 2, 3], [1, 2, 3]).complaint(3) == ""


def test_leaks_are_named() -> None:
    files = Counter({"pipe": 2, "socket 127.0.0.1:80 LISTEN": 1})
    before = Residue(("expert 0", "server"), {"expert 0": files, "server": files}, frozenset({"a"}), 100.0, 0.0)
    assert before.leaks(before) == []
    more, fewer = files + Counter({"pipe": 1}), files - Counter({"pipe": 1})
    after = Residue(
        ("expert 0", "other", "server"), {"expert 0": more, "server": fewer}, frozenset({"b"}), 100.0, held=2.0
    )
    found = "\n".join(after.leaks(before))
    assert all(words in found for words in ("other", "expert 0 has 4", "new: 1 x pipe", "['b']", "held: 2"))
    assert "server has" not in found


def test_descriptors_are_told_by_what_they_are() -> None:
    before = lasting_descriptors(os.getpid())
    ends = [*os.pipe(), os.eventfd(0)]
    new = lasting_descriptors(os.getpid()) - before
    for end in ends:
        os.close(end)
    assert new == {"pipe": 2, "anon_inode:[eventfd]": 1}
    assert lasting_descriptors(os.getpid()) == before


def test_loads_repeat() -> None:
    load = make_load(3, 2, 16, 101)
    assert load == make_load(3, 2, 16, 101)
    assert load.num_tokens == 80
    assert [body.get("seed") for body in load.bodies] == [None, None, None, 3, 4]
    assert all(body["stream"] and body["max_tokens"] == 16 for body in load.bodies)


def test_a_row_and_a_picture(tmp_path: Path) -> None:
    run = disturbed_run()
    row = Row(
        server="2 colocated",
        faults=str(KILL),
        figures=figures(run, ORACLE, 4),
        leaks=[],
        memory_mib=(100.0, 101.0),
        usage={"dropped_pairs": 3},
    )
    lines = table([row]).splitlines()
    assert lines[0].count("|") == lines[1].count("|") == lines[2].count("|")
    assert "| kill -9 expert 0 | 1 | 1 of 3 (usage: dropped_pairs 3) | 0.25 | 3.0 |" in lines[2]
    plot(tmp_path / "chaos.png", [("a run", run)])
    assert (tmp_path / "chaos.png").stat().st_size > 1000
