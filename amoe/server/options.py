"""How the engine is served: frozen, validated at construction. Every wrong value is a `ConfigError`."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from amoe.cluster.executor import ExecutorOptions
from amoe.engine.watchdog import HEARTBEAT_TIMEOUT_S, STALL_TIMEOUT_S
from amoe.errors import ConfigError
from amoe.server.chat_options import ChatOptions

LEAST_BODY_BYTES = 1024 * 1024
BODY_BYTES_PER_TOKEN = 128  # a token has some 4 characters; JSON, tools and log-probabilities' ids take more
BODY_TIMEOUT_S = 60.0


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ConfigError(message)


@dataclass(frozen=True, kw_only=True, slots=True)
class CorsOptions:
    """Which pages of other origins a browser may let in. No origin: none.

    Attributes:
        origins: as in `https://chat.example`; `*` is any.
        methods, headers: of their requests; `*` is any.
        credentials: whether the browser may send cookies and stored passwords along.
    """

    origins: tuple[str, ...] = ()
    methods: tuple[str, ...] = ("*",)
    headers: tuple[str, ...] = ("*",)
    credentials: bool = False

    def __post_init__(self) -> None:
        _require(
            not (self.credentials and "*" in self.origins),
            "--allow-credentials with --allowed-origins '*' would lend every page the passwords that the browser has "
            "stored for this server: name the origins",
        )
        for origin in self.origins:
            is_origin = origin == "*" or (origin.count("/") == 2 and "://" in origin)
            _require(is_origin, f"--allowed-origins: {origin!r} is not an origin such as https://chat.example, or *")


@dataclass(frozen=True, kw_only=True, slots=True)
class HttpOptions:
    """What stands between the network and the routes.

    Attributes:
        key_digests: SHA-256 of each API key; empty: everybody may come in. The keys themselves are kept nowhere.
        admin_digests: SHA-256 of each admin key; empty: the admin API is off.
        max_body_bytes: a larger body is refused; None: one that is larger than the model's context can be.
        body_timeout_s: so long may a body take to come in.
        access_log: a line per request.
        log_requests: a line when a request is admitted, with its parameters.
        max_log_len: characters of each prompt in that line.
    """

    key_digests: tuple[bytes, ...] = field(default=(), repr=False)
    admin_digests: tuple[bytes, ...] = field(default=(), repr=False)
    cors: CorsOptions = field(default_factory=CorsOptions)
    max_body_bytes: int | None = None
    body_timeout_s: float = BODY_TIMEOUT_S
    access_log: bool = True
    log_requests: bool = False
    max_log_len: int = 0

    def __post_init__(self) -> None:
        _require(self.max_body_bytes is None or self.max_body_bytes >= 1, "--max-body-bytes must be at least 1")
        _require(self.body_timeout_s > 0, "--request-body-timeout must be greater than 0")
        _require(self.max_log_len >= 0, "--max-log-len must be at least 0")
        _require(
            not set(self.key_digests) & set(self.admin_digests),
            "--admin-key: an API key is an admin key too: who may ask may not change the cluster; choose another one",
        )

    def body_limit(self, max_model_len: int) -> int:
        """Bytes of a body at most. Reading one holds the event loop for up to a third of a second per megabyte, so that
        nobody gets to send more than the model can take."""
        if self.max_body_bytes is not None:
            return self.max_body_bytes
        return max(LEAST_BODY_BYTES, BODY_BYTES_PER_TOKEN * max_model_len)


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerOptions:
    """How the engine is served.

    Attributes:
        host, port: where to listen; port 0 takes a free one.
        uds: path of a Unix socket to listen on instead.
        ssl_certfile, ssl_keyfile: PEM files; None: plain HTTP.
        model_names: served names, at least one.
        shutdown_timeout_s: how long open requests may go on after SIGTERM.
        stall_timeout_s, heartbeat_timeout_s: see `amoe.engine.watchdog`.
        web_log_level: of the web server's own messages.
        log_stats: a status line every ten seconds.
        api_server_count: processes that answer HTTP.
        otlp_traces_endpoint: where to send a span per request; None: nowhere.
        executor: where the workers run.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    uds: str | None = None
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None
    model_names: tuple[str, ...]
    shutdown_timeout_s: float = 30.0
    stall_timeout_s: float = STALL_TIMEOUT_S
    heartbeat_timeout_s: float = HEARTBEAT_TIMEOUT_S
    web_log_level: str = "warning"
    log_stats: bool = True
    api_server_count: int = 1
    otlp_traces_endpoint: str | None = None
    http: HttpOptions = field(default_factory=HttpOptions)
    chat: ChatOptions = field(default_factory=ChatOptions)
    executor: ExecutorOptions = field(default_factory=ExecutorOptions)

    def __post_init__(self) -> None:
        _require(bool(self.model_names), "--served-model-name needs a name")
        _require(self.ssl_keyfile is None or self.ssl_certfile is not None, "--ssl-keyfile needs --ssl-certfile")
        _require(1 <= self.api_server_count <= 64, "--api-server-count must be between 1 and 64")
        _require(self.stall_timeout_s >= 2.0, "--stall-timeout must be at least 2: workers speak twice a second")
        _require(
            self.heartbeat_timeout_s >= self.stall_timeout_s, "--heartbeat-timeout must be at least --stall-timeout"
        )


def digest_keys(keys: tuple[str, ...], source: str) -> tuple[bytes, ...]:
    """What `HttpOptions` keeps of API keys.

    Raises:
        ConfigError: one cannot be sent in a header; the message names `source`, not the key.
    """
    for key in keys:
        _require(bool(key), f"{source}: an API key is empty")
        _require(key.isprintable() and " " not in key, f"{source}: an API key holds a space or a control character")
    return tuple(hashlib.sha256(key.encode()).digest() for key in keys)
