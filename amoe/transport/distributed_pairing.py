"""How two workers agree on the next process group of theirs: through keys of the rendezvous store.

Either side may notice first that a group is broken, and a worker may have tried what the other never heard of. So the
one with the lower rank leads: it *offers* numbered attempts, and the other *accepts* the newest that it has not tried.
Both then make the groups of that attempt, which needs both at once, and has a time limit. All keys begin with the
ranks and incarnations of the two: the next life of either has nothing to do with this one.
"""

from __future__ import annotations

import logging
import threading
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from amoe.transport.distributed_groups import GlooGroups, NcclGroups, break_off
from amoe.transport.distributed_payloads import PayloadGroups
from amoe.transport.opening import DistributedSpec

logger = logging.getLogger(__name__)

_STORE_TIMEOUT = timedelta(seconds=10)
_MAKE_TIMEOUT_S = 10.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.002, 0.1
_TOLD_FROM = 4  # failures in a row: fewer are those of a peer that has just died


class End(NamedTuple):
    """One life of one worker."""

    rank: int
    incarnation: int


class Makers(NamedTuple):
    """What makes the groups of this worker; `payloads` is None where payloads travel in their records."""

    records: GlooGroups
    payloads: GlooGroups | NcclGroups | None


class Pair(NamedTuple):
    """What connects two workers: a group for records and, where they do not hold the payloads, groups for these."""

    own: int
    records: Any
    payloads: PayloadGroups | None

    def break_off(self) -> None:
        """Have all that wait for the peer raise RuntimeError, now. Idempotent, from any thread."""
        break_off(self.records, self.own)
        if self.payloads is not None:
            self.payloads.break_off()


class Pairing:
    """One worker's part in finding one peer, again and again. Use it in one thread.

    Args:
        own, peer: the two.
        stopped: once set, nothing is waited for any more.
    """

    def __init__(self, spec: DistributedSpec, makers: Makers, own: End, peer: End, stopped: threading.Event) -> None:
        self._spec = spec
        self._makers = makers
        self._own = int(own > peer)
        lower, higher = min(own, peer), max(own, peer)
        self._prefix = f"{lower.rank}.{lower.incarnation}-{higher.rank}.{higher.incarnation}"
        self._stopped = stopped
        self._attempt = 0
        self._has_offered = False
        self._store: dist.Store | None = None

    def next_pair(self) -> Pair | None:
        """Wait until the peer is there as well, and connect. None: `stopped`."""
        pause_s = _FIRST_PAUSE_S
        num_failures = 0
        while not self._stopped.is_set():
            try:
                if self._agree():
                    return self._connect()
            except RuntimeError as error:  # all errors of torch.distributed are
                num_failures += 1
                is_told = num_failures >= _TOLD_FROM and num_failures & (num_failures - 1) == 0
                logger.log(
                    logging.WARNING if is_told else logging.DEBUG,
                    "no link %s after %d attempts in a row: %s",
                    self._prefix,
                    num_failures,
                    str(error).splitlines()[0] if str(error) else type(error).__name__,
                )
                self._store = None  # it may be the store's connection that is broken
                pause_s = _LONGEST_PAUSE_S
            self._stopped.wait(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        self._store = None
        return None

    def _agree(self) -> bool:
        """One look at the store: the two have agreed on `_attempt`."""
        if self._store is None:
            self._store = dist.TCPStore(
                self._spec.store_host,
                self._spec.store_port,
                is_master=False,
                timeout=_STORE_TIMEOUT,
                wait_for_workers=False,
            )
        keys = dist.PrefixStore(self._prefix, self._store)
        return self._lead(keys) if self._own == 0 else self._follow(keys)

    def _lead(self, keys: dist.Store) -> bool:
        if not self._has_offered:
            self._attempt += 1
            keys.set("offer", str(self._attempt))
            self._has_offered = True
        return keys.check([f"accept/{self._attempt}"])

    def _follow(self, keys: dist.Store) -> bool:
        offer = int(keys.get("offer")) if keys.check(["offer"]) else 0
        if offer <= self._attempt:
            return False
        self._attempt = offer
        keys.set(f"accept/{offer}", "yes")
        return True

    def _connect(self) -> Pair:
        self._has_offered = False
        assert self._store is not None
        store = dist.PrefixStore(f"{self._prefix}/{self._attempt}", self._store)
        records = self._makers.records.make(dist.PrefixStore("records", store), self._own, _MAKE_TIMEOUT_S)
        payloads = None
        if self._makers.payloads is not None:
            payloads = PayloadGroups(
                self._makers.payloads,
                dist.PrefixStore("payloads", store),
                self._own,
                torch.device(self._spec.device),
                _MAKE_TIMEOUT_S,
            )
        return Pair(self._own, records, payloads)
