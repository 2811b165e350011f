"""Traces of cores: what goes into a file comes out of it. That they can be repeated is in `tests/integration`."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from amoe.config import CacheConfig, EngineConfig, PlacementConfig, SchedulerConfig
from amoe.core.members import Roster
from amoe.core.trace import Trace, decode_batch, decode_roster, encode_batch, record
from amoe.core.worker import ModelShape, WorkerCore
from amoe.sim.replay import new_request
from amoe.types import Batch, BatchKind, SamplingParams

CONFIG = EngineConfig(
    model="m",
    placement=PlacementConfig(colocated=2),
    scheduler=SchedulerConfig(schedule="defrag", max_num_seqs=3),
    cache=CacheConfig(block_size=4),
)
SHAPE = ModelShape((False, True), 6)


def make_batch(num_rows: int) -> Batch:
    column = np.arange(num_rows, dtype=np.int32)
    return Batch(
        kind=BatchKind.DISPATCH,
        src=1,
        dst=0,
        layer=1,
        wave=0,
        epoch=3,
        count=num_rows,
        slots=column,
        generations=column + 1,
        iterations=column + 2,
        expert_ids=np.array([[0, -1]] * num_rows, np.int16).reshape(num_rows, 2),
        expert_weights=np.full((num_rows, 2), 0.1, np.float32),
        latest_iteration=7,
    )


@pytest.mark.parametrize("num_rows", [0, 3])
def test_a_batch_survives_json(num_rows):
    batch = make_batch(num_rows)
    encoded = encode_batch(batch)
    decoded = decode_batch(json.loads(json.dumps(encoded)))
    assert encode_batch(decoded) == encoded
    assert decoded.kind is BatchKind.DISPATCH
    for name in ("slots", "generations", "iterations", "expert_ids", "expert_weights"):
        before, after = getattr(batch, name), getattr(decoded, name)
        assert after.dtype == before.dtype
        assert after.ndim == before.ndim
        assert len(after) == num_rows


def make_trace() -> Trace:
    core = WorkerCore(CONFIG, SHAPE, 0, num_kv_blocks=20, max_model_len=40)
    trace = record(core, CONFIG, SHAPE)
    core.attention.batcher.add(5, np.array([1, 2, 3], np.int32), SamplingParams(max_tokens=4))
    core.on_batch(make_batch(2), 0.25)
    core.start(0.25)
    step = core.next_step(0.25)
    core.attention.on_attention(step, None, None, 0.5)
    return trace


def test_all_calls_of_a_shell_are_recorded():
    trace = make_trace()
    calls = [(entry.call, entry.now) for entry in trace.entries]
    assert calls == [("add", None), ("on_batch", 0.25), ("start", 0.25), ("next_step", 0.25), ("on_attention", 0.5)]
    assert trace.entries[0].given == {
        "request_id": 5,
        "token_ids": [1, 2, 3],
        "params": {
            "max_tokens": 4,
            "prompt_logprobs": None,
            "capacity": "best_effort",
            "droppable_spans": [],
            "priority": 0,
            "cache_salt": "",
            "return_routed_experts": False,
        },
        "sibling_of": None,
        "num_generated": 0,
        "num_routed": 0,
    }
    assert trace.entries[1].said == [True, True]
    assert trace.entries[3].said["block"] == ["ATTENTION", 0, 0]


def test_a_roster_survives_its_line():
    config = replace(CONFIG, placement=PlacementConfig(expert_workers=2))
    shape = ModelShape((False, True), 6)
    core = WorkerCore(config, shape, 0, num_kv_blocks=20, max_model_len=40)
    trace = record(core, config, shape)
    owners = np.array([[[-1, -1]] * 6, [[0, 1], [1, -1]] * 3], np.int16)
    core.on_roster(Roster(7, [0, -1, 3], owners), 0.5)
    core.attention.recovery.retry(0.75)
    entries = Trace.from_lines(trace.to_lines()).entries
    assert [(entry.call, entry.now, entry.said) for entry in entries] == [("on_roster", 0.5, []), ("retry", 0.75, [])]
    told = decode_roster(entries[0].given)
    assert (told.version, told.incarnations, told.owners.dtype) == (7, [0, -1, 3], np.int16)
    assert np.array_equal(told.owners, owners)


def test_whoever_comes_late_is_made_anew_as_one_who_came_late():
    owners = np.zeros((2, 6, 1), np.int16)
    core = WorkerCore(
        CONFIG, SHAPE, 1, num_kv_blocks=20, max_model_len=40, owners=owners, incarnation=2, incarnations=[5, 1]
    )
    origin = Trace.from_lines(record(core, CONFIG, SHAPE, owners).to_lines()).origin
    again = origin.make_core()
    assert again.is_late
    assert (again.members.incarnation, again.members.incarnations) == (2, [5, 2])


def test_what_is_given_is_recorded_as_it_was():
    core = WorkerCore(CONFIG, SHAPE, 0, num_kv_blocks=20, max_model_len=40)
    trace = record(core, CONFIG, SHAPE)
    batch = make_batch(2)
    core.on_batch(batch, 0.0)
    batch.slots.fill(99)  # the transport takes its memory back
    assert trace.entries[0].given["slots"] == [0, 1]


def test_a_trace_survives_its_lines():
    trace = make_trace()
    loaded = Trace.from_lines(trace.to_lines())
    assert loaded == trace
    core = loaded.origin.make_core()
    assert core.attention.batcher.blocks.num_blocks == 20


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "not a trace"),
        (["nonsense"], "not a trace"),
        (["{}"], "not a trace"),
        (['{"format": 99}'], "format 99"),
        (['{"format": 5, "config": {"model": "m"}}'], "not a trace"),
    ],
)
def test_other_files_are_refused(lines, message):
    with pytest.raises(ValueError, match=message):
        Trace.from_lines(lines)


def test_a_request_that_has_begun_elsewhere_is_given_as_such():
    core = WorkerCore(CONFIG, SHAPE, 0, num_kv_blocks=20, max_model_len=40)
    trace = record(core, CONFIG, SHAPE)
    core.attention.batcher.add(4, np.array([1, 2, 3], np.int32), SamplingParams(max_tokens=4))
    params = SamplingParams(max_tokens=4, prompt_logprobs=0, return_routed_experts=True)
    sequence = core.attention.batcher.add(5, np.array([1, 2, 3, 7], np.int32), params, num_generated=1, num_routed=3)
    assert (sequence.prompt_len, list(sequence.unscored), sequence.num_sparable) == (3, [], 3)
    assert core.attention.batcher.waiting.first is sequence
    request = new_request(trace.entries[1])
    assert (request.request_id, request.num_generated, request.num_routed) == (5, 1, 3)
    assert request.prompt_token_ids.tolist() == [1, 2, 3, 7]
