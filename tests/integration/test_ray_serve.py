"""amoe as an application of Ray Serve: what it answers, and what is left when a part of Serve is killed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import httpx
import pytest

from tests.ray_nodes import head_node
from tests.ray_serve import ServedByRay

pytestmark = pytest.mark.cluster

LONG = 500  # tokens: it goes on for seconds


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedByRay]:
    with pytest.MonkeyPatch.context() as patch:
        # Serve takes a proxy for dead that has not answered three such looks; by default every ten seconds.
        patch.setenv("RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S", "1")
        with (
            head_node(num_cpus=6) as cluster,
            contextlib.closing(ServedByRay(cluster, tmp_path_factory.mktemp("serve"))) as served,
        ):
            served.until_healthy()
            yield served


def test_an_application(served: ServedByRay) -> None:
    """It streams; it says what is wrong with a request, and who it is; a client that goes frees what it had."""
    chunks = list(served.stream())
    assert len(chunks) >= 12, "a chunk per token"
    whole = served.complete().json()
    assert whole["choices"][0]["text"] == "".join(chunks) and whole["model"] == "model"
    refused = httpx.post(f"{served.url}/v1/completions", json={"prompt": "a", "max_tokens": "x"}, timeout=60)
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "max_tokens"
    endless = served.stream(LONG)
    next(endless)
    served.until_idle(but=1)
    endless.close()
    served.until_idle()
    assert "amoe:generation_tokens_total" in httpx.get(f"{served.url}/metrics", timeout=60).text


def test_the_controller_is_killed(served: ServedByRay) -> None:
    """Nobody notices: open streams go on, new requests are answered; Ray starts it anew."""
    first = served.actors("ServeController")
    endless = served.stream(LONG)
    next(endless)
    served.kill("ServeController")
    assert served.complete().status_code == 200
    assert len([*endless]) >= LONG - 2
    served.until(lambda: served.actors("ServeController") - first, "there is another controller")
    assert served.complete().status_code == 200


def test_the_replica_is_killed(served: ServedByRay) -> None:
    """Its streams break, and its workers go with it; new requests wait for the next replica."""
    workers = served.actors("WorkerActor")
    assert len(workers) == 3
    endless = served.stream(LONG)
    next(endless)
    served.kill("ServeReplica")
    with pytest.raises(httpx.HTTPError):
        for _ in endless:
            pass
    assert served.complete().status_code == 200
    served.until(lambda: not workers & served.actors("WorkerActor"), "its workers are gone")


def test_the_proxy_is_killed(served: ServedByRay) -> None:
    """Its connections break; Serve starts another at the same port; what ran for them is freed."""
    first = served.actors("ProxyActor")
    endless = served.stream(LONG)
    next(endless)
    served.kill("ProxyActor")
    with pytest.raises(httpx.HTTPError):
        for _ in endless:
            pass
    served.until_healthy()
    assert not first & served.actors("ProxyActor")
    served.until_idle()
    assert served.complete().status_code == 200
