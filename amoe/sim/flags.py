"""Values of flags, for all commands that simulate: what argparse calls types, and their text for reports."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from amoe.errors import ConfigError

FILE_WIDTH = 120  # columns of a table where there is no terminal to ask

T = TypeVar("T")


def whole(at_least: int) -> Callable[[str], int]:
    """Whole numbers."""

    def parse(text: str) -> int:
        if not text.isdigit() or int(text) < at_least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {at_least}")
        return int(text)

    return parse


def real(at_least: float) -> Callable[[str], float]:
    """Finite numbers."""

    def parse(text: str) -> float:
        value = float(text)
        if not at_least <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text!r} is not a finite number of at least {at_least:g}")
        return value

    return parse


def known(find: Callable[[str], T]) -> Callable[[str], T]:
    """What `find` makes of the text, whose `ConfigError` is the message."""

    def parse(text: str) -> T:
        try:
            return find(text)
        except ConfigError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parse


def report_file(text: str) -> Path:
    """A file that can be written."""
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():  # to be told before the simulation, not after it
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written: no such directory, or it is one")
    return path


def flags_of(args: argparse.Namespace) -> dict[str, Any]:
    """For reports."""
    kept = {key: value for key, value in vars(args).items() if key not in {"func", "json", "plot", "command"}}
    return {key: _plain(value) for key, value in kept.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [str(item) for item in value]
    return value if isinstance(value, int | float | str | None) else str(value)
