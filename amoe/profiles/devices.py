"""Devices as the cost model sees them: how fast they compute, how fast they read, what a kernel costs to launch."""

from __future__ import annotations

from dataclasses import dataclass, replace

from amoe.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceProfile:
    """One device.

    Attributes:
        peak_flops: dense bf16, per second, as the data sheet says.
        memory_bandwidth: bytes per second, as the data sheet says.
        memory_bytes: what weights and KV cache have to fit in.
        compute_efficiency, bandwidth_efficiency: shares of those peaks that kernels reach. The defaults put the ridge
            of an H100 at 221 tokens per expert, as in the study that this project checks itself against.
        launch_s: fixed device time of a block: its kernels' launches and tails.
        sampling_s: fixed time of an iteration for the sampler and what surrounds it.
        slowdown: every time is multiplied by it (a straggler has more than 1).
    """

    name: str
    peak_flops: float
    memory_bandwidth: float
    memory_bytes: float
    compute_efficiency: float = 0.6
    bandwidth_efficiency: float = 0.8
    launch_s: float = 15e-6
    sampling_s: float = 200e-6
    slowdown: float = 1.0

    def __post_init__(self) -> None:
        for name in ("peak_flops", "memory_bandwidth", "memory_bytes", "slowdown"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"device profile {self.name}: {name} must be greater than 0")
        for name in ("compute_efficiency", "bandwidth_efficiency"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(f"device profile {self.name}: {name} must be in (0, 1]")
        for name in ("launch_s", "sampling_s"):
            if getattr(self, name) < 0:
                raise ConfigError(f"device profile {self.name}: {name} must not be negative")

    @property
    def flops(self) -> float:
        """What kernels reach, per second."""
        return self.peak_flops * self.compute_efficiency / self.slowdown

    @property
    def bandwidth(self) -> float:
        """What kernels reach, bytes per second."""
        return self.memory_bandwidth * self.bandwidth_efficiency / self.slowdown

    def slowed(self, factor: float) -> DeviceProfile:
        """The same device, `factor` times slower in everything that it does itself."""
        return replace(
            self,
            slowdown=self.slowdown * factor,
            launch_s=self.launch_s * factor,
            sampling_s=self.sampling_s * factor,
        )


# Data sheets: dense bf16 without sparsity.
DEVICES = {
    profile.name: profile
    for profile in (
        DeviceProfile(name="a100-80g", peak_flops=312e12, memory_bandwidth=2.039e12, memory_bytes=80e9),
        DeviceProfile(name="h100", peak_flops=989e12, memory_bandwidth=3.35e12, memory_bytes=80e9),
        DeviceProfile(name="h200", peak_flops=989e12, memory_bandwidth=4.8e12, memory_bytes=141e9),
        DeviceProfile(name="b200", peak_flops=2250e12, memory_bandwidth=8.0e12, memory_bytes=180e9),
    )
}


def device_profile(name: str) -> DeviceProfile:
    """The profile of a named device.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in DEVICES:
        raise ConfigError(f"there is no device profile {name!r}; known: {', '.join(DEVICES)}")
    return DEVICES[name]
