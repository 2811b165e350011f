"""Names in a Ray cluster: of actors and placement groups, which begin with that of their deployment."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from ray.exceptions import ActorAlreadyExistsError, RayError

from amoe.cluster.ray_cluster.session import RayThread
from amoe.errors import ConfigError, EngineDeadError

T = TypeVar("T")

# A name is free a moment after the end of who had it: a former life of a worker, or a server that was killed.
NAME_TIMEOUT_S, _PAUSE_S = 5.0, 0.1


async def claim(thread: RayThread, make: Callable[[], T], name: str) -> T:
    """What `make` returns, called in Ray's thread, which makes something of that name.

    Raises:
        ConfigError: another server has the name.
        EngineDeadError: Ray does not make it.
    """
    for _ in range(round(NAME_TIMEOUT_S / _PAUSE_S)):
        try:
            return await thread.call(make)
        except RayError as error:
            if not _is_taken(error):
                raise EngineDeadError(f"Ray does not make {name}: {first_line(error)}") from error
            await asyncio.sleep(_PAUSE_S)
    raise ConfigError(
        f"there is {name} in this Ray cluster already: another server has this --deployment-name: choose another"
    )


def first_line(error: RayError) -> str:
    """What Ray says, without the traces behind it."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _is_taken(error: RayError) -> bool:
    """Of placement groups Ray tells it in no other way."""
    return isinstance(error, ActorAlreadyExistsError) or "already exists" in str(error)
