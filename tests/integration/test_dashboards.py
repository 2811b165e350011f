"""A real Prometheus scrapes a real server under load: every expression of the dashboards returns data."""

from __future__ import annotations

import asyncio
import math
import random
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from amoe.metrics import EngineMetrics
from amoe.stats import HistogramSnapshot, WorkerStats
from tests.dashboards import ROOT, queries, substituted
from tests.served import ServedModel

PROMETHEUS, PROMTOOL = shutil.which("prometheus"), shutil.which("promtool")
RULES = ROOT / "deploy" / "prometheus"

# A small queue and a small cache, so that requests wait, are refused and are preempted; capacity takes pairs.
FLAGS = (
    *("--colocated", "2", "--redundant-experts", "1", "--steer-interval", "0.5"),
    *("--max-num-seqs", "4", "--max-waiting", "6", "--num-kv-blocks", "24"),
    *("--capacity-factor", "1.0", "--capacity-mode", "reroute", "--capacity-phase", "both"),
)
NUM_USERS = 20
LOAD_S = 8.0
MOST_S = 45.0  # a machine that is busy with other things needs longer until every expression has data

needs_prometheus = pytest.mark.skipif(
    PROMETHEUS is None, reason="no prometheus here (Debian: apt-get install prometheus)"
)
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="no promtool here (Debian: apt-get install prometheus)")


async def _use(url: str, until: float) -> dict[int, int]:
    """Users who ask again and again. Returns how many answers there were, by status."""
    statuses: dict[int, int] = {}

    async def user(client: httpx.AsyncClient, seed: int) -> None:
        draw = random.Random(seed)
        while time.monotonic() < until:
            body = {
                "prompt": f"def f{draw.randrange(9)}(x):\n" * draw.randrange(1, 14),
                "max_tokens": draw.randrange(4, 48),
                "n": draw.choice((1, 1, 2)),
                "stream": draw.random() < 0.5,
            }
            status = (await client.post("/v1/completions", json=body)).status_code
            statuses[status] = statuses.get(status, 0) + 1
            if status == 503:
                await asyncio.sleep(0.2)

    async with httpx.AsyncClient(base_url=url, timeout=120) as client:
        await asyncio.gather(*(user(client, seed) for seed in range(NUM_USERS)))
    return statuses


class Prometheus:
    """A Prometheus that scrapes `target` once a second, with our alert rules."""

    def __init__(self, folder: Path, target: str) -> None:
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{sock.getsockname()[1]}"
        config: dict[str, Any] = yaml.safe_load((RULES / "prometheus.yml").read_text())
        config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        config["rule_files"] = [str(RULES / "alerts.yml")]
        config["scrape_configs"][0]["static_configs"] = [{"targets": [target]}]
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        assert PROMETHEUS is not None
        self.process = subprocess.Popen(
            [
                PROMETHEUS,
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address={address}",
            ],
            stdout=subprocess.DEVNULL,
            stderr=(folder / "log").open("w"),
        )
        self.client = httpx.Client(base_url=f"http://{address}", timeout=30)
        self._log = folder / "log"

    def wait(self) -> None:
        """Until it answers."""
        while True:
            try:
                if self.client.get("/-/ready").status_code == 200:
                    return
            except httpx.TransportError:
                assert self.process.poll() is None, self._log.read_text()
            time.sleep(0.1)

    def query(self, expr: str) -> list[float]:
        """The values of an instant query."""
        answer = self.client.get("/api/v1/query", params={"query": expr}).json()
        assert answer["status"] == "success", answer
        return [float(sample["value"][1]) for sample in answer["data"]["result"]]

    def rules(self) -> list[dict[str, Any]]:
        groups = self.client.get("/api/v1/rules").json()["data"]["groups"]
        return [rule for group in groups for rule in group["rules"]]

    def close(self) -> None:
        self.client.close()
        self.process.terminate()
        self.process.wait(30)


@pytest.fixture(scope="module")
def scraped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Prometheus, str]]:
    """A Prometheus, and the server that it scrapes."""
    with ServedModel(*FLAGS) as served:
        instance = served.url.removeprefix("http://")
        prometheus = Prometheus(tmp_path_factory.mktemp("prometheus"), instance)
        try:
            prometheus.wait()
            yield prometheus, served.url
        finally:
            prometheus.close()
        assert not served.tracebacks()


def _without_data(prometheus: Prometheus, instance: str) -> list[str]:
    """Queries without a number: NaN is what a quotient of nothing gives."""
    return [
        query.id
        for query in queries()
        if not any(map(math.isfinite, prometheus.query(substituted(query.expr, "1m", instance))))
    ]


