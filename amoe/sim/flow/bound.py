"""What no schedule can beat, and why.

Every iteration of C sequences, whoever schedules it, has to

1. read the weights of every expert that any token chose at least once, and to multiply by them once per pair: per
   (layer, expert) at least max(n·a, P(n > 0)·r) seconds of some device, a per pair, r to read the expert, n pairs
   (splitting n over steps or devices only adds readings);
2. run attention on every device that has sequences: per device and layer one launch at least, the weights once, its
   sequences' projections and KV. Sequences are pinned to N devices (attention is data-parallel), and the cost is convex
   in their number from one on: where every device has some, the division that is as even as whole numbers are is the
   cheapest;
3. run the head likewise.

The sum divided by the devices' speeds is the *work bound*: perfect balance, perfect overlap, one batch per expert and
layer, no communication. Besides, one token has to pass all stages one after the other: the *latency bound*, which with
C tokens in flight bounds throughput too. The *placement bound* also respects where replicas are: experts whose replicas
all lie in a set S of devices can only run there, for any S; and tokens whose experts are elsewhere have to travel.

In 1. a token waits for nobody but those of its own iteration. Who let tokens of cold experts wait for those of several
iterations could read less often, at the cost of sequences that stand still meanwhile; no system here does.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from amoe.sim.flow.deployment import Deployment, FloatArray
from amoe.types import Int16Array

_MAX_ENUMERATED = 12


@dataclass(frozen=True, slots=True)
class Bound:
    """Least seconds per iteration, by cause."""

    work_s: float
    latency_s: float
    placement_s: float

    @property
    def seconds(self) -> float:
        """Of all that holds whatever the placement."""
        return max(self.work_s, self.latency_s)

    def throughput(self, deployment: Deployment) -> float:
        """Most tokens per second and device, whatever the placement."""
        return deployment.num_sequences / self.seconds / deployment.num_devices

    def placed_throughput(self, deployment: Deployment) -> float:
        """Most tokens per second and device with the given replicas."""
        return deployment.num_sequences / max(self.seconds, self.placement_s) / deployment.num_devices


def bound(deployment: Deployment, popularity: FloatArray, owners: Int16Array | None = None) -> Bound:
    """The bounds of a colocated deployment.

    Args:
        popularity: [L, E].
        owners: [L, E, R], for the placement bound.
    """
    sizes, device, costs = deployment.sizes, deployment.device, deployment.costs()
    num_devices, speed = deployment.num_devices, float((1 / deployment.slowdown).sum())
    layers = range(sizes.num_layers)
    home_work = 0.0
    for count in np.diff(np.arange(num_devices + 1) * deployment.num_sequences // num_devices).tolist():
        home_work += sum(costs.attention(i, count, count * deployment.context) for i in layers) + costs.head(count)
    experts = expert_work(deployment, popularity)
    launches = device.launch_s * sizes.num_sparse_layers
    work = home_work + experts.sum() + launches
    latency = sum(costs.attention(i, 1, deployment.context) for i in layers) + costs.head(1)
    latency += sizes.num_sparse_layers * (device.launch_s + sizes.expert_bytes / device.bandwidth)
    latency *= float(deployment.slowdown.min())
    placed = 0.0
    if owners is not None:
        travelling = _travelling_bound(deployment, popularity, owners, latency)
        placed = max(_placement_bound(deployment, experts, owners), travelling)
    return Bound(work / speed, latency, placed)


def expert_work(deployment: Deployment, popularity: FloatArray) -> FloatArray:
    """[L, E] least seconds of each expert per iteration, on a device of speed 1; dense layers have none."""
    sizes, device = deployment.sizes, deployment.device
    pairs = deployment.num_sequences * sizes.top_k * popularity
    computing = pairs * (2 * sizes.expert_params / device.flops)
    chosen = -np.expm1(-pairs)  # P(n > 0) of a Poisson count
    seconds = np.maximum(computing, chosen * (sizes.expert_bytes / device.bandwidth))
    seconds[: sizes.num_dense_layers] = 0.0
    return seconds


def _travelling_bound(deployment: Deployment, popularity: FloatArray, owners: Int16Array, latency_s: float) -> float:
    """Least seconds of an iteration, on average over homes of equal size, if tokens travel to experts elsewhere."""
    first, hop_s = deployment.sizes.num_dense_layers, deployment.fabric.intra.latency_s
    seconds = np.full(deployment.num_devices, latency_s)
    for home in deployment.homes:
        local = (popularity * (owners == home).any(axis=-1))[first:].sum(axis=1)  # more than the part of such tokens
        seconds[home] += 2 * hop_s * (1 - np.minimum(local, 1.0)).sum()
    return float(1 / (1 / seconds).mean())


def _placement_bound(deployment: Deployment, experts: FloatArray, owners: Int16Array) -> float:
    """Longest over sets S of owners of (work that only S can do) / (speed of S)."""
    num_owners = len(deployment.owners)
    if num_owners > _MAX_ENUMERATED:
        return 0.0
    masks = np.where(owners >= 0, 1 << np.maximum(owners, 0).astype(np.int64), 0).sum(axis=-1)
    confined = np.bincount(masks.ravel(), weights=experts.ravel(), minlength=1 << num_owners)
    speed = np.zeros(1 << num_owners)
    for owner in range(num_owners):  # sums over all subsets, one device at a time
        bit = 1 << owner
        having = np.flatnonzero(np.arange(1 << num_owners) & bit)
        confined[having] += confined[having - bit]
        speed[having] += deployment.owner_speed[owner]
    return float((confined[1:] / speed[1:]).max())
