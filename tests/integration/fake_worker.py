"""A worker without a model for the tests of `amoe.cluster`: what it does is what `config.model` says.

serve            loads, is ready, answers `AbortRequests([n])` with `Loading(n, rank)`, leaves on `Stop`
ping             serve, and rank 0 sends a batch round all ranks before it is ready
user-error       raises CheckpointError if its rank is 1, else serves
bug              raises ZeroDivisionError
exit             ends with status 7 after a line on standard error
deaf             is ready and then ignores everything, SIGTERM too
slow             loads for ever
crash            is ready; `AbortRequests` kills it by SIGSEGV
"""

from __future__ import annotations

import os
import select
import signal
import sys
import time

import numpy as np
import torch

from amoe.config import EngineConfig
from amoe.engine.messages import AbortRequests, ControlPort, Loading, Ready, Stop
from amoe.errors import CheckpointError
from amoe.transport.base import Transport
from amoe.types import Batch, BatchKind


class FakeWorker:
    def __init__(self, mode: str, rank: int, transport: Transport, control: ControlPort) -> None:
        self.mode, self.rank, self.transport, self.control = mode, rank, transport, control

    def run(self) -> None:
        while self.mode == "deaf":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(1)
        while True:
            select.select([self.control.fileno()], [], [])
            for message in self.control.receive():
                if isinstance(message, Stop):
                    return
                if self.mode == "crash":
                    os.kill(os.getpid(), signal.SIGSEGV)
                assert isinstance(message, AbortRequests)
                self.control.send(Loading(message.request_ids[0], self.rank))


def pass_round(rank: int, num_ranks: int, transport: Transport) -> None:
    """Rank 0 sends a batch that each rank passes on to the next."""
    ones = np.ones(3, np.int32)
    if rank == 0:
        transport.send(
            Batch(
                BatchKind.RESULT, 0, 1, 0, slots=ones, generations=ones, payload=torch.ones(3, 4, dtype=torch.bfloat16)
            )
        )
    while True:
        select.select([transport.fileno()], [], [])
        for batch in transport.poll():
            assert batch.payload is not None
            assert batch.payload.sum() == 12
            if rank:
                batch.src, batch.dst = rank, (rank + 1) % num_ranks
                transport.send(batch)
            return


def build_worker(config: EngineConfig, rank: int, transport: Transport, control: ControlPort) -> FakeWorker:
    mode = config.model
    if mode == "user-error" and rank == 1:
        raise CheckpointError("model.safetensors: tensor lm_head.weight is missing")
    if mode == "bug":
        raise ZeroDivisionError("a bug")
    if mode == "exit":
        print("the last words of the worker", file=sys.stderr)
        os._exit(7)
    for done in range(3):
        control.send(Loading(50 * done, 100))
    while mode == "slow":
        time.sleep(1)
    if mode == "ping":
        pass_round(rank, config.placement.num_workers, transport)
    control.send(Ready(128, 16, 16, 100 + rank))
    return FakeWorker(mode, rank, transport, control)
