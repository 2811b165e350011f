"""The experts of one layer on the pairs of a batch: gate, up, SiLU, down, weight, sum per token.

Shape letters: n tokens, P pairs, E experts at this worker, H hidden size, I intermediate size of an expert.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from amoe.kernels.permute import PairPlan


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
    if views is None:
        views = expert_views(w13, w2)
    device, num_pairs = hidden.device, plan.num_pairs
    inputs = hidden.index_select(0, torch.from_numpy(plan.token_rows).to(device, non_blocking=True))
    gate_up = hidden.new_empty((num_pairs, w13.shape[1]))
    for expert, rows, out in zip(plan.experts, inputs.split(plan.counts), gate_up.split(plan.counts), strict=True):
        torch.mm(rows, views.w13[expert], out=out)
    gate, up = gate_up.chunk(2, dim=1)
    activated = F.silu(gate).mul_(up)
    outputs = inputs  # its rows have been read: the outputs take their place
    for expert, rows, out in zip(plan.experts, activated.split(plan.counts), outputs.split(plan.counts), strict=True):
        torch.mm(rows, views.w2[expert], out=out)
    # A bag per token is a gather, a weighting and a sum in one pass. It would weigh bfloat16 rows in bfloat16.
    summed = torch.embedding_bag(
        outputs.float(),
        torch.from_numpy(plan.pair_positions).to(device, non_blocking=True),
        torch.from_numpy(plan.token_offsets).to(device, non_blocking=True),
        False,
        0,  # sum
        False,
        torch.from_numpy(plan.pair_weights).to(device, non_blocking=True),
    )[0]
    return summed.to(hidden.dtype)


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
