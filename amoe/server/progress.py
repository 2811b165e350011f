"""How far loading is: a bar on a terminal, a line now and then anywhere else."""

from __future__ import annotations

import sys
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

LINE_EVERY = 0.25  # share of the whole


class LoadingProgress:
    """Shows loaded bytes on stderr, within a `with` block. Call it with what is done and the whole."""

    def __init__(self, description: str) -> None:
        self._description = description
        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=console, transient=True) if console.is_terminal else None
        self._task = self._bar.add_task(description, total=None) if self._bar is not None else None
        self._next_line = 0.0

    def __enter__(self) -> LoadingProgress:
        if self._bar is not None:
            self._bar.start()
        else:
            print(f"{self._description} ...", file=sys.stderr, flush=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, done: int, total: int) -> None:
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, total=total)
            return
        share = done / max(1, total)
        if share >= self._next_line:
            self._next_line = share + LINE_EVERY
            print(f"{self._description} {share:4.0%} of {total / 2**20:,.0f} MiB", file=sys.stderr, flush=True)
