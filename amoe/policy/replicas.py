"""Which replica of an expert a token goes to: pure functions.

An expert may live at several owners (expert workers). Every home (attention worker) chooses for its own tokens, with
what it knows, and without asking anybody. Two ways:

`plan_shares` divides the *expected* load of a layer into fixed shares. It counts that a replica which has any token
reads the whole expert: below the ridge of the roofline a second replica costs more than it relieves, so everything
starts at the primaries and moves only where that shortens the longest owner's time. All homes follow one plan, so they
agree on which replicas are awake: this is for low load, where weights dominate.

`level` water-fills one batch's *actual* counts over the replicas, beginning from what each owner is known to have
waiting. This is join-shortest-queue for whole experts, divided where it pays: for
high load, where tokens dominate. Homes that see similar tokens make similar choices; the sum of level loads is level.

Shape letters: E experts, R replicas at most, D owners.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from amoe.types import BoolArray, Int16Array, Int64Array

FloatArray = npt.NDArray[np.float64]
_MAX_MOVES = 256
_TRIED_OWNERS = 3  # the busiest may hold nothing that could go elsewhere
_MIN_GAIN = 3e-3  # relative: moves that gain less are noise
_ROUNDING = 1e-9


def even_shares(owners: Int16Array) -> FloatArray:
    """[..., E, R] shares of `owners` [..., E, R] (-1: no replica): every replica the same, as EPLB does."""
    exists = owners >= 0
    return exists / np.maximum(exists.sum(axis=-1, keepdims=True), 1)


def primary_shares(owners: Int16Array) -> FloatArray:
    """[..., E, R]: everything to replica 0."""
    shares = np.zeros(owners.shape)
    shares[..., 0] = 1.0
    return shares


def present_first(owners: Int16Array, present: BoolArray) -> tuple[Int64Array, Int16Array]:
    """Replicas as they are, if only those of the owners that are `present` [D] count.

    Args:
        owners: [..., E, R], -1: no replica.

    Returns:
        order: [..., E, R] for `take_along_axis`: those that are there first, otherwise as they were.
        here: [..., E, R] the owners in that order, -1 for those that are not there.
    """
    is_here: BoolArray = np.append(present, False)[owners]  # -1 finds the last one
    order = np.argsort(~is_here, axis=-1, kind="stable")
    is_here, owners = np.take_along_axis(is_here, order, axis=-1), np.take_along_axis(owners, order, axis=-1)
    return order, np.where(is_here, owners, np.int16(-1))


def split_counts(counts: Int64Array, shares: FloatArray, phase: FloatArray) -> Int64Array:
    """Divide whole tokens by shares: replica r of expert e gets about counts[e] · shares[e, r].

    Args:
        counts: [..., E] tokens.
        shares: [E, R], rows sum to one.
        phase: [..., E] in [0, 1), where rounding starts: drawn anew for each batch, the mean is exact.

    Returns:
        [..., E, R] whole tokens, which sum to `counts` over R.
    """
    upper = np.cumsum(shares, axis=-1)
    upper[..., -1] = 1.0
    marks = np.floor(counts[..., None] * upper + phase[..., None] + _ROUNDING).astype(np.int64)
    marks[..., -1] = counts
    np.minimum(marks, counts[..., None], out=marks)
    return np.diff(marks, axis=-1, prepend=0)


def expert_seconds(tokens: FloatArray, per_token_s: float, reading_s: float) -> FloatArray:
    """Roofline of one expert on `tokens`: nothing without tokens, at least the time to read its weights otherwise."""
    return np.where(tokens > 0, np.maximum(tokens * per_token_s, reading_s), 0.0)


def plan_shares(
    load: FloatArray,
    owners: Int16Array,
    per_token_s: float,
    reading_s: float,
    speed: FloatArray,
    elsewhere_s: FloatArray | None = None,
) -> FloatArray:
    """Shares of one layer that make the longest owner's time short, and then the next longest.

    Again and again something moves away from the busiest owner that can be relieved, by the move that leaves the longer
    of the two owners shortest.

    Args:
        load: [E] expected tokens of each expert in one batch of all homes together.
        owners: [E, R], -1 where there is no replica; replica 0 is the primary.
        per_token_s, reading_s: of one expert, on an owner of speed 1.
        speed: [D] of the owners.
        elsewhere_s: [D] seconds that the owners have to do in any case.

    Returns:
        [E, R] shares; rows sum to one.
    """
    elsewhere = np.zeros(len(speed)) if elsewhere_s is None else elsewhere_s
    # From the primaries replicas stay asleep that are better asleep, from even shares all are awake that are needed.
    starts = (primary_shares(owners), even_shares(owners))
    plans = [_improve(start * load[:, None], owners, per_token_s, reading_s, speed, elsewhere) for start in starts]
    tokens, _ = min(plans, key=lambda plan: plan[1])
    total = tokens.sum(axis=1, keepdims=True)
    return np.where(total > 0, tokens / np.where(total > 0, total, 1.0), primary_shares(owners))


def _improve(
    tokens: FloatArray,
    owners: Int16Array,
    per_token_s: float,
    reading_s: float,
    speed: FloatArray,
    elsewhere: FloatArray,
) -> tuple[FloatArray, float]:
    """Move tokens [E, R] until no move helps. Returns them, and the longest owner's seconds."""
    tokens = tokens.copy()
    place = np.maximum(owners, 0)
    cost = np.where(owners >= 0, 1.0 / speed[place], 0.0)  # [E, R] seconds per second of an owner of speed 1
    for _ in range(_MAX_MOVES):
        times = expert_seconds(tokens, per_token_s, reading_s) * cost
        busy = elsewhere + np.bincount(place.ravel(), weights=times.ravel(), minlength=len(speed))
        for hot in np.argsort(-busy)[:_TRIED_OWNERS].tolist():
            move = _best_move(tokens, owners, cost, busy, hot, per_token_s, reading_s)
            if move is not None:
                break
        else:
            break
        expert, source, target, amount = move
        tokens[expert, source] = max(0.0, tokens[expert, source] - amount)
        tokens[expert, target] += amount
    return tokens, float(busy.max())


