"""`amoe serve`: its flags, and what they make of them. vLLM's names where it has the thing."""

from __future__ import annotations

import argparse
import math

from amoe.server.engine_flags import HelpFormatter, add_engine_flags, engine_config

BUILTIN_NAME = "amoe-builtin"


def _port(text: str) -> int:
    if not text.isdigit() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port: 0 (any free one) to 65535")
    return int(text)


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 <= seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number of seconds of at least 0")
    return seconds


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `serve`; its parser sets `func`."""
    parser = subparsers.add_parser(
        "serve",
        help="serve a model over an OpenAI-compatible HTTP API",
        description="Serve a Mixture-of-Experts model over an OpenAI-compatible HTTP API.",
        formatter_class=HelpFormatter,
    )
    add_engine_flags(parser)
    _add_http_flags(parser)
    parser.set_defaults(func=serve)


def _add_http_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=int, default=0, help="base of the seeds of requests that bring none")
    group = parser.add_argument_group("HTTP")
    group.add_argument(
        "--served-model-name", nargs="+", metavar="NAME", help="names that requests use; default: MODEL as given"
    )
    group.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 is every interface (there is no password)"
    )
    group.add_argument("--port", type=_port, default=8000, help="0 takes a free one")
    group.add_argument(
        "--shutdown-timeout",
        type=_seconds,
        default=30.0,
        metavar="SECONDS",
        help="how long open requests may go on after SIGTERM",
    )
    group.add_argument(
        "--uvicorn-log-level",
        choices=("critical", "error", "warning", "info", "debug", "trace"),
        default="info",
        help="of the web server",
    )
    group.add_argument("--disable-uvicorn-access-log", action="store_true", help="no line per request")


def serve(args: argparse.Namespace) -> int:
    """Run the server. Returns the exit status."""
    from amoe.server.run import ServerOptions, run_server  # late: `amoe --help` needs none of it

    names = args.served_model_name or [args.model or BUILTIN_NAME]
    config = engine_config(args)
    options = ServerOptions(
        host=args.host,
        port=args.port,
        model_names=tuple(names),
        shutdown_timeout_s=args.shutdown_timeout,
        uvicorn_log_level=args.uvicorn_log_level,
        access_log=not args.disable_uvicorn_access_log,
    )
    return run_server(config, options)
