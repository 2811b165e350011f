"""The command line: flags to configuration, and mistakes in one line."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest

from amoe import __version__, cli
from amoe.config import (
    AutoscaleConfig,
    CacheConfig,
    CapacityConfig,
    EngineConfig,
    FailureConfig,
    PlacementConfig,
    SchedulerConfig,
    SteeringConfig,
)
from amoe.errors import ConfigError
from amoe.server import cluster_flags, engine_flags
from tests.fake_workers import make_tokenizer


def parse(*argv: str):
    return cli.build_parser("serve").parse_args(["serve", *argv])


def test_no_flags_are_the_defaults():
    assert engine_flags.engine_config(parse("m")) == EngineConfig(model="m")


def test_every_flag():
    flags = """
        --dtype float32 --device cuda:1 --max-model-len 4k --seed 3 --threads-per-worker 2 --max-waiting 7
        --attention-workers 2 --expert-workers 3 --schedule defrag --defrag-decay 0.5 --defrag-lookahead 2
        --max-wait 0.1 --max-num-seqs 8 --max-num-batched-tokens 1K --max-waiting-tokens 5k
        --scheduling-policy priority --block-size 32 --num-kv-blocks 99
        --kv-cache-memory-bytes 2G --no-enable-prefix-caching
    """
    args = parse("m", *flags.split())
    assert engine_flags.engine_config(args) == EngineConfig(
        model="m",
        dtype="float32",
        device="cuda:1",
        max_model_len=4000,
        threads_per_worker=2,
        max_waiting=7,
        max_waiting_tokens=5000,
        seed=3,
        placement=PlacementConfig(attention_workers=2, expert_workers=3),
        scheduler=SchedulerConfig(
            schedule="defrag",
            defrag_decay=0.5,
            defrag_lookahead=2,
            max_wait_s=0.1,
            max_num_seqs=8,
            max_num_batched_tokens=1024,
            scheduling_policy="priority",
        ),
        cache=CacheConfig(block_size=32, num_blocks=99, kv_cache_bytes=2 * 1024**3, enable_prefix_caching=False),
    )
    args = parse("m", "--colocated", "2", "--schedule", "lockstep", "--micro-batches", "2")
    config = engine_flags.engine_config(args)
    assert config.placement == PlacementConfig(colocated=2)
    assert config.scheduler == SchedulerConfig(schedule="lockstep", micro_batches=2)
    flags = "--colocated 2 --redundant-experts 4 --expert-load f --steer-interval 0 --ridge-tokens 9"
    args = parse("m", *flags.split())
    config = engine_flags.engine_config(args)
    assert config.placement == PlacementConfig(colocated=2, redundant_experts=4, expert_load="f")
    assert config.steering == SteeringConfig(interval_s=0.0, ridge_tokens=9)
    flags = """
        --capacity-factor 1.5 --capacity-mode expanded --capacity-scope device --capacity-phase both
        --no-capacity-keep-best --capacity-exceed-top-k --no-capacity-spread-mass
    """
    assert engine_flags.engine_config(parse("m", *flags.split())).capacity == CapacityConfig(
        factor=1.5, mode="expanded", scope="device", phase="both", keep_best=False, exceed_top_k=True, spread_mass=False
    )
    flags = "--capacity-slack 0.002 --capacity-mode reroute --capacity-telemetry 3"
    assert engine_flags.engine_config(parse("m", *flags.split())).capacity == CapacityConfig(
        slack_s=0.002, mode="reroute", telemetry_s=3
    )
    config = engine_flags.engine_config(parse("m", "--capacity-factor", "1", "--capacity-metric", "random"))
    assert config.capacity == CapacityConfig(factor=1.0, metric="random")
    flags = "--transport tcp --failure-timeout 5 --on-expert-loss reroute"
    config = engine_flags.engine_config(parse("m", *flags.split()))
    assert config.transport == "tcp"
    assert config.failure == FailureConfig(timeout_s=5.0, on_expert_loss="reroute")


class TestElasticity:
    @staticmethod
    def config(flags: str) -> EngineConfig:
        args = parse("m", *flags.split())
        return cluster_flags.elastic_config(engine_flags.engine_config(args), args)

    def test_there_is_room_to_grow_where_experts_have_workers_of_their_own(self):
        assert self.config("").placement.max_expert_workers is None
        assert self.config("--colocated 2").placement.max_expert_workers is None
        assert self.config("--expert-workers 2").placement == PlacementConfig(expert_workers=2, max_expert_workers=6)
        assert self.config("--expert-workers 2 --max-expert-workers 3").placement.max_expert_workers == 3
        assert self.config("--expert-workers 1 --autoscale-experts 1:9").placement.max_expert_workers == 9

    def test_there_is_none_where_nobody_can_come(self):
        assert self.config("--expert-workers 2 --schedule lockstep").placement.max_expert_workers is None

    def test_following_the_load(self):
        flags = "--expert-workers 1 --rebalance-interval 30 --autoscale-experts 1:3"
        assert self.config(flags).steering == SteeringConfig(rebalance_interval_s=30.0)
        assert self.config(flags).autoscale == AutoscaleConfig(min_workers=1, max_workers=3)
        assert self.config(f"{flags} --autoscale-queue-age 0.5").autoscale == AutoscaleConfig(
            min_workers=1, max_workers=3, queue_age_s=0.5
        )

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            ("--failure-timeout 0.1", "--failure-timeout must be at least 0.2"),
            ("--failure-timeout nan", "--failure-timeout must be at least 0.2"),
            ("--schedule lockstep --on-expert-loss reroute", "--on-expert-loss reroute needs workers that do not wait"),
            (
                "--schedule lockstep --expert-workers 1 --max-expert-workers 2",
                "--max-expert-workers needs workers that",
            ),
            ("--schedule lockstep --rebalance-interval 9", "--rebalance-interval needs workers that do not wait"),
            ("--colocated 2 --max-expert-workers 3", "goes with --expert-workers"),
            ("--max-expert-workers 3", "goes with --expert-workers"),
            ("--expert-workers 3 --max-expert-workers 2", "must be at least --expert-workers: 2 is less than 3"),
            ("--expert-workers 3 --max-expert-workers 100000", "at most 1024 workers"),
            ("--rebalance-interval -1", "--rebalance-interval must be 0"),
            ("--rebalance-interval 0.5", "--rebalance-interval must be 0"),
            ("--rebalance-interval nan", "--rebalance-interval must be 0"),
            ("--autoscale-experts 1:3", "--autoscale-experts goes with --expert-workers"),
            ("--expert-workers 1 --autoscale-experts 0:3", "MIN:MAX with 1 <= MIN < MAX"),
            ("--expert-workers 2 --autoscale-experts 2:2", "MIN:MAX with 1 <= MIN < MAX"),
            ("--expert-workers 1 --autoscale-experts 2:3", "is not between 2 and 3"),
            ("--expert-workers 4 --autoscale-experts 2:3", "is not between 2 and 3"),
            ("--expert-workers 1 --autoscale-experts 1:5 --max-expert-workers 3", "need --max-expert-workers 5"),
            ("--expert-workers 1 --autoscale-experts 1:2 --autoscale-queue-age 0", "--autoscale-queue-age must be"),
            ("--autoscale-queue-age 1", "--autoscale-queue-age does nothing without"),
        ],
    )
    def test_what_cannot_work_is_refused(self, flags: str, message: str):
        with pytest.raises(ConfigError, match=message):
            self.config(flags)


def test_a_capacity_without_effect_is_refused():
    with pytest.raises(ConfigError, match="--no-capacity-keep-best"):
        CapacityConfig(factor=1.0).require_effect(top_k=1)
    CapacityConfig(factor=1.0).require_effect(top_k=2)
    CapacityConfig(factor=1.0, keep_best=False).require_effect(top_k=1)
    CapacityConfig().require_effect(top_k=1)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--capacity-factor 0", "--capacity-factor must be greater than 0"),
        ("--capacity-slack -1", "--capacity-slack must be at least 0"),
        ("--capacity-factor 1 --capacity-slack 1", "choose one"),
        ("--capacity-slack 1 --capacity-mode expanded", "--capacity-slack goes with"),
        ("--capacity-factor 1 --capacity-mode reroute --capacity-metric order", "--capacity-metric is for"),
        ("--capacity-slack 1 --capacity-metric random", "--capacity-metric is for"),
        ("--capacity-factor 1 --capacity-exceed-top-k", "--capacity-exceed-top-k is for"),
        ("--capacity-slack 1 --capacity-telemetry 0", "--capacity-telemetry must be"),
        ("--capacity-factor 1 --capacity-telemetry 2", "--capacity-telemetry is for"),
        ("--capacity-slack 1 --capacity-scope device", "--capacity-scope is for"),
        ("--capacity-mode reroute", "do nothing without"),
        ("--capacity-phase both", "do nothing without"),
        ("--no-capacity-keep-best", "do nothing without"),
    ],
)
def test_capacities_that_cannot_work_are_refused(flags, message):
    with pytest.raises(ConfigError, match=message):
        engine_flags.engine_config(parse("m", *flags.split()))


@pytest.mark.parametrize(("flag", "num_waves"), [((), None), (("--waves", "auto"), None), (("--waves", "3"), 3)])
def test_the_number_of_waves_is_fixed_or_automatic(flag, num_waves):
    config = engine_flags.engine_config(parse("m", "--schedule", "waves", "--max-hold", "0.2", *flag))
    assert config.scheduler == SchedulerConfig(schedule="waves", num_waves=num_waves, max_hold_s=0.2)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--colocated", "2", "--expert-workers", "1"], "--colocated excludes"),
        (["--attention-workers", "2"], "--expert-workers"),
        (["--micro-batches", "2"], "--micro-batches"),
        (["--schedule", "lockstep", "--waves", "2"], "--waves"),
        (["--schedule", "waves", "--waves", "17"], "--waves"),
        (["--max-hold", "0"], "--max-hold"),
        (["--colocated", "2", "--redundant-experts", "-1"], "--redundant-experts"),
        (["--redundant-experts", "1"], "at least two workers"),
        (["--colocated", "2", "--expert-load", "x.json"], "give both"),
        (["--steer-interval", "-1"], "--steer-interval"),
        (["--ridge-tokens", "0"], "--ridge-tokens"),
        (["--max-num-seqs", "0"], "--max-num-seqs"),
        (["/does/not/exist"], "is not a directory"),
    ],
)
def test_mistakes_are_one_line(argv, message, capsys):
    assert cli.main(["serve", *argv]) == 2
    output = capsys.readouterr()
    assert message in output.err
    assert output.err.startswith("amoe: error: ")
    assert output.err.count("\n") == 1


@pytest.mark.parametrize(
    "argv",
    [
        ["--port", "99999"],
        ["--max-num-seqs", "many"],
        ["--schedule", "x"],
        ["--nope"],
        ["--autoscale-experts", "3"],
        ["--transport", "udp"],
        ["--shutdown-timeout", "inf"],
    ],
)
def test_mistakes_of_syntax(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["serve", *argv])
    assert caught.value.code == 2
    assert "amoe serve: error" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "hint"),
    [
        (["--prot", "1"], "unrecognized arguments: --prot (did you mean --port?)"),
        (["--prot=1"], "unrecognized arguments: --prot=1 (did you mean --port?)"),
        (["model", "--xyzzy"], "unrecognized arguments: --xyzzy\n"),
        (["model", "other"], "unrecognized arguments: other\n"),
    ],
)
def test_unknown_flags_are_told_with_what_was_meant(argv, hint, capsys):
    with pytest.raises(SystemExit):
        cli.main(["serve", *argv])
    error = capsys.readouterr().err
    assert error.startswith("usage: amoe serve ")
    assert f"amoe serve: error: {hint}" in error


@pytest.mark.parametrize("argv", [["--seed", "-1"], ["--json", "/does/not/exist/report.json"]])
@pytest.mark.parametrize("command", ["serve", "offline"])
def test_a_measurement_that_would_be_lost_does_not_begin(command, argv, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["bench", command, *argv])
    assert caught.value.code == 2
    assert f"argument {argv[0]}" in capsys.readouterr().err


def test_not_a_checkpoint(tmp_path, capsys):
    assert cli.main(["serve", str(tmp_path)]) == 2
    assert "config.json" in capsys.readouterr().err
    make_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}')
    assert cli.main(["serve", str(tmp_path)]) == 2
    assert "llama" in capsys.readouterr().err.lower()


def test_taken_port(checkpoint_factory, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert cli.main(["serve", str(checkpoint_factory("qwen3_moe")), "--port", str(port)]) == 2
    assert f"cannot listen on 127.0.0.1 port {port}: Address already in use" in capsys.readouterr().err


def test_human_numbers():
    assert [engine_flags.human_int(text) for text in ("7", "2k", "2K", "1m", "1M")] == [7, 2000, 2048, 10**6, 2**20]


def test_version_and_help_do_not_load_torch():
    code = "import sys; from amoe import cli\ntry: cli.main(['--version'])\nfinally: assert 'torch' not in sys.modules"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert output.stdout == f"amoe {__version__}\n"
