"""Traffic and faults together: what every stream got, and what happened when."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

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


async def run(server: ChaosServer, load: Load, faults: Sequence[Fault] = ()) -> Run:
    """All requests of the load at once, and each fault when its share of the tokens has come; several faults may be
    at work at the same time. Returns when all requests have ended and all workers serve again."""
    traffic = Traffic(server.port, load.bodies)
    began = time.monotonic()
    streams = asyncio.ensure_future(traffic.run())
    hurts = [asyncio.ensure_future(_hurt(server, fault, traffic, load, streams)) for fault in faults]
    incidents = await asyncio.gather(*hurts)
    return Run(began, await streams, incidents)


async def _hurt(
    server: ChaosServer, fault: Fault, traffic: Traffic, load: Load, streams: asyncio.Future[list[Answer]]
) -> Incident:
    while traffic.num_tokens < fault.at * load.num_tokens:
        if streams.done():
            raise AssertionError(f"all streams have ended before {fault}")
        await asyncio.sleep(_POLL_S / 5)
    before = await _wait_serving(server, fault.workers)
    everybody = await asyncio.to_thread(server.pids)
    if gone := [worker for worker in fault.workers if worker not in everybody]:
        told = [line for _, line in server.output if "ERROR" in line or "WARNING" in line]
        raise AssertionError(f"{gone} ended before {fault}:\n" + "\n".join(told))
    pids = {worker: everybody[worker] for worker in fault.workers}
    incident = Incident(fault, time.monotonic())
    await asyncio.to_thread(_do, server, fault, pids)
    if not fault.ends_life:
        await _outlast(server, fault, pids)
        await asyncio.to_thread(server.heal, fault.workers)
    await _wait_healed(server, incident, before)
    noticed = [server.taken_for_dead(worker, pid) for worker, pid in pids.items()]
    incident.noticed = max((time for time in noticed if time is not None), default=None) if all(noticed) else None
    return incident


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


async def _wait_serving(server: ChaosServer, workers: Sequence[str]) -> dict[str, tuple[str, int]]:
    """Whom an earlier fault has ended comes back first. Returns state and incarnation of all."""
    while True:
        lives = await asyncio.to_thread(server.lives)
        if all(lives[worker][0] == "serving" for worker in workers):
            return lives
        await asyncio.sleep(_POLL_S)


def _do(server: ChaosServer, fault: Fault, pids: dict[str, int]) -> None:
    """`pids`: of the workers; to look for them takes a while that would count as the server's."""
    if fault.kind == "cut":
        server.cut(fault.workers)
    elif fault.kind == "delay":
        server.delay(fault.workers, fault.delay_s)
    elif fault.kind == "hang":
        server.hang(pids.values())
    else:
        for pid in pids.values():
            os.kill(pid, signal.SIGKILL if fault.kind == "kill" else signal.SIGSTOP)


async def _wait_healed(server: ChaosServer, incident: Incident, before: dict[str, tuple[str, int]]) -> None:
    """Until the workers that were hurt serve; in another life if this one was ended."""
    fault = incident.fault
    deadline = time.monotonic() + _HEAL_TIMEOUT_S
    while time.monotonic() < deadline:
        lives = await asyncio.to_thread(server.lives)
        # Whoever was in the middle of a respawn has the next life anyway.
        if all(
            lives[worker][0] == "serving" and (not fault.ends_life or lives[worker][1] > before[worker][1])
            for worker in fault.workers
        ):
            incident.healed = time.monotonic()
            return
        await asyncio.sleep(_POLL_S)
