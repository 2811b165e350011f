"""A worker inside its actor: the actor's process is the worker's, and ends with it."""

from __future__ import annotations

import atexit
import contextlib
import importlib.metadata
import os
import platform
import signal
import zlib
from pathlib import Path
from typing import NamedTuple

import msgspec
import ray

import amoe
from amoe.cluster.leaving import leave
from amoe.cluster.process import LaunchSpec
from amoe.cluster.ray_cluster.reach import Door, try_to_reach

_TORCH = "torch"
_WIRE_CODE = ("config/*.py", "stats.py", "types.py", "cluster/process.py", "engine/messages.py", "transport/*.py")


class Whereabouts(NamedTuple):
    """Where an actor is, and what it runs on.

    Attributes:
        host: the address of its node; node_id: Ray's name of it.
        port: of its `Door`; 0: nothing can listen there.
        pid, started: of its process: when it was started, as the kernel counts, tells it from a later one of that pid.
        software: versions by name; all workers and the server must have the same.
    """

    host: str
    node_id: str
    pid: int
    started: str
    software: dict[str, str]
    port: int = 0


def software() -> dict[str, str]:
    """Versions of what workers must have in common: they exchange messages of this very code."""
    try:
        torch = importlib.metadata.version(_TORCH)
    except importlib.metadata.PackageNotFoundError:
        torch = "missing"
    return {
        "Python": platform.python_version(),
        _TORCH: torch.partition("+")[0],
        "amoe": f"{amoe.__version__}+{_code()}",
    }


def _code() -> str:
    """Digest of the code that says what travels between them: a checkout may differ where the version does not."""
    root, digest = Path(amoe.__file__).parent, 0
    for path in (file for pattern in _WIRE_CODE for file in sorted(root.glob(pattern))):
        digest = zlib.crc32(path.read_bytes(), zlib.crc32(path.name.encode(), digest))
    return f"{digest:08x}"


def started_at(pid: int) -> str | None:
    """When a process was started, in the kernel's ticks; None: there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


class WorkerActor:
    """One worker. Its methods run in threads of their own, so that it answers while the worker runs.

    Ray ends its process by a kill, or where nobody holds the actor any more, or its node leaves, as a Python program
    ends: with a worker that may be in the middle of something. See `amoe.cluster.leaving`.
    """

    def __init__(self) -> None:
        atexit.register(leave, 0)

    def whereabouts(self) -> Whereabouts:
        """Where it is."""
        pid, host = os.getpid(), ray.util.get_node_ip_address()
        door: Door | None = None
        with contextlib.suppress(OSError):  # the transport will say so, with its own words
            door = Door(host)
        return Whereabouts(
            host,
            ray.get_runtime_context().get_node_id(),
            pid,
            started_at(pid) or "",
            software(),
            door.port if door is not None else 0,
        )

    def reach(self, host: str, port: int) -> str:
        """Why it cannot connect there; "" if it can."""
        return try_to_reach(host, port)

    def run(self, launch_spec: str) -> int:
        """Be the worker that the JSON `launch_spec` describes, to its end; returns its exit status."""
        from amoe.cluster.worker_run import run_worker  # late: torch takes seconds, and `whereabouts` needs none

        return run_worker(msgspec.json.decode(launch_spec, type=LaunchSpec))


def kill_process(pid: int, started: str) -> bool:
    """On the node of the process: end it, though it may be stopped and hear nobody. False: it has ended before."""
    if started_at(pid) != started:
        return False
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    return True
