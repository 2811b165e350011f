"""Which block a worker runs next: pure functions of queue statistics and `now`.

Blocks are numbered `lane·S + stage`, S = 2L + 1 stages of a model of L layers: attention(l) is stage 2l, experts(l) is
2l + 1, head is 2L. Lanes are waves; most schedules have one. A token's progress key is κ = S·iteration + stage: it
grows with every block that the token passes.

The async schedules differ in the order in which they serve the ready blocks:

    fcfs      the block with the oldest token
    flfs      first layer first
    mtfs      most tokens first
    defrag    most tokens, own and soon to come: Algorithm 1 of AMoE (arXiv 2505.08944)
    progress  the block that holds the token with the least progress

`waves` lets whole waves of tokens march through the model. What is ready is decided by `amoe.core.waves`; the order is
that of `progress` with a handicap: see `amoe.policy.wave_order`. `lockstep` is the barrier baseline: what is ready is
decided by `amoe.core.lockstep`, and of the micro-batches that are ready the one that has come least far runs. A block
is always drained whole.

Bounds on waiting: a block of `waves` that waits for tokens elsewhere is ready all the same once its own have waited
`max_hold_s` (`expired`). Greedy orders (flfs, mtfs, defrag) can starve a block for ever, so `choose_block` overrides
any policy for a block whose oldest token has waited `max_wait_s`. Under that override blocks are served oldest first,
so with B blocks and steps of at most t seconds no token waits longer than max_wait_s + B·t, in `waves` max_hold_s more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from amoe.config import SchedulerConfig
from amoe.types import BoolArray, Int64Array

Float64Array = npt.NDArray[np.float64]
NEVER = np.iinfo(np.int64).max


@dataclass(frozen=True, slots=True)
class QueueView:
    """What a policy sees: one entry per block, in the order of block numbers.

    Attributes:
        ready: [B] the block may run (in async schedules: its μ-queue holds a token).
        depth: [B] tokens.
        oldest: [B] arrival time of the oldest token in seconds; +inf if empty.
        min_kappa: [B] least progress key of its tokens; `NEVER` if empty.
    """

    ready: BoolArray
    depth: Int64Array
    oldest: Float64Array
    min_kappa: Int64Array


Policy = Callable[[QueueView], int]


def num_stages(num_layers: int) -> int:
    """S = 2L + 1."""
    return 2 * num_layers + 1


def fcfs(view: QueueView) -> int:
    """The ready block whose oldest token came first."""
    return int(np.where(view.ready, view.oldest, np.inf).argmin())


def flfs(view: QueueView) -> int:
    """The ready block with the lowest number."""
    return int(view.ready.argmax())


def mtfs(view: QueueView) -> int:
    """The ready block with the most tokens; the lower one of equals."""
    return int(np.where(view.ready, view.depth, -1).argmax())


def progress(view: QueueView) -> int:
    """The ready block with the least progress key. A key belongs to one stage only, so there are no ties in a wave."""
    return int(np.where(view.ready, view.min_kappa, NEVER).argmin())


def expired(oldest: Float64Array, now: float, max_hold_s: float) -> BoolArray:
    """[B] the block's oldest token has waited long enough for others."""
    return oldest + max_hold_s <= now


def lookahead_matrix(num_layers: int, num_waves: int, decay: float, lookahead: int) -> Float64Array:
    """Weights [B, B] of Algorithm 1's look-ahead: entry (b, b') is Σ δ^k over the k in 1..K that lead from b to b'.

    Queues of one kind form a ring, as in the paper: attention(0), ..., attention(L-1), head, and again attention(0);
    and experts(0), ..., experts(L-1). The paper divides by the number of queues of a layer; a μ-queue of ours holds
    all experts of a layer that live here, so that number is one.
    """
    stages = num_stages(num_layers)
    matrix = np.zeros((num_waves * stages, num_waves * stages))
    for wave in range(num_waves):
        attention_ring = [*range(0, 2 * num_layers, 2), 2 * num_layers]
        experts_ring = list(range(1, 2 * num_layers, 2))
        for ring in (attention_ring, experts_ring):
            for position, stage in enumerate(ring):
                for k in range(1, lookahead + 1):
                    later = ring[(position + k) % len(ring)]
                    matrix[wave * stages + stage, wave * stages + later] += decay**k
    return matrix


def defrag(view: QueueView, lookahead: Float64Array) -> int:
    """Algorithm 1 of AMoE: the ready block with the largest own depth plus decayed depth downstream."""
    score = view.depth + lookahead @ view.depth
    return int(np.where(view.ready, score, -1.0).argmax())


def make_policy(config: SchedulerConfig, num_layers: int) -> Policy:
    """The policy that `config.schedule` names."""
    if config.schedule == "defrag":
        matrix = lookahead_matrix(num_layers, config.num_lanes, config.defrag_decay, config.defrag_lookahead)
        return lambda view: defrag(view, matrix)
    simple: dict[str, Policy] = {
        "fcfs": fcfs,
        "flfs": flfs,
        "mtfs": mtfs,
        "progress": progress,
        "waves": progress,  # of keys with the handicaps of `wave_order`
        "lockstep": progress,
    }
    return simple[config.schedule]


def choose_block(policy: Policy, view: QueueView, now: float, max_wait_s: float) -> int | None:
    """Number of the block to run, or None if none is ready.

    A ready block whose oldest token has waited longer than `max_wait_s` goes first, the oldest of them before all.
    """
    if not view.ready.any():
        return None
    oldest = fcfs(view)
    if view.ready[oldest] and now - view.oldest[oldest] > max_wait_s:
        return oldest
    return policy(view)
