"""The tables, in Markdown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from amoe.models.config import ModelConfig
from benchmarks.peers.results import Ceiling, Middle, ceiling, middle, ratio
from benchmarks.peers.roofline import Machine
from benchmarks.peers.served import Footprint, ServedSample
from benchmarks.peers.timing import Point, Sample

_GB = 1e9


@dataclass(kw_only=True)
class Results:
    """All that was measured.

    Attributes:
        decode_points: whose decode rates are shown; the last one's prefill as well.
        prefill_points: of which only the prefill is shown.
        machine: bandwidth and peak of the roofline: the median of the probes beside the runs.
        best_bandwidth: the greatest of those.
        shares: [num_layers][num_experts] of each layer's pairs, as amoe has counted them.
        about: what each system has told of itself.
        missing: system to how it would be there.
    """

    config: ModelConfig
    decode_points: Sequence[Point]
    prefill_points: Sequence[Point]
    machine: Machine
    best_bandwidth: float
    shares: Sequence[Sequence[float]]
    offline: list[Sample] = field(default_factory=list)
    served: list[ServedSample] = field(default_factory=list)
    footprints: list[Footprint] = field(default_factory=list)
    about: dict[str, dict[str, Any]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    @property
    def systems(self) -> list[str]:
        """That were measured offline, the first is what the others are compared with."""
        return list(dict.fromkeys(s.system for s in self.offline))

    def ceiling(self, point: Point, bandwidth: float | None = None) -> Ceiling:
        """Of the machine, at the median bandwidth or another."""
        machine = self.machine if bandwidth is None else Machine(bandwidth=bandwidth, peak=self.machine.peak)
        return ceiling(self.config, machine, point, self.shares)


def markdown(results: Results) -> str:
    """All tables that there is something for."""
    parts = []
    if results.offline:
        parts += ["## Offline", _offline(results), "", _ratios(results), "", _shares_of_roofline(results)]
    if results.served:
        parts += ["## Served", _served(results)]
    if results.footprints:
        parts += ["## Memory and start", _footprints(results.footprints)]
    for name, how in results.missing.items():
        parts.append(f"{name} was not found: {how}.")
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _range(value: Middle, form: Callable[[float], str] = _number) -> str:
    if not value.count:
        return "-"
    if value.count == 1:
        return form(value.median)
    return f"{form(value.median)} ({form(value.least)}–{form(value.greatest)})"


def _columns(results: Results) -> list[tuple[str, Point, Callable[[Sample], float]]]:
    """Title, point and figure of each column of the offline tables."""
    found: list[tuple[str, Point, Callable[[Sample], float]]] = [
        (f"decode, {point.batch} at once", point, lambda s: s.timing.decode_rate) for point in results.decode_points
    ]
    for point in (*results.decode_points[-1:], *results.prefill_points):
        found.append((f"prefill, {point.batch} × {point.input_len}", point, lambda s: s.timing.prefill_rate))
    return found


def _offline(results: Results) -> str:
    columns = _columns(results)
    rows = []
    bandwidths = {"best": results.best_bandwidth, "median": results.machine.bandwidth}
    for kind, bandwidth in bandwidths.items():
        cells = []
        for title, point, _ in columns:
            limit = results.ceiling(point, bandwidth)
            cells.append(_number(limit.decode if title.startswith("decode") else limit.prefill))
        rows.append([f"roofline, {kind} bandwidth {bandwidth / _GB:.0f} GB/s", *cells])
    for system in results.systems:
        rows.append([system, *(_range(middle(results.offline, system, point, of)) for _, point, of in columns)])
    return _table(["tokens per second", *(title for title, _, _ in columns)], rows)


def _ratios(results: Results) -> str:
    first, *others = results.systems
    columns = _columns(results)
    rows = []
    for other in others:
        cells = [
            _range(ratio(results.offline, (first, other), point, of), lambda x: f"{x:.2f}") for _, point, of in columns
        ]
        rows.append([f"{first} / {other}", *cells])
    return _table(["ratio within a round", *(title for title, _, _ in columns)], rows) if rows else ""


def _shares_of_roofline(results: Results) -> str:
    """Each run against the roofline at the bandwidth that was measured just before it."""
    columns = _columns(results)
    rows = []
    for system in results.systems:
        cells = []
        for title, point, of in columns:
            is_decode = title.startswith("decode")

            def share(sample: Sample, of: Callable[[Sample], float] = of, is_decode: bool = is_decode) -> float:
                limit = results.ceiling(sample.point, sample.memory_bandwidth)
                return of(sample) / (limit.decode if is_decode else limit.prefill)

            cells.append(_range(middle(results.offline, system, point, share), lambda x: f"{x:.0%}"))
        rows.append([system, *cells])
    return _table(["of the roofline at that moment", *(title for title, _, _ in columns)], rows)


def _served(results: Results) -> str:
    points = list(dict.fromkeys(s.point for s in results.served))
    head = ["system", "at once", "tok/s end to end", "of offline", "TTFT p50 ms", "TPOT p50 ms", "client's CPU"]
    rows = []
    for system in dict.fromkeys(s.system for s in results.served):
        for point in points:
            served = middle(results.served, system, point, lambda s: s.run.end_to_end)
            offline = middle(results.offline, system, point, lambda s: s.end_to_end)
            kept = f"{served.median / offline.median:.0%}" if offline.count else "-"
            ttft = middle(results.served, system, point, lambda s: s.run.ttft_p50_ms)
            tpot = middle(results.served, system, point, lambda s: s.run.tpot_p50_ms)
            client = middle(results.served, system, point, lambda s: s.run.client_cpu)
            cells = [_range(served), kept, _number(ttft.median), _number(tpot.median), f"{client.median:.1%}"]
            rows.append([system, str(point.batch), *cells])
    return _table(head, rows)


def _footprints(footprints: Sequence[Footprint]) -> str:
    head = [
        "system",
        "ready s",
        "first token s",
        "PSS idle GB",
        "RSS idle GB",
        "PSS under load GB",
        "RSS under load GB",
    ]
    head += ["checkpoint GB", "read by calls GB", "read from storage GB"]
    rows = []
    for system in dict.fromkeys(f.system for f in footprints):
        mine = [f for f in footprints if f.system == system]
        times = [Middle.of([f.ready_s for f in mine]), Middle.of([f.first_token_s for f in mine])]
        sizes = [
            (f.idle.pss, f.idle.rss, f.busy.pss, f.busy.rss, f.checkpoint, f.read_calls, f.read_storage) for f in mine
        ]
        medians = [Middle.of(column).median / _GB for column in zip(*sizes, strict=True)]
        rows.append([system, *(_range(time, lambda x: f"{x:.1f}") for time in times), *(f"{x:.2f}" for x in medians)])
    return _table(head, rows)
