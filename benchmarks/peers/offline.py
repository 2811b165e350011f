"""The rounds of the offline comparison: one system after another, again and again."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import numpy as np

from amoe.bench.report import memory_bandwidth
from amoe.clock import MonotonicClock
from benchmarks.peers.setup import STEP_TOKENS, Setup
from benchmarks.peers.systems import WARMUP, DrivenSystem, LlamaBatchedBench, System
from benchmarks.peers.timing import Point, Sample

Note = Callable[[str], None]


def systems_of(setup: Setup, names: Sequence[str], vocab_size: int) -> list[System]:
    """Those of `names` that are there."""
    warmup = WARMUP.prompts(np.random.default_rng(0), vocab_size)

    def driven(name: str, python: str, *flags: str, env: dict[str, str] | None = None) -> DrivenSystem:
        module = f"benchmarks.peers.drivers.{name.lower()}_driver"
        command = [python, "-m", module, *flags, str(setup.model)]
        log = setup.logs / f"{name.lower()}-driver.log"
        return DrivenSystem(name, command, env or {}, log, warmup, tells_shares=name == "amoe")

    found: dict[str, System] = {"amoe": driven("amoe", sys.executable, *setup.amoe_flags)}
    if setup.vllm_python is not None:
        env = setup.vllm_env | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        flags = ("--max-num-batched-tokens", str(STEP_TOKENS))
        found["vLLM"] = driven("vLLM", setup.vllm_python, *flags, env=env)
    if setup.llama_batched_bench is not None and setup.gguf is not None:
        found["llama.cpp"] = LlamaBatchedBench(
            setup.llama_batched_bench, setup.gguf, threads=setup.threads, context=setup.kv_tokens
        )
    if setup.transformers_python is not None:
        found["transformers"] = driven("transformers", setup.transformers_python, "--threads", str(setup.threads))
    return [found[name] for name in names if name in found]


class OfflineRounds:
    """Runs every point on every system, `num_rounds` times in turn.

    Args:
        repeats: runs of a point in a round.
        threads: of the probe of memory.
        keep_loaded: all systems stay loaded and take turns at every point, which needs memory for all; otherwise each
            is started anew in every round, and takes its turn with all points.
        note: told what happens.
    """

    def __init__(
        self,
        systems: Sequence[System],
        points: Sequence[Point],
        *,
        num_rounds: int,
        repeats: int,
        vocab_size: int,
        seed: int,
        threads: int,
        keep_loaded: bool,
        note: Note,
    ) -> None:
        self._systems = systems
        self._points = points
        self._num_rounds = num_rounds
        self._repeats = repeats
        self._vocab_size = vocab_size
        self._seed = seed
        self._threads = threads
        self._keep_loaded = keep_loaded
        self._note = note
        self._clock = MonotonicClock()
        self.samples: list[Sample] = []

    def run(self) -> list[Sample]:
        """All rounds. The systems are stopped, whatever happens; `samples` has what was measured until then.

        Raises:
            AmoeError: a system failed.
        """
        try:
            for number in range(self._num_rounds):
                # Every other round runs backwards, so that a drift of the machine favours nobody.
                order = self._systems if number % 2 == 0 else tuple(reversed(self._systems))
                self._take_turns(number, order)
        finally:
            for system in self._systems:
                system.stop()
        return self.samples

    def _take_turns(self, number: int, order: Sequence[System]) -> None:
        if self._keep_loaded:
            if number == 0:
                for system in order:
                    self._start(system)
            for point in self._points:
                for system in order:
                    self._measure(system, point, number)
            return
        for system in order:
            self._start(system)
            for point in self._points:
                self._measure(system, point, number)
            system.stop()

    def _start(self, system: System) -> None:
        self._note(f"{system.name}: starting")
        system.start()

    def _measure(self, system: System, point: Point, number: int) -> None:
        for repeat in range(self._repeats):
            rng = np.random.default_rng((self._seed, number, repeat, *point.key))  # the same prompts for all systems
            prompts = point.prompts(rng, self._vocab_size)
            bandwidth = memory_bandwidth(self._clock, self._threads)
            timing = system.run(point, prompts)
            sample = Sample(system=system.name, point=point, round=number, timing=timing, memory_bandwidth=bandwidth)
            self.samples.append(sample)
            self._note(
                f"round {number + 1}: {system.name}, {point.batch} x {point.input_len}: prefill "
                f"{timing.prefill_rate:.0f}, decode {timing.decode_rate:.1f} tok/s at {bandwidth / 1e9:.0f} GB/s"
            )
