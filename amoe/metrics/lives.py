"""A worker that is started anew counts from 0: what its lives have counted is added up, so that no total falls."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import replace
from typing import TypeVar

import numpy as np

from amoe.stats import (
    CapacitySnapshot,
    DecisionSnapshot,
    HistogramSnapshot,
    QueueSnapshot,
    TrafficSnapshot,
    WorkerStats,
)

Item = TypeVar("Item")

_SUMS = (
    *("loops", "busy_s", "steps", "num_preemptions", "prefix_queries", "prefix_hits", "modelled_s", "num_slips"),
    *("home_s", "experts_s", "expert_work", "expert_wait_s", "redone_tokens", "resent_tokens"),
)


class WorkerLives:
    """The latest snapshot of each worker, over all its lives.

    Attributes:
        totals: by rank. Another thread may read them: what was said is replaced, never changed.
        gone: ranks whose life is over, with the turns of its loop.
    """

    def __init__(self) -> None:
        self.totals: dict[int, WorkerStats] = {}
        self.gone: dict[int, int] = {}
        self._present: dict[int, WorkerStats] = {}  # as it was told last in the present life
        self._past: dict[int, WorkerStats] = {}  # summed over the lives before

    def hear(self, stats: WorkerStats) -> bool:
        """Take a snapshot. False if it is the last word, still on its way, of a life that is over."""
        rank = stats.rank
        if stats.loops >= self.gone.get(rank, stats.loops + 1):
            return False
        last = self._present.get(rank)
        if last is not None and stats.loops < last.loops:  # started anew, and nobody has said so
            self._end_present(rank)
        self.gone.pop(rank, None)
        self._present[rank] = stats
        past = self._past.get(rank)
        self.totals[rank] = stats if past is None else added(past, stats)
        return True

    def end(self, rank: int) -> None:
        """Its life is over: what it has counted stays, and nothing is under way any more."""
        self._end_present(rank)
        if rank in self.totals:
            self.totals[rank] = at_rest(self.totals[rank])

    def welcome(self, rank: int) -> None:
        """A new life has begun: whatever comes now is of it."""
        self.gone.pop(rank, None)

    def remove(self, rank: int) -> None:
        """It has left for good, and said all. One that comes in its place later is a new one."""
        self._end_present(rank)
        self.totals.pop(rank, None)
        self.gone.pop(rank, None)

    @property
    def past(self) -> dict[int, WorkerStats]:
        """What was counted in lives that are over, by rank."""
        return dict(self._past)

    def count_on(self, past: Mapping[int, WorkerStats]) -> None:
        """Before anything is heard: of lives that somebody else has followed, its `past`."""
        self._past = dict(past)

    def _end_present(self, rank: int) -> None:
        last = self._present.pop(rank, None)
        if last is not None:
            self.gone[rank] = last.loops
            past = self._past.get(rank)
            self._past[rank] = last if past is None else added(past, last)


def added(past: WorkerStats, now: WorkerStats) -> WorkerStats:
    """What all lives have counted.

    Args:
        past: of the lives that are over.
        now: of the present one; everything that is not counted but is so at the moment comes from it.
    """
    sums = {name: getattr(past, name) + getattr(now, name) for name in _SUMS}
    return replace(
        now,
        **sums,
        queues=_joined(past.queues, now.queues, lambda q: (q.kind, q.layer), _add_queues),
        batch_sizes=_joined(past.batch_sizes, now.batch_sizes, lambda h: (h.kind, h.layer), _add_histograms),
        join_waits=_joined(past.join_waits, now.join_waits, lambda h: (h.kind, h.layer), _add_histograms),
        expert_pairs=_add_pairs(past.expert_pairs, now.expert_pairs),
        capacity=_add_capacity(past.capacity, now.capacity),
        busy_by_block=_add_values(past.busy_by_block, now.busy_by_block),
        wait_s=_add_values(past.wait_s, now.wait_s),
        iteration_tokens=_either(past.iteration_tokens, now.iteration_tokens, _add_histograms),
        decisions=_joined(past.decisions, now.decisions, lambda d: (d.block, d.reason), _add_decisions),
        traffic=_joined(past.traffic, now.traffic, lambda t: (t.kind, t.path), _add_traffic),
    )


def at_rest(stats: WorkerStats) -> WorkerStats:
    """Of a worker that is gone: what it has counted stays, and nothing is under way any more."""
    return replace(
        stats,
        num_running=0,
        num_waiting=0,
        num_deferred=0,
        kv_blocks_used=0,
        token_slots_used=0,
        parked_tokens=0,
        queues=[replace(queue, depth=0, age_s=0.0) for queue in stats.queues],
    )


def _either(a: Item | None, b: Item | None, add: Callable[[Item, Item], Item]) -> Item | None:
    return b if a is None else a if b is None else add(a, b)


def _joined(
    past: Iterable[Item], now: Iterable[Item], key: Callable[[Item], Hashable], add: Callable[[Item, Item], Item]
) -> list[Item]:
    """Items with the same key are added; the others stay as they are."""
    items = {key(item): item for item in past}
    for item in now:
        known = items.get(key(item))
        items[key(item)] = item if known is None else add(known, item)
    return list(items.values())


def _add_values(past: Mapping[str, float], now: Mapping[str, float]) -> dict[str, float]:
    return {name: past.get(name, 0.0) + now.get(name, 0.0) for name in [*past, *(n for n in now if n not in past)]}


def _add_queues(past: QueueSnapshot, now: QueueSnapshot) -> QueueSnapshot:
    return replace(now, waited_s=past.waited_s + now.waited_s, ran_s=past.ran_s + now.ran_s)


def _add_histograms(past: HistogramSnapshot, now: HistogramSnapshot) -> HistogramSnapshot:
    counts = [a + b for a, b in zip(past.counts, now.counts, strict=True)]
    return replace(now, counts=counts, total=past.total + now.total)


def _add_decisions(past: DecisionSnapshot, now: DecisionSnapshot) -> DecisionSnapshot:
    return replace(now, count=past.count + now.count)


def _add_traffic(past: TrafficSnapshot, now: TrafficSnapshot) -> TrafficSnapshot:
    return replace(
        now,
        messages=past.messages + now.messages,
        tokens=past.tokens + now.tokens,
        payload_bytes=past.payload_bytes + now.payload_bytes,
    )


def _add_pairs(past: list[list[int]], now: list[list[int]]) -> list[list[int]]:
    """[L, E] each; empty where nothing has been told."""
    if not past or not now:
        return past or now
    total: list[list[int]] = (np.array(past, np.int64) + np.array(now, np.int64)).tolist()
    return total


def _add_capacity(past: CapacitySnapshot | None, now: CapacitySnapshot | None) -> CapacitySnapshot | None:
    return _either(past, now, _add_capacities)


def _add_capacities(past: CapacitySnapshot, now: CapacitySnapshot) -> CapacitySnapshot:
    lost = _joined(past.lost, now.lost, lambda row: (row[0], row[1]), _add_lost)
    return CapacitySnapshot(
        now.reason,
        lost,
        past.num_over + now.num_over,
        past.gate_mass_lost + now.gate_mass_lost,
        past.tokens + now.tokens,
    )


def _add_lost(past: list[int], now: list[int]) -> list[int]:
    """[layer, expert, pairs dropped, pairs rerouted] of one expert."""
    layer, expert, dropped, rerouted = now
    return [layer, expert, past[2] + dropped, past[3] + rerouted]
