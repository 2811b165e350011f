"""The server's side of the workers: admission, routing of outputs, health. All of it in one event loop.

A request's life here: `start` admits it and sends it to an attention worker; that worker's `Outputs` become deltas in
its `Generation`; it ends with exactly one terminal event, after which nothing of it is left in the engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from amoe.clock import Clock, MonotonicClock
from amoe.config import EngineConfig
from amoe.engine.async_generation import Generation
from amoe.engine.generation import GenerationDelta, GenerationState
from amoe.engine.load import Choices, Front, OpenLoad, Refusal, first_choices
from amoe.engine.messages import AbortRequests, AddRequest, Failed, Heartbeat, Outputs, Pulse, ToServer, ToWorker
from amoe.engine.shared_control import REQUESTS_PER_FRONT
from amoe.engine.steering import Steering
from amoe.engine.tokenizer import Tokenizer
from amoe.engine.watchdog import HEARTBEAT_TIMEOUT_S, STALL_TIMEOUT_S, Stall, Watchdog
from amoe.errors import AmoeError, EngineDeadError, EngineOverloadedError, RequestError
from amoe.metrics import EngineMetrics
from amoe.policy import admission
from amoe.types import FinishReason, Int16Array, SamplingParams, SequenceOutput

logger = logging.getLogger(__name__)

WATCHDOG_PERIOD_S = 0.5
GONE_GRACE_S = 0.2  # whoever started a worker that is gone can say how it ended, and soon does


class WorkerChannel(Protocol):
    """The server's end of one worker's control channel."""

    def send(self, message: ToWorker) -> None:
        """Queue a message; does not wait."""
        ...

    def __aiter__(self) -> AsyncIterator[ToServer]:
        """Messages of the worker, until it has gone."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelInfo:
    """What the front must know of the loaded model.

    Attributes:
        name: as users see it.
        max_model_len: tokens of one sequence at most, as the workers that loaded it say.
        vocab_size: rows of the embedding.
        num_moe_layers, pairs_per_token: shape of what is told of a token's experts.
    """

    name: str
    max_model_len: int
    vocab_size: int
    num_moe_layers: int = 1
    pairs_per_token: int = 1


