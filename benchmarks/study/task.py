"""One piece of the study: a function with its arguments, so that processes can share the work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """`function(*arguments)` returns rows of the part's table."""

    part: str
    function: Callable[..., list[Row]]
    arguments: tuple[Any, ...]

    def run(self) -> list[Row]:
        """Do it."""
        return self.function(*self.arguments)
