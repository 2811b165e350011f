"""The systems that are compared, by name: lockstep ones as strong as they are in the world, and waves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from amoe.policy.placement import place_experts, replicate_experts
from amoe.policy.replicas import home_shares
from amoe.policy.wave_count import WaveEstimate, choose_num_waves
from amoe.sim.flow.deployment import Deployment, FloatArray
from amoe.sim.flow.loads import Loads, ReplicaMode
from amoe.sim.flow.march import march
from amoe.sim.flow.result import FlowResult
from amoe.sim.flow.waves import HostModel, WaveSimulator
from amoe.types import Int16Array

COUPLING = 0.05  # of layers in `plan_layers` where waves are in flight; one wave has every layer for itself
WAVE_COUNTS = (1, 2, 3, 4, 6, 8)


@dataclass(frozen=True, kw_only=True)
class System:
    """How a system places experts, divides tokens among replicas, and orders its steps.

    Attributes:
        replicas: `none`, `packed` (EPLB) or `anchored` (see `policy.placement.replicate_experts`).
        mode: how tokens are divided among replicas.
        waves: in flight; None: `policy.wave_count` chooses.
        lockstep: a fixed order of blocks for all, otherwise staggered strict waves.
        balance_homes: sequences go where there is less other work.
        attention_devices: of N; 0 is colocated, None tries several and keeps the best.
    """

    name: str
    replicas: Literal["none", "packed", "anchored"]
    mode: ReplicaMode
    waves: int | None
    lockstep: bool
    balance_homes: bool = False
    attention_devices: int | None = 0
    stagger: float | None = None
    host: HostModel = HostModel()


BASELINES = (
    System(name="ep", replicas="none", mode="primary", waves=1, lockstep=True),
    System(name="eplb", replicas="packed", mode="even", waves=1, lockstep=True),
    System(name="tbo", replicas="none", mode="primary", waves=2, lockstep=True),
    System(name="eplb+tbo", replicas="packed", mode="even", waves=2, lockstep=True),
    System(name="llep", replicas="packed", mode="level-batch", waves=1, lockstep=True),
    System(name="llep+tbo", replicas="packed", mode="level-batch", waves=2, lockstep=True),
    System(name="ping-pong", replicas="packed", mode="level-batch", waves=2, lockstep=True, attention_devices=None),
)
WAVES = System(name="waves", replicas="anchored", mode="plan", waves=None, lockstep=False, balance_homes=True)
ABLATIONS = (
    replace(WAVES, name="waves, even homes", balance_homes=False),
    replace(WAVES, name="waves, levelled per batch", mode="level-home"),
    replace(WAVES, name="waves, packed replicas", replicas="packed"),
    replace(WAVES, name="waves, not staggered", stagger=0.0),
    replace(WAVES, name="waves, no replicas", replicas="none", mode="primary"),
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One point of a study.

    Attributes:
        popularity: [L, E] where tokens go.
        believed: [L, E] from which replicas were placed: an old domain's where the placement is stale.
        slots: experts per owner and layer, replicas included.
    """

    deployment: Deployment
    popularity: FloatArray
    believed: FloatArray
    slots: int

    def owners(self, replicas: str) -> Int16Array:
        """[L, E, R]."""
        sizes, num_owners = self.deployment.sizes, len(self.deployment.owners)
        if replicas == "none":
            return place_experts(sizes.num_layers, sizes.num_experts, num_owners)
        slots = max(self.slots, -(-sizes.num_experts // num_owners))
        return replicate_experts(self.believed, num_owners, slots, anchored=replicas == "anchored")


def simulate(system: System, case: Case, *, seed: int = 0, num_iterations: int = 10) -> FlowResult:
    """Run a system on a case."""
    if system.attention_devices is None:
        return _best_split(system, case, seed, num_iterations)
    if system.attention_devices:
        deployment = replace(case.deployment, attention_devices=system.attention_devices)
        case = replace(case, deployment=deployment)
    waves = system.waves or pick_waves(system, case)
    loads = make_loads(system, case, waves, seed)
    if system.lockstep:
        return march(loads, num_iterations=num_iterations, num_warmup=2)
    simulator = WaveSimulator(loads, system.host, system.stagger)
    return simulator.run(num_iterations=num_iterations, num_warmup=3)


def _best_split(system: System, case: Case, seed: int, num_iterations: int) -> FlowResult:
    """Disaggregated with the best number of attention devices, in eighths: a user of it would have searched too."""
    num_devices = case.deployment.num_devices
    splits = sorted({max(1, num_devices * eighths // 8) for eighths in (1, 2, 3, 4, 5, 6)})
    runs = [
        simulate(replace(system, attention_devices=split), case, seed=seed, num_iterations=num_iterations)
        for split in splits
        if split < num_devices
    ]
    return max(runs, key=lambda run: run.throughput)


def make_loads(system: System, case: Case, waves: int, seed: int) -> Loads:
    """The loads of a system with so many waves."""
    deployment, owners = case.deployment, case.owners(system.replicas)

    def loads(shares: FloatArray | None) -> Loads:
        return Loads(
            deployment,
            case.popularity,
            owners,
            system.mode,
            deployment.tokens(waves, shares),
            seed=seed,
            coupling=COUPLING if waves > 1 else 0.0,
        )

    even = loads(None)
    if not system.balance_homes or not deployment.colocated:
        return even
    experts = even.expected_seconds().sum(axis=0) * waves
    return loads(home_shares(experts, per_sequence_seconds(deployment), deployment.num_sequences))


def per_sequence_seconds(deployment: Deployment) -> FloatArray:
    """[A] seconds per iteration that one more sequence costs a home, where it has many."""
    costs, context = deployment.costs(), deployment.context
    few, many = 512, 1024

    def seconds(count: int) -> float:
        layers = range(deployment.sizes.num_layers)
        return sum(costs.attention(layer, count, count * context) for layer in layers)

    return (seconds(many) - seconds(few)) / (many - few) * deployment.slowdown[list(deployment.homes)]


def pick_waves(system: System, case: Case, counts: Sequence[int] = WAVE_COUNTS) -> int:
    """What `policy.wave_count` chooses from the expected times of each number of waves."""
    least = int(case.deployment.tokens(1).min())
    estimates = [estimate(make_loads(system, case, count, 0)) for count in counts if count <= max(1, least)]
    return choose_num_waves(estimates)


def estimate(loads: Loads) -> WaveEstimate:
    """Expected times of a wave."""
    deployment = loads.deployment
    attention, head = loads.attention().mean(axis=2), loads.head().mean(axis=1)
    experts = loads.expected_seconds()
    home_s, owner_s = attention.sum(axis=0) + head, experts.sum(axis=0)
    busy = home_s + owner_s if deployment.colocated else np.concatenate((home_s, owner_s))
    rows = loads.tokens.sum() * deployment.sizes.top_k / loads.tokens.shape[1] / len(deployment.owners)
    link = (
        deployment.fabric.intra
        if deployment.num_devices <= deployment.fabric.devices_per_node
        else (deployment.fabric.inter)
    )
    hop = link.latency_s + rows * deployment.row_bytes / link.bandwidth
    return WaveEstimate(
        num_waves=loads.tokens.shape[1],
        busy_s=busy,
        latency_s=float(
            attention.max(axis=1).sum()
            + experts.max(axis=1).sum()
            + head.max()
            + 2 * hop * deployment.sizes.num_sparse_layers
        ),
    )
