"""The supervisor, over workers that are nothing but their handles."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from amoe.cluster.process import title_of
from amoe.cluster.topology import NOBODY
from amoe.config import FailureConfig
from amoe.engine.messages import Applied, Failed, Heartbeat, Pulse, Topology, Unanswered
from amoe.errors import ConfigError, EngineDeadError, UnfinishedError
from amoe.stats import WorkerStats
from tests.unit.cluster.fake_cluster import Fakes

# Nobody is silent by accident, however slow the machine is.
CALM = FailureConfig(timeout_s=600.0, backoff_s=0.01, max_backoff_s=600.0, max_crashes=3)


def beat(fakes: Fakes, *ranks: int) -> None:
    for rank in ranks:
        fakes.engine.on_message(rank, Heartbeat(WorkerStats(rank, "experts", 0, 0.0, 0)))


async def test_a_worker_that_dies_is_replaced_in_this_order():
    async with Fakes(CALM) as fakes:
        first = fakes.worker(1)
        first.die("was killed by SIGKILL")
        assert fakes.board.incarnations[1] == NOBODY  # at once: homes send elsewhere
        assert fakes.engine.note == "expert 0 has died and is being replaced"
        await fakes.until("back 1")
        assert fakes.events == ["lost 1 exit", "lose 1", "close 1.0", "launch 1.1", "attach 1", "back 1"]
        assert fakes.board.incarnations == [0, 1, 0, NOBODY]
        first_words, then = fakes.worker(1).told
        assert isinstance(first_words, Topology) and isinstance(then, Topology)
        assert (first_words.incarnations[1], then.incarnations[1]) == (NOBODY, 1)
        assert then.addresses[1] == "here"
        assert (fakes.engine.note, fakes.engine.trouble) == ("", "")
        assert [status.state for status in fakes.supervisor.statuses()] == ["serving"] * 3


async def test_the_log_says_whether_replicas_take_over(caplog):
    caplog.set_level(logging.ERROR, "amoe.cluster.supervisor")
    async with Fakes(CALM) as fakes:
        fakes.cluster.shape = SimpleNamespace(sparse_layers=(True,))
        fakes.board.owners = np.array([[[0, 1], [1, 0]]], np.int16)
        fakes.worker(1).die("was killed by SIGKILL")
        assert "was killed by SIGKILL: replicas of its experts take over" in caplog.text
        caplog.clear()
        fakes.worker(2).die("was killed by SIGKILL")  # while the other one is not there
        assert "tokens for experts that it alone holds wait for its next life" in caplog.text
        fakes.cluster.shape = None  # fake workers hold nothing
        await fakes.until("back 1")
        await fakes.until("back 2")


async def test_the_next_life_begins_only_when_the_last_is_over():
    async with Fakes(CALM) as fakes:
        fakes.worker(1).is_immortal = True
        fakes.engine.on_gone(1, "worker 1 has gone")
        await fakes.until("lose 1")
        for _ in range(20):
            await asyncio.sleep(0.01)
        assert "launch 1.1" not in fakes.events
        fakes.worker(1).die("was killed at last")
        await fakes.until("back 1")
        assert fakes.events[0] == "kill 1.0"


async def test_a_crash_loop_is_trouble_and_goes_on_slowly(monkeypatch):
    async with Fakes(CALM) as fakes:
        fakes.scripts[2].extend([ConfigError("model.safetensors is gone"), EngineDeadError("it failed")])
        fakes.hold = asyncio.Event()
        fakes.worker(2).die("was killed by SIGSEGV")
        await fakes.until("launch 2.3")
        assert fakes.events.count("lost 2 start") == 2
        assert fakes.engine.trouble == ("expert 1 has died 3 times in a row, last: it failed; it is being started anew")
        fakes.hold.set()
        await fakes.until("back 2")
        assert fakes.engine.trouble.endswith("it serves again, for now")
        monkeypatch.setattr("amoe.cluster.places.TRUST_S", 0.0)
        await fakes.until_holds(lambda: not fakes.engine.trouble)
        assert fakes.supervisor.statuses()[2].num_crashes == 3  # still remembered: the next pause would be longer


async def test_who_waits_for_its_next_life_says_for_how_long():
    failure = FailureConfig(timeout_s=600.0, backoff_s=100.0, max_backoff_s=600.0, max_crashes=2)
    async with Fakes(failure) as fakes:
        fakes.scripts[1].append(ConfigError("no such file"))
        fakes.worker(1).die("was killed by SIGKILL")
        await fakes.until("lost 1 start")
        await fakes.until_holds(lambda: fakes.supervisor.statuses()[1].state == "waiting")
        status = fakes.supervisor.statuses()[1]
        assert (status.num_crashes, status.reason) == (2, "no such file")
        assert 0 < status.retry_s <= 100
        assert status.ended_s is not None
        assert fakes.supervisor.statuses()[2].ended_s is None
        assert "last: no such file; next attempt in " in fakes.engine.trouble


async def test_who_says_nothing_while_starting_is_given_up(monkeypatch):
    monkeypatch.setattr("amoe.cluster.late_start.START_SILENCE_S", 0.05)
    async with Fakes(CALM) as fakes:
        fakes.hold = asyncio.Event()
        fakes.worker(1).die("was killed by SIGKILL")
        await fakes.until("lost 1 start")
        assert "expert 0 has said nothing for 0.05 s while starting" in fakes.supervisor.statuses()[1].reason
        fakes.hold.set()
        await fakes.until("back 1")
        assert "kill 1.1" in fakes.events


@pytest.mark.parametrize("when", ["starting", "waiting"])
async def test_stop_in_the_middle_leaves_nothing(when):
    failure = FailureConfig(timeout_s=600.0, backoff_s=100.0, max_backoff_s=600.0)
    async with Fakes(failure) as fakes:
        fakes.hold = asyncio.Event()
        if when == "waiting":
            fakes.scripts[1].append(ConfigError("no such file"))
        fakes.worker(1).die("was killed by SIGKILL")
        await fakes.until("launch 1.1")
    assert "back 1" not in fakes.events
    assert {event for event in fakes.events if event.startswith("launch")} == {"launch 1.1"}
    assert not fakes.cluster.workers


async def test_who_is_silent_is_killed():
    async with Fakes(FailureConfig(timeout_s=0.5, backoff_s=0.01)) as fakes:
        beat(fakes, 0, 1, 2)
        while "lost 2 silent" not in fakes.events:
            beat(fakes, 0, 1)
            await asyncio.sleep(0.01)
        assert "kill 2.0" in fakes.events
        assert "lost 1 silent" not in fakes.events
        assert "has given no sign of life for" in fakes.supervisor.statuses()[2].reason


async def test_who_hangs_in_a_step_is_killed():
    async with Fakes(CALM) as fakes:
        fakes.engine.on_message(1, Pulse(700.0, None))
        await fakes.until("lost 1 hung")
        await fakes.until("back 1")


async def test_who_does_not_answer_and_has_nothing_to_do_is_killed():
    async with Fakes(CALM) as fakes:
        beat(fakes, 0, 1, 2)
        for _ in range(3):
            fakes.engine.on_message(0, Unanswered(1, 600.0))
            beat(fakes, 0, 1, 2)
        await fakes.until("lost 1 cut")
        await fakes.until("back 1")


async def test_what_a_worker_says_of_its_failure_is_told():
    async with Fakes(CALM) as fakes:
        fakes.engine.on_message(1, Failed("ZeroDivisionError: a bug", user_error=False))
        fakes.worker(1).die("exited with status 1")
        assert fakes.supervisor.statuses()[1].reason == "expert 0 exited with status 1: ZeroDivisionError: a bug"
        await fakes.until("back 1")


async def test_a_topology_that_was_applied_is_noted():
    async with Fakes(CALM) as fakes:
        waiting = asyncio.create_task(fakes.board.wait_applied(1))
        for rank in range(3):
            await asyncio.sleep(0)
            assert not waiting.done()
            fakes.engine.on_message(rank, Applied(1))
        await waiting


async def test_add_and_remove():
    async with Fakes(CALM) as fakes:
        await fakes.supervisor.add(3)
        assert fakes.supervisor.ranks == {0, 1, 2, 3}
        assert fakes.board.incarnations == [0, 0, 0, 0]
        await fakes.supervisor.drain(3)
        assert fakes.supervisor.statuses()[3].state == "draining"
        await fakes.supervisor.remove(3)
        assert fakes.board.incarnations == [0, 0, 0, NOBODY]
        assert "lost 3 exit" not in fakes.events
        assert fakes.events[-3:] == ["lose 3", "close 3.0", "removed 3"]
        await fakes.supervisor.add(3)
        assert fakes.board.incarnations[3] == 1  # never the same life twice
        status = fakes.supervisor.statuses()[3]
        assert (status.incarnation, status.lives) == (1, 1), "for an operator it is another worker"
        fakes.worker(3).die("was killed by SIGKILL")
        await fakes.until("back 3")
        assert [worker.lives for worker in fakes.supervisor.statuses()] == [1, 1, 1, 2]


async def test_who_cannot_be_killed_holds_up_nobody_who_asked_it_to_leave(monkeypatch):
    """It waits for a disk: the operator is told, and its rank is nobody else's before it has ended."""
    monkeypatch.setattr("amoe.cluster.supervisor.LEAVE_GRACE_S", 0.0)
    monkeypatch.setattr("amoe.cluster.supervisor.BURIAL_PATIENCE_S", 0.01)
    async with Fakes(CALM) as fakes:
        await fakes.supervisor.add(3)
        fakes.worker(3).is_immortal = True
        await fakes.supervisor.drain(3)
        with pytest.raises(UnfinishedError, match="expert 2 does not end although it was killed"):
            await fakes.supervisor.remove(3)
        assert fakes.board.incarnations[3] == NOBODY
        with pytest.raises(ValueError, match="rank 3 is taken"):
            await fakes.supervisor.add(3)
        fakes.worker(3).die("was killed at last")
        await fakes.until("removed 3")
        assert "lost 3 exit" not in fakes.events
        await fakes.supervisor.add(3)
        assert fakes.board.incarnations[3] == 1


