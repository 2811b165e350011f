"""The flags of the engine, and the configuration that they make: for every command that runs one.

vLLM's names where it has the thing.
"""

from __future__ import annotations

import argparse
import re

from amoe.builtin import builtin_model_path
from amoe.config import (
    CAPACITY_METRICS,
    CAPACITY_MODES,
    CAPACITY_PHASES,
    CAPACITY_SCOPES,
    CPU_RIDGE_TOKENS,
    DTYPES,
    GPU_RIDGE_TOKENS,
    KERNELS,
    QUANTIZATIONS,
    SCHEDULES,
    SCHEDULING_POLICIES,
    CacheConfig,
    CapacityConfig,
    EngineConfig,
    SchedulerConfig,
    SteeringConfig,
)
from amoe.server.cluster_flags import add_cluster_flags, failure_config
from amoe.server.placement_flags import add_placement_flags, cpu_sets, placement_config

_UNITS = {"": 1, "k": 1000, "K": 1024, "m": 1000**2, "M": 1024**2, "g": 1000**3, "G": 1024**3}


def human_int(text: str) -> int:
    """`2048`, `32k` (32,000) or `32K` (32,768), as in vLLM."""
    match = re.fullmatch(r"(\d+)([kKmMgG]?)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number such as 2048, 32k (32,000) or 32K (32,768)")
    return int(match[1]) * _UNITS[match[2]]


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, other than "None", which means that the help text says what happens, and those of switches."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        is_switch = action.nargs == 0 and not isinstance(action, argparse.BooleanOptionalAction)
        return action.help if action.default is None or is_switch else super()._get_help_string(action)


def add_engine_flags(parser: argparse.ArgumentParser) -> None:
    """MODEL and the flags of `EngineConfig`, in groups; but `--seed`, which each command explains its own way."""
    _add_model_flags(parser)
    add_placement_flags(parser)
    _add_scheduler_flags(parser)
    _add_cache_flags(parser)
    _add_steering_flags(parser)
    add_capacity_flags(parser)
    add_cluster_flags(parser)


def _add_model_flags(parser: argparse.ArgumentParser) -> None:
    engine = EngineConfig(model="x")
    group = parser.add_argument_group("model")
    group.add_argument(
        "model", metavar="MODEL", nargs="?", help="directory of a checkpoint in Hugging Face format; default: built-in"
    )
    group.add_argument("--dtype", choices=DTYPES, default=engine.dtype, help="auto is the checkpoint's")
    group.add_argument(
        "--device",
        default=engine.device,
        help="cpu, cuda, cuda:1; plain cuda spreads the workers; emulated:h100,slow=20: workers that wait instead of "
        "computing (docs/emulation.md)",
    )
    group.add_argument(
        "--kernels",
        choices=KERNELS,
        default=engine.kernels,
        help="native: amoe's own for CPUs; torch: any device; auto: native where they serve",
    )
    group.add_argument(
        "--quantization",
        choices=QUANTIZATIONS,
        help="int8: weights of experts, projections and LM head in 8 bits (CPU); default: as in the checkpoint",
    )
    group.add_argument(
        "--max-model-len",
        type=human_int,
        metavar="N",
        help="tokens of prompt and answer together; default: what the model was trained for",
    )


def _num_waves(text: str) -> int | None:
    return None if text == "auto" else int(text)


