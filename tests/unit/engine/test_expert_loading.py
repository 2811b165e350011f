"""Orders to hold experts: of a store that a script plays, and of real weights."""

from __future__ import annotations

import os
import shutil
import sys
import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from amoe.core.experts import ExpertsCore
from amoe.core.micro_queue import MicroQueues
from amoe.core.steps import ExpertsStep, Outgoing
from amoe.engine.executor import ExpertsExecutor
from amoe.engine.expert_loading import ExpertLoading
from amoe.engine.messages import HoldExperts, Holding, LayerHeld
from amoe.errors import CheckpointError
from amoe.models.config import load_model_config
from amoe.models.loader import Blocks, load_model
from amoe.types import Batch, BatchKind, BlockId, BlockKind

SPARSE = (True, False, True)
NUM_EXPERTS = 6
HELD = {0: (0, 1, 2), 2: (3, 4)}


class Store:
    """Weights are their ids. `gate` holds the thread up; `failing` layers cannot be loaded."""

    def __init__(self, held: dict[int, tuple[int, ...]] = HELD) -> None:
        self.now = dict(held)
        self.history: list[tuple[int, tuple[int, ...]]] = []
        self.discarded: list[int] = []
        self.gate = threading.Event()
        self.gate.set()
        self.failing: set[int] = set()
        self.loop = threading.get_ident()

    @property
    def parameter_bytes(self) -> int:
        return sum(len(ids) for ids in self.now.values())

    def held(self) -> dict[int, tuple[int, ...]]:
        return dict(self.now)

    def prepare(self, layer: int, ids: tuple[int, ...]) -> tuple[int, ...]:
        assert threading.get_ident() != self.loop, "reading belongs beside the loop"
        self.gate.wait(10)
        if layer in self.failing:
            raise CheckpointError("expert_3.safetensors: damaged")
        return ids

    def install(self, layer: int, prepared: tuple[int, ...]) -> None:
        assert threading.get_ident() == self.loop, "weights change between steps"
        self.now[layer] = prepared
        self.history.append((layer, prepared))

    def discard(self, layer: int) -> None:
        assert threading.get_ident() == self.loop
        self.discarded.append(layer)


class Queues:
    """`ExpertsCore.awaits`: experts that waiting tokens need, by layer."""

    def __init__(self) -> None:
        self.needed: dict[int, set[int]] = {}

    def awaits(self, layer: int, experts: np.ndarray) -> bool:
        return any(experts[expert] for expert in self.needed.get(layer, ()))


def make(store: Store, queues: Any = None, *, is_late: bool = False) -> ExpertLoading:
    return ExpertLoading(store, queues or Queues(), SPARSE, NUM_EXPERTS, is_late=is_late)


def order(number: int, first: list[int], last: list[int]) -> HoldExperts:
    return HoldExperts(number, [first, [], last])


def carry_out(loading: ExpertLoading) -> Holding:
    """Poll, as the loop does, until there is an answer; before it, that it gets on."""
    told: list[Any] = []
    while not (told and isinstance(told[-1], Holding)):
        told = loading.poll()
        if not told:
            wait_for_thread(loading)
        assert all(message == LayerHeld(loading._order) for message in told[:-1])
    (holding,) = told
    assert not loading.is_busy
    assert loading.poll() == []
    return holding


def wait_for_thread(loading: ExpertLoading) -> None:
    if loading._job is not None:
        loading._job[2].exception(10)


def test_what_comes_is_there_before_anything_goes() -> None:
    store = Store()
    loading = make(store)
    assert not loading.is_busy
    loading.order(order(1, [2, 5], [0, 3, 4]))
    assert loading.is_busy
    assert carry_out(loading) == Holding(1, 5)
    assert store.history == [(0, (0, 1, 2, 5)), (2, (0, 3, 4)), (0, (2, 5))]
    loading.close()


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no priorities of their own")
def test_the_loop_comes_first() -> None:
    class Looking(Store):
        def prepare(self, layer: int, ids: tuple[int, ...]) -> tuple[int, ...]:
            me = threading.get_native_id()
            priorities.append(os.getpriority(os.PRIO_PROCESS, me))
            return super().prepare(layer, ids)

    priorities: list[int] = []
    mine = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    loading = make(Looking())
    loading.order(order(1, [0, 1, 2, 5], [3, 4]))
    carry_out(loading)
    assert set(priorities) == {min(19, mine + 5)}
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == mine
    loading.close()


