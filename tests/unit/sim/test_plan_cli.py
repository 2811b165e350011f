"""`amoe plan`: flags, reports, plots, mistakes in one line."""

from __future__ import annotations

import argparse
import json
import sys

import pytest

from amoe import cli
from amoe.sim import plan_cli, plan_plot
from amoe.sim.plan_options import Space
from amoe.sim.plan_search import Goal

SMALL = [
    *("olmoe-1b-7b", "--devices", "2", "--routing", "uniform", "--redundant-experts", "0", "--compare", "ep"),
    *("--placements", "colocated", "--waves", "1", "--jobs", "1"),
]


def parse(*argv: str) -> argparse.Namespace:
    return cli.build_parser("plan").parse_args(["plan", *argv])


def error_of(capsys, *argv: str) -> str:
    """The line that a mistake ends with; the exit status must be 2."""
    try:
        status = cli.main(["plan", *argv])
    except SystemExit as leaving:
        status = leaving.code
    assert status == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_no_flags_are_the_defaults():
    args = parse("mixtral-8x7b")
    assert plan_cli.goal_of(args) == Goal()
    assert plan_cli.space_of(args) == Space()
    scenario = plan_cli.scenario_of(args)
    assert scenario.sizes.name == "mixtral-8x7b"
    assert (scenario.device.name, scenario.fabric.devices_per_node, scenario.slow) == ("h100", 8, {})
    assert scenario.popularity is scenario.believed


def test_every_flag():
    flags = """
        --device a100-80g --devices 6 --hosts 2 --link-latency-us 7 --slow 2:1.5 --rate 8 --slo-itl 30 --input-len 100
        --output-len 30 --no-prefill --routing sigma=0.5 --redundant-experts 2,0 --waves 4 --placements disaggregated
        --compare tbo,ep --seed 3 --plot x.svg
    """
    args = parse("mixtral-8x7b", *flags.split())
    assert plan_cli.goal_of(args) == Goal(rate=8.0, slo_itl=0.03)
    space = Space(redundant=(0, 2), waves=4, colocated=False, lockstep=("tbo", "ep"), curves=True)
    assert plan_cli.space_of(args) == space
    scenario = plan_cli.scenario_of(args)
    assert (scenario.device.name, scenario.fabric.devices_per_node) == ("a100-80g", 3)
    assert scenario.fabric.intra.latency_s == pytest.approx(7e-6)
    assert (scenario.slow, scenario.input_len, scenario.output_len, scenario.prefill) == ({2: 1.5}, 100, 30, False)
    assert len(plan_cli.space_of(parse("mixtral-8x7b", "--compare", "all")).lockstep) == 7
    assert plan_cli.space_of(parse("mixtral-8x7b", "--compare", "none")).lockstep == ()


def test_a_plan_with_files(tmp_path, capsys):
    report, plot = tmp_path / "plan.json", tmp_path / "plan.svg"
    status = cli.main(["plan", *SMALL, "--sequences", "64", "--json", str(report), "--plot", str(plot)])
    assert status == 0
    text = capsys.readouterr().out
    assert "recommended: 2 colocated, 1 wave: " in text
    assert "amoe serve MODEL --colocated 2 --schedule waves --waves 1 --max-num-seqs 32" in text
    assert "TTFT is not estimated" in text
    found = json.loads(report.read_text())
    assert found["recommended"]["serve_flags"][:2] == ["--colocated", "2"]
    assert {entry["schedule"] for entry in found["alternatives"]} == {"waves", "ep"}
    assert len(found["loads"]) > len(found["alternatives"])
    assert found["plan"]["sequences"] == 64
    assert plot.read_text().lstrip().startswith("<?xml") and "recommended" in plot.read_text()


def test_what_is_not_met_has_its_status(capsys):
    assert cli.main(["plan", *SMALL, "--rate", "1e6"]) == 1
    assert "no placement keeps up with the rate" in capsys.readouterr().out


def test_processes_say_the_same(capsys):
    flags = [*SMALL[:-2], "--sequences", "16", "--redundant-experts", "0,1,2"]
    outputs = []
    for jobs in ("1", "2"):
        assert cli.main(["plan", *flags, "--jobs", jobs]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["gpt-9"], "'gpt-9' is no checkpoint directory, nor one of mixtral-8x7b"),
        (["mixtral-8x7b", "--device", "abacus"], "there is no device profile 'abacus'"),
        (["mixtral-8x7b", "--devices", "1"], "mixtral-8x7b does not fit 1 × h100 (80 GB): at least 2 devices"),
        (["mixtral-8x7b", "--devices", "0"], "'0' is not a whole number of at least 1"),
        (["mixtral-8x7b", "--compare", "magic"], "there is no lockstep schedule 'magic' to compare with; known: ep"),
        (["mixtral-8x7b", "--slow", "9:2"], "--slow: a plan is for devices 0 to 7, slow from the beginning"),
        (["mixtral-8x7b", "--slow", "1:2@3"], "--slow: a plan is for devices 0 to 7, slow from the beginning"),
        (["mixtral-8x7b", "--slow", "1:0"], "greater than 0"),
        (["mixtral-8x7b", "--waves", "9"], "9 is more than 8 waves"),
        (["mixtral-8x7b", "--redundant-experts", "1,x"], "'x' is not a whole number"),
        (["mixtral-8x7b", "--rate", "1", "--sequences", "1"], "not allowed with argument --rate"),
        (["mixtral-8x7b", "--hosts", "2", "--devices-per-node", "4"], "not allowed with argument"),
        (["mixtral-8x7b", "--routing", "magic"], "--routing magic: no such file"),
        (["mixtral-8x7b", "--plot", "x.txt"], "--plot x.txt: the name must end in .svg, .png, .pdf"),
        (["mixtral-8x7b", "--plot", "/nowhere/x.svg"], "cannot be written"),
        (["mixtral-8x7b", "--json", "/nowhere/x.json"], "cannot be written"),
        (["mixtral-8x7b", "--sequences", "4", "--placements", "colocated"], "more devices than sequences"),
    ],
)
def test_mistakes_are_told_in_one_line(capsys, flags, message):
    assert message in error_of(capsys, *flags)


def test_a_plot_without_matplotlib_says_how_to_get_it(capsys, monkeypatch):
    monkeypatch.setattr(plan_plot, "find_spec", lambda name: None)
    assert error_of(capsys, *SMALL, "--plot", "x.svg").endswith(
        "--plot needs matplotlib, which is not installed: pip install 'amoe[plot]'"
    )


def test_matplotlib_is_imported_for_plots_only(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # an import of it fails
    assert cli.main(["plan", *SMALL, "--sequences", "16"]) == 0


def test_simulations_are_plotted(tmp_path):
    plot = tmp_path / "simulation.png"
    flags = "olmoe-1b-7b --concurrency 8 --input-len 4 --output-len 6 --devices 2 --routing uniform"
    assert cli.main(["simulate", *flags.split(), "--schedule", "progress,lockstep", "--plot", str(plot)]) == 0
    assert plot.read_bytes().startswith(b"\x89PNG")
