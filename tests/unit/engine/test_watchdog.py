"""Silence and work without steps are a stall; lasting silence is death."""

from __future__ import annotations

from amoe.engine.watchdog import Watchdog
from amoe.stats import QueueSnapshot, WorkerStats


def test_silence_is_a_stall_and_at_last_death():
    watchdog = Watchdog(range(2), 80.0, 30.0)
    watchdog.advance(29.0)
    assert watchdog.stalled is None
    watchdog.beat(0, WorkerStats(rank=0, role="colocated"))
    watchdog.advance(2.0)
    assert watchdog.stalled == 1
    assert watchdog.silent is None
    watchdog.advance(50.0)
    assert watchdog.silent == 1


def test_a_long_step_is_forgiven():
    watchdog = Watchdog(range(1), 80.0, 30.0)
    watchdog.advance(40.0)
    assert watchdog.stalled == 0
    watchdog.beat(0, WorkerStats(rank=0, role="colocated"))
    assert watchdog.stalled is None


def test_work_without_steps_is_a_stall_until_a_step():
    watchdog = Watchdog(range(1), 8.0, 30.0)
    stats = WorkerStats(rank=0, role="attention", num_running=1, steps=5)
    watchdog.beat(0, stats)
    for turn in range(10):
        watchdog.advance(3.0)
        assert (watchdog.stalled is None) == (turn < 9)
        watchdog.beat(0, stats)
    stats.steps = 6
    watchdog.beat(0, stats)
    assert watchdog.stalled is None


def test_idle_workers_do_not_stall():
    watchdog = Watchdog(range(1), 8.0, 30.0)
    for _ in range(20):
        watchdog.beat(0, WorkerStats(rank=0, role="experts", queues=[QueueSnapshot("experts", 0, 0, 0.0)]))
        watchdog.advance(5.0)
    assert watchdog.stalled is None
    assert watchdog.silent is None


def test_waiting_tokens_are_work():
    watchdog = Watchdog(range(1), 8.0, 30.0)
    for _ in range(20):
        watchdog.beat(0, WorkerStats(rank=0, role="experts", queues=[QueueSnapshot("experts", 0, 3, 1.0)]))
        watchdog.advance(5.0)
    assert watchdog.stalled == 0


def test_waiting_sequences_are_work():
    watchdog = Watchdog(range(1), 8.0, 30.0)
    for _ in range(20):
        watchdog.beat(0, WorkerStats(rank=0, role="attention", num_waiting=1))
        watchdog.advance(5.0)
    assert watchdog.stalled == 0
