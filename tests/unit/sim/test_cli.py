"""`amoe simulate`: flags to configuration, mistakes in one line, reports."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

import numpy as np
import pytest

from amoe import cli
from amoe.config import PlacementConfig, SchedulerConfig
from amoe.profiles.links import LinkProfile
from amoe.profiles.models import model_sizes
from amoe.profiles.routing import RecordedRouting
from amoe.sim import cli as sim_cli
from amoe.sim import options
from amoe.sim.config import HostModel, Outage, SimConfig, Slowdown, Window
from amoe.sim.workload import Lengths, Workload

SMALL = [
    *("olmoe-1b-7b", "--concurrency", "8", "--input-len", "4", "--output-len", "6"),
    *("--devices", "2", "--routing", "uniform"),
]


def parse(*argv: str) -> argparse.Namespace:
    return cli.build_parser("simulate").parse_args(["simulate", *argv])


def config_of(*argv: str) -> SimConfig:
    configs, _ = sim_cli.configs_of(parse(*argv))
    (config,) = configs.values()
    return config


def test_no_flags_are_the_defaults():
    config = config_of("qwen3-30b-a3b")
    assert config.sizes == model_sizes("qwen3-30b-a3b")
    assert config.device.name == "h100"
    assert config.placement == PlacementConfig(colocated=8)
    assert config.scheduler == SchedulerConfig(schedule="waves")
    assert config.workload == Workload(concurrency=256, input=Lengths(mean=128), output=Lengths(mean=128), stagger=True)
    assert config.window == Window(length=20, warmup=10, unit="iterations")
    assert config.host == HostModel()


def test_every_flag():
    flags = """
        --device a100-80g --attention-workers 3 --expert-workers 5 --fabric b200 --devices-per-node 4
        --link-latency-us 7 --link-gbs 100 --host-us 30 --host-mode queued --slow 2:1.5@3 --slow 1:2 --stop 4@5-6
        --stop 3@7 --schedule lockstep:2 --max-num-seqs 99 --max-num-batched-tokens 512 --block-size 32
        --num-kv-blocks 5000 --request-rate 8 --num-requests 50 --input-len 100 --output-len 30 --range-ratio 0.5
        --context 10 --duration 4 --warmup 2 --seed 7
    """
    config = config_of("mixtral-8x7b", *flags.split())
    assert config.device.name == "a100-80g"
    assert config.placement == PlacementConfig(attention_workers=3, expert_workers=5)
    assert config.fabric.intra == LinkProfile(7e-6, 100e9)
    assert (config.fabric.devices_per_node, config.fabric.inter) == (4, LinkProfile(15e-6, 45e9))
    assert config.host == HostModel(seconds=30 * 1e-6, mode="queued")
    assert config.slowdowns == (Slowdown(rank=2, factor=1.5, at_s=3.0), Slowdown(rank=1, factor=2.0))
    assert config.outages == (Outage(rank=4, start_s=5.0, end_s=6.0), Outage(rank=3, start_s=7.0))
    assert config.scheduler == SchedulerConfig(
        schedule="lockstep", micro_batches=2, max_num_seqs=99, max_num_batched_tokens=512
    )
    assert (config.cache.block_size, config.cache.num_blocks) == (32, 5000)
    assert config.workload == Workload(
        request_rate=8.0,
        num_requests=50,
        input=Lengths(mean=100, kind="uniform", spread=0.5),
        output=Lengths(mean=30, kind="uniform", spread=0.5),
        context_offset=10,
    )
    assert config.window == Window(length=4.0, warmup=2.0)
    assert config.seed == 7


def test_there_is_room_for_all_sequences_of_a_closed_loop():
    assert config_of("mixtral-8x7b", "--concurrency", "4097").scheduler.max_num_seqs == 513


def test_all_requests_are_measured_where_they_are_counted():
    assert config_of("mixtral-8x7b", "--num-requests", "5").window == Window()


def test_a_checkpoint_gives_sizes(checkpoint_factory):
    config = config_of(str(checkpoint_factory("qwen2_moe")), "--devices", "2")
    sizes = config.sizes
    assert (sizes.num_layers, sizes.hidden_size, sizes.num_experts, sizes.top_k) == (2, 48, 7, 3)
    assert (sizes.shared_intermediate_size, sizes.num_dense_layers) == (28, 0)


def test_recorded_routing(tmp_path):
    path = tmp_path / "topk.npy"
    np.save(path, np.zeros((5, 16, 8), np.int16) + np.arange(8))
    config = config_of("olmoe-1b-7b", "--routing", str(path))
    assert isinstance(config.routing, RecordedRouting)
    assert config.routing.draw(np.random.default_rng(0), 3, 4).tolist() == [list(range(8))] * 4


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["mixtral"], "'mixtral' is no checkpoint directory, nor one of mixtral-8x7b,"),
        (["mixtral-8x7b", "--device", "tpu"], "no device profile 'tpu'"),
        (["mixtral-8x7b", "--device", "nowhere.json"], "no measured profile 'nowhere.json'"),
        (["mixtral-8x7b", "--fabric", "wet-string"], "no fabric 'wet-string'"),
        (["mixtral-8x7b", "--devices", "1"], "use more workers"),
        (["mixtral-8x7b", "--devices", "9"], "more expert workers than the 8 experts"),
        (["mixtral-8x7b", "--attention-workers", "4"], "go together"),
        (["mixtral-8x7b", "--attention-workers", "4", "--expert-workers", "4", "--colocated", "8"], "leave out"),
        (["mixtral-8x7b", "--attention-workers", "4", "--expert-workers", "4", "--devices", "9"], "make 8 devices"),
        (["mixtral-8x7b", "--devices", "4", "--colocated", "8"], "differently"),
        (["mixtral-8x7b", "--schedule", "random"], "--schedule random: there is none of that name"),
        (["mixtral-8x7b", "--schedule", "progress:2"], "only waves:N and lockstep:N"),
        (["mixtral-8x7b", "--schedule", "lockstep:x"], "only waves:N and lockstep:N"),
        (["mixtral-8x7b", "--schedule", "lockstep:9"], "--micro-batches"),
        (["mixtral-8x7b", "--schedule", "fcfs,fcfs"], "each schedule once"),
        (["mixtral-8x7b", "--routing", "sigma=x"], "'x' is not a number"),
        (["mixtral-8x7b", "--routing", "sigma=-1"], "sigma must be at least 0"),
        (["mixtral-8x7b", "--routing", "published:mine"], "no published imbalance 'mine'"),
        (["mixtral-8x7b", "--routing", "none.npy"], "no such file; write uniform"),
        (["mixtral-8x7b", "--range-ratio", "1.5"], "spread of uniform"),
        (["mixtral-8x7b", "--request-rate", "5", "--iterations", "5"], "only a closed loop"),
        (["mixtral-8x7b", "--slow", "8:2"], "no worker 8"),
        (["mixtral-8x7b", "--num-kv-blocks", "3"], "has room for 3"),
        (["mixtral-8x7b", "--shares", "even"], "give that too"),
        (["mixtral-8x7b", "--redundant-experts", "1", "--expert-load", "none"], "cannot be read"),
        (
            ["mixtral-8x7b", "--redundant-experts", "1", "--request-rate", "1", "--shares", "planned"],
            "closed loop only",
        ),
    ],
)
def test_mistakes_are_one_line(argv, message, capsys):
    assert cli.main(["simulate", *argv]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("amoe: error: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize("content", [b"", b"text", b"\x93NUMPY\x01\x00"])
def test_a_broken_record_of_routing_is_one_line(tmp_path, content, capsys):
    path = tmp_path / "topk.npy"
    path.write_bytes(content)
    assert cli.main(["simulate", "mixtral-8x7b", "--routing", str(path)]) == 2
    error = capsys.readouterr().err
    assert "not a .npy file" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("array", "message"),
    [(np.zeros((4, 16, 8)), "integers"), (np.zeros((4, 16, 2), int), r"needs [tokens, 16, 8]")],
)
def test_a_record_of_another_model_is_refused(tmp_path, array, message, capsys):
    path = tmp_path / "topk.npy"
    np.save(path, array)
    assert cli.main(["simulate", "olmoe-1b-7b", "--routing", str(path)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv",
    [
        ["--devices", "0"],
        ["--host-us", "-1"],
        ["--slow", "2"],
        ["--slow", "1:nan"],
        ["--stop", "x@1"],
        ["--stop", "1@5-4"],
        ["--json", "/does/not/exist/report.json"],
        ["--seed", "-1"],
        ["--concurrency", "4", "--request-rate", "2"],
    ],
)
def test_mistakes_of_syntax(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["simulate", "mixtral-8x7b", *argv])
    assert caught.value.code == 2
    assert f"argument {argv[-2]}" in capsys.readouterr().err


def test_a_comparison_of_schedules_is_shown_and_written(tmp_path, capsys):
    path = tmp_path / "report.json"
    argv = ["--schedule", "progress,lockstep:2", "--iterations", "4", "--json", str(path)]
    assert cli.main(["simulate", *SMALL, *argv]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    assert "olmoe-1b-7b on 2 colocated workers (h100), uniform, 8 sequences" in shown.out
    assert "simulated, not measured" in shown.out
    report = json.loads(path.read_text())
    assert list(report["results"]) == ["progress", "lockstep:2"]
    assert report["simulation"]["concurrency"] == 8
    for result in report["results"].values():
        assert result["output_tokens"] >= 4 * 8
        assert len(result["workers"]) == 2
        assert result["inter_token_latency"]["mean"] > 0
    assert cli.main(["simulate", *SMALL, *argv[:-1], str(tmp_path / "again.json")]) == 0
    assert json.loads((tmp_path / "again.json").read_text())["results"] == report["results"]


def test_replicas_are_placed_by_the_loads_of_the_routing(capsys):
    config = config_of("olmoe-1b-7b", "--redundant-experts", "2", "--devices", "4")
    assert config.owners is not None and config.shares is not None
    assert ((config.owners >= 0).sum(axis=(1, 2)) == 64 + 4 * 2).all()
    hottest = config.routing.popularity()[3].argmax()
    assert (config.owners[3, hottest] >= 0).sum() > 1
    assert cli.main(["simulate", *SMALL, "--redundant-experts", "1", "--iterations", "2"]) == 0


def test_a_window_without_tokens_is_shown_as_such(tmp_path, capsys):
    path = tmp_path / "report.json"
    argv = ["--duration", "1", "--warmup", "0", "--stop", "0@0", "--stop", "1@0", "--json", str(path)]
    assert cli.main(["simulate", *SMALL, *argv]) == 0
    assert "no token left" in capsys.readouterr().out
    assert json.loads(path.read_text())["results"]["waves"]["inter_token_latency"]["mean"] is None


def test_measured_profiles_are_of_one_model():
    hardware = options.Hardware(
        device=config_of("olmoe-1b-7b").device, cost_model=options.ROOFLINE, measured=model_sizes("olmoe-1b-7b")
    )
    assert hardware.sizes_for(model_sizes("olmoe-1b-7b")) == model_sizes("olmoe-1b-7b")
    with pytest.raises(Exception, match="measured with another model: num_layers 16, and mixtral-8x7b has 32"):
        hardware.sizes_for(model_sizes("mixtral-8x7b"))


def test_the_simulator_does_not_load_torch():
    code = "import sys; from amoe.sim import cli; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
