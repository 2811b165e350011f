"""Hosts as the kernel describes them, and what it leaves out."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from amoe.config import EngineConfig
from amoe.engine.cpus import cpu_set, keep_to_cpus, thread_cpus, threads_per_worker
from amoe.engine.host import read_host, usable_cpus
from amoe.errors import ConfigError
from amoe.policy.host_placement import Cpu


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


def test_threads_of_a_core_and_nodes(tmp_path: Path):
    cpus = "sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    files = {cpus.format(cpu): f"{cpu % 4},{cpu % 4 + 4}" for cpu in range(8)}
    nodes = {"sys/devices/system/node/node0/cpulist": "0-1,4-5", "sys/devices/system/node/node1/cpulist": "2-3,6-7"}
    empty = {"sys/devices/system/node/node2/cpulist": "", "sys/devices/system/node/has_cpu": "0-1"}
    host = read_host(write(tmp_path, files | nodes | empty), usable={1, 5, 6})
    assert host.cpus == (Cpu(id=1, core=1, node=0), Cpu(id=5, core=1, node=0), Cpu(id=6, core=2, node=1))
    assert host.nodes() == {0: [(1, 5)], 1: [(6,)]} and host.quota is None


def test_nothing_is_told(tmp_path: Path):
    host = read_host(tmp_path, usable=[0, 1, 2])
    assert host.cpus == tuple(Cpu(id=cpu, core=cpu) for cpu in range(3)) and host.quota is None


def test_nonsense_is_told(tmp_path: Path):
    files = {
        "sys/devices/system/cpu/cpu0/topology/thread_siblings_list": "what",
        "sys/devices/system/node/node0/cpulist": "?",
        "sys/fs/cgroup/cpu.max": "much",
        "proc/self/cgroup": "nothing\n0::/\n1:cpu",
    }
    host = read_host(write(tmp_path, files), usable=[0])
    assert host.cpus == (Cpu(id=0, core=0),) and host.quota is None


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "150000 100000"}, 1.5),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "max 100000"}, None),
        # The least of those around it counts.
        (
            {
                "proc/self/cgroup": "0::/a/b",
                "sys/fs/cgroup/a/b/cpu.max": "max 100000",
                "sys/fs/cgroup/a/cpu.max": "200000 50000",
                "sys/fs/cgroup/cpu.max": "900000 100000",
            },
            4.0,
        ),
        # The path is the host's, and what is to be seen begins with the container's.
        ({"proc/self/cgroup": "0::/docker/1234", "sys/fs/cgroup/cpu.max": "300000 100000"}, 3.0),
        (
            {
                "proc/self/cgroup": "5:memory:/m\n3:cpu,cpuacct:/docker/12",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "250000",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
            },
            2.5,
        ),
        (
            {
                "proc/self/cgroup": "3:cpuacct,cpu:/x",
                "sys/fs/cgroup/cpu/x/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/x/cpu.cfs_period_us": "100000",
            },
            None,
        ),
        (
            {
                "proc/self/cgroup": "1:cpu:/",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "100000",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "0",
            },
            None,
        ),
    ],
)
def test_the_quota_of_a_container(tmp_path: Path, files: dict[str, str], quota: float | None):
    assert read_host(write(tmp_path, files), usable=[0]).quota == quota


def test_this_host():
    host = read_host()
    assert {cpu.id for cpu in host.cpus} == usable_cpus()
    assert 1 <= host.num_cores() <= len(host.cpus)


def test_threads_unless_the_user_said():
    assert threads_per_worker(EngineConfig(model="m")) == read_host().num_cores()
    assert threads_per_worker(EngineConfig(model="m", threads_per_worker=7)) == 7


def test_a_thread_on_each_cpu_if_there_are_enough():
    config = EngineConfig(model="m", threads_per_worker=2, cpu_sets=((4, 6, 5, 7), (1,)))
    assert cpu_set(config, 0) == (4, 6, 5, 7) and thread_cpus(config, 0) == (4, 6)
    assert cpu_set(config, 1) == (1,) and thread_cpus(config, 1) == ()
    assert cpu_set(config, 2) == thread_cpus(config, 2) == (), "a worker that was added later runs anywhere"


def test_all_threads_keep_to_the_cpus(monkeypatch: pytest.MonkeyPatch):
    bound: list[tuple[int, tuple[int, ...]]] = []
    monkeypatch.setattr(os, "sched_setaffinity", lambda thread, cpus: bound.append((thread, cpus)))
    keep_to_cpus((0,))
    assert (os.getpid(), (0,)) in bound and len(bound) == len(set(bound))


def test_cpus_that_there_are_not():
    with pytest.raises(ConfigError, match="--cpu-bind: a worker may not run on CPUs 9999"):
        keep_to_cpus((9999,))
