"""What int8 weights cost in quality on held-out text: `python -m benchmarks.quantization_quality`.

Every variant of the built-in model sees the same windows, and is held against the one in bfloat16: perplexity, the
tokens that both find most likely, and the divergence of their predictions. Nothing depends on the speed of the machine.
The finer groups are emulated: weights rounded to int8 with a scale for each 64 neighbours, in float32 by torch.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import track

from amoe.builtin import builtin_model_path
from amoe.kernels.native import make_context
from amoe.models.config import ModelConfig, load_model_config
from amoe.models.loader import load_model, load_native_model
from amoe.models.model import Blocks, Model
from amoe.models.native_model import NativeModel, NativeWeights
from amoe.models.outputs import AttentionOutput
from amoe.models.worker_model import WorkerModel
from amoe.types import Float32Array, Int64Array
from benchmarks.capacity_quality.forward import Forward, Rows
from benchmarks.capacity_quality.text import held_out_subsets

LENGTH, WINDOWS = 512, 16  # of a window; of a subset
GROUP = 64
BASELINE, FLOAT_BASELINE = "bf16", "float32"


@dataclass
class Tally:
    """What a variant did, by subset: sums over its tokens."""

    nats: list[float] = field(default_factory=list)
    divergence: list[float] = field(default_factory=list)
    agreed: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)


def main() -> int:
    """Measure and write the report. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quantization_quality", description=__doc__)
    parser.add_argument("--subsets", type=int, default=10, help=f"of {WINDOWS} windows of {LENGTH} tokens each")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/2026-11-22-quantization.md"))
    args = parser.parse_args()
    path = builtin_model_path()
    models = dict(variants(path))
    texts = held_out_subsets(path, LENGTH + 1, WINDOWS, args.subsets)
    tallies = {name: Tally() for name in models}
    for text in track(texts, description="subsets"):
        measure(models, text, tallies)
    report = table(models, tallies)
    args.out.write_text(report, encoding="utf-8")
    print(report)
    return 0


# ---- variants


def variants(path: Path) -> Iterator[tuple[str, WorkerModel]]:
    """By name; those in float32 come last."""
    config = load_model_config(path)
    plain, int8 = (load_native(path, config, torch.bfloat16, quantize) for quantize in (False, True))
    yield BASELINE, plain
    yield "int8: `--quantization int8`", int8
    yield "experts only", mixed(plain, NativeWeights(plain.weights.head, plain.weights.attention, int8.weights.experts))
    yield (
        "attention's projections only",
        mixed(plain, NativeWeights(plain.weights.head, int8.weights.attention, plain.weights.experts)),
    )
    yield "LM head only", mixed(plain, NativeWeights(int8.weights.head, plain.weights.attention, plain.weights.experts))
    yield FLOAT_BASELINE, load_native(path, config, torch.float32, False)
    yield "int8, activations in float32", load_native(path, config, torch.float32, True)
    yield f"int8 in groups of {GROUP}, activations in float32", grouped(path, config)


def load_native(path: Path, config: ModelConfig, dtype: torch.dtype, quantize: bool) -> NativeModel:
    """The whole model on all cores."""
    context = make_context(dtype, os.cpu_count() or 1)
    return load_native_model(path, config, Blocks.whole(config), context, dtype=dtype, quantize=quantize)


def mixed(model: NativeModel, weights: NativeWeights) -> NativeModel:
    """`model` with other weights; it counts their bytes."""
    context = make_context(model.dtype, os.cpu_count() or 1)
    return NativeModel(
        model.config, model.blocks, weights, context, dtype=model.dtype, parameter_bytes=bytes_of(weights)
    )


def bytes_of(weights: NativeWeights) -> int:
    """Of everything but norms, which take next to nothing."""
    assert weights.head is not None
    total = weights.head.embedding.nbytes + weights.head.lm_head.nbytes
    for attention in weights.attention:
        matrices = (attention.qkv, attention.out, attention.router)
        total += sum(matrix.nbytes for matrix in matrices if matrix is not None)
        total += sum(mlp.num_bytes for mlp in (attention.shared, attention.mlp) if mlp is not None)
    return total + sum(experts.num_bytes for experts in weights.experts.values())


