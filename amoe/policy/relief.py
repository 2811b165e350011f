"""Work moves from expert workers that would answer late to others that hold the same experts: pure functions.

Planned shares (`amoe.policy.replicas`) divide the expected load by speeds that were measured over seconds. Here one
home looks at one batch, and at what it has seen of the workers just now: how much work it has at each that is not
answered yet, and how many seconds a unit takes there. A worker that would answer later than the others, because it has
become slow, has more to do for somebody else, or has stopped, gives up pairs to replicas that would have them done
earlier: join the queue that serves first, for as many as make the two equal.

A *unit of work* is a pair; an expert with any pairs counts `ridge_tokens` at least, for below the ridge of the roofline
its time is that of reading its weights. So a few pairs of an expert are moved together or not at all: to move some
would read the weights twice and spare nobody anything.

As long as the plan is good nobody is late, and nothing changes: homes that follow one plan agree on which replicas are
awake, and a plan may leave layers uneven that make up for one another. So one batch does not make a worker late, unless
it has stopped; and who has been late stays so until it is near the others again, or homes would switch back and forth.
Each home moves its own pairs only, until its own answers are level; so several of them do not all move the same.

Which replica computes a pair changes when its answer comes, and nothing else.

Shape letters: n tokens, K experts per token, E experts, D owners (expert workers).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from amoe.policy.backlog import medians_of_others
from amoe.types import BoolArray, Int16Array, Int64Array

FloatArray = npt.NDArray[np.float64]

LATE = 1.5  # times the others' end: later than that, on the average of the last batches, is late
STOPPED = 4.0  # later than that is late at once
IN_TIME = 1.2  # and who has been late is so until he is within this
_TINY_S = 1e-12
_ROUNDING = 1e-9
_PASSES = 2  # what seemed to end first has got much by then: the rest may go elsewhere
OVERDUE = 2.0  # times what was expected, after which silence is taken for a sign of more silence


@dataclass(frozen=True, slots=True)
class OwnerPaces:
    """What a home expects of the expert workers, all [D].

    Attributes:
        wait_s: seconds until a worker would begin with what is sent now.
        unit_s: seconds that a unit of work more takes it.
        step_s: seconds that it takes anyway, the way there and back in them: less work does not spare them.
    """

    wait_s: FloatArray
    unit_s: FloatArray
    step_s: FloatArray

    def ends(self, work: Int64Array) -> FloatArray:
        """[D] seconds until each would have answered, if it got so many units of work [D]."""
        return self.wait_s + np.where(work > 0, self.step_s + work * self.unit_s, 0.0)


def expected_waits(expected_s: FloatArray, passed_s: FloatArray) -> FloatArray:
    """[D] seconds until a worker is through with what it owes.

    A worker that has been silent for much longer than its work takes has met something that nobody has measured: it is
    expected to be silent for as long again. So one that has stopped looks later with every moment.

    Args:
        expected_s: [D] seconds that what it owes should take it; 0: it owes nothing.
        passed_s: [D] seconds since the worker's last answer, or since it was given something to do after that.
    """
    left = np.maximum(expected_s - passed_s, passed_s - OVERDUE * expected_s)
    return np.where(expected_s > 0, np.maximum(left, 0.0), 0.0)


def count_cells(topk_ids: Int64Array, owners: Int16Array, num_owners: int, num_experts: int) -> Int64Array:
    """[D, E] pairs of each expert at each owner, of pairs `topk_ids` at `owners`, both [n, K]; -1: no pair."""
    flat = (owners.astype(np.int64) * num_experts + topk_ids)[owners >= 0]
    return np.bincount(flat, minlength=num_owners * num_experts).reshape(num_owners, num_experts)


def work_of(cells: Int64Array, ridge_tokens: int) -> Int64Array:
    """Units of work of `cells` pairs, whatever the shape."""
    return np.where(cells > 0, np.maximum(cells, ridge_tokens), 0)


def late_owners(was_late: BoolArray, ends: FloatArray, usual_ends: FloatArray, usable: BoolArray) -> BoolArray:
    """[D] whose answers come much later than those of the others, of the median one of them.

    Args:
        ends: [D] seconds until each would have answered.
        usual_ends: [D] the same for the last batches.
        usable: [D] owners that could get something.
    """
    late = np.zeros_like(was_late)
    known = np.flatnonzero(usable)
    if len(known) < 2:
        return late
    bound = np.where(was_late[known], IN_TIME, LATE)
    is_late = usual_ends[known] > bound * medians_of_others(usual_ends[known])
    late[known] = is_late | (ends[known] > STOPPED * medians_of_others(ends[known]))
    return late


@dataclass(frozen=True, slots=True)
class Relief:
    """Which pairs move, both [D, E]: of those of an expert at an owner `amount` go to the owner `target`."""

    target: Int64Array
    amount: Int64Array


def relieve(cells: Int64Array, holds: BoolArray, paces: OwnerPaces, ridge_tokens: int, late: BoolArray) -> Relief:
    """Let the owners that are late give work to those that are not, the latest first.

    Each expert's pairs may go to the holder that ends first. What costs its new owner least for what it spares the old
    one goes first, the lighter before the heavier, as long as the new owner ends before the old one. The expert that
    would turn this round is divided, where both parts are above the ridge; or it goes, if it ends earlier so.

    Args:
        cells: [D, E] pairs, see `count_cells`.
        holds: [D, E] the owner has a replica of the expert.
        late: [D].
    """
    target = np.broadcast_to(np.arange(len(cells))[:, None], cells.shape).copy()
    amount = np.zeros_like(cells)
    loaded = cells.copy()
    ends = paces.ends(work_of(cells, ridge_tokens).sum(axis=1))
    can_take = holds & ~late[:, None]
    latest_first = np.flatnonzero(late)[np.argsort(-ends[late], kind="stable")]
    for owner in np.repeat(latest_first, _PASSES).tolist():
        experts = np.flatnonzero((loaded[owner] > 0) & (amount[owner] == 0) & can_take.any(axis=0))
        places = np.where(can_take[:, experts], ends[:, None], np.inf).argmin(axis=0)
        for place in sorted(set(places.tolist()), key=lambda place: ends[place]):
            movable = experts[places == place]
            counts = _moved(loaded, movable, owner, place, paces.unit_s, ends, ridge_tokens)
            gone = movable[counts > 0]
            target[owner, gone], amount[owner, gone] = place, counts[counts > 0]
            before = work_of(loaded[[owner, place]], ridge_tokens).sum(axis=1)
            loaded[owner, movable] -= counts
            loaded[place, movable] += counts
            after = work_of(loaded[[owner, place]], ridge_tokens).sum(axis=1)
            ends[[owner, place]] += (after - before) * paces.unit_s[[owner, place]]
    return Relief(target, amount)


def _moved(
    cells: Int64Array,
    experts: Int64Array,
    owner: int,
    place: int,
    unit_s: FloatArray,
    ends: FloatArray,
    ridge_tokens: int,
) -> Int64Array:
    """[m] pairs of each of the `experts` [m] that go from one owner to another."""
    here, there = cells[owner, experts], cells[place, experts]
    spared = work_of(here, ridge_tokens) * unit_s[owner]
    cost = (work_of(here + there, ridge_tokens) - work_of(there, ridge_tokens)) * unit_s[place]
    order = np.lexsort((spared, cost / np.maximum(spared, _TINY_S)))
    spared, cost = spared[order], cost[order]
    end_here, end_there = ends[owner] - np.cumsum(spared), ends[place] + np.cumsum(cost)
    goes = end_there <= end_here
    num_whole = len(goes) if goes.all() else int(goes.argmin())
    counts = np.zeros_like(here)
    counts[order[:num_whole]] = here[order[:num_whole]]
    if num_whole < len(goes):
        last = order[num_whole]
        left = end_here[num_whole] + spared[num_whole]
        gap = left - (end_there[num_whole] - cost[num_whole])
        part = _divided(int(here[last]), int(there[last]), gap, unit_s[owner], unit_s[place], ridge_tokens)
        if end_there[num_whole] < (1 - _ROUNDING) * (
            left - part * unit_s[owner]
        ):  # what would stay ends later here than all does there
            part = here[last]
        counts[last] = part
    return counts


def _divided(here: int, there: int, gap: float, unit_here: float, unit_there: float, ridge_tokens: int) -> int:
    """Pairs of one expert that go, so that two owners whose ends are `gap` seconds apart become level; 0: some would
    spare the old owner nothing, or be read by the new one for too little."""
    count = max(0, int(gap / max(unit_here + unit_there, _TINY_S)))
    return count if here - count >= ridge_tokens and there + count >= ridge_tokens else 0


def redirect(topk_ids: Int64Array, owners: Int16Array, relief: Relief) -> Int16Array:
    """[n, K] owners of the pairs `topk_ids` [n, K] that were at `owners` [n, K], after a relief: of each expert the
    first pairs go."""
    num_experts = relief.target.shape[1]
    cells = np.where(owners >= 0, owners.astype(np.int64) * num_experts + topk_ids, -1).ravel()
    chosen = np.flatnonzero((relief.amount.ravel()[cells] > 0) & (cells >= 0))
    cells = cells[chosen]
    order = np.argsort(cells, kind="stable")
    rank = np.empty(len(cells), np.int64)  # of the pair among those of its expert at its owner
    rank[order] = np.arange(len(cells)) - np.searchsorted(cells[order], cells[order])
    goes = rank < relief.amount.ravel()[cells]
    moved = owners.copy().ravel()
    moved[chosen[goes]] = relief.target.ravel()[cells[goes]]
    return moved.reshape(owners.shape)
