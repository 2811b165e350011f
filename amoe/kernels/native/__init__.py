"""Kernels of our own for processors, in C++ (`src/`): products with packed weights, experts, paged attention.

They are built by the normal install where there is a C++ compiler, choose the best instruction set of the machine at
run time, and bring their own threads. What they compute depends on nothing but a token's own sequence: its bits are
the same alone and in any batch, with any number of threads. The torch kernels beside this package serve where they do
not.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from amoe.errors import ConfigError

# What this package calls of the extension; `module.cpp` has the same number. Another one is a build of other sources.
INTERFACE = 2
_fault = ""
try:
    from amoe.kernels.native import _native

    if getattr(_native, "INTERFACE", 0) != INTERFACE:
        _fault = "have been built from other sources than those that are here: run `make venv`, or install amoe, again"
except ImportError as error:
    is_absent = error.name == __name__  # and not a file that the system cannot load
    _fault = "have not been built: install GCC and amoe again" if is_absent else f"cannot be loaded ({error})"
if _fault:
    _native = None  # type: ignore[assignment]

ISA_VARIABLE = "AMOE_CPU_ISA"
DTYPES = (torch.bfloat16, torch.float32)

__all__ = [
    "DTYPES",
    "ISA_VARIABLE",
    "Context",
    "choose_isa",
    "fault",
    "instruction_sets",
    "is_available",
    "make_context",
]

Context = None if _native is None else _native.Context


def is_available() -> bool:
    """The extension has been built, of these sources."""
    return _native is not None


def fault() -> str:
    """Why it is not available, as the rest of a sentence about the kernels; "" if it is."""
    return _fault


def instruction_sets() -> list[str]:
    """What this processor has of what the kernels are written for, the fastest last; empty without the extension."""
    return [] if _native is None else list(_native.supported())


def choose_isa() -> str:
    """The fastest instruction set, or what the environment variable AMOE_CPU_ISA says.

    Raises:
        ConfigError: this processor does not have it.
    """
    known, wanted = instruction_sets(), os.environ.get(ISA_VARIABLE)
    if wanted is None:
        return known[-1]
    if wanted not in known:
        raise ConfigError(f"{ISA_VARIABLE}={wanted}: this processor has {', '.join(known)}")
    return wanted


def make_context(
    dtype: torch.dtype, num_threads: int, cpus: Sequence[int] = (), isa: str | None = None
) -> _native.Context:
    """The kernels of one worker, with threads and scratch memory of their own. Not for several callers at a time.

    Args:
        dtype: of activations, bfloat16 or float32.
        cpus: one for each thread, the caller's first, which is not moved there: the others leave that one free; empty:
            the system decides.

    Raises:
        ConfigError: see `choose_isa`; or the system gives no more threads.
    """
    isa = isa or choose_isa()
    try:
        return _native.Context(isa, num_threads, list(cpus), dtype == torch.bfloat16)
    except RuntimeError as error:
        raise ConfigError(f"--threads-per-worker {num_threads}: this system gives no more threads ({error})") from error
