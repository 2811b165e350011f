"""What one home sees of the expert workers: how much work each owes it, how fast it answers; and what follows of that
for the choice among replicas."""

from __future__ import annotations

import numpy as np

from amoe.core.join import Join
from amoe.core.replica_shares import ReplicaShares
from amoe.policy.backlog import linear_cost, observe_cost
from amoe.policy.relief import (
    OVERDUE,
    FloatArray,
    OwnerPaces,
    count_cells,
    expected_waits,
    late_owners,
    redirect,
    relieve,
    work_of,
)
from amoe.types import BoolArray, Int16Array, Int32Array, Int64Array

MEMORY = 0.9  # of what was measured, with each answer: an owner's pace is that of its last ten
STEADY = 0.95  # of what batches bring on average, with each batch
LOOK_EVERY = 16  # batches, while nobody is late: to look costs more than to choose
LOOK_S = 5e-3  # or after so long: where steps are long a look costs nothing
FEW_PAIRS = 4  # per owner that is there: so few are uneven by chance
FORGET_S = 2.0  # an owner that was slow and gets nothing since is tried again after so long
_NOTHING = 1e-6  # units of work that rounding leaves


class OwnerPace:
    """Measures the D owners of one home by its own dispatches and answers, and relieves those that are late.

    Seconds are as the home sees them: what the worker does for other homes, and the way there and back, are in them.
    While nobody is late a few batches are measured and all others go by the shares, which costs next to nothing; from
    then on all are, until nobody is. Nothing is measured and nothing moves where no expert has two replicas.

    Args:
        replicas: of the home; they tell who holds what.
        join: of the home; it tells who still waits for whom.
        ridge_tokens: see `amoe.policy.relief`.

    Attributes:
        num_relieved: pairs that went to another replica than the shares say, cumulative.
    """

    def __init__(self, replicas: ReplicaShares, join: Join, ridge_tokens: int) -> None:
        num_owners = replicas.num_owners
        self.num_relieved = 0
        self._replicas = replicas
        self._join = join
        self._ridge_tokens = ridge_tokens
        self._row_work = np.zeros(join.dispatched.shape)  # of the token in a slot, while it is owed and measured
        self._owed = np.zeros(num_owners)
        self._since = np.zeros(num_owners)  # last answer, or when there was something to do again
        self._heard_at = np.full(num_owners, -np.inf)
        self._costs = np.zeros((num_owners, 5))  # of what was answered lately, see `observe_cost`
        self._usual_ends: FloatArray | None = None  # of the last batches
        self._late: BoolArray = np.zeros(num_owners, np.bool_)
        self._is_anyone_late = False
        self._is_measured = False  # the batch that is being dispatched
        self._num_batches = 0
        self._look_at = -np.inf

    def choose(self, layer: int, topk_ids: Int64Array, now: float) -> Int16Array:
        """[n, K] owners of the pairs `topk_ids` [n, K]: by the shares, but for what late owners give up."""
        owners = self._replicas.choose(layer, topk_ids)
        self._is_measured = False
        if not self._replicas.has_choice[layer] or topk_ids.size < FEW_PAIRS * self._replicas.num_holders[layer]:
            return owners
        self._num_batches += 1
        if not self._is_anyone_late and self._num_batches % LOOK_EVERY and now < self._look_at:
            return owners
        self._is_measured, self._look_at = True, now + LOOK_S
        paces = self._paces(now)
        return owners if paces is None else self._relieved(layer, topk_ids, owners, paces)

    def _relieved(self, layer: int, topk_ids: Int64Array, owners: Int16Array, paces: OwnerPaces) -> Int16Array:
        cells = count_cells(topk_ids, owners, len(self._owed), self._replicas.shape[1])
        holds = self._replicas.holders[layer]
        ends = paces.ends(work_of(cells, self._ridge_tokens).sum(axis=1))
        usable = holds.any(axis=1)
        usable[-1] = False  # nobody
        self._usual_ends = ends if self._usual_ends is None else STEADY * self._usual_ends + (1 - STEADY) * ends
        self._late = late_owners(self._late, ends, self._usual_ends, usable)
        self._is_anyone_late = bool(self._late.any())
        if not self._is_anyone_late:
            return owners
        relief = relieve(cells, holds, paces, self._ridge_tokens, self._late)
        if not (num_moved := int(relief.amount.sum())):
            return owners
        self.num_relieved += num_moved
        return redirect(topk_ids, owners, relief)

    def sent(
        self, slots: Int32Array, expert_ids: Int64Array, owners: Int16Array, dispatched: BoolArray, now: float
    ) -> None:
        """The tokens in `slots` [n] are on their way, with pairs `expert_ids` at `owners` [n, P], -1: no pair.

        Args:
            dispatched: [n, D] owners that they wait for.
        """
        if not self._is_measured or len(slots) == 0:
            self._forget(slots)
            return
        cells = count_cells(expert_ids, owners, len(self._owed), self._replicas.shape[1])
        num_rows = dispatched.sum(axis=0)
        work = work_of(cells, self._ridge_tokens).sum(axis=1) * (num_rows > 0)
        work[-1] = 0  # for nobody
        stale = self._row_work[slots].sum(axis=0)  # answers that have not come, and that nobody waits for
        self._row_work[slots] = dispatched * (work / np.maximum(num_rows, 1))
        self._owed -= stale
        self._since[(self._owed < _NOTHING) & (work > 0)] = now
        self._owed += work

    def heard(self, owner: int, slots: Int32Array, accepted: BoolArray, now: float) -> None:
        """An owner has answered for the tokens in `slots` [n].

        Args:
            accepted: [n] the answer is awaited, and not settled yet. Of the others those were for nobody whose slots
                wait for nothing; a late answer or a duplicate says nothing of what its slot waits for now.
        """
        if not self._owed[owner]:
            self._since[owner] = now
            return
        if not accepted.all():
            slots = slots[accepted | ~self._join.awaits(owner)[slots]]
        work = float(self._row_work[slots, owner].sum())
        if work == 0.0:
            self._since[owner] = now
            return
        self._row_work[slots, owner] = 0.0
        self._owed[owner] -= work
        if self._owed[owner] < _NOTHING:
            self._owed[owner] = 0.0
        observe_cost(self._costs[owner], work, now - self._since[owner], MEMORY)
        self._since[owner] = self._heard_at[owner] = now

    def on_roster(self, changed: BoolArray) -> None:
        """Experts have moved: what is owed is not counted, as it may be redone elsewhere. Of the owners in `changed`
        [D - 1], which are not whom they were, nothing is known."""
        gone = np.append(changed, True)
        self._row_work[:] = 0.0
        self._owed[:] = 0.0
        self._costs[gone] = 0.0
        self._usual_ends = None
        self._late[:] = self._is_anyone_late = False

    def _paces(self, now: float) -> OwnerPaces | None:
        """What is expected; owners of which nothing is known are taken for the median. None: nothing is known."""
        is_old = (self._costs[:, 0] > 0) & (self._owed == 0) & (now - self._heard_at > FORGET_S)
        if is_old.any():
            self._costs[is_old] = 0.0
            self._usual_ends = None
        known = np.flatnonzero(self._costs[:, 0] > 0)
        if len(known) < 2:
            return None
        measured = np.array([linear_cost(self._costs[owner]) for owner in known])  # [known, 2]
        costs = np.tile(np.median(measured, axis=0), (len(self._owed), 1))
        costs[known] = measured
        step_s, unit_s = costs.T
        return OwnerPaces(self._waits(step_s, unit_s, now), unit_s, step_s)

    def _waits(self, step_s: FloatArray, unit_s: FloatArray, now: float) -> FloatArray:
        """[D] seconds until each is through with what it owes."""
        asked_at = self._join.oldest_by_owner()
        is_busy = np.isfinite(asked_at)
        passed_s = now - np.where(is_busy, np.maximum(self._since, asked_at), now)
        expected_s = np.where(self._owed > 0, step_s + self._owed * unit_s, 0.0)
        for owner in np.flatnonzero((self._owed > 0) & (passed_s > OVERDUE * expected_s)).tolist():
            self._forget_aborted(owner)
        expected_s = np.where(self._owed > 0, step_s + self._owed * unit_s, 0.0)
        if self._usual_ends is not None:  # what was not measured takes as long as usual
            expected_s = np.where(is_busy & (self._owed == 0), self._usual_ends, expected_s)
        return expected_waits(expected_s, passed_s)

    def _forget(self, slots: Int32Array) -> None:
        """What is owed for `slots` [n] is not awaited any more: it has been sent elsewhere, without being measured."""
        if self._owed.any() and (stale := self._row_work[slots].sum(axis=0)).any():
            self._row_work[slots] = 0.0
            self._owed = np.where(self._owed - stale < _NOTHING, 0.0, self._owed - stale)

    def _forget_aborted(self, owner: int) -> None:
        """An answer that was lost, and that nobody waits for any more, must not make an owner look late for ever."""
        self._row_work[~self._join.awaits(owner), owner] = 0.0
        self._owed[owner] = self._row_work[:, owner].sum()
