"""Process groups of two: made, and broken off, whatever the other side does."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from amoe.errors import ConfigError

logger = logging.getLogger(__name__)

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
        # What torch does by default when the other side dies is to end this process as well; and before that, to wait
        # a quarter of a minute for a report that nobody reads, which the end of the group would wait for.
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
        os.environ.setdefault("TORCH_NCCL_ENABLE_MONITORING", "0")
        os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "0")

    def make(self, store: dist.Store, own: int, timeout_s: float) -> Any:
        torch.cuda.set_device(self._device)  # of this thread
        self._refuse_itself(store, own)
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timedelta(seconds=timeout_s)
        return dist.ProcessGroupNCCL(store, own, 2, options)

    def _refuse_itself(self, store: dist.Store, own: int) -> None:
        """NCCL would say as much, in words that nobody understands.

        Raises:
            RuntimeError: the other one is on this very device.
        """
        uuid = str(torch.cuda.get_device_properties(self._device).uuid)
        store.set(f"device{own}", uuid)
        if store.get(f"device{1 - own}").decode() == uuid:
            raise RuntimeError(
                "NCCL connects no GPU with itself, and both workers are on one: start as many workers as there are "
                "GPUs, or take --transport shm or tcp"
            )


def break_off(group: Any, own: int) -> None:
    """Have all that wait in `group` end, now: in gloo's by RuntimeError, in NCCL's as if nothing had happened. Takes
    milliseconds, and with NCCL more."""
    if group.name() != "gloo":
        try:
            group.abort()
        except RuntimeError as error:  # out of time: what is left of it goes with the process
            logger.warning("a group of NCCL's could not be aborted: %s", str(error).splitlines()[0])
        return
    # `abort` of gloo leaves waiting receives alone. One that runs out of time does not: it closes the connection.
    with contextlib.suppress(RuntimeError):
        group.recv([torch.empty(1, dtype=torch.uint8)], 1 - own, _NEVER_USED_TAG).wait(_AT_ONCE)