def test_an_order_that_changes_nothing_is_answered_at_once() -> None:
    loading = make(Store())
    loading.order(order(7, [0, 1, 2], [3, 4]))
    assert loading.poll() == [Holding(7, 5)]
    loading.close()


@pytest.mark.parametrize("held", [{}, {0: (), 2: ()}])
def test_a_worker_may_begin_and_end_with_nothing(held: dict[int, tuple[int, ...]]) -> None:
    store = Store(held)
    loading = make(store)
    loading.order(order(1, [1], []))
    assert carry_out(loading) == Holding(1, 1)
    loading.order(order(2, [], []))
    assert carry_out(loading) == Holding(2, 0)
    assert store.history == [(0, (1,)), (0, ())]
    loading.close()


def test_a_token_keeps_the_expert_that_it_waits_for() -> None:
    store, queues = Store(), Queues()
    loading = make(store, queues)
    queues.needed = {0: {1}, 2: {4}}
    loading.order(order(1, [0, 2], [3, 4]))
    loading.poll()
    for _ in range(3):
        wait_for_thread(loading)
        assert loading.poll() == []
        assert loading.is_busy
    assert store.now[0] == (0, 1, 2)
    queues.needed = {2: {4}}
    assert carry_out(loading) == Holding(1, 4)
    assert store.now[0] == (0, 2)
    loading.close()


def test_a_later_order_replaces_one_that_is_being_carried_out() -> None:
    store = Store()
    loading = make(store)
    store.gate.clear()
    loading.order(order(1, [0], [3, 4]))  # forgets 1 and 2
    loading.poll()
    loading.order(order(2, [0, 1, 2, 5], [3, 4]))  # wants them after all
    assert loading.poll() == []
    store.gate.set()
    assert carry_out(loading) == Holding(2, 6)
    assert store.history == [(0, (0, 1, 2, 5))], "what the first one has prepared is thrown away"
    assert store.discarded == [0]
    loading.close()


def test_what_cannot_be_loaded_is_told_and_what_was_held_stays() -> None:
    store = Store()
    loading = make(store)
    store.failing = {2}
    loading.order(order(1, [5], [0]))
    holding = carry_out(loading)
    assert (holding.order, holding.complaint) == (1, "expert_3.safetensors: damaged")
    assert set(HELD[0]) <= set(store.now[0])
    assert store.now[2] == HELD[2]
    store.failing = set()
    loading.order(order(2, [0, 1, 2], [3, 4]))
    assert carry_out(loading) == Holding(2, 5)
    assert store.now == HELD
    loading.close()


@pytest.mark.parametrize(
    ("experts", "complaint"),
    [
        ([[0]], "names 1 layers, the model has 3"),
        ([[0], [1], []], "layer 1 has no experts"),
        ([[1, 0], [], []], r"\[1, 0\] are no ascending ids of the 6 experts of layer 0"),
        ([[0], [], [6]], r"\[6\] are no ascending ids"),
        ([[-1], [], []], r"\[-1\] are no ascending ids"),
        ([[1, 1], [], []], r"\[1, 1\] are no ascending ids"),
    ],
)
def test_an_order_that_makes_no_sense_changes_nothing(experts: list[list[int]], complaint: str) -> None:
    store = Store()
    loading = make(store)
    loading.order(HoldExperts(3, experts))
    holding = carry_out(loading)
    assert holding.order == 3
    with pytest.raises(ValueError, match=complaint):
        raise ValueError(holding.complaint)
    assert store.history == []
    loading.close()


holdings = st.lists(st.integers(0, NUM_EXPERTS - 1), unique=True).map(sorted)


