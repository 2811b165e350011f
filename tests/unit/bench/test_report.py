"""Comparison of interleaved rounds, tables and JSON."""

import json
import math

import pytest
from rich.console import Console

from amoe.bench.record import RequestRecord, summarise
from amoe.bench.report import Round, compare, memory_bandwidth, print_comparison, print_figures, write_json
from amoe.clock import ManualClock


def a_round(variant, number, tokens_per_s):
    record = RequestRecord(0.0, 1.0, [0.1, 1.0], [1, tokens_per_s - 1], 10, tokens_per_s, tokens_per_s)
    return Round(variant=variant, number=number, figures=summarise([record]), memory_bandwidth=1e9)


def test_ratios_pair_runs_of_the_same_round():
    # The machine is half as fast in round 1; b is always 20 % ahead of a.
    rounds = [a_round("a", 0, 100), a_round("b", 0, 120), a_round("b", 1, 60), a_round("a", 1, 50)]
    rounds += [a_round("a", 2, 90), a_round("b", 2, 99)]
    first, second = compare(rounds)
    assert (first.variant, second.variant) == ("a", "b")
    assert first.ratio == 1.0
    assert first.output_tokens_per_s == 90
    assert second.ratio == pytest.approx(1.2)
    assert second.ratio_range == pytest.approx((1.1, 1.2))


def test_a_variant_without_its_partner_has_no_ratio():
    _, second = compare([a_round("a", 0, 100), a_round("b", 1, 120)])
    assert math.isnan(second.ratio)


def test_tables_show_figures_and_failures(capsys):
    records = [a_round("a", 0, 10).figures]
    console = Console(width=100)
    print_figures(console, "title", records[0])
    failed = summarise([RequestRecord(0.0, 1.0, failure="HTTP 400: [red]no markup[/red]")])
    print_figures(console, "failed", failed)
    print_comparison(console, compare([a_round("a", 0, 10), a_round("b", 0, 20)]), 1)
    out = capsys.readouterr().out
    assert "1 completed, 0 failed" in out
    assert "1 × failed: HTTP 400: [red]no markup[/red]" in out
    assert "2.000" in out


def test_json_has_no_nan(tmp_path):
    path = tmp_path / "report.json"
    write_json(path, "serve", {"a": 1}, None, {"x": [float("nan"), 1.5], "y": (float("inf"),)})
    report = json.loads(path.read_text())
    assert report["results"] == {"x": [None, 1.5], "y": [None]}
    assert report["config"] == {"a": 1}


def test_the_bandwidth_probe_divides_bytes_by_time(monkeypatch):
    class Ticking(ManualClock):
        def now(self):
            self.advance(0.5)
            return super().now()

    monkeypatch.setattr("amoe.bench.report.PROBE_BYTES", 4096)
    assert memory_bandwidth(Ticking(), 2) == 2 * 4096 / 0.5
