"""Workers of which one reads another checkpoint than the rest: an entry, see `amoe.cluster.process.LaunchSpec`."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

from amoe.config import EngineConfig
from amoe.engine.build import build_worker as build
from amoe.engine.messages import ControlPort
from amoe.engine.worker import Worker
from amoe.transport.base import Transport


def build_worker(config: EngineConfig, rank: int, transport: Transport, control: ControlPort, **more: Any) -> Worker:
    """Rank 1 finds other files under the same name, as on a host of its own."""
    if rank == 1:
        config = replace(config, model=os.environ["OTHER_MODEL"])
    return build(config, rank, transport, control, **more)
