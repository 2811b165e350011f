"""The systems that are compared offline: how each is started, and how it runs a point."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from amoe.errors import AmoeError
from benchmarks.peers.process import Driver
from benchmarks.peers.timing import Point, Timing, timing_of

Prompts = list[list[int]]

WARMUP = Point(batch=8, input_len=64, output_len=16)
_BENCH_TIMEOUT_S = 600.0


class System(Protocol):
    """Something that generates."""

    name: str
    about: dict[str, Any]

    def start(self) -> None:
        """Load the model and warm up. Raises `AmoeError`."""
        ...

    def run(self, point: Point, prompts: Prompts) -> Timing:
        """Run a point. Raises `AmoeError`."""
        ...

    def stop(self) -> None:
        """Free everything. Idempotent."""
        ...


class DrivenSystem:
    """An engine behind one of `benchmarks.peers.drivers`.

    Args:
        command: of the driver.
        env: added to this process's.
        log: file of what it prints.
        warmup: prompts of `WARMUP`, not measured.
        tells_shares: whether the driver can tell which experts were chosen how often.

    Attributes:
        shares: [num_layers][num_experts] of each layer's pairs, known after `stop`; empty if the driver does not tell.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        env: Mapping[str, str],
        log: Path,
        warmup: Prompts,
        *,
        tells_shares: bool = False,
    ) -> None:
        self.name = name
        self.about: dict[str, Any] = {"command": " ".join(command), "env": dict(env)}
        self._command, self._env, self._log, self._warmup = command, env, log, warmup
        self._tells_shares = tells_shares
        self._driver: Driver | None = None
        self.shares: list[list[float]] = []

    def start(self) -> None:
        """Load the model and warm up."""
        self._driver = Driver(self.name, self._command, self._env, self._log)
        self.about |= self._driver.about | {"start_s": round(self._driver.start_s, 1)}
        self.run(WARMUP, self._warmup)

    def run(self, point: Point, prompts: Prompts) -> Timing:
        """Run a point."""
        assert self._driver is not None, "it is started first"
        answer = self._driver.ask({"prompts": prompts, "output_len": point.output_len})
        return timing_of(point, answer["started_at"], answer["arrivals"])

    def tell_shares(self) -> list[list[float]]:
        """[num_layers][num_experts] of each layer's pairs since the start. Raises `AmoeError`."""
        assert self._driver is not None, "it is started first"
        return self._driver.ask({"tell": "expert_shares"})["expert_shares"]

    def stop(self) -> None:
        """End the driver."""
        if self._driver is not None:
            if self._tells_shares and self._driver.is_idle:  # otherwise it has failed, or somebody has lost patience
                with contextlib.suppress(AmoeError):
                    self.shares = self.tell_shares()
            self._driver.stop()
            self._driver = None


class LlamaBatchedBench:
    """llama.cpp through `llama-batched-bench`, a process per run; its prompts are random tokens of its own.

    Args:
        program, gguf: files.
        context: tokens of KV cache.
    """

    def __init__(self, program: Path, gguf: Path, *, threads: int, context: int) -> None:
        self.name = "llama.cpp"
        self._command = [str(program), "-m", str(gguf), "-c", str(context), "-t", str(threads), "-tb", str(threads)]
        # In one piece as far as the others do it; computed 512 at a time, the default, which is as fast as any other.
        self._command += ["-b", "4096", "--output-format", "jsonl"]
        self.about: dict[str, Any] = {"command": " ".join(self._command)}

    def start(self) -> None:
        """Nothing: every run loads the model, from the page cache."""

    def run(self, point: Point, prompts: Prompts) -> Timing:
        """Run a point, after a warm-up in the same process."""
        lengths = ["-npp", str(point.input_len), "-ntg", str(point.output_len), "-npl", f"{WARMUP.batch},{point.batch}"]
        try:
            done = subprocess.run(
                [*self._command, *lengths], capture_output=True, text=True, check=True, timeout=_BENCH_TIMEOUT_S
            )
        except subprocess.CalledProcessError as error:
            raise AmoeError(f"{self.name} failed:\n{error.stderr[-2000:]}") from error
        except (OSError, subprocess.TimeoutExpired) as error:
            raise AmoeError(f"{self.name} failed: {error}") from error
        rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        if len(rows) != 2:
            raise AmoeError(f"{self.name} measured {len(rows)} points, not 2: {done.stderr[-2000:]}")
        return Timing(
            prefill_tokens=point.batch * point.input_len,
            prefill_s=rows[1]["t_pp"],
            decode_tokens=point.batch * point.output_len,
            decode_s=rows[1]["t_tg"],
            total_s=rows[1]["t_pp"] + rows[1]["t_tg"],
        )

    def stop(self) -> None:
        """Nothing is left."""
