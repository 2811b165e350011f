"""Workers that try to reach each other before they need to."""

from __future__ import annotations

import asyncio
import contextlib
import socket

import pytest

from amoe.cluster.ray_cluster import reach
from amoe.cluster.ray_cluster.reach import Acquaintances, Door, Guest, try_to_reach
from amoe.config import PlacementConfig
from amoe.errors import ConfigError

PLACEMENT = PlacementConfig(attention_workers=2, expert_workers=2)
HOST = "127.0.0.1"


class Network:
    """Who reaches whom; each host is a worker's own, and its port is its rank."""

    def __init__(self, *closed: tuple[int, int], silent: tuple[int, ...] = ()) -> None:
        self.tried: list[tuple[int, int]] = []
        self._closed = closed
        self._silent = silent

    def guest(self, rank: int) -> Guest:
        async def try_it(host: str, port: int) -> str:
            self.tried.append((rank, port))
            if rank in self._silent:
                await asyncio.Event().wait()
            return "no answer within 5 s" if (rank, port) in self._closed else ""

        return Guest(f"worker {rank}", f"10.0.0.{rank}", rank, try_it)


async def introduce_all(network: Network) -> Acquaintances:
    acquaintances = Acquaintances(PLACEMENT)
    for rank in range(4):
        await acquaintances.introduce(rank, network.guest(rank))
    return acquaintances


async def test_all_that_exchange_tokens_try_each_other_once_each_way():
    network = Network()
    await introduce_all(network)
    pairs = {(0, 1), (0, 2), (0, 3), (1, 2), (1, 3)}  # ranks 2 and 3 are expert workers, which never talk
    assert sorted(network.tried) == sorted(pairs | {(there, here) for here, there in pairs})


@pytest.mark.parametrize("closed", [(0, 3), (3, 0)])
async def test_who_cannot_be_reached_is_told(closed):
    with pytest.raises(ConfigError) as error:
        await introduce_all(Network(closed))
    here, there = closed
    assert f"worker {here} on 10.0.0.{here} cannot reach worker {there} on 10.0.0.{there}" in str(error.value)
    assert "open them between the nodes" in str(error.value)


async def test_one_that_has_gone_or_is_silent_stops_nobody(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reach, "ANSWER_TIMEOUT_S", 0.01)
    network = Network(silent=(1,))
    acquaintances = await introduce_all(network)
    assert (1, 3) in network.tried
    gone = network.guest(2)
    acquaintances.forget(2, gone)  # another life of it: the one that is there stays
    network.tried.clear()
    await acquaintances.introduce(0, network.guest(0))
    assert (0, 2) in network.tried


async def test_one_that_is_given_up_meanwhile_stops_nobody():
    """Its host is cut off: nobody reaches it, and its end is not known for sure."""
    network = Network((0, 2))
    acquaintances = Acquaintances(PLACEMENT)
    cut_off, home = network.guest(2), network.guest(0)
    await acquaintances.introduce(2, cut_off)

    async def try_it(host: str, port: int) -> str:
        acquaintances.forget(2, cut_off)
        return await home.reach(host, port)

    await acquaintances.introduce(0, home._replace(reach=try_it))


async def test_a_life_that_has_ended_is_tried_no_more():
    network = Network()
    acquaintances = Acquaintances(PLACEMENT)
    life = network.guest(2)
    await acquaintances.introduce(2, life)
    acquaintances.forget(2, life)
    await acquaintances.introduce(0, network.guest(0))
    assert network.tried == []


def test_a_door_can_be_reached_until_it_is_closed():
    with contextlib.closing(Door(HOST)) as door:
        assert [try_to_reach(HOST, door.port) for _ in range(3)] == [""] * 3
    assert try_to_reach(HOST, door.port) == "Connection refused"


def test_a_host_that_answers_nobody_is_told(monkeypatch: pytest.MonkeyPatch):
    def never(address: tuple[str, int], timeout_s: float) -> socket.socket:
        raise TimeoutError

    monkeypatch.setattr(socket, "create_connection", never)
    assert try_to_reach("10.0.0.9", 1) == "no answer within 5 s"
