"""On Ray the number of expert workers follows the load as it does elsewhere: what comes is an actor of its own."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.integration.autoscaling import autoscaled, check_that_it_follows, hurry
from tests.ray_nodes import running, two_nodes


@pytest.mark.matrix
async def test_the_number_of_actors_follows_the_load(monkeypatch: pytest.MonkeyPatch) -> None:
    hurry(monkeypatch)
    config = replace(autoscaled("waves"), transport="tcp", threads_per_worker=1)  # of each node's four
    with two_nodes() as cluster:
        async with running(cluster.address, config) as (front, workers):
            await check_that_it_follows(front)
            assert sorted(workers.workers) == [0, 1]
