"""A server without a web server of its own: the engine, its workers and the application, for whoever has a socket and
speaks ASGI, such as Ray Serve."""

from __future__ import annotations

import asyncio
import contextlib

from fastapi import FastAPI

from amoe.cluster.front import serving
from amoe.cluster.opening import open_cluster, told_metrics
from amoe.config import EngineConfig
from amoe.engine.async_engine import AsyncEngine
from amoe.engine.tokenizer import Tokenizer
from amoe.errors import EngineDeadError
from amoe.server.app import create_app
from amoe.server.context import ServerContext
from amoe.server.grammar_check import GrammarProcess
from amoe.server.options import ServerOptions
from amoe.server.run import check_model_directory
from amoe.server.sampling import SamplingDefaults
from amoe.server.status_line import log_status
from amoe.server.tracing import Tracer, check_tracing


class EmbeddedServer:
    """Make it with `start`, in the event loop that will run `app`; end it with `close`.

    Attributes:
        app: the application.
        engine: what it serves.
    """

    def __init__(
        self, app: FastAPI, engine: AsyncEngine, context: ServerContext, stack: contextlib.AsyncExitStack
    ) -> None:
        self.app = app
        self.engine = engine
        self._context = context
        self._stack = stack

    @classmethod
    async def start(cls, config: EngineConfig, options: ServerOptions) -> EmbeddedServer:
        """Start the workers, and wait until they are ready.

        Raises:
            AmoeError: the server cannot start; the message is for the user.
        """
        check_model_directory(config.model)
        if options.otlp_traces_endpoint is not None:
            check_tracing(options.otlp_traces_endpoint)
        tokenizer = Tokenizer(config.model, options.chat.chat_template)
        defaults = SamplingDefaults.from_checkpoint(config.model)
        async with contextlib.AsyncExitStack() as stack:
            front = await stack.enter_async_context(
                serving(
                    await open_cluster(config, options.executor),
                    name=options.model_names[0],
                    tokenizer=tokenizer,
                    heartbeat_timeout_s=options.heartbeat_timeout_s,
                    stall_timeout_s=options.stall_timeout_s,
                )
            )
            tracer = None
            if options.otlp_traces_endpoint is not None:
                tracer = Tracer(options.otlp_traces_endpoint)
                stack.push_async_callback(asyncio.to_thread, tracer.close)
            context = ServerContext(
                engine=front.engine,
                model_names=options.model_names,
                defaults=defaults,
                check_grammar=await stack.enter_async_context(GrammarProcess()),
                chat=options.chat,
                admin=front.desk,
            )
            collect = front.engine.metrics.registry.collect
            await stack.enter_async_context(told_metrics(options.executor, collect))
            if options.log_stats:
                status = asyncio.create_task(log_status(front.engine))
                stack.callback(status.cancel)
            app = create_app(context, options.http, [] if tracer is None else [tracer])
            return cls(app, front.engine, context, stack.pop_all())

    def check_health(self) -> None:
        """What `/health` says.

        Raises:
            EngineDeadError: nothing can be served.
        """
        if not self.engine.healthy:
            raise EngineDeadError(self.engine.complaint)

    async def drain(self, timeout_s: float) -> None:
        """Take nothing new, and let what is open come to its end, in the background too."""
        self.engine.refuse_new()
        open_work = asyncio.gather(self.engine.drain(), *self._context.background, return_exceptions=True)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(open_work, timeout_s)

    async def close(self) -> None:
        """Stop the workers; what is still open ends with an error. Idempotent."""
        await self._stack.aclose()
