"""μ-queues and token slots: counters that equal the contents, order of arrival, generations that tell old from new."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from amoe.core.micro_queue import MicroQueues
from amoe.core.token_slots import TokenSlots
from amoe.policy.scheduler import NEVER, num_stages
from amoe.types import BlockId, BlockKind
from tests.unit.core.examples import examples

pushes = st.lists(
    st.tuples(
        st.just("push"),
        st.integers(0, 20),
        st.lists(st.integers(0, 9), max_size=5),
        st.floats(0, 100, allow_nan=False),
    )
    | st.tuples(st.just("drain"), st.integers(0, 20), st.none(), st.none()),
    max_size=40,
)


@examples(100)
@given(st.integers(1, 4), st.integers(1, 3), pushes)
def test_counters_equal_contents(num_layers, num_waves, actions):
    queues = MicroQueues(num_layers, num_waves)
    stages = num_stages(num_layers)
    model: list[list[tuple[int, int, float]]] = [[] for _ in range(stages * num_waves)]
    token = 0
    for action, number, iterations, now in actions:
        index = number % len(model)
        if action == "push":
            names = np.arange(token, token + len(iterations))
            token += len(iterations)
            queues.push(queues.block(index), (names, -names), np.asarray(iterations, np.int32), now)
            model[index] += [(int(name), iteration, now) for name, iteration in zip(names, iterations, strict=True)]
        else:
            columns = queues.drain(index)
            if model[index]:
                names = [name for name, _, _ in model[index]]
                assert columns is not None
                assert columns[0].tolist() == names
                assert columns[1].tolist() == [-name for name in names]
            else:
                assert columns is None
            model[index] = []
        view = queues.view()
        assert view.depth.tolist() == [len(tokens) for tokens in model]
        assert view.ready.tolist() == [bool(tokens) for tokens in model]
        assert view.oldest.tolist() == [min((at for *_, at in tokens), default=math.inf) for tokens in model]
        kappas = [[stages * iteration + i % stages for _, iteration, _ in tokens] for i, tokens in enumerate(model)]
        assert view.min_kappa.tolist() == [min(kappa, default=NEVER) for kappa in kappas]


@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("num_waves", [1, 2])
def test_blocks_are_numbered_wave_by_wave_in_the_order_of_the_model(num_layers, num_waves):
    queues = MicroQueues(num_layers, num_waves)
    order = []
    for wave in range(num_waves):
        for layer in range(num_layers):
            order += [BlockId(BlockKind.ATTENTION, layer, wave), BlockId(BlockKind.EXPERTS, layer, wave)]
        order.append(BlockId(BlockKind.HEAD, num_layers, wave))
    assert [queues.block(index) for index in range(len(order))] == order
    assert [queues.index(block) for block in order] == list(range(len(order)))
    assert len(queues.depth) == len(order)


@examples(100)
@given(st.integers(1, 9), st.lists(st.tuples(st.sampled_from("art"), st.integers(0, 9)), max_size=40))
def test_slots_are_given_once_and_old_names_are_not_current(num_slots, actions):
    slots = TokenSlots(num_slots)
    held: list[tuple[int, int]] = []
    old: list[tuple[int, int]] = []
    for action, number in actions:
        if action == "a":
            given_slots = slots.allocate(min(number, slots.num_free))
            assert set(given_slots.tolist()).isdisjoint(slot for slot, _ in held)
            held += [(int(slot), int(slots.generation[slot])) for slot in given_slots]
        elif held:
            slot, generation = held.pop(number % len(held))
            old.append((slot, generation))
            if action == "r":
                slots.release(np.asarray([slot], np.int32))
            else:
                slots.renew(np.asarray([slot], np.int32))
                held.append((slot, int(slots.generation[slot])))
        assert len({slot for slot, _ in held}) == len(held) == num_slots - slots.num_free
        for names, current in ((held, True), (old, False)):
            array = np.asarray(names, np.int32).reshape(-1, 2)
            assert (slots.is_current(array[:, 0], array[:, 1]) == current).all()


def test_more_slots_than_there_are_is_an_error():
    slots = TokenSlots(2)
    with pytest.raises(AssertionError, match="3 slots asked for, 2 free"):
        slots.allocate(3)
    with pytest.raises(AssertionError, match="more slots released"):
        slots.release(np.asarray([0], np.int32))


def test_a_moved_queue_takes_its_statistics_along():
    queues = MicroQueues(num_layers=1, num_waves=2)
    early, late = BlockId(BlockKind.EXPERTS, 0, 0), BlockId(BlockKind.EXPERTS, 0, 1)
    queues.push(late, (np.array([7]),), np.array([9], np.int32), 5.0)
    queues.push(early, (np.array([1, 2]),), np.array([4, 3], np.int32), 2.0)
    source, target = queues.index(early), queues.index(late)
    queues.move(source, target)
    assert (queues.depth[source], queues.oldest[source]) == (0, np.inf)
    assert (queues.depth[target], queues.oldest[target]) == (3, 2.0)
    assert queues.min_kappa[target] == 3 * 3 + 1
    assert queues.drain(source) is None
    assert sorted(queues.drain(target)[0].tolist()) == [1, 2, 7]
