"""Native paged attention against the oracle of the torch kernels, and with equal bits however a token comes."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from amoe.kernels import native
from amoe.kernels.attention import AttentionBatch, ChunkSpan, KVCache, paged_attention_reference
from amoe.kernels.native import _native
from amoe.kernels.native.kv_cache import NativeBatch
from tests.unit.kernels.native_cases import each_dtype, each_isa, native_layout, needs_native

pytestmark = needs_native

SCALE = 0.3


class Sequences:
    """Sequences of given contexts with queries for all their tokens. Slots that none of them fills are NaN."""

    def __init__(self, contexts, dtype, *, seed=0, block_size=16, num_kv_heads=2, group=2, head_dim=32):
        generator = torch.Generator().manual_seed(seed)
        self.dtype, self.block_size, self.num_kv_heads = dtype, block_size, num_kv_heads
        self.num_heads, self.head_dim = num_kv_heads * group, head_dim
        needed = [-(-context // block_size) for context in contexts]
        self.num_blocks = sum(needed) + 3
        self.tables = list(torch.randperm(self.num_blocks, generator=generator).split([*needed, 3])[:-1])
        shape = (self.num_blocks, block_size, 2, num_kv_heads, head_dim)
        self.rows = torch.full(shape, float("nan"))
        for table, context in zip(self.tables, contexts, strict=True):
            for position in range(context):
                token = torch.randn(2, num_kv_heads, head_dim, generator=generator)
                self.rows[table[position // block_size], position % block_size] = token.to(dtype)
        self.queries = [
            torch.randn(context, self.num_heads, head_dim, generator=generator).to(dtype) for context in contexts
        ]
        self.cache = native_layout(self.rows.to(dtype))

    def batch(self, decodes, chunks):
        """decodes: (sequence, context); chunks: (sequence, first token, end). Returns the batch and its queries."""
        longest = max((len(self.tables[sequence]) for sequence, _ in decodes), default=0)
        tables = torch.zeros(len(decodes), longest, dtype=torch.int64)
        for row, (sequence, _) in enumerate(decodes):
            tables[row, : len(self.tables[sequence])] = self.tables[sequence]
        queries = [self.queries[sequence][context - 1 : context] for sequence, context in decodes]
        slots = [self.slot(sequence, context - 1) for sequence, context in decodes]
        spans, row = [], len(decodes)
        for sequence, begin, end in chunks:
            spans.append(ChunkSpan(row, row + end - begin, self.tables[sequence], end))
            queries.append(self.queries[sequence][begin:end])
            slots += [self.slot(sequence, position) for position in range(begin, end)]
            row += end - begin
        lens = torch.tensor([context for _, context in decodes], dtype=torch.int64)
        longest_context = max(lens.tolist(), default=0)
        return AttentionBatch(torch.tensor(slots), len(decodes), tables, lens, longest_context, spans), torch.cat(
            queries
        )

    def slot(self, sequence, position):
        return int(self.tables[sequence][position // self.block_size]) * self.block_size + position % self.block_size

    def attend(self, context, decodes, chunks):
        """[n, Hq, D] of the native kernel, with queries that lie in wider rows, as they do behind the qkv product."""
        batch, queries = self.batch(decodes, chunks)
        wide = torch.full((len(queries), self.num_heads + 3, self.head_dim), 7.0, dtype=self.dtype)
        wide[:, : self.num_heads] = queries
        shape = _native.AttentionShape(
            self.num_heads, self.num_kv_heads, self.head_dim, self.block_size, 0, 0.0, 0.0, SCALE
        )
        out = torch.empty_like(queries)
        handle = NativeBatch(batch)
        context.paged_attention(
            shape, wide.data_ptr(), wide.stride(0), self.cache.data_ptr(), handle.handle, out.data_ptr()
        )
        return out

    def expected(self, decodes, chunks):
        """The oracle, in float32."""
        batch, queries = self.batch(decodes, chunks)
        cache = KVCache(
            1, self.num_blocks, self.block_size, self.num_kv_heads, self.head_dim, torch.float32, torch.device("cpu")
        )
        cache.layers[0].copy_(self.rows)
        tokens = self.rows.flatten(0, 1)[batch.slot_mapping]
        return paged_attention_reference(queries.float(), tokens[:, 0], tokens[:, 1], cache, 0, batch, SCALE)

    def check(self, isa, decodes, chunks, num_threads=2):
        ours = self.attend(native.make_context(self.dtype, num_threads, isa=isa), decodes, chunks)
        tolerance = 1e-2 if self.dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(ours.float(), self.expected(decodes, chunks), atol=tolerance, rtol=tolerance)


span = st.tuples(st.integers(0, 40), st.integers(1, 30)).map(lambda pair: (pair[0], pair[0] + pair[1]))


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    isa=st.sampled_from(native.instruction_sets()) if native.is_available() else st.nothing(),
    dtype=st.sampled_from(native.DTYPES),
    decodes=st.lists(st.integers(1, 70), max_size=4),
    chunks=st.lists(span, max_size=3),
    block_size=st.sampled_from([1, 3, 16, 32]),
    num_kv_heads=st.integers(1, 3),
    group=st.sampled_from([1, 2, 5, 11]),
    head_dim=st.sampled_from([2, 16, 32, 40, 64, 80]),
)
def test_equals_the_oracle(seed, isa, dtype, decodes, chunks, block_size, num_kv_heads, group, head_dim):
    if not decodes and not chunks:
        return
    contexts = decodes + [end for _, end in chunks]
    sequences = Sequences(
        contexts,
        dtype,
        seed=seed,
        block_size=block_size,
        num_kv_heads=num_kv_heads,
        group=group,
        head_dim=head_dim,
    )
    numbered = [(len(decodes) + index, *chunk) for index, chunk in enumerate(chunks)]
    sequences.check(isa, list(enumerate(decodes)), numbered)


@each_isa
@each_dtype
@pytest.mark.parametrize("block_size", [16, 24])
def test_contexts_of_several_segments(isa, dtype, block_size):
    sequences = Sequences([1100, 512, 513, 1030], dtype, block_size=block_size, group=3)
    sequences.check(isa, [(0, 1100), (1, 512), (2, 513)], [(3, 1000, 1030), (0, 500, 530)])


@each_isa
@each_dtype
@pytest.mark.parametrize(("block_size", "head_dim"), [(16, 64), (16, 24), (5, 32)])
def test_bits_depend_on_the_sequence_alone(isa, dtype, block_size, head_dim):
    """Alone or in a batch, by one thread or three, as a decode or in a prompt however it is cut."""
    sequences = Sequences([570, 90, 33], dtype, block_size=block_size, head_dim=head_dim, group=3)
    one, three = (native.make_context(dtype, threads, isa=isa) for threads in (1, 3))
    whole = sequences.attend(one, [], [(0, 0, 570)])
    assert torch.equal(whole, sequences.attend(three, [], [(0, 0, 570)]))
    for cuts in ([0, 1, 64, 511, 570], [0, 130, 513, 570]):
        chunks = [(0, begin, end) for begin, end in pairwise(cuts)]
        assert torch.equal(whole, sequences.attend(three, [], chunks))
    for position in (0, 15, 16, 100, 511, 512, 569):
        alone = sequences.attend(one, [(0, position + 1)], [])
        assert torch.equal(whole[position : position + 1], alone)
    mixed = sequences.attend(three, [(1, 90), (0, 570), (2, 20), (0, 513)], [(2, 0, 33), (0, 555, 570)])
    assert torch.equal(mixed[1], whole[569]) and torch.equal(mixed[3], whole[512])
    assert torch.equal(mixed[-15:], whole[555:])


@each_isa
@each_dtype
def test_large_scores_do_not_overflow(isa, dtype):
    sequences = Sequences([600], dtype)
    sequences.queries[0] *= 500
    sequences.check(isa, [(0, 600)], [(0, 590, 600)])


@each_isa
@each_dtype
def test_nan_in_a_query_stays_in_its_row(isa, dtype):
    sequences = Sequences([40], dtype)
    clean = sequences.attend(native.make_context(dtype, 1, isa=isa), [], [(0, 0, 40)])
    sequences.queries[0][20, 1] = float("nan")
    ours = sequences.attend(native.make_context(dtype, 1, isa=isa), [], [(0, 0, 40)])
    assert ours[20, 1].isnan().all()
    clean[20, 1] = ours[20, 1] = 0
    assert torch.equal(ours, clean)
