"""Links between devices: latency and bandwidth, inside a node and between nodes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from amoe.errors import ConfigError


@dataclass(frozen=True, slots=True)
class LinkProfile:
    """One direction of one device's port.

    Attributes:
        latency_s: from the end of the sender's serialisation to the first byte at the receiver.
        bandwidth: bytes per second that a port sends, and that it takes in.
    """

    latency_s: float
    bandwidth: float

    def __post_init__(self) -> None:
        if self.latency_s < 0 or self.bandwidth <= 0:
            raise ConfigError("a link needs a latency of at least 0 and a bandwidth greater than 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class Fabric:
    """How the devices of a deployment are connected. Device d sits in node d // devices_per_node.

    Every device has two ports in each direction, one for its node and one for the network: what comes in at one port at
    the same time queues there (the *ingress* queue that a popular expert builds).
    """

    devices_per_node: int = 8
    intra: LinkProfile = LinkProfile(10e-6, 360e9)
    inter: LinkProfile = LinkProfile(15e-6, 45e9)

    def __post_init__(self) -> None:
        if self.devices_per_node < 1:
            raise ConfigError("devices_per_node must be at least 1")

    def same_node(self, num_devices: int) -> npt.NDArray[np.bool_]:
        """[D, D]: both devices sit in one node."""
        node = np.arange(num_devices) // self.devices_per_node
        return node[:, None] == node[None, :]


# Per direction: NVLink 3, 4, 5 at about 80 % of the data sheet; 200 and 400 Gb/s InfiniBand at 90 %.
FABRICS = {
    "a100-80g": Fabric(intra=LinkProfile(10e-6, 240e9), inter=LinkProfile(15e-6, 22.5e9)),
    "h100": Fabric(),
    "h200": Fabric(),
    "b200": Fabric(intra=LinkProfile(10e-6, 720e9), inter=LinkProfile(15e-6, 45e9)),
}
