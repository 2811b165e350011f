"""Native attention beside what the machine can do: bytes of keys and values over the bandwidth of its threads.

    python -m benchmarks.kernels_attention --num-threads 2

Decode reads every key and value of its contexts once, from memory; a probe reads memory with the same threads, in turns
with it. Prefill is bound by operations: 2 n^2 Hq D of them for a prompt of n tokens. The best of the rounds is what
counts: what a shared machine does to a run of microseconds says nothing about the kernel.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from itertools import cycle

import torch

from amoe.kernels.attention import AttentionBatch, ChunkSpan
from amoe.kernels.native import _native, make_context
from amoe.kernels.native.kv_cache import NativeBatch, NativeKVCache

DECODES = ((1, 128), (1, 4096), (8, 128), (32, 128), (64, 128), (32, 1024), (16, 4096))
PREFILLS = (64, 512, 2048)
CACHE_BYTES = 1 << 30
PROBE_BYTES, PROBE_WINDOWS = 16 << 20, 16  # of a read; as many places, so that none is still in a cache
BLOCK_SIZE = 16


class Attention:
    """One layer's cache, larger than the processor's, and queries."""

    def __init__(self, context: _native.Context, num_heads: int, num_kv_heads: int, head_dim: int) -> None:
        self.context = context
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.token_bytes = 2 * num_kv_heads * head_dim * torch.bfloat16.itemsize
        self.num_blocks = CACHE_BYTES // (self.token_bytes * BLOCK_SIZE)
        self.cache = NativeKVCache.of(1, self.num_blocks, BLOCK_SIZE, num_kv_heads, head_dim, torch.bfloat16)
        self.cache.layers[0].normal_()
        self.shape = _native.AttentionShape(num_heads, num_kv_heads, head_dim, BLOCK_SIZE, 0, 0.0, 0.0, head_dim**-0.5)
        self._blocks = torch.randperm(self.num_blocks)

    def step(self, num_decodes: int, num_new: int, length: int) -> Callable[[], float]:
        """Seconds of decodes of that context, or of one chunk of `num_new` tokens; each call takes other blocks."""
        num_sequences, per_sequence = max(num_decodes, 1), -(-length // BLOCK_SIZE)
        q = torch.randn(num_decodes + num_new, self.num_heads * self.head_dim).bfloat16()
        out, few, ids = torch.empty_like(q), torch.rand(64, 8192), torch.empty(64, dtype=torch.int64)

        def run() -> float:
            self._blocks = self._blocks.roll(num_sequences * per_sequence)
            tables = self._blocks[: num_sequences * per_sequence].view(num_sequences, per_sequence)
            chunks = [ChunkSpan(0, num_new, tables[0], length)] if num_new else []
            lens = torch.full((num_decodes,), length)
            batch = NativeBatch(AttentionBatch(torch.empty(0), num_decodes, tables[:num_decodes], lens, length, chunks))
            self.context.argmax(
                few.data_ptr(), len(few), few.shape[1], ids.data_ptr()
            )  # in a step the threads are awake, too
            start = time.perf_counter()
            self.context.paged_attention(
                self.shape, q.data_ptr(), q.shape[1], self.cache.layers[0].data_ptr(), batch.handle, out.data_ptr()
            )
            return time.perf_counter() - start

        return run


def probe(context: _native.Context) -> Callable[[], float]:
    """Bytes per second that the context's threads read."""
    windows = cycle(torch.rand(PROBE_WINDOWS, 16, PROBE_BYTES // 4 // 16))
    ids = torch.empty(16, dtype=torch.int64)

    def run() -> float:
        numbers = next(windows)
        start = time.perf_counter()
        context.argmax(numbers.data_ptr(), len(numbers), numbers.shape[1], ids.data_ptr())
        return PROBE_BYTES / (time.perf_counter() - start)

    return run


def best_of(step: Callable[[], float], read: Callable[[], float], rounds: int) -> tuple[float, float]:
    """Seconds of a step, and bytes per second of a read, in turns."""
    seconds, bandwidths = zip(*((step(), read()) for _ in range(rounds)), strict=True)
    return min(seconds), max(bandwidths)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--isa", help="instruction set (default: the fastest)")
    parser.add_argument("--num-heads", type=int, default=16)
    parser.add_argument("--num-kv-heads", type=int, default=16)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    if args.num_heads % args.num_kv_heads or min(args.num_threads, args.rounds) < 1:
        parser.error("--num-heads must be a multiple of --num-kv-heads, threads and rounds positive")
    context = make_context(torch.bfloat16, args.num_threads, isa=args.isa)
    attention = Attention(context, args.num_heads, args.num_kv_heads, args.head_dim)
    read = probe(context)
    print("| decodes | context | us | GB/s | probe GB/s | share |\n|---|---|---|---|---|---|")
    for num_decodes, length in DECODES:
        seconds, bandwidth = best_of(attention.step(num_decodes, 0, length), read, args.rounds)
        reached = num_decodes * length * attention.token_bytes / seconds
        print(
            f"| {num_decodes} | {length} | {seconds * 1e6:.0f} | {reached / 1e9:.1f} | {bandwidth / 1e9:.1f} "
            f"| {reached / bandwidth:.0%} |"
        )
    print("\n| prompt | ms | GFLOP/s |\n|---|---|---|")
    for length in PREFILLS:
        seconds, _ = best_of(attention.step(0, length, length), read, args.rounds)
        operations = 2 * length * length * args.num_heads * args.head_dim
        print(f"| {length} | {seconds * 1e3:.2f} | {operations / seconds / 1e9:.0f} |")


if __name__ == "__main__":
    main()
