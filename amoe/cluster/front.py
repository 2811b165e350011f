"""An engine in front of a cluster of workers: what the server, the benchmarks and the tests start."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from amoe.cluster.admin_desk import LocalDesk
from amoe.cluster.cluster import WorkerCluster, longest_sequence
from amoe.cluster.elastic import ElasticCluster
from amoe.cluster.local import LocalCluster
from amoe.cluster.process import DEFAULT_ENTRY
from amoe.cluster.supervised import SupervisedEngine
from amoe.cluster.supervisor import Supervisor
from amoe.cluster.topology import TopologyBoard
from amoe.config import EngineConfig
from amoe.engine.async_engine import AsyncEngine, ModelInfo
from amoe.engine.emulated_device import served_shape
from amoe.engine.messages import Ready, Topology
from amoe.engine.tokenizer import Tokenizer
from amoe.engine.watchdog import HEARTBEAT_TIMEOUT_S, STALL_TIMEOUT_S
from amoe.models.config import load_model_config


def model_info(config: EngineConfig, ready: Sequence[Ready], name: str) -> ModelInfo:
    """What a front must know of the model that the workers of `config` have loaded."""
    sizes = served_shape(config)
    return ModelInfo(
        name=name,
        max_model_len=longest_sequence(config, ready),
        vocab_size=load_model_config(config.model).vocab_size,
        num_moe_layers=sum(sizes.sparse_layers),
        pairs_per_token=config.capacity.pairs_per_token(sizes.top_k, sizes.num_experts),
    )


@dataclass(frozen=True, slots=True)
class Supervision:
    """Whoever keeps the workers of a cluster alive. Make it with `supervise`.

    Attributes:
        supervisor: None: nobody replaces a worker, and the engine dies with any of them.
        admin: shows and changes the workers, where there is a supervisor.
        desk: where operators' orders are taken, likewise.
    """

    supervisor: Supervisor | None = None
    admin: ElasticCluster | None = None
    desk: LocalDesk | None = None

    async def close(self) -> None:
        """Replace nobody any more. Idempotent."""
        if self.desk is not None:
            await self.desk.close()
        if self.admin is not None:
            await self.admin.close()
        if self.supervisor is not None:
            await self.supervisor.stop()


def is_supervised(cluster: WorkerCluster) -> bool:
    """Whether a started cluster can go on without a worker, so that it is worth replacing one."""
    return cluster.config.survives_losses and cluster.owners is not None


def supervise(cluster: WorkerCluster, engine: SupervisedEngine, board: TopologyBoard | None) -> Supervision:
    """Keep the workers of a started cluster alive, if it `is_supervised`; otherwise let the engine die with them.

    Args:
        engine: runs.
        board: see `introduce`.
    """
    if board is None or not is_supervised(cluster):
        cluster.on_death = lambda _, reason: engine.die(reason)
        return Supervision()
    board.observers.append(engine.on_topology)
    engine.on_topology(board.topology)  # which the workers have been told
    supervisor = Supervisor(cluster, engine, board)
    assert cluster.shape is not None, "where experts live is known of a model"
    admin = ElasticCluster(cluster, engine, board, supervisor, cluster.shape)
    supervisor.run()
    admin.run()
    return Supervision(supervisor, admin, LocalDesk(admin))


class Front:
    """An engine in front of a started cluster, and whoever keeps its workers alive. Make it with `connect`.

    Attributes:
        engine: runs.
        admin, desk: see `Supervision`.
    """

    def __init__(self, engine: AsyncEngine, supervision: Supervision) -> None:
        self.engine = engine
        self.admin = supervision.admin
        self.desk = supervision.desk
        self._supervision = supervision

    async def close(self) -> None:
        """Replace nobody any more and end what is open; the workers are the cluster's to stop. Idempotent."""
        await self._supervision.close()
        await self.engine.close()


def connect(
    cluster: WorkerCluster,
    ready: Sequence[Ready],
    *,
    name: str,
    tokenizer: Tokenizer,
    heartbeat_timeout_s: float = HEARTBEAT_TIMEOUT_S,
    stall_timeout_s: float = STALL_TIMEOUT_S,
) -> Front:
    """An engine that listens to the workers of a started cluster. Where the configuration lets the others go on without
    one, workers are supervised; otherwise the engine dies with any of them.

    Args:
        ready: what `WorkerCluster.start` returned.
        name: of the model, as users see it.
        heartbeat_timeout_s, stall_timeout_s: see `amoe.engine.watchdog`.
    """
    board = introduce(cluster, ready)
    engine = AsyncEngine(
        cluster.channels,
        cluster.config,
        tokenizer,
        model_info(cluster.config, ready, name),
        owners=cluster.owners,
        heartbeat_timeout_s=heartbeat_timeout_s,
        stall_timeout_s=stall_timeout_s,
        supervised=is_supervised(cluster),
    )
    engine.run()
    return Front(engine, supervise(cluster, engine, board))


def introduce(cluster: WorkerCluster, ready: Sequence[Ready]) -> TopologyBoard | None:
    """Tell the workers of a started cluster who is there, and where; None: they serve no model, and know no others."""
    if cluster.owners is None:
        return None

    def send(rank: int, topology: Topology) -> None:
        with contextlib.suppress(OSError, KeyError):  # it has gone: whoever watches it knows what to do
            cluster.workers[rank].channel.send(topology)

    board = TopologyBoard(cluster.config.placement.num_ranks, cluster.owners, send)
    board.join({rank: (cluster.workers[rank].incarnation, item.address) for rank, item in enumerate(ready)})
    return board


@contextlib.asynccontextmanager
async def serving(
    cluster: WorkerCluster,
    *,
    name: str,
    tokenizer: Tokenizer,
    heartbeat_timeout_s: float = HEARTBEAT_TIMEOUT_S,
    stall_timeout_s: float = STALL_TIMEOUT_S,
    on_progress: Callable[[int, int], None] | None = None,
) -> AsyncIterator[Front]:
    """Start a cluster and what stands in front of it; both are gone afterwards.

    Args:
        cluster: not started.
        name, heartbeat_timeout_s, stall_timeout_s: see `connect`; on_progress: see `WorkerCluster.start`.

    Raises:
        ConfigError, CheckpointError: it cannot work.
        EngineDeadError: a worker failed while it started.
    """
    ready = await cluster.start(on_progress)
    try:
        front = connect(
            cluster,
            ready,
            name=name,
            tokenizer=tokenizer,
            heartbeat_timeout_s=heartbeat_timeout_s,
            stall_timeout_s=stall_timeout_s,
        )
        try:
            yield front
        finally:
            await front.close()
    finally:
        await cluster.stop()


@contextlib.asynccontextmanager
async def running_engine(
    config: EngineConfig, *, entry: str = DEFAULT_ENTRY
) -> AsyncIterator[tuple[AsyncEngine, LocalCluster]]:
    """An engine and its workers on this host, which are gone afterwards. Raises what `serving` does.

    Args:
        entry: see `LaunchSpec`.
    """
    cluster = LocalCluster(config, entry=entry)
    async with serving(cluster, name=Path(config.model).name, tokenizer=Tokenizer(config.model)) as front:
        yield front.engine, cluster
