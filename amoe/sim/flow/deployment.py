"""What is simulated: a model on devices under a closed-loop load."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from amoe.errors import ConfigError
from amoe.profiles.costs import BlockCosts, RooflineCosts
from amoe.profiles.devices import DeviceProfile
from amoe.profiles.links import Fabric
from amoe.profiles.models import ModelSizes

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """Decoding sequences on N devices. Homes and owners are indices of devices.

    Attributes:
        num_devices: N.
        attention_devices: A of them hold attention only and the rest experts only; 0: all hold both (colocated).
        num_sequences: C, in all homes together; a closed loop: each always has one token in flight.
        context: tokens in the KV cache of a sequence, the mean.
        slow: factor by device of those that are slower than the profile says.
        row_overhead_bytes: columns that travel with a hidden state (slot, generation, iteration, expert ids, weights).
    """

    sizes: ModelSizes
    device: DeviceProfile
    fabric: Fabric = field(default_factory=Fabric)
    num_devices: int
    attention_devices: int = 0
    num_sequences: int
    context: int = 512
    slow: dict[int, float] = field(default_factory=dict)
    row_overhead_bytes: float = 64.0

    def __post_init__(self) -> None:
        if self.num_devices < 1 or not 0 <= self.attention_devices < max(1, self.num_devices):
            raise ConfigError("a deployment needs at least one device, and at least one for experts")
        if self.num_sequences < len(self.homes):
            raise ConfigError(f"{self.num_sequences} sequences are fewer than the {len(self.homes)} attention workers")
        if self.context < 0:
            raise ConfigError("context must not be negative")
        if any(not 0 <= device < self.num_devices or factor <= 0 for device, factor in self.slow.items()):
            raise ConfigError("slow must map existing devices to factors greater than 0")

    @property
    def colocated(self) -> bool:
        return self.attention_devices == 0

    @property
    def homes(self) -> range:
        """[A] devices with attention."""
        return range(self.attention_devices or self.num_devices)

    @property
    def owners(self) -> range:
        """[D] devices with experts."""
        return range(self.attention_devices, self.num_devices)

    @property
    def slowdown(self) -> FloatArray:
        """[N] factor of each device."""
        return np.array([self.slow.get(device, 1.0) for device in range(self.num_devices)])

    @property
    def owner_speed(self) -> FloatArray:
        """[D]."""
        return 1.0 / self.slowdown[list(self.owners)]

    @property
    def row_bytes(self) -> float:
        return self.sizes.row_bytes + self.row_overhead_bytes

    def costs(self) -> BlockCosts:
        """Of a device of factor 1."""
        return RooflineCosts(self.sizes, self.device)

    def tokens(self, num_waves: int, home_shares: FloatArray | None = None) -> npt.NDArray[np.int64]:
        """[A, W] sequences of each home in each wave, as even as whole numbers are.

        Args:
            home_shares: [A], of all sequences; None: the same.
        """
        num_homes = len(self.homes)
        shares = np.full(num_homes, 1 / num_homes) if home_shares is None else home_shares / home_shares.sum()
        marks = np.round(np.cumsum(shares) * self.num_sequences).astype(np.int64)
        per_home = np.diff(marks, prepend=0)
        waves = np.arange(num_waves + 1)
        return np.diff(per_home[:, None] * waves // num_waves, axis=1)
