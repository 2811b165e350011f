"""Attention over the paged KV cache: decodes and prefill chunks of one batch together.

Shape letters: n tokens, Hq query heads, Hkv key-value heads, G = Hq / Hkv, D head size, T context, B blocks of a table.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F

# Decodes of unequal length run as one padded call until padding costs more than the calls that it spares.
_PADDED_TOKENS_WORTH_A_CALL = 512
_SHORT_CONTEXT = 64  # below this length padding is cheap: no more groups
# Keys and values gathered at a time. On a CPU they should still be in the cache when they are read, and allocating a
# buffer anew is paid for in page faults (33 MB: 27 ms instead of 3); an accelerator wants few, large calls.
_CPU_GATHER_BYTES = 8 << 20
_DEVICE_GATHER_BYTES = 256 << 20


class KVCache:
    """Keys and values of one attention worker: `num_blocks` blocks of `block_size` tokens, for every layer.

    A token's key and value lie side by side, so that one copy writes both and one gather reads both. `k[layer]` and
    `v[layer]` are views [num_blocks, block_size, Hkv, D].
    """

    def __init__(
        self,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_layers = num_layers
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.num_kv_heads = num_kv_heads
        # Zeros, because padding reads slots that nobody wrote: a weight of 0 times a stray NaN would be NaN.
        self.layers = [
            _zeros((num_blocks, block_size, 2, num_kv_heads, head_dim), dtype, device) for _ in range(num_layers)
        ]
        self.k = [layer[:, :, 0] for layer in self.layers]
        self.v = [layer[:, :, 1] for layer in self.layers]
        self.gather_bytes = _CPU_GATHER_BYTES if device.type == "cpu" else _DEVICE_GATHER_BYTES
        self._block_bytes = self.bytes_per_block(1, block_size, num_kv_heads, head_dim, dtype)
        self._scratch = self.layers[0][:0] if device.type == "cpu" else None  # accelerators have their own allocator

    def write(self, layer: int, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Put k and v [n, Hkv, D] into `slots` [n] int64 (block * block_size + offset)."""
        flat = self.layers[layer].view(-1, *self.layers[layer].shape[2:])
        flat.index_copy_(0, slots, torch.stack((k, v), dim=1))

    def gather(self, layer: int, blocks: torch.Tensor) -> torch.Tensor:
        """Blocks [B] int64 as [B, block_size, 2, Hkv, D]; valid until the next call."""
        source, count = self.layers[layer], len(blocks)
        if self._scratch is None or count * self._block_bytes > self.gather_bytes:
            return source.index_select(0, blocks)
        if len(self._scratch) < count:
            self._scratch = source.new_empty(
                (min(2 * count, self.gather_bytes // self._block_bytes), *source.shape[1:])
            )
        return torch.index_select(source, 0, blocks, out=self._scratch[:count])

    def rows_per_gather(self, context: int) -> int:
        """Sequences of `context` tokens that one gather should read, at least one."""
        return max(1, self.gather_bytes // (math.ceil(context / self.block_size) * self._block_bytes))

    @staticmethod
    def bytes_per_block(num_layers: int, block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
        """Bytes that one block takes, in all layers together."""
        return num_layers * block_size * 2 * num_kv_heads * head_dim * dtype.itemsize


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros; on the host, pages that take memory only once they are written, so that a roomy cache costs nothing."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    num_bytes = math.prod(shape) * dtype.itemsize
    return torch.from_numpy(np.zeros(num_bytes, np.uint8)).view(dtype).view(shape)


@dataclass(slots=True)
class ChunkSpan:
    """Consecutive tokens of one prompt: rows [start_row, end_row) of the batch.

    Attributes:
        block_table: [B] int64 blocks of the sequence, enough for `context_len` tokens.
        context_len: tokens of the sequence up to and including this chunk.
    """

    start_row: int
    end_row: int
    block_table: torch.Tensor
    context_len: int


@dataclass(slots=True)
class AttentionBatch:
    """Where the tokens of one batch read and write the cache. Tensors are on the device of the cache.

    Attributes:
        slot_mapping: [n] int64, block * block_size + offset: where each token's key and value go.
        num_decodes: rows [0, num_decodes) are single-token sequences.
        decode_block_tables: [num_decodes, B] int64, padded with 0.
        decode_context_lens: [num_decodes] int64, the current token included.
        max_decode_context: the largest of them.
        chunks: prefill chunks behind the decodes, in row order.
        host_context_lens: `decode_context_lens` as a list, where the caller has it: on an accelerator it lets rows of
            unequal length run in groups without a device synchronisation. On the CPU it is read if it is missing.
        prepared: what a kernel has made of all this, once for all layers.
    """

    slot_mapping: torch.Tensor
    num_decodes: int
    decode_block_tables: torch.Tensor
    decode_context_lens: torch.Tensor
    max_decode_context: int
    chunks: list[ChunkSpan] = field(default_factory=list)
    host_context_lens: list[int] | None = None
    prepared: object = None


def paged_attention(
    q: torch.Tensor,
    k_new: torch.Tensor,
    v_new: torch.Tensor,
    kv: KVCache,
    layer: int,
    batch: AttentionBatch,
    scale: float,
) -> torch.Tensor:
    """Write the new keys and values, then attend, causally, over each token's sequence.

    Args:
        q: [n, Hq, D].
        k_new, v_new: [n, Hkv, D].
        kv: the cache; `layer` of it is changed.
        batch: where the tokens stand.
        scale: factor of the scores.

    Returns:
        [n, Hq, D].
    """
    kv.write(layer, batch.slot_mapping, k_new, v_new)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    if batch.num_decodes:
        _decode(q[: batch.num_decodes], kv, layer, batch, scale, out[: batch.num_decodes])
    for chunk in batch.chunks:
        rows = slice(chunk.start_row, chunk.end_row)
        _prefill(q[rows], k_new[rows], v_new[rows], kv, layer, chunk, scale, out[rows])
    return out


def _decode(q: torch.Tensor, kv: KVCache, layer: int, batch: AttentionBatch, scale: float, out: torch.Tensor) -> None:
    """Single-token sequences: q and out [num_decodes, Hq, D]."""
    lens, longest = batch.host_context_lens, batch.max_decode_context
    if lens is None and batch.decode_context_lens.device.type == "cpu":
        lens = batch.decode_context_lens.tolist()
    groups = None if lens is None else _length_groups(lens, kv.rows_per_gather(longest))
    if groups is None:
        unequal = lens is None or min(lens) != longest
        mask_lens = batch.decode_context_lens if unequal else None
        _decode_padded(q, kv, layer, batch.decode_block_tables, mask_lens, longest, scale, out)
        return
    for members, group_longest in groups:
        rows = torch.tensor(members, device=q.device)
        group_out = torch.empty_like(q[: len(members)], memory_format=torch.contiguous_format)
        tables = batch.decode_block_tables.index_select(0, rows)
        mask_lens = batch.decode_context_lens.index_select(0, rows)
        _decode_padded(q.index_select(0, rows), kv, layer, tables, mask_lens, group_longest, scale, group_out)
        out.index_copy_(0, rows, group_out)


def _length_groups(lens: list[int], rows_of_longest: int) -> list[tuple[list[int], int]] | None:
    """Rows by context length as (rows, longest); None if one padded call is cheaper.

    A group ends where the length has halved, or where its padded size would exceed `rows_of_longest` of the longest.
    """
    longest = max(lens)
    small = len(lens) <= rows_of_longest
    if small and longest * len(lens) - sum(lens) <= _PADDED_TOKENS_WORTH_A_CALL:
        return None
    by_length = sorted(range(len(lens)), key=lens.__getitem__, reverse=True)
    groups: list[tuple[list[int], int]] = []
    for row in by_length:
        if groups:
            rows, top = groups[-1]
            halved = 2 * lens[row] <= top and top > _SHORT_CONTEXT
            full = (len(rows) + 1) * top > rows_of_longest * longest
        if not groups or halved or full:
            groups.append(([], lens[row]))
        groups[-1][0].append(row)
    return groups if len(groups) > 1 else None


def _decode_padded(
    q: torch.Tensor,
    kv: KVCache,
    layer: int,
    block_tables: torch.Tensor,
    mask_lens: torch.Tensor | None,
    longest: int,
    scale: float,
    out: torch.Tensor,
) -> None:
    """Rows padded to `longest` tokens of context: q and out [m, Hq, D], block_tables [m, B]; no mask if all equal."""
    num_kv_heads, head_dim = kv.num_kv_heads, q.shape[2]
    num_blocks, step = math.ceil(longest / kv.block_size), kv.rows_per_gather(longest)
    mask = None
    if mask_lens is not None:
        mask = (torch.arange(longest, device=q.device) < mask_lens.unsqueeze(1)).view(-1, 1, 1, longest)
    # The G queries that share a key-value head attend to the same keys: they stand in the place of the sequence.
    grouped, grouped_out = (x.reshape(len(x), num_kv_heads, -1, head_dim) for x in (q, out))
    for start in range(0, len(q), step):
        rows = slice(start, start + step)
        gathered = kv.gather(layer, block_tables[rows, :num_blocks].reshape(-1))
        gathered = gathered.view(-1, num_blocks * kv.block_size, 2, num_kv_heads, head_dim)
        keys, values = gathered[:, :longest].permute(2, 0, 3, 1, 4)  # each [m, Hkv, T, D]
        row_mask = None if mask is None else mask[rows]
        grouped_out[rows] = F.scaled_dot_product_attention(grouped[rows], keys, values, attn_mask=row_mask, scale=scale)


def _prefill(
    q: torch.Tensor,
    k_new: torch.Tensor,
    v_new: torch.Tensor,
    kv: KVCache,
    layer: int,
    chunk: ChunkSpan,
    scale: float,
    out: torch.Tensor,
) -> None:
    """One chunk: q and out [m, Hq, D], k_new and v_new [m, Hkv, D]."""
    num_rows, num_heads, head_dim = q.shape
    num_kv_heads, context = kv.num_kv_heads, chunk.context_len
    group = num_heads // num_kv_heads
    mask = None
    if context == num_rows:  # the whole context is in this chunk: no need to read it back
        keys, values = k_new, v_new
    else:
        blocks = chunk.block_table[: math.ceil(context / kv.block_size)]
        gathered = kv.gather(layer, blocks).view(-1, 2, num_kv_heads, head_dim)[:context]
        keys, values = gathered.unbind(1)
        columns = torch.arange(context, device=q.device)
        mask = columns <= columns[context - num_rows :].unsqueeze(1)
    # Key-value heads as the batch and their G query heads as heads: the keys are expanded, never copied.
    queries = q.view(num_rows, num_kv_heads, group, head_dim).permute(1, 2, 0, 3)  # [Hkv, G, m, D]
    keys, values = (x.transpose(0, 1).unsqueeze(1).expand(-1, group, -1, -1) for x in (keys, values))
    attended = F.scaled_dot_product_attention(
        queries, keys, values, attn_mask=mask, is_causal=mask is None, scale=scale
    )
    out.view(num_rows, num_kv_heads, group, head_dim).copy_(attended.permute(2, 0, 1, 3))


def paged_attention_reference(
    q: torch.Tensor,
    k_new: torch.Tensor,
    v_new: torch.Tensor,
    kv: KVCache,
    layer: int,
    batch: AttentionBatch,
    scale: float,
) -> torch.Tensor:
    """`paged_attention`, one token and one head after the other in float32: its oracle."""
    kv_layer, block_size, group = kv.layers[layer], kv.block_size, q.shape[1] // kv.num_kv_heads
    for row, slot in enumerate(batch.slot_mapping.tolist()):
        kv_layer[slot // block_size, slot % block_size, 0] = k_new[row]
        kv_layer[slot // block_size, slot % block_size, 1] = v_new[row]
    spans = [
        (row, batch.decode_block_tables[row].tolist(), int(batch.decode_context_lens[row]))
        for row in range(batch.num_decodes)
    ]
    for chunk in batch.chunks:
        for row in range(chunk.start_row, chunk.end_row):
            spans.append((row, chunk.block_table.tolist(), chunk.context_len - (chunk.end_row - 1 - row)))
    out = torch.zeros_like(q)
    for row, table, length in spans:
        context = torch.stack([kv_layer[table[t // block_size], t % block_size] for t in range(length)]).float()
        for head in range(q.shape[1]):
            scores = context[:, 0, head // group] @ q[row, head].float() * scale
            out[row, head] = torch.softmax(scores, dim=0) @ context[:, 1, head // group]
    return out
