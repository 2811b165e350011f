"""Which answers rounding cannot change.

A worker that dies changes how many tokens run together, and so the last bits of what a matrix product gives: enough to
turn a choice between two experts, or two tokens, that are equal but for those bits. Such an answer says nothing about
what was lost or repeated. So a load is made of requests of which every choice is clear: transformers, which reads the
whole answer at once, says by how much.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from amoe.engine.sampler_reference import uniform_reference
from benchmarks.chaos.streams import Answer, Load
from tests.checkpoints import hf_model

CLEAR = 1e-4  # in logits: rounding moved them by 1.3e-5 at most
CLEAR_DRAW = 1e-5  # in probability, of a token that is drawn: what the same rounding can do to it, four times over
_CHUNK = 32  # sequences that are read at once


def clear_requests(model: Path, load: Load, answers: Sequence[Answer]) -> tuple[Load, list[Answer]]:
    """The requests of `load` whose undisturbed `answers` could not have been others by rounding, and their answers.

    Raises:
        AssertionError: an answer has a token that is clearly not the one that transformers would choose.
    """
    for answer in answers:
        assert not (complaint := answer.complaint(load.max_tokens)), complaint
    keep: list[int] = []
    for start in range(0, len(answers), _CHUNK):
        numbers = range(start, min(start + _CHUNK, len(answers)))
        texts = [load.bodies[n]["prompt"] + answers[n].token_ids for n in numbers]
        logits, are_clear = _read(model, texts)
        keep += [n for n in numbers if are_clear[n - start] and _chosen(load.bodies[n], answers[n], logits[n - start])]
    return replace(load, bodies=tuple(load.bodies[n] for n in keep)), [answers[n] for n in keep]


def _read(model: Path, texts: Sequence[list[int]]) -> tuple[torch.Tensor, list[bool]]:
    """Logits [len(texts), T, V] of whole sequences, filled up to T tokens behind their ends; and whether the routers'
    choices are clear in each."""
    network, length = hf_model(model), max(map(len, texts))
    rows = torch.tensor([text + [0] * (length - len(text)) for text in texts])  # nobody looks at what is behind him
    with torch.inference_mode():
        out = network(input_ids=rows, output_router_logits=True)
    top_k = network.config.num_experts_per_tok
    least = torch.full(rows.shape, torch.inf)
    for router in out.router_logits:
        best = router.float().topk(top_k + 1, dim=-1).values.view(*rows.shape, top_k + 1)
        least = torch.minimum(least, best[..., -2] - best[..., -1])
    return out.logits.float(), [bool(least[n, : len(text)].min() > CLEAR) for n, text in enumerate(texts)]


def _chosen(body: dict[str, Any], answer: Answer, logits: torch.Tensor) -> bool:
    """Whether each token was a clear choice.

    Args:
        logits: [T, V] of prompt and answer.
    """
    prompt, token_ids = body["prompt"], answer.token_ids
    rows = logits[len(prompt) - 1 : len(prompt) + len(token_ids) - 1]
    rows = _penalised(rows, prompt, token_ids, body.get("repetition_penalty", 1.0))
    if "seed" in body:
        uniforms = [uniform_reference(body["seed"], step) for step in range(len(token_ids))]
        tokens, are_clear = _drawn(rows, body["temperature"], torch.tensor(uniforms, dtype=torch.float64))
    else:
        best = rows.topk(2)
        tokens, are_clear = best.indices[:, 0], best.values[:, 0] - best.values[:, 1] > CLEAR
    if not are_clear.all():
        return False
    assert tokens.tolist() == token_ids, f"transformers says {tokens.tolist()}, not {token_ids}"
    return True


def _penalised(logits: torch.Tensor, prompt: list[int], token_ids: list[int], penalty: float) -> torch.Tensor:
    """[T, V] logits of each step, what has been said before made less likely."""
    seen = torch.zeros_like(logits, dtype=torch.bool)
    seen[:, prompt] = True
    for step, token in enumerate(token_ids[:-1]):
        seen[step + 1 :, token] = True
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def _drawn(logits: torch.Tensor, temperature: float, uniforms: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[T] the tokens that random numbers [T] in [0, 1) draw, and which of them are far from drawing another one."""
    edges = torch.softmax(logits.double() / temperature, dim=-1).cumsum(-1)
    return (edges <= uniforms[:, None]).sum(-1), (edges[:, :-1] - uniforms[:, None]).abs().amin(-1) > CLEAR_DRAW
