"""What the kernel tells of the CPUs that this process may use. What it does not tell, as in some containers and on
other systems than Linux, is taken to be plain: every CPU a core, one NUMA node, no quota."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator
from pathlib import Path

from amoe.policy.host_placement import Cpu, HostTopology, parse_cpu_list

_SELF_CGROUPS = "proc/self/cgroup"


def read_host(root: Path = Path("/"), usable: Collection[int] | None = None) -> HostTopology:
    """This host.

    Args:
        root: where `sys` and `proc` are.
        usable: CPUs that the process may run on; None: ask the kernel.
    """
    ids = usable_cpus() if usable is None else usable
    node_of = dict(_nodes(root))
    cpus = (Cpu(id=cpu, core=_core_of(root, cpu), node=node_of.get(cpu, 0)) for cpu in sorted(ids))
    return HostTopology(cpus=tuple(cpus), quota=_quota(root))


def usable_cpus() -> set[int]:
    """CPUs that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _nodes(root: Path) -> Iterator[tuple[int, int]]:
    """CPU and NUMA node."""
    for path in (root / "sys/devices/system/node").glob("node[0-9]*"):
        with contextlib.suppress(OSError, ValueError):
            for cpu in parse_cpu_list((path / "cpulist").read_text()):
                yield cpu, int(path.name.removeprefix("node"))


def _core_of(root: Path, cpu: int) -> int:
    """The first CPU of the same physical core."""
    path = root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
    try:
        return min(parse_cpu_list(path.read_text()))
    except (OSError, ValueError):
        return cpu


def _quota(root: Path) -> float | None:
    """The least of the limits of this process's cgroup and those around it, in CPUs."""
    limits = []
    for directory in _cgroups(root):
        with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
            limits.append(_limit(directory))
    return min((limit for limit in limits if limit > 0), default=None)


def _cgroups(root: Path) -> Iterator[Path]:
    """Directories of the cgroups that this process is in, and of those around them.

    In a container, the path may be one of the host's that is not to be seen there: then the limits are where its file
    system of cgroups begins.
    """
    try:
        lines = (root / _SELF_CGROUPS).read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers == "":
            tops = [root / "sys/fs/cgroup"]
        elif "cpu" in controllers.split(","):
            tops = [root / "sys/fs/cgroup" / controllers, root / "sys/fs/cgroup/cpu"]
        else:
            continue
        for top in tops:
            inner = top / path.strip("/")
            yield inner
            yield from (around for around in inner.parents if around.is_relative_to(top))


def _limit(directory: Path) -> float:
    """Of one cgroup, in CPUs; not positive: none. Raises OSError, ValueError, ZeroDivisionError if it says nothing."""
    unified = directory / "cpu.max"
    if unified.exists():
        quota, _, period = unified.read_text().strip().partition(" ")
        return int(quota) / int(period or 100_000) if quota != "max" else -1.0
    return int((directory / "cpu.cfs_quota_us").read_text()) / int((directory / "cpu.cfs_period_us").read_text())
