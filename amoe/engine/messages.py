"""Control messages between the server and one worker, as msgspec structs: one definition, generated codec.

Tokens between workers do not go this way: they are batches on a `Transport`.
"""

from __future__ import annotations

from typing import Protocol

import msgspec

from amoe.stats import WorkerStats
from amoe.types import SamplingParams, SequenceOutput


class AddRequest(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Server to attention worker: serve this sequence.

    Attributes:
        request_id: unique for the server's lifetime.
        sibling_of: a request sent before to the same worker with the same prompt (another choice of one user's
            request): its KV of the prompt is shared instead of computed again.
    """

    request_id: int
    prompt_token_ids: list[int]
    params: SamplingParams
    sibling_of: int | None = None


class AbortRequests(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Server to attention worker: free these sequences now. An unknown id is ignored (it has just finished)."""

    request_ids: list[int]


class Steer(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Server to attention worker: choose replicas by these shares from now on.

    Attributes:
        shares: [num_layers, num_experts, R] float32, little endian, in C order: R as both have placed the experts.
    """

    shares: bytes


class Stop(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Server to worker: leave. The server has drained the requests before, if it wanted to."""


class Loading(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Worker to server: `done` of `total` parameter bytes are loaded."""

    done: int
    total: int


class Ready(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Worker to server: the worker's loop runs.

    Attributes:
        max_model_len: tokens of one sequence at most, what KV cache there is considered.
        num_kv_blocks, block_size: of this worker's KV cache; 0 at an expert worker.
        parameter_bytes: loaded weights.
        placement_digest: of where it believes the experts to be: all workers must believe the same.
    """

    max_model_len: int
    num_kv_blocks: int
    block_size: int
    parameter_bytes: int
    placement_digest: int = 0


class Outputs(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Attention worker to server: what one head step, an abort or a refusal brought."""

    outputs: list[SequenceOutput]


class Heartbeat(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Worker to server, from within the worker's loop: it makes progress, and this is its state."""

    stats: WorkerStats


class Pulse(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Worker to server, from beside the worker's loop: the process lives, its loop is inside one turn.

    Attributes:
        step_s: for so long.
        usual_s: what a step of that size usually takes; None: it is the first of its kind.
    """

    step_s: float
    usual_s: float | None


class Failed(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Worker to server: the worker cannot start or go on. `user_error`: the message is meant for the user as it is."""

    message: str
    user_error: bool


ToWorker = AddRequest | AbortRequests | Steer | Stop
ToServer = Loading | Ready | Outputs | Heartbeat | Pulse | Failed


class ControlPort(Protocol):
    """A worker's end of its control channel. Neither call blocks."""

    def receive(self) -> list[ToWorker]:
        """Messages that have come since the last call. After the server has gone: one final `Stop`."""
        ...

    def send(self, message: ToServer) -> None:
        """Queue a message and send what the socket takes."""
        ...

    def fileno(self) -> int:
        """A descriptor that is readable when `receive` would return something."""
        ...