class AsyncEngine:
    """Serves sequences on workers that are ready.

    Args:
        channels: one per worker, by rank.
        config: of the workers.
        model: what they have loaded.
        owners: [num_layers, num_experts, R] where experts live; None: replicas, if there are any, are not steered.
        heartbeat_timeout_s: a worker whose loop does not turn for so long is dead.
        stall_timeout_s: a worker that gives no sign of life, or has work and runs no block, for so long makes the
            engine unhealthy until it goes on: what is open stays open, and nothing new is taken.
        front: which of several engines on the same workers this is; the first one steers them.
    """

    def __init__(
        self,
        channels: Sequence[WorkerChannel],
        config: EngineConfig,
        tokenizer: Tokenizer,
        model: ModelInfo,
        *,
        owners: Int16Array | None = None,
        clock: Clock | None = None,
        heartbeat_timeout_s: float = HEARTBEAT_TIMEOUT_S,
        stall_timeout_s: float = STALL_TIMEOUT_S,
        front: Front = Front(),  # noqa: B008 - frozen
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.model = model
        self.metrics = EngineMetrics(model.name, model.max_model_len, config.cache, steers=front.index == 0)
        self._channels = channels
        self._clock = clock or MonotonicClock()
        self._open: dict[int, Generation] = {}
        self._load = OpenLoad(config, front.count)
        self._next_id = front.index * REQUESTS_PER_FRONT
        self._tasks: list[asyncio.Task[None]] = []
        self._death: EngineDeadError | None = None
        self._draining = False
        self.died = asyncio.Event()  # some worker has, or nothing can go on
        self._all_closed = asyncio.Event()
        self._all_closed.set()
        self._watchdog = Watchdog(range(len(channels)), heartbeat_timeout_s, stall_timeout_s)
        self.metrics.prepare(config.placement.attention_ranks)
        steered = owners if front.index == 0 else None
        self._steering = Steering(config, steered, self._clock, send=self._send, tell=self.metrics.steered)

    # -- life --------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Start to listen to the workers. Call it once, in the event loop that serves the requests."""
        self._tasks = [
            asyncio.create_task(self._listen(rank, channel), name=f"amoe-listen-{rank}")
            for rank, channel in enumerate(self._channels)
        ]
        self._tasks.append(asyncio.create_task(self._watch(), name="amoe-watchdog"))
        self._tasks.append(asyncio.create_task(self._steering.run(), name="amoe-steering"))

    def refuse_new(self) -> None:
        """The server is going: what is open may end, nothing new comes in."""
        self._draining = True

    async def drain(self) -> None:
        """Refuse new requests, and wait until the open ones have ended."""
        self.refuse_new()
        await self._all_closed.wait()

    async def close(self) -> None:
        """Stop to listen; whatever is still open ends with an error."""
        self.refuse_new()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._end("the server has stopped")

    @property
    def healthy(self) -> bool:
        """Every worker makes progress."""
        return self._death is None and self._watchdog.stalled is None

    @property
    def is_draining(self) -> bool:
        """New requests are refused, for good."""
        return self._draining

    @property
    def num_open(self) -> int:
        """Sequences that have not ended."""
        return len(self._open)

    def die(self, reason: str) -> None:
        """A worker has died, or cannot go on: so has the engine. The first reason stays."""
        if self._death is None:
            logger.error("%s: nothing can be served any more", reason)
            self._end(reason)
            self.died.set()

    def _end(self, reason: str) -> None:
        """Every open request ends with an error."""
        if self._death is not None:
            return
        self._death = EngineDeadError(reason)
        self.metrics.healthy(False)
        for generation in list(self._open.values()):
            self._forget(generation, "error")
            generation.fail(EngineDeadError(reason))

    # -- requests ----------------------------------------------------------------------------------------------------

    def start(
        self, requests: Sequence[tuple[Sequence[int], SamplingParams]], *, param: str = "prompt"
    ) -> list[Generation]:
        """Admit all of these sequences, or none.

        Args:
            requests: prompt token ids and parameters of each. Neighbours with the same prompt are choices: they go to
                one worker, where the first one's KV of the prompt serves all.
            param: the field of the user's request that the prompt comes from, for error messages.

        Raises:
            RequestError: a prompt that is empty, too long, or holds an unknown token id; a priority that means nothing.
            EngineOverloadedError: no room now, or a worker has stalled.
            EngineDeadError: no room ever.
        """
        firsts = first_choices(requests)
        num_prompt_tokens = 0
        for index, (prompt_token_ids, params) in enumerate(requests):
            if firsts[index] == index:
                admission.validate_prompt(prompt_token_ids, self.model.vocab_size, param)
                num_prompt_tokens += len(prompt_token_ids)
            admission.validate_length(len(prompt_token_ids), params.max_tokens, self.model.max_model_len, param)
            admission.validate_priority(params.priority, self.config.scheduler.scheduling_policy)
        self._check_room(len(requests), num_prompt_tokens)
        generations: list[Generation] = []
        try:
            for (prompt_token_ids, params), first in zip(requests, firsts, strict=True):
                sibling = generations[first] if first < len(generations) else None
                generations.append(self._start_one(prompt_token_ids, params, sibling))
        except BaseException:
            for generation in generations:  # which nobody will ever read
                generation.close()
            raise
        return generations

    def check_count(self, count: int, param: str) -> None:
        """Refuse more sequences at once than ever fit, before they are made.

        Raises:
            RequestError: naming `param`.
        """
        self._load.check_count(count, param)

    async def generate(self, prompt_token_ids: Sequence[int], params: SamplingParams) -> AsyncIterator[GenerationDelta]:
        """The deltas of one sequence. Leaving the iteration early frees it."""
        (generation,) = self.start([(prompt_token_ids, params)])
        try:
            async for delta in generation:
                yield delta
        finally:
            generation.close()

    def abort(self, generation: Generation) -> None:
        """Free the sequence now. Nothing happens if it has ended."""
        if generation.request_id not in self._open:
            return
        self._send(generation.rank, AbortRequests([generation.request_id]))
        self._forget(generation, "abort")
        generation.fail(None)

    def _check_room(self, count: int, num_prompt_tokens: int) -> None:
        refusal = self._load.refusal(count, num_prompt_tokens, self._clock.now())
        if self._death is not None:
            self.metrics.rejected("dead")
            raise EngineDeadError(str(self._death))
        if self._draining:
            refusal = Refusal("shutdown", "the server is shutting down and takes no new requests", 5)
        elif (stall := self._watchdog.stalled) is not None:  # what came in now would only wait for it
            refusal = Refusal("stalled", f"{stall}: nothing new is taken until it goes on; try again later", 5)
        if refusal is not None:
            self.metrics.rejected(refusal.reason)
            raise EngineOverloadedError(refusal.message, refusal.retry_after_s)

    def _start_one(
        self, prompt_token_ids: Sequence[int], params: SamplingParams, sibling: Generation | None
    ) -> Generation:
        count = len(prompt_token_ids)
        rank = self._load.choose(self._steering.state.home_share) if sibling is None else sibling.rank
        state = GenerationState(params, self.tokenizer.detokenizer(params), count)
        choices = Choices() if sibling is None else sibling.choices
        generation = Generation(self.abort, self._next_id, rank, state, choices, self._clock.now())
        self._next_id += 1
        sibling_of = None if sibling is None else sibling.request_id
        # First of all: what cannot be sent raises here, and must not stay open for ever.
        self._send(rank, AddRequest(generation.request_id, list(prompt_token_ids), params, sibling_of))
        self._open[generation.request_id] = generation
        generation.num_waiting_tokens = count if sibling is None else 0
        self._load.enter(rank, count, generation.num_waiting_tokens, generation.arrived_at)
        choices.enter()
        self._all_closed.clear()
        return generation

    def _forget(self, generation: Generation, reason: FinishReason) -> None:
        """Take a sequence, which ends now, out of all tables."""
        del self._open[generation.request_id]
        generation.finish_reason = reason
        if not self._open:
            self._all_closed.set()
        now, state, choices = self._clock.now(), generation.state, generation.choices
        self._load.leave(generation.rank, state.num_prompt_tokens + state.num_generated_tokens, now)
        self._begin(generation)
        has_tokens = generation.first_token_at is not None
        self.metrics.finished(
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
            self.metrics.all_choices_finished(generation.rank, choices.count, choices.longest)

    def _begin(self, generation: Generation) -> None:
        """Its prompt waits no longer."""
        self._load.begin(generation.num_waiting_tokens)
        generation.num_waiting_tokens = 0

    # -- workers -----------------------------------------------------------------------------------------------------

    def _send(self, rank: int, message: ToWorker) -> None:
        # A broken pipe is the listener's to report: it knows whether the worker has said why.
        with contextlib.suppress(OSError):
            self._channels[rank].send(message)

    async def _listen(self, rank: int, channel: WorkerChannel) -> None:
        try:
            async for message in channel:
                self._on_message(rank, message)
            await asyncio.sleep(GONE_GRACE_S)
            reason = f"worker {rank} has gone"
        except (OSError, AmoeError) as error:
            reason = f"lost worker {rank}: {error}"
        except Exception:
            logger.exception("a message of worker %d could not be handled", rank)
            reason = f"a message of worker {rank} could not be handled"
        self.die(reason)

    def _on_message(self, rank: int, message: ToServer) -> None:
        if isinstance(message, Outputs):
            for output in message.outputs:
                self._on_output(output)
        elif isinstance(message, Heartbeat):
            self._watchdog.beat(rank, message.stats)
            self.metrics.worker(message.stats)
            self._steering.observe(message.stats)
        elif isinstance(message, Pulse):
            self._watchdog.pulse(rank, message.step_s, message.usual_s)
            self.metrics.alive(rank)
        elif isinstance(message, Failed):
            self.die(f"worker {rank} failed: {message.message}")

    def _on_output(self, output: SequenceOutput) -> None:
        generation = self._open.get(output.request_id)
        # No generation: aborted, or ended by a stop string, while the worker was still at it.
        if generation is None or (delta := generation.state.advance(output)) is None:
            return
        if output.times is not None:
            generation.queue_s, generation.prefill_s = output.times.queue_s, output.times.prefill_s
            generation.num_preemptions = output.times.num_preemptions
        if delta.token_ids:
            self._load.grow(generation.rank, len(delta.token_ids))
            self._count_tokens(generation, delta)
        if delta.finish_reason is not None:
            self._forget(generation, delta.finish_reason)
            if output.finish_reason is None:  # a stop string, which the worker does not know of
                self._send(generation.rank, AbortRequests([generation.request_id]))
        if delta.finish_reason == "error":
            blame = RequestError(output.error) if output.error else AmoeError("the worker could not serve the request")
            generation.fail(blame)
        else:
            generation.deliver(delta)

    def _count_tokens(self, generation: Generation, delta: GenerationDelta) -> None:
        now = self._clock.now()
        if generation.first_token_at is None:
            generation.first_token_at = now
            self._begin(generation)
            self.metrics.first_token(
                generation.rank, now - generation.arrived_at, delta.num_prompt_tokens, delta.num_cached_tokens
            )
            self.metrics.tokens(generation.rank, len(delta.token_ids), None)
        else:
            self.metrics.tokens(generation.rank, len(delta.token_ids), now - generation.last_token_at)
        generation.last_token_at = now

    async def _watch(self) -> None:
        try:
            await self._watch_workers()
        except Exception:  # unseen, it would leave the engine healthy for ever
            logger.exception("the watchdog has failed")
            self.die("the watchdog has failed")

    async def _watch_workers(self) -> None:
        last = self._clock.now()
        reported: Stall | None = None
        while True:
            await asyncio.sleep(WATCHDOG_PERIOD_S)
            now = self._clock.now()
            self.metrics.http.lagged(now - last - WATCHDOG_PERIOD_S)
            # Time in which this process did not run (a suspended machine, a busy loop) says nothing about the workers,
            # whose messages lie unread: count a period for two at most.
            self._watchdog.advance(min(now - last, 2 * WATCHDOG_PERIOD_S))
            last = now
            if (silent := self._watchdog.silent) is not None:
                self.die(f"worker {silent} has made no progress for {self._watchdog.heartbeat_timeout_s:g} s")
                return
            reported = self._report(self._watchdog.stalled, reported)
            self.metrics.healthy(self.healthy)
            self.metrics.flow.mark(now)

    @staticmethod
    def _report(stall: Stall | None, reported: Stall | None) -> Stall | None:
        """Log what has changed, once for each worker and kind of stall."""
        if stall is None:
            if reported is not None:
                logger.warning("all workers make progress again: healthy")
        elif reported is None or (stall.rank, stall.kind) != (reported.rank, reported.kind):
            logger.error("%s: not healthy", stall)
        return stall
