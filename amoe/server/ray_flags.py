"""The flags of where workers run, and what they make."""

from __future__ import annotations

import argparse

from amoe.cluster.executor import EXECUTORS, ExecutorOptions


def add_ray_flags(parser: argparse.ArgumentParser) -> None:
    """Those of a server; see `docs/deployment.md`."""
    options = ExecutorOptions()
    group = parser.add_argument_group("executor", "where workers run (docs/deployment.md)")
    group.add_argument(
        "--executor",
        choices=EXECUTORS,
        default=options.name,
        help="local: processes of this host; ray: actors of a Ray cluster, which need the model's files on their nodes",
    )
    group.add_argument(
        "--ray-address",
        metavar="HOST:PORT",
        help="of the head; default: RAY_ADDRESS, or what `ray start` has started on this host, or a new one",
    )
    group.add_argument(
        "--deployment-name",
        metavar="NAME",
        help="part of the actors' names, amoe/NAME/ROLE-RANK: another one for each server in a Ray cluster (default: "
        f"{options.deployment})",
    )
    group.add_argument(
        "--ray-pin-roles",
        action="store_true",
        help="attention workers go to nodes with the custom resource amoe_attention, expert workers to those with "
        "amoe_experts",
    )
    group.add_argument(
        "--ray-placement-timeout",
        type=float,
        metavar="SECONDS",
        help=f"in which Ray must find room for the workers (default: {options.ray_placement_timeout_s:g}); more where "
        "its autoscaler has to start nodes first",
    )


def ray_options(args: argparse.Namespace) -> ExecutorOptions:
    """What the flags say.

    Raises:
        ConfigError: naming the flag that cannot work.
    """
    given = {
        "ray_address": args.ray_address,
        "deployment": args.deployment_name,
        "ray_pin_roles": args.ray_pin_roles or None,
        "ray_placement_timeout_s": args.ray_placement_timeout,
    }
    return ExecutorOptions(name=args.executor, **{name: value for name, value in given.items() if value is not None})
