"""amoe as an application of Ray Serve: `import_path: amoe.cluster.ray_serve:build_app`.

`args` are the long flags of `amoe serve` by name, `model` the positional one; the values pass the very checks that
flags pass:

    applications:
      - name: amoe
        import_path: amoe.cluster.ray_serve:build_app
        args: {model: /models/olmoe, expert-workers: 2}

Each replica is a server of its own: an engine, and workers as actors beside it (or with `executor: local` as processes
of its node). Serve routes requests to it, asks for its health, and lets it finish what is open before it goes.

This module is an entry point, like the `amoe` command: it wires the layers and belongs to none of them, wherever its
file lies. That is what lets it import the server.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ray import serve

from amoe.cluster.executor import ExecutorOptions
from amoe.errors import ConfigError
from amoe.server.cli import settings_of, standalone_parser
from amoe.server.embedded import EmbeddedServer
from amoe.server.options import ServerOptions

SOURCE = "args"
# The proxy listens, with what `http_options` of the Serve configuration say.
NOT_HERE = ("api-server-count", "config", "host", "port", "ray-address", "ssl-certfile", "ssl-keyfile", "uds")
MAX_ONGOING_REQUESTS = 1024  # the engine's own queue refuses earlier, and says why
HEALTH_PERIOD_S, HEALTH_TIMEOUT_S = 5.0, 10.0
SHUTDOWN_TIMEOUT_S = 60.0


def check(args: Mapping[str, Any]) -> dict[str, Any]:
    """`args` as settings by flag name.

    Raises:
        ConfigError: a key or a value that cannot work.
    """
    settings = {"executor": "ray"} | {str(name).replace("_", "-"): value for name, value in args.items()}
    for name in NOT_HERE:
        if settings.get(name) is not None:
            raise ConfigError(f"{SOURCE}: {name} is Ray Serve's to say: see http_options and num_replicas there")
    settings_of(standalone_parser().parse_settings(settings, SOURCE), os.environ)
    return settings


def _executor(options: ServerOptions) -> ExecutorOptions:
    """Actors have the name of their replica: there may be several, and a new one before the last has gone."""
    if options.executor.name == "local":
        return options.executor
    context = serve.get_replica_context()
    name = f"{context.app_name}-{context.replica_tag}"
    return ExecutorOptions(
        name="ray",
        deployment="".join(char if char.isalnum() or char in "_.-" else "-" for char in name)[-128:],
        ray_pin_roles=options.executor.ray_pin_roles,
        ray_placement_timeout_s=options.executor.ray_placement_timeout_s,
    )


@serve.deployment(
    name="amoe",
    max_ongoing_requests=MAX_ONGOING_REQUESTS,
    health_check_period_s=HEALTH_PERIOD_S,
    health_check_timeout_s=HEALTH_TIMEOUT_S,
    graceful_shutdown_timeout_s=SHUTDOWN_TIMEOUT_S,
)
@serve.ingress()
class Replica:
    """One server behind Serve's proxy."""

    async def __init__(self, settings: dict[str, Any]) -> None:  # type: ignore[misc] # Serve awaits it
        config, options, _ = settings_of(standalone_parser().parse_settings(settings, SOURCE), os.environ)
        options = replace(options, executor=_executor(options))
        self._options = options
        self._server = await EmbeddedServer.start(config, options)

    def __serve_build_asgi_app__(self) -> Any:
        return self._server.app

    async def check_health(self) -> None:
        """Called by Serve, which starts a new replica where this raises time and again."""
        self._server.check_health()

    async def __del__(self) -> None:
        server = getattr(self, "_server", None)
        if server is not None:
            await server.drain(self._options.shutdown_timeout_s)
            await server.close()


def build_app(args: dict[str, Any]) -> serve.Application:
    """The application that `args` describe; see above.

    Raises:
        ConfigError: naming the key that cannot work.
    """
    deployment: serve.Deployment = Replica  # type: ignore[assignment] # Serve's decorators tell no type
    return deployment.bind(check(args))
