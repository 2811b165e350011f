"""What to do about hot experts and slow devices, from what has been measured: pure functions.

Two things can be steered while the engine runs, without moving a weight or a KV cache: which replica of an expert gets
which share of its pairs, and which home gets which share of the new sequences.

Shape letters: L layers, E experts, R replicas at most, D owners (expert workers), A homes (attention workers).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from amoe.policy.replicas import FloatArray, expert_seconds, home_shares, owner_seconds, plan_layers
from amoe.types import Int16Array

COUPLING = 0.05  # of layers, in `plan_layers`, where several waves fill each other's gaps
MIN_TOKENS = 64.0  # fewer say nothing of homes
MIN_PAIRS = 16.0  # of an expert on average: fewer say nothing of experts
MAX_SPEED_RATIO = 4.0  # beyond it a measurement is wrong, or the device is ill
MIN_SPEED_RATIO = 1.5  # within it an owner is as fast as the others, where experts are placed
MIN_GAIN = 0.03  # part of the time that another plan must spare: what spares less is noise
MIN_HOME_CHANGE = 0.05  # relative
HOME_STEP = 0.5  # of the way to the planned home shares: what is measured lags behind what is planned


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """What the workers have done lately, all over the same stretch of time. Only ratios matter.

    Attributes:
        pairs: [L, E] that all owners together have computed.
        work: [D] units of work done: a unit is a pair, and an expert that had any counts `ridge_tokens` at least.
        expert_s: [D] seconds that it took them.
        tokens: [A] that passed a layer's attention block, averaged over the layers.
        home_s: [A] seconds that attention and head took.
        elsewhere_s: [A] seconds that the home's device was busy with experts.
        tokens_per_batch: of all homes together, in one run of an attention block at each.
    """

    pairs: FloatArray
    work: FloatArray
    expert_s: FloatArray
    tokens: FloatArray
    home_s: FloatArray
    elsewhere_s: FloatArray
    tokens_per_batch: float

    @property
    def knows_homes(self) -> bool:
        """There is enough to plan home shares from."""
        return float(self.tokens.sum()) >= MIN_TOKENS

    @property
    def knows_experts(self) -> bool:
        """There is enough to plan shares of replicas from."""
        return says_enough(self.pairs)

    def batch_load(self) -> FloatArray:
        """[L, E] tokens of each expert in one batch of all homes together."""
        return self.pairs * (self.tokens_per_batch / max(1.0, float(self.tokens.sum())))


def says_enough(pairs: FloatArray) -> bool:
    """Pairs [L, E] are enough to tell hot experts from cold ones, in every layer that has been used."""
    used = pairs[pairs.any(axis=1)]
    return len(used) > 0 and float(used.mean(axis=1).min()) >= MIN_PAIRS


def count_work(counts: npt.NDArray[np.integer], ridge_tokens: int) -> int:
    """Units of work in one run of experts on `counts` [E] pairs: below the ridge an expert costs what it does there."""
    return int(np.maximum(counts[counts > 0], ridge_tokens).sum())


def owner_speeds(work: FloatArray, seconds: FloatArray) -> FloatArray:
    """[D] speeds relative to the median owner's, clipped; 1 for an owner of which nothing is known."""
    known = (work > 0) & (seconds > 0)
    if not known.any():
        return np.ones(len(work))
    speed = np.where(known, work / np.where(seconds > 0, seconds, 1.0), 1.0)
    relative = np.where(known, speed / np.median(speed[known]), 1.0)
    return np.clip(relative, 1 / MAX_SPEED_RATIO, MAX_SPEED_RATIO)


def lasting_speeds(speed: FloatArray) -> FloatArray:
    """[D] of `owner_speeds`, what is worth moving experts for: 1 for those that differ little from the others, be it by
    chance, or because the fixed costs of a step weigh more where steps are small."""
    differs = np.maximum(speed, 1 / speed) > MIN_SPEED_RATIO
    return np.where(differs, speed, 1.0)


def imbalance(
    load: FloatArray, owners: Int16Array, shares: FloatArray, ridge_tokens: float, speed: FloatArray
) -> float:
    """How much longer the busiest owners take than they would if no time were lost; 1 is perfect.

    The mean of two views: layer by layer, as with a barrier, and over all layers, as without one.
    """
    busy = np.stack([owner_seconds(load[i], owners[i], shares[i], 1.0, ridge_tokens, speed) for i in range(len(load))])
    least = float(expert_seconds(load, 1.0, ridge_tokens).sum() / speed.sum())
    if least == 0.0:
        return 1.0
    return float(busy.max(axis=1).sum() + busy.sum(axis=0).max()) / (2 * least)


@dataclass(frozen=True, slots=True)
class ReplicaPlan:
    """Shares [L, E, R], and the `imbalance` that is hoped of them; 1 hopes for the best."""

    shares: FloatArray
    imbalance: float = 1.0


def plan_replicas(
    load: FloatArray, owners: Int16Array, ridge_tokens: float, speed: FloatArray, current: ReplicaPlan, coupling: float
) -> ReplicaPlan:
    """Other shares, if they are worth the change; else those in force, and what can be hoped of them.

    Args:
        load: [L, E] tokens of each expert in one batch.
        owners: [L, E, R].
        ridge_tokens: below so many, an expert's weights take longer to read than its tokens to compute.
        speed: [D].
        current: shares in force; as long as they do what was hoped of them, nothing is planned, which takes a second.
        coupling: of layers, see `plan_layers`.
    """
    before = imbalance(load, owners, current.shares, ridge_tokens, speed)
    if before * (1 - MIN_GAIN) <= current.imbalance:
        return current
    shares = plan_layers(load, owners, 1.0, ridge_tokens, speed, coupling)
    after = imbalance(load, owners, shares, ridge_tokens, speed)
    return ReplicaPlan(shares, after) if after < before * (1 - MIN_GAIN) else ReplicaPlan(current.shares, before)


def moved_part(load: FloatArray, shares: FloatArray) -> float:
    """Part of all pairs that shares [L, E, R] send to another replica than the primary; load as [L, E]."""
    total = float(load.sum())
    return float((load * (1 - shares[..., 0])).sum()) / total if total > 0 else 0.0


def plan_homes(measured: Measured, current: FloatArray, *, is_sequential: bool) -> FloatArray:
    """[A] shares of new sequences, so that the devices of all homes are equally busy.

    What one more sequence costs is taken as what a sequence costs on average, fixed costs included: it is measured
    anew at every step on the way, which therefore ends where the devices' whole times are equal.

    Args:
        current: [A] shares in force; small changes leave them as they are.
        is_sequential: attention and experts never run at the same time, so attention alone has to be level.
    """
    known = (measured.tokens > 0) & (measured.home_s > 0)
    if not measured.knows_homes or not known.any():
        return current
    per_token = measured.home_s / np.where(known, measured.tokens, 1.0)
    per_token = np.where(known, per_token, np.median(per_token[known]))
    elsewhere = np.zeros(len(current)) if is_sequential else measured.elsewhere_s / measured.tokens.sum()
    wanted = home_shares(elsewhere, per_token, 1)
    planned = current + HOME_STEP * (wanted - current)
    return planned if np.abs(planned / current - 1).max() > MIN_HOME_CHANGE * HOME_STEP else current
