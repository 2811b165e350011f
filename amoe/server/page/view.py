"""From two moments of the engine to the JSON that the page shows. Pure: no clock, no I/O, nothing of any request."""

from __future__ import annotations

import base64
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from amoe.cluster.admin import ClusterStatus, WorkerStatus
from amoe.server.page.snapshot import KINDS, Float64Array, Snapshot, Totals
from amoe.stats import FlowSample, WorkerStats, latency_quantile

LATENCY_WINDOW_S = 60.0
THROUGHPUT_WINDOW_S = 3.0
LEVELS_PER_MEAN = 32  # a cell of the heatmap is one byte: its load in 32nds of its layer's mean, 255 at most
SILENT_S = 3.0  # six heartbeats: more than a step of a loaded worker takes, usually


@dataclass(frozen=True, slots=True)
class _Window:
    """What has come within the last seconds."""

    seconds: float
    new: Totals
    before: Snapshot


def live_view(previous: Snapshot | None, current: Snapshot) -> dict[str, Any]:
    """What the page shows.

    Args:
        previous: a moment some seconds before; None: rates are not known yet, and are null.

    Returns:
        A dictionary for JSON. Times in seconds, rates per second, shares from 0 to 1.
    """
    window = _window(previous, current)
    return {
        "healthy": current.is_healthy,
        "word": current.word or None,
        "window_s": window and round(window.seconds, 2),
        "requests": _requests(current),
        "throughput": _throughput(current.flow),
        "latency": _latency(current.flow),
        "waves": max((worker.num_waves for worker in current.workers.values()), default=0) or None,
        "capacity": _capacity(window, current),
        "cluster": _cluster(current.cluster),
        "workers": _workers(previous, current),
        "layers": _layers(window, current),
        "experts": _experts(window, current),
    }


def _window(previous: Snapshot | None, current: Snapshot) -> _Window | None:
    """By the workers' own clocks: a heartbeat is up to half a second old when it is looked at."""
    if previous is None or (new := current.totals.minus(previous.totals)) is None:
        return None
    spans = [
        stats.at_s - previous.workers[rank].at_s for rank, stats in current.workers.items() if rank in previous.workers
    ]
    seconds = max(spans, default=0.0)
    return _Window(seconds, new, previous) if seconds > 0 else None


def _requests(current: Snapshot) -> dict[str, Any]:
    homes = [worker for worker in current.workers.values() if worker.role != "experts"]
    queries = sum(home.prefix_queries for home in homes)
    return {
        "open": current.num_open,
        "running": sum(home.num_running for home in homes),
        "waiting": sum(home.num_waiting for home in homes),
        "preemptions": sum(home.num_preemptions for home in homes),
        "kv_used": _share(sum(home.kv_blocks_used for home in homes), sum(home.kv_blocks_total for home in homes)),
        "prefix_hits": _share(sum(home.prefix_hits for home in homes), queries),
    }


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None


# -- tokens and latencies ----------------------------------------------------------------------------------------------


def _throughput(flow: Sequence[FlowSample]) -> dict[str, Any]:
    """Tokens per second now, and over the last minutes: `history.seconds[i]` is the age of the end of interval i."""
    # The last moment is now, and may be close to the one before: too close to divide by.
    steps = [(before, after) for before, after in itertools.pairwise(flow) if after.at_s - before.at_s > 0.5]
    now = flow[-1].at_s if flow else 0.0
    recent = _since(flow, THROUGHPUT_WINDOW_S)
    return {
        "prompt": _rate(recent, flow, "prompt_tokens"),
        "generated": _rate(recent, flow, "generated_tokens"),
        "history": {
            "seconds": [round(now - after.at_s, 1) for _, after in steps],
            "prompt": [_round(_speed(before, after, "prompt_tokens")) for before, after in steps],
            "generated": [_round(_speed(before, after, "generated_tokens")) for before, after in steps],
        },
    }


def _since(flow: Sequence[FlowSample], seconds: float) -> FlowSample | None:
    """The youngest sample that is at least so old, or the oldest there is; None if there is but one."""
    if len(flow) < 2:
        return None
    return next((sample for sample in reversed(flow) if flow[-1].at_s - sample.at_s >= seconds), flow[0])


def _speed(before: FlowSample, after: FlowSample, name: str) -> float:
    return (getattr(after, name) - getattr(before, name)) / (after.at_s - before.at_s)


