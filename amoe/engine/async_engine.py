"""The server's side of the workers: admission, routing of outputs, health. All of it in one event loop.

A request's life here: `start` admits it and sends it to an attention worker; that worker's `Outputs` become deltas in
its `Generation`; it ends with exactly one terminal event, after which nothing of it is left in the engine. If its
worker dies meanwhile, and a supervisor replaces those that die, it goes on at another one behind what has been told.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence

from amoe.clock import Clock, MonotonicClock
from amoe.config import EngineConfig
from amoe.engine.accounts import Accounts
from amoe.engine.async_generation import Generation
from amoe.engine.channels import Channels, WorkerChannel
from amoe.engine.generation import GenerationDelta, GenerationState
from amoe.engine.load import Choices, Front, OpenLoad, Refusal, first_choices, validate
from amoe.engine.messages import (
    AbortRequests,
    AddRequest,
    Alive,
    Failed,
    Heartbeat,
    Outputs,
    Pulse,
    Topology,
    ToServer,
)
from amoe.engine.model_info import ModelInfo as ModelInfo
from amoe.engine.open_sequences import OpenSequences
from amoe.engine.readmission import count_vain_lives, families, resumed_request
from amoe.engine.shared_control import REQUESTS_PER_FRONT
from amoe.engine.steering import Float64Array, Steering
from amoe.engine.tokenizer import Tokenizer
from amoe.engine.vigil import Vigil
from amoe.engine.watchdog import HEARTBEAT_TIMEOUT_S, STALL_TIMEOUT_S, Watchdog
from amoe.errors import AmoeError, EngineDeadError, EngineOverloadedError
from amoe.metrics import EngineMetrics
from amoe.stats import SteeringStats
from amoe.types import Int16Array, SamplingParams

logger = logging.getLogger(__name__)

GONE_GRACE_S = 0.2  # whoever started a worker that is gone can say how it ended, and soon does
REPLACING_TIMEOUTS = 3  # failure timeouts within which a worker that hangs is noticed, ended, and absent
LAST_WORDS_S = 1.0  # what a worker has said before it died lies in its channel, and is read within so long


class AsyncEngine:
    """Serves sequences on workers that are ready.

    Args:
        channels: one per worker that is there from the beginning, by rank; the others come with `attach`.
        config: of the workers.
        model: what they have loaded.
        owners: [num_layers, num_experts, R] where experts live; None: replicas, if there are any, are not steered.
        heartbeat_timeout_s: a worker whose loop does not turn for so long is dead.
        stall_timeout_s: a worker that gives no sign of life, or has work and runs no block, for so long makes the
            engine unhealthy until it goes on: what is open stays open, and nothing new is taken.
        front: which of several engines on the same workers this is. If there are several, somebody else steers them,
            and says so with `steer_by`.
        supervised: somebody replaces workers that die or hang, and says so with `lose` and `attach`. Without: the
            engine dies with any of them.

    Attributes:
        on_message: called with the rank and every message of a worker, once the engine has taken it.
        on_gone: called with rank and reason when a channel has ended by itself; only if `supervised`.
        trouble: why the engine is unhealthy, as its supervisor sees it: a worker that dies again and again, by name.
        note: what is being done about a worker that has died; the engine is healthy.
        is_awaited: nothing can be served without that worker: whoever waits for it does not count as stalled.
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
        supervised: bool = False,
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.model = model
        self.metrics = EngineMetrics(model.name, model.max_model_len, config.cache)
        self.on_message: Callable[[int, ToServer], None] | None = None
        self.on_gone: Callable[[int, str], None] | None = None
        self.trouble = self.note = ""
        self.is_awaited = False
        self._supervised = supervised
        self._channels = Channels(channels, self._on_message, self._on_gone)
        self._clock = clock or MonotonicClock()
        self._load = OpenLoad(config, front.count)
        self._accounts = Accounts(self._load, self.metrics, self._clock)
        self._all_closed = asyncio.Event()
        self._all_closed.set()
        self._open = OpenSequences(self._channels, self._accounts, self._all_closed.set)
        self._parked: list[Generation] = []  # whose worker is gone, and that may have ended: they wait for another one
        self._next_id = front.index * REQUESTS_PER_FRONT
        self._tasks: list[asyncio.Task[None]] = []
        self._death: EngineDeadError | None = None
        self._draining = False
        self.died = asyncio.Event()  # some worker has, or nothing can go on
        if supervised:  # whoever replaces a worker that is silent is given the time for it
            stall_timeout_s = max(stall_timeout_s, REPLACING_TIMEOUTS * config.failure.timeout_s)
        self._watchdog = Watchdog(range(len(channels)), heartbeat_timeout_s, stall_timeout_s)
        self.metrics.prepare(config.placement.attention_ranks)
        self._is_steering = front.count == 1
        self._steering = Steering(config, owners, self._clock, send=self._channels.send, tell=self.metrics.steered)

    # -- life --------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Start to listen to the workers. Call it once, in the event loop that serves the requests."""
        self._channels.run()
        self._tasks = [asyncio.create_task(self._watch(), name="amoe-watchdog")]
        if self._is_steering:
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
        await asyncio.gather(*self._tasks, self._channels.close(), return_exceptions=True)
        self._end("the server has stopped")

    @property
    def healthy(self) -> bool:
        """Every worker that is there makes progress, and those that are not will soon be back."""
        return not self.complaint

    @property
    def complaint(self) -> str:
        """Why the engine is not healthy; "" if it is."""
        if self._death is not None:
            return str(self._death)
        stall = self._watchdog.stalled
        return self.trouble or ("" if stall is None else str(stall))

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
        for generation in self._open:
            self._open.fail(generation, EngineDeadError(reason))

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
        num_prompt_tokens = validate(requests, firsts, self.model, self.config.scheduler.scheduling_policy, param)
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
        if generation not in self._open:
            return
        self._channels.send(generation.rank, AbortRequests([generation.request_id]))
        self._open.close(generation, "abort")
        generation.fail(None)

    def _check_room(self, count: int, num_prompt_tokens: int) -> None:
        refusal = self._load.refusal(count, num_prompt_tokens, self._clock.now())
        if self._death is not None:
            self.metrics.rejected("dead")
            raise EngineDeadError(str(self._death))
        if self._draining:
            refusal = Refusal("shutdown", "the server is shutting down and takes no new requests", 5)
        elif reason := self._standstill():  # what came in now would only wait for it
            refusal = Refusal("stalled", f"{reason}: nothing new is taken until it goes on; try again later", 5)
        if refusal is not None:
            self.metrics.rejected(refusal.reason)
            raise EngineOverloadedError(refusal.message, refusal.retry_after_s)

    def _standstill(self) -> str:
        """Why nothing goes on; "" if it does, or soon will."""
        if not self._supervised:
            return self.complaint
        # A worker in trouble may be one that the others do without: as long as tokens come, there is no harm in more.
        if not self._open or self._clock.now() - self._accounts.last_token_at < self._watchdog.stall_timeout_s:
            return ""
        return self.complaint

    def _start_one(
        self, prompt_token_ids: Sequence[int], params: SamplingParams, sibling: Generation | None
    ) -> Generation:
        rank = self._choose_home() if sibling is None else sibling.rank
        state = GenerationState(params, self.tokenizer.detokenizer(params), prompt_token_ids)
        choices = Choices() if sibling is None else sibling.choices
        generation = Generation(self.abort, self._next_id, rank, state, choices, self._clock.now())
        self._next_id += 1
        sibling_of = None if sibling is None else sibling.request_id
        # First of all: what cannot be sent raises here, and must not stay open for ever.
        self._channels.send(rank, AddRequest(generation.request_id, list(prompt_token_ids), params, sibling_of))
        self._open.add(generation, is_first=sibling is None)
        self._all_closed.clear()
        if not self._channels.is_attached(rank):
            self._parked.append(generation)
        return generation

    def _choose_home(self) -> int:
        """Rank of the attention worker for the next sequence. If nobody is there, one that is awaited: what is sent to
        it is sent again when it, or any other, comes."""
        shares = self._steering.state.home_share
        return self._load.choose({r: share for r, share in shares.items() if self._channels.answers(r)} or shares)

    # -- workers -----------------------------------------------------------------------------------------------------

    def on_topology(self, topology: Topology) -> None:
        """Another topology is in force: experts live elsewhere, or workers have come or gone."""
        self._steering.set_topology(topology)

    def steer_by(self, state: SteeringStats) -> None:
        """Somebody else steers the workers: new sequences go by these shares."""
        self._steering.state = state
        self.metrics.steered(state)

    def measured_load(self) -> Float64Array | None:
        """[num_layers, num_experts] pairs that have been computed lately; None: nobody knows yet."""
        return self._steering.measured_load()

    def measured_speeds(self) -> Float64Array:
        """[num_owners] of the expert workers, relative to their median; 1 where nothing is known."""
        return self._steering.measured_speeds()

    def attach(self, rank: int, channel: WorkerChannel) -> None:
        """A worker has come, in the place of one that was lost, or as a new one. What waits goes there in the next turn
        of the event loop: in this one the caller can tell the workers of each other.

        Raises:
            ValueError: the former one of this rank has not been lost.
        """
        self._channels.attach(rank, channel)
        self._watchdog.expect(rank)
        asyncio.get_running_loop().call_soon(self._readmit)

    async def lose(self, rank: int, reason: str) -> None:
        """A worker is gone for good, and can say nothing more: what it has said still counts, up to a second from now.
        Its open sequences go on at other workers, or wait for one to come. Nothing happens if it is lost already."""
        if not await self._channels.detach(rank, LAST_WORDS_S):
            return
        self._watchdog.forget(rank)
        self._park([generation for generation in self._open if generation.rank == rank])
        num_moved = self._readmit()
        if num_moved or self._parked:
            logger.warning(
                "%s: open at other workers from now on: %d, waiting: %d", reason, num_moved, len(self._parked)
            )

    def _park(self, lost: list[Generation]) -> None:
        """The worker of these is gone. Those end that would kill one worker after the other: whoever gets tokens in
        between is only their neighbour."""
        count_vain_lives(lost, self.config.scheduler.max_num_seqs)
        limit = self.config.failure.max_crashes
        for generation in [item for item in lost if item.num_vain_lives >= limit]:
            error = f"{limit} workers in a row have died before they gave this request a token"
            self._open.fail(generation, AmoeError(error))
        known = {id(generation) for generation in self._parked}
        self._parked += [generation for generation in lost if id(generation) not in known]

    def _readmit(self) -> int:
        """Let those whose worker is gone go on where somebody is. Returns how many do."""
        self._parked = [generation for generation in self._parked if generation in self._open]
        if not any(map(self._channels.answers, self.config.placement.attention_ranks)):
            return 0
        lost, self._parked = self._parked, []
        for family in families(lost):
            rank = self._choose_home()
            for generation in family:
                self._accounts.move(generation, rank)
                self._channels.send(rank, resumed_request(generation, family[0], self.model.routed_bytes))
        return len(lost)

    def _on_gone(self, rank: int, reason: str) -> None:
        if not self._supervised:
            asyncio.get_running_loop().call_later(GONE_GRACE_S, self.die, reason)
        elif self.on_gone is not None:
            self.on_gone(rank, reason)

    def _on_message(self, rank: int, message: ToServer) -> None:
        if isinstance(message, Outputs):
            for output in message.each():
                self._open.on_output(rank, output)
        elif isinstance(message, Heartbeat):
            self._watchdog.beat(rank, message.stats)
            self.metrics.worker(message.stats)
            if self._is_steering:
                self._steering.observe(message.stats)
        elif isinstance(message, Alive):
            self._watchdog.turned(rank)
            self.metrics.alive(rank)
        elif isinstance(message, Pulse):
            self._watchdog.pulse(rank, message.step_s, message.usual_s)
            self.metrics.alive(rank)
        elif isinstance(message, Failed) and not self._supervised:
            self.die(f"worker {rank} failed: {message.message}")
        if self.on_message is not None:
            self.on_message(rank, message)

    async def _watch(self) -> None:
        vigil = Vigil(
            self._watchdog,
            self._clock,
            somebody_is_missing=lambda: self.is_awaited or bool(self.trouble),
            each_turn=self._each_turn,
        )
        try:
            await vigil.run()
        except Exception:  # unseen, it would leave the engine healthy for ever
            logger.exception("the watchdog has failed")
            self.die("the watchdog has failed")

    def _each_turn(self, now: float, lag_s: float) -> None:
        self.metrics.http.lagged(lag_s)
        if (silent := self._watchdog.silent) is not None and not self._supervised:
            self.die(f"worker {silent} has made no progress for {self._watchdog.heartbeat_timeout_s:g} s")
        self.metrics.healthy(self.healthy)
        self.metrics.flow.mark(now)
