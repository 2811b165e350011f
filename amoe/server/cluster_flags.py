"""The flags of what workers do together: how they exchange tokens, how they are replaced, how many there may be."""

from __future__ import annotations

import argparse
import re
from dataclasses import replace

from amoe.config import (
    LOSS_CHOICES,
    TRANSPORTS,
    AutoscaleConfig,
    EngineConfig,
    FailureConfig,
    PlacementConfig,
    SteeringConfig,
)
from amoe.errors import ConfigError


def add_cluster_flags(parser: argparse.ArgumentParser) -> None:
    """Those of every command that runs workers."""
    failure = FailureConfig()
    group = parser.add_argument_group("cluster", "how workers exchange tokens, and what happens when one is lost")
    group.add_argument(
        "--transport",
        choices=TRANSPORTS,
        help="shm: shared memory of one host; tcp: ZeroMQ; distributed: torch.distributed, NCCL between GPUs and gloo "
        "between CPUs; default: shm, or tcp with --executor ray",
    )
    group.add_argument(
        "--failure-timeout",
        type=float,
        default=failure.timeout_s,
        metavar="SECONDS",
        help="a worker that gives no sign of life, or no answer, for so long is replaced",
    )
    group.add_argument(
        "--on-expert-loss",
        choices=LOSS_CHOICES,
        default=failure.on_expert_loss,
        help="tokens whose expert nobody holds: wait until it is back, or reroute them to the best expert that is "
        "there, which the usage of the response tells",
    )
    group.add_argument(
        "--warm-spare",
        action="store_true",
        help="keep a process of this host that has imported everything, and takes the place of a worker that dies "
        "about two seconds sooner",
    )


def add_elastic_flags(parser: argparse.ArgumentParser) -> None:
    """Those of a server, whose workers come and go under traffic."""
    group = parser.add_argument_group(
        "elasticity", "expert workers that come and go under traffic (docs/operations.md)"
    )
    group.add_argument(
        "--max-expert-workers",
        type=int,
        metavar="N",
        help="up to which `amoe scale` and --autoscale-experts may go; default: twice --expert-workers, and two more",
    )
    group.add_argument(
        "--rebalance-interval",
        type=float,
        default=SteeringConfig().rebalance_interval_s,
        metavar="SECONDS",
        help="between looks at whether experts should move to other workers, by their measured load; 0 is off",
    )
    group.add_argument(
        "--autoscale-experts",
        type=_bounds,
        metavar="MIN:MAX",
        help="add expert workers while tokens wait long for experts, and remove idle ones; default: off",
    )
    group.add_argument(
        "--autoscale-queue-age",
        type=float,
        metavar="SECONDS",
        help="of --autoscale-experts: tokens that wait longer for others at an expert worker, at each layer, ask for "
        "one more; default: half of the time that a layer takes them, whatever the model, the device and the schedule",
    )


def failure_config(args: argparse.Namespace) -> FailureConfig:
    """What the flags say.

    Raises:
        ConfigError: naming the flag that cannot work.
    """
    return FailureConfig(timeout_s=args.failure_timeout, on_expert_loss=args.on_expert_loss, warm_spare=args.warm_spare)


def elastic_config(config: EngineConfig, args: argparse.Namespace) -> EngineConfig:
    """`config` with what `add_elastic_flags` describe.

    Raises:
        ConfigError: naming the flag that cannot work.
    """
    most = args.max_expert_workers
    if most is None and config.survives_losses:
        most = _usual_maximum(config.placement, args.autoscale_experts)
    return replace(
        config,
        placement=replace(config.placement, max_expert_workers=most),
        steering=replace(config.steering, rebalance_interval_s=args.rebalance_interval),
        autoscale=_autoscale(args),
    )


def _usual_maximum(placement: PlacementConfig, autoscale: tuple[int, int] | None) -> int | None:
    """Room to grow that costs little: rings and tables are laid out for it, no memory of weights."""
    if placement.expert_workers == 0:
        return None
    return max(2 * placement.expert_workers + 2, autoscale[1] if autoscale else 0)


def _autoscale(args: argparse.Namespace) -> AutoscaleConfig | None:
    if args.autoscale_experts is None:
        if args.autoscale_queue_age is not None:
            raise ConfigError("--autoscale-queue-age does nothing without --autoscale-experts MIN:MAX")
        return None
    least, most = args.autoscale_experts
    return AutoscaleConfig(min_workers=least, max_workers=most, queue_age_s=args.autoscale_queue_age)


def _bounds(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([0-9]+):([0-9]+)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not MIN:MAX, as in 1:4")
    return int(match[1]), int(match[2])
