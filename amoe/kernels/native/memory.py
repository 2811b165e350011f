"""Memory for what kernels stream through."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import mmap
import sys
from collections.abc import Callable

import torch

from amoe.errors import ConfigError

_Madvise = Callable[[int, int, int], int]

HUGE_PAGE = 2 << 20
_MAP_NORESERVE = 0x4000 if sys.platform == "linux" else 0  # Python does not name it


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Memory in huge pages, where it is large and the system has them: streams would miss the TLB at every small one.

    It is taken only where it is written. What is in it is not defined.

    Raises:
        ConfigError: there is not so much address space; the message is for the user.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    if num_bytes < HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype)
    # Shared, which is Python's default, it would be a file of the kernel's, and those have no huge pages. What is
    # reserved may be more than will ever be written.
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    try:
        memory = mmap.mmap(-1, num_bytes + HUGE_PAGE, flags=flags)
    except OSError as error:
        raise ConfigError(
            f"the system gives no {num_bytes:,} bytes of address space ({error.strerror}), and the native kernels keep "
            "room for every expert of a layer: see `ulimit -v` and vm.overcommit_memory, or use --kernels torch"
        ) from error
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    start = -whole.data_ptr() % HUGE_PAGE
    return whole[start : start + num_bytes].view(dtype).view(shape)


def give_back(part: torch.Tensor) -> None:
    """Give the memory of a part of what `empty` has made back to the system: what is in it is not defined afterwards,
    and it is taken anew where it is written. Nothing happens to small tensors, which share their pages with others.

    A huge page of which only a part is given back is counted as free at once; the kernel takes it when it needs memory.

    Args:
        part: contiguous.
    """
    if part.untyped_storage().nbytes() < HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return
    start = -(-part.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (part.data_ptr() + part.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if start < end:
        _madvise()(start, end - start, mmap.MADV_DONTNEED)


@functools.cache
def _madvise() -> _Madvise:
    """Python's own is a method of the object that has mapped the memory, which torch has by now."""
    function = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function
