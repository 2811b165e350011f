"""Traffic and faults together: what every stream got, and what happened when."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import Protocol

from benchmarks.chaos.faults import Fault, Incident
from benchmarks.chaos.server import ChaosServer
from benchmarks.chaos.streams import Answer, Load, Traffic

_POLL_S = 0.05
_HEAL_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a load. Times are monotonic seconds.

    Attributes:
        began: when the requests were sent.
        answers: in the order of the requests.
        incidents: in the order in which they happened.
    """

    began: float
    answers: list[Answer]
    incidents: list[Incident]


class Progress(Protocol):
    """What tells how far a run has come: its traffic.

    Attributes:
        num_tokens: that have come so far.
    """

    num_tokens: int


@dataclass(frozen=True, slots=True)
class _Victims:
    """The workers that a fault will hurt, as they serve before it.

    Attributes:
        pids: by title.
        lives: incarnations, by title.
    """

    pids: dict[str, int]
    lives: dict[str, int]


async def run(server: ChaosServer, load: Load, faults: Sequence[Fault] = ()) -> Run:
    """All requests of the load at once, and each fault when its share of the tokens has come; several faults may be
    at work at the same time. Returns when all requests have ended and all workers serve again.

    Raises:
        AssertionError: a fault could not be done: the streams had ended, or the worker was not there.
    """
    traffic = Traffic(server.port, load.bodies)
    began = time.monotonic()
    streams = asyncio.ensure_future(traffic.run())
    incidents = await hurt(server, faults, load, traffic, streams)
    return Run(began, await streams, incidents)


async def hurt(
    server: ChaosServer, faults: Sequence[Fault], load: Load, progress: Progress, streams: asyncio.Future[list[Answer]]
) -> list[Incident]:
    """Do the faults of a run, each in its time; see `run`.

    Args:
        faults: by their shares. One waits for an earlier one that may have ended the life of a worker of its own, until
            that one is back: it would hit nobody, or what the earlier one has left.
        streams: done when all requests have ended.
    """
    tasks: list[asyncio.Task[Incident]] = []
    for number, fault in enumerate(faults):
        earlier = [
            task
            for task, other in zip(tasks, faults[:number], strict=True)
            if other.may_end_life and not set(other.workers).isdisjoint(fault.workers)
        ]
        tasks.append(asyncio.create_task(_hurt(server, fault, load, progress, streams, earlier)))
    return list(await asyncio.gather(*tasks))


async def _hurt(
    server: ChaosServer,
    fault: Fault,
    load: Load,
    progress: Progress,
    streams: asyncio.Future[list[Answer]],
    earlier: Sequence[asyncio.Task[Incident]],
) -> Incident:
    await asyncio.gather(*earlier)
    # Before it is time: to look for somebody takes a while, in which the streams would go on, and end.
    victims = await _find(server, fault)
    while progress.num_tokens < fault.at * load.num_tokens:
        if streams.done():
            raise AssertionError(f"all streams have ended before {fault}")
        await asyncio.sleep(_POLL_S / 5)
    incident = Incident(fault, time.monotonic())
    try:
        await asyncio.to_thread(_do, server, fault, victims.pids)
    except ProcessLookupError as error:
        raise AssertionError(f"somebody ended before {fault}, which nobody had hurt:\n{server.complaints()}") from error
    if not fault.ends_life:
        await _outlast(server, fault, victims.pids)
        await asyncio.to_thread(server.heal, fault.workers)
    await _wait_healed(server, incident, victims.lives)
    noticed = [server.taken_for_dead(worker, pid) for worker, pid in victims.pids.items()]
    incident.noticed = max((time for time in noticed if time is not None), default=None) if all(noticed) else None
    return incident


async def _find(server: ChaosServer, fault: Fault) -> _Victims:
    """Whom it will hurt, once they all serve: another fault may have ended them just before."""
    deadline = time.monotonic() + _HEAL_TIMEOUT_S
    while time.monotonic() < deadline:
        lives = await asyncio.to_thread(server.lives)
        pids = await asyncio.to_thread(server.pids)
        if all(lives[worker][0] == "serving" and worker in pids for worker in fault.workers):
            return _Victims(
                {worker: pids[worker] for worker in fault.workers}, {worker: lives[worker][1] for worker in lives}
            )
        await asyncio.sleep(_POLL_S)
    raise AssertionError(f"{fault}: not all of them serve:\n{server.complaints()}")


async def _outlast(server: ChaosServer, fault: Fault, pids: dict[str, int]) -> None:
    """Until a fault that does not end lives is over."""
    if fault.seconds < inf:
        await asyncio.sleep(fault.seconds)
        return
    deadline = time.monotonic() + _HEAL_TIMEOUT_S
    while time.monotonic() < deadline:
        if all(server.taken_for_dead(worker, pid) is not None for worker, pid in pids.items()):
            return
        await asyncio.sleep(_POLL_S)


def _do(server: ChaosServer, fault: Fault, pids: dict[str, int]) -> None:
    if fault.kind == "cut":
        server.cut(fault.workers)
    elif fault.kind == "delay":
        server.delay(fault.workers, fault.delay_s)
    elif fault.kind == "hang":
        server.hang(pids.values())
    else:
        for pid in pids.values():
            os.kill(pid, signal.SIGKILL if fault.kind == "kill" else signal.SIGSTOP)


async def _wait_healed(server: ChaosServer, incident: Incident, before: dict[str, int]) -> None:
    """Until the workers that were hurt serve; in another life if this one was ended."""
    fault = incident.fault
    deadline = time.monotonic() + _HEAL_TIMEOUT_S
    while time.monotonic() < deadline:
        lives = await asyncio.to_thread(server.lives)
        # Whoever was in the middle of a respawn has the next life anyway.
        if all(
            lives[worker][0] == "serving" and (not fault.ends_life or lives[worker][1] > before[worker])
            for worker in fault.workers
        ):
            incident.healed = time.monotonic()
            return
        await asyncio.sleep(_POLL_S)
