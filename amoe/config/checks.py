"""What every part of the configuration checks itself with."""

from __future__ import annotations

from amoe.errors import ConfigError


def require(holds: bool, message: str) -> None:
    """Refuse a value.

    Raises:
        ConfigError: with `message`, unless it `holds`.
    """
    if not holds:
        raise ConfigError(message)
