"""The admin API: see the cluster, and change it under traffic. It has keys of its own, see `middleware.auth`.

`amoe scale` is its client. It is not part of /openapi.json, which is for those who use the models.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Query, Response
from pydantic import BaseModel, ConfigDict, Field, StrictInt

from amoe.cluster.admin import ClusterAdmin, ClusterStatus
from amoe.errors import ConfigError, RequestError
from amoe.server.admin_actions import AdminActions
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
    actions = AdminActions()

    def answer(admin: ClusterAdmin, status: int, **own: int) -> Response:
        return json_response(asdict(admin.status()) | {"actions": actions.as_json()} | own, status)

    async def carry_out(
        admin: ClusterAdmin, title: str, work: Coroutine[Any, Any, ClusterStatus], wait: bool
    ) -> Response:
        action, task = actions.start(title, work)
        if not wait:
            return answer(admin, 202, action_id=action.number)
        try:
            await asyncio.shield(task)  # whatever becomes of this request, half a move helps nobody
        except ConfigError as error:
            raise ConflictError(str(error)) from error
        return answer(admin, 200, action_id=action.number)

    @router.get("/cluster")
    async def cluster() -> Response:
        """Workers, experts, and what has been asked for lately."""
        return answer(_admin(context), 200)

    @router.post("/scale")
    async def scale(body: ScaleRequest, wait: Wait = True) -> Response:
        """Let there be so many expert workers."""
        admin, count = _admin(context), body.expert_workers
        _check_count(count, admin.status())
        return await carry_out(admin, f"scale to {_workers(count, 'expert ')}", admin.scale_experts(count), wait)

    @router.post("/replicas")
    async def replicas(body: ReplicasRequest, wait: Wait = True) -> Response:
        """Let so many workers hold an expert."""
        admin, layer, expert = _admin(context), body.layer, body.expert
        _check_expert(body, admin.status())
        title = f"hold expert {expert} of layer {layer} at {_workers(body.count)}"
        return await carry_out(admin, title, admin.replicate(layer, expert, body.count), wait)

    @router.post("/rebalance")
    async def rebalance(body: RebalanceRequest | None = None, wait: Wait = True) -> Response:
        """Place experts by their measured load."""
        admin = _admin(context)
        return await carry_out(admin, "rebalance", admin.rebalance(), wait)

    return router


def _admin(context: ServerContext) -> ClusterAdmin:
    if context.admin is None:
        raise ConflictError(
            "the workers of this server are neither replaced nor changed while it runs: that needs one API process "
            "(no --api-server-count), and a --schedule other than lockstep"
        )
    return context.admin


def _workers(count: int, kind: str = "") -> str:
    return f"{count} {kind}worker{'' if count == 1 else 's'}"


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
