"""Deltas of a conversation as items and events, held against OpenAI's own types."""

from __future__ import annotations

import pytest

from amoe.engine.generation import GenerationDelta
from amoe.errors import EngineDeadError, RequestError
from amoe.server.responses.assembler import ResponseAssembler
from amoe.server.responses.render import response_head, response_usage
from amoe.server.responses.schemas import ResponsesRequest
from amoe.server.sampling import SamplingDefaults
from tests.unit.server.deltas import USAGE, call, nothing, say, think
from tests.unit.server.responses.openai_types import check_response, check_stream


def assembler(*, logprobs: bool = False, with_summary: bool = False) -> ResponseAssembler:
    head = response_head(ResponsesRequest(input="x"), "resp_1", "fake", 1, SamplingDefaults())

    def entries(delta: GenerationDelta):
        entry = {"token": "t", "logprob": -0.5, "bytes": [116]}
        return [{**entry, "top_logprobs": [entry]} for _ in delta.token_ids]

    return ResponseAssembler(head, entries if logprobs else None, with_summary=with_summary)


def stream(assembler: ResponseAssembler, deltas, usage=None):
    events = assembler.begin()
    for delta in deltas:
        events += assembler.push(delta)
    return events + assembler.finish(deltas[-1].finish_reason, response_usage(usage or USAGE, 3))


def test_text():
    response = check_stream(stream(assembler(), [say("a"), nothing(), say("b", "stop")]))
    assert response["status"] == "completed"
    assert isinstance(response["completed_at"], int)
    (item,) = response["output"]
    assert item["id"].startswith("msg_")
    assert item["status"] == "completed"
    assert item["content"] == [{"type": "output_text", "text": "ab", "annotations": [], "logprobs": []}]
    assert response["usage"] == {
        "input_tokens": 5,
        "input_tokens_details": {"cached_tokens": 2, "cache_write_tokens": 0},
        "output_tokens": 7,
        "output_tokens_details": {"reasoning_tokens": 3},
        "total_tokens": 12,
    }


def test_cut_off():
    response = check_stream(stream(assembler(), [say("a", "length")]))
    assert response["status"] == "incomplete"
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}
    assert response["completed_at"] is None
    assert response["output"][0]["status"] == "incomplete"


@pytest.mark.parametrize(("arguments", "status"), [('{"a": 1}', "completed"), ('{"a": 1', "incomplete")])
def test_a_call_is_as_complete_as_its_arguments(arguments, status):
    response = check_stream(stream(assembler(), [call(0, "f", arguments), nothing("length")]))
    assert response["status"] == "incomplete"
    assert response["output"][0]["status"] == status


def test_nothing_said_is_an_empty_message():
    response = check_stream(stream(assembler(), [nothing("stop")]))
    assert [item["content"][0]["text"] for item in response["output"]] == [""]


def test_thoughts_text_and_calls():
    deltas = [
        *(think("hm"), think("m"), say("I "), say("look"), nothing()),
        *(call(0, "f", '{"a"'), call(0, None, ": 1}"), call(1, "g", ""), call(1, None, "{}", "tool_calls")),
    ]
    response = check_stream(stream(assembler(), deltas))
    reasoning, message, first, second = response["output"]
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "hmm"}]
    assert reasoning["summary"] == []
    assert message["content"][0]["text"] == "I look"
    assert (first["name"], first["arguments"], first["call_id"]) == ("f", '{"a": 1}', "call_0")
    assert (second["name"], second["arguments"], second["call_id"]) == ("g", "{}", "call_1")
    assert first["id"] != first["call_id"]
    assert response["status"] == "completed"


def test_one_delta_may_hold_everything():
    delta = call(0, "f", "{}", "tool_calls")
    delta.reasoning, delta.content = "hm", "so"
    response = check_stream(stream(assembler(), [delta]))
    assert [item["type"] for item in response["output"]] == ["reasoning", "message", "function_call"]


def test_text_after_a_call_is_a_message_of_its_own():
    response = check_stream(stream(assembler(), [say("a"), call(0, "f", "{}"), say("b", "stop")]))
    assert [item["type"] for item in response["output"]] == ["message", "function_call", "message"]


def test_summary_is_the_thoughts():
    events = stream(assembler(with_summary=True), [think("hm"), think("m"), say("so", "stop")])
    response = check_stream(events)
    assert response["output"][0]["summary"] == [{"type": "summary_text", "text": "hmm"}]
    summary = [event for event in events if "summary" in event["type"]]
    assert [event["type"].rpartition("summary")[2] for event in summary] == [
        *("_part.added", "_text.delta", "_text.done", "_part.done")
    ]


def test_logprobs_come_with_the_text_of_their_tokens():
    deltas = [think("hm"), nothing(), say("a"), nothing(), say("b"), nothing("stop")]
    response = check_stream(stream(assembler(logprobs=True), deltas))
    # The token of the thoughts has none; the one between waits for the text that it may be part of; the last ends it.
    assert len(response["output"][1]["content"][0]["logprobs"]) == 5


@pytest.mark.parametrize(
    ("error", "code", "word"),
    [
        (EngineDeadError("worker 0 has gone"), "server_error", "worker 0"),
        (RequestError("no token is left", "structured_outputs"), "invalid_prompt", "no token"),
        (RuntimeError("/secret/path"), "server_error", "the server failed"),
    ],
)
def test_failure(error, code, word):
    built = assembler()
    events = [*built.begin(), *built.push(say("a")), *built.fail(error)]
    response = check_stream(events)
    assert response["status"] == "failed"
    assert response["error"]["code"] == code
    assert word in response["error"]["message"]
    assert response["output"][0]["status"] == "incomplete"
    assert events[-2]["type"] == "error"
    assert events[-2]["message"] == response["error"]["message"]
    assert built.error is error


def test_cancelled():
    built = assembler()
    built.begin()
    built.push(say("a"))
    assert not built.is_over
    built.cancel()
    assert built.is_over
    assert check_response(built.body).status == "cancelled"
    assert built.body["output"][0]["status"] == "incomplete"


def test_snapshots_do_not_grow():
    built = assembler(logprobs=True)
    events = built.begin() + built.push(say("a"))
    before = repr(events)
    built.push(say("b"))
    built.finish("stop", response_usage(USAGE, 0))
    assert repr(events) == before


def test_capacity_is_told():
    response = check_stream(stream(assembler(), [say("a", "stop")], USAGE | {"capacity": {"pairs": 3}}))
    assert response["usage"]["capacity"] == {"pairs": 3}
