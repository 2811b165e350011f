"""`generate` of transformers: `python -m benchmarks.peers.drivers.transformers_driver --threads 2 MODEL`."""

from __future__ import annotations

import argparse
import time
from typing import Any

from benchmarks.peers.drivers.protocol import Arrivals, Line


class _Stamps:
    """A streamer that keeps when each step's tokens came; the first call brings the prompts."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, _: Any) -> None:
        self.times.append(time.monotonic())

    def end(self) -> None:
        """Nothing is to be flushed."""


def main() -> None:
    """Load the model, then answer the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--experts", default="grouped_mm", help="implementation of the experts")
    args = parser.parse_args()
    line = Line()

    import torch
    import transformers

    torch.set_num_threads(args.threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        args.model, dtype=torch.bfloat16, attn_implementation="sdpa", experts_implementation=args.experts
    ).eval()
    model.generation_config.eos_token_id = None  # exactly as many tokens as are asked for
    model.generation_config.pad_token_id = 0

    def generate(prompts: list[list[int]], output_len: int) -> Arrivals:
        ids = torch.tensor(prompts)
        stamps = _Stamps()
        with torch.inference_mode():
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=output_len,
                do_sample=False,
                streamer=stamps,
            )
        return [stamps.times[1:]] * len(prompts)

    line.serve(generate, version=transformers.__version__)


if __name__ == "__main__":
    main()
