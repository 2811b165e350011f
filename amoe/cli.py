"""The `amoe` command."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from amoe import __version__
from amoe.cluster.leaving import is_in_a_call_of_rays, leave
from amoe.errors import AmoeError, CheckpointError, ConfigError, RequestError
from amoe.server import cli as server_cli
from amoe.server import scale_cli
from amoe.server.parser import Parser

EXIT_USAGE = 2


def build_parser(command: str | None) -> argparse.ArgumentParser:
    """The parser of the whole command; each subcommand's sets `func`. Only `command`'s flags need to be there."""
    parser: argparse.ArgumentParser = Parser(
        prog="amoe", description="Serve Mixture-of-Experts language models with asynchronous expert parallelism."
    )
    parser.add_argument("--version", action="version", version=f"amoe {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    server_cli.add_parser(subparsers)
    scale_cli.add_parser(subparsers)
    if command == "bench":
        from amoe.bench import cli as bench_cli  # loads the engine, torch and all, which takes seconds

        bench_cli.add_parser(subparsers)
    else:
        subparsers.add_parser("bench", help="measure a server, or the engine alone")
    if command == "simulate":
        from amoe.sim import cli as sim_cli

        sim_cli.add_parser(subparsers)
    else:
        subparsers.add_parser("simulate", help="simulate workers on devices that need not be there")
    if command == "plan":
        from amoe.sim import plan_cli

        plan_cli.add_parser(subparsers)
    else:
        subparsers.add_parser("plan", help="find placement, replicas and waves for a model, devices and a load")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit status: 2 for what the user can mend, 1 for what failed. With the command line
    of this process, whose last act it is, it does not return where the process could not end in an orderly way."""
    status = _run(sys.argv[1:] if argv is None else argv)
    if argv is None and is_in_a_call_of_rays():
        leave(status)
    return status


def _run(argv: Sequence[str]) -> int:
    logging.basicConfig(level=logging.INFO, format="amoe: %(message)s")
    try:
        args = build_parser(argv[0] if argv else None).parse_args(argv)
        return args.func(args)
    except AmoeError as error:
        print(f"amoe: error: {error}", file=sys.stderr)
        return EXIT_USAGE if isinstance(error, ConfigError | CheckpointError | RequestError) else 1
    except FileNotFoundError as error:
        print(f"amoe: error: {error}", file=sys.stderr)
        return EXIT_USAGE
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
