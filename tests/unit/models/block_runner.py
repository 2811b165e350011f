"""A model split over 'workers' in one process, driven block by block as the engine does, for one or more sequences."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from amoe.kernels.attention import AttentionBatch, ChunkSpan
from amoe.kernels.native import make_context
from amoe.models.config import load_model_config
from amoe.models.loader import Blocks, load_model, load_native_model
from amoe.models.worker_model import WorkerModel


class BlockRunner:
    """One attention worker and `num_expert_workers` expert workers; expert e lives at worker e % num_expert_workers.

    Args:
        isa: instruction set of native kernels; None: torch.
    """

    def __init__(
        self,
        path: Path,
        num_expert_workers: int,
        block_size: int = 4,
        num_blocks: int = 64,
        dtype: torch.dtype = torch.float32,
        isa: str | None = None,
    ) -> None:
        self.config = load_model_config(path)
        config = self.config
        shares = [tuple(range(w, config.num_experts, num_expert_workers)) for w in range(num_expert_workers)]
        sparse = [layer for layer, is_sparse in enumerate(config.sparse_layers) if is_sparse]

        def load(blocks: Blocks) -> WorkerModel:
            if isa is None:
                return load_model(path, config, blocks, dtype=dtype, device="cpu")
            return load_native_model(path, config, blocks, make_context(dtype, 2, isa=isa), dtype=dtype)

        self.home = load(Blocks(True, {}))
        self.workers = [load(Blocks(False, dict.fromkeys(sparse, share))) for share in shares]
        self.kv = self.home.new_kv_cache(num_blocks, block_size)
        self.free = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(0)).tolist()
        self.tables: dict[int, list[int]] = {}
        self.lengths: dict[int, int] = {}

    def step(self, decodes: dict[int, int], chunks: dict[int, Sequence[int]]) -> dict[int, torch.Tensor]:
        """One pass: a token for each sequence of `decodes`, several for each of `chunks`.

        Returns:
            logits [tokens of the sequence, V] by sequence.
        """
        tokens, positions, slots = [], [], []
        spans: dict[int, tuple[int, int]] = {}
        for sequence, new in [*((s, [t]) for s, t in decodes.items()), *chunks.items()]:
            start = self.lengths.get(sequence, 0)
            table = self.tables.setdefault(sequence, [])
            while len(table) * self.kv.block_size < start + len(new):
                table.append(self.free.pop())
            spans[sequence] = (len(tokens), len(tokens) + len(new))
            tokens += new
            for position in range(start, start + len(new)):
                positions.append(position)
                slots.append(table[position // self.kv.block_size] * self.kv.block_size + position % self.kv.block_size)
            self.lengths[sequence] = start + len(new)
        batch = self._batch(list(decodes), {s: spans[s] for s in chunks}, slots)
        logits = self._forward(torch.tensor(tokens), torch.tensor(positions), batch)
        return {sequence: logits[start:end] for sequence, (start, end) in spans.items()}

    def _batch(self, decodes: list[int], chunks: dict[int, tuple[int, int]], slots: list[int]) -> AttentionBatch:
        width = max([len(self.tables[s]) for s in decodes], default=0)
        tables = [self.tables[s] + [0] * (width - len(self.tables[s])) for s in decodes]
        lens = [self.lengths[s] for s in decodes]
        return AttentionBatch(
            slot_mapping=torch.tensor(slots),
            num_decodes=len(decodes),
            decode_block_tables=torch.tensor(tables, dtype=torch.int64).view(len(decodes), width),
            decode_context_lens=torch.tensor(lens, dtype=torch.int64),
            max_decode_context=max(lens, default=0),
            chunks=[
                ChunkSpan(start, end, torch.tensor(self.tables[s]), self.lengths[s])
                for s, (start, end) in chunks.items()
            ],
        )

    def _forward(self, tokens: torch.Tensor, positions: torch.Tensor, batch: AttentionBatch) -> torch.Tensor:
        with torch.inference_mode():
            residual = self.home.embed(tokens)
            for layer in range(self.config.num_layers):
                out = self.home.attention(layer, residual, positions, self.kv, batch)
                residual = out.residual
                if out.moe_input is None:
                    continue
                assert out.topk_ids is not None
                assert out.topk_weights is not None
                ids, weights = out.topk_ids.to(torch.int16), out.topk_weights
                partials = [worker.experts(layer, out.moe_input, ids, weights) for worker in self.workers]
                residual = residual + sum(partial.float() for partial in partials).to(residual.dtype)
            return self.home.head(residual).clone()
