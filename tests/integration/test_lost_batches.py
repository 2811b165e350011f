"""One batch gets lost, and nobody dies or is silent: the token that waits for it is asked for again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from amoe.config import FailureConfig
from amoe.core.trace import record
from amoe.core.worker import ModelShape
from amoe.engine.messages import Unanswered
from amoe.sim.replay import replay
from amoe.transport.base import Transport
from amoe.types import Batch, BatchKind
from tests.cluster import InprocCluster
from tests.integration.exactness import Case, checkpoint, expected


class Leaky:
    """Loses the `number`-th batch of one token from one worker to another."""

    def __init__(self, transport: Transport, kind: BatchKind, way: tuple[int, int], number: int) -> None:
        self._transport = transport
        self._wanted = (kind, *way, 1)
        self._number = number

    def send(self, batch: Batch) -> None:
        if (batch.kind, batch.src, batch.dst, batch.count) == self._wanted:
            self._number -= 1
            if self._number == 0:
                return
        self._transport.send(batch)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class BusyCluster(InprocCluster):
    """There is always something to do."""

    def _collect(self, rank: int) -> None:
        control = self.controls[rank]
        control.outbox = [message for message in control.outbox if not isinstance(message, Unanswered)]
        super()._collect(rank)


@pytest.mark.parametrize(
    ("schedule", "kind"), [(("progress", 1), BatchKind.DISPATCH), (("waves", 2), BatchKind.RESULT)], ids=str
)
def test_a_worker_that_answers_others_is_asked_again(
    schedule: tuple[str, int], kind: BatchKind, tmp_path: Path
) -> None:
    case = Case(*schedule, "qwen3_moe", "2A2E", "plain", 0)
    config = replace(case.config(checkpoint(tmp_path, case.arch, case.variant)), failure=FailureConfig(timeout_s=0.2))
    way = (0, 2) if kind is BatchKind.DISPATCH else (2, 0)
    cluster = BusyCluster(config, wrap=lambda transport: Leaky(transport, kind, way, 20))  # type: ignore[arg-type]
    core = cluster.workers[0].core
    trace = record(core, config, ModelShape(core._shape.sparse_layers, core.num_experts), cluster._owners)
    losses = core.attention.recovery.losses
    num_prompts, ids = len(case.prompts), [cluster.add(case.prompts[0], case.params, home=0)]
    while cluster.requests[ids[0]].finish_reason is None or losses.resent == 0:
        is_open = [cluster.requests[request_id].finish_reason is None for request_id in ids]
        if sum(is_open) < 6:
            ids.append(cluster.add(case.prompts[len(ids) % num_prompts], case.params, home=len(ids) % 2))
        cluster.turn()
        assert cluster.num_turns < 2000, "it is not asked for again as long as there is something else to do"
    cluster.run()
    references = expected(tmp_path, case.arch, case.variant)
    for index, request_id in enumerate(ids):
        assert cluster.requests[request_id].token_ids == references[index % num_prompts].token_ids
    cluster.assert_nothing_left()
    assert any(entry.said for entry in trace.entries if entry.call == "retry")
    assert replay(trace) is None, "the simulator asks again when the engine did"
    cluster.close()
