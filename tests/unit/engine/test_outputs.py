"""What the server is told of new tokens: once each, as columns where there is nothing else to say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from amoe.clock import ManualClock
from amoe.core.sequence import Sequence, SequenceTable, UsageColumn
from amoe.engine.messages import Outputs
from amoe.engine.outputs import OutputWriter
from amoe.engine.sampler import SampledTokens
from amoe.engine.sampling_table import (
    FINISH_COMPLETE,
    FINISH_LENGTH,
    FINISH_STOP,
    FINISH_STUCK,
    GO_ON,
    SamplingTable,
)
from amoe.types import CapacityUsage, SamplingParams, SequenceOutput, SequenceTimes

ROWS, VOCAB, EOS = 4, 100, 2


class House:
    """Sequences in rows 0, 1, 2..., numbered from 70, and a writer that knows nothing of them yet."""

    def __init__(self, *params: dict[str, Any], has_capacity: bool = False) -> None:
        self.table, self.sampling = SequenceTable(ROWS, 16, 4), SamplingTable(ROWS, VOCAB)
        self.clock = ManualClock(3.0)
        self.writer = OutputWriter(
            self.table,
            self.sampling,
            self.clock,
            lambda request_id: f"{request_id} is stuck",
            eos_token_ids=(EOS,),
            has_capacity=has_capacity,
        )
        for index, named in enumerate(params):
            self.enter(70 + index, **named)

    def enter(self, request_id: int, **named: Any) -> Sequence:
        params = SamplingParams(**{"max_tokens": 9, **named})
        sequence = Sequence(request_id, params, np.arange(3, dtype=np.int32), 3, (0, request_id))
        sequence.life.arrived_at, sequence.life.admitted_at = 1.0, 1.5
        self.table.enter(sequence)
        self.sampling.set(sequence.row, params, 0, (EOS,))
        self.writer.enter(sequence.row)
        return sequence

    def leave(self, row: int) -> None:
        sequence = self.table.sequences[row]
        assert sequence is not None
        self.table.leave(sequence)

    def say(self, rows: list[int], token_ids: list[int], codes: list[int] | None = None, **columns: Any) -> Outputs:
        sampled = SampledTokens(np.array(token_ids), **columns)
        return self.writer.write(np.array(rows), sampled, np.array(codes or [GO_ON] * len(rows), np.int8))


def test_the_first_and_the_last_token_come_with_times_and_those_between_in_columns():
    house = House({}, {})
    first = house.say([0, 1], [11, 12])
    times = SequenceTimes(0.5, 1.5)
    assert first == Outputs([SequenceOutput(70, [11], times=times), SequenceOutput(71, [12], times=times)])
    assert house.say([0, 1], [13, 14]) == Outputs([], [70, 71], [13, 14])
    last = house.say([0, 1], [15, 16], [FINISH_LENGTH, GO_ON])
    assert last == Outputs([SequenceOutput(70, [15], finish_reason="length", times=times)], [71], [16])
    assert [(output.request_id, output.token_ids) for output in last.each()] == [(70, [15]), (71, [16])]


def test_a_newcomer_between_others_does_not_disturb_their_columns():
    house = House({}, {})
    house.say([0, 1], [11, 12])
    house.enter(72)
    said = house.say([0, 2, 1], [13, 14, 15])
    assert ([output.request_id for output in said.outputs], said.outputs[0].token_ids) == ([72], [14])
    assert (said.request_ids, said.token_ids) == ([70, 71], [13, 15])


def test_who_takes_over_a_row_is_not_mistaken_for_the_one_before():
    house = House({})
    house.say([0], [11])
    assert house.say([0], [12]).outputs == []
    house.leave(0)
    house.enter(99, logprobs=0)
    assert [output.request_id for output in house.say([0], [13], **logprobs_of(1)).outputs] == [99]


def logprobs_of(count: int) -> dict[str, Any]:
    return {
        "logprobs": np.full(count, -0.5, np.float32),
        "ranks": np.ones(count, np.int64),
        "top_ids": np.tile(np.array([7, 8]), (count, 1)),
        "top_logprobs": np.tile(np.array([-0.5, -1.0], np.float32), (count, 1)),
    }


def test_log_probabilities_come_with_each_token_of_those_who_ask():
    house = House({}, {"logprobs": 1}, {"logprobs": 0})
    for _ in range(2):
        said = house.say([0, 1, 2], [11, 12, 13], **logprobs_of(3))
    assert (said.request_ids, said.token_ids) == ([70], [11])
    assert [(output.request_id, output.logprobs[0].top_ids) for output in said.outputs] == [(71, [7]), (72, [])]


def test_experts_are_told_as_long_as_tokens_come():
    house = House({"return_routed_experts": True})
    for _ in range(2):
        house.table.sequences[0].routed.append(np.array([[[4, 5]]], np.int16))
        (output,) = house.say([0], [11]).outputs
        assert output.routed_experts == np.array([4, 5], "<i2").tobytes()


def test_what_capacity_has_done_is_told_with_every_token():
    house = House({}, has_capacity=True)
    for count in (1, 2):
        house.table.usage[0, UsageColumn.PAIRS] = 8 * count
        house.table.usage[0, UsageColumn.TOKENS] = count
        house.table.usage[0, UsageColumn.MASS_LOST] = 0.25 * count
        (output,) = house.say([0], [11]).outputs
        assert output.capacity == CapacityUsage(8 * count, 0, 0, 0.25)


@pytest.mark.parametrize(
    ("code", "token", "wanted"),
    [
        (FINISH_STOP, 5, {"token_ids": [5], "finish_reason": "stop", "stop_token": 5}),
        (FINISH_LENGTH, 5, {"token_ids": [5], "finish_reason": "length", "stop_token": None}),
        (FINISH_COMPLETE, 5, {"token_ids": [5], "finish_reason": "stop", "stop_token": None}),
        (FINISH_COMPLETE, EOS, {"token_ids": [EOS], "finish_reason": "stop", "stop_token": EOS}),
        (FINISH_STUCK, 5, {"token_ids": [], "finish_reason": "error", "error": "70 is stuck"}),
    ],
)
def test_how_a_sequence_ends(code: int, token: int, wanted: dict[str, Any]):
    house = House({})
    house.say([0], [11])
    (output,) = house.say([0], [token], [code]).outputs
    assert {name: getattr(output, name) for name in wanted} == wanted


def test_who_asks_for_no_token_gets_none():
    house = House({"max_tokens": 0, "prompt_logprobs": 0})
    (output,) = house.say([0], [11], [FINISH_LENGTH]).outputs
    assert (output.token_ids, output.finish_reason) == ([], "length")
