"""Progress of a run: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from amoe.bench.record import RequestRecord

LINES_PER_RUN = 10


class ProgressDisplay:
    """Counts requests that have ended. A context manager.

    Args:
        console: where to; a bar if it is a terminal.
        title: of the run.
        total: requests to come.
    """

    def __init__(self, console: Console, title: str, total: int) -> None:
        self._console = console
        self._title = title
        self._total = total
        self._done = 0
        self._failed = 0
        self._bar: Progress | None = None
        if console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
            self._bar = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True)
            self._task = self._bar.add_task(title, total=total)

    def __enter__(self) -> ProgressDisplay:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, record: RequestRecord) -> None:
        """One request has ended."""
        self._done += 1
        self._failed += record.failure is not None
        failed = f", {self._failed} failed" if self._failed else ""
        if self._bar is not None:
            self._bar.update(self._task, advance=1, description=self._title + failed)
        elif self._done == self._total or self._done % max(1, self._total // LINES_PER_RUN) == 0:
            self._console.print(f"{self._title}: {self._done}/{self._total}{failed}", highlight=False)
