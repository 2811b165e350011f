"""What stands between the qkv product and attention: norm, clip, rotary embedding, the write into the native cache."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from amoe.kernels import native
from amoe.kernels.native import _native
from tests.unit.kernels.native_cases import address, each_dtype, each_isa, native_layout, needs_native

pytestmark = needs_native

NUM_HEADS, NUM_KV_HEADS, NUM_BLOCKS, MAX_POSITION = 6, 2, 14, 40
NORMS = {"none": 0, "head": 1, "full": 2}


class Case:
    """Random tokens at random positions in random slots."""

    def __init__(self, dtype, head_dim, block_size, qk_norm, clip, n=13):
        generator = torch.Generator().manual_seed(head_dim + block_size)
        self.dtype, self.head_dim, self.block_size, self.qk_norm, self.clip = dtype, head_dim, block_size, qk_norm, clip
        heads = NUM_HEADS + 2 * NUM_KV_HEADS
        self.qkv = torch.randn(n, heads * head_dim, generator=generator).mul(2).to(dtype)
        widths = {"none": (0, 0), "head": (1, 1), "full": (NUM_HEADS, NUM_KV_HEADS)}[qk_norm]
        self.norms = [torch.randn(width * head_dim, generator=generator).to(dtype) for width in widths]
        self.positions = torch.randint(MAX_POSITION, (n,), generator=generator)
        self.slots = torch.randperm(NUM_BLOCKS * block_size, generator=generator)[:n]
        self.table = torch.randn(MAX_POSITION, 2, head_dim // 2, generator=generator)

    def run(self, isa, num_threads=2, rows=slice(None)):
        """qkv as it has become, and the cache."""
        context = native.make_context(self.dtype, num_threads, isa=isa)
        qkv, positions, slots = (x[rows].clone() for x in (self.qkv, self.positions, self.slots))
        cache = torch.zeros(NUM_BLOCKS, NUM_KV_HEADS, 2, self.block_size * self.head_dim, dtype=self.dtype)
        shape = _native.AttentionShape(
            NUM_HEADS,
            NUM_KV_HEADS,
            self.head_dim,
            self.block_size,
            NORMS[self.qk_norm],
            1e-5,
            self.clip,
            1.0,
        )
        context.qk_rope_write(
            shape,
            *map(address, self.norms),
            qkv.data_ptr(),
            len(qkv),
            positions.data_ptr(),
            self.table.data_ptr(),
            slots.data_ptr(),
            cache.data_ptr(),
        )
        return qkv, cache

    def expected(self):
        """qkv in float32."""
        n, dim = len(self.qkv), self.head_dim
        q, k, v = self.qkv.float().split([NUM_HEADS * dim, NUM_KV_HEADS * dim, NUM_KV_HEADS * dim], dim=1)
        if self.qk_norm != "none":
            q, k = (
                F.rms_norm(x.view(n, -1, len(norm)), (len(norm),), norm.float(), 1e-5)
                for x, norm in zip((q, k), self.norms, strict=True)
            )
        heads = [x.reshape(n, -1, dim) for x in (q, k, v)]
        if self.clip > 0:
            heads = [x.clamp(-self.clip, self.clip) for x in heads]
        cos, sin = self.table[self.positions].unsqueeze(2).unbind(1)  # each [n, 1, D / 2]
        for index in (0, 1):
            low, high = heads[index].chunk(2, dim=2)
            heads[index] = torch.cat((low * cos - high * sin, high * cos + low * sin), dim=2)
        return torch.cat(heads, dim=1).view(n, -1)


@each_isa
@each_dtype
@pytest.mark.parametrize("qk_norm", ["none", "head", "full"])
@pytest.mark.parametrize(
    ("head_dim", "block_size", "clip"), [(64, 16, 0), (32, 32, 1.5), (80, 16, 0), (6, 16, 1.5), (48, 3, 0), (2, 1, 0)]
)
def test_equals_the_oracle(isa, dtype, qk_norm, head_dim, block_size, clip):
    case = Case(dtype, head_dim, block_size, qk_norm, clip)
    qkv, cache = case.run(isa)
    tolerance = 2**-8 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(qkv.float(), case.expected(), rtol=tolerance, atol=1e-5)
    # The cache has, bit by bit, the keys and values that stand in qkv, at the slots and nowhere else.
    rows = torch.zeros(NUM_BLOCKS * block_size, 2 * NUM_KV_HEADS, head_dim, dtype=dtype)
    rows[case.slots] = qkv.view(len(qkv), -1, head_dim)[:, NUM_HEADS:]
    rows = rows.view(NUM_BLOCKS, block_size, 2, NUM_KV_HEADS, head_dim)
    assert torch.equal(cache, native_layout(rows))


@each_isa
@each_dtype
@pytest.mark.parametrize("qk_norm", ["none", "head", "full"])
def test_bits_depend_on_the_token_alone(isa, dtype, qk_norm):
    case = Case(dtype, 32, 16, qk_norm, 1.5, n=80)
    together, cache = case.run(isa, num_threads=1)
    by_three, same_cache = case.run(isa, num_threads=3)
    assert torch.equal(together, by_three) and torch.equal(cache, same_cache)
    for row in (0, 41):
        assert torch.equal(case.run(isa, rows=slice(row, row + 1))[0], together[row : row + 1])
