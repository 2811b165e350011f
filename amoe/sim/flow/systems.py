"""The systems that are compared, by name: lockstep ones as strong as they are in the world, and waves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np

from amoe.policy.placement import place_experts, replicate_experts
from amoe.policy.replicas import home_shares
from amoe.policy.steering import COUPLING
from amoe.policy.wave_count import WaveEstimate, choose_num_waves
from amoe.policy.wave_order import WaveOrder
from amoe.sim.flow.deployment import Deployment, FloatArray
from amoe.sim.flow.loads import Loads, ReplicaMode
from amoe.sim.flow.march import march
from amoe.sim.flow.result import FlowResult
from amoe.sim.flow.waves import HostModel, WaveSimulator
from amoe.types import Int16Array

WAVE_COUNTS = (1, 2, 3, 4, 6, 8)
SPARE_HOST = HostModel()
PROBE_WITHIN = 0.12  # of the shortest predicted pass
PROBE_SEED = 77
RISEN = 1.15


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
        apart, attention_first: see `policy.wave_order`.
        probe: where `waves` is None, numbers that are predicted to be nearly as good are tried, as an engine does.
    """

    name: str
    replicas: Literal["none", "packed", "anchored"]
    mode: ReplicaMode
    waves: int | None
    lockstep: bool
    balance_homes: bool = False
    attention_devices: int | None = 0
    apart: bool = True
    attention_first: bool = True
    host: HostModel = SPARE_HOST
    probe: bool = True


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
    replace(WAVES, name="waves, not probed", probe=False),
    replace(WAVES, name="waves, not apart", apart=False),
    replace(WAVES, name="waves, attention not first", attention_first=False),
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
    loads = pick_loads(system, case, seed) if system.waves is None else make_loads(system, case, system.waves, seed)
    if system.lockstep:
        return march(loads, num_iterations=num_iterations, num_warmup=2)
    return wave_simulator(system, loads).run(num_iterations=num_iterations, num_warmup=3)


def _best_split(system: System, case: Case, seed: int, num_iterations: int) -> FlowResult:
    """Disaggregated with the best of three splits: its user would have searched too."""
    num_devices = case.deployment.num_devices
    splits = sorted({max(1, num_devices * eighths // 8) for eighths in (2, 4, 5)})
    runs = [
        simulate(replace(system, attention_devices=split), case, seed=seed, num_iterations=num_iterations)
        for split in splits
        if split < num_devices
    ]
    return max(runs, key=lambda run: run.throughput)


def make_loads(system: System, case: Case, waves: int, seed: int) -> Loads:
    """The loads of a system with so many waves."""
    deployment = case.deployment
    coupling = COUPLING if waves > 1 else 0.0
    loads = partial(Loads, deployment, case.popularity, case.owners(system.replicas), system.mode, seed=seed)
    even = loads(deployment.tokens(waves), coupling=coupling)
    if not system.balance_homes or not deployment.colocated:
        return even
    # A single wave needs every layer level, whatever the sum: there only the speed of a home counts.
    experts = even.expected_seconds().sum(axis=0) * waves * (waves > 1)
    homes = home_shares(experts, per_sequence_seconds(deployment), deployment.num_sequences)
    return loads(deployment.tokens(waves, homes), shares=even.shares)


def per_sequence_seconds(deployment: Deployment) -> FloatArray:
    """[A] seconds per iteration that one more sequence costs a home, where it has many."""
    costs, context = deployment.costs(), deployment.context
    few, many = 512, 1024

    def seconds(count: int) -> float:
        layers = range(deployment.sizes.num_layers)
        return sum(costs.attention(layer, count, count * context) for layer in layers)

    return (seconds(many) - seconds(few)) / (many - few) * deployment.slowdown[list(deployment.homes)]


def pick_loads(system: System, case: Case, seed: int) -> Loads:
    """With as many waves as `policy.wave_count` chooses from their expected times."""
    most = int(case.deployment.tokens(1).min())
    tried: list[tuple[WaveEstimate, Loads]] = []
    for waves in WAVE_COUNTS:
        if waves > max(1, most):
            break
        loads = make_loads(system, case, waves, seed)
        tried.append((estimate(loads), loads))
        found_least = min(found.pass_s for found, _ in tried)
        # The time of a pass falls and then rises with W: once it has clearly risen, the rest need not be planned.
        if found_least * RISEN < tried[-1][0].pass_s:
            break
    chosen = choose_num_waves([found for found, _ in tried])
    if system.probe:
        chosen = _probed(system, tried, chosen)
    return next(loads for found, loads in tried if found.num_waves == chosen)


def _probed(system: System, tried: Sequence[tuple[WaveEstimate, Loads]], predicted: int) -> int:
    """The number of waves that an engine settles on which measures what is predicted to be nearly as good.

    Measured on other draws than those of the result, so that luck is not chosen.
    """
    least = min(found.pass_s for found, _ in tried)
    near = [(found, loads) for found, loads in tried if found.pass_s <= least * (1 + PROBE_WITHIN)]
    if len(near) < 2:
        return predicted
    rates = {
        found.num_waves: wave_simulator(system, loads.redrawn(PROBE_SEED))
        .run(num_iterations=5, num_warmup=2)
        .throughput
        for found, loads in near
    }
    return max(rates, key=lambda waves: rates[waves])


def wave_simulator(system: System, loads: Loads) -> WaveSimulator:
    """A simulator of waves with the order and the host of `system`."""
    order = WaveOrder(
        2 * loads.deployment.sizes.num_layers + 1, loads.tokens.shape[1], attention_first=system.attention_first
    )
    return WaveSimulator(loads, system.host, order if system.apart else replace(order, spread=0.0, gap=0.0))


def estimate(loads: Loads) -> WaveEstimate:
    """Expected times of a wave."""
    deployment = loads.deployment
    attention, head = loads.attention().mean(axis=2), loads.head().mean(axis=1)
    experts = loads.expected_seconds()
    home_s, owner_s = attention.sum(axis=0) + head, experts.sum(axis=0)
    busy = home_s + owner_s if deployment.colocated else np.concatenate((home_s, owner_s))
    latency = float(attention.max(axis=1).sum() + experts.max(axis=1).sum() + head.max())
    port_s, hop_s = _exchange_seconds(deployment, loads.tokens.shape[1])
    exchanges = 2 * deployment.sizes.num_sparse_layers
    return WaveEstimate(
        num_waves=loads.tokens.shape[1],
        busy_s=busy,
        port_s=exchanges * port_s,
        latency_s=latency,
        communication_s=exchanges * (port_s + hop_s),
    )


def _exchange_seconds(deployment: Deployment, num_waves: int) -> tuple[float, float]:
    """Seconds that a port needs for one wave's dispatch (or combine) at one layer, and the latency of the link."""
    num_owners, fabric = len(deployment.owners), deployment.fabric
    tokens = deployment.num_sequences / len(deployment.homes) / num_waves
    reached = num_owners * (1 - (1 - 1 / num_owners) ** deployment.sizes.top_k)  # expected owners of a token
    near = min(fabric.devices_per_node, deployment.num_devices)
    far = deployment.num_devices - near
    seconds, latency = 0.0, 0.0
    for devices, link in ((near - 1, fabric.intra), (far, fabric.inter)):
        if devices > 0:
            rows = tokens * reached * devices / deployment.num_devices
            seconds = max(seconds, rows * deployment.row_bytes / link.bandwidth)
            latency = link.latency_s
    return seconds, latency
