"""What a worker is told about its transport survives the way to it."""

from __future__ import annotations

import os
import resource

import msgspec
import pytest

from amoe.errors import ConfigError
from amoe.transport.opening import DistributedSpec, TcpFabric, TcpSpec, TransportSpec, create_fabric
from amoe.transport.shm import ShmTransport
from amoe.transport.shm_fabric import ShmFabric, ShmSpec

SPECS = [
    ShmSpec(num_ranks=2, ring_bytes=4096, memory_fd=5, doorbell_fds=(6, 7)),
    TcpSpec(num_ranks=3, host="node-1", max_record_bytes=1 << 20, secret="s", link_timeout_s=0.5),
    DistributedSpec(
        num_ranks=3,
        num_homes=1,
        store_host="::1",
        store_port=1234,
        host="node-1",
        device="cuda:1",
        max_record_bytes=1 << 20,
    ),
]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: type(spec).__name__)
def test_spec_is_json(spec: TransportSpec) -> None:
    assert msgspec.json.decode(msgspec.json.encode(spec), type=TransportSpec) == spec


def test_shared_memory_is_the_same_for_all_and_inherited() -> None:
    fabric = create_fabric("shm", num_ranks=2, num_homes=1, max_record_bytes=4096)
    assert isinstance(fabric, ShmFabric)
    assert fabric.spec_for("anywhere") is fabric.spec
    assert set(fabric.fds()) == {fabric.spec.memory_fd, *fabric.spec.doorbell_fds}
    transport = ShmTransport.attach(fabric.spec, 1)
    assert (transport.rank, transport.address) == (1, "")
    transport.close()
    fabric.close()


def test_a_host_without_room_for_the_rings_is_told_and_keeps_nothing() -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    before = os.listdir("/proc/self/fd")
    most = max(map(int, before)) + 8
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, limits[1]))
    try:
        with pytest.raises(ConfigError, match=r"no shared memory for \d+ workers.*fewer workers.*ulimit"):
            create_fabric("shm", num_ranks=most, num_homes=1, max_record_bytes=4096)
        assert len(os.listdir("/proc/self/fd")) == len(before)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_tcp_workers_of_one_cluster_share_a_secret_and_nothing_is_inherited() -> None:
    fabrics = [create_fabric("tcp", num_ranks=3, num_homes=1, max_record_bytes=4096) for _ in range(2)]
    specs = [fabric.spec_for(host) for fabric in fabrics for host in ("a", "b")]
    assert all(isinstance(fabric, TcpFabric) and fabric.fds() == () for fabric in fabrics)
    assert all(isinstance(spec, TcpSpec) for spec in specs)
    secrets = [spec.secret for spec in specs if isinstance(spec, TcpSpec)]
    assert secrets[0] == secrets[1] != secrets[2] == secrets[3]
    assert [spec.host for spec in specs if isinstance(spec, TcpSpec)] == ["a", "b", "a", "b"]
