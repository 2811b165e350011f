"""Sampling parameters of the running sequences, by row, and what a sampled token means for its sequence.

Shape letters: n rows of a step, S stop ids, W words of a token mask.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from amoe.engine.token_masks import MaskArray, TokenRules
from amoe.types import Float32Array, Int32Array, Int64Array, SamplingParams

Int8Array = npt.NDArray[np.int8]

# What a new token means for its sequence. COMPLETE: the grammar's text is whole, and the token is a part of it;
# STUCK: no token was possible.
GO_ON, FINISH_STOP, FINISH_LENGTH, FINISH_COMPLETE, FINISH_STUCK = 0, 1, 2, 3, 4

MIN_TEMPERATURE = 1e-5  # below it, sampling is greedy: dividing by less says nothing more and may overflow

# What a row asks for beyond an argmax: bits of `SamplingTable.needs`. Plain integers: `IntFlag` costs 1 µs per test.
RANDOM = 1
MIN_P = 2
TRUNCATION = 4  # top-k or top-p
PENALTIES = 8
MIN_TOKENS = 16
LOGPROBS = 32
BIAS = 64
MASKED = 128  # allowed ids, bad words or a grammar


class SamplingTable:
    """Sampling parameters of the running sequences: a struct of arrays, one row per sequence. Rows are reused.

    Attributes:
        temperature, top_p, min_p: [num_rows] float32.
        top_k: [num_rows] int64, `vocab_size` where it is off.
        seed: [num_rows] uint64.
        presence, frequency, repetition: [num_rows] float32 penalties.
        num_logprobs: [num_rows] int32, -1 where off.
        min_tokens, max_tokens: [num_rows] int64.
        stop_ids: [num_rows, S] int32, padded with -1; end-of-sequence ids included unless ignored. S grows on demand.
        needs: [num_rows] uint8, the bits above.
        bias: (ids, values) [b] int64 and float32 of the rows that have a `logit_bias`.
        rules: of the rows that restrict their tokens.
    """

    def __init__(self, num_rows: int, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.temperature = np.zeros(num_rows, np.float32)
        self.top_p = np.ones(num_rows, np.float32)
        self.min_p = np.zeros(num_rows, np.float32)
        self.top_k = np.full(num_rows, vocab_size, np.int64)
        self.seed = np.zeros(num_rows, np.uint64)
        self.presence = np.zeros(num_rows, np.float32)
        self.frequency = np.zeros(num_rows, np.float32)
        self.repetition = np.ones(num_rows, np.float32)
        self.num_logprobs = np.full(num_rows, -1, np.int32)
        self.min_tokens = np.zeros(num_rows, np.int64)
        self.max_tokens = np.ones(num_rows, np.int64)
        self.stop_ids = np.full((num_rows, 1), -1, np.int32)
        self.needs = np.zeros(num_rows, np.uint8)
        self.bias: dict[int, tuple[Int64Array, Float32Array]] = {}
        self.rules: dict[int, TokenRules] = {}

    def set(self, row: int, params: SamplingParams, default_seed: int, eos_token_ids: tuple[int, ...]) -> None:
        """Fill `row` for a new sequence; `default_seed` serves where `params` brings no seed."""
        self.temperature[row] = min(params.temperature, float(np.finfo(np.float32).max))
        self.top_p[row] = max(params.top_p, float(np.finfo(np.float32).tiny))
        self.min_p[row] = params.min_p
        self.top_k[row] = min(params.top_k or self.vocab_size, self.vocab_size)
        self.seed[row] = (default_seed if params.seed is None else params.seed) & 0xFFFF_FFFF_FFFF_FFFF
        self.presence[row] = params.presence_penalty
        self.frequency[row] = params.frequency_penalty
        self.repetition[row] = params.repetition_penalty
        self.num_logprobs[row] = -1 if params.logprobs is None else min(params.logprobs, self.vocab_size)
        self.min_tokens[row] = params.min_tokens
        self.max_tokens[row] = params.max_tokens
        stop_ids = sorted({*params.stop_token_ids, *(() if params.ignore_eos else eos_token_ids)})
        self._set_stop_ids(row, stop_ids)
        needs = self._set_bias(row, params) | self._set_rules(row, params, stop_ids, eos_token_ids)
        if params.temperature >= MIN_TEMPERATURE:
            needs |= RANDOM
            needs |= MIN_P if params.min_p > 0 else 0
            needs |= TRUNCATION if params.top_p < 1 or self.top_k[row] < self.vocab_size else 0
        if params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1.0:
            needs |= PENALTIES
        if params.min_tokens > 0 and stop_ids and not needs & MASKED:  # the rules know of them
            needs |= MIN_TOKENS
        if params.logprobs is not None:
            needs |= LOGPROBS
        self.needs[row] = needs

    def masks(
        self,
        rows: Int64Array,
        tokens: Int32Array,
        prompt_lens: Int64Array,
        lens: Int64Array,
        grammar_masks: Mapping[int, MaskArray],
    ) -> MaskArray:
        """[n, W] what may come next in `rows` [n] that have rules; see `sampler.sample` for the histories."""
        return np.stack(
            [
                self.rules[row].mask(tokens[row, prompt_lens[row] : lens[row]], grammar_masks.get(row))
                for row in rows.tolist()
            ]
        )

    def _set_bias(self, row: int, params: SamplingParams) -> int:
        self.bias.pop(row, None)
        pairs = [pair for pair in params.logit_bias if pair[0] < self.vocab_size]
        if not pairs:
            return 0
        self.bias[row] = np.asarray([i for i, _ in pairs], np.int64), np.asarray([b for _, b in pairs], np.float32)
        return BIAS

    def _set_rules(self, row: int, params: SamplingParams, stop_ids: list[int], eos_token_ids: tuple[int, ...]) -> int:
        rules = TokenRules.of(params, stop_ids, eos_token_ids, self.vocab_size)
        if rules is None:
            self.rules.pop(row, None)
            return 0
        self.rules[row] = rules
        return MASKED

    def _set_stop_ids(self, row: int, stop_ids: list[int]) -> None:
        missing = len(stop_ids) - self.stop_ids.shape[1]
        if missing > 0:
            self.stop_ids = np.pad(self.stop_ids, ((0, 0), (0, missing)), constant_values=-1)
        self.stop_ids[row] = -1
        self.stop_ids[row, : len(stop_ids)] = stop_ids


def finish_reasons(
    table: SamplingTable, rows: Int64Array, token_ids: Int64Array, num_generated: Int64Array
) -> Int8Array:
    """What each row's new token means for its sequence.

    Args:
        table: parameters, indexed by `rows`.
        rows: [n] rows of the table.
        token_ids: [n] the new tokens.
        num_generated: [n] tokens generated, the new one included.

    Returns:
        [n] `GO_ON`, `FINISH_STOP` (stop id or end of sequence; wins over length) or `FINISH_LENGTH`.
    """
    stops = (token_ids[:, None] == table.stop_ids[rows]).any(axis=1)
    stops &= num_generated >= table.min_tokens[rows]
    codes = np.where(num_generated >= table.max_tokens[rows], FINISH_LENGTH, GO_ON).astype(np.int8)
    codes[stops] = FINISH_STOP
    return codes
