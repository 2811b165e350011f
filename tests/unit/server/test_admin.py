"""The admin API: who may use it, what it refuses, and that what has begun goes on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from amoe.cluster.admin import ClusterStatus, WorkerStatus
from amoe.cluster.admin_desk import LocalDesk
from amoe.errors import ConfigError, EngineDeadError, UnfinishedError
from amoe.server.app import create_app
from amoe.server.context import ServerContext
from amoe.server.options import HttpOptions, digest_keys
from tests.unit.server.conftest import Harness, assert_error

ADMIN = {"authorization": "Bearer boss"}
OPTIONS = HttpOptions(key_digests=digest_keys(("user",), "test"), admin_digests=digest_keys(("boss", "chief"), "test"))


@dataclass
class FakeCluster:
    """Does what it is told, one thing at a time, as soon as `runs` is set.

    Attributes:
        failure: what every action ends with, if anything.
        done: the actions that have ended well.
    """

    count: int = 2
    most: int = 4
    failure: Exception | None = None
    action: str = ""
    done: list[tuple[Any, ...]] = field(default_factory=list)
    runs: asyncio.Event = field(default_factory=asyncio.Event)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    def status(self) -> ClusterStatus:
        workers = [WorkerStatus(rank=0, title="attention 0", role="attention", state="serving")]
        for index in range(self.count):
            reason = "expert 0 (pid 7) was killed by SIGKILL" if index == 0 else ""
            workers.append(
                WorkerStatus(rank=1 + index, title=f"expert {index}", role="experts", state="serving", reason=reason)
            )
        return ClusterStatus(
            version=5,
            workers=workers,
            num_expert_workers=self.count,
            max_expert_workers=self.most,
            num_layers=3,
            num_experts=8,
            num_replicas=1,
            action=self.action,
        )

    async def _act(self, *what: Any) -> ClusterStatus:
        async with self.lock:
            self.action = f"{what[0]} is under way"
            await self.runs.wait()
            self.action = ""
            if self.failure is not None:
                raise self.failure
            self.done.append(what)
            return self.status()

    async def scale_experts(self, count: int) -> ClusterStatus:
        status = await self._act("scale", count)
        self.count = count
        return status

    async def replicate(self, layer: int, expert: int, count: int) -> ClusterStatus:
        return await self._act("replicate", layer, expert, count)

    async def rebalance(self) -> ClusterStatus:
        return await self._act("rebalance")


@pytest.fixture
def cluster() -> FakeCluster:
    cluster = FakeCluster()
    cluster.runs.set()
    return cluster


def client_of(
    server: Harness, cluster: FakeCluster | None, options: HttpOptions = OPTIONS, root_path: str = ""
) -> httpx.AsyncClient:
    desk = None if cluster is None else LocalDesk(cluster)
    context = ServerContext(engine=server.engine, model_names=("fake",), admin=desk)
    transport = httpx.ASGITransport(create_app(context, options), raise_app_exceptions=False, root_path=root_path)
    return httpx.AsyncClient(transport=transport, base_url="http://test", headers=ADMIN)


@pytest.fixture
async def http(server: Harness, cluster: FakeCluster) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(server, cluster) as http:
        yield http


async def ended(http: httpx.AsyncClient) -> dict[str, Any]:
    """The cluster, once its first action has come to its end."""
    while (body := (await http.get("/admin/cluster")).json())["actions"][0]["state"] == "running":  # noqa: ASYNC110
        await asyncio.sleep(0)
    return body


POSTS = {
    "/admin/scale": {"expert_workers": 3},
    "/admin/replicas": {"layer": 0, "expert": 5, "count": 2},
    "/admin/rebalance": {},
}


class TestKeys:
    @pytest.mark.parametrize("headers", [ADMIN, {"x-api-key": "chief"}, {"authorization": "bearer chief"}])
    async def test_admin_keys_open_it(self, server: Harness, cluster: FakeCluster, headers: dict[str, str]):
        async with client_of(server, cluster) as http:
            http.headers.pop("authorization")
            assert (await http.get("/admin/cluster", headers=headers)).status_code == 200

    @pytest.mark.parametrize(
        "headers",
        [{}, {"authorization": "Bearer user"}, {"authorization": "Bearer "}, {"authorization": "Basic YTpib3Nz"}],
        ids=["none", "an API key", "empty", "a browser's password"],
    )
    async def test_nothing_else_does(self, server: Harness, cluster: FakeCluster, headers: dict[str, str]):
        async with client_of(server, cluster) as http:
            http.headers.pop("authorization")
            assert_error(await http.get("/admin/cluster", headers=headers), 401)
            for path, body in POSTS.items():
                assert_error(await http.post(path, json=body, headers=headers), 401)
        assert cluster.done == []

    async def test_an_admin_key_is_no_api_key(self, http: httpx.AsyncClient):
        assert_error(await http.get("/v1/models"), 401)

    @pytest.mark.parametrize("headers", [{}, ADMIN, {"authorization": "Bearer user"}])
    async def test_without_admin_keys_it_is_off(self, server: Harness, cluster: FakeCluster, headers: dict[str, str]):
        async with client_of(server, cluster, HttpOptions()) as http:
            http.headers.pop("authorization")
            message = assert_error(await http.post("/admin/rebalance", headers=headers), 403)
            assert "--admin-key" in message and "AMOE_ADMIN_KEY" in message
        assert cluster.done == []

    async def test_a_prefix_opens_no_way_around_the_keys(self, server: Harness, cluster: FakeCluster):
        """Ray Serve mounts the application at its `route_prefix`."""
        async with client_of(server, cluster, root_path="/models/a") as http:
            strangers = {"authorization": "Bearer user"}
            for path, body in POSTS.items():
                assert_error(await http.post(f"/models/a{path}", json=body, headers=strangers), 401)
            assert cluster.done == []
            assert (await http.get("/models/a/admin/cluster")).status_code == 200
            assert (await http.get("/models/a/health", headers={"authorization": ""})).status_code == 200
            error = (await http.post("/models/a/v1/messages", json={}, headers=strangers)).json()
            assert error["type"] == "error"  # in Anthropic's shape there, too

    async def test_a_route_that_is_not_there_tells_strangers_nothing(self, http: httpx.AsyncClient):
        http.headers.pop("authorization")
        assert_error(await http.get("/admin/nothing"), 401)
        assert_error(await http.get("/admin/nothing", headers=ADMIN), 404)
        assert_error(await http.get("/admin/scale", headers=ADMIN), 405)

    def test_an_api_key_cannot_be_an_admin_key(self):
        with pytest.raises(ConfigError, match="choose another one"):
            HttpOptions(key_digests=digest_keys(("a", "b"), "x"), admin_digests=digest_keys(("b",), "y"))

    async def test_it_is_not_in_the_schema_for_users(self, server: Harness, cluster: FakeCluster):
        async with client_of(server, cluster, HttpOptions()) as http:
            assert not [path for path in (await http.get("/openapi.json")).json()["paths"] if "admin" in path]


class TestActions:
    async def test_the_cluster(self, http: httpx.AsyncClient):
        body = (await http.get("/admin/cluster")).json()
        assert body["version"] == 5
        assert (body["num_expert_workers"], body["max_expert_workers"]) == (2, 4)
        assert (body["num_layers"], body["num_experts"], body["num_replicas"], body["missing"]) == (3, 8, 1, 0)
        assert [(w["rank"], w["role"], w["state"]) for w in body["workers"]] == [
            (0, "attention", "serving"),
            (1, "experts", "serving"),
            (2, "experts", "serving"),
        ]
        assert "SIGKILL" in body["workers"][1]["reason"]
        assert body["actions"] == [] and "action_id" not in body

    async def test_each_action_is_done_when_it_answers(self, http: httpx.AsyncClient, cluster: FakeCluster):
        for path, body in POSTS.items():
            response = await http.post(path, json=body)
            assert response.status_code == 200, response.text
        assert (await http.post("/admin/rebalance")).status_code == 200, "there is nothing to say in a body"
        assert cluster.done == [("scale", 3), ("replicate", 0, 5, 2), ("rebalance",), ("rebalance",)]
        body = (await http.get("/admin/cluster")).json()
        assert body["num_expert_workers"] == 3
        assert [(action["id"], action["state"], action["error"]) for action in body["actions"]] == [
            (number, "done", "") for number in (1, 2, 3, 4)
        ]
        assert body["actions"][0]["action"] == "scale to 3 expert workers"

    async def test_who_does_not_wait_can_ask_how_it_goes(self, http: httpx.AsyncClient, cluster: FakeCluster):
        cluster.runs.clear()
        begun = await http.post("/admin/scale?wait=false", json={"expert_workers": 1})
        assert begun.status_code == 202
        assert begun.json()["action_id"] == 1
        await asyncio.sleep(0)
        body = (await http.get("/admin/cluster")).json()
        assert (body["actions"][0]["state"], body["action"]) == ("running", "scale is under way")
        cluster.runs.set()
        body = await ended(http)
        assert body["actions"][0]["state"] == "done" and body["num_expert_workers"] == 1

    async def test_one_that_fails_says_why(self, http: httpx.AsyncClient, cluster: FakeCluster):
        cluster.failure = ConfigError("expert 2 could not start: no room")
        assert "no room" in assert_error(await http.post("/admin/scale", json={"expert_workers": 3}), 409)
        (action,) = (await http.get("/admin/cluster")).json()["actions"]
        assert (action["state"], action["error"]) == ("refused", "expert 2 could not start: no room")

    async def test_one_that_came_to_half_has_failed(self, http: httpx.AsyncClient, cluster: FakeCluster):
        cluster.failure = UnfinishedError("expert 3 could not be started; 3 of 4 expert workers serve; ask again")
        assert "3 of 4" in assert_error(await http.post("/admin/scale", json={"expert_workers": 4}), 500)
        (action,) = (await http.get("/admin/cluster")).json()["actions"]
        assert (action["state"], action["error"]) == ("failed", str(cluster.failure))

    async def test_a_server_that_is_dead_says_so(self, http: httpx.AsyncClient, cluster: FakeCluster):
        cluster.failure = EngineDeadError("worker 0 has gone")
        assert_error(await http.post("/admin/rebalance"), 503)

    async def test_a_fault_of_the_server_is_not_told_in_detail(self, http: httpx.AsyncClient, cluster: FakeCluster):
        cluster.failure = RuntimeError("secret")
        assert "secret" not in assert_error(await http.post("/admin/rebalance"), 500)
        (action,) = (await http.get("/admin/cluster")).json()["actions"]
        assert action["state"] == "failed" and "secret" not in action["error"]

    async def test_it_goes_on_when_its_client_has_gone(self, http: httpx.AsyncClient, cluster: FakeCluster):
        cluster.runs.clear()
        request = asyncio.create_task(http.post("/admin/scale", json={"expert_workers": 4}))
        while not cluster.action:  # noqa: ASYNC110 - nothing else is to be done
            await asyncio.sleep(0)
        request.cancel()
        await asyncio.gather(request, return_exceptions=True)
        cluster.runs.set()
        await ended(http)
        assert cluster.done == [("scale", 4)]

    async def test_metrics_tell_of_the_cluster(self, http: httpx.AsyncClient):
        text = (await http.get("/metrics")).text
        assert 'amoe:worker_state{role="experts",state="serving",worker="2"} 1.0' in text
        assert 'amoe:expert_workers_max{model_name="fake"} 4.0' in text


class TestMistakes:
    @pytest.mark.parametrize(
        ("path", "body", "param"),
        [
            ("/admin/scale", {}, "expert_workers"),
            ("/admin/scale", {"expert_workers": 0}, "expert_workers"),
            ("/admin/scale", {"expert_workers": -1}, "expert_workers"),
            ("/admin/scale", {"expert_workers": True}, "expert_workers"),
            ("/admin/scale", {"expert_workers": "3"}, "expert_workers"),
            ("/admin/scale", {"expert_workers": 2.5}, "expert_workers"),
            ("/admin/scale", {"expert_workers": 5}, "expert_workers"),
            ("/admin/scale", {"expert_workers": 10**30}, "expert_workers"),
            ("/admin/scale", {"expert_workers": 3, "attention_workers": 2}, "attention_workers"),
            ("/admin/replicas", {"layer": 0, "expert": 5}, "count"),
            ("/admin/replicas", {"layer": 3, "expert": 5, "count": 2}, "layer"),
            ("/admin/replicas", {"layer": -1, "expert": 5, "count": 2}, "layer"),
            ("/admin/replicas", {"layer": 0, "expert": 8, "count": 2}, "expert"),
            ("/admin/replicas", {"layer": 0, "expert": 5, "count": 0}, "count"),
            ("/admin/rebalance", {"now": True}, "now"),
            ("/admin/scale?wait=perhaps", {"expert_workers": 3}, "wait"),
        ],
    )
    async def test_they_name_the_field(
        self, http: httpx.AsyncClient, cluster: FakeCluster, path: str, body: dict[str, Any], param: str
    ):
        response = await http.post(path, json=body)
        assert param in assert_error(response, 400, response.json()["error"]["param"])
        assert response.json()["error"]["param"].endswith(param)
        assert cluster.done == []

    @pytest.mark.parametrize("body", [b"", b"{", b"[]", b"3", b"null", b"\xff"])
    async def test_a_body_that_is_none(self, http: httpx.AsyncClient, body: bytes):
        headers = {"content-type": "application/json"}
        assert_error(await http.post("/admin/scale", content=body, headers=headers), 400)

    async def test_a_server_without_expert_workers(self, server: Harness):
        async with client_of(server, FakeCluster(count=0)) as http:
            assert "--expert-workers" in assert_error(await http.post("/admin/scale", json={"expert_workers": 1}), 409)

    async def test_a_server_whose_workers_stay_as_they_are(self, server: Harness):
        async with client_of(server, None) as http:
            assert "lockstep" in assert_error(await http.get("/admin/cluster"), 409)
            for path, body in POSTS.items():
                assert_error(await http.post(path, json=body), 409)
            assert (await http.get("/metrics", headers=ADMIN)).status_code == 200
