"""What the line says, and when it is said."""

from __future__ import annotations

import asyncio
import logging

import pytest

from amoe.engine.async_engine import AsyncEngine
from amoe.server.status_line import has_traffic, hottest_layer, log_status, status_line, totals_of
from amoe.stats import RequestFlow, WorkerStats
from tests.unit.server.conftest import Harness


def workers(pairs: list[list[int]], hits: int) -> list[WorkerStats]:
    home = WorkerStats(rank=0, role="attention", num_running=5, num_waiting=2, prefix_queries=100, prefix_hits=hits)
    home.kv_blocks_used, home.kv_blocks_total = 30, 120
    half = [[count // 2 for count in row] for row in pairs]
    rest = [[count - count // 2 for count in row] for row in pairs]
    return [home, WorkerStats(1, "experts", expert_pairs=half), WorkerStats(2, "experts", expert_pairs=rest)]


def test_the_line():
    flow = RequestFlow()
    before = totals_of(flow.now(100.0), workers([[10, 10], [0, 50]], 10))
    flow.first_token(0.1, 300)
    flow.tokens(45, None)
    now_workers = workers([[20, 20], [10, 80]], 60)
    now_workers[0].prefix_queries = 200
    now = totals_of(flow.now(110.0), now_workers)
    assert has_traffic(before, now, 0) and has_traffic(now, now, 1) and not has_traffic(now, now, 0)
    assert status_line(before, now, now_workers) == (
        "prompt throughput: 30.0 tokens/s, generation throughput: 4.5 tokens/s, running: 5 reqs, waiting: 2 reqs, "
        "KV cache usage: 25.0%, prefix cache hit rate: 50.0%, hottest experts: layer 1, 1.50 times the mean"
    )
    assert "hottest" not in status_line(now, now, now_workers)


def test_the_hottest_layer_before_any_word_of_the_workers():
    nothing = totals_of(RequestFlow().now(0.0), [])
    assert hottest_layer(nothing, nothing) is None
    some = totals_of(RequestFlow().now(1.0), workers([[3, 1], [0, 0]], 0))
    assert hottest_layer(nothing, some) == (0, pytest.approx(1.5))


def test_the_hottest_layer_is_unknown_when_a_worker_has_left():
    all_of_them = workers([[10, 10], [0, 50]], 10)
    before = totals_of(RequestFlow().now(0.0), all_of_them)
    now = totals_of(RequestFlow().now(10.0), all_of_them[:-1])
    assert hottest_layer(before, now) is None
    assert "hottest" not in status_line(before, now, all_of_them[:-1])
    busy_since = totals_of(RequestFlow().now(10.0), workers([[90, 90], [90, 90]], 10)[:-1])
    assert hottest_layer(before, busy_since) is None, "no count has gone down, and they are wrong all the same"
    anew = totals_of(RequestFlow().now(10.0), workers([[2, 0], [0, 0]], 10))
    assert hottest_layer(before, anew) is None, "the next life of a worker counts from nothing"


async def test_it_is_logged_while_there_is_traffic_and_once_more(server: Harness, caplog):
    caplog.set_level(logging.INFO, "amoe.status")
    engine: AsyncEngine = server.engine
    task = asyncio.create_task(log_status(engine, interval_s=0.002))
    await some_intervals()
    assert not lines_of(caplog)
    await server.complete(prompt="abc", max_tokens=3)
    while len(lines_of(caplog)) < 2:  # noqa: ASYNC110 - a test has nothing else to wait for
        await asyncio.sleep(0.002)
    await some_intervals()  # as many lines as there were intervals with traffic, and the last one
    count = len(lines_of(caplog))
    await some_intervals()
    task.cancel()
    assert len(lines_of(caplog)) == count
    assert "generation throughput" in lines_of(caplog)[0]


async def some_intervals() -> None:
    """Each pause gives the other task its turn, however long this process was kept from running."""
    for _ in range(20):
        await asyncio.sleep(0.003)


def lines_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the status line itself has said: what other loggers say is captured too once a test has set them up."""
    return [record.getMessage() for record in caplog.records if record.name == "amoe.status"]
