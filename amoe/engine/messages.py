"""Control messages between the server and one worker, as msgspec structs: one definition, generated codec.

Tokens between workers do not go this way: they are batches on a `Transport`.
"""

from __future__ import annotations

from collections.abc import Iterator
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
        num_generated: of `prompt_token_ids`, the last tokens that the sequence has generated at another worker, and
            that have been told: it goes on behind them as if nothing had happened.
        num_routed: leading tokens whose experts have been told, if they are wanted.
    """

    request_id: int
    prompt_token_ids: list[int]
    params: SamplingParams
    sibling_of: int | None = None
    num_generated: int = 0
    num_routed: int = 0


class AbortRequests(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Server to attention worker: free these sequences now. An unknown id is ignored (it has just finished)."""

    request_ids: list[int]


class Steer(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Server to attention worker: choose replicas by these shares from now on.

    Attributes:
        shares: [num_layers, num_experts, R] float32, little endian, in C order: R as in the topology `version`.
        version: of the topology that they belong to; shares for another one than the worker's are ignored.
    """

    shares: bytes
    version: int = 0


class Topology(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Server to all workers: who is there, and where experts are computed from now on. Replaces what was said before.

    Attributes:
        version: greater with every change; 0 is what the configuration says.
        incarnations: by rank, which life of the worker serves; -1: nobody does. A worker that is not there, or in
            another life, answers nothing that the former one was sent: homes send it elsewhere, or again.
        addresses: by rank, where the transport finds it (`Ready.address`); "" where that needs none.
        owners: [num_layers, num_experts, R] int16, little endian: indexes into `PlacementConfig.owner_ranks`, the
            primary replica first, -1 where there is no replica. Owners that are not there may be among them.
        num_replicas: R.
    """

    version: int
    incarnations: list[int]
    addresses: list[str]
    owners: bytes
    num_replicas: int


class HoldExperts(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Server to an expert worker: hold these experts, and no others. It loads what is missing beside its loop, says
    `Holding`, and forgets the others then: nobody may be sent to them any more.

    Attributes:
        order: number of this order; a later one replaces it.
        experts: [num_layers] ascending global ids.
    """

    order: int
    experts: list[list[int]]


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
        address: where the others' transports find it; "" where they need none.
        checkpoint_digest: of the files that it has read its part of the model from: all must have read the same.
        kernels: what it computes with, for a person; "": it only pretends.
    """

    max_model_len: int
    num_kv_blocks: int
    block_size: int
    parameter_bytes: int
    placement_digest: int = 0
    address: str = ""
    checkpoint_digest: int = 0
    kernels: str = ""


class Applied(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Worker to server: the topology `version` is in force here."""

    version: int


class Holding(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Expert worker to server: `HoldExperts` number `order` has been carried out.

    Attributes:
        parameter_bytes: weights that it holds now.
        complaint: why it could not; "" if it could. What it held before it still holds then.
    """

    order: int
    parameter_bytes: int
    complaint: str = ""


class LayerHeld(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Expert worker to server: it gets on with `HoldExperts` number `order`: one more layer holds something else."""

    order: int


class Unanswered(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Attention worker to server: the worker `rank` has owed answers for `seconds`, and has sent none since."""

    rank: int
    seconds: float


class Outputs(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Attention worker to server: what one head step, an abort or a refusal brought.

    Attributes:
        outputs: of sequences about which there is more to say than one more token.
        request_ids, token_ids: [n] columns of the others, which got that token and go on: objects and their names
            would cost both ends more than all the rest, once per token.
    """

    outputs: list[SequenceOutput]
    request_ids: list[int] = []
    token_ids: list[int] = []

    def each(self) -> Iterator[SequenceOutput]:
        """All of them, whichever way they came."""
        yield from self.outputs
        for request_id, token_id in zip(self.request_ids, self.token_ids, strict=True):
            yield SequenceOutput(request_id, [token_id])


class Heartbeat(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Worker to server, from within the worker's loop: it makes progress, and this is its state."""

    stats: WorkerStats


class Alive(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Worker to server, from within the worker's loop, several times between two heartbeats: it makes progress.

    Attributes:
        oldest_s: how long the oldest token waits here for an expert; 0 if none does.
    """

    oldest_s: float


class Pulse(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Worker to server, from beside the worker's loop: the process lives, its loop is inside one turn.

    Attributes:
        step_s: for so long; of a step that goes through all layers, for so long in one of them.
        usual_s: what a step of that size, or a layer of it, usually takes; None: it is the first of its kind.
        free_s, longest_s: see `amoe.policy.patience.StepTime`.
    """

    step_s: float
    usual_s: float | None
    free_s: float = 0.0
    longest_s: float | None = None


class Failed(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Worker to server: the worker cannot start or go on. `user_error`: the message is meant for the user as it is."""

    message: str
    user_error: bool


ToWorker = AddRequest | AbortRequests | Steer | Topology | HoldExperts | Stop
ToServer = Loading | Ready | Outputs | Heartbeat | Alive | Pulse | Applied | Holding | LayerHeld | Unanswered | Failed


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