def _rate(before: FlowSample | None, flow: Sequence[FlowSample], name: str) -> float | None:
    if before is None or flow[-1].at_s <= before.at_s:
        return None
    return _round(_speed(before, flow[-1], name))


def _latency(flow: Sequence[FlowSample]) -> dict[str, Any]:
    before = _since(flow, LATENCY_WINDOW_S)
    view: dict[str, Any] = {"window_s": LATENCY_WINDOW_S}
    for name in ("ttft", "itl"):
        counts = np.zeros(1, np.int64) if before is None else getattr(flow[-1], name) - getattr(before, name)
        view[name] = {
            "count": int(counts.sum()),
            "p50": _round(latency_quantile(counts, 0.5), 5),
            "p99": _round(latency_quantile(counts, 0.99), 5),
        }
    return view


# -- workers -----------------------------------------------------------------------------------------------------------


def _cluster(cluster: ClusterStatus | None) -> dict[str, Any] | None:
    """How many there are and ought to be; None: nobody supervises the workers."""
    if cluster is None:
        return None
    return {
        "version": cluster.version,
        "expert_workers": cluster.num_expert_workers,
        "max_expert_workers": cluster.max_expert_workers,
        "replicas": cluster.num_replicas,
        "missing": cluster.missing,
        "action": cluster.action or None,
    }


def _workers(previous: Snapshot | None, current: Snapshot) -> list[dict[str, Any]]:
    """By rank: who has told something, and who ought to be there."""
    places = {} if current.cluster is None else {worker.rank: worker for worker in current.cluster.workers}
    views = []
    for rank in sorted({*places, *current.workers}):
        place, stats = places.get(rank), current.workers.get(rank)
        if stats is None:
            assert place is not None
            stats = WorkerStats(rank=rank, role=place.role)
        views.append(_worker(previous, current, stats) | _life(place, current.silent_s.get(rank, 0.0)))
    return views


def _life(place: WorkerStatus | None, silent_s: float) -> dict[str, Any]:
    """Whether it serves. A worker that is known to be lost is not silent besides."""
    is_expected = place is None or place.state in ("serving", "draining")
    silence = round(silent_s, 1) if is_expected and silent_s >= SILENT_S else None
    if place is None:
        return {"title": None, "state": None, "silent_s": silence}
    gone = {} if is_expected else {"busy_home": None, "busy_experts": None}  # what it was busy with is over
    return gone | {
        "title": place.title,
        "state": place.state,
        "silent_s": silence,
        "life": place.lives,
        "crashes": place.num_crashes,
        "retry_s": _round(place.retry_s) if place.state == "waiting" else None,
        "last_end": place.reason or None,
    }


def _worker(previous: Snapshot | None, current: Snapshot, stats: WorkerStats) -> dict[str, Any]:
    """What it does."""
    rank = stats.rank
    before = None if previous is None else previous.workers.get(rank)
    span = 0.0 if before is None else stats.at_s - before.at_s
    return {
        "rank": rank,
        "role": stats.role,
        "busy_home": _busy(stats.home_s, before.home_s if before else None, span),
        "busy_experts": _busy(stats.experts_s, before.experts_s if before else None, span),
        "queued": sum(queue.depth for queue in stats.queues),
        "oldest_s": _round(max((queue.age_s for queue in stats.queues), default=0.0), 4),
        "in_flight": None if stats.role == "experts" else stats.token_slots_used,
        "running": None if stats.role == "experts" else stats.num_running,
        "waiting": None if stats.role == "experts" else stats.num_waiting,
        "kv_used": _share(stats.kv_blocks_used, stats.kv_blocks_total),
    }


def _busy(after: float, before: float | None, span: float) -> float | None:
    """Share of the time; a step that ends within the span may have begun before it."""
    return round(min(1.0, max(0.0, after - before) / span), 4) if before is not None and span > 0 else None


# -- layers ------------------------------------------------------------------------------------------------------------


def _layers(window: _Window | None, current: Snapshot) -> dict[str, Any]:
    """By layer (the head has one entry): tokens that wait for a block and that are in it."""
    view: dict[str, Any] = {"count": current.totals.num_layers}
    for kind in KINDS:
        depth, age = _queues(current, kind)
        new = window.new.blocks[kind] if window else None
        view[kind] = {
            "depth": depth.astype(int).tolist(),
            "age_s": age.round(4).tolist(),
            "waiting": None if new is None or window is None else _rounded(new.waited_s / window.seconds),
            "running": None if new is None or window is None else _rounded(new.ran_s / window.seconds),
            "tokens": None if new is None or window is None else _rounded(new.tokens / window.seconds),
            "batch": None if new is None else _ratios(new.tokens, new.steps, 1),
        }
    view["join_wait_s"] = _ratios(window.new.join_wait_s, window.new.joins, 6) if window else None
    return view


