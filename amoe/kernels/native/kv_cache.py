"""The paged KV cache as the native kernels lay it out, and where a batch stands in it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from amoe.kernels.attention import AttentionBatch
from amoe.kernels.native import _native
from amoe.kernels.native.memory import empty


@dataclass(frozen=True)
class NativeKVCache:
    """Keys and values of one attention worker.

    Attributes:
        layers: each [num_blocks, Hkv, 2, block_size * D], a block's keys before its values; `src/kv_cache.h` says how
            they lie in there.
    """

    layers: list[torch.Tensor]
    num_blocks: int
    block_size: int

    @classmethod
    def of(
        cls, num_layers: int, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
    ) -> NativeKVCache:
        """A cache that takes memory only where it is written."""
        shape = (num_blocks, num_kv_heads, 2, block_size * head_dim)
        return cls([empty(shape, dtype) for _ in range(num_layers)], num_blocks, block_size)


class NativeBatch:
    """An `AttentionBatch` in the shape that the kernels take. Holds the arrays that `handle` points to."""

    def __init__(self, batch: AttentionBatch) -> None:
        self._tables = batch.decode_block_tables.to(torch.int32).contiguous()
        self._lens = batch.decode_context_lens.to(torch.int64).contiguous()
        chunks = batch.chunks
        starts = [0]
        for chunk in chunks:
            starts.append(starts[-1] + len(chunk.block_table))
        columns = [
            [c.start_row for c in chunks],
            [c.end_row for c in chunks],
            [c.context_len for c in chunks],
            starts[:-1],
        ]
        self._chunks = torch.tensor(columns, dtype=torch.int64).view(4, -1)
        self._chunk_tables = (
            torch.cat([chunk.block_table for chunk in chunks]).to(torch.int32)
            if chunks
            else torch.empty(0, dtype=torch.int32)
        )
        start_row, end_row, context, table_start = (row.data_ptr() for row in self._chunks)
        self.handle = _native.AttentionBatch(
            batch.num_decodes,
            self._tables.data_ptr(),
            self._tables.shape[1] if batch.num_decodes else 0,
            self._lens.data_ptr(),
            len(chunks),
            start_row,
            end_row,
            context,
            self._chunk_tables.data_ptr(),
            table_start,
        )
