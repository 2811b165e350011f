"""Which workers a host's CPUs are good for: how many, with how many threads each, and on which CPUs.

Decoding reads every weight that it uses once per step, so it runs at the speed of memory. Two rules follow. A second
thread on a physical core reads no faster than the first: threads are counted by cores. And memory of another NUMA node
is farther away and shares one link: each node that has cores gets a worker of its own, which holds its share of the
experts, its KV cache and its copy of the attention weights there; only tokens cross between nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from amoe.config import PlacementConfig

CpuSet = tuple[int, ...]
CpuBinding = Literal["auto", "none"] | tuple[CpuSet, ...]

_Core = CpuSet  # the CPUs (hardware threads) of one physical core


@dataclass(frozen=True, kw_only=True, slots=True)
class Cpu:
    """One CPU as the kernel counts them: a core, or one of the hardware threads of a core.

    Attributes:
        id: the kernel's number.
        core: the same for all CPUs of one physical core.
        node: of NUMA.
    """

    id: int
    core: int
    node: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class HostTopology:
    """What this process may use of a host.

    Attributes:
        cpus: that it may run on; at least one.
        quota: CPUs' worth of time that it gets, of a container with a limit; None: all the time there is.
    """

    cpus: tuple[Cpu, ...]
    quota: float | None = None

    def nodes(self) -> dict[int, list[_Core]]:
        """The cores of each NUMA node that has any, in order."""
        nodes: dict[int, dict[int, list[int]]] = {}
        for cpu in sorted(self.cpus, key=lambda cpu: (cpu.node, cpu.core, cpu.id)):
            nodes.setdefault(cpu.node, {}).setdefault(cpu.core, []).append(cpu.id)
        return {node: [tuple(core) for core in cores.values()] for node, cores in nodes.items()}

    def num_cores(self) -> int:
        """Physical cores, or as many as the quota pays for; at least 1."""
        cores = sum(len(cores) for cores in self.nodes().values())
        return cores if self.quota is None else max(1, min(cores, int(self.quota)))


@dataclass(frozen=True, kw_only=True, slots=True)
class HostPlan:
    """What `choose` has chosen.

    Attributes:
        placement: the workers.
        threads_per_worker: of each.
        cpu_sets: the CPUs of each worker, by rank, one of each core first; empty: they run wherever the kernel likes.
        reason: for a person, in one line.
    """

    placement: PlacementConfig
    threads_per_worker: int
    cpu_sets: tuple[CpuSet, ...]
    reason: str


def choose(
    host: HostTopology,
    *,
    placement: PlacementConfig | None = None,
    threads_per_worker: int | None = None,
    binding: CpuBinding = "auto",
    most_workers: int | None = None,
) -> HostPlan:
    """Workers for a host: one for each NUMA node, with a thread for each physical core of it.

    Args:
        placement, threads_per_worker: what the user wants; None: to be chosen.
        binding: `auto` keeps each worker to its node where there are several; a tuple says the CPUs of each.
        most_workers: that can be chosen; None: any number.
    """
    nodes = _even_nodes(host)
    if placement is None:
        placement = _placement(nodes, host.quota, most_workers)
    num_workers = placement.num_workers
    shares = _shares(nodes, num_workers)
    if threads_per_worker is None:
        is_told = isinstance(binding, tuple)
        threads_per_worker = min(map(len, binding)) if is_told else _threads(shares, host.quota, num_workers)
    sets = binding if isinstance(binding, tuple) else ()
    if binding == "auto" and len(nodes) > 1 and host.quota is None:
        sets = tuple(_cpu_set(cores, home, threads_per_worker) for cores, home in shares)
    return HostPlan(
        placement=placement,
        threads_per_worker=threads_per_worker,
        cpu_sets=sets,
        reason=_reason(host, num_workers, threads_per_worker, sets),
    )


def _even_nodes(host: HostTopology) -> list[list[_Core]]:
    """The nodes worth a worker: all workers have the same number of threads, so one node with a few cores, left over by
    `taskset` perhaps, would hold the others down to as many."""
    nodes = list(host.nodes().values())
    most = max(map(len, nodes))
    return [cores for cores in nodes if 2 * len(cores) >= most]


def _placement(nodes: Sequence[list[_Core]], quota: float | None, most: int | None) -> PlacementConfig:
    if quota is not None and int(quota) <= min(map(len, nodes)):
        return PlacementConfig()  # one node has as much as the quota pays for
    count = len(nodes) if most is None else min(len(nodes), most)
    return PlacementConfig(colocated=count) if count > 1 else PlacementConfig()


def _shares(nodes: Sequence[list[_Core]], num_workers: int) -> list[tuple[list[_Core], list[_Core]]]:
    """For each worker: the cores that are its own, and those of its node. It has none of its own where a node has more
    workers than cores."""
    if num_workers < len(nodes):  # each keeps to one node, the largest first
        nodes = sorted(nodes, key=len, reverse=True)[:num_workers]
    home_of = [worker * len(nodes) // num_workers for worker in range(num_workers)]
    shares = []
    for worker, home in enumerate(home_of):
        cores = nodes[home]
        each = len(cores) // home_of.count(home)
        first = (worker - home_of.index(home)) * each
        shares.append((cores[first : first + each], cores))
    return shares


def _threads(shares: Sequence[tuple[list[_Core], list[_Core]]], quota: float | None, num_workers: int) -> int:
    threads = min(len(cores) for cores, _ in shares)
    return max(1, threads if quota is None else min(threads, int(quota / num_workers)))


def _cpu_set(cores: list[_Core], home: list[_Core], threads: int) -> CpuSet:
    """Its own cores if they are enough for its threads, else those of its node. A CPU of each core comes first, so that
    as many threads as there are cores find a core each."""
    chosen = cores if threads <= len(cores) else home
    numbered = sorted((thread, cpu) for core in chosen for thread, cpu in enumerate(core))
    return tuple(cpu for _, cpu in numbered)


def _reason(host: HostTopology, num_workers: int, threads: int, sets: Sequence[CpuSet]) -> str:
    nodes = host.nodes()
    found = [_count(sum(map(len, nodes.values())), "core"), _count(len(nodes), "NUMA node")]
    if host.quota is not None:
        found.append(f"a quota of {_count(host.quota, 'CPU')}")
    where = "bound to CPUs " + "; ".join(map(cpu_list, sets)) if sets else "bound to no CPUs"
    return f"{', '.join(found)}: {_count(num_workers, 'worker')} x {_count(threads, 'thread')}, {where}"


def _count(number: float, noun: str) -> str:
    return f"{number:g} {noun}{'' if number == 1 else 's'}"


def cpu_list(cpus: Sequence[int]) -> str:
    """`0-3,8`, as the kernel writes it."""
    runs: list[list[int]] = []
    for cpu in sorted(cpus):
        if runs and cpu == runs[-1][1] + 1:
            runs[-1][1] = cpu
        else:
            runs.append([cpu, cpu])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def parse_cpu_list(text: str) -> CpuSet:
    """The CPUs of `0-3,8`, in this order; empty for an empty text.

    Raises:
        ValueError: it is no such list.
    """
    cpus: list[int] = []
    for part in filter(None, text.strip().split(",")):
        first, dash, last = part.partition("-")
        numbers = range(int(first), int(last if dash else first) + 1)
        if not numbers:
            raise ValueError(f"{part!r} counts downwards")
        cpus.extend(numbers)
    return tuple(cpus)