@pytest.mark.parametrize(
    ("rank", "held_by", "on_expert_loss", "can"),
    [
        (2, [0], "wait", True),  # it holds nothing
        (1, [0], "wait", False),
        (1, [0, 1], "wait", True),  # the other one holds all of it as well
        (1, [0], "reroute", True),
        (0, [0, 1], "reroute", False),  # the only one with attention
    ],
)
async def test_a_crash_loop_is_trouble_only_if_nothing_can_be_served_without_it(rank, held_by, on_expert_loss, can):
    failure = replace(CALM, max_crashes=2, on_expert_loss=on_expert_loss)
    async with Fakes(failure) as fakes:
        fakes.cluster.shape = cast(Any, SimpleNamespace(num_layers=1, sparse_layers=(True,)))
        fakes.board.owners = np.array([[held_by, held_by]], np.int16)
        fakes.scripts[rank].append(ConfigError("no such file"))
        fakes.hold = asyncio.Event()
        fakes.worker(rank).die("was killed by SIGKILL")
        await fakes.until(f"launch {rank}.2")
        told, other = (fakes.engine.note, fakes.engine.trouble) if can else (fakes.engine.trouble, fakes.engine.note)
        title = title_of(fakes.config.placement, rank)
        assert told == f"{title} has died 2 times in a row, last: no such file; it is being started anew"
        assert (other, fakes.engine.is_awaited) == ("", not can)