def _best_move(
    tokens: FloatArray,
    owners: Int16Array,
    cost: FloatArray,
    busy: FloatArray,
    hot: int,
    per_token_s: float,
    reading_s: float,
) -> tuple[int, int, int, float] | None:
    """(expert, from replica, to replica, tokens) of the move that relieves `hot` most, if any does.

    Of each expert either all tokens go, or as many as make the two owners equal, with and without the reading that the
    other replica may have to begin.
    """
    held, held_as = np.nonzero((owners == hot) & (tokens > 0))
    rows, targets = np.nonzero((owners[held] >= 0) & (owners[held] != hot))
    experts, sources = held[rows], held_as[rows]
    if len(experts) == 0:
        return None
    here, there = tokens[experts, sources], tokens[experts, targets]
    cost_here, cost_there = cost[experts, sources], cost[experts, targets]
    other = owners[experts, targets]
    per_token = per_token_s * (cost_here + cost_there)
    equal = (busy[hot] - busy[other]) / per_token
    woken = np.maximum(0.0, reading_s - there * per_token_s) * cost_there / per_token
    amounts = np.stack((equal, equal - woken, here))  # [3, M]
    amounts = np.clip(amounts, 0.0, here)
    rest = np.where(here - amounts < 1e-9 * here, 0.0, here - amounts)
    before_here = expert_seconds(here, per_token_s, reading_s)
    before_there = expert_seconds(there, per_token_s, reading_s)
    after_here = busy[hot] + (expert_seconds(rest, per_token_s, reading_s) - before_here) * cost_here
    after_there = busy[other] + (expert_seconds(there + amounts, per_token_s, reading_s) - before_there) * cost_there
    longer = np.where(amounts > 0, np.maximum(after_here, after_there), np.inf)
    kind, index = np.unravel_index(int(longer.argmin()), longer.shape)
    if longer[kind, index] > busy[hot] * (1 - _MIN_GAIN):
        return None
    return int(experts[index]), int(sources[index]), int(targets[index]), float(amounts[kind, index])


