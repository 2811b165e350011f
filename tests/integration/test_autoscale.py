"""The number of expert workers follows the load by itself, up and down, whatever the schedule."""

from __future__ import annotations

import pytest

from amoe.cluster.front import serving
from amoe.cluster.local import LocalCluster
from amoe.config import ScheduleName
from amoe.engine.tokenizer import Tokenizer
from tests.integration.autoscaling import autoscaled, check_that_it_follows, hurry

pytestmark = pytest.mark.cluster


@pytest.mark.parametrize("schedule", ["waves", pytest.param("progress", marks=pytest.mark.matrix)])
async def test_the_number_of_workers_follows_the_load(schedule: ScheduleName, monkeypatch: pytest.MonkeyPatch) -> None:
    hurry(monkeypatch)
    config = autoscaled(schedule)
    async with serving(LocalCluster(config), name="m", tokenizer=Tokenizer(config.model)) as front:
        await check_that_it_follows(front)
