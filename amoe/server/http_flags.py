"""The flags of `amoe serve` beside the engine's, and what they make. vLLM's names where it has the thing."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from typing import cast

from amoe.engine.watchdog import HEARTBEAT_TIMEOUT_S, STALL_TIMEOUT_S
from amoe.errors import ConfigError
from amoe.logs import FORMATS, LEVELS, LogFormat, LogOptions, level_from_environment
from amoe.server.engine_flags import human_int
from amoe.server.options import BODY_TIMEOUT_S, CorsOptions, HttpOptions, ServerOptions, digest_keys

UVICORN_LEVELS = ("critical", "error", "warning", "info", "debug", "trace")


def _port(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port: 0 (any free one) to 65535")
    return int(text)


def seconds(text: str) -> float:
    """A finite number of seconds."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number of seconds of at least 0")
    return value


def add_server_flags(parser: argparse.ArgumentParser) -> None:
    """All of them, in groups."""
    parser.add_argument("--config", metavar="FILE", help="YAML file of flags, as in `port: 8000`; flags go before it")
    _add_http_flags(parser)
    _add_access_flags(parser)
    _add_log_flags(parser)


def _add_http_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("HTTP")
    group.add_argument(
        "--served-model-name", nargs="+", metavar="NAME", help="names that requests use; default: MODEL as given"
    )
    group.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 is every interface (then set --api-key)"
    )
    group.add_argument("--port", type=_port, default=8000, help="0 takes a free one")
    group.add_argument("--uds", metavar="PATH", help="listen on a Unix socket instead")
    group.add_argument(
        "--api-server-count",
        type=int,
        default=1,
        metavar="N",
        help="processes that answer HTTP over the same workers; each has its part of the queue, and stored responses "
        "of its own; one that dies is started anew",
    )
    group.add_argument("--ssl-certfile", metavar="FILE", help="PEM; serves HTTPS")
    group.add_argument("--ssl-keyfile", metavar="FILE", help="PEM; default: the key is in --ssl-certfile")
    group.add_argument(
        "--shutdown-timeout",
        type=seconds,
        default=30.0,
        metavar="SECONDS",
        help="how long open requests may go on after SIGTERM",
    )
    group.add_argument(
        "--stall-timeout",
        type=seconds,
        default=STALL_TIMEOUT_S,
        metavar="SECONDS",
        help="/health is 503 when a worker gives no sign of life for so long, or hangs in a step",
    )
    group.add_argument(
        "--heartbeat-timeout",
        type=seconds,
        default=HEARTBEAT_TIMEOUT_S,
        metavar="SECONDS",
        help="a worker whose loop does not turn for so long is dead, and the server leaves",
    )


def _add_access_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("access", "who may ask, and how much")
    group.add_argument(
        "--api-key",
        nargs="+",
        metavar="KEY",
        help="clients have to bring one of these, but for /health, /ping, /metrics and /version; default: "
        "AMOE_API_KEY of the environment (several: with commas), else everybody may ask",
    )
    group.add_argument(
        "--admin-key",
        nargs="+",
        metavar="KEY",
        help="who brings one of these may see and change the workers: /admin/* and `amoe scale`; default: "
        "AMOE_ADMIN_KEY of the environment (several: with commas), else nobody may",
    )
    group.add_argument(
        "--allowed-origins",
        nargs="+",
        metavar="ORIGIN",
        help="pages that browsers let in (CORS), as in https://chat.example; * is any; default: none",
    )
    group.add_argument("--allowed-methods", nargs="+", metavar="METHOD", help="of their requests; default: any")
    group.add_argument("--allowed-headers", nargs="+", metavar="HEADER", help="of their requests; default: any")
    group.add_argument(
        "--allow-credentials", action="store_true", help="browsers may send stored passwords along, and cookies"
    )
    group.add_argument(
        "--max-body-bytes",
        type=human_int,
        metavar="N",
        help="of a request; more is a 413; default: 128 per token of the model's context, at least a megabyte",
    )
    group.add_argument(
        "--request-body-timeout",
        type=seconds,
        default=BODY_TIMEOUT_S,
        metavar="SECONDS",
        help="a body that takes longer to come in is a 408",
    )


