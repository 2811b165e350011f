"""The sampler: from logits to tokens, vectorised over sequences, the same tokens whatever else is in the batch.

Order of operations, as in vLLM: allowed ids, bad words and the grammar (`token_masks.py`), the `min_tokens` mask,
`logit_bias`, penalties, temperature, min-p, top-k, top-p; each truncation works on what the one before it left.
Log-probabilities and ranks are those of the raw logits, before all of it.

Batch independence rests on two things:

- The random number of a token is a hash of (seed, index of the output token): no generator state, so preemption,
  restart and batch order change nothing.
- Probabilities become integers (multiples of 2^-45, held in floats). Sums of integers below 2^53 are exact, so neither
  the order of a summation nor the shape of the batch can move a cumulative sum, a nucleus or a sampled token.

Truncation keeps every token whose weight reaches a threshold: tokens that tie with the last one kept are kept too.
Then the token is found by inverse CDF in the order of token ids, which needs no sorted ids. `sampler_reference.py`
says the same slowly.

Shape letters: n rows of this step, V vocabulary, S stop ids, m top log-probabilities.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from amoe.engine.sampling_table import (
    BIAS,
    LOGPROBS,
    MASKED,
    MIN_P,
    MIN_TOKENS,
    PENALTIES,
    RANDOM,
    TRUNCATION,
    SamplingTable,
)
from amoe.engine.token_masks import MaskArray, apply_masks
from amoe.kernels.argmax import argmax_rows
from amoe.types import BoolArray, Float32Array, Int32Array, Int64Array

UInt64Array = npt.NDArray[np.uint64]
Float64Array = npt.NDArray[np.float64]

WEIGHT_SCALE = 2.0**45  # a total stays under 2^46, so float64 sums of weights are exact with bits to spare
_CPU_CHUNK = 1 << 19  # elements at a time: the float64 sums (4 MiB) stay in cache and in the allocator's pool
_DEVICE_CHUNK = 1 << 26  # elements at a time: bounds the scratch memory to a few 100 MiB
_SCORE_CHUNK = 1 << 25  # logits at a time (128 MiB) of prompts: few enough for memory, enough rows for the matmul


@dataclass(slots=True)
class SampledTokens:
    """One token per row, and log-probabilities if any row asked for them.

    Attributes:
        token_ids: [n] int64.
        logprobs: [n] float32 of those tokens; NaN in rows that did not ask; None if none did.
        top_ids: [n, m] int64, best first, -1 in rows that did not ask; a row uses its first `num_logprobs`.
        top_logprobs: [n, m] float32 of those.
        ranks: [n] int64 of the tokens: 1 + how many are more probable; 0 in rows that did not ask; None if none did.
        stuck: [n] no token was possible, and `token_ids` says nothing; None: wherever rules were asked, there was one.
    """

    token_ids: Int64Array
    logprobs: Float32Array | None = None
    top_ids: Int64Array | None = None
    top_logprobs: Float32Array | None = None
    ranks: Int64Array | None = None
    stuck: BoolArray | None = None


def sample(
    logits: torch.Tensor,
    table: SamplingTable,
    rows: Int64Array,
    step: Int64Array,
    tokens: Int32Array,
    prompt_lens: Int64Array,
    lens: Int64Array,
    grammar_masks: Mapping[int, MaskArray] | None = None,
    argmax: Callable[[torch.Tensor], Int64Array] = argmax_rows,
) -> SampledTokens:
    """Sample the next token of each row.

    A row whose logits are all -inf or hold NaN gets some valid id.

    Args:
        logits: [n, V] float32 on any device; may be modified in place.
        table: parameters, indexed by `rows`.
        rows: [n] rows of the table and of the histories; each at most once.
        step: [n] index of the output token to be sampled, that is, tokens generated so far.
        tokens: [num_rows, max_len] histories, prompt then output.
        prompt_lens: [num_rows] of those.
        lens: [num_rows] prompt and output together.
        grammar_masks: [W] what the grammar of a row admits, of the rows that have one.
        argmax: of rows of logits, where somebody has a faster one.
    """
    needs = table.needs[rows]
    union = int(np.bitwise_or.reduce(needs)) if len(rows) else 0
    if union == 0:
        return SampledTokens(argmax(logits))

    logits = logits.contiguous()
    asking = np.flatnonzero(needs & LOGPROBS) if union & LOGPROBS else np.empty(0, np.int64)
    raw_logprobs = torch.log_softmax(_take(logits, asking), dim=-1) if len(asking) else None  # before any change
    stuck = None
    if union & MASKED:
        stuck = _restrict(logits, table, rows, np.flatnonzero(needs & MASKED), tokens, prompt_lens, lens, grammar_masks)
    if union & MIN_TOKENS:
        late = np.flatnonzero((needs & MIN_TOKENS).astype(np.bool_) & (step < table.min_tokens[rows]))
        _mask_stop_ids(logits, table, rows, late)
    if union & BIAS:
        _add_bias(logits, table, rows, np.flatnonzero(needs & BIAS))
    if union & PENALTIES:
        _penalise(logits, table, rows, np.flatnonzero(needs & PENALTIES), tokens, prompt_lens, lens)

    if union & RANDOM:
        random = np.flatnonzero(needs & RANDOM)
        token_ids = np.empty(len(rows), np.int64)
        if len(random) < len(rows):
            greedy = np.flatnonzero(~needs & RANDOM)
            token_ids[greedy] = argmax(_take(logits, greedy))
        token_ids[random] = _sample_random(_take(logits, random), table, rows[random], step[random])
    else:
        token_ids = argmax(logits)

    sampled = SampledTokens(token_ids, stuck=stuck)
    if raw_logprobs is not None:
        _attach_logprobs(sampled, raw_logprobs, asking, int(table.num_logprobs[rows].max()))
    return sampled


def score(
    logits: Callable[[slice], torch.Tensor], token_ids: Int64Array, num_top: int, vocab_size: int
) -> SampledTokens:
    """Log-probabilities of tokens that are known, and the best ones beside each: nothing is sampled.

    Args:
        logits: of a slice of the n rows, [c, V] float32. It is asked for a few at a time: n rows may not fit.
        token_ids: [n] the tokens that are there.
        num_top: m.
    """
    chunk = max(1, _SCORE_CHUNK // vocab_size)
    num_top = min(num_top, vocab_size)
    scored = SampledTokens(
        token_ids,
        np.empty(len(token_ids), np.float32),
        np.empty((len(token_ids), num_top), np.int64),
        np.empty((len(token_ids), num_top), np.float32),
        np.empty(len(token_ids), np.int64),
    )
    for start in range(0, len(token_ids), chunk):
        where = slice(start, min(start + chunk, len(token_ids)))
        part = SampledTokens(token_ids[where])
        logprobs = torch.log_softmax(logits(where), dim=-1)
        _attach_logprobs(part, logprobs, np.arange(len(logprobs)), num_top)
        for name in ("logprobs", "top_ids", "top_logprobs", "ranks"):
            getattr(scored, name)[where] = getattr(part, name)
    return scored


def uniforms(seed: UInt64Array, step: Int64Array) -> Float64Array:
    """[n] numbers in [0, 1), one per (seed, step): splitmix64's finaliser over both.

    48 bits each, so that the product with a total, rounded to float64, stays below the total.
    """
    # The seed is hashed alone first: otherwise (seed, step + 1) and (seed + increment, step) would be the same.
    state = _mix(seed ^ np.uint64(0x6A09E667F3BCC909)) + (step.astype(np.uint64) + np.uint64(1)) * np.uint64(
        0x9E3779B97F4A7C15
    )
    return (_mix(state) >> np.uint64(16)).astype(np.float64) * 2.0**-48


def _mix(state: UInt64Array) -> UInt64Array:
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def _take(logits: torch.Tensor, index: Int64Array) -> torch.Tensor:
    """Rows of `logits`; `logits` itself, not a copy, where `index` is all of them."""
    if len(index) == len(logits):
        return logits
    return logits[torch.from_numpy(index).to(logits.device)]


def _restrict(
    logits: torch.Tensor,
    table: SamplingTable,
    rows: Int64Array,
    index: Int64Array,
    tokens: Int32Array,
    prompt_lens: Int64Array,
    lens: Int64Array,
    grammar_masks: Mapping[int, MaskArray] | None,
) -> BoolArray | None:
    """Make what the rules of `rows[index]` forbid impossible, in place.

    Returns:
        [n] rows where nothing is left; None if there are none.
    """
    masks = table.masks(rows[index], tokens, prompt_lens, lens, grammar_masks or {})
    apply_masks(logits, index, masks)
    is_empty = ~masks.any(axis=1)
    if not is_empty.any():
        return None
    stuck = np.zeros(len(rows), np.bool_)
    stuck[index] = is_empty
    return stuck


def _add_bias(logits: torch.Tensor, table: SamplingTable, rows: Int64Array, index: Int64Array) -> None:
    """Add the biases of `rows[index]`, in place."""
    found = [table.bias[row] for row in rows[index].tolist()]
    keys = np.concatenate([i * logits.shape[1] + ids for i, (ids, _) in zip(index.tolist(), found, strict=True)])
    values = np.concatenate([values for _, values in found])
    where = torch.from_numpy(keys).to(logits.device)
    logits.view(-1).index_add_(0, where, torch.from_numpy(values).to(logits.device))


def _penalise(
    logits: torch.Tensor,
    table: SamplingTable,
    rows: Int64Array,
    index: Int64Array,
    tokens: Int32Array,
    prompt_lens: Int64Array,
    lens: Int64Array,
) -> None:
    """Apply the penalties of `rows[index]` to `logits` in place: work is that of the histories, not of V."""
    row = rows[index]
    lengths = lens[row]
    history = tokens[row, : int(lengths.max(initial=0))]
    owner, position = np.nonzero(np.arange(history.shape[1]) < lengths[:, None])
    keys = index[owner] * logits.shape[1] + history[owner, position]
    keys, inverse = np.unique(keys, return_inverse=True)
    counts = np.bincount(inverse, weights=position >= prompt_lens[row][owner], minlength=len(keys))

    key_row = rows[keys // logits.shape[1]]
    repetition = torch.from_numpy(table.repetition[key_row]).to(logits.device)
    subtract = table.frequency[key_row] * counts + table.presence[key_row] * (counts > 0)
    flat = logits.view(-1)
    where = torch.from_numpy(keys).to(logits.device)
    values = flat[where]
    values = torch.where(values > 0, values / repetition, values * repetition)
    flat[where] = values - torch.from_numpy(subtract.astype(np.float32)).to(logits.device)


def _mask_stop_ids(logits: torch.Tensor, table: SamplingTable, rows: Int64Array, index: Int64Array) -> None:
    """Make the stop ids of `rows[index]` impossible, in place."""
    stop_ids = table.stop_ids[rows[index]]
    owner, column = np.nonzero((stop_ids >= 0) & (stop_ids < logits.shape[1]))
    keys = index[owner] * logits.shape[1] + stop_ids[owner, column]
    logits.view(-1)[torch.from_numpy(keys).to(logits.device)] = -torch.inf


def _sample_random(logits: torch.Tensor, table: SamplingTable, rows: Int64Array, step: Int64Array) -> Int64Array:
    """[n] ids sampled by temperature and truncation; `logits` [n, V] may be overwritten."""
    needs = table.needs[rows]
    columns = (uniforms(table.seed[rows], step), table.temperature[rows], table.min_p[rows], table.top_k[rows])
    knobs = torch.from_numpy(np.stack((*columns, table.top_p[rows]), dtype=np.float64))
    knobs = knobs.to(logits.device).unsqueeze(-1)  # [5, n, 1]: one copy to the device
    chunk = max(1, (_CPU_CHUNK if logits.device.type == "cpu" else _DEVICE_CHUNK) // logits.shape[1])
    parts = [
        _sample_chunk(logits[i : i + chunk], knobs[:, i : i + chunk], needs[i : i + chunk])
        for i in range(0, len(rows), chunk)
    ]
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).cpu().numpy()


def _sample_chunk(logits: torch.Tensor, knobs: torch.Tensor, needs: npt.NDArray[np.uint8]) -> torch.Tensor:
    """[c] ids. knobs: [5, c, 1] float64 uniform, temperature, min-p, top-k, top-p."""
    uniform, temperature, min_p, top_k, top_p = knobs
    weights = torch.softmax(logits.div_(temperature.float()), dim=-1).mul_(WEIGHT_SCALE).round_()
    if (needs & MIN_P).any():
        _keep_from(weights, weights.amax(dim=-1, keepdim=True) * min_p.float())
    if (needs & TRUNCATION).any():
        index = np.flatnonzero(needs & TRUNCATION)
        if len(index) == len(needs):
            _keep_from(weights, _thresholds(weights, top_k, top_p))
        else:
            where = torch.from_numpy(index).to(logits.device)
            subset = weights[where]
            weights[where] = _keep_from(subset, _thresholds(subset, top_k[where], top_p[where]))
    cumulative = weights.cumsum(dim=-1, dtype=torch.float64)
    # The first token whose sum exceeds the target: its weight is positive. Rows of NaN find none.
    return (
        torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
        .squeeze(-1)
        .clamp_(max=logits.shape[1] - 1)
    )


def _keep_from(weights: torch.Tensor, thresholds: torch.Tensor) -> torch.Tensor:
    """Zero what lies below its row's threshold, in place. weights: [c, V], thresholds: [c, 1]."""
    # A mask of floats, because torch multiplies floats by booleans 6 times slower.
    return weights.mul_(torch.ge(weights, thresholds, out=torch.empty_like(weights)))


