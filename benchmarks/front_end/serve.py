"""The servers that are compared, each in a process of its own, over the same instant worker.

    python -m benchmarks.front_end.serve KIND PORT

*amoe*: the server itself. *pydantic*: how vLLM's server is laid out, as published: a queue per request between the
output loop and an async generator, a pydantic object per chunk, starlette's StreamingResponse. *echo*: the least that a
FastAPI server can do for a token: the same queue and response, with a chunk that is one f-string.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import uvicorn
import uvloop
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

from amoe.builtin import builtin_model_path
from amoe.cluster.front import connect
from amoe.cluster.local import LocalCluster
from amoe.config import EngineConfig, SchedulerConfig
from amoe.engine.messages import AddRequest, Outputs
from amoe.engine.tokenizer import Tokenizer
from amoe.server.app import create_app
from amoe.server.context import ServerContext
from amoe.types import SamplingParams, SequenceOutput

MODEL = "bench"
MAX_NUM_SEQS = 1024


class Choice(BaseModel):
    """As in OpenAI's stream of completions."""

    index: int
    text: str
    logprobs: dict[str, Any] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


class Chunk(BaseModel):
    """One event."""

    id: str
    object: str = "text_completion"
    created: int
    model: str
    choices: list[Choice]


class Plain:
    """A FastAPI server without admission, stop strings, usage or metrics."""

    def __init__(self, cluster: LocalCluster, tokenizer: Tokenizer, with_pydantic: bool) -> None:
        self._channel = cluster.channels[0]
        self._tokenizer = tokenizer
        self._with_pydantic = with_pydantic
        self._queues: dict[int, asyncio.Queue[SequenceOutput]] = {}

    async def listen(self) -> None:
        """Give every output to its request."""
        async for message in self._channel:
            if isinstance(message, Outputs):
                for output in message.outputs:
                    self._queues[output.request_id].put_nowait(output)

    async def stream(self, prompt: list[int], max_tokens: int) -> AsyncIterator[str]:
        """The events of one request."""
        request_id = len(self._queues)
        queue = self._queues[request_id] = asyncio.Queue()
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        detokenizer = self._tokenizer.detokenizer(params)
        self._channel.send(AddRequest(request_id, prompt, params))
        created, done = int(time.time()), False
        while not done:
            output = await queue.get()
            done = output.finish_reason is not None
            text = detokenizer.push(output.token_ids[0])
            if self._with_pydantic:
                choice = Choice(index=0, text=text, finish_reason=output.finish_reason)
                chunk = Chunk(id=f"cmpl-{request_id}", created=created, model=MODEL, choices=[choice])
                yield f"data: {chunk.model_dump_json(exclude_unset=False)}\n\n"
            else:
                yield f'data: {{"choices":[{{"index":0,"text":{json.dumps(text)}}}]}}\n\n'
        yield "data: [DONE]\n\n"

    def app(self) -> FastAPI:
        """The application."""
        app = FastAPI()

        @app.post("/v1/completions")
        async def create(request: Request) -> StreamingResponse:
            body = await request.json()
            return StreamingResponse(self.stream(body["prompt"], body["max_tokens"]), media_type="text/event-stream")

        return app


async def serve(kind: str, port: int) -> None:
    """Serve until killed."""
    config = EngineConfig(
        model=str(builtin_model_path()), scheduler=SchedulerConfig(max_num_seqs=MAX_NUM_SEQS), max_waiting=MAX_NUM_SEQS
    )
    cluster = LocalCluster(config, entry="benchmarks.front_end.instant_worker:build_worker", ring_bytes=1 << 16)
    ready = await cluster.start()
    tokenizer = Tokenizer(config.model)
    listening: asyncio.Task[None] | None = None
    try:
        if kind.startswith("amoe"):
            engine = connect(cluster, ready, name=MODEL, tokenizer=tokenizer).engine
            app = create_app(ServerContext(engine=engine, model_names=(MODEL,)))
        else:
            plain = Plain(cluster, tokenizer, with_pydantic=kind == "pydantic")
            app = plain.app()
            listening = asyncio.create_task(plain.listen())
        server = uvicorn.Server(
            uvicorn.Config(app, port=port, http="httptools", access_log=False, log_level="warning", lifespan="off")
        )
        await server.serve()
    finally:
        if listening is not None:
            listening.cancel()
        await cluster.stop(1.0)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        uvloop.run(serve(sys.argv[1], int(sys.argv[2])))
