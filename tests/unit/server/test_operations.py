"""Models, health, metrics, defaults."""

from __future__ import annotations

import asyncio
import json
import re

import pytest
from prometheus_client.parser import text_string_to_metric_families

from amoe import __version__
from amoe.errors import CheckpointError
from amoe.server.sampling import SamplingDefaults
from tests.unit.server.conftest import Harness, assert_error


async def settle() -> None:
    """Let everything that can run, run."""
    for _ in range(10):
        await asyncio.sleep(0)


async def test_models(server: Harness):
    body = (await server.http.get("/v1/models")).json()
    assert body["object"] == "list"
    assert [card["id"] for card in body["data"]] == ["fake", "alias"]
    assert body["data"][0] == {
        "id": "fake",
        "object": "model",
        "created": 1,
        "owned_by": "amoe",
        "root": "fake",
        "parent": None,
        "max_model_len": 64,
    }
    assert (await server.http.get("/v1/models/alias")).json()["id"] == "alias"


async def test_health_version_ping(server: Harness):
    for path in ("/health", "/ping"):
        response = await server.http.get(path)
        assert (response.status_code, response.content) == (200, b"")
    assert (await server.http.get("/version")).json() == {"version": __version__}
    assert (await server.http.get("/openapi.json")).status_code == 200


async def test_health_is_false_while_a_worker_stalls(server: Harness):
    server.worker.stats.num_running = 1
    server.worker.beat()
    await settle()
    assert 'amoe:num_requests_running{engine="0",model_name="fake"} 1.0' in (await server.http.get("/metrics")).text
    server.engine._watchdog.advance(2e5)
    assert (await server.http.get("/health")).status_code == 503
    refused = await server.complete(prompt="ab", max_tokens=4)
    assert_error(refused, 503)
    assert int(refused.headers["retry-after"]) >= 1
    server.worker.stats.steps += 1
    server.worker.beat()
    await settle()
    assert (await server.http.get("/health")).status_code == 200
    assert (await server.complete(prompt="ab", max_tokens=4)).status_code == 200


async def test_metrics(server: Harness):
    await server.complete(prompt="ab", max_tokens=4)
    response = await server.http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    samples = {
        (sample.name, sample.labels.get("finished_reason")): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }
    assert samples["amoe:generation_tokens_total", None] == 4
    assert samples["amoe:request_success_total", "length"] == 1


class TestDefaults:
    @pytest.fixture
    def defaults(self) -> SamplingDefaults:
        return SamplingDefaults(temperature=0.6, top_p=0.95, top_k=20, min_p=0.01, repetition_penalty=1.1)

    async def test_fill_what_a_request_leaves_open(self, server: Harness):
        await server.complete(prompt="a", max_tokens=1)
        params = server.params
        assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.6, 0.95, 20, 0.01)
        assert params.repetition_penalty == 1.1
        zero = {"temperature": 0, "top_p": 1, "top_k": 0, "min_p": 0, "repetition_penalty": 1}
        await server.chat(max_tokens=1, **zero)
        params = server.params
        assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0, 1, 0, 0)
        assert params.repetition_penalty == 1


def test_defaults_of_a_checkpoint(tmp_path):
    assert SamplingDefaults.from_checkpoint(tmp_path) == SamplingDefaults()
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps({"temperature": 0.7, "top_k": None, "eos_token_id": 3, "do_sample": True}))
    defaults = SamplingDefaults.from_checkpoint(tmp_path)
    assert defaults == SamplingDefaults(temperature=0.7)
    assert defaults.changed() == {"temperature": 0.7}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"temperature": "hot"}, "temperature must be a number"),
        ({"top_k": 50.5}, "top_k must be a whole number"),
        ({"top_p": 1.5}, "top_p must be in"),
    ],
)
def test_defaults_that_would_fail_every_request_are_refused_at_start(tmp_path, content, message):
    (tmp_path / "generation_config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=f"generation_config.json: {message}"):
        SamplingDefaults.from_checkpoint(tmp_path)


async def test_docs_need_nothing_from_outside(server: Harness):
    page = await server.http.get("/docs")
    assert page.status_code == 200
    sources = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert len(sources) >= 3
    for source in sources:
        assert source.startswith("/docs/static/"), source
        assert (await server.http.get(source)).status_code == 200
