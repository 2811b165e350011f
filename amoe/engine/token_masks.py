"""Which tokens may come next, as bit masks: allowed ids, bad words, a grammar's mask, and what must not end the text.

All of it is integers on the host: a row asks for V / 8 bytes, and only the result goes to the device. So it is the same
on every device, and whether any token is left is known before sampling.

Shape letters: V vocabulary, W = ceil(V / 32) words of a mask.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from amoe.types import Int32Array, Int64Array, SamplingParams

MaskArray = npt.NDArray[np.uint32]  # [W], or [n, W]: bit i of word w is token 32 w + i; none is set from V on

_ANY_TOKEN = -1  # pads the prefixes of bad words on the left
_NO_TOKEN = -2  # pads a history that is shorter than they are


def num_words(vocab_size: int) -> int:
    """W."""
    return -(-vocab_size // 32)


def mask_of(token_ids: Iterable[int], vocab_size: int) -> MaskArray:
    """The mask of some ids; those that the vocabulary does not have are left out."""
    flags = np.zeros(num_words(vocab_size) * 32, np.bool_)
    ids = np.fromiter(token_ids, np.int64)
    flags[ids[(ids >= 0) & (ids < vocab_size)]] = True
    return np.packbits(flags, bitorder="little").view(np.uint32)


def ids_of(mask: MaskArray) -> Int64Array:
    """The ids of a mask, in order."""
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))


def apply_masks(logits: torch.Tensor, index: Int64Array, masks: MaskArray) -> None:
    """Make what is not in `masks` [len(index), W] impossible in the rows `index` of `logits` [n, V], in place."""
    if logits.device.type != "cpu":
        apply_masks_on_device(logits, index, masks)
        return
    flags = np.unpackbits(masks.view(np.uint8), axis=1, bitorder="little")[:, : logits.shape[1]]
    for row, forbidden in zip(index.tolist(), torch.from_numpy(flags == 0), strict=True):
        logits[row].masked_fill_(forbidden, -torch.inf)


def apply_masks_on_device(logits: torch.Tensor, index: Int64Array, masks: MaskArray) -> None:
    """`apply_masks` in a few kernels, and one copy of V / 8 bytes for each row."""
    words = torch.from_numpy(masks.view(np.int32)).to(logits.device)
    bits = torch.arange(32, dtype=torch.int32, device=logits.device)
    flags = ((words.unsqueeze(-1) >> bits) & 1).flatten(1)[:, : logits.shape[1]]
    rows = torch.from_numpy(index).to(logits.device)
    logits[rows] = logits[rows].masked_fill_(flags == 0, -torch.inf)


class BadWords:
    """Token sequences that must not be completed, those of a single token aside."""

    def __init__(self, words: Iterable[tuple[int, ...]]) -> None:
        longer = [word for word in words if len(word) > 1]
        self._prefixes = np.full((len(longer), max(map(len, longer), default=1) - 1), _ANY_TOKEN, np.int32)
        for row, word in zip(self._prefixes, longer, strict=True):
            row[len(row) - len(word) + 1 :] = word[:-1]
        self._lasts = np.asarray([word[-1] for word in longer], np.int64)

    def completed_by(self, generated: Int32Array) -> Int64Array:
        """The ids that would complete a word after the tokens `generated` [m]."""
        width = self._prefixes.shape[1]
        tail = np.full(width, _NO_TOKEN, np.int32)
        count = min(width, len(generated))
        tail[width - count :] = generated[len(generated) - count :]
        return self._lasts[((self._prefixes == tail) | (self._prefixes == _ANY_TOKEN)).all(axis=1)]


@dataclass(frozen=True, slots=True)
class TokenRules:
    """What one sequence restricts beside its grammar. Make it with `of`.

    Attributes:
        allowed: [W] `allowed_token_ids` (everything, if there are none) without bad words of a single token.
        bad_words: the longer ones; None if there are none.
        stops: [W] stop ids, which have to wait for `min_tokens`.
        ends: [W] with a grammar and `ignore_eos`: ends of sequence, to be taken only where the text cannot go on.
    """

    allowed: MaskArray
    bad_words: BadWords | None
    stops: MaskArray
    min_tokens: int
    ends: MaskArray | None

    @classmethod
    def of(
        cls, params: SamplingParams, stop_ids: Iterable[int], eos_token_ids: Iterable[int], vocab_size: int
    ) -> TokenRules | None:
        """The rules of a sequence; None: any token may come at any time, `min_tokens` aside."""
        if not params.allowed_token_ids and not params.bad_words and params.grammar is None:
            return None
        bad_tokens = mask_of((word[0] for word in params.bad_words if len(word) == 1), vocab_size)
        ends = mask_of(eos_token_ids, vocab_size) if params.ignore_eos and params.grammar is not None else None
        return cls(
            mask_of(params.allowed_token_ids or range(vocab_size), vocab_size) & ~bad_tokens,
            BadWords(params.bad_words) if any(len(word) > 1 for word in params.bad_words) else None,
            mask_of(stop_ids, vocab_size),
            params.min_tokens,
            ends,
        )

    def mask(self, generated: Int32Array, grammar: MaskArray | None) -> MaskArray:
        """[W] what may come after the tokens `generated` [m]; nothing, if the rules contradict each other.

        Args:
            grammar: [W] what its grammar admits; None: it has none.
        """
        mask = self.allowed if grammar is None else self.allowed & grammar
        if self.bad_words is not None:
            completing = self.bad_words.completed_by(generated)
            if len(completing):
                mask = mask & ~mask_of(completing, len(mask) * 32)
        if self.ends is not None:
            mask = _without(mask, self.ends)
        if len(generated) < self.min_tokens:
            mask = _without(mask, self.stops)
        return mask


def _without(mask: MaskArray, held_back: MaskArray) -> MaskArray:
    """The mask without some tokens, unless nothing else is left: then the text has to end."""
    rest = mask & ~held_back
    return rest if rest.any() else mask
