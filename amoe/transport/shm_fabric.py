"""The shared memory of `amoe.transport.shm`, where its layout is told: made and kept by the workers' parent."""

from __future__ import annotations

import contextlib
import mmap
import os
from typing import TYPE_CHECKING

import msgspec

from amoe.errors import ConfigError
from amoe.transport.record_size import ALIGNMENT
from amoe.transport.ring import CONTROL_BYTES, reset

if TYPE_CHECKING:
    from amoe.transport.shm import ShmTransport

_PAGE = 4096


class ShmSpec(msgspec.Struct, frozen=True, kw_only=True, tag="shm"):
    """All that a process needs to attach, besides its rank: it has inherited the descriptors.

    Attributes:
        num_ranks: workers.
        ring_bytes: capacity of each ring, a multiple of the page size.
        memory_fd: the memfd.
        doorbell_fds: [num_ranks] eventfds.
    """

    num_ranks: int
    ring_bytes: int
    memory_fd: int
    doorbell_fds: tuple[int, ...]

    @property
    def control_start(self) -> int:
        """Byte offset of the control words."""
        return self.num_ranks * ALIGNMENT

    @property
    def space_start(self) -> int:
        """Byte offset of the first ring's space."""
        return _page_aligned(self.control_start + self.num_ranks**2 * CONTROL_BYTES)

    @property
    def total_bytes(self) -> int:
        return self.space_start + self.num_ranks**2 * self.ring_bytes

    def ring(self, src: int, dst: int) -> tuple[int, int, int]:
        """Index of the first control word, byte offset and capacity of the ring from `src` to `dst`."""
        index = dst * self.num_ranks + src
        return (
            (self.control_start + index * CONTROL_BYTES) // 8,
            self.space_start + index * self.ring_bytes,
            self.ring_bytes,
        )


def _owned(made: contextlib.ExitStack, descriptor: int) -> int:
    """`descriptor`, which `made` closes."""
    made.callback(os.close, descriptor)
    return descriptor


def _reset_rings(spec: ShmSpec) -> None:
    with mmap.mmap(spec.memory_fd, spec.space_start) as region, memoryview(region).cast("Q") as words:
        for src in range(spec.num_ranks):
            for dst in range(spec.num_ranks):
                reset(words, spec.ring(src, dst)[0])


def _page_aligned(num_bytes: int) -> int:
    return -(-num_bytes // _PAGE) * _PAGE


class ShmFabric:
    """The shared memory and the doorbells of one group of workers, held by their parent."""

    def __init__(self, spec: ShmSpec) -> None:
        self.spec = spec
        self._closed = False

    @classmethod
    def create(cls, num_ranks: int, ring_bytes: int) -> ShmFabric:
        """Rings of at least `ring_bytes` (rounded up to pages) between `num_ranks` workers.

        Raises:
            ConfigError: this host has no room for so many.
        """
        with contextlib.ExitStack() as made:
            try:
                memory_fd = _owned(made, os.memfd_create("amoe-rings", os.MFD_CLOEXEC))
                doorbells = tuple(
                    _owned(made, os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)) for _ in range(num_ranks)
                )
                spec = ShmSpec(
                    num_ranks=num_ranks,
                    ring_bytes=_page_aligned(ring_bytes),
                    memory_fd=memory_fd,
                    doorbell_fds=doorbells,
                )
                os.ftruncate(memory_fd, spec.total_bytes)
                _reset_rings(spec)
            except (OSError, OverflowError) as error:
                raise ConfigError(
                    f"no shared memory for {num_ranks} workers ({error}): ask for fewer workers (--max-expert-workers "
                    "counts), or raise the limit of open files (`ulimit -n`)"
                ) from error
            made.pop_all()
        return cls(spec)

    def spec_for(self, host: str = "", device: str = "cpu") -> ShmSpec:
        """The same for all, which are processes of this host."""
        return self.spec

    def fds(self) -> tuple[int, ...]:
        """Descriptors that a child must inherit under the same numbers (`pass_fds`)."""
        return (self.spec.memory_fd, *self.spec.doorbell_fds)

    def endpoint(self, rank: int) -> ShmTransport:
        """Worker `rank`'s end, in this very process."""
        from amoe.transport.shm import ShmTransport  # late: who only keeps the memory needs no torch

        return ShmTransport.attach(self.spec, rank)

    def close(self) -> None:
        """Close the parent's descriptors. The memory lives on while a child has it mapped."""
        if not self._closed:
            self._closed = True
            for descriptor in self.fds():
                os.close(descriptor)
