"""What the HTTP server counts of requests: by route, never by what a client has made up."""

from __future__ import annotations

from tests.unit.server.conftest import Harness


def value(server: Harness, name: str, **labels: str) -> float | None:
    return server.engine.metrics.registry.get_sample_value(name, labels)


async def test_requests_are_counted_by_the_template_of_their_route(server: Harness):
    assert (await server.complete(prompt="a", max_tokens=2)).status_code == 200
    assert (await server.complete(prompt="a", max_tokens=-1)).status_code == 400
    assert (await server.http.get("/v1/models/no-such-model")).status_code == 404
    assert (await server.http.get("/no/such/path")).status_code == 404
    route = {"handler": "/v1/completions", "method": "POST"}
    assert value(server, "http_requests_total", **route, status="2xx") == 1
    assert value(server, "http_requests_total", **route, status="4xx") == 1
    assert value(server, "http_request_duration_seconds_count", **route) == 2
    lost = {"method": "GET", "status": "4xx"}
    assert value(server, "http_requests_total", handler="/v1/models/{name:path}", **lost) == 1
    assert value(server, "http_requests_total", handler="none", **lost) == 1
    assert "no-such-model" not in server.engine.metrics.render().decode()
    assert value(server, "amoe:http_requests_open") == 0


async def test_choices_of_one_prompt_are_one_request(server: Harness):
    labels = {"model_name": "fake", "engine": "0"}
    response = await server.complete(prompt=["a", "b"], n=3, max_tokens=4)
    assert response.status_code == 200
    assert value(server, "amoe:request_params_n_count", **labels) == 2
    assert value(server, "amoe:request_params_n_sum", **labels) == 6
    longest = value(server, "amoe:request_max_num_generation_tokens_sum", **labels)
    assert longest is not None
    assert 2 <= longest <= 8


async def test_a_refused_request_starts_no_choices(server: Harness):
    assert (await server.complete(prompt=[], max_tokens=2)).status_code == 400
    assert value(server, "amoe:request_params_n_count", model_name="fake", engine="0") == 0
