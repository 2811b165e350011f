"""What the tests of the native kernels share: contexts to run, addresses, and the cache's layout in plain Python."""

from __future__ import annotations

import mmap

import numpy as np
import pytest
import torch

from amoe.kernels import native

needs_native = pytest.mark.skipif(not native.is_available(), reason="the native kernels are not built")
each_isa = pytest.mark.parametrize("isa", native.instruction_sets())
each_dtype = pytest.mark.parametrize("dtype", native.DTYPES, ids=["bfloat16", "float32"])


def address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def native_layout(rows: torch.Tensor) -> torch.Tensor:
    """[num_blocks, block_size, 2, Hkv, D] keys and values, as in a `KVCache`, in the native cache's layout."""
    num_blocks, block_size, _, num_kv_heads, head_dim = rows.shape
    keys, values = rows.permute(2, 0, 3, 1, 4)  # each [num_blocks, Hkv, block_size, D]
    if block_size % 16 == 0 and head_dim % 16 == 0:
        depth = 4 // rows.element_size()
        keys = keys.reshape(num_blocks, num_kv_heads, -1, 16, head_dim // depth, depth).transpose(3, 4)
        values = values.reshape(num_blocks, num_kv_heads, -1, 16 // depth, depth, head_dim).transpose(4, 5)
    flat = [part.reshape(num_blocks, num_kv_heads, block_size * head_dim) for part in (keys, values)]
    return torch.stack(flat, dim=2).contiguous()


def resident(part: torch.Tensor) -> int:
    """Bytes of a tensor's pages that are in memory."""
    first, count = part.data_ptr() // mmap.PAGESIZE, -(-part.nbytes // mmap.PAGESIZE)
    with open("/proc/self/pagemap", "rb") as pages:
        pages.seek(8 * first)
        entries = np.frombuffer(pages.read(8 * count), np.uint64)
    return int((entries >> np.uint64(63)).sum()) * mmap.PAGESIZE
