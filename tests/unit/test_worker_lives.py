"""What a worker counts is told over all its lives: no total falls, and nothing is counted twice."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amoe.metrics.lives import WorkerLives
from amoe.stats import (
    BATCH_SIZE_EDGES,
    CapacitySnapshot,
    DecisionSnapshot,
    HistogramSnapshot,
    QueueSnapshot,
    TrafficSnapshot,
    WorkerStats,
)


def histogram(kind: str, layer: int, times: int) -> HistogramSnapshot:
    return HistogramSnapshot(kind, layer, [times] + [0] * len(BATCH_SIZE_EDGES), float(times))


def told(times: int, rank: int = 0, layer: int = 0) -> WorkerStats:
    """A snapshot in which everything that is counted has happened so many times, and so much is under way."""
    return WorkerStats(
        rank=rank,
        role="colocated",
        loops=times,
        busy_s=float(times),
        steps=times,
        num_running=times,
        num_waiting=times,
        kv_blocks_used=times,
        kv_blocks_total=99,
        token_slots_used=times,
        num_preemptions=times,
        prefix_queries=times,
        prefix_hits=times,
        queues=[QueueSnapshot("experts", layer, times, float(times), waited_s=times, ran_s=times)],
        batch_sizes=[histogram("experts", layer, times)],
        join_waits=[histogram("experts", layer, times)],
        expert_pairs=[[times, 0], [0, times]],
        modelled_s=float(times),
        num_slips=times,
        home_s=float(times),
        experts_s=float(times),
        expert_work=times,
        expert_wait_s=float(times),
        capacity=CapacitySnapshot("slack", [[layer, 1, times, times]], times, float(times), times),
        busy_by_block={"experts": float(times)},
        wait_s={"idle": float(times)},
        iteration_tokens=histogram("attention", 0, times),
        decisions=[DecisionSnapshot("experts", "only", times)],
        traffic=[TrafficSnapshot("result", "remote", times, times, times)],
        redone_tokens=times,
        resent_tokens=times,
        parked_tokens=times,
    )


def counted(stats: WorkerStats) -> dict[str, float]:
    """Every count in it, by name."""
    counts = {name: float(getattr(stats, name)) for name in _COUNTERS}
    for queue in stats.queues:
        counts[f"waited {queue.layer}"], counts[f"ran {queue.layer}"] = queue.waited_s, queue.ran_s
    for name in ("batch_sizes", "join_waits"):
        for item in getattr(stats, name):
            counts[f"{name} {item.layer}"], counts[f"{name} {item.layer} sum"] = sum(item.counts), item.total
    counts |= {f"pairs {i}": float(sum(row)) for i, row in enumerate(stats.expert_pairs)}
    assert stats.capacity is not None and stats.iteration_tokens is not None
    for layer, _, dropped, rerouted in stats.capacity.lost:
        counts[f"dropped {layer}"], counts[f"rerouted {layer}"] = dropped, rerouted
    counts |= {"over": stats.capacity.num_over, "mass": stats.capacity.gate_mass_lost, "seen": stats.capacity.tokens}
    counts |= {"iterations": stats.iteration_tokens.total, **stats.busy_by_block, **stats.wait_s}
    counts |= {item.reason: item.count for item in stats.decisions}
    for item in stats.traffic:
        counts |= {"messages": item.messages, "tokens": item.tokens, "bytes": item.payload_bytes}
    return counts


_COUNTERS = (
    *("loops", "busy_s", "steps", "num_preemptions", "prefix_queries", "prefix_hits", "modelled_s", "num_slips"),
    *("home_s", "experts_s", "expert_work", "redone_tokens", "resent_tokens"),
)


@given(st.lists(st.lists(st.integers(1, 50), min_size=1, max_size=4).map(sorted), min_size=1, max_size=4))
def test_totals_are_the_sums_of_all_lives_and_never_fall(lives: list[list[int]]):
    book = WorkerLives()
    past, before = 0, 0.0
    for life in lives:
        for times in life:
            assert book.hear(told(times))
            counts = counted(book.totals[0])
            assert set(counts.values()) == {float(past + times)}, counts
            assert past + times >= before
            before = past + times
        past += life[-1]
        book.end(0)
        assert set(counted(book.totals[0]).values()) == {float(past)}
        book.welcome(0)


def test_what_is_so_at_the_moment_is_of_the_present_life():
    book = WorkerLives()
    book.hear(told(5))
    book.end(0)
    lost = book.totals[0]
    assert (lost.num_running, lost.num_waiting, lost.token_slots_used, lost.parked_tokens) == (0, 0, 0, 0)
    assert (lost.queues[0].depth, lost.queues[0].age_s, lost.kv_blocks_used, lost.kv_blocks_total) == (0, 0.0, 0, 99)
    book.hear(told(2))
    again = book.totals[0]
    assert (again.num_running, again.queues[0].depth, again.parked_tokens, again.steps) == (2, 2, 2, 7)


def test_layers_that_only_one_life_has_seen_are_kept():
    book = WorkerLives()
    book.hear(told(5, layer=0))
    book.end(0)
    book.hear(told(2, layer=1))
    counts = counted(book.totals[0])
    assert (counts["waited 0"], counts["waited 1"]) == (5, 2)
    assert (counts["batch_sizes 0"], counts["dropped 0"], counts["dropped 1"]) == (5, 5, 2)


def test_a_last_word_that_comes_late_counts_for_nothing():
    book = WorkerLives()
    book.hear(told(5))
    book.end(0)
    assert not book.hear(told(6))
    assert book.totals[0].steps == 5
    assert book.hear(told(1)), "fewer turns than the former life had: it is the next one"
    assert book.totals[0].steps == 6


def test_a_new_life_that_is_known_of_may_have_turned_more_often_than_the_former():
    book = WorkerLives()
    book.hear(told(1))
    book.end(0)
    book.welcome(0)
    assert book.hear(told(9))
    assert book.totals[0].steps == 10


def test_a_life_that_nobody_announced_shows_by_its_turns():
    book = WorkerLives()
    book.hear(told(5))
    book.hear(told(2))
    assert book.totals[0].steps == 7


def test_who_has_left_is_forgotten_and_counts_on_when_somebody_comes_to_its_place():
    book = WorkerLives()
    book.hear(told(5, rank=1))
    book.hear(told(3, rank=2))
    book.remove(2)
    assert set(book.totals) == {1}
    assert book.hear(told(4, rank=2)), "who comes in its place may have turned more often before anybody hears it"
    assert book.totals[2].steps == 3 + 4


@pytest.mark.parametrize("empty", [{"expert_pairs": []}, {"capacity": None}, {"iteration_tokens": None}])
def test_a_life_that_has_told_less(empty: dict[str, object]):
    book = WorkerLives()
    full, less = told(5), told(2)
    for name, value in empty.items():
        setattr(less, name, value)
    book.hear(full)
    book.end(0)
    book.hear(less)
    for name in empty:
        assert getattr(book.totals[0], name) == getattr(full, name)
