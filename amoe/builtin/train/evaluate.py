"""Measure a checkpoint: `python -m amoe.builtin.train.evaluate [--model DIR] [--report FILE.md]`.

Held-out perplexity against baselines, expert-load skew per layer, and whether the routers have specialised. Prints
Markdown; with `--report` writes it, and a heat map of the loads beside it.
"""

from __future__ import annotations

import argparse
import datetime
import math
import platform
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from amoe.builtin import builtin_model_path
from amoe.builtin.train import measure, report, specialisation
from amoe.builtin.train.batches import encode_documents
from amoe.builtin.train.checkpoint import Checkpoint, load_checkpoint
from amoe.builtin.train.completions import PROMPTS, complete
from amoe.builtin.train.corpus import Corpus, load_corpus
from amoe.builtin.train.measure import HeldOut, Reroute, Scores
from amoe.builtin.train.token_classes import CLASSES

CONTEXTS = (512, 1024, 2048)
MAIN_CONTEXT = 1024
HOT_EXPERTS = 4
ABLATION_EVERY = 4
BATCHES = (16, 64, 256)

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Split:
    """The scored positions of one part of the held-out text, and what was measured there."""

    name: str
    num_tokens: int
    num_bytes: int
    loss: float  # nats a token
    shares: Floats  # [L, E]
    floor: float  # max/mean of uniform routing on as many tokens


