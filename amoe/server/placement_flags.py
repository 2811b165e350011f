"""The flags of which workers there are and on which CPUs, and what is chosen for this host where they are left open."""

from __future__ import annotations

import argparse

from amoe.builtin import builtin_model_path
from amoe.config import PlacementConfig
from amoe.engine.host import read_host, usable_cpus
from amoe.errors import ConfigError
from amoe.policy.host_placement import CpuBinding, HostTopology, choose, cpu_list, parse_cpu_list

_CHOOSING = ("attention_workers", "expert_workers", "colocated")  # one of them given: the placement is the user's


def add_placement_flags(parser: argparse.ArgumentParser) -> None:
    """Those of `PlacementConfig`, `--threads-per-worker` and `--cpu-bind`."""
    placement = PlacementConfig()
    group = parser.add_argument_group(
        "placement", "which worker processes there are; default: on CPUs, a colocated one for each NUMA node, else one"
    )
    group.add_argument(
        "--attention-workers",
        type=int,
        metavar="N",
        help=f"hold KV cache and head (default: {placement.attention_workers})",
    )
    group.add_argument(
        "--expert-workers",
        type=int,
        metavar="N",
        help=f"share the experts; 0: the attention worker holds them too (default: {placement.expert_workers})",
    )
    group.add_argument(
        "--colocated",
        type=int,
        metavar="N",
        help="instead: N workers that hold attention and a share of the experts each; 0 is off",
    )
    group.add_argument(
        "--redundant-experts",
        type=int,
        default=placement.redundant_experts,
        metavar="N",
        help="replicas of hot experts that each of them holds besides, per layer",
    )
    group.add_argument(
        "--expert-load",
        metavar="FILE",
        help="which are hot, as `amoe bench offline --save-expert-load FILE` has measured it; default: all the same",
    )
    group.add_argument(
        "--threads-per-worker",
        type=int,
        metavar="N",
        help="default: the physical cores (of its NUMA node) divided by the workers there",
    )
    group.add_argument(
        "--cpu-bind",
        type=cpu_binding,
        default="auto",
        metavar="CPUS",
        help="auto: each worker keeps to its NUMA node, where there are several; none: workers run on any CPU; "
        "0-7;8-15: each on these, by rank, a thread on each if there are enough",
    )


def cpu_binding(text: str) -> CpuBinding:
    """The value of `--cpu-bind`."""
    if text == "auto":
        return "auto"
    if text == "none":
        return "none"
    try:
        sets = tuple(parse_cpu_list(part) for part in text.split(";"))
    except ValueError:
        sets = ()
    if not sets or not all(sets):
        raise argparse.ArgumentTypeError(f"{text!r} is neither auto nor none nor CPUs by worker, such as 0-7;8-15")
    return sets


def placement_config(args: argparse.Namespace) -> PlacementConfig:
    """The workers that the flags describe.

    Raises:
        ConfigError: naming the flag that cannot work.
    """
    given = {name: value for name in _CHOOSING if (value := getattr(args, name)) is not None}
    return PlacementConfig(redundant_experts=args.redundant_experts, expert_load=args.expert_load, **given)


def cpu_sets(args: argparse.Namespace) -> tuple[tuple[int, ...], ...]:
    """CPUs of each worker, by rank; empty: any."""
    return args.cpu_bind if isinstance(args.cpu_bind, tuple) else ()


def settled(args: argparse.Namespace, host: HostTopology | None = None) -> tuple[argparse.Namespace, str]:
    """The flags with what is right for this host where the user has left it open; and a line that says so, if any.

    It is for workers on the CPUs of this host: other devices have no nodes, and the nodes of a Ray cluster differ.

    Args:
        host: None: the one that this runs on.

    Raises:
        ConfigError, CheckpointError: what is wrong with the flags or with the model.
    """
    sets = cpu_sets(args)
    is_given = any(getattr(args, name) is not None for name in _CHOOSING)
    if not is_given and len(sets) > 1:  # as many workers as the user has named CPUs for
        args, is_given = argparse.Namespace(**vars(args) | {"colocated": len(sets)}), True
    if args.device != "cpu":
        _check_binding(sets, placement_config(args).num_workers)
        return args, ""
    host = host or read_host()
    is_given = is_given or bool(sets)
    plan = choose(
        host,
        placement=placement_config(args) if is_given else None,
        threads_per_worker=args.threads_per_worker,
        binding=args.cpu_bind,
        most_workers=None if is_given else _most_workers(args, host),
    )
    _check_binding(sets, plan.placement.num_workers)
    chosen = {"threads_per_worker": plan.threads_per_worker, "cpu_bind": plan.cpu_sets or "none"}
    if not is_given and plan.placement.colocated:
        chosen["colocated"] = plan.placement.colocated
    advice = "change with --colocated, --threads-per-worker, --cpu-bind"
    return argparse.Namespace(**vars(args) | chosen), f"{plan.reason} ({advice})"


def _most_workers(args: argparse.Namespace, host: HostTopology) -> int | None:
    """Each holds experts; and an iteration that is one step is that of one worker."""
    if len(host.nodes()) == 1:
        return None
    schedules = {args.schedule, *(variant.schedule for variant in getattr(args, "schedules", None) or ())}
    if "forward" in schedules:
        return 1
    from amoe.models.config import load_model_config  # late: what is refused for its flags needs it not

    return load_model_config(args.model or builtin_model_path()).num_experts


def _check_binding(sets: tuple[tuple[int, ...], ...], num_workers: int) -> None:
    if not sets:
        return
    missing = {cpu for cpus in sets for cpu in cpus} - usable_cpus()
    if missing:
        raise ConfigError(f"--cpu-bind: this process may not run on CPUs {cpu_list(sorted(missing))}")
    if any(len(set(cpus)) < len(cpus) for cpus in sets):
        raise ConfigError("--cpu-bind names a CPU twice for one worker: two threads would take turns on it")
    if len(sets) != num_workers:
        raise ConfigError(
            f"--cpu-bind names the CPUs of {len(sets)} worker(s), and there are {num_workers}: separate those of each "
            "worker by ; as in --colocated 2 --cpu-bind '0-7;8-15'"
        )
