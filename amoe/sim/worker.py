"""The virtual shell of a worker: what `amoe.engine.worker` does around a core, without tensors and without time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from amoe.core.batcher import Batcher
from amoe.core.members import Roster
from amoe.core.steps import AttentionStep, ExpertsStep, ForwardStep, HeadStep, Outgoing, Step
from amoe.core.worker import WorkerCore
from amoe.types import Batch, BoolArray, Float32Array, Int32Array, Int64Array, SamplingParams

Shares = npt.NDArray[np.floating]


@dataclass(frozen=True, slots=True)
class NewRequest:
    """A request for the attention side; `prompt_token_ids` [n], those of `sibling_of` too, if that is a request. The
    rest is as in `Batcher.add`."""

    request_id: int
    prompt_token_ids: Int32Array
    params: SamplingParams
    sibling_of: int | None = None
    num_generated: int = 0
    num_routed: int = 0


@dataclass(frozen=True, slots=True)
class News:
    """Other workers serve, or hold other experts, from the time `at` on."""

    roster: Roster
    at: float


class Routing(NamedTuple):
    """What the router says of n tokens: topk_ids, topk_weights [n, K], and scores [n, E] where capacity is on."""

    topk_ids: Int64Array
    topk_weights: Float32Array
    scores: Float32Array | None = None


class Answers(Protocol):
    """What the kernels of attention workers would say: drawn from a model, or read from a record."""

    def experts_of(self, step: ForwardStep) -> Mapping[int, Int64Array]:
        """By layer, the experts that the tokens of a step through all layers take; none, if nobody wants to know."""
        ...

    def route(self, step: AttentionStep, now: float) -> Routing | None:
        """What the router says; None at a dense layer."""
        ...

    def sample(self, step: HeadStep, now: float) -> tuple[Int64Array, BoolArray]:
        """token_ids [n], and which sequences [n] end with them."""
        ...


class VirtualWorker:
    """Drives one `WorkerCore`: `turn` begins a step, `finish` ends it. Whoever calls them decides when that is.

    Args:
        answers: of its kernels; an expert worker needs none.
        send: takes what leaves, batches to this very worker included.
    """

    def __init__(self, core: WorkerCore, answers: Answers | None, send: Callable[[Batch], None]) -> None:
        self.core = core
        self.answers = answers
        self._send_batch = send
        self._messages: list[NewRequest | News | Shares | int] = []  # a number is an abort
        self._mailbox: list[Batch] = []

    def submit(self, request: NewRequest) -> None:
        """A request waits for the next turn."""
        self._messages.append(request)

    def abort(self, request_id: int) -> None:
        """The next turn aborts a request."""
        self._messages.append(request_id)

    def steer(self, shares: Shares) -> None:
        """From the next turn on, tokens choose replicas by `shares` [num_layers, num_experts, R]."""
        self._messages.append(shares)

    def tell(self, news: News) -> None:
        """The next turn hears of it."""
        self._messages.append(news)

    def deliver(self, batch: Batch) -> None:
        """A batch waits for the next turn."""
        self._mailbox.append(batch)

    def turn(self, now: float) -> Step | None:
        """Take what has come, start iterations, choose a block. Returns what is to be run, if anything is."""
        if self._messages:
            self._handle_messages()
        batches, self._mailbox = self._mailbox, []
        for batch in batches:
            self.core.on_batch(batch, now)
        self._send(self.core.start(now))
        return self.core.next_step(now)

    def finish(self, step: Step, now: float, seconds: float | None = None) -> None:
        """`step` has run for so many seconds (None: not known): tell the core, and send what it has brought."""
        if isinstance(step, ForwardStep):
            self._finish_forward(step, now, seconds)
            return
        if isinstance(step, ExpertsStep):
            self._send(step.replies)
        else:
            self._finish_at_home(step, now)
        if seconds is not None:
            self.core.observe(step, seconds)

    def _finish_at_home(self, step: AttentionStep | HeadStep, now: float) -> None:
        attention, answers = self.core.attention, self.answers
        assert attention is not None and answers is not None, "only attention workers run attention and head"
        if isinstance(step, AttentionStep):
            routing = answers.route(step, now)
            if routing is None:
                self._send(attention.on_attention(step, None, None, now))
            else:
                self._send(attention.on_attention(step, routing.topk_ids, routing.topk_weights, now, routing.scores))
        else:
            attention.on_head(step, *answers.sample(step, now))

    def _finish_forward(self, step: ForwardStep, now: float, seconds: float | None) -> None:
        forward, answers = self.core.forward, self.answers
        assert forward is not None and answers is not None
        forward.on_forward(step, answers.experts_of(step))
        if step.head is not None:
            forward.on_head(step.head, *answers.sample(step.head, now))
        if seconds is not None:
            forward.observe(step, seconds)

    def retry(self, now: float) -> None:
        """Send again what has been owed for too long, as a home does now and then."""
        assert self.core.attention is not None
        self._send(self.core.attention.recovery.retry(now))

    def _send(self, outgoing: Sequence[Outgoing]) -> None:
        for item in outgoing:
            self._send_batch(item.batch)

    def _handle_messages(self) -> None:
        messages, self._messages = self._messages, []
        for message in messages:
            if isinstance(message, News):
                self._send(self.core.on_roster(message.roster, message.at))
            elif isinstance(message, NewRequest):
                self._home.add(
                    message.request_id,
                    message.prompt_token_ids,
                    message.params,
                    message.sibling_of,
                    num_generated=message.num_generated,
                    num_routed=message.num_routed,
                )
            elif isinstance(message, int):
                self._home.abort(message)
            else:
                assert self.core.attention is not None, "nobody else chooses replicas"
                self.core.attention.set_shares(message)

    @property
    def _home(self) -> Batcher:
        assert self.core.batcher is not None, "only attention workers take requests"
        return self.core.batcher
