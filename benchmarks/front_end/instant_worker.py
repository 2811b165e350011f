"""A worker that computes nothing: each open request gets one token per step, and a step comes every so often.

It is a real worker process on a real control channel, so that the front end pays for all that it pays for in service.
"""

from __future__ import annotations

import os
import select
import time

import numpy as np
import numpy.typing as npt

from amoe.config import EngineConfig
from amoe.engine.messages import AbortRequests, AddRequest, ControlPort, Heartbeat, Outputs, Ready, Stop
from amoe.stats import WorkerStats
from amoe.transport.base import Transport
from amoe.types import SequenceOutput

PERIOD = "AMOE_FRONT_END_PERIOD_S"
EMITTED = "AMOE_FRONT_END_EMITTED"
MAX_REQUESTS, MAX_TOKENS = 4096, 2048
FIRST_TOKEN = 300  # plain text in the built-in model's vocabulary
HEARTBEAT_S = 0.5


def emission_times(path: str) -> npt.NDArray[np.float64]:
    """[MAX_REQUESTS, MAX_TOKENS] monotonic time at which the worker has sent a token, shared through a file."""
    return np.memmap(path, np.float64, "r+" if os.path.exists(path) else "w+", shape=(MAX_REQUESTS, MAX_TOKENS))


class InstantWorker:
    """Answers at once. The first token id of a prompt is the client's number for the request."""

    def __init__(self, rank: int, control: ControlPort, period_s: float, emitted: npt.NDArray[np.float64]) -> None:
        self._control = control
        self._period_s = period_s
        self._emitted = emitted
        self._stats = WorkerStats(rank, "colocated")
        self._open: dict[int, tuple[AddRequest, int]] = {}

    def run(self) -> None:
        """Serve until `Stop`."""
        next_step = next_beat = time.monotonic()
        while True:
            now = time.monotonic()
            until = min(next_step, next_beat) if self._open else next_beat
            select.select([self._control.fileno()], [], [], max(0.0, until - now))
            for message in self._control.receive():
                if isinstance(message, Stop):
                    return
                if isinstance(message, AddRequest):
                    self._open[message.request_id] = (message, 0)
                elif isinstance(message, AbortRequests):
                    for request_id in message.request_ids:
                        self._open.pop(request_id, None)
            now = time.monotonic()
            if now >= next_beat:
                next_beat = now + HEARTBEAT_S
                self._stats.loops += 1
                self._control.send(Heartbeat(self._stats))
            if self._open and now >= next_step:
                next_step = max(next_step + self._period_s, now)
                self._step()

    def _step(self) -> None:
        outputs = []
        now = time.monotonic()
        for request_id, (request, count) in list(self._open.items()):
            output = SequenceOutput(request_id, [FIRST_TOKEN + count % 512])
            if count + 1 == request.params.max_tokens:
                output.finish_reason = "length"
                del self._open[request_id]
            else:
                self._open[request_id] = (request, count + 1)
            self._emitted[request.prompt_token_ids[0] % MAX_REQUESTS, count % MAX_TOKENS] = now
            outputs.append(output)
        self._control.send(Outputs(outputs))


def build_worker(config: EngineConfig, rank: int, transport: Transport, control: ControlPort) -> InstantWorker:
    """See `amoe.cluster.process.LaunchSpec`."""
    control.send(Ready(2048, 1024, 16, 0))
    return InstantWorker(rank, control, float(os.environ[PERIOD]), emission_times(os.environ[EMITTED]))
