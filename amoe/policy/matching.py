"""Who gets the places that there are: the first of each group, and tokens matched with experts. Pure functions."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from amoe.types import BoolArray, Int64Array

FloatArray = npt.NDArray[np.floating]


def first_of_groups(
    groups: Int64Array, keys: FloatArray, late: BoolArray | None, protected: BoolArray | None, capacity: Int64Array
) -> tuple[BoolArray, int]:
    """([m] pairs that stay: in each group the first `capacity` [G] of them, and the protected; those beyond capacity).

    Protected pairs come first, then those that are not late, then the smallest key.
    """
    columns = [keys] + [column for column in (late, None if protected is None else ~protected) if column is not None]
    order = np.lexsort([*columns, groups])
    in_order = groups[order]
    starts = np.searchsorted(in_order, np.arange(len(capacity)))
    rank = np.empty(len(groups), np.int64)
    rank[order] = np.arange(len(groups)) - starts[in_order]
    fits = rank < capacity[groups]
    if protected is None:
        return fits, 0
    return fits | protected, int((protected & ~fits).sum())


def match_best(bids: FloatArray, wanted: Int64Array, room: Int64Array, group_of_expert: Int64Array) -> BoolArray:
    """Assign experts to tokens, best bid first, while the token wants more and the expert's group has room.

    Deferred acceptance: each token bids for the best experts that have not refused it, each group holds on to the best
    bids that it has room for. It ends where taking all bids from the highest to the lowest would.

    Args:
        bids: [n, E], -inf where the token must not go.
        wanted: [n] experts that a token wants at most.
        room: [G].

    Returns:
        [n, E] assigned.
    """
    best_first = np.argsort(-bids, axis=1, kind="stable")
    ranked, groups = np.take_along_axis(bids, best_first, axis=1), group_of_expert[best_first]
    has_asked = np.zeros(bids.shape, np.bool_)
    tokens = places = np.empty(0, np.int64)  # of the bids that are held: token, and place in its ranking
    num_held = np.zeros(len(bids), np.int64)
    limit = np.where(room > 0, -np.inf, np.inf)  # a group that is full holds nothing below
    while True:
        asking = np.flatnonzero(num_held < wanted)
        may_ask = (ranked[asking] > limit[groups[asking]]) & ~has_asked[asking]
        missing = (wanted - num_held)[asking, None]
        rows, new = np.nonzero(may_ask & (np.cumsum(may_ask, axis=1) <= missing))
        if len(rows) == 0:
            held = np.zeros(bids.shape, np.bool_)
            held[tokens, best_first[tokens, places]] = True
            return held
        has_asked[asking[rows], new] = True
        tokens, places = np.concatenate((tokens, asking[rows])), np.concatenate((places, new))
        kept, _ = first_of_groups(groups[tokens, places], -ranked[tokens, places], None, None, room)
        tokens, places = tokens[kept], places[kept]
        num_held = np.bincount(tokens, minlength=len(bids))
        limit = _lowest_of_full(groups[tokens, places], ranked[tokens, places], room)


def _lowest_of_full(groups: Int64Array, bids: FloatArray, room: Int64Array) -> FloatArray:
    """[G] the lowest of the `bids` [m] that a group holds, if it has no room left; -inf if it has."""
    lowest = np.full(len(room), np.inf)
    np.minimum.at(lowest, groups, bids)
    return np.where(np.bincount(groups, minlength=len(room)) >= room, lowest, -np.inf)
