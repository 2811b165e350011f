"""What is chosen for a host where the flags leave it open."""

from __future__ import annotations

import argparse

import pytest

from amoe import cli
from amoe.builtin import builtin_model_path
from amoe.config import EngineConfig, PlacementConfig
from amoe.errors import CheckpointError, ConfigError
from amoe.models.config import load_model_config
from amoe.policy.host_placement import Cpu, HostTopology
from amoe.server.engine_flags import engine_config
from amoe.server.placement_flags import settled

ONE_NODE = HostTopology(cpus=tuple(Cpu(id=cpu, core=cpu) for cpu in range(4)))
TWO_NODES = HostTopology(cpus=tuple(Cpu(id=cpu, core=cpu, node=cpu // 4) for cpu in range(8)))


def parse(*argv: str) -> argparse.Namespace:
    return cli.build_parser("serve").parse_args(["serve", *argv])


def settle(flags: str, host: HostTopology = TWO_NODES) -> EngineConfig:
    return engine_config(settled(parse(*flags.split()), host)[0])


def test_one_node_has_one_worker():
    args, where = settled(parse(), ONE_NODE)
    config = engine_config(args)
    assert config.placement == PlacementConfig() and config.threads_per_worker == 4 and config.cpu_sets == ()
    assert config.scheduler.schedule == engine_config(parse()).scheduler.schedule
    assert where == (
        "4 cores, 1 NUMA node: 1 worker x 4 threads, bound to no CPUs (change with --colocated, --threads-per-worker, "
        "--cpu-bind)"
    )


def test_several_nodes_have_a_worker_each():
    config = settle("")
    assert config.placement == PlacementConfig(colocated=2) and config.threads_per_worker == 4
    assert config.cpu_sets == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert config.scheduler.schedule == "waves", "as for any two workers"


def test_no_more_workers_than_the_model_has_experts():
    num_experts = load_model_config(builtin_model_path()).num_experts
    nodes = HostTopology(cpus=tuple(Cpu(id=cpu, core=cpu, node=cpu) for cpu in range(num_experts + 1)))
    assert settle("", nodes).placement == PlacementConfig(colocated=num_experts)


def test_what_is_given_counts():
    assert settle("--attention-workers 1").placement == PlacementConfig()
    assert settle("--colocated 0").placement == PlacementConfig()
    assert settle("--expert-workers 3").placement == PlacementConfig(expert_workers=3)
    assert settle("--expert-workers 3").threads_per_worker == 2
    assert settle("--threads-per-worker 3").threads_per_worker == 3
    assert settle("--cpu-bind none").cpu_sets == ()


def test_one_step_is_of_one_worker():
    assert settle("--schedule forward").placement == PlacementConfig()


@pytest.mark.parametrize("device", ["cuda", "emulated:h100"])
def test_other_devices_have_no_nodes(device: str):
    args = parse("--device", device)
    assert settled(args, TWO_NODES) == (args, "")


def test_as_many_workers_as_cpus_are_named_for():
    config = settle("--cpu-bind 0;0", ONE_NODE)
    assert config.placement == PlacementConfig(colocated=2) and config.cpu_sets == ((0,), (0,))
    assert settle("--cpu-bind 0").placement == PlacementConfig()


def test_replicas_go_with_the_workers_that_are_chosen():
    assert settle("--redundant-experts 2").placement == PlacementConfig(colocated=2, redundant_experts=2)
    with pytest.raises(ConfigError, match="at least two"):
        settle("--redundant-experts 2", ONE_NODE)


def test_cpus_by_hand():
    config = settle("--cpu-bind 0", ONE_NODE)
    assert config.cpu_sets == ((0,),) and config.threads_per_worker == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--cpu-bind 0;0 --colocated 3", "names the CPUs of 2 worker"),
        ("--cpu-bind 0,0", "names a CPU twice"),
        ("--colocated 2 --cpu-bind 0", "there are 2"),
        ("--cpu-bind 0,9998-9999", "may not run on CPUs 9998-9999"),
        ("--device cuda --cpu-bind 9999", "may not run on CPUs 9999"),
        ("--expert-workers -1", "--expert-workers must be at least 0"),
        ("--threads-per-worker 0", "--threads-per-worker must be at least 1"),
        ("/nowhere", "no such directory"),
    ],
)
def test_mistakes(flags: str, message: str):
    with pytest.raises((ConfigError, CheckpointError), match=message):
        settle(flags)


@pytest.mark.parametrize("value", ["", "all", "0;", "3-1", "0-"])
def test_what_is_no_list_of_cpus(value: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        parse("--cpu-bind", value)
    assert "neither auto nor none nor CPUs by worker" in capsys.readouterr().err
