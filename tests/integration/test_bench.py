"""`amoe bench offline` with real workers."""

import json

import pytest

from amoe.cli import main


def test_schedules_are_compared_in_rounds(checkpoint_factory, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("amoe.bench.report.PROBE_BYTES", 1 << 20)
    model = checkpoint_factory("olmoe")
    path = tmp_path / "report.json"
    flags = ["--schedules", "progress,lockstep", "--rounds", "1", "--num-prompts", "5", "--warmup", "1"]
    flags += ["--input-len", "6", "--output-len", "4", "--range-ratio", "0.5", "--expert-workers", "1"]
    flags += ["--max-num-seqs", "8", "--num-kv-blocks", "64", "--threads-per-worker", "1"]
    assert main(["bench", "offline", str(model), *flags, "--json", str(path)]) == 0
    results = json.loads(path.read_text())["results"]
    assert [r["variant"] for r in results["rounds"]] == ["progress", "lockstep"]
    for run in results["rounds"]:
        figures = run["figures"]
        assert (figures["completed"], figures["failed"], figures["short"]) == (5, 0, 0)
        assert figures["output_tokens"] == results["rounds"][0]["figures"]["output_tokens"] > 0
        assert run["expert_imbalance"] >= 1
    assert results["comparison"][0]["ratio"] == 1.0
    assert "lockstep" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [["--input-len", "300"], ["--colocated", "2", "--expert-workers", "1"]])
def test_what_cannot_work_is_a_message(checkpoint_factory, flags, capsys):
    flags = [*flags, "--max-model-len", "256"]
    assert main(["bench", "offline", str(checkpoint_factory("olmoe")), *flags]) == 2
    assert "amoe: error: --" in capsys.readouterr().err
