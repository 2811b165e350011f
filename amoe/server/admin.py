"""The admin API: see the cluster, and change it under traffic. It has keys of its own, see `middleware.auth`.

`amoe scale` is its client. It is not part of /openapi.json, which is for those who use the models.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

from fastapi import APIRouter, Query, Response
from pydantic import BaseModel, ConfigDict, Field, StrictInt

from amoe.cluster.admin import AdminDesk, ClusterStatus, Order, Rebalance, Replicate, Scale
from amoe.errors import ConfigError, RequestError
from amoe.server.context import ServerContext
from amoe.server.encoding import json_response
from amoe.server.errors import ConflictError
from amoe.stats import ClusterStats

Wait = Annotated[bool, Query(description="Answer when it is done; false: at once, with 202.")]
Index = Annotated[StrictInt, Field(ge=0)]


class ScaleRequest(BaseModel):
    """POST /admin/scale."""

    model_config = ConfigDict(extra="forbid")

    expert_workers: Annotated[StrictInt, Field(ge=1)]


class ReplicasRequest(BaseModel):
    """POST /admin/replicas: so many workers shall hold this expert."""

    model_config = ConfigDict(extra="forbid")

    layer: Index
    expert: Index
    count: Annotated[StrictInt, Field(ge=1)]


class RebalanceRequest(BaseModel):
    """POST /admin/rebalance. The body may be left out."""

    model_config = ConfigDict(extra="forbid")


def cluster_stats(status: ClusterStatus) -> ClusterStats:
    """What metrics tell of a cluster."""
    return ClusterStats(
        version=status.version,
        states={worker.rank: (worker.role, worker.state) for worker in status.workers},
        num_wanted=status.num_expert_workers,
        num_most=status.max_expert_workers,
        num_replicas=status.num_replicas,
        num_missing=status.missing,
    )


def admin_router(context: ServerContext) -> APIRouter:
    """The routes, over `context.admin`."""
    router = APIRouter(prefix="/admin", include_in_schema=False)

    async def answer(desk: AdminDesk, status: int, **own: int) -> Response:
        view = await desk.look()
        return json_response(asdict(view.status) | {"actions": [*map(asdict, view.actions)]} | own, status)

    async def carry_out(desk: AdminDesk, order: Order, wait: bool) -> Response:
        try:
            action_id = await desk.order(order, wait=wait)
        except ConfigError as error:
            raise ConflictError(str(error)) from error
        return await answer(desk, 200 if wait else 202, action_id=action_id)

    @router.get("/cluster")
    async def cluster() -> Response:
        """Workers, experts, and what has been asked for lately."""
        return await answer(_desk(context), 200)

    @router.post("/scale")
    async def scale(body: ScaleRequest, wait: Wait = True) -> Response:
        """Let there be so many expert workers."""
        desk = _desk(context)
        _check_count(body.expert_workers, (await desk.look()).status)
        return await carry_out(desk, Scale(body.expert_workers), wait)

    @router.post("/replicas")
    async def replicas(body: ReplicasRequest, wait: Wait = True) -> Response:
        """Let so many workers hold an expert."""
        desk = _desk(context)
        _check_expert(body, (await desk.look()).status)
        return await carry_out(desk, Replicate(body.layer, body.expert, body.count), wait)

    @router.post("/rebalance")
    async def rebalance(body: RebalanceRequest | None = None, wait: Wait = True) -> Response:
        """Place experts by their measured load."""
        return await carry_out(_desk(context), Rebalance(), wait)

    return router


def _desk(context: ServerContext) -> AdminDesk:
    if context.admin is None:
        raise ConflictError(
            "the workers of this server are neither replaced nor changed while it runs: that needs a --schedule other "
            "than lockstep"
        )
    return context.admin


def _check_count(count: int, status: ClusterStatus) -> None:
    if not any(worker.role == "experts" for worker in status.workers):
        raise ConflictError(
            "no worker of this server holds experts alone: start it with --expert-workers N, and there may be more"
        )
    if count > status.max_expert_workers:
        raise RequestError(
            f"expert_workers: there may be {status.max_expert_workers} at most: start the server with "
            f"--max-expert-workers {count} to have more",
            param="expert_workers",
        )


def _check_expert(body: ReplicasRequest, status: ClusterStatus) -> None:
    for name, value, count in (("layer", body.layer, status.num_layers), ("expert", body.expert, status.num_experts)):
        if value >= count:
            raise RequestError(f"{name}: there is no {name} {value}: the model has {count}, from 0", param=name)
