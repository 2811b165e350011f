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


def clear_requests(model: Path, load: Load, answers: Sequence[Answer]) -> tuple[Load, list[Answer]]:
    """The requests of `load` whose undisturbed `answers` could not have been others by rounding, and their answers.

    Raises:
        AssertionError: an answer has a token that is clearly not the one that transformers would choose.
    """
    keep = []
    for number, (body, answer) in enumerate(zip(load.bodies, answers, strict=True)):
        assert not (complaint := answer.complaint(load.max_tokens)), complaint
        if _is_clear(model, body, answer.token_ids, number):
            keep.append(number)
    return replace(load, bodies=tuple(load.bodies[n] for n in keep)), [answers[n] for n in keep]


def _is_clear(model: Path, body: dict[str, Any], token_ids: list[int], number: int) -> bool:
    """Experts and tokens."""
    prompt: list[int] = body["prompt"]
    top_k = hf_model(model).config.num_experts_per_tok
    with torch.inference_mode():
        out = hf_model(model)(input_ids=torch.tensor([prompt + token_ids]), output_router_logits=True)
    for router in out.router_logits:
        best = router.float().topk(top_k + 1, dim=-1).values
        if float((best[:, -2] - best[:, -1]).min()) < CLEAR:
            return False
    logits = _penalised(
        out.logits[0, len(prompt) - 1 : -1].float(), prompt, token_ids, body.get("repetition_penalty", 1.0)
    )
    if "seed" in body:
        uniforms = [uniform_reference(body["seed"], step) for step in range(len(token_ids))]
        tokens, are_clear = _drawn(logits, body["temperature"], torch.tensor(uniforms, dtype=torch.float64))
    else:
        best = logits.topk(2)
        tokens, are_clear = best.indices[:, 0], best.values[:, 0] - best.values[:, 1] > CLEAR
    if not are_clear.all():
        return False
    assert tokens.tolist() == token_ids, f"request {number}: {token_ids}, not {tokens.tolist()}"
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
