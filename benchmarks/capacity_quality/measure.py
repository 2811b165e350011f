"""Loss and accuracy under a capacity: prompts as prefill, then their continuations decoded, teacher-forced."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, get_args

import numpy as np
import torch
import torch.nn.functional as F

from amoe.builtin import builtin_model_path
from amoe.config import CapacityConfig, CapacityPhase
from amoe.models import reference
from amoe.models.config import load_model_config
from amoe.models.loader import load_model
from amoe.models.model import Blocks, Model
from benchmarks.capacity_quality.capping import Batching, Capping, Tally
from benchmarks.capacity_quality.forward import Forward, Rows
from benchmarks.capacity_quality.text import held_out_subsets

WINDOWS = 64  # of a subset
PHASES: tuple[CapacityPhase, ...] = ("prefill", "both")


class Scores(NamedTuple):
    """Of one part (prompt or continuation) of one subset.

    Attributes:
        nats: mean loss per predicted token.
        accuracy: share of tokens that were the most likely.
        tally: what capacity did to the part's own tokens.
    """

    nats: float
    accuracy: float
    tally: Tally


class Outcome(NamedTuple):
    """Of one subset in one phase."""

    prompt: Scores
    continuation: Scores


@dataclass(frozen=True)
class Comparison:
    """Perplexity of the continuations (or of the prompts, if so asked) without and with capacity.

    Attributes:
        standard_error: of the difference of the two losses in nats per token, over subsets of the text.
    """

    dropless: float
    capped: float
    standard_error: float

    @property
    def added_nats(self) -> float:
        return math.log(self.capped / self.dropless)


def compare(
    capacity: CapacityConfig,
    *,
    batching: Batching | None = None,
    model_path: Path | None = None,
    dtype: torch.dtype = torch.float32,
    subsets: int = 4,
    part: str = "continuation",
) -> Comparison:
    """The quality that one setting costs, next to the same text without it: for benchmarks of speed.

    Args:
        batching: how many tokens meet in a micro-batch; take those of the engine that was timed.
        model_path: of a checkpoint that shares the built-in model's tokenizer and text.
        subsets: of 64 windows each; a minute of two cores is enough for about 15.
        part: `continuation` or `prompt`.

    Raises:
        ValueError: for a cap on waiting, which no pass without an engine knows.
    """
    if capacity.slack_s is not None:
        raise ValueError("quality under --capacity-slack depends on waiting: it can only be had from a running engine")
    path, batching = model_path or builtin_model_path(), batching or Batching()
    model = load(path, dtype)
    texts = held_out_subsets(path, batching.prompt + batching.continuation + 1, WINDOWS, subsets)
    nats: list[list[float]] = []
    for config in (CapacityConfig(), capacity):
        outcomes = [run_subset(model, text, config, batching, (config.phase,))[config.phase] for text in texts]
        nats.append([getattr(outcome, part).nats for outcome in outcomes])
    added = np.subtract(nats[1], nats[0])
    error = float(added.std(ddof=1) / math.sqrt(len(added))) if len(added) > 1 else math.nan
    return Comparison(math.exp(np.mean(nats[0])), math.exp(np.mean(nats[1])), error)


def load(path: Path, dtype: torch.dtype = torch.float32, top_k: int | None = None) -> Model:
    """All blocks of a checkpoint, on the CPU; with another top-k than its own, if so asked."""
    config = load_model_config(path)
    config = config if top_k is None else replace(config, top_k=top_k)
    return load_model(path, config, Blocks.whole(config), dtype=dtype, device="cpu")


@torch.inference_mode()
def run_subset(
    model: Model,
    text: torch.Tensor,
    capacity: CapacityConfig,
    batching: Batching,
    phases: Sequence[CapacityPhase] = PHASES,
) -> dict[CapacityPhase, Outcome]:
    """Outcomes by phase (`capacity.phase` is not looked at). Phases that cap the prompts share one pass over them.

    Args:
        text: [windows, prompt + continuation + 1] token ids; the last of a window is only predicted.
    """
    assert all(phase in get_args(CapacityPhase) for phase in phases)
    outcomes: dict[CapacityPhase, Outcome] = {}
    for capped_prompt in sorted({phase != "decode" for phase in phases}):
        forward = Forward(model, len(text), text.shape[1])
        prompt = _part(forward, text, capacity, batching, active=capped_prompt, prefill=True)
        for phase in phases:
            if (phase != "decode") == capped_prompt:
                active = phase != "prefill"
                rest = _part(forward, text, capacity, batching, active=active, prefill=False)
                outcomes[phase] = Outcome(prompt, rest)
    return outcomes


def _part(
    forward: Forward, text: torch.Tensor, capacity: CapacityConfig, batching: Batching, *, active: bool, prefill: bool
) -> Scores:
    """The prompts, or the continuations: capped ones token by token, others, which no batch changes, as chunks."""
    capping = Capping(forward.model.config, capacity, batching, active=active)
    first, count = (0, batching.prompt) if prefill else (batching.prompt, batching.continuation)
    if prefill or not active:
        batches = _chunks(len(text), first, count, batching.prefill)
    else:
        batches = _decodes(len(text), first, count, batching.decode)
    loss, hits = 0.0, 0
    for rows in batches:
        sequences = torch.from_numpy(rows.sequences)
        tokens, targets = (text[sequences, torch.from_numpy(rows.positions + shift)] for shift in (0, 1))
        logits = forward.step(tokens, rows, capping)
        loss += float(F.cross_entropy(logits, targets, reduction="sum"))
        hits += int((logits.argmax(dim=1) == targets).sum())
    predicted = len(text) * count
    return Scores(loss / predicted, hits / predicted, capping.tally)


def _chunks(windows: int, first: int, count: int, size: int) -> Iterator[Rows]:
    """`count` positions from `first` of one sequence after the other, cut into micro-batches."""
    flat = np.arange(windows * count)
    for number, start in enumerate(range(0, len(flat), size)):
        part = flat[start : start + size]
        yield Rows(part // count, first + part % count, True, number)


def _decodes(windows: int, first: int, count: int, size: int) -> Iterator[Rows]:
    """One position of up to `size` sequences at a time."""
    places = itertools.product(range(first, first + count), range(0, windows, size))
    for number, (position, start) in enumerate(places):
        sequences = np.arange(start, min(start + size, windows))
        yield Rows(sequences, np.full(len(sequences), position), False, number)


@torch.inference_mode()
def difference_to_reference(model: Model, text: torch.Tensor, batching: Batching) -> float:
    """Largest difference of a logit between the dropless path, prefill and decode, and the slow reference forward."""
    forward = Forward(model, len(text), text.shape[1])
    capping = Capping(model.config, CapacityConfig(), batching, active=False)
    expected = torch.stack([reference.forward(model, window.tolist()) for window in text])
    largest = 0.0
    passes = (
        _chunks(len(text), 0, batching.prompt, batching.prefill),
        _decodes(len(text), batching.prompt, batching.continuation, batching.decode),
    )
    for rows in (rows for batches in passes for rows in batches):
        at = torch.from_numpy(rows.sequences), torch.from_numpy(rows.positions)
        largest = max(largest, float((forward.step(text[at], rows, capping) - expected[at]).abs().max()))
    return largest