@needs_prometheus
def test_every_expression_has_data(scraped: tuple[Prometheus, str]):
    prometheus, url = scraped
    instance = url.removeprefix("http://").replace(".", r"\\.")
    deadline = time.monotonic() + MOST_S
    statuses: dict[int, int] = {}
    while True:
        for status, count in asyncio.run(_use(url, time.monotonic() + LOAD_S)).items():
            statuses[status] = statuses.get(status, 0) + count
        missing = _without_data(prometheus, instance)
        if not missing or time.monotonic() > deadline:
            break
    assert missing == []
    assert set(statuses) <= {200, 503}
    assert statuses[200] > 0


@needs_prometheus
def test_what_it_says_is_plausible(scraped: tuple[Prometheus, str]):
    """After the load of the test before: figures that would be wrong by far if a label or a unit were."""
    prometheus, _ = scraped
    (experts,) = prometheus.query("max(amoe:expert_load_imbalance)")
    assert 1.0 <= experts <= 16.0, "the built-in model has 16 experts"
    (workers,) = prometheus.query("max(amoe:worker_load_imbalance)")
    assert 1.0 <= workers <= 2.0, "there are 2 workers"
    (wall,) = prometheus.query("max(time() - process_start_time_seconds{job='amoe'})")
    spent = [f"sum by (worker) (amoe:worker_{kind}_seconds_total)" for kind in ("busy", "wait")]
    for seconds in prometheus.query(" + ".join(spent)):
        assert 0 < seconds <= wall, "a second is spent once"
    layers = prometheus.query("sum by (layer) (amoe:expert_pairs_total)")
    assert layers and min(layers) > 0
    (tokens,) = prometheus.query("sum(amoe:prompt_tokens_total)")
    (split,) = prometheus.query("sum(amoe:prompt_tokens_by_source_total)")
    assert tokens == split
    assert prometheus.query("sum(amoe:admission_rejections_total)") == prometheus.query(
        'sum(http_requests_total{status="5xx"})'
    )


@needs_prometheus
def test_the_health_check_of_the_images_tells_life_from_death(scraped: tuple[Prometheus, str]):
    _, url = scraped
    (line,) = re.findall(r"urlopen\(.*?\)", (ROOT / "docker" / "Dockerfile").read_text())
    for where, status in ((url, 0), ("http://127.0.0.1:1", 1)):
        source = "import urllib.request as r; r." + line.replace("http://127.0.0.1:8000", where)
        assert subprocess.run([sys.executable, "-c", source], stderr=subprocess.DEVNULL).returncode == status


@needs_prometheus
def test_rules_are_evaluated_and_a_busy_server_is_no_emergency(scraped: tuple[Prometheus, str]):
    prometheus, _ = scraped
    rules = prometheus.rules()
    names = {
        rule["alert"]
        for group in yaml.safe_load((RULES / "alerts.yml").read_text())["groups"]
        for rule in group["rules"]
    }
    assert {rule["name"] for rule in rules} == names
    assert [rule["name"] for rule in rules if rule["health"] != "ok"] == []
    critical = [rule["name"] for rule in rules if rule["labels"]["severity"] == "critical" and rule["alerts"]]
    assert critical == []


@needs_promtool
@pytest.mark.parametrize(
    "command",
    [("check", "config", "prometheus.yml"), ("check", "rules", "alerts.yml"), ("test", "rules", "alerts_test.yml")],
    ids=" ".join,
)
def test_promtool_has_no_complaint(command: tuple[str, ...]):
    assert PROMTOOL is not None
    done = subprocess.run([PROMTOOL, *command], cwd=RULES, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_promtool_dislikes_nothing_but_the_colon():
    """The colon, meant for recorded series, is vLLM's: with it, its dashboards are ported by a prefix."""
    metrics = EngineMetrics("m", 100)
    metrics.prepare([0])
    metrics.worker(WorkerStats(0, "colocated", iteration_tokens=HistogramSnapshot("attention", 0, [1] * 14, 14.0)))
    assert PROMTOOL is not None
    done = subprocess.run([PROMTOOL, "check", "metrics"], input=metrics.render(), capture_output=True)
    complaints = (done.stdout + done.stderr).decode().splitlines()
    allowed = (
        "metric names should not contain ':'",
        'non-counter metrics should not have "_total" suffix',  # vLLM's histogram iteration_tokens_total
    )
    assert complaints and [line for line in complaints if not line.endswith(allowed)] == []
