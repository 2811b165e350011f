"""Small simulations, and costs that are easy to add up by hand."""

from __future__ import annotations

from typing import Any

import numpy as np

from amoe.config import PlacementConfig, SchedulerConfig
from amoe.profiles.devices import DeviceProfile
from amoe.profiles.links import Fabric, LinkProfile
from amoe.profiles.models import ModelSizes, grouped_query_attention
from amoe.sim.config import SimConfig, Window
from amoe.sim.results import Results
from amoe.sim.simulator import Simulator
from amoe.sim.workload import Lengths, Workload

SIZES = ModelSizes(
    name="tiny",
    num_layers=3,
    num_dense_layers=1,
    dense_intermediate_size=512,
    hidden_size=256,
    num_experts=8,
    top_k=2,
    moe_intermediate_size=512,
    vocab_size=1000,
    **grouped_query_attention(256, 4, 2, 64),
)
DEVICE = DeviceProfile(name="toy", peak_flops=1e12, memory_bandwidth=1e11, memory_bytes=1e9)
FABRIC = Fabric(intra=LinkProfile(1e-5, 1e9), inter=LinkProfile(1e-4, 1e8))


class FixedRouting:
    """Every token takes the same experts."""

    def __init__(self, *experts: int) -> None:
        self._experts = experts

    def draw(self, rng, layer, num_tokens, now=0.0):
        return np.tile(np.array(self._experts), (num_tokens, 1))

    def popularity(self, now=0.0):
        raise NotImplementedError


class RoundRobinRouting:
    """Token i of a step takes experts 2i and 2i + 1, modulo E: as even as can be."""

    def draw(self, rng, layer, num_tokens, now=0.0):
        first = 2 * np.arange(num_tokens) % SIZES.num_experts
        return np.stack((first, first + 1), axis=1)

    def popularity(self, now=0.0):
        raise NotImplementedError


class FixedCosts:
    """Seconds that depend on the number of tokens alone, times what the device is slowed by."""

    ATTENTION, EXPERTS, HEAD, TOKEN = 3e-4, 5e-4, 2e-4, 1e-6

    def __init__(self, sizes: ModelSizes, device: DeviceProfile) -> None:
        self.slowdown = device.slowdown

    def attention(self, layer, num_tokens, num_context):
        return (self.ATTENTION + num_tokens * self.TOKEN) * self.slowdown

    def experts(self, layer, counts):
        return np.asarray((self.EXPERTS + counts.sum() * self.TOKEN) * self.slowdown)

    def head(self, num_tokens):
        return (self.HEAD + num_tokens * self.TOKEN) * self.slowdown


def make_config(**changes: Any) -> SimConfig:
    """One worker, one sequence at a time, five of them; `changes` to that."""
    values: dict[str, Any] = {
        "sizes": SIZES,
        "device": DEVICE,
        "fabric": FABRIC,
        "routing": RoundRobinRouting(),
        "workload": Workload(
            concurrency=1, num_requests=5, input=Lengths(mean=20), output=Lengths(mean=10, kind="uniform", spread=0.5)
        ),
        "window": Window(),
        "scheduler": SchedulerConfig(max_num_seqs=32, max_num_batched_tokens=64),
        "placement": PlacementConfig(),
    }
    return SimConfig(**(values | changes))


def simulate(**changes: Any) -> Results:
    return Simulator(make_config(**changes)).run()