def grouped(path: Path, config: ModelConfig) -> Model:
    """The torch model in float32 with weights that int8 in groups has rounded."""
    model = load_model(path, config, Blocks.whole(config), dtype=torch.float32, device="cpu")
    for attention in model.weights.attention:
        for weight in (attention.qkv, attention.out):
            round_in_groups(weight)
    for experts in model.weights.experts.values():
        round_in_groups(experts.w13)
        round_in_groups(experts.w2)
    return model


def round_in_groups(weight: torch.Tensor) -> None:
    """weight [..., K] becomes what int8 leaves of it, with a scale for each `GROUP` neighbours of a row."""
    groups = weight.view(*weight.shape[:-1], -1, GROUP)
    scales = groups.abs().amax(dim=-1, keepdim=True) / 127
    groups.copy_((groups / scales).round() * scales)


# ---- measuring


@torch.inference_mode()
def measure(models: dict[str, WorkerModel], text: torch.Tensor, tallies: dict[str, Tally]) -> None:
    """One subset through all models. text: [windows, LENGTH + 1] token ids; the last of a window is only predicted."""
    log_probs = {}
    for name, model in models.items():
        log_probs[name] = F.log_softmax(predict(model, text[:, :-1]).float(), dim=-1)
        baseline, ours, tally = log_probs[BASELINE], log_probs[name], tallies[name]
        targets = text[:, 1:].reshape(-1)
        tally.nats.append(float(F.nll_loss(ours, targets, reduction="sum")))
        tally.divergence.append(float(F.kl_div(ours, baseline, reduction="sum", log_target=True)))
        tally.agreed.append(float((ours.argmax(-1) == baseline.argmax(-1)).sum()))
        tally.tokens.append(len(targets))
        if name != BASELINE:
            del log_probs[name]


def predict(model: WorkerModel, tokens: torch.Tensor) -> torch.Tensor:
    """Logits [windows * length, V] of tokens [windows, length], each window a prompt."""
    forward, length = Forward(model, *tokens.shape), tokens.shape[1]
    logits = []
    for number, window in enumerate(tokens):
        rows = Rows(np.full(length, number), np.arange(length), True, number)
        logits.append(forward.step(window, rows, as_routed))
    return torch.cat(logits)


def as_routed(layer: int, rows: Rows, out: AttentionOutput) -> tuple[Int64Array, Float32Array]:
    """Every token gets the experts that the router chose."""
    assert out.topk_ids is not None and out.topk_weights is not None
    return out.topk_ids.numpy(), out.topk_weights.numpy()


# ---- report


def table(models: dict[str, WorkerModel], tallies: dict[str, Tally]) -> str:
    """The report, in Markdown."""
    tokens = sum(tallies[BASELINE].tokens)
    lines = [
        "# What int8 weights cost in quality, 2026-11-22",
        "",
        "    python -m benchmarks.quantization_quality",
        "",
        f"The built-in model on {tokens} held-out tokens, in windows of {LENGTH}, each a prompt. *Added* is the",
        "difference of the loss to bf16, in nats per token, with its standard error over subsets of the text.",
        "*Agreement* is the share of tokens after which both find the same next token most likely; *divergence* is",
        "KL(bf16 ‖ variant) in nats. float32 shows what bf16's own rounding makes of these figures: less is noise.",
        "",
        "| weights | MB | perplexity | added nats | agreement | divergence |",
        "|---|---|---|---|---|---|",
    ]
    for name, model in models.items():
        lines.append(f"| {name} | {model.parameter_bytes / 1e6:.1f} | {figures(tallies[name], tallies[BASELINE])} |")
    return "\n".join(lines) + "\n"


def figures(tally: Tally, baseline: Tally) -> str:
    """The cells of a row."""
    tokens = np.array(tally.tokens)
    added = (np.array(tally.nats) - np.array(baseline.nats)) / tokens
    error = float(added.std(ddof=1)) / math.sqrt(len(added)) if len(added) > 1 else math.nan
    cells = [f"{math.exp(sum(tally.nats) / tokens.sum()):.3f}"]
    cells.append("" if tally is baseline else f"{added.mean():+.5f} ± {error:.5f}")
    cells.append("" if tally is baseline else f"{sum(tally.agreed) / tokens.sum():.2%}")
    cells.append("" if tally is baseline else f"{sum(tally.divergence) / tokens.sum():.5f}")
    return " | ".join(cells)


if __name__ == "__main__":
    raise SystemExit(main())
