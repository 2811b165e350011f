"""Where the workers of a `distributed` transport find each other: a key-value store in the process that owns them."""

from __future__ import annotations

import socket
from datetime import timedelta

from torch.distributed import TCPStore

from amoe.errors import ConfigError
from amoe.transport.opening import DistributedSpec

_TIMEOUT = timedelta(seconds=10)


class Rendezvous:
    """A `torch.distributed.TCPStore` that listens at `host`, at a port that the kernel chooses.

    It is used while links are set up and carries no tokens. There is no authentication: the network has to be trusted.

    Raises:
        ConfigError: nothing can listen there.
    """

    def __init__(self, host: str) -> None:
        self._host = host
        self._store: TCPStore | None = None
        self.port = 0

    def start(self) -> None:
        """Listen."""
        listener = _listen(self._host)
        self.port = listener.getsockname()[1]
        self._store = TCPStore(
            self._host,
            self.port,
            is_master=True,
            timeout=_TIMEOUT,
            wait_for_workers=False,
            master_listen_fd=listener.detach(),  # the store's from now on
        )

    @property
    def address(self) -> tuple[str, int]:
        """Host and port."""
        return self._host, self.port

    def close(self) -> None:
        """Stop listening. Idempotent. Links that are up do not notice."""
        self._store = None


def _listen(host: str) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, 0), family=family, backlog=1024)
    except OSError as error:
        raise ConfigError(f"nothing can listen at {host!r}: {error.strerror or error}") from error


class DistributedFabric:
    """The rendezvous of a cluster. See `amoe.transport.opening.Fabric` and `create_fabric`."""

    def __init__(self, num_ranks: int, num_homes: int, max_record_bytes: int, host: str) -> None:
        self._num_ranks = num_ranks
        self._num_homes = num_homes
        self._max_record_bytes = max_record_bytes
        self._rendezvous = Rendezvous(host)
        self._rendezvous.start()

    def spec_for(self, host: str, device: str = "cpu") -> DistributedSpec:
        store_host, store_port = self._rendezvous.address
        return DistributedSpec(
            num_ranks=self._num_ranks,
            num_homes=self._num_homes,
            store_host=store_host,
            store_port=store_port,
            host=host,
            device=device,
            max_record_bytes=self._max_record_bytes,
        )

    def fds(self) -> tuple[int, ...]:
        return ()

    def close(self) -> None:
        self._rendezvous.close()
