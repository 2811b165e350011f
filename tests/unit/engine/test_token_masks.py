"""Bit masks of tokens against sets of ids."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from amoe.engine.token_masks import BadWords, apply_masks, apply_masks_on_device, ids_of, mask_of, num_words


@st.composite
def masked_rows(draw):
    """(vocabulary, rows of a batch that have a mask, their ids)."""
    vocab_size = draw(st.sampled_from([1, 31, 32, 33, 64, 100]))
    rows = draw(st.lists(st.integers(0, 5), min_size=1, unique=True))
    ids = st.sets(st.integers(0, vocab_size - 1))
    return vocab_size, rows, draw(st.lists(ids, min_size=len(rows), max_size=len(rows)))


@given(masked_rows())
def test_masks_hold_their_ids_and_rule_out_all_others(case):
    vocab_size, rows, ids = case
    masks = np.stack([mask_of(each, vocab_size) for each in ids])
    assert masks.shape == (len(rows), num_words(vocab_size))
    assert [set(ids_of(mask).tolist()) for mask in masks] == ids
    for apply in (apply_masks, apply_masks_on_device):
        logits = torch.randn(6, vocab_size)
        expected = logits.clone()
        for row, each in zip(rows, ids, strict=True):
            expected[row, sorted(set(range(vocab_size)) - each)] = -torch.inf
        apply(logits, np.asarray(rows), masks)
        assert torch.equal(logits, expected)


def test_ids_without_a_row_are_left_out():
    assert ids_of(mask_of([-1, 3, 39, 40, 64, 2**31], 40)).tolist() == [3, 39]


@given(
    st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4).map(tuple), min_size=1, max_size=6),
    st.lists(st.integers(0, 3), max_size=8),
)
def test_words_are_completed_as_their_beginnings_say(words, generated):
    expected = {
        word[-1]
        for word in words
        if len(word) > 1 and len(generated) >= len(word) - 1 and tuple(generated[-(len(word) - 1) :]) == word[:-1]
    }
    assert set(BadWords(words).completed_by(np.asarray(generated, np.int32)).tolist()) == expected
