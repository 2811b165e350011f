"""`amoe scale`: what it asks of the admin API, what it shows, and how it ends."""

from __future__ import annotations

import io
import json
from dataclasses import asdict
from typing import Any

import httpx
import pytest
from rich.console import Console

from amoe import cli
from amoe.cluster.admin import ClusterStatus, WorkerStatus
from amoe.errors import AmoeError, ConfigError
from amoe.server import scale_client
from amoe.server.scale_cli import Order, order_of

URL = ("--url", "http://server:1")


class FakeAdmin:
    """An admin API that has done what it is asked after `turns` looks.

    Attributes:
        failure: why it fails then; "" if it does not.
        end: the state that it is in when it has failed.
        asked: path and body of what was asked for.
    """

    def __init__(self, turns: int = 2) -> None:
        self.turns = turns
        self.failure = ""
        self.end = "failed"
        self.asked: list[tuple[str, Any]] = []
        self.status = 200
        self.is_lost = False
        self.count = 1
        self.version = 3
        self.action = "[moving] 3 of 12"
        self.others: list[dict[str, Any]] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if self.is_lost:
            raise httpx.ConnectError("connection refused")
        if request.headers["authorization"] != "Bearer boss":
            return httpx.Response(401, json={"error": {"message": "no admin key"}})
        if self.status != 200:
            return httpx.Response(self.status, json={"error": {"message": f"refused with {self.status}"}})
        if request.method == "POST":
            assert request.url.params["wait"] == "false"
            self.asked.append((request.url.path, json.loads(request.content)))
            return httpx.Response(202, json=self.cluster() | {"action_id": 7})
        self.turns -= bool(self.asked)
        if self.asked and self.turns <= 0:
            self.count = 2
        return httpx.Response(200, json=self.cluster())

    def cluster(self) -> dict[str, Any]:
        workers = [WorkerStatus(rank=0, title="attention 0", role="attention", state="serving")]
        workers += [
            WorkerStatus(rank=1 + i, title=f"expert {i}", role="experts", state="serving") for i in range(self.count)
        ]
        state = "running" if self.turns > 0 else self.end if self.failure else "done"
        actions = [{"id": 7, "action": "x", "state": state, "seconds": 1.0, "error": self.failure}]
        status = ClusterStatus(
            version=self.version,
            workers=workers,
            num_expert_workers=self.count,
            max_expert_workers=4,
            action=self.action,
        )
        return asdict(status) | {"actions": self.others + actions if self.asked else []}


def run(
    admin: FakeAdmin, order: Order, *, wait: bool = True, key: str = "boss", console: Console | None = None
) -> tuple[int, str]:
    """Exit status, and what is shown."""
    console = console or Console(file=io.StringIO(), width=160)
    transport = httpx.MockTransport(admin)
    status = scale_client.run_order("http://server:1", key, order, wait=wait, console=console, transport=transport)
    assert isinstance(console.file, io.StringIO)
    return status, console.file.getvalue()


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale_client, "POLL_S", 0.0)
    monkeypatch.setattr(scale_client, "PATIENCE_S", -1.0)
    monkeypatch.setattr(scale_client.setproctitle, "setproctitle", lambda _: None)


SCALE = Order("/admin/scale", {"expert_workers": 2})


