"""Measured costs: interpolation, extrapolation, and what is refused."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from amoe.errors import ConfigError
from amoe.profiles.measured import FORMAT, Curve, MeasuredCosts, ScaledCosts, Surface, is_measured, load_measured
from amoe.profiles.models import MODELS


def document() -> dict[str, Any]:
    """attention: 1 + tokens + tokens · context; per expert 2 + count; head 10 · tokens; hosts 100, 200, 300."""
    return {
        "format": FORMAT,
        "name": "some machine",
        "machine": "2 cores",
        "dtype": "float32",
        "threads": 1,
        "model": asdict(MODELS["olmoe-1b-7b"]),
        "attention": {
            "points": [{"tokens": n, "context": c, "seconds": 1.0 + n + n * c} for n in (1, 16) for c in (4, 64)],
            "host": [{"tokens": 1, "seconds": 100.0}],
        },
        "experts": {
            "fixed": 5.0,
            "per_expert": [{"tokens": 8, "seconds": 10.0}, {"tokens": 1, "seconds": 3.0}],
            "host": [{"tokens": 1, "seconds": 200.0}],
        },
        "head": {
            "points": [{"tokens": 1, "seconds": 10.0}, {"tokens": 2, "seconds": 20.0}],
            "host": [{"tokens": 1, "seconds": 300.0}],
        },
    }


def test_curve_is_linear_between_and_beyond_its_points() -> None:
    curve = Curve([1, 3, 5], [1.0, 3.0, 9.0])
    assert curve([1, 2, 3, 4, 5, 7]).tolist() == [1.0, 2.0, 3.0, 6.0, 9.0, 15.0]
    assert float(Curve([2, 3], [0.0, 5.0])(1)) == 0.0, "never negative"
    assert Curve([4], [7.0])([1, 100]).tolist() == [7.0, 7.0]


def test_surface_is_bilinear() -> None:
    surface = Surface([(n, c, 1.0 + n + n * c) for n in (1, 16) for c in (4, 64)])
    for tokens, context in ((1, 4), (7, 4), (16, 30), (3, 200), (64, 128)):
        assert surface(tokens, context) == pytest.approx(1 + tokens + tokens * context)


@pytest.mark.parametrize(
    "points", [[(1, 1, 1.0), (2, 2, 1.0)], [(1, 1, 1.0), (1, 1, 2.0)], []], ids=["holes", "twice", "none"]
)
def test_surface_needs_a_full_grid(points: list[tuple[float, float, float]]) -> None:
    with pytest.raises(ConfigError):
        Surface(points)


def test_costs_are_those_of_the_table() -> None:
    costs = MeasuredCosts(document())
    assert costs.attention(3, 4, 40) == pytest.approx(1 + 4 + 40)
    assert costs.attention(0, 0, 0) == costs.head(0) == 0.0
    assert costs.head(7) == pytest.approx(70.0)
    counts = np.array([[0, 0, 0], [1, 0, 1], [6, 0, 0]])
    assert costs.experts(0, counts).tolist() == pytest.approx([0.0, 5 + 3 + 3, 5 + 8])


def test_host_time_is_added_on_request_only() -> None:
    costs = MeasuredCosts(document()).with_host()
    assert costs.attention(0, 4, 40) == pytest.approx(145.0)
    assert costs.head(1) == pytest.approx(310.0)
    assert costs.experts(0, np.array([1, 0, 0])) == pytest.approx(208.0)
    assert costs.experts(0, np.array([0, 0, 0])) == 0.0


def test_scaled_costs() -> None:
    costs = ScaledCosts(MeasuredCosts(document()), 2.0)
    assert costs.head(1) == pytest.approx(20.0)
    assert costs.attention(0, 4, 40) == pytest.approx(90.0)
    assert costs.experts(0, np.array([1, 0])) == pytest.approx(16.0)
    with pytest.raises(ConfigError, match="slowdown"):
        ScaledCosts(costs, 0.0)


def test_file(tmp_path: Path) -> None:
    path = tmp_path / "cpu.json"
    path.write_text(json.dumps(document()))
    costs = load_measured(path)
    assert costs.profile.name == "some machine"
    assert costs.sizes == MODELS["olmoe-1b-7b"]
    assert is_measured(str(path))
    assert not is_measured("h100")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "format"),
        ({"model": {}}, "fields"),
        ({"head": {"points": [], "host": []}}, "at least one point"),
        ({"head": {"points": [{"tokens": 1, "seconds": -1.0}], "host": []}}, "not negative"),
        ({"attention": {"points": [{"tokens": 1}], "host": []}}, "KeyError"),
        ({"experts": 3}, "TypeError"),
    ],
)
def test_wrong_documents_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "cpu.json"
    path.write_text(json.dumps(document() | change))
    with pytest.raises(ConfigError, match=message):
        load_measured(path)


@pytest.mark.parametrize("text", ["[]", "not json"])
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "cpu.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match="measured profile"):
        load_measured(path)
    with pytest.raises(ConfigError, match="cannot read"):
        load_measured(tmp_path / "none.json")
