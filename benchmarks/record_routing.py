"""Record which experts the tokens of a text take in a checkpoint, for `amoe simulate --routing FILE.npy`.

    python -m benchmarks.record_routing [MODEL] --tokens 4096 --out routing.npy

Writes topk_ids [tokens, layers, top_k] as int16 .npy. The default is the built-in model on Python's standard library.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from amoe.bench.workload import CHARS_PER_TOKEN, standard_library_text
from amoe.builtin import builtin_model_path
from amoe.engine.tokenizer import Tokenizer
from amoe.models.config import load_model_config
from amoe.models.loader import load_model
from amoe.models.model import Blocks
from amoe.models.reference import forward

WINDOW = 512  # tokens of one sequence


def record(model_path: str, num_tokens: int, seed: int) -> npt.NDArray[np.int16]:
    """[num_tokens, L, K] experts of consecutive tokens of a text, in sequences of 512; -1 at dense layers."""
    config = load_model_config(model_path)
    text = standard_library_text(np.random.default_rng(seed), int(2 * num_tokens * CHARS_PER_TOKEN) + WINDOW)
    token_ids = Tokenizer(model_path).encode(text)[:num_tokens]
    everything = {
        layer: tuple(range(config.num_experts)) for layer, sparse in enumerate(config.sparse_layers) if sparse
    }
    blocks = Blocks(attention=True, experts=everything)
    model = load_model(model_path, config, blocks, dtype=torch.float32, device=torch.device("cpu"))
    topk_ids = np.full((len(token_ids), config.num_layers, config.top_k), -1, np.int16)
    for start in range(0, len(token_ids), WINDOW):
        window = token_ids[start : start + WINDOW]

        def keep(layer: int, x: torch.Tensor, start: int = start) -> None:
            router = model.weights.attention[layer].router
            assert router is not None
            topk_ids[start : start + len(x), layer] = (x @ router.float().T).topk(config.top_k).indices.numpy()

        with torch.inference_mode():
            forward(model, window, keep)
        print(f"{start + len(window)} of {len(token_ids)} tokens", flush=True)
    return topk_ids


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.record_routing", description=__doc__)
    parser.add_argument("model", nargs="?", default=str(builtin_model_path()), metavar="MODEL")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=0, help="of the text")
    parser.add_argument("--out", type=Path, default=Path("routing.npy"))
    args = parser.parse_args()
    np.save(args.out, record(args.model, args.tokens, args.seed))


if __name__ == "__main__":
    main()
