"""The threads and the CPUs of a worker."""

from __future__ import annotations

import contextlib
import os

from amoe.config import EngineConfig
from amoe.engine.host import read_host
from amoe.errors import ConfigError
from amoe.policy.host_placement import CpuSet, cpu_list


def threads_per_worker(config: EngineConfig) -> int:
    """Intra-op threads of each worker: the usable cores divided by the workers, unless the user said."""
    return config.threads_per_worker or max(1, read_host().num_cores() // config.placement.num_workers)


def cpu_set(config: EngineConfig, rank: int) -> CpuSet:
    """The CPUs that worker `rank` keeps to; empty: any."""
    return config.cpu_sets[rank] if rank < len(config.cpu_sets) else ()


def thread_cpus(config: EngineConfig, rank: int) -> CpuSet:
    """The CPU of each compute thread of worker `rank`; empty: threads run on any of `cpu_set`."""
    cpus, num_threads = cpu_set(config, rank), threads_per_worker(config)
    return cpus[:num_threads] if len(cpus) >= num_threads else ()


def keep_to_cpus(cpus: CpuSet) -> None:
    """Run on these CPUs alone, with all threads that there are and will be.

    Memory then is theirs as well: the kernel gives a page from the NUMA node of the CPU that touches it first.

    Raises:
        ConfigError: this process may not run on any of them.
    """
    try:
        for thread in os.listdir("/proc/self/task"):
            with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
                os.sched_setaffinity(int(thread), cpus)
    except OSError as error:
        raise ConfigError(f"--cpu-bind: a worker may not run on CPUs {cpu_list(cpus)}: {error.strerror}") from error
