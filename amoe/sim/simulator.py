"""The simulator: the workers' real cores, on modelled devices and links."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from amoe.core.worker import WorkerCore
from amoe.sim.answers import ModelledAnswers
from amoe.sim.config import SimConfig
from amoe.sim.device import Device
from amoe.sim.events import EventQueue
from amoe.sim.links import Network
from amoe.sim.load import LoadGenerator
from amoe.sim.memory import check_weights_fit, num_kv_blocks
from amoe.sim.results import Results, TokenMeter, WorkerFigures, WorkerMeter, role_of
from amoe.sim.timing import ROOFLINE, CostModel, StepTimer, Timeline
from amoe.sim.window import MeasuredWindow
from amoe.sim.worker import NewRequest, VirtualWorker
from amoe.sim.workload import RequestSource
from amoe.types import Batch, BoolArray, Int64Array

EVENTS_PER_REPORT = 2048


class Simulator:
    """Runs one `SimConfig`. The same configuration gives the same run.

    Args:
        cost_model: makes the costs of the blocks from the model's sizes and a device.

    Attributes:
        cores: of the workers, by rank.

    Raises:
        ConfigError: weights, or the longest sequence, do not fit into the devices' memory.
    """

    def __init__(self, config: SimConfig, cost_model: CostModel = ROOFLINE) -> None:
        self.config = config
        self._num_blocks = _num_blocks(config)
        self._events = EventQueue()
        self._tokens = TokenMeter()
        self._window = MeasuredWindow(config, self._events, self._on_open)
        num_workers = config.placement.num_workers
        self._network = Network(self._events, config.fabric, num_workers, config.sizes.row_bytes, self._deliver)
        *seeds, seed = np.random.SeedSequence(config.seed).spawn(num_workers + 1)
        source = RequestSource(config.workload, config.sizes.vocab_size, np.random.default_rng(seed))
        homes = config.placement.attention_ranks
        self._load = LoadGenerator(config.workload, source, homes, self._events, self._submit)
        self._devices = [
            self._make_device(rank, np.random.default_rng(seeds[rank]), cost_model) for rank in range(num_workers)
        ]

    @property
    def cores(self) -> list[WorkerCore]:
        """Of the workers, by rank."""
        return [device.worker.core for device in self._devices]

    def run(self, on_progress: Callable[[float], None] | None = None) -> Results:
        """To the end of the measurement, of the last request, or of all that can happen. Once per simulator.

        Args:
            on_progress: called now and then with the share that is done, 0 to 1.
        """
        events, window = self._events, self._window
        window.begin()
        self._load.begin()
        while window.closed_at is None and len(events):
            events.step()
            if on_progress is not None and events.num_done % EVENTS_PER_REPORT == 0:
                on_progress(window.progress(self._tokens.num_tokens))
        window.close()
        return self._results()

    def _make_device(self, rank: int, rng: np.random.Generator, cost_model: CostModel) -> Device:
        config, sizes = self.config, self.config.sizes
        core = WorkerCore(
            config.engine_config(),
            config.shape,
            rank,
            num_kv_blocks=self._num_blocks,
            max_model_len=config.longest_sequence,
            owners=config.owners,
        )
        answers = None
        if core.attention is not None:
            answers = ModelledAnswers(
                core.attention.batcher,
                config.routing,
                rng,
                sparse_layers=sizes.sparse_layers,
                top_k=sizes.top_k,
                on_tokens=self._on_tokens,
                with_scores=config.capacity.is_on,
            )
        timer = StepTimer(
            sizes,
            config.device,
            [item for item in config.slowdowns if item.rank == rank],
            cost_model=cost_model,
            context_offset=config.workload.context_offset,
        )
        timeline = Timeline([item for item in config.outages if item.rank == rank])
        worker = VirtualWorker(core, answers, self._network.send)
        if config.shares is not None and core.attention is not None:
            worker.steer(config.shares.astype(np.float32))  # as they travel to a real worker
        return Device(worker, self._events, timer, config.host, timeline, WorkerMeter())

    # ---- what happens

    def _deliver(self, batch: Batch) -> None:
        device = self._devices[batch.dst]
        device.worker.deliver(batch)
        device.wake()

    def _submit(self, home: int, request: NewRequest) -> None:
        self._tokens.arrive(request.request_id, self._events.now)
        device = self._devices[home]
        device.worker.submit(request)
        device.wake()

    def _on_tokens(self, request_ids: Int64Array, finished: BoolArray, now: float) -> None:
        ended = request_ids[finished]
        self._tokens.leave(request_ids, len(ended), now)
        for request_id in ended.tolist():
            self._load.end(request_id)
        self._window.count(self._tokens.num_tokens)
        if self._load.is_over:
            self._window.close()

    def _on_open(self) -> None:
        self._tokens.open()
        for device in self._devices:
            device.meter.open(self._events.now)

    # ---- what it shows

    def _results(self) -> Results:
        tokens, window = self._tokens, self._window
        assert window.closed_at is not None
        seconds = window.closed_at - window.opened_at
        for device in self._devices:
            device.meter.end(window.closed_at)
        rate = tokens.window_tokens / seconds if seconds > 0 else 0.0
        return Results(
            window_s=seconds,
            output_tokens=tokens.window_tokens,
            tokens_per_s=rate,
            tokens_per_s_per_device=rate / len(self._devices),
            requests_finished=tokens.window_finished,
            requests_open=self._load.num_open,
            inter_token_latency=tokens.inter_token_latency,
            time_to_first_token=tokens.time_to_first_token,
            network_bytes=self._network.num_bytes,
            workers=tuple(self._figures(rank, seconds) for rank in range(len(self._devices))),
            timeline=tokens.timeline(window.closed_at),
            num_events=self._events.num_done,
            num_steps=sum(device.meter.num_steps for device in self._devices),
        )

    def _figures(self, rank: int, seconds: float) -> WorkerFigures:
        device, placement = self._devices[rank], self.config.placement
        attention = device.worker.core.attention
        return WorkerFigures(
            rank=rank,
            role=role_of(rank, placement.attention_ranks, placement.expert_ranks),
            busy_fraction=device.meter.busy_s / seconds if seconds > 0 else 0.0,
            host_fraction=device.meter.host_s / seconds if seconds > 0 else 0.0,
            blocks=device.meter.blocks(),
            num_preemptions=attention.batcher.num_preemptions if attention is not None else 0,
        )


def _num_blocks(config: SimConfig) -> int:
    if config.cache.num_blocks is None and config.cache.kv_cache_bytes is None:
        check_weights_fit(config)
    return num_kv_blocks(config)
