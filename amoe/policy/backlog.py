"""Capacity without a barrier: a pair is touched only where its worker would keep the token waiting. Pure functions.

*Ours*; Capacity-Aware Inference (arXiv 2503.05066) counts pairs of a batch, because behind a barrier the fullest expert
of the batch sets the pace. Without a barrier max N_i bounds nothing: an expert over its share at an idle worker costs
nobody anything, one under it at a busy worker may. So capacity is measured in seconds of backlog here:

- Expert workers tell with every answer how many seconds of work wait there, and what a row more costs. A home lets what
  it was told run down with the clock and adds what it has sent since (`expected_waits`).
- A token waits for the *last* of its answers (the join). So only its latest worker is looked at, and its pairs there
  are touched only if that worker would answer more than the slack after the next latest: dropping anything else gains
  nothing. If that one is relieved, the next one is the latest, and so on.
- The rows of one batch at one worker are computed together. The heaviest (by router score) stay, as many as end within
  the slack; what lies behind is touched. So a skewed batch is cut as the paper's capacity cuts it, but only where the
  worker is late, and by as much as it is late.
- First of all a pair moves to another replica of its expert, where that answers earlier: it changes nothing but time.
- Nothing is known of a worker yet, or any more: nothing is touched on its account. A worker that has been late stays
  late until it is within half the slack (`hysteresis`), or homes would switch back and forth. Whoever is rerouted goes
  to the less busy of two experts drawn at random, so that homes which know the same do not all choose the same.

Shape letters: n tokens, K experts per token, E experts, R replicas, D expert workers ("owners").
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from amoe.policy.capacity import RoutedBatch
from amoe.policy.matching import FloatArray, match_best
from amoe.types import BoolArray, Float32Array, Int16Array, Int64Array

_MANY_ROWS = 2**31


@dataclass(frozen=True, slots=True)
class OwnerWaits:
    """What a home expects of the expert workers, all [D].

    Attributes:
        wait_s: seconds until a row that is sent now would be begun with.
        row_s: seconds that each row adds.
        is_known: there is recent telemetry.
        slack_s: seconds after the others' answers that are tolerated.
    """

    wait_s: FloatArray
    row_s: FloatArray
    is_known: BoolArray
    slack_s: FloatArray


def expected_waits(
    backlog_s: FloatArray, reported_at: FloatArray, rows_since: Int64Array, row_s: FloatArray, now: float
) -> FloatArray:
    """[D] seconds of work before a row that is sent now: what was reported, less what has passed, plus what is new."""
    return np.maximum(0.0, backlog_s - (now - reported_at)) + rows_since * row_s


def hysteresis(was_late: BoolArray, ends: FloatArray, is_known: BoolArray, slack_s: float) -> BoolArray:
    """[D] whether a worker is late: by more than the slack beyond the median of the others that are known; once late,
    by more than half of it.

    Args:
        ends: [D] seconds until each would be through with all that it gets.
    """
    late = np.zeros_like(was_late)
    known = np.flatnonzero(is_known)
    if len(known) < 2:
        return late
    excess = ends[known] - medians_of_others(ends[known])
    late[known] = excess > np.where(was_late[known], slack_s / 2, slack_s)
    return late


def medians_of_others(values: FloatArray) -> FloatArray:
    """[m] the median of `values` [m] without each of them, m >= 2."""
    order = np.argsort(values, kind="stable")
    place = np.empty(len(values), np.int64)
    place[order] = np.arange(len(values))
    in_order, below, above = values[order], (len(values) - 2) // 2, (len(values) - 1) // 2
    # Whoever stands at or before an index moves it on by one.
    return (in_order[below + (place <= below)] + in_order[above + (place <= above)]) / 2


def receivers(owners: Int16Array, num_owners: int) -> BoolArray:
    """[n, D] expert workers to which pairs of the tokens go; `owners` [n, K], -1 where there is no pair."""
    table = np.zeros((len(owners), num_owners + 1), np.bool_)
    np.put_along_axis(table, owners.astype(np.int64) % (num_owners + 1), values=True, axis=1)
    return table[:, :num_owners]


def ends_of(goes: BoolArray, waits: OwnerWaits) -> FloatArray:
    """[D] seconds until each worker would have answered, if it got all rows of `goes` [n, D]."""
    return waits.wait_s + goes.sum(axis=0) * waits.row_s


def move_to_replicas(
    batch: RoutedBatch, owners: Int16Array, replicas: Int16Array, waits: OwnerWaits, late: BoolArray
) -> Int16Array:
    """[n, K] owners, where pairs of late workers have moved to a replica that answers earlier: lossless.

    The lightest pairs move first, and so many that the two workers end at about the same time. Pairs of exact requests
    move as well: the same expert computes them.

    Args:
        replicas: [E, R] owners of each expert's replicas, -1 where there is none.
        late: [D].
    """
    moved = owners.copy()
    for owner in np.flatnonzero(late).tolist():
        ends = ends_of(receivers(moved, len(late)), waits)
        rows, columns = np.nonzero(moved == owner)
        places = replicas[batch.topk_ids[rows, columns]]
        usable = (places >= 0) & (places != owner) & waits.is_known[places]
        soonest = np.where(usable, ends[places], np.inf)
        best = soonest.argmin(axis=1)[:, None]
        targets = np.take_along_axis(places, best, axis=1)[:, 0]
        lightest = np.argsort(batch.topk_scores[rows, columns], kind="stable")
        better = np.take_along_axis(soonest, best, axis=1)[:, 0] < ends[owner]
        for target in np.unique(targets[better]).tolist():
            mine = lightest[(targets == target)[lightest] & better[lightest]]
            count = int((ends[owner] - ends[target]) / (waits.row_s[owner] + waits.row_s[target] + 1e-12))
            moved[rows[mine[:count]], columns[mine[:count]]] = target
            ends[owner] -= min(count, len(mine)) * waits.row_s[owner]
    return moved


def late_pairs(
    batch: RoutedBatch, owners: Int16Array, waits: OwnerWaits, late: BoolArray, *, keep_best: bool = True
) -> BoolArray:
    """[n, K] pairs for which the join would wait longer than the slack.

    Args:
        owners: [n, K] who would compute each pair.
        late: [D] see `hysteresis`.
        keep_best: the worker of a token's best pair is never relieved of the token.
    """
    num_owners = len(late)
    goes = receivers(owners, num_owners)
    ends = ends_of(goes, waits)
    blocked = ~batch.droppable | (goes & ~waits.is_known).any(axis=1)
    lost = np.zeros(owners.shape, np.bool_)
    order = np.argsort(-ends, kind="stable")
    for place, owner in enumerate(order.tolist()):
        there = goes[:, owner]
        if late[owner] and there.any():
            others = np.where(goes[:, order[place + 1 :]], ends[order[place + 1 :]], -np.inf)
            next_latest = others.max(axis=1, initial=-np.inf)
            relievable = there & ~blocked & np.isfinite(next_latest)
            if keep_best:
                relievable &= owners[:, 0] != owner
            weight = np.where(owners == owner, batch.topk_scores, 0).sum(axis=1)
            ended = _ends_in_order(there, relievable, weight, batch.drop_first, waits, owner)
            relieved = relievable & (ended - next_latest > waits.slack_s[owner])
            lost |= relieved[:, None] & (owners == owner)
            there = there & ~relieved
        blocked |= there
    return lost


def _ends_in_order(
    there: BoolArray,
    relievable: BoolArray,
    weight: FloatArray,
    drop_first: BoolArray | None,
    waits: OwnerWaits,
    owner: int,
) -> FloatArray:
    """[n] seconds until the worker is through with a token and those before it: who stays anyway, then by weight."""
    late_ones = np.zeros(len(there), np.bool_) if drop_first is None else drop_first
    order = np.lexsort((-weight, late_ones, relievable, ~there))
    position = np.empty(len(there))
    position[order] = np.arange(1, len(there) + 1)
    return waits.wait_s[owner] + position * waits.row_s[owner]


def two_choices(
    batch: RoutedBatch,
    lost: BoolArray,
    scores: Float32Array,
    main_owner: Int64Array,
    goes: BoolArray,
    waits: OwnerWaits,
    late: BoolArray,
    noise: FloatArray,
) -> BoolArray:
    """[n, E] experts that compute in place of `lost` [n, K] pairs.

    For each lost pair two different experts are drawn among the best beyond the token's top-k (twice as many as the
    most that any token has lost) whose workers have room: not late, and not beyond the median by more than the slack.
    The less busy one's is taken; if it has been filled up by better bids meanwhile, the pair is dropped.

    Args:
        main_owner: [E] the worker of each expert.
        goes: [n, D] rows that go to the workers as it is.
        late: [D].
        noise: [n, 2K] in [0, 1).
    """
    assigned = np.zeros(scores.shape, np.bool_)
    losers = np.flatnonzero(lost.any(axis=1))
    if len(losers) == 0:
        return assigned
    ends, room = ends_of(goes, waits), _room(ends_of(goes, waits), waits, late)
    wanted = lost[losers].sum(axis=1)
    bids = np.where(room[main_owner] > 0, scores[losers], -np.inf).astype(np.float64)
    np.put_along_axis(bids, np.maximum(batch.topk_ids[losers], 0), -np.inf, axis=1)
    num_pairs = min(int(wanted.max()), scores.shape[1] // 2)
    best = np.argsort(-bids, axis=1, kind="stable")[:, : 2 * num_pairs]
    is_open = np.take_along_axis(bids, best, axis=1) > -np.inf
    shuffled = np.argsort(np.where(is_open, noise[losers, : best.shape[1]], 2.0), axis=1, kind="stable")
    drawn = np.take_along_axis(best, shuffled, axis=1)
    there = np.take_along_axis(is_open, shuffled, axis=1)
    first, second = drawn[:, 0::2], drawn[:, 1::2]
    calmer = np.where(there[:, 1::2] & (ends[main_owner[second]] < ends[main_owner[first]]), second, first)
    rows, columns = np.nonzero(there[:, 0::2] & (np.arange(num_pairs) < wanted[:, None]))
    chosen = np.full(bids.shape, -np.inf)
    chosen[rows, calmer[rows, columns]] = bids[rows, calmer[rows, columns]]
    assigned[losers] = match_best(chosen, wanted, room, main_owner)
    return assigned


def _room(ends: FloatArray, waits: OwnerWaits, late: BoolArray) -> Int64Array:
    """[D] rows that a worker can take and still end within the slack after the median."""
    usable = waits.is_known & ~late
    if not usable.any():
        return np.zeros(len(ends), np.int64)
    spare = np.median(ends[waits.is_known]) + waits.slack_s - ends
    rows = np.where(usable & (spare >= 0), spare / np.maximum(waits.row_s, 1e-12), 0.0)
    return np.minimum(rows, _MANY_ROWS).astype(np.int64)


def linear_cost(sums: npt.NDArray[np.float64]) -> tuple[float, float]:
    """(seconds per step, seconds per row) of steps by least squares, neither below 0.

    Args:
        sums: [5] of 1, n, s, n², n·s over steps of n rows and s seconds, see `observe_cost`.
    """
    weight, rows, seconds, rows2, product = sums.tolist()
    if weight <= 0 or rows <= 0:
        return 0.0, 0.0
    spread = rows2 * weight - rows * rows
    slope = (product * weight - rows * seconds) / spread if spread > 1e-9 * rows2 * weight else seconds / rows
    slope = min(max(slope, 0.0), seconds / rows)
    return max(0.0, (seconds - slope * rows) / weight), slope


def observe_cost(sums: npt.NDArray[np.float64], rows: float, seconds: float, memory: float = 0.99) -> None:
    """A step of `rows` rows took so long. Older ones weigh `memory` of what they did; `sums` [5] changes."""
    sums *= memory
    sums += (1.0, rows, seconds, rows * rows, rows * seconds)
