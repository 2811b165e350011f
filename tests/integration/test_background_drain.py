"""A server that is told to leave finishes what it makes in the background, and lets clients fetch it."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import httpx

from amoe.server.options import ServerOptions
from amoe.server.sampling import SamplingDefaults
from amoe.server.serving import serve_engine
from tests.fake_workers import make_engine, make_tokenizer


async def test_background_is_finished_and_fetched(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("amoe.server.serving.POLL_GRACE_S", 5.0)  # for slow machines
    engine, (worker,) = make_engine(make_tokenizer(tmp_path))
    requested, listening = asyncio.Event(), asyncio.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        options = ServerOptions(model_names=("fake",), shutdown_timeout_s=5.0)
        serving = asyncio.create_task(
            serve_engine(engine, options, SamplingDefaults(), listener, requested, listening.set)
        )
        await listening.wait()
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=60) as http:
            worker.runs.clear()
            body = {"input": "yo", "background": True, "max_output_tokens": 3}
            response = (await http.post("/v1/responses", json=body)).json()
            await worker.has_open(1)
            requested.set()
            while not engine.is_draining:  # noqa: ASYNC110 - there is no event for it
                await asyncio.sleep(0.01)
            url = f"/v1/responses/{response['id']}"
            assert (await http.get(url)).json()["status"] in ("queued", "in_progress")
            assert (await http.post("/v1/responses", json=body)).status_code == 503
            worker.runs.set()
            while (response := (await http.get(url)).json())["status"] in ("queued", "in_progress"):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            assert response["output"][0]["content"][0]["text"] == "u:y"
        assert await serving == 0
    worker.die()