async def test_one_that_dies_while_it_drains_is_buried_at_once():
    """Nothing is expected of it any more; nobody takes its place, unless it is to stay after all."""
    async with Fakes(CALM) as fakes:
        await fakes.supervisor.add(3)
        for ending in ("keep", "remove"):
            fakes.events.clear()
            await fakes.supervisor.drain(3)
            fakes.worker(3).die("was killed by SIGKILL")
            await fakes.until("lose 3")
            assert fakes.supervisor.statuses()[3].state == "draining"
            if ending == "keep":
                fakes.supervisor.keep(3)
                await fakes.until("back 3")
                assert fakes.board.incarnations[3] == 1
            else:
                await fakes.supervisor.remove(3)
                assert "back 3" not in fakes.events
        assert fakes.supervisor.ranks == {0, 1, 2}


async def test_who_is_kept_while_the_server_goes_is_not_replaced():
    async with Fakes(CALM) as fakes:
        await fakes.supervisor.add(3)
        await fakes.supervisor.drain(3)
        fakes.worker(3).die("was killed by SIGKILL")
        await fakes.supervisor.stop()
        fakes.supervisor.keep(3)
        await asyncio.sleep(0)
        assert fakes.supervisor.statuses()[3].state == "draining"
        assert not any(event.startswith("launch 3.1") for event in fakes.events)


