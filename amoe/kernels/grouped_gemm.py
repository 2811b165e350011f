"""The experts of one layer on the pairs of a batch: gate, up, SiLU, down, weight, sum per token.

Shape letters: n tokens, P pairs, E experts at this worker, H hidden size, I intermediate size of an expert.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy.typing as npt
import torch
import torch.nn.functional as F

from amoe.kernels.permute import PairPlan

_MAX_PADDED_ROWS = 16


class ExpertViews(NamedTuple):
    """The stacked weights as one matrix per expert, transposed for `x @ w`. Made once: a view costs a microsecond."""

    w13: list[torch.Tensor]  # each [H, 2I]
    w2: list[torch.Tensor]  # each [I, H]


def expert_views(w13: torch.Tensor, w2: torch.Tensor) -> ExpertViews:
    """Views of w13 [E, 2I, H] and w2 [E, H, I]."""
    return ExpertViews(list(w13.transpose(1, 2).unbind(0)), list(w2.transpose(1, 2).unbind(0)))


def grouped_experts(
    hidden: torch.Tensor, plan: PairPlan, w13: torch.Tensor, w2: torch.Tensor, views: ExpertViews | None = None
) -> torch.Tensor:
    """Weighted sum over this worker's experts, for every token.

    A pair's weight multiplies after the down projection, as in the Hugging Face models; a token's pairs are summed in
    float32 in the order of its k, so neither the batch nor the order of arrival changes the order of the sum.

    Args:
        hidden: [n, H] MoE inputs.
        plan: the pairs, see `plan_pairs`; `plan.num_tokens` is n.
        w13: [E, 2I, H] gate rows, then up rows.
        w2: [E, H, I] down projections.
        views: of w13 and w2, where the caller keeps them.

    Returns:
        [n, H] in the dtype of `hidden`; zero for a token without a pair here.
    """
    if plan.num_pairs == 0:
        return torch.zeros_like(hidden)
    device = hidden.device
    if _padding_pays(plan, w13):
        rows_of_expert = max(plan.counts)
        token_rows, pair_positions = plan.padded(len(w13), rows_of_expert)
        outputs = _padded(hidden.index_select(0, _to(token_rows, device)), w13, w2)
    else:
        pair_positions = plan.pair_positions
        inputs = hidden.index_select(0, _to(plan.token_rows, device))
        outputs = _one_by_one(inputs, plan, views or expert_views(w13, w2))
    # A bag per token is a gather, a weighting and a sum in one pass. It would weigh bfloat16 rows in bfloat16.
    bags = _to(pair_positions, device), _to(plan.token_offsets, device)
    summed = torch.embedding_bag(outputs.float(), *bags, False, 0, False, _to(plan.pair_weights, device))[0]
    return summed.to(hidden.dtype)


def _to(array: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    return torch.from_numpy(array).to(device, non_blocking=True)


def _padding_pays(plan: PairPlan, w13: torch.Tensor) -> bool:
    """Whether one batched product over all experts, padded to the fullest, is cheaper than two calls for each present.

    A small product is mostly overhead on a GPU (the launch) and in bfloat16 on a CPU (16 experts of 256 x 192 with 32
    pairs: 555 µs one by one, 235 padded), but not in float32 on a CPU (314 and 1100). Padding must not multiply work
    that counts either, nor read the weights of many experts that have no pair.
    """
    if w13.dtype == torch.float32 and w13.device.type == "cpu":
        return False
    num_experts, fullest = len(w13), max(plan.counts)
    few_rows = fullest <= _MAX_PADDED_ROWS and num_experts * fullest <= 4 * plan.num_pairs
    return few_rows and 4 * len(plan.experts) >= 3 * num_experts


def _padded(inputs: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor) -> torch.Tensor:
    """inputs [E * m, H], m rows for each expert, to [E * m, H]."""
    gate_up = torch.bmm(inputs.view(len(w13), -1, inputs.shape[1]), w13.transpose(1, 2))
    return torch.bmm(_activate(gate_up), w2.transpose(1, 2)).view(inputs.shape)


def _one_by_one(inputs: torch.Tensor, plan: PairPlan, views: ExpertViews) -> torch.Tensor:
    """inputs [P, H] in sorted order to [P, H]; `inputs` is overwritten."""
    gate_up = inputs.new_empty((len(inputs), views.w13[0].shape[1]))
    for expert, rows, out in zip(plan.experts, inputs.split(plan.counts), gate_up.split(plan.counts), strict=True):
        torch.mm(rows, views.w13[expert], out=out)
    activated = _activate(gate_up)
    outputs = inputs  # its rows have been read: the outputs take their place
    for expert, rows, out in zip(plan.experts, activated.split(plan.counts), outputs.split(plan.counts), strict=True):
        torch.mm(rows, views.w2[expert], out=out)
    return outputs


def _activate(gate_up: torch.Tensor) -> torch.Tensor:
    """[..., 2I] to [..., I]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def grouped_experts_reference(
    hidden: torch.Tensor, plan: PairPlan, w13: torch.Tensor, w2: torch.Tensor
) -> torch.Tensor:
    """`grouped_experts`, one pair after the other in float32: its oracle."""
    expert_of_position = [expert for expert, count in zip(plan.experts, plan.counts, strict=True) for _ in range(count)]
    summed = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
    for position, weight in zip(plan.pair_positions.tolist(), plan.pair_weights.tolist(), strict=True):
        expert, row = expert_of_position[position], int(plan.token_rows[position])
        gate, up = (w13[expert].float() @ hidden[row].float()).chunk(2)
        summed[row] += weight * (w2[expert].float() @ (gate / (1 + torch.exp(-gate)) * up))
    return summed.to(hidden.dtype)
