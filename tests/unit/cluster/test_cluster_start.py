"""The start of all workers together, over workers that are nothing but their handles."""

from __future__ import annotations

import asyncio

import pytest

from amoe.config import FailureConfig
from amoe.errors import EngineDeadError
from tests.unit.cluster.fake_cluster import Fakes


async def test_one_that_says_nothing_ends_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("amoe.cluster.cluster.START_SILENCE_S", 0.05)
    fakes = Fakes(FailureConfig())
    fakes.hold = asyncio.Event()
    with pytest.raises(EngineDeadError, match=r"has said nothing for 0\.05 s while starting"):
        await fakes.cluster.start()
    assert fakes.is_closed
    assert not fakes.cluster.workers
    assert sorted(event for event in fakes.events if event.startswith("kill")) == ["kill 0.0", "kill 1.0", "kill 2.0"]
