"""The device of a worker."""

from __future__ import annotations

import torch

from amoe.errors import ConfigError


def resolve_device(name: str, rank: int) -> torch.device:
    """The device of worker `rank`: plain `cuda` spreads workers over the devices there are.

    Raises:
        ConfigError: there is no such device here.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"--device {name!r} is not a device") from error
    if device.type == "cpu":
        return device
    try:
        count = torch.get_device_module(device).device_count()
    except (RuntimeError, AttributeError) as error:
        raise ConfigError(f"--device {name}: this torch cannot use it") from error
    index = device.index if device.index is not None else (rank % count if count else 0)
    if index >= count:
        raise ConfigError(f"--device {name}: there is no such device here ({count} found)")
    return torch.device(device.type, index)