def _add_scheduler_flags(parser: argparse.ArgumentParser) -> None:
    scheduler = SchedulerConfig()
    group = parser.add_argument_group("scheduler")
    group.add_argument(
        "--schedule",
        choices=SCHEDULES,
        default=scheduler.schedule,
        help="which block runs next; auto: forward, all of them as one step, where one worker holds the whole model, "
        "else waves",
    )
    group.add_argument(
        "--defrag-decay", type=float, default=scheduler.defrag_decay, metavar="X", help="weight per block downstream"
    )
    group.add_argument(
        "--defrag-lookahead", type=int, default=scheduler.defrag_lookahead, metavar="N", help="blocks looked ahead"
    )
    group.add_argument(
        "--waves",
        type=_num_waves,
        default=scheduler.num_waves,
        metavar="N",
        help="of waves: a fixed number, or auto: chosen by load and skew (default: auto)",
    )
    group.add_argument(
        "--max-waves",
        type=int,
        default=scheduler.max_waves,
        metavar="N",
        help=f"that --waves auto tries (default: {scheduler.max_waves})",
    )
    group.add_argument(
        "--max-hold",
        type=float,
        default=scheduler.max_hold_s,
        metavar="SECONDS",
        help="of waves: tokens that have waited longer for others go on without them (default: %(default)s)",
    )
    group.add_argument(
        "--micro-batches", type=int, default=scheduler.micro_batches, metavar="N", help="of lockstep: 1, 2 or 3"
    )
    group.add_argument(
        "--max-wait",
        type=float,
        default=scheduler.max_wait_s,
        metavar="SECONDS",
        help="a block whose oldest token has waited longer runs next, whatever the schedule says",
    )
    group.add_argument(
        "--max-num-seqs", type=human_int, default=scheduler.max_num_seqs, metavar="N", help="per attention worker"
    )
    group.add_argument(
        "--max-num-batched-tokens",
        type=human_int,
        default=scheduler.max_num_batched_tokens,
        metavar="N",
        help="prompt tokens in flight per attention worker",
    )
    _add_queue_flags(group)


def _add_queue_flags(group: argparse._ArgumentGroup) -> None:
    """Who waits, how many, and for how long."""
    scheduler = SchedulerConfig()
    group.add_argument(
        "--max-waiting",
        type=human_int,
        default=EngineConfig(model="x").max_waiting,
        metavar="N",
        help="requests that may wait beside the running ones; more are answered 503",
    )
    group.add_argument(
        "--max-waiting-tokens",
        type=human_int,
        metavar="N",
        help="tokens of prompts that may wait for their first answer; more are answered 503 (default: any number)",
    )
    group.add_argument(
        "--max-queue-time",
        type=float,
        default=EngineConfig(model="x").max_queue_s,
        metavar="SECONDS",
        help="who would probably wait longer to be computed is answered 503 at once; 0: nobody is for that",
    )
    group.add_argument(
        "--scheduling-policy",
        choices=SCHEDULING_POLICIES,
        default=scheduler.scheduling_policy,
        help="who is admitted first: fcfs, by arrival; priority, by the request's field priority (the lower first)",
    )


def _add_cache_flags(parser: argparse.ArgumentParser) -> None:
    cache = CacheConfig()
    group = parser.add_argument_group("KV cache", "of each attention worker")
    group.add_argument("--block-size", type=int, default=cache.block_size, metavar="N", help="tokens per block")
    group.add_argument("--num-kv-blocks", type=human_int, metavar="N", help="default: from --kv-cache-memory-bytes")
    group.add_argument("--kv-cache-memory-bytes", type=human_int, metavar="N", help="default: a share of what is free")
    group.add_argument(
        "--enable-prefix-caching",
        action=argparse.BooleanOptionalAction,
        default=cache.enable_prefix_caching,
        help="find full blocks of earlier prompts again",
    )


def _add_steering_flags(parser: argparse.ArgumentParser) -> None:
    steering = SteeringConfig()
    group = parser.add_argument_group("steering", "follow measured loads and speeds, without moving a weight")
    group.add_argument(
        "--steer-interval",
        type=float,
        default=steering.interval_s,
        metavar="SECONDS",
        help="between plans of which replica gets which share, and which worker which part of new sequences; 0 is off",
    )
    group.add_argument(
        "--ridge-tokens",
        type=int,
        metavar="N",
        help="tokens of an expert below which reading its weights takes longer than computing; default: "
        f"{CPU_RIDGE_TOKENS} on a CPU, else {GPU_RIDGE_TOKENS}",
    )


