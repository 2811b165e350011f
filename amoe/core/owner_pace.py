"""What one home sees of the expert workers: how much work each owes it, how fast it answers; and what follows of that
for the choice among replicas."""

from __future__ import annotations

import numpy as np

from amoe.core.join import Join
from amoe.core.replica_shares import ReplicaShares
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
_NOTHING = 1e-6  # units of work that rounding leaves
FORGET_S = 2.0  # an owner that was slow and gets nothing since is tried again after so long


class OwnerPace:
    """Measures the D owners of one home by its own dispatches and answers, and relieves those that are late.

    Seconds are as the home sees them: what the worker does for other homes, and the way there and back, are in them.
    Nothing is measured and nothing moves where no expert has two replicas.

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
        self._row_work = np.zeros(join.dispatched.shape)  # of the token in a slot, while it is owed
        self._owed = np.zeros(num_owners)
        self._since = np.zeros(num_owners)  # last answer, or when there was something to do again
        self._heard_at = np.full(num_owners, -np.inf)
        self._work = np.zeros(num_owners)  # that was answered lately
        self._seconds = np.zeros(num_owners)  # that it took
        self._usual_ends: FloatArray | None = None  # of the last batches
        self._late: BoolArray = np.zeros(num_owners, np.bool_)

    def choose(self, layer: int, topk_ids: Int64Array, now: float) -> Int16Array:
        """[n, K] owners of the pairs `topk_ids` [n, K]: by the shares, but for what late owners give up."""
        owners = self._replicas.choose(layer, topk_ids)
        if not self._replicas.has_choice[layer] or (paces := self._paces(now)) is None:
            return owners
        num_owners, num_experts = len(self._owed), self._replicas.shape[1]
        cells = count_cells(topk_ids, owners, num_owners, num_experts)
        holds = self._replicas.holders[layer]
        ends = paces.wait_s + work_of(cells, self._ridge_tokens).sum(axis=1) * paces.unit_s
        usable = holds.any(axis=1)
        usable[-1] = False  # nobody
        self._usual_ends = ends if self._usual_ends is None else STEADY * self._usual_ends + (1 - STEADY) * ends
        self._late = late_owners(self._late, ends, self._usual_ends, usable)
        if not self._late.any():
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
        if not self._replicas.has_choices or len(slots) == 0:
            return
        num_owners, num_experts = len(self._owed), self._replicas.shape[1]
        cells = count_cells(expert_ids, owners, num_owners, num_experts)
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
        if not self._replicas.has_choices:
            return
        if not accepted.all():
            slots = slots[accepted | ~self._join.awaits(owner)[slots]]
        work = float(self._row_work[slots, owner].sum())
        if work == 0.0:
            return
        self._row_work[slots, owner] = 0.0
        self._owed[owner] -= work
        if self._owed[owner] < _NOTHING:
            self._owed[owner] = 0.0
        self._work[owner] = MEMORY * self._work[owner] + work
        self._seconds[owner] = MEMORY * self._seconds[owner] + now - self._since[owner]
        self._since[owner] = self._heard_at[owner] = now

    def on_roster(self, changed: BoolArray) -> None:
        """Experts have moved: what is owed is not counted, as it may be redone elsewhere. Of the owners in `changed`
        [D - 1], which are not whom they were, nothing is known."""
        gone = np.append(changed, True)
        self._row_work[:] = 0.0
        self._owed[:] = 0.0
        self._work[gone] = self._seconds[gone] = 0.0
        self._usual_ends = None
        self._late[:] = False

    def _paces(self, now: float) -> OwnerPaces | None:
        """What is expected; owners of which nothing is known are taken for the median. None: nothing is known."""
        is_old = (self._work > 0) & (self._owed == 0) & (now - self._heard_at > FORGET_S)
        if is_old.any():
            self._work[is_old] = self._seconds[is_old] = 0.0
            self._usual_ends = None
        known = self._work > 0
        if np.count_nonzero(known) < 2:
            return None
        unit_s = np.divide(self._seconds, self._work, out=np.zeros_like(self._work), where=known)
        unit_s[~known] = np.median(unit_s[known])
        passed_s = now - self._since
        for owner in np.flatnonzero((self._owed > 0) & (passed_s > OVERDUE * self._owed * unit_s)).tolist():
            self._forget_aborted(owner)
        return OwnerPaces(expected_waits(self._owed, unit_s, passed_s), unit_s)

    def _forget_aborted(self, owner: int) -> None:
        """An answer that was lost, and that nobody waits for any more, must not make an owner look late for ever."""
        self._row_work[~self._join.awaits(owner), owner] = 0.0
        self._owed[owner] = self._row_work[:, owner].sum()
