"""What a worker that is started anew has to hold before it joins."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from amoe.cluster import late_start
from amoe.engine.messages import Alive, HoldExperts, Holding, LayerHeld
from amoe.errors import ConfigError, EngineDeadError

EXPERTS = [[0, 2], []]


class Channel:
    """Says what a script says, then nothing more; or ends, if the script says so by None."""

    def __init__(self, *script: Any) -> None:
        self.script = script
        self.told: list[Any] = []

    def send(self, message: Any) -> None:
        self.told.append(message)

    async def __aiter__(self) -> AsyncIterator[Any]:
        for message in self.script:
            if message is None:
                return
            yield message
        await asyncio.Event().wait()


def hold(channel: Channel) -> Any:
    worker: Any = SimpleNamespace(
        channel=channel,
        describe=lambda: "expert 0 (pid 12)",
        describe_exit=lambda: "expert 0 (pid 12) was killed by SIGKILL",
        describe_output=lambda: "",
    )
    return late_start._hold(worker, EXPERTS)


async def test_it_holds_what_it_should() -> None:
    channel = Channel(Alive(0.0), LayerHeld(0), Holding(7, 10), Holding(0, 10))
    assert await hold(channel) == EXPERTS
    assert channel.told == [HoldExperts(0, EXPERTS)]


@pytest.mark.parametrize(
    ("last", "error", "message"),
    [
        (Holding(0, 0, "no memory"), ConfigError, "cannot load its experts: no memory"),
        (None, EngineDeadError, "was killed by SIGKILL while loading experts"),
    ],
)
async def test_it_cannot(last: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        await hold(Channel(LayerHeld(0), last))


async def test_it_does_not_get_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(late_start, "STANDSTILL_S", 0.01)
    with pytest.raises(EngineDeadError, match=r"has not got on with loading experts for 0\.01 s: its storage may hang"):
        await hold(Channel(LayerHeld(0)))
