"""Quality under capacity, on tiny windows of random tokens: dropless is exact, caps hold, phases are kept apart."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from amoe.builtin import builtin_model_path
from amoe.config import CapacityConfig
from amoe.models.outputs import AttentionOutput
from benchmarks.capacity_quality import measure, report
from benchmarks.capacity_quality.capping import Batching, Capping, Tally
from benchmarks.capacity_quality.forward import Rows
from benchmarks.capacity_quality.points import FACTORS, METHODS, TABLES, every_point
from benchmarks.capacity_quality.substitution import substitution

PARTS = ("prompt", "continuation")
SMALL = Batching(prompt=12, continuation=5, prefill=16, decode=4)  # micro-batches begin and end inside of prompts


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tiny matrices: further threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model():
    return measure.load(builtin_model_path())


@pytest.fixture(scope="module")
def text():
    return torch.randint(1, 4096, (8, 18), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def routed(model):
    """What an attention block gives for 16 tokens, with random router scores."""
    scores = torch.softmax(2 * torch.randn(16, 16, generator=torch.Generator().manual_seed(2)), dim=1)
    weights, ids = scores.topk(2, dim=1)
    return AttentionOutput(scores, scores, ids, weights / weights.sum(dim=1, keepdim=True), scores)


def rows(number=0):
    return Rows(np.arange(16), np.zeros(16, np.int64), False, number)


def test_dropless_is_the_reference(model, text):
    assert measure.difference_to_reference(model, text[:3], SMALL) < 1e-3


@pytest.mark.parametrize("method", ["drop by score", "drop by random", "reroute", "expanded, at most k"])
def test_capacity_that_nothing_reaches_changes_nothing(model, text, method):
    dropless = measure.run_subset(model, text, CapacityConfig(), SMALL)
    capped = measure.run_subset(model, text, CapacityConfig(factor=8.0, **METHODS[method]), SMALL)
    assert capped["prefill"].prompt.nats == dropless["prefill"].prompt.nats
    assert capped["prefill"].continuation.nats == dropless["prefill"].continuation.nats
    assert capped["both"].continuation.nats == pytest.approx(dropless["both"].continuation.nats, abs=1e-5)
    assert capped["both"].continuation.tally.figures()["pairs_per_token"] == 2


def test_phases(model, text):
    config = CapacityConfig(factor=1.0)
    dropless = measure.run_subset(model, text, CapacityConfig(), SMALL)["both"]
    capped = measure.run_subset(model, text, config, SMALL, ("prefill", "decode", "both"))
    assert {phase: (o.prompt.tally.dropped > 0, o.continuation.tally.dropped > 0) for phase, o in capped.items()} == {
        "prefill": (True, False),
        "decode": (False, True),
        "both": (True, True),
    }
    assert capped["decode"].prompt.nats == dropless.prompt.nats != capped["both"].prompt.nats
    assert len({capped[phase].continuation.nats for phase in capped} | {dropless.continuation.nats}) == 4


@pytest.mark.parametrize("method", METHODS)
def test_caps_hold(model, routed, method):
    capping = Capping(
        model.config, CapacityConfig(factor=1.5, keep_best=False, **METHODS[method]), Batching(), active=True
    )
    ids, weights = capping(0, rows(), routed)
    assert np.bincount(ids[ids >= 0], minlength=16).max() <= 3  # 1.5 times 16 tokens times 2 of 16 experts
    figures = capping.tally.figures()
    assert figures["peak"] <= 1.5 and figures["over"] == 0
    assert figures["pairs_per_token"] * 16 == np.count_nonzero(weights) > 0
    assert np.allclose(weights.sum(axis=1), (ids >= 0).any(axis=1))
    if method.startswith("drop"):
        assert figures["pairs_per_token"] == pytest.approx(2 * (1 - figures["dropped"]))


def test_caps_of_devices_hold(model, routed):
    config = CapacityConfig(factor=1.0, scope="device", keep_best=False)
    capping = Capping(model.config, config, Batching(), active=True)
    ids, _ = capping(0, rows(), routed)
    assert np.bincount(ids[ids >= 0] // 4, minlength=4).max() <= 8


@pytest.mark.parametrize(("local", "number"), [("own", 0), ("source", 3), ("all", 0)])
def test_expanded_adds_local_experts_alone(model, routed, local, number):
    config = CapacityConfig(factor=2.0, mode="expanded", exceed_top_k=True, keep_best=False)
    ids, _ = Capping(model.config, config, Batching(local=local), active=True)(0, rows(number), routed)
    new = [(row, e) for row in range(16) for e in ids[row] if e >= 0 and e not in routed.topk_ids[row]]
    home = {"own": lambda row: row // 4, "source": lambda row: 3}
    assert new
    if local == "all":
        assert np.all(np.bincount(ids[ids >= 0], minlength=16) == 4)  # every expert fills to its cap
    else:
        assert all(expert // 4 == home[local](row) for row, expert in new)


def test_mass_that_is_not_spread_is_missing(model, routed):
    config = CapacityConfig(factor=1.0, keep_best=False)
    capping = Capping(model.config, config, Batching(spread_mass=False), active=True)
    _, weights = capping(0, rows(), routed)
    assert (1 - weights.sum(axis=1)).sum() == pytest.approx(capping.tally.mass_lost, abs=1e-5)
    assert capping.tally.mass_lost > 0


def test_substitution(model, text):
    rows = substitution(model, text, SMALL)
    assert [row["layer"] for row in rows] == list(range(6))
    for row in rows:
        assert row["both lost"] == 1
        assert 0 < row["second lost, missing"] < row["best lost, missing"] < 1.5


def test_compare(model, text, monkeypatch):
    monkeypatch.setattr(measure, "held_out_subsets", lambda *arguments: [text[:4], text[4:]])
    found = measure.compare(CapacityConfig(factor=1.0, phase="both"), batching=SMALL)
    outcomes = [measure.run_subset(model, part, CapacityConfig(), SMALL)["both"] for part in (text[:4], text[4:])]
    assert found.dropless == pytest.approx(math.exp(np.mean([o.continuation.nats for o in outcomes])))
    assert found.capped != found.dropless and found.standard_error > 0
    same = measure.compare(CapacityConfig(factor=8.0, phase="both"), batching=SMALL, part="prompt")
    assert same.added_nats == 0 and same.standard_error == 0
    with pytest.raises(ValueError, match="slack"):
        measure.compare(CapacityConfig(slack_s=0.01))


def test_points():
    points = every_point(8.0, tuple(TABLES))
    keys = [tuple(point.key().values()) for point in points]
    assert len(set(keys)) == len(keys)
    main = {(p.method, p.capacity.factor, p.capacity.keep_best) for p in points if p.table == "main"}
    assert main == {(method, factor, keep) for method in METHODS for factor in FACTORS for keep in (True, False)}


def test_report(tmp_path):
    def part(point, subset):
        added = 0.0 if point.table == "baselines" else 0.1 + 0.001 * subset
        tally = Tally(tokens=1, routed=2, computed=2, batches=1)
        return {"nats": 2 + subset + added, "accuracy": 0.5, **tally.figures()}

    found = [
        {**point.key(), "phase": phase, "subset": subset, **dict.fromkeys(PARTS, part(point, subset))}
        for point in every_point(8.0, tuple(TABLES))
        for phase in point.phases
        for subset in range(2)
    ]
    facts = {"command": "c", "commit": "d", "date": "e", "machine": "f", "seconds": 1.0}
    (tmp_path / "quality.json").write_text(json.dumps({**facts, "by_subset": found}))
    text = report.write(tmp_path).read_text()
    line = next(line for line in text.splitlines() if line.startswith("| reroute | 1.25 |"))
    assert "+0.1005 ± 0.0005" in line and "50.0, (+0.00 ± 0.00)" in line
    assert (tmp_path / "pairs.svg").exists() and (tmp_path / "causes.svg").exists()
    rows = json.loads((tmp_path / "quality.json").read_text())["rows"]
    row = next(row for row in rows if row["method"] == "reroute" and row["phase"] == "both")
    assert row["perplexity"] == pytest.approx(math.exp(2.6005)) and row["continuation_error"] == 0.0005
    assert row["subsets"] == 2 and row["pairs_per_token"] == 2
