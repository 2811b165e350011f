"""Which ways to use devices there are, which of them are worth a simulation, and why none is possible."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from amoe.errors import ConfigError
from amoe.policy.wave_count import WaveEstimate
from amoe.sim.flow.bound import expert_work
from amoe.sim.flow.deployment import Deployment
from amoe.sim.flow.systems import WAVE_COUNTS, WAVES
from amoe.sim.planner import (
    SCHEDULES,
    Evaluator,
    Option,
    Scenario,
    is_possible,
    least_devices,
    most_sequences,
    prefill_seconds,
)

SIXTEENTHS = 16
PER_DEVICE = (16, 64, 256, 1024)  # sequences per device of a sweep


@dataclass(frozen=True, kw_only=True, slots=True)
class Space:
    """What is searched.

    Attributes:
        redundant: numbers of redundant experts per device to try.
        waves: fixed; None: chosen, and held against its neighbours.
        colocated, disaggregated: try those.
        lockstep: schedules to compare with, names of `SCHEDULES`.
        curves: other loads too, for a plot.
    """

    redundant: tuple[int, ...] = (0, 1, 2, 4)
    waves: int | None = None
    colocated: bool = True
    disaggregated: bool = True
    lockstep: tuple[str, ...] = ("ep", "eplb", "tbo", "eplb+tbo")
    curves: bool = False

    def __post_init__(self) -> None:
        unknown = [name for name in self.lockstep if name not in SCHEDULES or name == WAVES.name]
        if unknown:
            known = ", ".join(name for name in SCHEDULES if name != WAVES.name)
            raise ConfigError(f"there is no lockstep schedule {unknown[0]!r} to compare with; known: {known}")
        if not self.redundant or min(self.redundant) < 0 or list(self.redundant) != sorted(set(self.redundant)):
            raise ConfigError("numbers of redundant experts must be ascending, and at least 0")
        if not (self.colocated or self.disaggregated):
            raise ConfigError("nothing is left to search: neither colocated nor disaggregated placements")


def all_options(scenario: Scenario, num_devices: int, space: Space) -> list[Option]:
    """Placements of the schedule `waves`: colocated ones, and ratios of attention to experts in sixteenths."""
    splits = {0} if space.colocated else set[int]()
    if space.disaggregated:
        sixteenths = range(1, SIXTEENTHS)
        splits |= {round(num_devices * s / SIXTEENTHS) for s in sixteenths} - {0, num_devices}
    options = [
        Option(num_devices=num_devices, attention_devices=split, redundant=redundant, waves=space.waves)
        for split in sorted(splits)
        for redundant in space.redundant
    ]
    return [option for option in options if is_possible(scenario.sizes, option)]


def promising(
    scenario: Scenario, options: Sequence[Option], of_devices: int, num_splits: int, sequences: int
) -> list[Option]:
    """All colocated ones, and the `num_splits` ratios that would be the quickest in perfect balance.

    Args:
        of_devices: how many there are in all.
        sequences: in flight, about.
    """
    evaluator = Evaluator(scenario, of_devices)
    passes = {}
    for option in options:
        if option.attention_devices and option.attention_devices not in passes:
            count = max(option.num_homes, min(sequences, most_sequences(scenario, option)))
            deployment = evaluator.deployment(option, count)
            prefill = prefill_seconds(scenario, option, deployment.slowdown) / scenario.output_len
            # Seconds per token, because with less room there are fewer sequences in a pass.
            passes[option.attention_devices] = balanced_pass(scenario, deployment) / count + prefill
    kept = sorted(passes, key=lambda split: passes[split])[:num_splits]
    return [option for option in options if not option.attention_devices or option.attention_devices in kept]


def balanced_pass(scenario: Scenario, deployment: Deployment) -> float:
    """Seconds of a pass of all sequences, disaggregated, with the best number of waves and perfect balance."""
    costs, num_layers = deployment.costs(), deployment.sizes.num_layers
    num_homes, num_owners = len(deployment.homes), len(deployment.owners)
    passes = []
    for waves in WAVE_COUNTS:
        wave = replace(deployment, num_sequences=max(num_homes, deployment.num_sequences // waves))
        tokens = max(1, wave.num_sequences // num_homes)
        attention = sum(costs.attention(layer, tokens, tokens * deployment.context) for layer in range(num_layers))
        home = attention + costs.head(tokens)
        owner = float(expert_work(wave, scenario.popularity).sum()) / num_owners
        busy = np.array([home, owner])
        estimate = WaveEstimate(waves, busy, port_s=0.0, latency_s=home + owner, communication_s=0.0)
        passes.append(estimate.pass_s)
    return min(passes)


def loads_of(scenario: Scenario, option: Option) -> list[int]:
    """Sequences of a sweep, up to what there is room for."""
    most = most_sequences(scenario, option)
    counts = {per_device * option.num_devices for per_device in PER_DEVICE}
    return sorted({max(option.num_homes, min(count, most)) for count in counts})


def no_room(scenario: Scenario, num_devices: int, sequences: int) -> str:
    """One line for a model that does not fit."""
    least = least_devices(scenario, sequences)
    load = f" and {sequences} sequences of {scenario.input_len + scenario.output_len} tokens" if sequences > 1 else ""
    device = f"{scenario.device.name} ({scenario.device.memory_bytes / 1e9:.0f} GB)"
    message = f"{scenario.sizes.name}{load} does not fit {num_devices} × {device}"
    if least is None:
        return f"{message}, and no number of them would do: attention alone is too large for one"
    if least <= num_devices:
        return f"{message} in the placements that are searched, or there are more devices than sequences or experts"
    return f"{message}: at least {least} devices are needed"