def add_capacity_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `CapacityConfig`."""
    capacity = CapacityConfig()
    group = parser.add_argument_group(
        "capacity",
        "speed for quality: drop or reroute (token, expert) pairs of overloaded experts; off, and lossless, without "
        "--capacity-factor and --capacity-slack (docs/capacity.md)",
    )
    group.add_argument(
        "--capacity-factor",
        type=float,
        metavar="X",
        help="an expert takes at most X times its even share of a micro-batch's pairs, as in 1.5",
    )
    group.add_argument(
        "--capacity-slack",
        type=float,
        metavar="SECONDS",
        help="instead: touch a pair where its worker would answer so much later than the token's other workers",
    )
    group.add_argument(
        "--capacity-mode",
        choices=CAPACITY_MODES,
        default=capacity.mode,
        help="drop; reroute to the best expert with room; expanded: experts fill up with tokens that are there anyway",
    )
    group.add_argument(
        "--capacity-metric", choices=CAPACITY_METRICS, default=capacity.metric, help="of drop: who stays"
    )
    group.add_argument(
        "--capacity-scope",
        choices=CAPACITY_SCOPES,
        default=capacity.scope,
        help="the cap is on each expert, or on the sum of a worker's experts",
    )
    group.add_argument("--capacity-phase", choices=CAPACITY_PHASES, default=capacity.phase, help="whose pairs")
    group.add_argument(
        "--capacity-keep-best",
        action=argparse.BooleanOptionalAction,
        default=capacity.keep_best,
        help="never touch a token's best pair",
    )
    group.add_argument(
        "--capacity-exceed-top-k",
        action="store_true",
        help="of expanded: a token may end with more pairs than the model's top-k, as in the paper",
    )
    group.add_argument(
        "--capacity-spread-mass",
        action=argparse.BooleanOptionalAction,
        default=capacity.spread_mass,
        help="of models that renormalise: what a token keeps takes over the weight of what it lost",
    )
    group.add_argument(
        "--capacity-telemetry",
        type=float,
        default=capacity.telemetry_s,
        metavar="SECONDS",
        help="of --capacity-slack: what a worker told of its backlog counts for so long",
    )


def capacity_config(args: argparse.Namespace) -> CapacityConfig:
    """What `add_capacity_flags` describe.

    Raises:
        ConfigError: naming the flag that cannot work.
    """
    return CapacityConfig(
        factor=args.capacity_factor,
        slack_s=args.capacity_slack,
        mode=args.capacity_mode,
        metric=args.capacity_metric,
        scope=args.capacity_scope,
        phase=args.capacity_phase,
        keep_best=args.capacity_keep_best,
        exceed_top_k=args.capacity_exceed_top_k,
        spread_mass=args.capacity_spread_mass,
        telemetry_s=args.capacity_telemetry,
    )


def engine_config(args: argparse.Namespace) -> EngineConfig:
    """The configuration that the flags describe.

    Raises:
        ConfigError: naming the flag that cannot work.
    """
    return EngineConfig(
        model=args.model or str(builtin_model_path()),
        dtype=args.dtype,
        device=args.device,
        kernels=args.kernels,
        quantization=args.quantization,
        max_model_len=args.max_model_len,
        threads_per_worker=args.threads_per_worker,
        max_waiting=args.max_waiting,
        max_waiting_tokens=args.max_waiting_tokens,
        max_queue_s=args.max_queue_time,
        seed=args.seed,
        cpu_sets=cpu_sets(args),
        placement=placement_config(args),
        scheduler=SchedulerConfig(
            schedule=args.schedule,
            defrag_decay=args.defrag_decay,
            defrag_lookahead=args.defrag_lookahead,
            max_wait_s=args.max_wait,
            max_hold_s=args.max_hold,
            num_waves=args.waves,
            max_waves=args.max_waves,
            micro_batches=args.micro_batches,
            max_num_seqs=args.max_num_seqs,
            max_num_batched_tokens=args.max_num_batched_tokens,
            scheduling_policy=args.scheduling_policy,
        ),
        cache=CacheConfig(
            block_size=args.block_size,
            num_blocks=args.num_kv_blocks,
            kv_cache_bytes=args.kv_cache_memory_bytes,
            enable_prefix_caching=args.enable_prefix_caching,
        ),
        steering=SteeringConfig(interval_s=args.steer_interval, ridge_tokens=args.ridge_tokens),
        capacity=capacity_config(args),
        failure=failure_config(args),
        transport=args.transport or "shm",
    )
