"""A sequence as whoever serves it to a user sees it: an asynchronous iteration over what is new."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from amoe.engine.generation import GenerationDelta, GenerationState
from amoe.engine.load import Choices
from amoe.errors import AmoeError
from amoe.types import FinishReason, SequenceTimes


class Generation:
    """The deltas of one sequence, to be iterated once. `close` it, or iterate to its end: either frees the sequence.

    Args:
        on_close: frees the sequence, if it has not ended yet.

    Attributes:
        finish_reason: how it has ended; None while it is open.
        queue_s, prefill_s: seconds before it was first computed, and from there to its first token; None: not yet told.
        num_preemptions: times that it lost its KV to others, as far as is known.
        num_moves: times that its worker has died, and it has gone on at another one.
        num_vain_lives: workers in a row that have died while they computed it, before they gave it a token.
        choices: it is one of them.
        num_waiting_tokens: of its prompt, until its first token: another choice computes them, if it is 0.
    """

    def __init__(
        self,
        on_close: Callable[[Generation], None],
        request_id: int,
        rank: int,
        state: GenerationState,
        choices: Choices,
        now: float,
    ) -> None:
        self.request_id = request_id
        self.rank = rank
        self.state = state
        self.arrived_at = now
        self.first_token_at: float | None = None
        self.last_token_at = now
        self.finish_reason: FinishReason | None = None
        self.queue_s: float | None = None
        self.prefill_s: float | None = None
        self.num_preemptions = 0
        self.num_moves = self.num_vain_lives = 0
        self._lost_s = 0.0  # before it came to its present worker, while it had no token
        self._preempted_before = 0
        self._had_begun = False
        self._told_before = 0  # tokens, when it came to its present worker
        self.choices = choices
        self.num_waiting_tokens = 0
        self._on_close = on_close
        self._pending: GenerationDelta | None = None
        self._error: AmoeError | None = None
        self._is_over = False  # the terminal event is in `_pending` or `_error`, or has been taken
        self._waiter: asyncio.Future[None] | None = None

    def __aiter__(self) -> Generation:
        return self

    async def __anext__(self) -> GenerationDelta:
        while True:
            if self._pending is not None:
                delta, self._pending = self._pending, None
                return delta
            if self._error is not None:
                error, self._error = self._error, None
                raise error
            if self._is_over:
                raise StopAsyncIteration
            # A bare future: this happens once a token, and an `Event` keeps a queue of those who wait.
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter

    def lose_worker(self, *, has_run: bool) -> None:
        """Engine only: its worker has died, where it was being computed, or it waited for its turn."""
        if self.state.num_generated_tokens > self._told_before:
            self.num_vain_lives = 0
        elif has_run:
            self.num_vain_lives += 1

    def move(self, rank: int, now: float) -> None:
        """Engine only: another worker goes on with it."""
        self._told_before = self.state.num_generated_tokens
        self.rank = rank
        self.num_moves += 1
        self._preempted_before = self.num_preemptions
        self._had_begun = self.first_token_at is not None
        self._lost_s = now - self.arrived_at
        self.state.move()

    def take_times(self, times: SequenceTimes) -> None:
        """Engine only: what its present worker says of its time there. The time to its first token has passed once."""
        if not self._had_begun:
            self.queue_s, self.prefill_s = self._lost_s + times.queue_s, times.prefill_s
        self.num_preemptions = self._preempted_before + times.num_preemptions

    def close(self) -> None:
        """Free the sequence, if it has not ended yet. Idempotent."""
        self._on_close(self)

    def deliver(self, delta: GenerationDelta) -> None:
        """Engine only: queue a delta."""
        if self._pending is None:
            self._pending = delta
        else:
            self._pending.merge(delta)
        self._is_over = delta.finish_reason is not None
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def fail(self, error: AmoeError | None) -> None:
        """Engine only: the terminal event is this error; None ends the iteration (nobody listens any more)."""
        self._error = error
        self._is_over = True
        self._wake()