def _add_log_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("logs")
    group.add_argument("--log-format", choices=FORMATS, default="text", help="of the lines on standard error")
    group.add_argument("--log-level", choices=LEVELS, help="default: AMOE_LOGGING_LEVEL of the environment, else info")
    group.add_argument(
        "--disable-access-log",
        "--disable-uvicorn-access-log",
        action="store_true",
        help="no line at the end of each request",
    )
    group.add_argument(
        "--enable-log-requests",
        action="store_true",
        help="a line with the parameters when a request is admitted; no prompts but for --max-log-len",
    )
    group.add_argument(
        "--max-log-len", type=int, default=0, metavar="N", help="of --enable-log-requests: characters of each prompt"
    )
    group.add_argument(
        "--disable-log-stats", action="store_true", help="no status line every ten seconds while there is traffic"
    )
    group.add_argument("--uvicorn-log-level", choices=UVICORN_LEVELS, default="warning", help="of the web server")
    group.add_argument(
        "--otlp-traces-endpoint",
        metavar="URL",
        help="OpenTelemetry: a span per request goes to this OTLP/HTTP collector, as in http://host:4318/v1/traces",
    )


def _values(flag: str, values: Sequence[str]) -> tuple[str, ...]:
    """What the words after a flag mean: themselves, or one JSON list, as in vLLM."""
    if len(values) == 1 and values[0].lstrip().startswith("["):
        try:
            listed = json.loads(values[0])
        except json.JSONDecodeError as error:
            raise ConfigError(f"{flag}: not a JSON list: {error}") from error
        if not all(isinstance(item, str) for item in listed):
            raise ConfigError(f"{flag}: a JSON list of strings is needed")
        return tuple(listed)
    return tuple(values)


def _key_digests(
    given: Sequence[str] | None, flag: str, environment: Mapping[str, str], variable: str
) -> tuple[bytes, ...]:
    """Of the keys after `flag`, else of those in `variable`, with commas between them."""
    if given:
        return digest_keys(tuple(given), flag)
    listed = environment.get(variable, "")
    return digest_keys(tuple(key.strip() for key in listed.split(",")), variable) if listed else ()


def server_options(
    args: argparse.Namespace, model_names: tuple[str, ...], environment: Mapping[str, str]
) -> ServerOptions:
    """The options that the flags and the environment describe.

    Raises:
        ConfigError: naming the flag that cannot work.
    """
    if args.max_log_len and not args.enable_log_requests:
        raise ConfigError("--max-log-len does nothing without --enable-log-requests")
    http = HttpOptions(
        key_digests=_key_digests(args.api_key, "--api-key", environment, "AMOE_API_KEY"),
        admin_digests=_key_digests(args.admin_key, "--admin-key", environment, "AMOE_ADMIN_KEY"),
        cors=CorsOptions(
            origins=_values("--allowed-origins", args.allowed_origins or ()),
            methods=_values("--allowed-methods", args.allowed_methods or ("*",)),
            headers=_values("--allowed-headers", args.allowed_headers or ("*",)),
            credentials=args.allow_credentials,
        ),
        max_body_bytes=args.max_body_bytes,
        body_timeout_s=args.request_body_timeout,
        access_log=not args.disable_access_log,
        log_requests=args.enable_log_requests,
        max_log_len=args.max_log_len,
    )
    return ServerOptions(
        host=args.host,
        port=args.port,
        uds=args.uds,
        ssl_certfile=args.ssl_certfile,
        ssl_keyfile=args.ssl_keyfile,
        model_names=model_names,
        shutdown_timeout_s=args.shutdown_timeout,
        stall_timeout_s=args.stall_timeout,
        heartbeat_timeout_s=args.heartbeat_timeout,
        web_log_level=args.uvicorn_log_level,
        log_stats=not args.disable_log_stats,
        api_server_count=args.api_server_count,
        otlp_traces_endpoint=args.otlp_traces_endpoint,
        http=http,
    )


def log_options(args: argparse.Namespace, environment: Mapping[str, str]) -> LogOptions:
    """How to log.

    Raises:
        ConfigError: AMOE_LOGGING_LEVEL is no level.
    """
    return LogOptions(
        format=cast(LogFormat, args.log_format),
        level=args.log_level or level_from_environment(environment) or "info",
        config_path=environment.get("AMOE_LOGGING_CONFIG_PATH") or None,
    )
