"""Names that something else in a Ray cluster may have, without Ray."""

from __future__ import annotations

import pytest
from ray.exceptions import RayError, RaySystemError

from amoe.cluster.leaving import is_in_a_call_of_rays
from amoe.cluster.ray_cluster import names
from amoe.cluster.ray_cluster.session import RayThread
from amoe.errors import ConfigError, EngineDeadError

TAKEN = "Failed to create placement group 'e8' because name 'amoe/d/experts' already exists.\nand so on"


class Maker:
    """Raises one error after the other, then makes something."""

    def __init__(self, *errors: RayError) -> None:
        self.errors = list(errors)

    def __call__(self) -> str:
        if self.errors:
            raise self.errors.pop(0)
        return "made"


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names, "_PAUSE_S", 0.001)
    monkeypatch.setattr(names, "NAME_TIMEOUT_S", 0.003)


async def claim(maker: Maker) -> str:
    thread = RayThread()
    try:
        return await names.claim(thread, maker, "a placement group amoe/d/experts")
    finally:
        thread.close()


async def test_a_name_that_becomes_free_is_had() -> None:
    assert await claim(Maker(RaySystemError(TAKEN), RaySystemError(TAKEN))) == "made"


async def test_a_name_that_another_server_keeps_is_told() -> None:
    with pytest.raises(
        ConfigError, match=r"there is a placement group amoe/d/experts .* this --deployment-name: choose"
    ):
        await claim(Maker(*[RaySystemError(TAKEN)] * 9))


async def test_what_else_ray_says_is_told_at_once() -> None:
    with pytest.raises(EngineDeadError, match=r"Ray does not make a placement group amoe/d/experts: .*no such thing"):
        await claim(Maker(RayError("no such thing\nand so on"), RayError("never reached")))


async def test_a_call_of_rays_that_goes_on_is_known() -> None:
    thread = RayThread()
    assert await thread.call(is_in_a_call_of_rays)
    thread.close()
