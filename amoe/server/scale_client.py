"""Carries out what `amoe scale` was asked for, and shows how it goes."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import setproctitle
from rich.console import Console
from rich.table import Table
from rich.text import Text

from amoe.errors import AmoeError, ConfigError
from amoe.server.scale_cli import Order

POLL_S = 0.3
TIMEOUT_S = 10.0
NUM_ACTIONS = 3  # that --status shows
PATIENCE_S = 15.0  # a server under load may be slow to answer once

Cluster = dict[str, Any]


class AdminClient:
    """Speaks to the admin API of one server.

    Args:
        http: with the server's address and the key.
    """

    def __init__(self, http: httpx.Client) -> None:
        self._http = http

    def cluster(self) -> Cluster:
        """The workers, now.

        Raises:
            ConfigError: the server says that this cannot be asked of it.
            AmoeError: it cannot be reached, or has failed.
        """
        return self._ask("GET", "/admin/cluster")

    def begin(self, order: Order) -> int:
        """Have the server begin with `order`. Returns the number of the action.

        Raises:
            ConfigError, AmoeError: as `cluster`.
        """
        assert order.path is not None
        return int(self._ask("POST", order.path, params={"wait": "false"}, json=order.body)["action_id"])

    def follow(self, number: int, show: Callable[[str], None]) -> Cluster:
        """Wait until an action has ended, and `show` what the server says that it is at.

        Raises:
            ConfigError: it cannot be done.
            ActionFailedError: it has failed.
            AmoeError: the server does not answer any more.
        """
        heard_at = time.monotonic()
        while True:
            try:
                cluster = self.cluster()
                heard_at = time.monotonic()
            except _Unreachable:
                if time.monotonic() - heard_at > PATIENCE_S:
                    raise
            else:
                action = next((action for action in cluster["actions"] if action["id"] == number), None)
                if action is None:
                    raise AmoeError("the server knows nothing of it any more: has it been started anew?")
                if action["state"] == "refused":
                    raise ConfigError(action["error"])
                if action["state"] == "failed":
                    raise ActionFailedError(action["error"], cluster)
                if action["state"] == "done":
                    return cluster
                is_next = all(other["state"] != "running" for other in cluster["actions"] if other["id"] < number)
                show(cluster["action"] or ("begun" if is_next else "waiting for its turn"))
            time.sleep(POLL_S)

    def _ask(self, method: str, path: str, **options: Any) -> Cluster:
        try:
            response = self._http.request(method, path, **options)
        except httpx.InvalidURL as error:
            raise ConfigError(f"--url: {error}") from error
        except httpx.HTTPError as error:
            raise _Unreachable(f"{self._http.base_url} does not answer: {error or type(error).__name__}") from error
        if response.is_success:
            with contextlib.suppress(ValueError):
                if isinstance(body := response.json(), dict) and "workers" in body:
                    return body
            raise ConfigError(f"{self._http.base_url} is not an amoe server, or another version of it{self._hint()}")
        message = _message(response)
        if response.status_code >= 500:
            raise AmoeError(message)
        raise ConfigError(f"{message}{self._hint()}")

    def _hint(self) -> str:
        """Clients of the API for models are given an address with /v1; this is another API."""
        return "; --url ends with /v1: leave that away" if self._http.base_url.path.endswith("/v1/") else ""


class ActionFailedError(AmoeError):
    """An action began, and has failed. `cluster`: how it is now."""

    def __init__(self, message: str, cluster: Cluster) -> None:
        super().__init__(message)
        self.cluster = cluster


class _Unreachable(AmoeError):
    """Nobody answered."""


def _message(response: httpx.Response) -> str:
    """What an error response says."""
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"{response.url} answered with status {response.status_code}: is it an amoe server?"


def run_order(
    url: str,
    key: str,
    order: Order,
    *,
    wait: bool,
    console: Console | None = None,
    transport: httpx.BaseTransport | None = None,
) -> int:
    """Ask, wait, and show the workers before and after. Returns the exit status.

    Args:
        console: where to; None: standard output.
        transport: instead of the network.

    Raises:
        ConfigError: what the user can mend; AmoeError: what failed.
    """
    setproctitle.setproctitle("amoe: scale")  # which also hides the key of the command line
    logging.getLogger("httpx").setLevel(logging.WARNING)  # a line for each look says nothing
    console = console or Console()
    try:
        headers = {b"authorization": f"Bearer {key}".encode()}
        http = httpx.Client(base_url=url.rstrip("/"), headers=headers, timeout=TIMEOUT_S, transport=transport)
    except (httpx.InvalidURL, ValueError) as error:
        raise ConfigError(f"--url or --admin-key: {error}") from error
    with http, _interruptions() as interruptions:
        client = AdminClient(http)
        before = client.cluster()
        if order.path is None:
            show_workers(console, before, before)
            show_actions(console, before)
            return 0
        interruptions.means = "the server may have begun; see `amoe scale --status`"
        number = client.begin(order)
        interruptions.means = "the server goes on with it; see `amoe scale --status`"
        if not wait:
            console.print(f"begun: action {number}; `amoe scale --status` tells how it goes")
            return 0
        began_at = time.monotonic()
        try:
            with _progress(console) as show:
                after = client.follow(number, show)
        except ActionFailedError as error:
            show_workers(console, before, error.cluster)
            raise
        changes = "" if after["version"] != before["version"] else "; nothing had to change"
        console.print(f"done after {time.monotonic() - began_at:.1f} s{changes}", highlight=False)
        show_workers(console, before, after)
    return 0


@dataclass
class _Interruptions:
    """`means`: what becomes of the order if the user interrupts now."""

    means: str = "nothing was asked"


@contextlib.contextmanager
def _interruptions() -> Iterator[_Interruptions]:
    """Whoever interrupts is told what that means."""
    interruptions = _Interruptions()
    try:
        yield interruptions
    except KeyboardInterrupt:
        print(f"amoe: interrupted: {interruptions.means}", file=sys.stderr)
        raise


@contextlib.contextmanager
def _progress(console: Console) -> Iterator[Callable[[str], None]]:
    """One line that changes, on a terminal; a line for each change elsewhere."""
    if console.is_terminal:
        with console.status("begun") as status:
            yield lambda text: status.update(Text(text))
        return
    last = ""

    def show(text: str) -> None:
        nonlocal last
        if text != last:
            console.print(Text(text))
        last = text

    yield show


def show_workers(console: Console, before: Cluster, after: Cluster) -> None:
    """A table of the workers, with what has changed; and the cluster in one line."""
    old = {worker["rank"]: worker for worker in before["workers"]}
    new = {worker["rank"]: worker for worker in after["workers"]}
    table = Table(box=None, header_style="bold", pad_edge=False)
    for title in ("worker", "rank", "holds", "state", "lives", "last end"):
        table.add_column(title, justify="right" if title in ("rank", "lives") else "left")
    for rank in sorted(old | new):
        worker = new.get(rank) or old[rank]
        state = _history(old.get(rank), new.get(rank))
        cells = (worker["title"], str(rank), worker["role"], state, str(worker["lives"]), _last_end(worker))
        table.add_row(*map(Text, cells))
    console.print(table)
    figures = [f"replicas {_change(before, after, 'num_replicas')}", f"topology {_change(before, after, 'version')}"]
    if any(worker["role"] == "experts" for worker in after["workers"]):
        count, most = _change(before, after, "num_expert_workers"), after["max_expert_workers"]
        figures.insert(0, f"expert workers {count} of at most {most}")
    console.print(" · ".join(figures), highlight=False)
    if after["missing"]:
        console.print(f"{after['missing']} (layer, expert) pairs are held by nobody now", style="bold red")
    if after["action"]:
        console.print(Text(f"at work: {after['action']}"))


def show_actions(console: Console, cluster: Cluster) -> None:
    """What has been asked for lately, and what became of it."""
    for action in cluster["actions"][-NUM_ACTIONS:]:
        error = f": {action['error']}" if action["error"] else ""
        text = f"action {action['id']}: {action['action']}: {action['state']} after {action['seconds']:.1f} s{error}"
        console.print(Text(text, style="bold red" if error else ""))


def _history(before: dict[str, Any] | None, after: dict[str, Any] | None) -> str:
    if before is None and after is not None:
        return f"added, {_state(after)}"
    if after is None:
        return "removed"
    assert before is not None
    was, now = _state(before), _state(after)
    return now if was == now else f"{was} → {now}"


def _last_end(worker: dict[str, Any]) -> str:
    """How it died last, and when."""
    seconds = worker.get("ended_s")  # a server of an earlier version does not tell
    if seconds is None:
        return str(worker["reason"])
    unit, name = next(unit for unit in ((3600, "h"), (60, "min"), (1, "s")) if seconds >= 2 * unit[0] or unit[0] == 1)
    return f"{seconds / unit:.0f} {name} ago: {worker['reason']}"


def _state(worker: dict[str, Any]) -> str:
    if worker["state"] == "waiting":
        return f"waiting, started anew in {worker['retry_s']:.0f} s (died {worker['num_crashes']} times in a row)"
    return str(worker["state"])


def _change(before: Cluster, after: Cluster, name: str) -> str:
    return str(after[name]) if before[name] == after[name] else f"{before[name]} → {after[name]}"