@given(st.lists(st.tuples(holdings, holdings, st.booleans()), min_size=1, max_size=6))
def test_whatever_is_ordered_the_last_order_is_carried_out(orders: list[tuple[list[int], list[int], bool]]) -> None:
    store = Store()
    loading = make(store)
    for number, (first, last, waits) in enumerate(orders):
        before = [set(store.now[0]), set(store.now[2])]
        loading.order(order(number, first, last))
        if waits:
            assert carry_out(loading) == Holding(number, len(first) + len(last))
            kept = [before[0] & set(first), before[1] & set(last)]
            for layer, ids in store.history:
                assert kept[layer // 2] <= set(ids), "what stays is there at every moment"
        else:
            loading.poll()
        store.history.clear()
    number, (first, last, _) = len(orders) - 1, orders[-1]
    if loading.is_busy:
        assert carry_out(loading) == Holding(number, len(first) + len(last))
    assert store.now == {0: tuple(first), 2: tuple(last)}
    loading.close()


def step_of(layer: int, expert_ids: list[list[int]]) -> ExpertsStep:
    """A step of one home with these pairs [n, K]."""
    ids = np.array(expert_ids, np.int16)
    slots = np.arange(len(ids), dtype=np.int32)
    batch = Batch(kind=BatchKind.RESULT, src=1, dst=0, layer=layer, count=len(ids), slots=slots, generations=slots)
    weights = np.full(ids.shape, 0.5, np.float32)
    return ExpertsStep(BlockId(BlockKind.EXPERTS, layer), slots, ids, weights, [Outgoing(batch, slice(0, len(ids)))])


def test_a_token_whose_expert_has_gone_is_not_answered() -> None:
    loading = make(Store())
    step = step_of(0, [[0, -1], [2, 1], [1, -1]])
    assert loading.answerable(step) is step
    loading.order(order(1, [0, 2], [3, 4]))
    carry_out(loading)
    rest = loading.answerable(step)
    assert rest.slab_rows.tolist() == [0]
    assert rest.replies[0].batch.slots.tolist() == [0]
    fine = step_of(0, [[0, -1], [2, 0]])
    assert loading.answerable(fine) is fine
    other = step_of(2, [[5, -1]])
    assert loading.answerable(other) is other, "this worker started with the others: homes know what it held"
    loading.close()


def test_a_late_worker_answers_for_what_it_holds_alone() -> None:
    loading = make(Store(), is_late=True)
    assert loading.answerable(step_of(2, [[5, -1], [3, 4], [-1, -1]])).slab_rows.tolist() == [1, 2]
    loading.close()


def test_real_weights_come_and_go(checkpoint_factory: Any) -> None:
    """After any order the worker computes what one would that has held these experts from the start."""
    path = checkpoint_factory("qwen3_moe", 0)
    config = load_model_config(path)

    def executor(held: tuple[int, ...]) -> ExpertsExecutor:
        blocks = Blocks(False, dict.fromkeys(range(config.num_layers), held))
        model = load_model(path, config, blocks, dtype=torch.float32, device="cpu")
        made = ExpertsExecutor(model, 1, 8, str(path))
        made.slab.copy_(torch.randn(made.slab.shape, generator=torch.Generator().manual_seed(0)))
        return made

    store = executor((0, 1))
    core = ExpertsCore(rank=1, home_ranks=(0,), slots_per_home=8, queues=MicroQueues(config.num_layers, 1))
    loading = ExpertLoading(store, core, config.sparse_layers, config.num_experts, is_late=False)
    held = [(1, 4, 6), (), (0, 2, 3, 5), (3,)]
    for number, ids in enumerate(held):
        loading.order(HoldExperts(number, [list(ids)] * config.num_layers))
        fresh = executor(ids)
        assert carry_out(loading) == Holding(number, fresh.parameter_bytes)
        assert store.held() == fresh.held()
        for layer in range(config.num_layers if ids else 0):
            step = step_of(layer, [[ids[0], ids[-1] if len(ids) > 1 else -1], [ids[-1], -1]])
            assert torch.equal(store.experts(step), fresh.experts(step))
    loading.close()


@pytest.mark.parametrize("change", ["other weights", "gone"])
def test_a_checkpoint_that_has_changed_is_a_complaint(checkpoint_factory: Any, tmp_path: Any, change: str) -> None:
    """Experts of two models would give neither's answers."""
    path = tmp_path / "model"
    shutil.copytree(checkpoint_factory("qwen3_moe", 0), path)
    config = load_model_config(path)
    model = load_model(path, config, Blocks(False, {0: (0,)}), dtype=torch.float32, device="cpu")
    store = ExpertsExecutor(model, 1, 8, str(path))
    if change == "gone":
        shutil.rmtree(path)
    else:
        shutil.copyfile(checkpoint_factory("qwen3_moe", 1) / "model.safetensors", path / "model.safetensors")
    loading = ExpertLoading(
        store, SimpleNamespace(awaits=lambda *_: False), config.sparse_layers, config.num_experts, is_late=False
    )
    loading.order(HoldExperts(1, [[0, 1]] + [[]] * (config.num_layers - 1)))
    assert "has changed since this worker has read it: restart the server" in carry_out(loading).complaint
    assert store.held() == {0: (0,)}
    loading.close()
