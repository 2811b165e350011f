"""A real server with workers that can be hurt, seen from outside: processes, metrics, admin API."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from benchmarks.chaos.residue import Residue, children_of, look_at
from benchmarks.chaos.worker import LINKS, STEERED, hang_file

ROOT = Path(__file__).parents[2]
_TITLE = re.compile(r"amoe: ((?:attention|expert|worker) \d+)")
_LABEL = re.compile(r'(\w+)="([^"]*)"')
KEY = "chaos"
SPARE = "amoe: spare"
_START_TIMEOUT_S = 120.0
_LEAK_PATIENCE_S, _LEAK_PAUSE_S = 15.0, 0.5
_HELD = ("kv_cache_usage_perc", "token_slots_used", "num_requests_running", "num_requests_waiting")


class ChaosServer:
    """`amoe serve` with an admin key and steerable links, within a `with` block.

    Args:
        directory: for the file that steers the links.
        flags: of `amoe serve`, and MODEL.

    Attributes:
        port: where it listens.
        output: lines that it has printed, each with the monotonic time at which it came.
    """

    def __init__(self, directory: Path, *flags: str) -> None:
        self._has_spare = "--warm-spare" in flags
        self._links = directory / f"links-{time.monotonic_ns()}.json"
        self._link_faults: dict[str, tuple[str, float]] = {}
        self._ranks: dict[str, int] = {}
        self._steer()
        environment = os.environ | {LINKS: str(self._links), "AMOE_ADMIN_KEY": KEY, "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.chaos.serve", "serve", "--port", "0", *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            cwd=ROOT,
            start_new_session=True,
        )
        self.output: list[tuple[float, str]] = []
        self.port = 0
        self._ready = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        if not self._ready.wait(_START_TIMEOUT_S) or not self.port:
            self.process.kill()
            self.process.wait()
            raise RuntimeError("the server did not start:\n" + self.printed())
        if STEERED not in self.printed():
            raise RuntimeError("its workers are not those of benchmarks.chaos.worker")

    def __enter__(self) -> ChaosServer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.process.terminate()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise
        finally:
            self._reader.join(10)
            if kind is not None:  # whoever reads of the failure wants to know what the server has seen of it
                words = "".join(line for _, line in self.output if "request ended" not in line)
                print(f"what the server has said until {kind.__name__}:\n{words}", file=sys.stderr)

    def printed(self) -> str:
        """All that it has printed."""
        return "".join(line for _, line in self.output)

    def complaints(self) -> str:
        """What it has printed of errors and warnings."""
        return "".join(line for _, line in self.output if "ERROR" in line or "WARNING" in line)

    def pids(self) -> dict[str, int]:
        """Pids of the workers that there are, by title."""
        found = {}
        for title, child in children_of(self.process.pid):
            if (match := _TITLE.search(title)) is not None:
                found[match[1]] = child.pid
        return found

    def kill(self, worker: str) -> None:
        """SIGKILL."""
        os.kill(self.pids()[worker], signal.SIGKILL)

    def hang(self, pids: Iterable[int]) -> None:
        """The loops of these workers stay inside their next steps for ever."""
        for pid in pids:
            hang_file(self._links, pid).touch()

    def taken_for_dead(self, worker: str, pid: int) -> float | None:
        """When the server said so of this life of a worker; None: it has not."""
        name = f"{worker} (pid {pid})"
        return next((time for time, line in self.output if name in line and "ERROR" in line), None)

    def cut(self, workers: Iterable[str]) -> None:
        """From now on these and all others hear nothing of each other."""
        self._link_faults |= dict.fromkeys(workers, ("cut", 0.0))
        self._steer()

    def delay(self, workers: Iterable[str], delay_s: float) -> None:
        """From now on these and all others hear of each other so much later."""
        self._link_faults |= dict.fromkeys(workers, ("delay", delay_s))
        self._steer()

    def heal(self, workers: Iterable[str]) -> None:
        """Undo `cut` and `delay`."""
        for worker in workers:
            self._link_faults.pop(worker, None)
        self._steer()

    def lives(self) -> dict[str, tuple[str, int]]:
        """State and incarnation of the workers, by title, as the admin API tells them."""
        workers = self.cluster()["workers"]
        self._ranks |= {worker["title"]: worker["rank"] for worker in workers}
        return {worker["title"]: (worker["state"], worker["incarnation"]) for worker in workers}

    def cluster(self) -> dict[str, Any]:
        """What the admin API tells of the cluster."""
        return self.admin("GET", "/admin/cluster")

    def admin(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """Ask the admin API.

        Raises:
            urllib.error.HTTPError: it refuses.
        """
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.loads(answer.read())

    def series(self) -> Iterator[tuple[str, dict[str, str], float]]:
        """All of /metrics that is its own: names without the prefix, labels, values."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=60) as answer:
            lines = answer.read().decode().splitlines()
        for line in lines:
            if line.startswith("amoe:"):
                series, value = line[len("amoe:") :].rsplit(" ", 1)
                yield series.partition("{")[0], dict(_LABEL.findall(series)), float(value)

    def metrics(self) -> dict[str, float]:
        """Sums over all labels, by name."""
        sums: dict[str, float] = {}
        for name, _, value in self.series():
            sums[name] = sums.get(name, 0.0) + value
        return sums

    def hottest_expert(self) -> tuple[int, int]:
        """Layer and number of the expert that has computed the most pairs so far."""
        pairs: dict[tuple[int, int], float] = {}
        for name, labels, value in self.series():
            if name == "expert_pairs_total":
                place = int(labels["layer"]), int(labels["expert"])
                pairs[place] = pairs.get(place, 0.0) + value
        return max(pairs, key=pairs.__getitem__)

    def residue(self) -> Residue:
        """What it holds, once nothing moves any more."""
        held = 1.0
        for _ in range(200):
            metrics = self.metrics()
            held = sum(metrics.get(name, 0.0) for name in _HELD)
            if not held:
                break
            time.sleep(0.1)
        server, children = psutil.Process(self.process.pid), self._children()
        # A spare opens files while it gets ready: its own descriptors say nothing.
        return look_at([("server", server), *((title, child) for title, child in children if title != SPARE)], held)

    def leaks(self, before: Residue) -> list[str]:
        """What it holds and did not hold before, for a person. What goes soon is no leak: a connection is open for a
        moment after its last answer, and so is what the server has to close."""
        deadline = time.monotonic() + _LEAK_PATIENCE_S
        while (found := self.residue().leaks(before)) and time.monotonic() < deadline:
            time.sleep(_LEAK_PAUSE_S)
        return found

    def _children(self) -> list[tuple[str, psutil.Process]]:
        """All processes below the server, by title; with the spare, for which the server holds descriptors of its own.

        A spare comes some time after the others, and after the one before it became a worker.
        """
        for _ in range(600):
            children = children_of(self.process.pid)
            if not self._has_spare or SPARE in dict(children):
                return children
            time.sleep(0.1)
        raise RuntimeError("there is no spare process:\n" + self.printed())

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.output.append((time.monotonic(), line))
            if not self.port and (match := re.search(r"ready at http://\S+?:(\d+)", line)) is not None:
                self.port = int(match[1])
                self._ready.set()
        self._ready.set()

    def _steer(self) -> None:
        """Tell the workers; a new file in place of the old one, so that nobody reads half of it."""
        if not self._ranks.keys() >= self._link_faults.keys():
            self.lives()
        ranks = self._ranks
        cut = [ranks[worker] for worker, (kind, _) in self._link_faults.items() if kind == "cut"]
        delays = {str(ranks[worker]): s for worker, (kind, s) in self._link_faults.items() if kind == "delay"}
        draft = self._links.with_suffix(".new")
        draft.write_text(json.dumps({"cut": cut, "delay_s": delays}), encoding="utf-8")
        draft.replace(self._links)