async def test_one_that_dies_while_it_is_added_is_replaced(monkeypatch):
    """Between its readiness and its first request: it has served, and its next life must not be anybody's orphan."""
    async with Fakes(CALM) as fakes:
        attach = fakes.engine.attach

        def die(rank: int, channel: object) -> None:
            monkeypatch.setattr(fakes.engine, "attach", attach)
            fakes.worker(rank).die("was killed by SIGKILL")

        monkeypatch.setattr(fakes.engine, "attach", die)
        await fakes.supervisor.add(3)
        await fakes.until("back 3")
        assert (fakes.supervisor.ranks, fakes.board.incarnations) == ({0, 1, 2, 3}, [0, 0, 0, 1])
        fakes.worker(3).die("was killed by SIGKILL")
        await fakes.until_holds(lambda: fakes.events.count("back 3") == 2)
        assert (fakes.board.incarnations[3], fakes.engine.death) == (2, "")


async def test_one_that_cannot_be_killed_holds_up_nobody(monkeypatch):
    """It waits for a disk that never answers: who has asked for it is told, and its rank stays taken until it ends."""
    monkeypatch.setattr("amoe.cluster.late_start.START_SILENCE_S", 0.05)
    monkeypatch.setattr("amoe.cluster.late_start.END_GRACE_S", 0.05)
    async with Fakes(CALM) as fakes:
        fakes.hold = asyncio.Event()
        adding = asyncio.create_task(fakes.supervisor.add(3))
        await fakes.until("launch 3.0")
        stuck = fakes.worker(3)
        stuck.is_immortal = True
        with pytest.raises(ConfigError, match=r"expert 2 has said nothing for 0\.05 s while starting"):
            await adding
        with pytest.raises(ConfigError, match="expert 2 does not end although it was killed"):
            await fakes.supervisor.add(3)
        stuck.die("was killed by SIGKILL")
        await fakes.until("close 3.0")
        fakes.hold.set()
        await fakes.supervisor.add(3)
        assert fakes.board.incarnations[3] == 2


async def test_one_that_cannot_be_added_leaves_nothing():
    async with Fakes(CALM) as fakes:
        fakes.scripts[3].append(ConfigError("no room"))
        with pytest.raises(ConfigError, match="expert 2 could not be started: no room"):
            await fakes.supervisor.add(3)
        assert fakes.supervisor.ranks == {0, 1, 2}
        assert set(fakes.cluster.workers) == {0, 1, 2}


async def test_one_whose_start_is_cancelled_leaves_its_rank_free():
    async with Fakes(CALM) as fakes:
        fakes.hold = asyncio.Event()
        adding = asyncio.create_task(fakes.supervisor.add(3))
        await fakes.until("launch 3.0")
        adding.cancel()
        await asyncio.gather(adding, return_exceptions=True)
        assert set(fakes.cluster.workers) == {0, 1, 2}
        fakes.hold.set()
        await fakes.supervisor.add(3)
        assert fakes.board.incarnations[3] == 1


@pytest.mark.parametrize("dies", [False, True])
async def test_who_was_draining_stays_after_all(dies):
    async with Fakes(CALM) as fakes:
        await fakes.supervisor.drain(2)
        if dies:
            fakes.worker(2).die("was killed")
            assert fakes.board.incarnations[2] == NOBODY
            assert "launch 2.1" not in fakes.events
        fakes.supervisor.keep(2)
        if dies:
            await fakes.until("back 2")
        assert fakes.supervisor.statuses()[2].state == "serving"


async def test_who_is_being_replaced_may_be_removed():
    async with Fakes(CALM) as fakes:
        fakes.hold = asyncio.Event()
        fakes.worker(2).die("was killed")
        await fakes.until("launch 2.1")
        await fakes.supervisor.drain(2)
        await fakes.supervisor.remove(2)
        assert fakes.supervisor.ranks == {0, 1}
        assert set(fakes.cluster.workers) == {0, 1}


async def test_a_server_leaves_behind_who_does_not_end(monkeypatch, caplog):
    monkeypatch.setattr("amoe.cluster.cluster.KILL_GRACE_S", 0.02)
    async with Fakes(CALM) as fakes:
        stuck = fakes.worker(1)
        monkeypatch.setattr(stuck, "kill", lambda: None)
        monkeypatch.setattr(stuck, "request_stop", lambda: None)
        await fakes.supervisor.stop()
        await fakes.cluster.stop(0)
        assert "expert 0 does not end although it was killed: it is left behind" in caplog.text
        assert not fakes.cluster.workers