def main() -> None:
    """Parse arguments, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=None, help="checkpoint directory (default: the built-in model)")
    parser.add_argument("--report", type=Path, default=None, help="Markdown file to write; the heat map goes beside it")
    parser.add_argument(
        "--notes", type=Path, default=None, help="Markdown to put on top of the report (how it was trained)"
    )
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.compiler.set_stance("force_eager")  # every length is scored a few times only
    checkpoint = load_checkpoint(args.model or builtin_model_path())
    text, heat = evaluate(checkpoint, load_corpus(), args.notes.read_text(encoding="utf-8") if args.notes else "")
    print(text)
    if args.report is not None:
        args.report.parent.mkdir(parents=True, exist_ok=True)
        heat_path = args.report.with_suffix(".svg")
        heat_path.write_text(heat, encoding="utf-8")
        args.report.write_text(text.replace("HEATMAP", heat_path.name), encoding="utf-8")


def evaluate(checkpoint: Checkpoint, corpus: Corpus, notes: str) -> tuple[str, str]:
    """The report (Markdown) and the heat map (SVG)."""
    held_out = measure.join_held_out(checkpoint, corpus.held_out)
    by_context = {c: measure.score(checkpoint, held_out.tokens, c) for c in CONTEXTS}
    scores = by_context[MAIN_CONTEXT]
    splits = _splits(checkpoint, held_out, scores)
    train = encode_documents(checkpoint.tokenizer, corpus.train)
    unigram, bigram = measure.ngram_losses(train, held_out.tokens, checkpoint.config.vocab_size)
    all_bytes = sum(held_out.num_bytes)
    losses = {
        **{f"this model, context {c}": float(s.losses.mean()) for c, s in by_context.items()},
        "bigram of the training tokens": bigram,
        "unigram of the training tokens": unigram,
        "uniform": math.log(checkpoint.config.vocab_size),
    }
    num_scored = len(scores.losses)
    sections = [
        report.header(datetime.date.today().isoformat(), f"Python {platform.python_version()}", notes),
        report.perplexity(losses, num_scored, all_bytes, measure.compressed_bits_per_byte(corpus.held_out)),
        report.by_split([(s.name, s.num_tokens, s.num_bytes, s.loss) for s in splits]),
        _skew_section(checkpoint, scores, splits),
        _ablation_section(checkpoint, held_out, scores),
        _class_section(held_out, scores),
        _domain_section(checkpoint, held_out, scores, splits),
        report.completions([(prompt, complete(checkpoint, prompt)) for prompt in PROMPTS]),
    ]
    return "\n".join(sections), report.heatmap(
        [(s.name, s.shares) for s in splits], *_class_panel(checkpoint, held_out, scores)
    )


def _splits(checkpoint: Checkpoint, held_out: HeldOut, scores: Scores) -> list[Split]:
    """Code and prose. Routing counts for the split of the token that is routed, loss for that of the one predicted."""
    experts, k = checkpoint.config.num_experts, checkpoint.config.num_experts_per_tok
    result = []
    for name, prose in (("code (held-out modules)", False), ("prose (held-out language reference)", True)):
        routed, target = held_out.is_prose[:-1] == prose, held_out.is_prose[1:] == prose
        result.append(
            Split(
                name=name,
                num_tokens=int(target.sum()),
                num_bytes=held_out.num_bytes[prose],
                loss=float(scores.losses[target].mean()),
                shares=specialisation.load_shares(scores.topk_ids[:, routed], experts),
                floor=specialisation.uniform_floor(int(routed.sum()), k, experts, trials=20),
            )
        )
    return result


def _skew_section(checkpoint: Checkpoint, scores: Scores, splits: list[Split]) -> str:
    experts, k = checkpoint.config.num_experts, checkpoint.config.num_experts_per_tok
    overall = specialisation.load_shares(scores.topk_ids, experts)
    columns = {split.name: specialisation.max_over_mean(split.shares) for split in splits}
    columns["coldest expert / mean (all)"] = overall.min(axis=-1) * experts
    floors = [split.floor for split in splits]
    batches = {b: specialisation.batch_skew(scores.topk_ids, experts, b) for b in BATCHES}
    batch_floors = [specialisation.uniform_floor(b, k, experts) for b in BATCHES]
    return report.skew(columns, floors, batches, batch_floors)


def _ablation_section(checkpoint: Checkpoint, held_out: HeldOut, scores: Scores) -> str:
    """Loss where something else than the trained router chooses, in all layers at once and one layer at a time."""
    config = checkpoint.config
    k, layers, experts = config.num_experts_per_tok, config.num_hidden_layers, config.num_experts
    shares = specialisation.load_shares(scores.topk_ids, experts)
    variants: dict[str, Reroute] = {
        "router's choices 3 and 4": measure.next_best_experts(k),
        "the layer's two most loaded experts, always": measure.most_loaded_experts(shares, k),
        "two experts at random": measure.random_experts(experts, k, seed=1),
        "experts shuffled behind the router": measure.shuffled_experts(layers, experts, k, seed=1),
    }
    rows = {name: _loss(checkpoint, held_out, reroute) for name, reroute in variants.items()}
    single = []
    for layer in range(layers):
        reroute = measure.only_in_layer(measure.random_experts(experts, k, seed=2), layer, k)
        single.append(_loss(checkpoint, held_out, reroute))
    return report.ablations(_loss(checkpoint, held_out, None), rows, single)


def _loss(checkpoint: Checkpoint, held_out: HeldOut, reroute: Reroute | None) -> float:
    """Mean nats a token on a quarter of the windows: enough to tell the variants apart."""
    scores = measure.score(checkpoint, held_out.tokens, MAIN_CONTEXT, reroute, every=ABLATION_EVERY)
    return float(scores.losses.mean())


def _class_section(held_out: HeldOut, scores: Scores) -> str:
    """NMI of expert and class of the routed token; and of the token to be predicted, which no router can look up."""
    code = ~held_out.is_prose[:-1]
    ids = scores.topk_ids[:, code]
    of_token, control = specialisation.nmi_by_layer(ids, held_out.classes[:-1][code])
    of_next, next_control = specialisation.nmi_by_layer(ids, held_out.classes[1:][code])
    return report.classes(of_token, control, of_next, next_control)


def _domain_section(checkpoint: Checkpoint, held_out: HeldOut, scores: Scores, splits: list[Split]) -> str:
    """Hot sets of code against prose; control: the two halves of the code (different modules, same domain)."""
    experts = checkpoint.config.num_experts
    code = np.flatnonzero(~held_out.is_prose[:-1])
    halves = [specialisation.load_shares(scores.topk_ids[:, part], experts) for part in np.array_split(code, 2)]
    jaccard = specialisation.hot_set_jaccard(splits[0].shares, splits[1].shares, HOT_EXPERTS)
    jaccard_control = specialisation.hot_set_jaccard(halves[0], halves[1], HOT_EXPERTS)
    moved = specialisation.total_variation(splits[0].shares, splits[1].shares)
    moved_control = specialisation.total_variation(halves[0], halves[1])
    return report.domains(HOT_EXPERTS, jaccard, jaccard_control, moved, moved_control)


def _class_panel(checkpoint: Checkpoint, held_out: HeldOut, scores: Scores) -> tuple[int, Floats, tuple[str, ...]]:
    """The layer whose experts tell most about the token's class, and its load by class."""
    nmi, _ = specialisation.nmi_by_layer(scores.topk_ids, held_out.classes[:-1])
    layer = int(nmi.argmax())
    shares = specialisation.class_shares(
        scores.topk_ids, held_out.classes[:-1], len(CLASSES), checkpoint.config.num_experts
    )
    return layer, shares[layer], CLASSES


if __name__ == "__main__":
    main()
