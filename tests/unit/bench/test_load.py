"""Load generation: order, concurrency, open and closed loops, interruption."""

import asyncio

import pytest

from amoe.bench.load import LoadGenerator
from amoe.bench.record import INTERRUPTED
from amoe.bench.workload import RequestSpec
from amoe.clock import ManualClock, MonotonicClock

SPECS = [RequestSpec(prompt=[i], max_tokens=i + 1) for i in range(20)]


@pytest.mark.parametrize("concurrency", [1, 3, 20, 100])
async def test_a_closed_loop_keeps_its_concurrency(concurrency):
    under_way, peak = 0, 0

    async def send(spec, record):
        nonlocal under_way, peak
        under_way += 1
        peak = max(peak, under_way)
        for _ in range(spec.max_tokens % 4 + 1):
            await asyncio.sleep(0)
        under_way -= 1

    result = await LoadGenerator(send, ManualClock()).with_concurrency(SPECS, concurrency)
    assert peak == min(concurrency, len(SPECS))
    assert [r.requested_tokens for r in result.records] == [s.max_tokens for s in SPECS]
    assert not result.interrupted


async def test_an_open_loop_waits_for_nobody_and_is_never_early():
    clock = MonotonicClock()
    release = asyncio.Event()
    sent = []

    async def send(spec, record):
        sent.append(spec)
        if len(sent) == 5:
            release.set()
        await release.wait()

    start = clock.now()
    arrivals = [0.0, 0.0, 0.005, 0.01, 0.02]
    result = await LoadGenerator(send, clock).at_times(SPECS[:5], arrivals)
    assert sent == SPECS[:5]
    assert all(r.started_at >= start + a for r, a in zip(result.records, arrivals, strict=True))


@pytest.mark.parametrize("open_loop", [False, True])
async def test_interruption_keeps_what_is_known(open_loop):
    stuck = asyncio.Event()
    ended = []

    class Progress:
        def advance(self, record):
            ended.append(record)

    async def send(spec, record):
        if spec.max_tokens > 2:
            stuck.set()
            await asyncio.Event().wait()

    load = LoadGenerator(send, ManualClock(), Progress())
    run = load.at_times(SPECS[:3], [0.0] * 3) if open_loop else load.with_concurrency(SPECS, 1)
    task = asyncio.create_task(run)
    await stuck.wait()
    task.cancel()
    result = await task
    assert result.interrupted
    assert [r.failure for r in result.records] == [None, None, INTERRUPTED]
    assert len(ended) == 3
    assert not task.cancelled()


async def test_no_requests():
    async def send(spec, record):
        raise AssertionError

    assert (await LoadGenerator(send, ManualClock()).with_concurrency([], 4)).records == []
    assert (await LoadGenerator(send, ManualClock()).at_times([], [])).records == []
