"""Small deployments whose figures can be added up by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import strategies as st

from amoe.policy.placement import place_experts
from amoe.profiles.devices import DEVICES
from amoe.profiles.links import Fabric, LinkProfile
from amoe.profiles.models import ModelSizes, grouped_query_attention
from amoe.profiles.routing import log_normal_routing
from amoe.sim.flow.deployment import Deployment
from amoe.sim.flow.loads import Loads
from amoe.sim.flow.systems import Case

SIZES = ModelSizes(
    name="small",
    num_layers=4,
    hidden_size=2048,
    num_experts=8,
    top_k=1,
    moe_intermediate_size=4096,
    vocab_size=32000,
    **grouped_query_attention(2048, 16, 4, 128),
)
DEVICE = DEVICES["h100"]


def make_deployment(**changes: Any) -> Deployment:
    """Four devices with 400 sequences; `changes` to that, those to sizes included."""
    sizes = {name: changes.pop(name) for name in list(changes) if name in ModelSizes.__dataclass_fields__}
    values: dict[str, Any] = {"sizes": replace(SIZES, **sizes), "device": DEVICE, "num_devices": 4}
    return Deployment(**(values | {"num_sequences": 400} | changes))


def plain_loads(deployment: Deployment, num_waves: int = 1, sigma: float = 1.0, **options: Any) -> Loads:
    """Loads without replicas."""
    sizes = deployment.sizes
    owners = place_experts(sizes.num_layers, sizes.num_experts, len(deployment.owners))
    popularity = log_normal_routing(sizes, sigma, seed=1).popularity()
    return Loads(deployment, popularity, owners, "primary", deployment.tokens(num_waves), **options)


@st.composite
def cases(draw):
    """Points of a study, all small: one to four devices, low to high load, fresh and stale placements."""
    num_devices = draw(st.integers(1, 4))
    dense = draw(st.integers(0, 1))
    deployment = make_deployment(
        num_layers=draw(st.integers(1, 5)) + dense,
        num_dense_layers=dense,
        dense_intermediate_size=2048,
        num_experts=draw(st.sampled_from([4, 8, 16])),
        top_k=draw(st.integers(1, 3)),
        num_devices=num_devices,
        num_sequences=draw(st.sampled_from([num_devices, num_devices + 1, 2 * num_devices + 1, 16, 300, 4000])),
        context=draw(st.sampled_from([0, 512])),
        slow=draw(st.sampled_from([{}, {}, {0: 1.5}, {0: 0.5}])),
        fabric=Fabric(
            devices_per_node=draw(st.sampled_from([2, 8])),
            intra=LinkProfile(draw(st.sampled_from([0.0, 1e-5, 1e-3])), 360e9),
            inter=LinkProfile(1e-3, 45e9),
        ),
    )
    sigma, seed = draw(st.sampled_from([0.0, 0.5, 1.25, 2.5])), draw(st.integers(0, 99))
    popularity = log_normal_routing(deployment.sizes, sigma, seed).popularity()
    is_stale = draw(st.booleans())
    believed = log_normal_routing(deployment.sizes, sigma, seed + 1).popularity() if is_stale else popularity
    slots = -(-deployment.sizes.num_experts // num_devices) + draw(st.integers(0, 2))
    return Case(deployment=deployment, popularity=popularity, believed=believed, slots=slots)
