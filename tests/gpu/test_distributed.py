"""Payloads between two GPUs by NCCL, their records by gloo. With `--device cpu` gloo carries both, on groups apart."""

from __future__ import annotations

import pytest
import torch

from tests.transport_group import MOST_TOKENS, Group, batch_of, collect, readable

pytestmark = pytest.mark.gpu


@pytest.fixture
def devices(device: str) -> tuple[str, str]:
    """This process's, and the other one's."""
    if device == "cpu":
        return "cpu", "cpu"
    if torch.get_device_module(device).device_count() < 2:
        pytest.skip("NCCL connects no device with itself: this needs two")
    return f"{device}:0", f"{device}:1"


def group_on(device: str) -> Group:
    return Group("split" if device == "cpu" else "distributed", 2, num_homes=1)


def test_payloads_go_from_device_to_device_and_back(devices: tuple[str, str]) -> None:
    here, there = devices
    with group_on(here) as group:
        (child,) = group.start(1, device=there)
        end = group.open(0, device=here)
        group.peers[1] = child.open(1)
        group.tell()
        sizes = [0, 1, 7, MOST_TOKENS] * 20
        for epoch, size in enumerate(sizes):
            batch = batch_of(size, 0, 1, epoch)
            if batch.payload is not None:
                batch.payload = batch.payload.to(here)
            end.send(batch)
            if batch.payload is not None:
                batch.payload.zero_()  # on the stream of the caller, right behind the send
        answers = collect(end, len(sizes))
        assert [batch.epoch for batch in answers] == list(range(len(sizes)))
        for epoch, size in enumerate(sizes):
            payload, expected = answers[epoch].payload, batch_of(size, 0, 1, epoch).payload
            if expected is None:
                assert payload is None
            else:
                assert payload is not None and payload.device == torch.device(here)
                assert torch.equal(payload.cpu(), expected)


def test_killed_in_the_middle_and_reborn(devices: tuple[str, str]) -> None:
    here, there = devices
    with group_on(here) as group:
        killed, reborn = group.start(2, device=there)
        end = group.open(0, device=here)
        group.peers[1] = killed.open(1)
        group.tell()
        end.send(batch_of(3, 0, 1))
        collect(end, 1)
        for epoch in range(1, 20):
            end.send(batch_of(MOST_TOKENS, 0, 1, epoch))
        killed.kill()
        del group.peers[1]
        group.tell()
        group.peers[1] = reborn.open(1, incarnation=1)
        group.tell()
        end.send(batch_of(3, 0, 1, 99))
        while True:
            assert readable(end)
            if 99 in [batch.epoch for batch in end.poll()]:
                break
