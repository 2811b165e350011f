"""A real worker whose links can be cut and delayed from outside: the entry of workers of `benchmarks.chaos.serve`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from amoe.config import EngineConfig
from amoe.engine.build import build_worker as build
from amoe.engine.messages import ControlPort
from amoe.engine.worker import Worker
from amoe.transport.base import Transport
from amoe.transport.faulty import FaultyTransport

LINKS = "AMOE_CHAOS_LINKS"
STEERED = "links are steered"


def build_worker(config: EngineConfig, rank: int, transport: Transport, control: ControlPort, **more: Any) -> Worker:
    """See `amoe.cluster.process.LaunchSpec`."""
    print(f"{STEERED} at rank {rank}", flush=True)
    return build(config, rank, FaultyTransport(transport, steered_by=Path(os.environ[LINKS])), control, **more)