def plan_layers(
    load: FloatArray,
    owners: Int16Array,
    per_token_s: float,
    reading_s: float,
    speed: FloatArray,
    coupling: float = 0.0,
    num_passes: int = 1,
) -> FloatArray:
    """Shares of all layers together.

    With a barrier every layer has to be level by itself. Without one, what a device does too much in one layer it may
    do less in another: only its sum over the layers counts, as far as the waves in flight can fill the gaps. So each
    layer is planned on top of `coupling` times what its owners have to do in all other layers.

    Args:
        load: [L, E] as in `plan_shares`, for each layer.
        owners: [L, E, R].
        coupling: 0: layer by layer; small values suffice, since there are many other layers.
        num_passes: over the layers, after each has been planned by itself.

    Returns:
        [L, E, R] shares.
    """
    num_layers = len(load)
    if num_passes < 1 or coupling == 0.0:
        return np.stack([plan_shares(load[i], owners[i], per_token_s, reading_s, speed) for i in range(num_layers)])
    busy = np.zeros((num_layers, len(speed)))
    shares = np.zeros(owners.shape)
    for turn in range(1 + num_passes):
        for i in range(num_layers):
            others = busy.sum(axis=0) - busy[i]
            elsewhere = coupling * (others - others.min()) if turn else None
            shares[i] = plan_shares(load[i], owners[i], per_token_s, reading_s, speed, elsewhere)
            busy[i] = owner_seconds(load[i], owners[i], shares[i], per_token_s, reading_s, speed)
    return shares


def owner_seconds(
    load: FloatArray, owners: Int16Array, shares: FloatArray, per_token_s: float, reading_s: float, speed: FloatArray
) -> FloatArray:
    """[D] expected seconds of one layer's experts at each owner. Arguments as in `plan_shares`, shares [E, R]."""
    place = np.maximum(owners, 0)
    times = np.where(owners >= 0, expert_seconds(load[:, None] * shares, per_token_s, reading_s) / speed[place], 0.0)
    return np.bincount(place.ravel(), weights=times.ravel(), minlength=len(speed)).astype(np.float64)


def home_shares(
    elsewhere_s: FloatArray, per_sequence_s: FloatArray, num_sequences: int, least: float = 0.25
) -> FloatArray:
    """How many sequences each home should have, so that all devices are equally busy.

    Attention moves between devices as little as a sequence's KV cache does, but a *new* sequence may go anywhere: a
    device with hot experts, or a slow one, gets fewer. A lockstep engine gains nothing by it: it needs every layer
    level.

    Args:
        elsewhere_s: [A] seconds per iteration that the device is busy with other things (experts).
        per_sequence_s: [A] seconds per iteration that one more sequence costs it.
        num_sequences: C, of all homes together.
        least: no home gets less than this part of an even share.

    Returns:
        [A] shares; they sum to one.
    """
    reserved = least * num_sequences / len(elsewhere_s)
    amount = np.array([(1 - least) * num_sequences])
    counts = reserved + _fill((elsewhere_s + reserved * per_sequence_s)[None], amount, per_sequence_s)[0]
    return counts / counts.sum()


def level(
    counts: FloatArray,
    owners: Int16Array,
    waiting_s: FloatArray,
    per_token_s: float,
    speed: FloatArray,
    num_passes: int = 3,
) -> FloatArray:
    """Water-fill one batch over the replicas; vectorised over leading axes.

    Args:
        counts: [..., E] tokens.
        owners: [E, R], -1 where there is no replica.
        waiting_s: [..., D] work that the owners are known to have already, in seconds.
        per_token_s: of an owner of speed 1.
        speed: [D].
        num_passes: times that every replicated expert is poured; one is a greedy choice, three are near the optimum.

    Returns:
        [..., E, R] tokens, fractional; sums over R are `counts`.
    """
    busy = np.array(np.broadcast_to(waiting_s, (*counts.shape[:-1], waiting_s.shape[-1])), np.float64)
    exists = owners >= 0
    result = np.zeros((*counts.shape, owners.shape[-1]))
    single = np.flatnonzero(exists.sum(axis=1) == 1)
    result[..., single, 0] = counts[..., single]
    for expert in single:
        owner = owners[expert, 0]
        busy[..., owner] += counts[..., expert] * per_token_s / speed[owner]
    free = np.flatnonzero(exists.sum(axis=1) > 1)
    mean = counts.reshape(-1, counts.shape[-1]).mean(axis=0)
    heavy_first = free[np.argsort(-mean[free], kind="stable")]
    # What the first experts chose was chosen without the others; pouring each anew settles within some passes.
    for _ in range(num_passes):
        for expert in heavy_first:
            places = owners[expert][exists[expert]]
            cost = per_token_s / speed[places]
            others = busy[..., places] - result[..., expert, : len(places)] * cost
            parts = _fill(others, counts[..., expert], cost)
            result[..., expert, : len(places)] = parts
            busy[..., places] = others + parts * cost
    return result


