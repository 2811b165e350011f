"""What a worker that holds the whole model answers to orders about its experts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from amoe.clock import ManualClock
from amoe.engine.forward import ForwardExecutor
from amoe.engine.messages import HoldExperts, Holding

WHOLE = [[], [0, 1, 2], [0, 1, 2]]


@pytest.fixture
def executor() -> ForwardExecutor:
    model: Any = SimpleNamespace(
        config=SimpleNamespace(num_layers=3, num_experts=3, sparse_layers=(False, True, True)), parameter_bytes=700
    )
    parts: Any = SimpleNamespace(table=None)
    return ForwardExecutor(model, parts, parts, ManualClock())


def test_the_whole_model_is_held_already(executor: ForwardExecutor):
    assert executor.hold(HoldExperts(4, WHOLE)) == Holding(4, 700)


@pytest.mark.parametrize("experts", [[[], [0, 1], [0, 1, 2]], [[0], [0, 1, 2], [0, 1, 2]], WHOLE[1:]])
def test_other_orders_are_complained_about(executor: ForwardExecutor, experts: list[list[int]]):
    answer = executor.hold(HoldExperts(5, experts))
    assert (answer.order, answer.parameter_bytes) == (5, 700)
    assert "holds all experts" in answer.complaint
