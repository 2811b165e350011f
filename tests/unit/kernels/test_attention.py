"""`paged_attention` against its oracle: mixed batches, scattered blocks, unequal lengths."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from amoe.kernels import attention
from amoe.kernels.attention import (
    AttentionBatch,
    ChunkSpan,
    KVCache,
    paged_attention,
    paged_attention_reference,
)


class Case:
    """A cache of random content and a batch: decodes of the given contexts, chunks of (new tokens, context)."""

    def __init__(self, seed, decodes, chunks, block_size=4, num_kv_heads=2, group=2, head_dim=8, host_lens=False):
        generator = torch.Generator().manual_seed(seed)
        contexts = decodes + [context for _, context in chunks]
        needed = [-(-context // block_size) for context in contexts]
        self.cache = KVCache(2, sum(needed) + 3, block_size, num_kv_heads, head_dim, torch.float32, torch.device("cpu"))
        self.cache.layers[1].normal_(generator=generator)
        blocks = torch.randperm(sum(needed) + 3, generator=generator).split([*needed, 3])[:-1]
        slots, row, spans = [], len(decodes), []
        width = max(needed[: len(decodes)], default=0)
        tables = torch.zeros(len(decodes), width, dtype=torch.int64)
        for index, context in enumerate(decodes):
            tables[index, : needed[index]] = blocks[index]
            slots.append(self._slot(blocks[index], context - 1, block_size))
        for index, (new, context) in enumerate(chunks, start=len(decodes)):
            slots += [self._slot(blocks[index], position, block_size) for position in range(context - new, context)]
            spans.append(ChunkSpan(row, row + new, blocks[index], context))
            row += new
        self.batch = AttentionBatch(
            slot_mapping=torch.tensor(slots, dtype=torch.int64),
            num_decodes=len(decodes),
            decode_block_tables=tables,
            decode_context_lens=torch.tensor(decodes, dtype=torch.int64),
            max_decode_context=max(decodes, default=0),
            chunks=spans,
            host_context_lens=list(decodes) if host_lens else None,
        )
        self.q = torch.randn(row, num_kv_heads * group, head_dim, generator=generator)
        self.k, self.v = torch.randn(2, row, num_kv_heads, head_dim, generator=generator).unbind(0)

    @staticmethod
    def _slot(table, position, block_size):
        return int(table[position // block_size]) * block_size + position % block_size

    def check(self):
        before = self.cache.layers[1].clone()
        expected = paged_attention_reference(self.q, self.k, self.v, self.cache, 1, self.batch, 0.3)
        written, _ = self.cache.layers[1].clone(), self.cache.layers[1].copy_(before)
        ours = paged_attention(self.q, self.k, self.v, self.cache, 1, self.batch, 0.3)
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(self.cache.layers[1], written)
        assert not self.cache.layers[0].any(), "another layer was touched"


chunk = st.tuples(st.integers(1, 9), st.integers(0, 20)).map(lambda pair: (pair[0], pair[0] + pair[1]))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    decodes=st.lists(st.integers(1, 40), max_size=5),
    chunks=st.lists(chunk, max_size=3),
    block_size=st.sampled_from([1, 3, 16]),
    num_kv_heads=st.integers(1, 3),
    group=st.sampled_from([1, 2, 5]),
)
def test_equals_the_oracle(seed, decodes, chunks, block_size, num_kv_heads, group):
    if decodes or chunks:
        Case(seed, decodes, chunks, block_size, num_kv_heads, group).check()


def test_very_unequal_lengths_run_in_groups(monkeypatch):
    monkeypatch.setattr(attention, "_PADDED_TOKENS_WORTH_A_CALL", 50)
    lens = [3, 150, 9, 140, 2, 31, 70]
    groups = attention._length_groups(lens, 100)
    assert groups == [([1, 3], 150), ([6], 70), ([5, 2, 0, 4], 31)]
    for host_lens in (False, True):
        Case(0, lens, [(4, 6)], host_lens=host_lens).check()


def test_a_large_batch_is_gathered_in_parts():
    assert attention._length_groups([10] * 7, 3) == [([0, 1, 2], 10), ([3, 4, 5], 10), ([6], 10)]
    case = Case(3, [30] * 5 + [17, 2, 25], [(2, 40)])
    case.cache.gather_bytes = 2 * 8 * 4 * 128 + 1  # two rows of 30 tokens; the chunk alone is larger than that
    case.check()


def test_without_lengths_on_the_host_rows_run_padded(monkeypatch):
    """As on an accelerator, where reading lengths back would be a synchronisation."""
    monkeypatch.setattr(attention, "_length_groups", None)
    case = Case(4, [9, 30, 4, 11, 23], [])
    case.cache.gather_bytes = 2 * 8 * 4 * 128
    case.batch.decode_context_lens = case.batch.decode_context_lens.to("cpu")
    out = torch.empty_like(case.q)
    case.cache.write(1, case.batch.slot_mapping, case.k, case.v)
    expected = paged_attention_reference(case.q, case.k, case.v, case.cache, 1, case.batch, 0.3)
    lens, longest = case.batch.decode_context_lens, case.batch.max_decode_context
    attention._decode_padded(case.q, case.cache, 1, case.batch.decode_block_tables, lens, longest, 0.3, out)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


def test_equal_or_few_lengths_run_as_one_padded_call():
    assert attention._length_groups([700] * 9, 100) is None
    assert attention._length_groups([5, 60, 100], 100) is None


def test_the_output_of_a_row_does_not_depend_on_unwritten_slots():
    """Padding reads blocks of others: their finite content must have no weight at all."""
    case = Case(1, [5, 17], [])
    before = paged_attention(case.q, case.k, case.v, case.cache, 1, case.batch, 0.3)
    read = torch.zeros(case.cache.num_blocks * 4, dtype=torch.bool)
    for row, length in enumerate((5, 17)):
        for position in range(length):
            read[case._slot(case.batch.decode_block_tables[row], position, 4)] = True
    case.cache.layers[1].view(-1, 2, 2, 8)[~read] = 1e30
    after = paged_attention(case.q, case.k, case.v, case.cache, 1, case.batch, 0.3)
    assert torch.equal(before, after)


def test_views_and_sizes_of_the_cache():
    cache = KVCache(3, 5, 4, 2, 8, torch.bfloat16, torch.device("cpu"))
    assert cache.k[1].shape == cache.v[1].shape == (5, 4, 2, 8)
    cache.v[2][4, 3] = 7
    assert cache.layers[2][4, 3, 1].eq(7).all()
    assert cache.layers[2].sum() == 7 * 16
    held = sum(layer.nbytes for layer in cache.layers)
    assert 5 * KVCache.bytes_per_block(3, 4, 2, 8, torch.bfloat16) == held
