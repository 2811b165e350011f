"""uvicorn, and the socket that it listens on."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import uvicorn
from fastapi import FastAPI

from amoe.errors import ConfigError
from amoe.server.http_protocol import LimitedHttpProtocol
from amoe.server.options import ServerOptions

FLUSH_GRACE_S = 10.0  # for clients to read their last bytes, before uvicorn cuts them off
CONNECTION_BACKLOG = 2048


class WebServer(uvicorn.Server):
    """uvicorn, told from outside when to leave, and telling when it listens."""

    def __init__(self, app: FastAPI, options: ServerOptions) -> None:
        config = uvicorn.Config(
            app,
            http=LimitedHttpProtocol,
            ws="none",
            log_config=None,  # `amoe.logs` has the handlers
            log_level=options.web_log_level,
            access_log=False,  # ours tells more
            lifespan="off",
            server_header=False,
            ssl_certfile=options.ssl_certfile,
            ssl_keyfile=options.ssl_keyfile,
            timeout_graceful_shutdown=round(options.shutdown_timeout_s + FLUSH_GRACE_S),
            backlog=CONNECTION_BACKLOG,
        )
        _load(config, options)
        super().__init__(config)
        self.listening = asyncio.Event()

    @property
    def num_connections(self) -> int:
        """Open connections, idle ones included."""
        return len(self.server_state.connections)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals alone: `ShutdownSignals` has them."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say so."""
        await super().startup(sockets=sockets)
        self.listening.set()


def _load(config: uvicorn.Config, options: ServerOptions) -> None:
    """Read the certificate now, to complain in the user's words."""
    try:
        config.load()
    except OSError as error:
        files = " and ".join(filter(None, (options.ssl_certfile, options.ssl_keyfile)))
        raise ConfigError(f"--ssl-certfile, --ssl-keyfile: cannot use {files}: {error}") from error


def check_certificate(options: ServerOptions) -> None:
    """Before the model is loaded.

    Raises:
        ConfigError: a file of --ssl-certfile or --ssl-keyfile is not there.
    """
    for flag, path in (("--ssl-certfile", options.ssl_certfile), ("--ssl-keyfile", options.ssl_keyfile)):
        if path is not None and not Path(path).is_file():
            raise ConfigError(f"{flag} {path!r} is not a file")


@contextlib.contextmanager
def bound_socket(options: ServerOptions) -> Iterator[socket.socket]:
    """A bound socket, so that a taken port is found before the model is loaded. It refuses connections until used.

    Raises:
        ConfigError: if the address cannot be had.
    """
    if options.uds is None:
        with contextlib.closing(_bind(options.host, options.port)) as listener:
            yield listener
        return
    with contextlib.closing(_bind_path(options.uds)) as listener:
        try:
            yield listener
        finally:
            Path(options.uds).unlink(missing_ok=True)


def _bind(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"--host {host}: {getattr(error, 'strerror', None) or error}") from error
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen on {host} port {port}: {error.strerror}; choose another --port") from error
    return listener


def _bind_path(path: str) -> socket.socket:
    _remove_stale(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(path)
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen on --uds {path}: {error.strerror or error}") from error
    return listener


def _remove_stale(path: str) -> None:
    """Remove the socket of a server that is gone; leave anything else."""
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            raise ConfigError(f"cannot listen on --uds {path}: there is a file of that name")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            if probe.connect_ex(path) == errno.ECONNREFUSED:
                os.unlink(path)


def address_of(options: ServerOptions, port: int) -> tuple[str, str]:
    """Where the server is reached, for a person, and curl's arguments for that."""
    scheme = "http" if options.ssl_certfile is None else "https"
    if options.uds is not None:
        return f"unix:{options.uds}", f"--unix-socket {options.uds} {scheme}://localhost"
    host = "127.0.0.1" if options.host in ("0.0.0.0", "::") else options.host
    url = f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
    return url, url
