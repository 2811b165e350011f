"""Workers, threads and CPUs of hosts of many shapes."""

from __future__ import annotations

import pytest

from amoe.config import PlacementConfig
from amoe.policy.host_placement import Cpu, HostPlan, HostTopology, choose, cpu_list, parse_cpu_list


def host(
    cores_per_node: int, *, nodes: int = 1, smt: int = 1, quota: float | None = None, usable: str = "0-9999"
) -> HostTopology:
    """As Linux counts: the first hardware threads of all cores come before the second ones."""
    num_cores = cores_per_node * nodes
    cpus = (
        Cpu(id=thread * num_cores + core, core=core, node=core // cores_per_node)
        for thread in range(smt)
        for core in range(num_cores)
    )
    allowed = set(parse_cpu_list(usable))
    return HostTopology(cpus=tuple(cpu for cpu in cpus if cpu.id in allowed), quota=quota)


def sizes(plan: HostPlan) -> tuple[int, int]:
    return plan.placement.num_workers, plan.threads_per_worker


LAPTOP = host(8, smt=2)
TWO_SOCKETS = host(32, nodes=2, smt=2)
EPYC = host(16, nodes=4)


@pytest.mark.parametrize(
    ("where", "workers", "threads"),
    [
        (host(1), 1, 1),
        (host(2), 1, 2),
        (LAPTOP, 1, 8),
        (TWO_SOCKETS, 2, 32),
        (EPYC, 4, 16),
        (host(8, smt=2, usable="0-3"), 1, 4),  # taskset
        (host(8, smt=2, usable="0,8"), 1, 1),  # ... on two hardware threads of one core
        (host(8, nodes=2, usable="8-15"), 1, 8),  # ... on one node
        (host(8, nodes=2, usable="0-9"), 1, 8),  # ... with a rest of another, which would slow the first one down
        (host(8, nodes=2, usable="0-13"), 2, 6),
        (host(64, smt=2, quota=1.5), 1, 1),  # a container
        (host(64, smt=2, quota=0.5), 1, 1),
        (host(8, quota=100.0), 1, 8),
        (host(16, nodes=4, quota=12.0), 1, 12),
        (host(16, nodes=4, quota=40.0), 4, 10),
    ],
)
def test_a_worker_for_each_node_and_a_thread_for_each_core(where: HostTopology, workers: int, threads: int):
    plan = choose(where)
    assert sizes(plan) == (workers, threads)
    assert plan.placement == (PlacementConfig(colocated=workers) if workers > 1 else PlacementConfig())


def test_workers_are_bound_to_their_nodes_and_to_nothing_where_there_is_one():
    assert choose(LAPTOP).cpu_sets == ()
    assert choose(EPYC).cpu_sets == tuple(tuple(range(16 * node, 16 * node + 16)) for node in range(4))
    left, right = choose(TWO_SOCKETS).cpu_sets
    assert left == (*range(32), *range(64, 96)), "one of each core first"
    assert right == (*range(32, 64), *range(96, 128))


def test_a_host_shared_by_quota_is_left_to_the_kernel():
    """All containers would choose the same CPUs."""
    plan = choose(host(16, nodes=4, quota=40.0))
    assert plan.cpu_sets == ()
    assert plan.reason == "64 cores, 4 NUMA nodes, a quota of 40 CPUs: 4 workers x 10 threads, bound to no CPUs"


def test_what_the_user_wants_counts():
    one = choose(TWO_SOCKETS, placement=PlacementConfig(attention_workers=1))
    assert sizes(one) == (1, 32) and one.cpu_sets == (choose(TWO_SOCKETS).cpu_sets[0],), "it keeps to one node"
    assert sizes(choose(TWO_SOCKETS, threads_per_worker=4)) == (2, 4)
    assert choose(TWO_SOCKETS, binding="none").cpu_sets == ()
    bound = choose(LAPTOP, binding=((3, 4, 5),))
    assert sizes(bound) == (1, 3) and bound.cpu_sets == ((3, 4, 5),)
    assert choose(LAPTOP, binding=((3, 4, 5),), threads_per_worker=2).threads_per_worker == 2
    uneven = choose(LAPTOP, placement=PlacementConfig(colocated=2), binding=((0, 1, 2), (3, 4)))
    assert sizes(uneven) == (2, 2)


def test_workers_of_one_node_share_its_cores():
    apart = choose(TWO_SOCKETS, placement=PlacementConfig(attention_workers=1, expert_workers=3))
    assert sizes(apart) == (4, 16)
    assert [cpu_list(cpus) for cpus in apart.cpu_sets] == ["0-15,64-79", "16-31,80-95", "32-47,96-111", "48-63,112-127"]
    three = choose(host(8, nodes=2), placement=PlacementConfig(colocated=3))
    assert sizes(three) == (3, 4)
    assert [cpu_list(cpus) for cpus in three.cpu_sets] == ["0-3", "4-7", "8-15"]


def test_more_workers_or_threads_than_cores():
    crowd = choose(host(2, nodes=2), placement=PlacementConfig(colocated=8))
    assert sizes(crowd) == (8, 1)
    assert crowd.cpu_sets == ((0, 1),) * 4 + ((2, 3),) * 4, "those of a node share it"
    assert choose(host(1), placement=PlacementConfig(colocated=4)).threads_per_worker == 1
    many = choose(host(4, nodes=2), placement=PlacementConfig(colocated=4), threads_per_worker=3)
    assert many.cpu_sets == ((0, 1, 2, 3),) * 2 + ((4, 5, 6, 7),) * 2
    assert choose(EPYC, placement=PlacementConfig(colocated=8)).threads_per_worker == 8
    assert choose(host(64, quota=3.0), placement=PlacementConfig(colocated=2)).threads_per_worker == 1


def test_no_more_workers_than_there_are_experts():
    plan = choose(EPYC, most_workers=3)
    assert sizes(plan) == (3, 16) and len(plan.cpu_sets) == 3
    assert choose(EPYC, most_workers=1).placement == PlacementConfig()


def test_the_reason_is_one_line_for_a_person():
    assert choose(host(2)).reason == "2 cores, 1 NUMA node: 1 worker x 2 threads, bound to no CPUs"
    assert choose(host(1)).reason == "1 core, 1 NUMA node: 1 worker x 1 thread, bound to no CPUs"
    assert choose(host(4, nodes=2)).reason == ("8 cores, 2 NUMA nodes: 2 workers x 4 threads, bound to CPUs 0-3; 4-7")


def test_cores_that_the_quota_pays_for():
    assert LAPTOP.num_cores() == 8
    assert host(64, quota=3.9).num_cores() == 3
    assert host(64, quota=0.2).num_cores() == 1
    assert host(2, quota=64.0).num_cores() == 2


@pytest.mark.parametrize("text", ["0", "0-3", "0-3,8", "0,2,4-6"])
def test_cpu_lists_as_the_kernel_writes_them(text: str):
    assert cpu_list(parse_cpu_list(text + "\n")) == text


def test_an_empty_list_and_none():
    assert parse_cpu_list("") == () and cpu_list(()) == ""
    for text in ("a", "3-1", "1-", "-1", "1-2-3"):
        with pytest.raises(ValueError):
            parse_cpu_list(text)
