"""`amoe scale`: its flags, and what they ask of a server's admin API."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass, field
from typing import Any

from amoe.errors import ConfigError
from amoe.server.engine_flags import HelpFormatter


@dataclass(frozen=True, slots=True)
class Order:
    """What a server is asked to do.

    Attributes:
        path: of the admin API; body: of the request. None: nothing, it is only looked at.
    """

    path: str | None = None
    body: dict[str, Any] = field(default_factory=dict)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `scale`; its parser sets `func`."""
    parser = subparsers.add_parser(
        "scale",
        help="see and change the workers of a running server",
        description="See and change the workers of a running server, which goes on serving. The server needs an "
        "--admin-key.",
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of the server")
    parser.add_argument("--admin-key", metavar="KEY", help="default: AMOE_ADMIN_KEY of the environment")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--status", action="store_true", help="show the workers, and what was asked for lately")
    what.add_argument("--expert-workers", type=int, metavar="N", help="let there be N of them")
    what.add_argument(
        "--replicas", type=int, metavar="N", help="let N workers hold the expert of --layer L and --expert E"
    )
    what.add_argument("--rebalance", action="store_true", help="place the experts by their measured load")
    parser.add_argument("--layer", type=int, metavar="L", help="of --replicas, from 0")
    parser.add_argument("--expert", type=int, metavar="E", help="of --replicas, from 0")
    parser.add_argument("--no-wait", action="store_true", help="do not wait until it is done")
    parser.set_defaults(func=scale)


def order_of(args: argparse.Namespace) -> Order:
    """What the flags ask for.

    Raises:
        ConfigError: naming the flag that cannot work.
    """
    for flag, count in (("--expert-workers", args.expert_workers), ("--replicas", args.replicas)):
        if count is not None and count < 1:
            raise ConfigError(f"{flag} must be at least 1, not {count}")
    for flag, index in (("--layer", args.layer), ("--expert", args.expert)):
        if index is not None and index < 0:
            raise ConfigError(f"{flag} counts from 0: {index} is none")
    has_place = (args.layer is not None, args.expert is not None)
    if args.replicas is None and any(has_place):
        raise ConfigError("--layer and --expert go with --replicas N")
    if args.replicas is not None:
        if not all(has_place):
            raise ConfigError("--replicas N needs --layer L and --expert E: whose replicas?")
        return Order("/admin/replicas", {"layer": args.layer, "expert": args.expert, "count": args.replicas})
    if args.expert_workers is not None:
        return Order("/admin/scale", {"expert_workers": args.expert_workers})
    if args.rebalance:
        return Order("/admin/rebalance")
    if not args.status:
        raise ConfigError("say what: --status, --expert-workers N, --replicas N --layer L --expert E or --rebalance")
    if args.no_wait:
        raise ConfigError("--no-wait does nothing with --status")
    return Order()


def scale(args: argparse.Namespace) -> int:
    """Ask the server. Returns the exit status: 0 when it is done (or, with --no-wait, begun)."""
    order = order_of(args)
    if not args.url.startswith(("http://", "https://")):
        raise ConfigError(f"--url {args.url!r} is not an address such as http://127.0.0.1:8000")
    key = args.admin_key or os.environ.get("AMOE_ADMIN_KEY", "")
    if not key:
        raise ConfigError("no admin key: give --admin-key KEY, or set AMOE_ADMIN_KEY, as at the server")
    from amoe.server.scale_client import run_order  # late: `amoe --help` needs none of it

    return run_order(args.url, key, order, wait=not args.no_wait)