class TestOrders:
    @pytest.mark.parametrize(
        ("flags", "order"),
        [
            ("--status", Order()),
            ("--expert-workers 2", SCALE),
            ("--rebalance", Order("/admin/rebalance")),
            (
                "--layer 0 --expert 5 --replicas 2",
                Order("/admin/replicas", {"layer": 0, "expert": 5, "count": 2}),
            ),
        ],
    )
    def test_what_flags_ask_for(self, flags: str, order: Order):
        assert order_of(cli.build_parser("scale").parse_args(["scale", *flags.split()])) == order

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            ("--replicas 2", "needs --layer L and --expert E"),
            ("--replicas 2 --layer 1", "needs --layer L and --expert E"),
            ("--rebalance --layer 1", "go with --replicas"),
            ("--layer 0 --expert 5", "go with --replicas"),
            ("--replicas 0 --layer 0 --expert 5", "--replicas must be at least 1, not 0"),
            ("--replicas 2 --layer -1 --expert 5", "--layer counts from 0"),
            ("--expert-workers -1", "--expert-workers must be at least 1, not -1"),
            ("", "say what: --status"),
            ("--status --no-wait", "--no-wait does nothing"),
            ("--status", "no admin key"),
            ("--status --admin-key k --url server:1", "is not an address"),
            ("--status --admin-key k --url http://a:b", "--url"),
        ],
    )
    def test_mistakes_are_one_line(
        self, flags: str, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.delenv("AMOE_ADMIN_KEY", raising=False)
        assert cli.main(["scale", *flags.split()]) == 2
        shown = capsys.readouterr().err
        assert message in shown and shown.startswith("amoe: error: ") and shown.count("\n") == 1

    @pytest.mark.parametrize("flags", ["--status --rebalance", "--expert-workers two"])
    def test_mistakes_of_syntax(self, flags: str, capsys: pytest.CaptureFixture[str]):
        with pytest.raises(SystemExit) as caught:
            cli.main(["scale", *flags.split()])
        assert caught.value.code == 2


class TestRuns:
    def test_it_shows_the_workers(self):
        status, shown = run(FakeAdmin(), Order())
        assert status == 0
        assert "attention 0" in shown and "expert 0" in shown and "serving" in shown
        assert "expert workers 1 of at most 4" in shown

    def test_it_waits_and_shows_what_has_changed(self):
        admin = FakeAdmin(turns=3)
        status, shown = run(admin, SCALE)
        assert (status, admin.asked) == (0, [("/admin/scale", {"expert_workers": 2})])
        assert shown.count("[moving] 3 of 12") == 2, "each change once, then as what the cluster is at"
        assert "added, serving" in shown
        assert "expert workers 1 → 2 of at most 4" in shown
        assert "done after" in shown

    def test_it_says_whether_anything_had_to_change(self):
        assert "nothing had to change" in run(FakeAdmin(), Order("/admin/rebalance"))[1]
        admin = FakeAdmin()
        cluster = admin.cluster

        def later() -> dict[str, Any]:
            admin.version += 1
            return cluster()

        admin.cluster = later
        assert "nothing had to change" not in run(admin, Order("/admin/rebalance"))[1]

    @pytest.mark.parametrize(("state", "told"), [("running", "waiting for its turn"), ("done", "begun")])
    def test_it_tells_that_another_one_is_in_front(self, state: str, told: str):
        admin = FakeAdmin(turns=3)
        admin.action = ""
        admin.others = [{"id": 6, "action": "y", "state": state, "seconds": 1.0, "error": ""}]
        lines = run(admin, SCALE)[1].splitlines()
        assert told in lines and len({"begun", "waiting for its turn"} & set(lines)) == 1

    def test_it_need_not_wait(self):
        status, shown = run(FakeAdmin(turns=99), SCALE, wait=False)
        assert status == 0 and "action 7" in shown

    @pytest.mark.parametrize(("end", "kind"), [("failed", AmoeError), ("refused", ConfigError)])
    def test_what_fails_says_why(self, end: str, kind: type[Exception]):
        admin = FakeAdmin(turns=1)
        admin.failure, admin.end = "expert 1 could not start", end
        with pytest.raises(AmoeError, match="expert 1 could not start") as caught:
            run(admin, SCALE)
        assert isinstance(caught.value, kind) and isinstance(caught.value, ConfigError) == (end == "refused")

    def test_what_fails_half_way_shows_what_has_become_of_it(self):
        admin = FakeAdmin(turns=1)
        admin.failure = "expert 2 could not be started; 2 of 3 expert workers serve; ask again"
        console = Console(file=io.StringIO(), width=160)
        with pytest.raises(scale_client.ActionFailedError, match="2 of 3 expert workers serve; ask again"):
            run(admin, SCALE, console=console)
        shown = console.file.getvalue()
        assert "added, serving" in shown and "expert workers 1 → 2 of at most 4" in shown
        assert "done after" not in shown

    def test_the_status_tells_what_has_failed(self):
        admin = FakeAdmin(turns=1)
        run(admin, SCALE, wait=False)
        admin.failure = "expert 1 could not [start]"
        status, shown = run(admin, Order())
        assert status == 0
        assert "action 7: x: failed after 1.0 s: expert 1 could not [start]" in shown

    @pytest.mark.parametrize(
        ("name", "means"),
        [
            ("cluster", "nothing was asked"),
            ("begin", "the server may have begun; see `amoe scale --status`"),
            ("follow", "the server goes on with it; see `amoe scale --status`"),
        ],
    )
    def test_an_interruption_says_what_becomes_of_it(
        self, name: str, means: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ):
        def interrupt(*_: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(scale_client.AdminClient, name, interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(FakeAdmin(), SCALE)
        assert capsys.readouterr().err == f"amoe: interrupted: {means}\n"

    @pytest.mark.parametrize("status", [200, 401, 404])
    def test_the_address_of_the_other_api(self, status: int):
        transport = httpx.MockTransport(lambda _: httpx.Response(status))
        with pytest.raises(ConfigError, match="--url ends with /v1: leave that away"):
            scale_client.run_order("http://x:1/v1/", "k", Order(), wait=True, transport=transport)

    def test_a_wrong_key(self):
        with pytest.raises(ConfigError, match="no admin key"):
            run(FakeAdmin(), SCALE, key="guest")

    @pytest.mark.parametrize(
        ("status", "kind"), [(400, ConfigError), (403, ConfigError), (409, ConfigError), (503, AmoeError)]
    )
    def test_what_the_server_refuses(self, status: int, kind: type[Exception]):
        admin = FakeAdmin()
        admin.status = status
        with pytest.raises(AmoeError, match=f"refused with {status}") as caught:
            run(admin, SCALE)
        assert type(caught.value) is kind

    def test_a_server_that_cannot_be_reached(self):
        admin = FakeAdmin()
        admin.is_lost = True
        with pytest.raises(AmoeError, match="http://server:1 does not answer: connection refused"):
            run(admin, SCALE)

    def test_something_else_than_a_server_of_ours(self):
        for answer in (httpx.Response(200, text="hello"), httpx.Response(200, json=[1]), httpx.Response(404)):
            with pytest.raises(ConfigError, match="amoe server"):
                scale_client.run_order(
                    "http://x", "k", Order(), wait=True, transport=httpx.MockTransport(lambda _, answer=answer: answer)
                )

    def test_a_worker_that_waits_for_its_next_life(self):
        def answer(_: httpx.Request) -> httpx.Response:
            worker = WorkerStatus(
                rank=1,
                title="expert 0",
                role="experts",
                state="waiting",
                num_crashes=3,
                retry_s=4.0,
                ended_s=600.0,
                reason="SIGKILL [9]",
            )
            return httpx.Response(
                200, json=asdict(ClusterStatus(version=1, workers=[worker], missing=8)) | {"actions": []}
            )

        console = Console(file=io.StringIO(), width=160)
        scale_client.run_order(
            "http://x", "k", Order(), wait=True, console=console, transport=httpx.MockTransport(answer)
        )
        shown = console.file.getvalue()
        assert "waiting, started anew in 4 s (died 3 times in a row)" in shown
        assert "10 min ago: SIGKILL [9]" in shown, "not taken for markup"
        assert "8 (layer, expert) pairs are held by nobody" in shown
