"""Clusters that cannot work, and strangers at their ports: a word that helps, soon, and no process that hangs.

Ray's own are in `test_ray.py`, those of the transports in `test_transports.py`, those at the control port in
`test_control_listener.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from amoe.cluster.local import LocalCluster
from amoe.cluster.process import LaunchSpec, TcpControl
from amoe.cluster.worker_run import run_worker
from amoe.config import EngineConfig, PlacementConfig
from amoe.errors import ConfigError, EngineDeadError
from amoe.transport.opening import TcpSpec
from benchmarks.chaos.run import run
from benchmarks.chaos.server import ChaosServer
from benchmarks.chaos.streams import make_load

HERE = Path(__file__).parent
# 30 are promised to users, whose machine runs no other tests; the limits behind it: unit/cluster/test_bounds.py.
SOON_S = 90.0
HOST = "127.0.0.1"
GARBAGE = (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\xff\x00\x00\x00\x00\x00\x00\x01\x7f" * 100, bytes(1 << 16), b"")


def serve(*flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "amoe.cli", "serve", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=SOON_S, check=False)


def taken_port() -> socket.socket:
    listener = socket.create_server((HOST, 0))
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    return listener


def test_a_port_that_is_taken(checkpoint_factory: Callable[..., Path]) -> None:
    with taken_port() as listener:
        port = listener.getsockname()[1]
        done = serve(str(checkpoint_factory("qwen3_moe")), "--host", HOST, "--port", str(port))
    assert done.returncode not in (0, None)
    assert str(port) in done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_less_room_than_workers(checkpoint_factory: Callable[..., Path]) -> None:
    model = str(checkpoint_factory("qwen3_moe"))
    done = serve(model, "--port", "0", "--expert-workers", "3", "--max-expert-workers", "2")
    assert done.returncode not in (0, None)
    assert "--max-expert-workers" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr


async def test_another_model_on_another_host(
    checkpoint_factory: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same name, layers and sizes; other weights."""
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    monkeypatch.setenv("OTHER_MODEL", str(checkpoint_factory("qwen3_moe", 1)))
    config = EngineConfig(model=str(checkpoint_factory("qwen3_moe")), placement=PlacementConfig(expert_workers=1))
    cluster = LocalCluster(config, entry="other_model:build_worker")
    with pytest.raises(
        ConfigError, match=r"is another model at expert 0 \(.*\) than at attention 0 \(.*\): put the same files"
    ):
        await asyncio.wait_for(cluster.start(), SOON_S)
    assert not cluster.workers


@pytest.mark.parametrize("transport", ["tcp", "distributed"])
async def test_strangers_at_all_ports(transport: str, checkpoint_factory: Callable[..., Path], tmp_path: Path) -> None:
    """What listens for workers hears garbage, silence and HTTP; tokens go on as before."""
    model = str(checkpoint_factory("qwen3_moe"))
    flags = ("--expert-workers", "1", "--transport", transport, "--uvicorn-log-level", "warning")
    with ChaosServer(tmp_path, model, *flags) as server:
        load = make_load(8, 0, 20, 101)
        undisturbed = [answer.token_ids for answer in (await run(server, load)).answers]
        pids = server.pids()
        ports = {port for pid in (server.process.pid, *pids.values()) for port in listening(pid)} - {server.port}
        assert ports, "workers reach each other through ports"
        with contextlib.ExitStack() as silent:
            for port in ports:
                for words in GARBAGE:
                    stranger = silent.enter_context(socket.create_connection((HOST, port), 10))
                    with contextlib.suppress(OSError):  # it may be cut off in the middle
                        stranger.sendall(words)
            answers = (await run(server, load)).answers
        assert [answer.complaint(20) for answer in answers] == [""] * 8
        assert [answer.token_ids for answer in answers] == undisturbed
        assert server.pids() == pids


def listening(pid: int) -> set[int]:
    """Ports at which a process listens."""
    found = psutil.Process(pid).net_connections("tcp")
    return {connection.laddr.port for connection in found if connection.status == psutil.CONN_LISTEN}


def test_a_worker_that_cannot_reach_its_server() -> None:
    with taken_port() as listener:
        port = listener.getsockname()[1]
    spec = LaunchSpec(
        config=EngineConfig(model="m", placement=PlacementConfig(expert_workers=1), transport="tcp"),
        rank=1,
        control=TcpControl(HOST, port, "token"),
        transport=TcpSpec(num_ranks=2, host=HOST, max_record_bytes=1 << 16, secret="s"),
    )
    with pytest.raises(EngineDeadError, match=f"worker 1 cannot reach the server at {HOST}:{port}.*open that port"):
        run_worker(spec)
