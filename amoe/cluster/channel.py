"""The first words on a worker's control channel: what it says until it is ready."""

from __future__ import annotations

from collections.abc import Callable

from amoe.engine.control import AsyncControlChannel
from amoe.engine.messages import Failed, Loading, Ready
from amoe.errors import ConfigError, EngineDeadError


async def ready_message(
    channel: AsyncControlChannel, title: str, on_loading: Callable[[Loading], None]
) -> Ready | None:
    """Listen until the worker is ready. None: it has gone without saying why.

    Raises:
        ConfigError: it cannot start; the message is for the user.
        EngineDeadError: it failed, and has said how.
        TransportError: it broke the protocol.
    """
    async for message in channel:
        if isinstance(message, Loading):
            on_loading(message)
        elif isinstance(message, Ready):
            return message
        elif isinstance(message, Failed):
            if message.user_error:
                raise ConfigError(message.message)
            raise EngineDeadError(f"{title} could not start: {message.message}")
    return None
