"""Executors of an emulated device: they wait for the modelled time, and make up what kernels would have computed.

Everything around them is the real engine: queues, schedules, transport, sampling's bookkeeping. Rows of the model's
hidden size travel between workers as they do between real ones, but they all are the same zeros, which nobody reads:
no residual, partial sum, KV cache or slab is kept, so that sixteen workers fit into a laptop.

What a step costs is waited for from the step's start, not on top of what the host does meanwhile: a real device
computes while the host prepares.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt
import torch

from amoe.core.batcher import Batcher
from amoe.core.experts import count_pairs
from amoe.core.steps import AttentionStep, ExpertsStep, HeadStep, PromptTokens
from amoe.engine.executor import Routed
from amoe.engine.sampler import SampledTokens
from amoe.engine.sampling_table import MASKED, SamplingTable
from amoe.engine.token_masks import MaskArray, ids_of
from amoe.profiles.context import ContextCounter
from amoe.profiles.costs import BlockCosts
from amoe.profiles.models import ModelSizes
from amoe.profiles.routing import RoutingModel, scores_of
from amoe.types import Batch, BoolArray, Float32Array, Int16Array, Int32Array, Int64Array

_PR_SET_TIMERSLACK = 29
_POOL_TOKENS = 4096
_SCORED_POOL_TOKENS = 1024  # scores of all experts take E / K times the memory


class Waiter:
    """Waits until a step has taken its modelled time.

    Attributes:
        modelled_s: seconds that steps were to take, cumulative.
        late_s: seconds by which the host alone took longer, cumulative.
    """

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self._clock = clock
        self._sleep = sleep
        self._started = 0.0
        self.modelled_s = 0.0
        self.late_s = 0.0

    def start(self) -> None:
        """The device begins."""
        self._started = self._clock()

    def finish(self, seconds: float) -> None:
        """Return no earlier than `seconds` after `start`. Sleeps: cores are for the other workers."""
        self.modelled_s += seconds
        deadline = self._started + seconds
        remaining = deadline - self._clock()
        self.late_s += max(0.0, -remaining)
        while remaining > 0:
            self._sleep(remaining)
            remaining = deadline - self._clock()


def sleep_precisely() -> None:
    """Let this thread's sleeps end within microseconds of their time: the kernel's default slack is 50 µs."""
    ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0)


class RouterPool:
    """Experts of tokens, drawn from a pool of each layer that is filled once: drawing anew costs more than a step.

    Args:
        with_scores: make up the router's scores of all experts too, for capacity.
    """

    def __init__(
        self,
        routing: RoutingModel,
        rng: np.random.Generator,
        pool_tokens: int | None = None,
        *,
        with_scores: bool = False,
    ) -> None:
        self._routing = routing
        self._rng = rng
        self._pool_tokens = pool_tokens or (_SCORED_POOL_TOKENS if with_scores else _POOL_TOKENS)
        self._with_scores = with_scores
        self._pools: dict[int, Int16Array] = {}
        self._scores: dict[int, Float32Array] = {}

    def draw(self, layer: int, num_tokens: int) -> tuple[npt.NDArray[np.int64], Float32Array | None]:
        """Experts [n, K] of `num_tokens` tokens, and scores [n, E]."""
        if layer not in self._pools:
            self._fill(layer)
        pool = self._pools[layer]
        chosen = self._rng.integers(len(pool), size=num_tokens)
        return pool[chosen].astype(np.int64), self._scores[layer][chosen] if self._with_scores else None

    def _fill(self, layer: int) -> None:
        topk_ids = self._routing.draw(self._rng, layer, self._pool_tokens)
        self._pools[layer] = topk_ids.astype(np.int16)
        if self._with_scores:
            self._scores[layer] = scores_of(self._rng, topk_ids, self._routing.popularity()[layer])


class EmulatedAttention:
    """`AttentionBlocks` of one home.

    Args:
        vocabulary: [V'] token ids that may come out.
        rng: this worker's own.
    """

    def __init__(
        self,
        sizes: ModelSizes,
        costs: BlockCosts,
        context: ContextCounter,
        router: RouterPool,
        batcher: Batcher,
        vocabulary: Int64Array,
        rng: np.random.Generator,
        waiter: Waiter,
    ) -> None:
        self._sparse = sizes.sparse_layers
        self._costs = costs
        self._context = context
        self._router = router
        self._batcher = batcher
        self._vocabulary = vocabulary
        self._rng = rng
        self.waiter = waiter
        self._rows = _empty_rows(batcher.slots.num_slots, sizes.hidden_size)
        self._weights = np.full((batcher.slots.num_slots, sizes.top_k), 1.0 / sizes.top_k, np.float32)

    @property
    def moe_inputs(self) -> torch.Tensor:
        """See `AttentionBlocks`. The rows say nothing."""
        return self._rows

    def attention(self, step: AttentionStep) -> Routed | None:
        """See `AttentionBlocks`."""
        self.waiter.start()
        layer, count = step.block.layer, step.num_tokens
        drawn = self._router.draw(layer, count) if self._sparse[layer] else None
        self.waiter.finish(self._costs.attention(layer, count, round(self._context.count(step))))
        if drawn is None:
            return None
        topk_ids, scores = drawn
        return Routed(topk_ids, self._weights[:count], self._rows[:count], scores)

    def sample(
        self,
        step: HeadStep,
        sampling: SamplingTable,
        num_generated: Int64Array,
        grammar_masks: Callable[[], Mapping[int, MaskArray]] = dict,
    ) -> SampledTokens:
        """See `AttentionBlocks`. Any ids will do that the rules of a sequence permit, but none that ends it, unless it
        has to; log-probabilities are zeros."""
        self.waiter.start()
        count = len(step.slots)
        token_ids = self._vocabulary[self._rng.integers(len(self._vocabulary), size=count)]
        sampled = SampledTokens(token_ids)
        restricted = np.flatnonzero(sampling.needs[step.rows] & MASKED)
        if len(restricted):
            self._restrict(sampled, step.rows.astype(np.int64), restricted, sampling, grammar_masks())
        num_logprobs = int(sampling.num_logprobs[step.rows].max(initial=-1))
        if num_logprobs >= 0:
            _attach_zeros(sampled, num_logprobs)
        self.waiter.finish(self._costs.head(count))
        return sampled

    def _restrict(
        self,
        sampled: SampledTokens,
        rows: Int64Array,
        index: npt.NDArray[np.intp],
        sampling: SamplingTable,
        grammar_masks: Mapping[int, MaskArray],
    ) -> None:
        """Draw the tokens of `rows[index]` from those that their rules permit."""
        table = self._batcher.table
        masks = sampling.masks(rows[index], table.tokens, table.prompt_len, table.num_tokens, grammar_masks)
        sampled.stuck = np.zeros(len(rows), np.bool_)
        for i, mask in zip(index.tolist(), masks, strict=True):
            permitted = ids_of(mask)
            going_on = np.intersect1d(permitted, self._vocabulary, assume_unique=True)
            permitted = going_on if len(going_on) else permitted
            sampled.stuck[i] = len(permitted) == 0
            if len(permitted):
                sampled.token_ids[i] = self._rng.choice(permitted)

    def score(self, prompt: PromptTokens, token_ids: Int64Array, num_top: int) -> SampledTokens:
        """See `AttentionBlocks`. Log-probabilities are zeros."""
        self.waiter.start()
        scored = SampledTokens(token_ids)
        _attach_zeros(scored, num_top)
        self.waiter.finish(self._costs.head(len(token_ids)))
        return scored

    def keep(self, batch: Batch, owner: int, kept: BoolArray) -> None:
        """Nothing: the rows say nothing."""


def _attach_zeros(sampled: SampledTokens, num_top: int) -> None:
    count = len(sampled.token_ids)
    sampled.logprobs = np.zeros(count, np.float32)
    sampled.top_ids = np.broadcast_to(sampled.token_ids[:, None], (count, num_top))
    sampled.top_logprobs = np.zeros((count, num_top), np.float32)
    sampled.ranks = np.ones(count, np.int64)


class EmulatedExperts:
    """`ExpertBlocks` of one worker, and an `ExpertStore` that keeps books of weights that it does not have.

    Args:
        held: {layer: ascending ids} of the experts at this worker.
        other_bytes: of the weights at this worker that are no experts'.
    """

    def __init__(
        self,
        sizes: ModelSizes,
        costs: BlockCosts,
        num_slots: int,
        waiter: Waiter,
        held: Mapping[int, tuple[int, ...]],
        other_bytes: float = 0.0,
    ) -> None:
        self._num_experts = sizes.num_experts
        self._costs = costs
        self.waiter = waiter
        self._rows = _empty_rows(num_slots, sizes.hidden_size)
        self._held = dict(held)
        self._other_bytes = other_bytes
        self._expert_bytes = sizes.expert_bytes

    @property
    def parameter_bytes(self) -> int:
        """See `ExpertStore`."""
        return int(self._other_bytes + sum(len(ids) for ids in self._held.values()) * self._expert_bytes)

    def held(self) -> Mapping[int, tuple[int, ...]]:
        """See `ExpertStore`."""
        return self._held

    def prepare(self, layer: int, ids: tuple[int, ...]) -> tuple[int, ...]:
        """See `ExpertStore`. Takes no time: no profile says how fast a device's weights come."""
        return ids

    def install(self, layer: int, prepared: tuple[int, ...]) -> None:
        """See `ExpertStore`."""
        self._held[layer] = prepared

    def discard(self, layer: int) -> None:
        """See `ExpertStore`. There is nothing."""

    def experts(self, step: ExpertsStep) -> torch.Tensor:
        """See `ExpertBlocks`."""
        self.waiter.start()
        counts = count_pairs(step.expert_ids, self._num_experts)
        self.waiter.finish(float(self._costs.experts(step.block.layer, counts)))
        return self._rows[: step.num_tokens]

    def keep(self, batch: Batch, slab_rows: Int32Array, kept: BoolArray) -> None:
        """Nothing: the rows say nothing."""


def _empty_rows(num_rows: int, hidden_size: int) -> torch.Tensor:
    """[num_rows, H] bfloat16 zeros. Never written, so that the kernel backs them all with one page of zeros: numpy asks
    it for zeroed memory, where torch would write them."""
    return torch.from_numpy(np.zeros((num_rows, hidden_size), np.int16)).view(torch.bfloat16)


def valid_vocabulary(vocab_size: int, eos_token_ids: tuple[int, ...]) -> Int64Array:
    """[V'] ids below `vocab_size` that do not end a sequence."""
    ids = np.setdiff1d(np.arange(vocab_size), np.asarray(eos_token_ids, np.int64))
    return ids if len(ids) else np.zeros(1, np.int64)
