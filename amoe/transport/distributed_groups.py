"""Process groups of two: made, and broken off, whatever the other side does."""

from __future__ import annotations

import contextlib
import os
import socket
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from amoe.errors import ConfigError

FOREVER = timedelta(days=365)
_NEVER_USED_TAG = 99
_AT_ONCE = timedelta(milliseconds=1)


class GlooGroups:
    """Makes groups of two over gloo. They share one thread of gloo's that does the input and output.

    Args:
        host: name or address of this host at which the others reach it.

    Raises:
        ConfigError: nothing can listen there.
    """

    def __init__(self, host: str) -> None:
        try:
            address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0][4][0]
            self._device = dist.ProcessGroupGloo.create_device(hostname=str(address))
        except (OSError, RuntimeError) as error:
            raise ConfigError(f"nothing can listen at {host!r}: {str(error).splitlines()[0]}") from error

    def make(self, store: dist.Store, own: int, timeout_s: float) -> Any:
        """The group on `store`, as its member number `own` (0 or 1). Waits for the other one.

        Raises:
            RuntimeError: it has not come within `timeout_s`.
        """
        gloo: Any = dist.ProcessGroupGloo  # whose stubs know less than it can do
        options = gloo._Options()
        options._devices = [self._device]
        options._threads = 1  # for collectives, of which there are none
        options._timeout = timedelta(seconds=timeout_s)
        return gloo(store, own, 2, options)


class NcclGroups:
    """Makes groups of two over NCCL; see `GlooGroups`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # What torch does by default when the other side dies is to end this process as well.
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
        os.environ.setdefault("TORCH_NCCL_ENABLE_MONITORING", "0")

    def make(self, store: dist.Store, own: int, timeout_s: float) -> Any:
        torch.cuda.set_device(self._device)
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timedelta(seconds=timeout_s)
        return dist.ProcessGroupNCCL(store, own, 2, options)


def break_off(group: Any, own: int) -> None:
    """Have all that wait in `group` raise RuntimeError, now."""
    if group.name() != "gloo":
        group.abort()
        return
    # `abort` of gloo leaves waiting receives alone. One that runs out of time does not: it closes the connection.
    with contextlib.suppress(RuntimeError):
        group.recv([torch.empty(1, dtype=torch.uint8)], 1 - own, _NEVER_USED_TAG).wait(_AT_ONCE)
