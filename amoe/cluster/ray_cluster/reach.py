"""Whether the hosts of two workers reach each other, tried before they are told to exchange tokens.

A firewall between nodes lets Ray through, on the ports that it was given, and workers take others. Unnoticed, the first
request would find that out, and the supervisor would end one healthy worker after the other for not answering.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import threading
from collections.abc import Awaitable, Callable
from typing import NamedTuple

from amoe.config import PlacementConfig
from amoe.errors import ConfigError

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 5.0
ANSWER_TIMEOUT_S = 15.0  # of a worker that is asked to connect: it may be stopped, and has other threads to run

Reach = Callable[[str, int], Awaitable[str]]


class Door:
    """Takes connections at a port of its own and ends them, as long as the process lives.

    Raises:
        OSError: nothing can listen at `host`.
    """

    def __init__(self, host: str) -> None:
        self._listener = socket.create_server((host, 0), family=_family(host), backlog=64)
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._run, name="amoe-door", daemon=True).start()

    def _run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                self._listener.accept()[0].close()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


def try_to_reach(host: str, port: int) -> str:
    """Connect, and leave. Returns what went wrong, for a person; "" if nothing did. Blocks."""
    try:
        socket.create_connection((host, port), CONNECT_TIMEOUT_S).close()
    except TimeoutError:
        return f"no answer within {CONNECT_TIMEOUT_S:g} s"
    except OSError as error:
        return error.strerror or str(error)
    return ""


class Guest(NamedTuple):
    """One life of one worker.

    Attributes:
        title: for messages.
        host, port: of its `Door`.
        reach: has it connect to a host and a port, see `try_to_reach`.
    """

    title: str
    host: str
    port: int
    reach: Reach


class Acquaintances:
    """The workers of a cluster, each of which has tried to reach those that it exchanges tokens with."""

    def __init__(self, placement: PlacementConfig) -> None:
        self._homes = frozenset(placement.attention_ranks)
        self._guests: dict[int, Guest] = {}

    async def introduce(self, rank: int, guest: Guest) -> None:
        """Have a new life of a worker and all others that there are try each other, both ways.

        Raises:
            ConfigError: some cannot reach another; the message names them.
        """
        self._guests[rank] = guest
        others = {other_rank: other for other_rank, other in self._guests.items() if self._talk(rank, other_rank)}
        tries = [_complaint(*pair) for other in others.values() for pair in ((guest, other), (other, guest))]
        complaints = await asyncio.gather(*tries)
        for number, (other_rank, other) in enumerate(others.items()):
            # Whoever has been given up meanwhile is not to be reached: no reason to give up somebody else.
            complaint = complaints[2 * number] or complaints[2 * number + 1]
            if complaint and self._guests.get(other_rank) is other:
                raise ConfigError(complaint)

    def forget(self, rank: int, guest: Guest | None) -> None:
        """A life has ended, or is given up."""
        if guest is not None and self._guests.get(rank) is guest:
            del self._guests[rank]

    def _talk(self, rank: int, other: int) -> bool:
        """Every exchange has a home at one end."""
        return rank != other and not self._homes.isdisjoint((rank, other))


async def _complaint(guest: Guest, other: Guest) -> str:
    """What the one says that cannot reach the other. One that does not answer at all is no news: it may have died."""
    try:
        reason = await asyncio.wait_for(guest.reach(other.host, other.port), ANSWER_TIMEOUT_S)
    except Exception as error:
        logger.debug("%s has not said whether it reaches %s: %s", guest.title, other.title, error)
        return ""
    if not reason:
        return ""
    return (
        f"{guest.title} on {guest.host} cannot reach {other.title} on {other.host} ({reason}): workers connect to each "
        "other at ports that the kernel chooses: open them between the nodes of the Ray cluster, whose addresses must "
        "be those that nodes reach each other at (`ray start --node-ip-address`)"
    )


def _family(host: str) -> socket.AddressFamily:
    return socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0][0]