def _thresholds(weights: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """[c, 1] least weight that top-k and then top-p keep. weights: [c, V]; top_k, top_p: [c, 1] float64."""
    if weights.device.type == "cpu":
        ascending = torch.from_numpy(np.sort(weights.numpy(), axis=1))  # 40 times faster than torch's
    else:
        ascending = weights.sort(dim=-1).values
    size = weights.shape[1]
    cumulative = ascending.cumsum(dim=-1, dtype=torch.float64)
    kth = ascending.gather(1, size - top_k.long())
    first = torch.searchsorted(ascending, kth)  # tokens that tie with the k-th stay
    dropped = cumulative.gather(1, (first - 1).clamp_(min=0)).where(first > 0, 0.0)
    # Keep from the top until the mass reaches p: a token stays if it and all below it weigh more than 1 - p.
    dropped += (cumulative[:, -1:] - dropped) * (1.0 - top_p)
    last = torch.searchsorted(cumulative, dropped, right=True).clamp_(max=size - 1)
    return ascending.gather(1, last)


def _attach_logprobs(sampled: SampledTokens, logprobs: torch.Tensor, index: Int64Array, num_top: int) -> None:
    """Fill in the log-probabilities of the rows `index`. logprobs: [len(index), V]."""
    num_rows = len(sampled.token_ids)
    chosen = torch.from_numpy(sampled.token_ids[index]).to(logprobs.device)
    sampled.logprobs = np.full(num_rows, np.nan, np.float32)
    of_chosen = logprobs.gather(1, chosen[:, None])
    sampled.logprobs[index] = of_chosen.squeeze(1).cpu().numpy()
    sampled.ranks = np.zeros(num_rows, np.int64)
    sampled.ranks[index] = (logprobs > of_chosen).sum(dim=-1).cpu().numpy() + 1
    sampled.top_ids = np.full((num_rows, num_top), -1, np.int64)
    sampled.top_logprobs = np.full((num_rows, num_top), -np.inf, np.float32)
    if num_top:
        top = logprobs.topk(num_top, dim=-1)
        sampled.top_ids[index] = top.indices.cpu().numpy()
        sampled.top_logprobs[index] = top.values.cpu().numpy()
