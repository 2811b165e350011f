"""What a home does about answers that do not come: it sends tokens elsewhere, or again.

An expert worker keeps nothing that matters, and computes the same whenever it is asked. So a home that still has a
token's pairs and its MoE input can ask anybody who holds its experts:

- *redo*: a worker is gone, and tokens wait for its answer. Each gets a new generation, so that no answer to what was
  sent before counts any more, and all its pairs of that layer are dispatched anew, to owners that are there. All of
  them, because an owner that has answered a part already has one place only for what it says.
- *park*: nobody who is there holds one of a token's experts. The token waits for "nobody", owner D, and nothing of it
  is sent; the next roster redoes it. It holds up no wave: it marches alone.
- *send again*: an owner that is there has owed an answer for too long: it may be slow, or the link has lost something.
  The very same dispatch goes out once more. Whatever is answered first counts; the other answer is a duplicate. The
  time until the next attempt doubles, so that a slow worker is not drowned in copies. A single answer may be lost as
  well, while the owner answers others all the time: what has been owed for much longer than that is asked for again.
- *strays*: experts have moved, and a token is on its way to an owner that has given its expert away. It will never be
  answered there, however much the owner says to others: it is redone as soon as it is late.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from amoe.core.batcher import Batcher
from amoe.core.capacity import HomeCapacity
from amoe.core.dispatcher import Dispatcher, Pairs
from amoe.core.home_waves import HomeWaves
from amoe.core.owner_pace import OwnerPace
from amoe.core.replica_shares import ReplicaShares
from amoe.core.routed_experts import RoutedExperts
from amoe.core.steps import Outgoing
from amoe.policy.patience import Patience
from amoe.types import BlockId, BlockKind, BoolArray, Float32Array, Int16Array, Int32Array

_TRIES_PER_TIMEOUT = 4
# Who is accused after the timeout is asked again before, lest a lost message cost a worker its life.
_PATIENCE = 0.5
# One that answers others has lost something, or has very much to do: it is asked again after so many timeouts.
_OVERDUE = 4.0


@dataclass(slots=True)
class Losses:
    """What one home had to do about lost answers, cumulative, in tokens (once per layer).

    Attributes:
        redone: dispatched anew, because a worker was gone; resent: sent again to the same worker.
    """

    redone: int = 0
    resent: int = 0


class KeptPairs:
    """The pairs of the tokens in flight, by slot; S slots.

    Args:
        with_scores: keep the router's scores of all experts too, to find others in place of those that are gone.
    """

    def __init__(self, num_slots: int, *, with_scores: bool = False) -> None:
        self._num_slots = num_slots
        self._with_scores = with_scores
        self._ids: npt.NDArray[np.int64] = np.full((num_slots, 0), -1, np.int64)
        self._weights: Float32Array = np.empty((num_slots, 0), np.float32)
        self._owners: Int16Array = np.full((num_slots, 0), -1, np.int16)
        self._scores: Float32Array | None = None

    def keep(self, slots: Int32Array, pairs: Pairs, scores: Float32Array | None) -> None:
        """Tokens in `slots` [n] are dispatched with `pairs` [n, P]; P is always the same, but where n is 0."""
        if len(slots) == 0:
            return
        if self._ids.shape[1] != pairs.expert_ids.shape[1]:
            shape = (self._num_slots, pairs.expert_ids.shape[1])
            self._ids, self._owners = np.full(shape, -1, np.int64), np.full(shape, -1, np.int16)
            self._weights = np.zeros(shape, np.float32)
        self._ids[slots], self._weights[slots], self._owners[slots] = pairs
        if self._with_scores and scores is not None:
            if self._scores is None:
                self._scores = np.zeros((self._num_slots, scores.shape[1]), np.float32)
            self._scores[slots] = scores

    def pairs(self, slots: Int32Array) -> Pairs:
        """[n, P] of the tokens in `slots` [n]."""
        return Pairs(self._ids[slots], self._weights[slots], self._owners[slots])

    def scores(self, slots: Int32Array) -> Float32Array | None:
        """[n, E] of the tokens in `slots` [n]; None: not kept."""
        return None if self._scores is None else self._scores[slots]


class Recovery:
    """See above; of one home with D owners.

    Args:
        timeout_s: an answer that takes half as long is asked for again; whoever owes it is named before.
        come_home: called with layer, leaders of groups that wait for nothing any more, and `now`.
        routed: is told of experts that compute in place of others.
        degrades: pairs of experts that nobody holds go the way of capacity, instead of waiting.
        may_resend: dispatches that come twice do no harm (in lockstep each would wait for another epoch).
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        batcher: Batcher,
        replicas: ReplicaShares,
        *,
        timeout_s: float,
        come_home: Callable[[int, Int32Array, float], None],
        routed: RoutedExperts,
        waves: HomeWaves | None,
        capacity: HomeCapacity | None,
        pace: OwnerPace | None,
        degrades: bool,
        may_resend: bool,
    ) -> None:
        self.losses = Losses()
        self._dispatcher = dispatcher
        self._batcher = batcher
        self._replicas = replicas
        self._retry_s = timeout_s / _TRIES_PER_TIMEOUT
        self._patient_s = timeout_s * _PATIENCE
        self._named_s = Patience(timeout_s).named_s
        self._overdue_s = timeout_s * _OVERDUE
        self._come_home = come_home
        self._routed = routed
        self._waves = waves
        self._capacity = capacity
        self._pace = pace
        self._may_resend = may_resend
        self._kept = KeptPairs(batcher.slots.num_slots, with_scores=degrades)
        num_owners = dispatcher.nobody
        self._heard_at = np.full(num_owners, -np.inf)
        self._patience_s = np.full(num_owners, self._patient_s)
        self._next_try = -np.inf
        self._moved_at = -np.inf  # when experts last were elsewhere

    @property
    def num_parked(self) -> int:
        """Tokens that wait for an expert that nobody holds."""
        nobody = np.arange(self._dispatcher.nobody + 1) == self._dispatcher.nobody
        return len(self._batcher.join.owed_by(nobody))

    def keep(self, slots: Int32Array, pairs: Pairs, scores: Float32Array | None) -> None:
        """Tokens in `slots` [n] are about to be dispatched."""
        self._kept.keep(slots, pairs, scores)

    def heard(self, owner: int, now: float) -> None:
        """An owner has answered: it is there, and the way to it as well."""
        self._heard_at[owner] = now
        self._patience_s[owner] = self._patient_s

    # ---- somebody is gone, or there again

    def on_roster(self, owners: Int16Array, present: BoolArray, changed: BoolArray, now: float) -> list[Outgoing]:
        """Experts are at `owners` [L, E, R] from now on; `present` [D] of the owners are there, `changed` [D] are not
        whom they were. Returns what has to be sent again; rows are slots."""
        self._replicas.place(owners, present)
        self._moved_at = now
        self._dispatcher.on_roster(present)
        if self._pace is not None:
            self._pace.on_roster(changed)
        self._heard_at[changed] = now
        self._patience_s[changed] = self._patient_s
        if self._waves is not None:
            self._waves.on_roster(changed, has_missing=bool(self._replicas.has_missing.any()))
        lost = np.append(changed, True)
        return self._redo(self._batcher.join.owed_by(lost), now)

    def _redo(self, slots: Int32Array, now: float) -> list[Outgoing]:
        join = self._batcher.join
        self._batcher.slots.renew(slots)
        self.losses.redone += len(slots)
        layers = join.layer[slots]
        outgoing: list[Outgoing] = []
        for layer in np.unique(layers).tolist():
            outgoing += self._redo_layer(layer, slots[layers == layer], now)
        return outgoing

    def _redo_layer(self, layer: int, slots: Int32Array, now: float) -> list[Outgoing]:
        join, leaders = self._batcher.join, self._batcher.tokens.leader[slots]
        kept = self._kept.pairs(slots)
        pairs = kept._replace(owners=self._replicas.choose_pairs(layer, kept.expert_ids))
        may_be_nobody = bool(self._replicas.has_missing[layer])
        if may_be_nobody and self._capacity is not None and (scores := self._kept.scores(slots)) is not None:
            pairs = self._capacity.spare_missing(layer, slots, pairs, scores, again=True)
            self._routed.amend(layer, slots, self._batcher.tokens, pairs.expert_ids)
        self._kept.keep(slots, pairs, None)
        dispatched = self._dispatcher.destinations(pairs.owners, may_be_nobody=may_be_nobody)
        if self._waves is not None:
            parked = dispatched[:, self._dispatcher.nobody]
            self._waves.part_with(np.unique(leaders[parked]), self._batcher.tokens.leader)
        join.reopen(slots, leaders, layer, dispatched, now)
        if self._capacity is not None:
            self._capacity.sent(slots, dispatched)
        if self._pace is not None:
            self._pace.sent(slots, pairs.expert_ids, pairs.owners, dispatched, now)
        if len(idle := join.idle(leaders)):
            self._come_home(layer, idle, now)
        return self._dispatcher.batches(self._block(layer), None, slots, slots, pairs, dispatched)

    def _block(self, layer: int) -> BlockId:
        """Where it meets whatever is there: its own epoch has gone by."""
        return BlockId(BlockKind.EXPERTS, layer, 0 if self._waves is None else self._waves.loose)

    # ---- somebody does not answer

    def unanswered(self, now: float) -> list[tuple[int, float]]:
        """(rank, seconds) of the owners that have owed answers for a while, and sent none since."""
        waited = self._waited(now)
        late = np.flatnonzero(waited >= self._named_s)
        return [(self._dispatcher.owner_ranks[owner], float(waited[owner])) for owner in late]

    def _waited(self, now: float) -> npt.NDArray[np.float64]:
        """[D] seconds since the oldest answer that is owed was asked for, or since the owner's last answer."""
        asked_at = self._batcher.join.oldest_by_owner()[: self._dispatcher.nobody]
        return now - np.maximum(asked_at, self._heard_at)

    def retry(self, now: float) -> list[Outgoing]:
        """Send again what has been owed for too long; rows are slots."""
        if now < self._next_try or not self._may_resend:
            return []
        self._next_try = now + self._retry_s
        join = self._batcher.join
        outgoing = self._redo_strays(now)
        waited = self._waited(now)
        oldest = now - join.oldest_by_owner()[: self._dispatcher.nobody]
        for owner in np.flatnonzero(waited >= self._patience_s).tolist():
            self._patience_s[owner] *= 2
            outgoing += self._ask_again(owner, self._owed(owner, self._patient_s, now), now)
        for owner in np.flatnonzero((waited < self._patient_s) & (oldest >= self._overdue_s)).tolist():
            slots = self._owed(owner, self._overdue_s, now)
            join.asked_at[slots] = now
            outgoing += self._ask_again(owner, slots, now)
        return outgoing

    def _owed(self, owner: int, seconds: float, now: float) -> Int32Array:
        """Slots whose tokens have waited so long for this owner."""
        owes = np.zeros(self._dispatcher.nobody + 1, np.bool_)
        owes[owner] = True
        slots = self._batcher.join.owed_by(owes)
        return slots[now - self._batcher.join.asked_at[slots] >= seconds]

    def _redo_strays(self, now: float) -> list[Outgoing]:
        oldest = self._batcher.join.oldest_by_owner()[: self._dispatcher.nobody]
        outgoing: list[Outgoing] = []
        for owner in np.flatnonzero((oldest <= self._moved_at) & (now - oldest >= self._patient_s)).tolist():
            slots = self._owed(owner, self._patient_s, now)
            outgoing += self._redo(slots[self._are_stray(owner, slots)], now)
        return outgoing

    def _are_stray(self, owner: int, slots: Int32Array) -> BoolArray:
        """[n] the owner has given away an expert that tokens in `slots` [n] wait for: it will never answer for it."""
        pairs = self._kept.pairs(slots)
        holds = self._replicas.holds_pairs(owner, self._batcher.join.layer[slots], pairs.expert_ids)
        stray: BoolArray = ((pairs.owners == owner) & ~holds).any(axis=1)
        return stray

    def _ask_again(self, owner: int, slots: Int32Array, now: float) -> list[Outgoing]:
        stray = self._are_stray(owner, slots)
        return self._redo(slots[stray], now) + self._resend(owner, slots[~stray])

    def _resend(self, owner: int, slots: Int32Array) -> list[Outgoing]:
        self.losses.resent += len(slots)
        layers = self._batcher.join.layer[slots]
        outgoing: list[Outgoing] = []
        for layer in np.unique(layers).tolist():
            there = slots[layers == layer]
            only = np.zeros((len(there), self._dispatcher.nobody + 1), np.bool_)
            only[:, owner] = True
            outgoing += self._dispatcher.batches(self._block(layer), None, there, there, self._kept.pairs(there), only)
        return outgoing
