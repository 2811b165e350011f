"""`amoe serve`: its flags, and what they make of them. vLLM's names where it has the thing."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from dataclasses import replace

from amoe.config import EngineConfig
from amoe.logs import LogOptions
from amoe.server.chat_flags import add_chat_flags, chat_options
from amoe.server.cluster_flags import add_elastic_flags, elastic_config
from amoe.server.engine_flags import HelpFormatter, add_engine_flags, engine_config
from amoe.server.http_flags import add_server_flags, log_options, server_options
from amoe.server.options import ServerOptions
from amoe.server.parser import Parser
from amoe.server.placement_flags import settled
from amoe.server.ray_flags import add_ray_flags, ray_options

BUILTIN_NAME = "amoe-builtin"


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `serve`; its parser sets `func`."""
    parser = subparsers.add_parser(
        "serve",
        help="serve a model over an OpenAI-compatible HTTP API",
        description="Serve a Mixture-of-Experts model over an OpenAI-compatible HTTP API.",
        formatter_class=HelpFormatter,
    )
    add_flags(parser)
    parser.set_defaults(func=serve)


def standalone_parser() -> Parser:
    """The flags of `serve` alone, for settings that come from elsewhere than a command line."""
    parser = Parser(prog="amoe serve")
    add_flags(parser)
    return parser


def add_flags(parser: argparse.ArgumentParser) -> None:
    """All flags of `serve`."""
    add_engine_flags(parser)
    add_elastic_flags(parser)
    add_ray_flags(parser)
    parser.add_argument("--seed", type=int, default=0, help="base of the seeds of requests that bring none")
    add_server_flags(parser)
    add_chat_flags(parser)


def serve(args: argparse.Namespace) -> int:
    """Run the server. Returns the exit status."""
    args, where = settled(args) if args.executor == "local" else (args, "")
    config, options, logs = settings_of(args, os.environ)
    options.executor.check_address(os.environ)
    from amoe.server.run import run_server  # late: `amoe --help` and what is refused need none of it

    return run_server(config, options, logs, where=where)


def settings_of(
    args: argparse.Namespace, environment: Mapping[str, str]
) -> tuple[EngineConfig, ServerOptions, LogOptions]:
    """What the flags and the environment say.

    Raises:
        ConfigError: naming the flag or variable that cannot work.
    """
    names = args.served_model_name or [args.model or BUILTIN_NAME]
    options = replace(
        server_options(args, tuple(names), environment), chat=chat_options(args), executor=ray_options(args)
    )
    config = elastic_config(engine_config(args), args)
    if options.executor.name == "ray" and args.transport is None:
        config = replace(config, transport="tcp")
    options.executor.check(config, options.api_server_count)
    return config, options, log_options(args, environment)