def _queues(current: Snapshot, kind: str) -> tuple[Float64Array, Float64Array]:
    """By layer: tokens that wait at this moment, at all workers, and seconds that the oldest of them has waited."""
    num_layers = len(current.totals.blocks[kind].steps)
    depth, age = np.zeros(num_layers), np.zeros(num_layers)
    for worker in current.workers.values():
        for queue in worker.queues:
            if queue.kind == kind:
                layer = 0 if kind == "head" else queue.layer
                depth[layer] += queue.depth
                age[layer] = max(age[layer], queue.age_s)
    return depth, age


def _rounded(values: Float64Array) -> list[float]:
    return [float(value) for value in values.round(2)]


def _ratios(parts: Float64Array, wholes: Float64Array, digits: int) -> list[float | None]:
    """By layer; None where the whole is nothing."""
    return [_round(_share(float(part), float(whole)), digits) for part, whole in zip(parts, wholes, strict=True)]


# -- experts -----------------------------------------------------------------------------------------------------------


def _experts(window: _Window | None, current: Snapshot) -> dict[str, Any] | None:
    """The heatmap: `levels` is base64 of [num_layers, num_experts] bytes, each the load of an expert relative to the
    mean of its layer, times `LEVELS_PER_MEAN`. `mean` is in pairs per second. None: no expert worker has told yet."""
    pairs = current.totals.pairs
    if not pairs.size:
        return None
    if window is None:
        return _heatmap(np.zeros(pairs.shape), known=False)
    return _heatmap(window.new.pairs / window.seconds, known=True)


def _heatmap(rates: Float64Array, *, known: bool) -> dict[str, Any]:
    mean = rates.mean(axis=1)
    relative = rates / np.where(mean > 0, mean, 1.0)[:, None]
    levels = (relative * LEVELS_PER_MEAN).round().clip(0, 255).astype(np.uint8)
    return {
        "known": known,
        "layers": rates.shape[0],
        "experts": rates.shape[1],
        "levels_per_mean": LEVELS_PER_MEAN,
        "levels": base64.b64encode(levels.tobytes()).decode("ascii"),
        "mean": mean.round(2).tolist(),
        "imbalance": [
            _round(float(peak), 3) if m > 0 else None for peak, m in zip(relative.max(axis=1), mean, strict=True)
        ],
        "hottest": [int(e) if m > 0 else None for e, m in zip(rates.argmax(axis=1), mean, strict=True)],
    }


# -- capacity ----------------------------------------------------------------------------------------------------------


def _capacity(window: _Window | None, current: Snapshot) -> dict[str, Any] | None:
    """What capacity takes; None where it is off. `share` is of the pairs that the routers asked for."""
    now = _lost(current.workers)
    if now is None:
        return None
    before = None if window is None else _lost(window.before.workers)
    if before is None or window is None:
        return {"dropped": None, "rerouted": None, "share": None, "gate_mass_lost": None}
    dropped, rerouted, mass, tokens = (after - old for after, old in zip(now, before, strict=True))
    return {
        "dropped": _round(dropped / window.seconds),
        "rerouted": _round(rerouted / window.seconds),
        "share": _round(_share(dropped + rerouted, dropped + float(window.new.pairs.sum())), 5),
        "gate_mass_lost": _round(_share(mass, tokens), 5),
    }


def _lost(workers: Mapping[int, WorkerStats]) -> tuple[float, float, float, float] | None:
    """Pairs dropped, pairs rerouted, gate mass lost, tokens; all cumulative."""
    capacities = [worker.capacity for worker in workers.values() if worker.capacity is not None]
    if not capacities:
        return None
    lost = [entry for capacity in capacities for entry in capacity.lost]
    return (
        float(sum(entry[2] for entry in lost)),
        float(sum(entry[3] for entry in lost)),
        sum(capacity.gate_mass_lost for capacity in capacities),
        float(sum(capacity.tokens for capacity in capacities)),
    )


def _round(value: float | None, digits: int = 1) -> float | None:
    return None if value is None else round(value, digits)
