"""The line of waiting sequences: in order, with siblings aside."""

from __future__ import annotations

import random

import numpy as np

from amoe.core.sequence import Sequence
from amoe.core.waiting_line import WaitingLine
from amoe.types import SamplingParams


def make(request_id, priority=0):
    return Sequence(request_id, SamplingParams(), np.arange(3, dtype=np.int32), 3, (priority, request_id))


def test_the_least_is_first_wherever_it_came():
    line = WaitingLine()
    sequences = [make(number, priority) for number, priority in enumerate([0, 5, -1, 0, 5, -1])]
    random.Random(1).shuffle(sequences)
    for sequence in sequences:
        line.add(sequence)
    seen = []
    while line.first is not None:
        seen.append(line.first.order)
        line.remove(line.first)
    assert seen == sorted(sequence.order for sequence in sequences)
    assert not line


def test_whoever_stands_aside_keeps_nobody_waiting():
    line = WaitingLine()
    leader, sibling, other = make(1), make(2), make(3)
    line.add(leader)
    line.add_aside(sibling, 1)
    line.add(other)
    assert (len(line), line.num_aside) == (3, 1)
    assert list(line) == [leader, sibling, other]
    line.remove(leader)
    assert line.first is other
    line.let_in(1)
    assert line.first is sibling
    assert line.num_aside == 0
    line.let_in(1)
    assert list(line) == [sibling, other]


def test_whoever_stands_aside_can_go():
    line = WaitingLine()
    first, second = make(2), make(3)
    line.add_aside(first, 1)
    line.add_aside(second, 1)
    assert line.find(2) is first
    line.remove(first)
    assert (line.find(2), line.first, len(line)) == (None, None, 1)
    line.let_in(1)
    assert line.first is second
    line.remove(second)
    assert (len(line), line.num_aside) == (0, 0)
