"""A real worker whose links can be cut and delayed from outside, and which can be made to hang inside a step: the entry
of workers of `benchmarks.chaos.serve`."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from amoe.config import EngineConfig
from amoe.core.steps import Step
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
    links = Path(os.environ[LINKS])
    worker = build(config, rank, FaultyTransport(transport, steered_by=links), control, **more)
    worker._run = _hanging(worker._run, hang_file(links, os.getpid()))  # type: ignore[assignment]
    return worker


def hang_file(links: Path, pid: int) -> Path:
    """As long as it is not there, the worker with this pid does not hang."""
    return links.with_suffix(f".hang-{pid}")


def _hanging(run: Callable[[Step, float], None], file: Path) -> Callable[[Step, float], None]:
    def run_or_hang(step: Step, began: float) -> None:
        if file.exists():
            threading.Event().wait()
        run(step, began)

    return run_or_hang
