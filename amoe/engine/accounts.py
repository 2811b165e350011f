"""What the server's sequences cost and take, as they go along: load by worker, metrics, times."""

from __future__ import annotations

from amoe.clock import Clock
from amoe.engine.async_generation import Generation
from amoe.engine.generation import GenerationDelta
from amoe.engine.load import OpenLoad
from amoe.metrics import EngineMetrics
from amoe.types import FinishReason


class Accounts:
    """Every sequence is opened, may get tokens and move, and is closed.

    Attributes:
        last_token_at: when anybody got a token, or came where nobody was; by `clock`.
    """

    def __init__(self, load: OpenLoad, metrics: EngineMetrics, clock: Clock) -> None:
        self._load = load
        self._metrics = metrics
        self._clock = clock
        self.last_token_at = clock.now()

    def open(self, generation: Generation, *, is_first: bool) -> None:
        """A sequence comes; the first one of its prompt has it computed."""
        if self._load.is_empty:
            self.last_token_at = generation.arrived_at
        count = generation.state.num_prompt_tokens
        generation.num_waiting_tokens = count if is_first else 0
        self._load.enter(generation.rank, count, generation.num_waiting_tokens, generation.arrived_at)
        generation.choices.enter()

    def move(self, generation: Generation, rank: int) -> None:
        """A sequence goes on at another worker, or at another life of its own."""
        state = generation.state
        self._metrics.readmitted(generation.rank, 1)
        self._load.move(generation.rank, rank, state.num_prompt_tokens + state.num_generated_tokens)
        generation.move(rank, self._clock.now())

    def count_tokens(self, generation: Generation, delta: GenerationDelta) -> None:
        """A sequence has got tokens."""
        self.last_token_at = now = self._clock.now()
        self._load.grow(generation.rank, len(delta.token_ids))
        if generation.first_token_at is None:
            generation.first_token_at = now
            self._begin(generation)
            self._metrics.first_token(
                generation.rank, now - generation.arrived_at, delta.num_prompt_tokens, delta.num_cached_tokens
            )
            self._metrics.tokens(generation.rank, len(delta.token_ids), None)
        else:
            self._metrics.tokens(generation.rank, len(delta.token_ids), now - generation.last_token_at)
        generation.last_token_at = now

    def close(self, generation: Generation, reason: FinishReason) -> None:
        """A sequence has ended."""
        now, state, choices = self._clock.now(), generation.state, generation.choices
        self._load.leave(generation.rank, state.num_prompt_tokens + state.num_generated_tokens, now)
        self._begin(generation)
        has_tokens = generation.first_token_at is not None
        self._metrics.finished(
            generation.rank,
            reason,
            seconds=now - generation.arrived_at,
            decode_seconds=generation.last_token_at - (generation.first_token_at or 0.0) if has_tokens else None,
            num_prompt_tokens=state.num_prompt_tokens,
            num_generated_tokens=state.num_generated_tokens,
            num_cached_tokens=state.num_cached_tokens,
            max_tokens=state.params.max_tokens,
            queue_seconds=generation.queue_s,
            prefill_seconds=generation.prefill_s,
            num_preemptions=generation.num_preemptions,
        )
        if choices.leave(state.num_generated_tokens):
            self._metrics.all_choices_finished(generation.rank, choices.count, choices.longest)

    def _begin(self, generation: Generation) -> None:
        """Its prompt waits no longer."""
        self._load.begin(generation.num_waiting_tokens)
        generation.num_waiting_tokens = 0
