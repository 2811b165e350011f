"""How a driver and the benchmark talk: a JSON object per line on standard input and output.

The benchmark sends `{"prompts": [[id, ...], ...], "output_len": n}`; the driver answers
`{"started_at": t, "arrivals": [[t, ...], ...]}`, seconds of one monotonic clock: just before the first prompt was
handed to the engine, and when each token of each sequence was in Python's hands. Its first line, once the model is
loaded, is `{"ready": {"version": ..., ...}}`. Imports the standard library only: it runs in anybody's environment.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

Arrivals = list[list[float]]
Generate = Callable[[list[list[int]], int], Arrivals]


class Line:
    """The driver's end. Made before the engine is imported: what engines print goes to standard error from then on."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)

    def serve(self, generate: Generate, **about: Any) -> None:
        """Say that all is ready, then answer until the input ends.

        Args:
            generate: prompts and output length to [num_prompts][output_len] times.
            about: the engine, for the report.
        """
        self.send({"ready": about})
        for line in sys.stdin:
            request = json.loads(line)
            started_at = time.monotonic()
            arrivals = generate(request["prompts"], request["output_len"])
            self.send({"started_at": started_at, "arrivals": arrivals})

    def send(self, message: dict[str, Any]) -> None:
        """Write one message."""
        self._out.write(json.dumps(message) + "\n")
        self._out.flush()