def _fill(levels: FloatArray, amount: FloatArray, cost: FloatArray) -> FloatArray:
    """Pour `amount` [...] tokens, each `cost` [m] seconds, into `levels` [..., m] so that the highest stays lowest."""
    order = np.argsort(levels, axis=-1)
    ranked = np.take_along_axis(levels, order, axis=-1)
    rate = np.take_along_axis(np.broadcast_to(1.0 / cost, levels.shape), order, axis=-1)
    # With the j lowest in use the surface stands at (amount + Σ level·rate) / Σ rate: right if it is under the next.
    surface = (amount[..., None] + np.cumsum(ranked * rate, axis=-1)) / np.cumsum(rate, axis=-1)
    following = np.concatenate((ranked[..., 1:], np.full((*ranked.shape[:-1], 1), np.inf)), axis=-1)
    chosen = (surface <= following).argmax(axis=-1)[..., None]
    height = np.take_along_axis(surface, chosen, axis=-1)
    parts = np.maximum(height - levels, 0.0) / cost
    # What rounding leaves must not wake a replica.
    return np.where((amount[..., None] > 0) & (parts > _ROUNDING * amount[..., None]), parts, 0.0)


def cumulative_shares(shares: FloatArray, owners: Int16Array) -> FloatArray:
    """[..., E, R] running sums of `shares`, exactly 1 from the last replica that has a share: rounding wakes nobody.

    Raises:
        ValueError: shares that are no shares of these `owners` [..., E, R].
    """
    total = shares.sum(axis=-1)
    if shares.shape != owners.shape or not (shares >= 0).all() or np.abs(total - 1).max(initial=0.0) > 1e-3:
        raise ValueError(f"shares {shares.shape} must be positive and sum to one over the replicas {owners.shape}")
    if (shares[owners < 0] > 0).any():
        raise ValueError("a share for a replica that does not exist")
    upper = np.cumsum(shares, axis=-1) / total[..., None]
    has_later = np.cumsum(shares[..., ::-1], axis=-1)[..., ::-1] - shares > 0
    return np.where(has_later, np.minimum(upper, 1.0), 1.0)


def choose_replicas(
    topk_ids: Int64Array, owners: Int16Array, upper: FloatArray, is_split: BoolArray, phase: FloatArray
) -> Int16Array:
    """Which owner computes each pair of a batch: of every expert the first pairs go to its first replica, and so on.

    How many: as `split_counts` divides them. So every batch follows the shares to within one pair, with no chance in
    it, and on average follows them exactly, if the phase rotates.

    Args:
        topk_ids: [n, K] experts of the tokens.
        owners: [E, R].
        upper: [E, R] of `cumulative_shares`.
        is_split: [E] the expert has more than one replica with a share; the others' pairs cost nothing here.
        phase: [E] in [0, 1), where rounding starts.

    Returns:
        [n, K] owners.
    """
    flat = topk_ids.ravel()
    replica = (upper < 1.0).sum(axis=-1)  # the only one with a share, where there is only one
    chosen = owners[np.arange(len(owners)), replica][flat]
    split = np.flatnonzero(is_split[flat])
    experts = flat[split]
    counts = np.bincount(experts, minlength=len(owners))
    order = np.argsort(experts, kind="stable")
    rank = np.empty(len(experts), np.int64)  # of the pair among those of its expert
    rank[order] = np.arange(len(experts)) - np.repeat(np.cumsum(counts) - counts, counts)
    marks = np.floor(counts[:, None] * upper + phase[:, None] + _ROUNDING)
    marks[upper == 1.0] = np.inf
    chosen[split] = owners[experts, (rank[:, None] >= marks[experts]).sum(axis=-1)]
    return chosen.reshape(topk_ids.shape)
