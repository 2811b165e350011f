"""The simulator by counts against the one that drives the engine's own cores, token by token.

They share the costs of blocks and the order of waves, and nothing else: gates, joins, batching, links and the draws of
experts are written twice. Throughput agrees within 3 %. What remains: the core's lockstep has a barrier more, at the
border of iterations (a link's latency), and its links store and forward, which counts where blocks are short.
"""

from __future__ import annotations

import pytest

from amoe.config import PlacementConfig, SchedulerConfig
from amoe.profiles.links import Fabric, LinkProfile
from amoe.profiles.routing import log_normal_routing
from amoe.sim.config import SimConfig, Slowdown, Window
from amoe.sim.flow.deployment import Deployment
from amoe.sim.flow.march import march
from amoe.sim.flow.waves import WaveSimulator
from amoe.sim.results import Results
from amoe.sim.simulator import Simulator
from amoe.sim.workload import Lengths, Workload
from tests.unit.sim.flow.cases import make_deployment, plain_loads

TOLERANCE = 0.03
WARMUP, ITERATIONS = 4, 10
FABRIC = Fabric(intra=LinkProfile(1e-5, 1e12))


def by_token(deployment: Deployment, scheduler: dict, sigma: float) -> Results:
    """Sequences of one prompt token that never end; halfway through the measurement their context is as deployed."""
    num_devices = deployment.num_devices
    config = SimConfig(
        sizes=deployment.sizes,
        device=deployment.device,
        fabric=deployment.fabric,
        routing=log_normal_routing(deployment.sizes, sigma, seed=1),
        workload=Workload(
            concurrency=deployment.num_sequences,
            input=Lengths(mean=1),
            output=Lengths(mean=1000),
            context_offset=deployment.context - WARMUP - ITERATIONS // 2 - 1,
        ),
        window=Window(length=ITERATIONS, warmup=WARMUP, unit="iterations"),
        placement=PlacementConfig(colocated=num_devices),
        slowdowns=tuple(Slowdown(rank=rank, factor=factor) for rank, factor in deployment.slow.items()),
        scheduler=SchedulerConfig(
            max_num_seqs=-(-deployment.num_sequences // num_devices),
            max_num_batched_tokens=8192,
            max_hold_s=5,
            **scheduler,
        ),
    )
    return Simulator(config).run()


def compare(deployment: Deployment, schedule: str, num_waves: int, sigma: float) -> float:
    """Throughput token by token over throughput by counts."""
    loads = plain_loads(deployment, num_waves, sigma, num_draws=12)
    if schedule == "lockstep":
        expected = march(loads, num_iterations=14)
        found = by_token(deployment, {"schedule": "lockstep", "micro_batches": num_waves}, sigma)
    else:
        expected = WaveSimulator(loads).run(num_iterations=14)
        found = by_token(deployment, {"schedule": "waves", "num_waves": num_waves}, sigma)
    return found.tokens_per_s_per_device / expected.throughput


@pytest.mark.parametrize(
    ("schedule", "num_waves"), [("lockstep", 1), ("lockstep", 2), ("waves", 1), ("waves", 2), ("waves", 3)]
)
@pytest.mark.parametrize("sigma", [0.0, 1.25])
@pytest.mark.parametrize(("num_sequences", "num_experts", "top_k"), [(400, 16, 2), (2400, 8, 1)])
def test_they_agree(schedule, num_waves, sigma, num_sequences, num_experts, top_k):
    deployment = make_deployment(
        num_layers=5, num_experts=num_experts, top_k=top_k, num_sequences=num_sequences, fabric=FABRIC
    )
    assert compare(deployment, schedule, num_waves, sigma) == pytest.approx(1.0, abs=TOLERANCE)


@pytest.mark.parametrize(("schedule", "num_waves"), [("lockstep", 1), ("waves", 2)])
def test_they_agree_on_a_slow_device_behind_dense_layers(schedule, num_waves):
    deployment = make_deployment(
        num_layers=5,
        num_dense_layers=2,
        dense_intermediate_size=8192,
        num_sequences=2400,
        slow={2: 1.5},
        fabric=FABRIC,
    )
    assert compare(deployment, schedule, num_waves, 0.5) == pytest.approx(1.0, abs=TOLERANCE)


def test_they_agree_on_what_waves_gain():
    """Hot experts, computing for long: three waves against lockstep."""
    deployment = make_deployment(num_layers=6, num_sequences=2400, context=64, fabric=FABRIC)
    gains = []
    for sigma in (1.25, 2.0):
        tokens = [
            by_token(deployment, scheduler, sigma).tokens_per_s_per_device
            for scheduler in ({"schedule": "lockstep"}, {"schedule": "waves", "num_waves": 3})
        ]
        counts = [
            march(plain_loads(deployment, 1, sigma)).throughput,
            WaveSimulator(plain_loads(deployment, 3, sigma)).run().throughput,
        ]
        gains.append((tokens[1] / tokens[0], counts[1] / counts[0]))
        assert gains[-1][0] == pytest.approx(gains[-1][1], rel=0.04)
    assert gains[1][0] > gains[0][0]
