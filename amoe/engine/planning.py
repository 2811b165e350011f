"""Long computations beside an event loop."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

# Planning computes in small steps, each of which would keep the interpreter from the event loop for 5 ms.
_SWITCH_S = 5e-4


def considerate(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call `function`, in a thread beside the event loop, so that the loop is kept waiting for little time at once."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(_SWITCH_S)
    try:
        return function(*args, **kwargs)
    finally:
        sys.setswitchinterval(usual)
