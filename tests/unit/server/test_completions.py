"""/v1/completions: shapes, fields and streams."""

from __future__ import annotations

import pytest

from amoe.types import CapacityUsage, SamplingParams
from tests.unit.server.conftest import Harness, assert_error, events


async def test_response(server: Harness):
    response = await server.complete(model="fake", prompt="the dog ", max_tokens=4)
    assert response.status_code == 200
    body = response.json()
    assert body.pop("id").startswith("cmpl-")
    assert isinstance(body.pop("created"), int)
    assert body == {
        "object": "text_completion",
        "model": "fake",
        "choices": [
            {
                "index": 0,
                "text": server.engine.tokenizer.decode((server.ids("the dog ") * 4)[:4]),
                "logprobs": None,
                "finish_reason": "length",
                "stop_reason": None,
            }
        ],
        "usage": {
            "prompt_tokens": len(server.ids("the dog ")),
            "completion_tokens": 4,
            "total_tokens": len(server.ids("the dog ")) + 4,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    }


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("abc", ["abc"]),
        (["abc", "xyz"], ["abc", "xyz"]),
        ([70, 71, 72], [[70, 71, 72]]),
        ([[70, 71], [72]], [[70, 71], [72]]),
    ],
)
async def test_kinds_of_prompt(server: Harness, prompt, expected):
    body = (await server.complete(prompt=prompt, max_tokens=2, n=2)).json()
    sent = [request.prompt_token_ids for request in server.worker.requests]
    ids = [server.ids(entry) if isinstance(entry, str) else entry for entry in expected]
    assert sent == [entry for entry in ids for _ in range(2)]
    assert [choice["index"] for choice in body["choices"]] == list(range(2 * len(expected)))
    assert body["usage"]["prompt_tokens"] == sum(map(len, ids))
    assert body["usage"]["completion_tokens"] == 2 * 2 * len(expected)


async def test_every_sampling_field_reaches_the_worker(server: Harness):
    fields = {
        "max_tokens": 7,
        "min_tokens": 2,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 11,
        "min_p": 0.1,
        "seed": 42,
        "presence_penalty": 0.3,
        "frequency_penalty": -0.4,
        "repetition_penalty": 1.2,
        "stop": ["x", "yz"],
        "stop_token_ids": [7, 8],
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,
        "ignore_eos": True,
        "logprobs": 3,
        "capacity": "exact",
        "droppable_spans": [[0, 1], [1, 3]],
    }
    assert (await server.complete(prompt=[70, 71, 72], **fields)).status_code == 200
    tuples = {"stop": ("x", "yz"), "stop_token_ids": (7, 8), "droppable_spans": ((0, 1), (1, 3))}
    assert server.params == SamplingParams(**(fields | tuples))


async def test_null_is_the_default(server: Harness):
    names = [name for name in SamplingParams.__dataclass_fields__ if name not in ("MAX_LOGPROBS", "MAX_STOP_IDS")]
    others = ("n", "stream", "stream_options", "echo", "model", "user", "add_special_tokens", "suffix", "logit_bias")
    response = await server.complete(prompt="a", **dict.fromkeys([*names, *others]))
    assert response.status_code == 200
    assert server.params == SamplingParams(max_tokens=16)


async def test_max_tokens_defaults_to_16_or_what_fits(server: Harness):
    await server.complete(prompt=[70] * 10)
    assert server.params.max_tokens == 16
    await server.complete(prompt=[70] * 60)
    assert server.params.max_tokens == 4


async def test_seeds_of_choices_differ_reproducibly(server: Harness):
    await server.complete(prompt="a", n=3, seed=2**63 - 2, max_tokens=1)
    seeds = [request.params.seed for request in server.worker.requests]
    assert seeds == [2**63 - 2, 2**63 - 1, -(2**63)]


async def test_stop_string_and_reason(server: Harness):
    body = (await server.complete(prompt="ab\n", max_tokens=40, stop="\na")).json()
    choice = body["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("ab", "stop", "\na")
    stop_id = server.ids("b")[0]
    body = (await server.complete(prompt="ab", max_tokens=40, stop_token_ids=[stop_id])).json()
    choice = body["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("a", "stop", stop_id)


async def test_end_of_text(server: Harness):
    server.worker.script = lambda request: [70, 0]
    choice = (await server.complete(prompt="a")).json()["choices"][0]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", None)
    assert choice["text"] == server.engine.tokenizer.decode([70])


async def test_logprobs(server: Harness):
    ids = server.ids("☃")
    assert len(ids) == 3
    body = (await server.complete(prompt="a", max_tokens=1, logprobs=2)).json()
    name = server.engine.tokenizer.decode([5])
    logprobs = body["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["a"]
    assert logprobs["token_logprobs"] == [-0.5]
    assert logprobs["top_logprobs"] == [{"a": -0.5, name: -1.5}]
    assert logprobs["text_offset"] == [0]
    server.worker.script = lambda request: [*server.ids("a"), *ids, *server.ids("b")]
    logprobs = (await server.complete(prompt="a", logprobs=3)).json()["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["a", "bytes:\\xe2", "bytes:\\x98", "bytes:\\x83", "b"]
    assert logprobs["text_offset"] == [0, 1, 2, 3, 4]
    assert min(logprobs["top_logprobs"][0].values()) == -9999.0  # no infinities in JSON
    logprobs = (await server.complete(prompt="a", logprobs=0, max_tokens=1)).json()["choices"][0]["logprobs"]
    assert len(logprobs["top_logprobs"][0]) == 1


async def test_echo(server: Harness):
    body = (await server.complete(prompt=["ab ", "cd "], max_tokens=2, echo=True, n=2)).json()
    assert [choice["text"][:3] for choice in body["choices"]] == ["ab ", "ab ", "cd ", "cd "]
    body = (await server.complete(prompt=server.ids("ab "), max_tokens=1, echo=True)).json()
    assert body["choices"][0]["text"] == "ab a"
    response = await server.complete(prompt="a", max_tokens=2, echo=True, stream=True)
    assert "".join(chunk["choices"][0]["text"] for chunk in events(response)) == "aaa"


@pytest.mark.parametrize("as_ids", [False, True])
async def test_echo_with_logprobs_tells_those_of_the_prompt(server: Harness, as_ids: bool):
    ids = server.ids("ab c")
    fields = {"prompt": ids if as_ids else "ab c", "max_tokens": 1, "echo": True, "logprobs": 1}
    (choice,) = (await server.complete(**fields)).json()["choices"]
    names = [server.engine.tokenizer.decode([token]) for token in ids]
    assert choice["text"] == "ab ca"
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == [*names, "a"]
    assert logprobs["token_logprobs"] == [None, *[-2.5] * (len(ids) - 1), -0.5]
    assert logprobs["top_logprobs"] == [None, *({name: -2.5} for name in names[1:]), {"a": -0.5}]
    assert logprobs["text_offset"] == [sum(map(len, names[:index])) for index in range(len(ids) + 1)]
    assert server.params.prompt_logprobs == server.params.logprobs == 1


async def test_a_stream_tells_the_prompt_in_its_first_chunk(server: Harness):
    fields = {"prompt": ["ab c", "xy"], "max_tokens": 3, "echo": True, "logprobs": 2}
    whole = (await server.complete(**fields)).json()["choices"]
    chunks = [chunk["choices"][0] for chunk in events(await server.complete(stream=True, **fields))]
    for index, prompt in enumerate(fields["prompt"]):
        parts = [chunk for chunk in chunks if chunk["index"] == index]
        assert parts[0]["text"].startswith(prompt)
        assert "".join(part["text"] for part in parts) == whole[index]["text"]
        for name, values in whole[index]["logprobs"].items():
            assert [value for part in parts for value in part["logprobs"][name]] == values


async def test_a_prompt_is_scored_once(server: Harness):
    refused = await server.complete(prompt="ab c", echo=True, logprobs=2, n=2)
    assert "n = 1" in assert_error(refused, 400, "n")


async def test_the_prompt_alone_can_be_asked_for(server: Harness):
    body = (await server.complete(prompt="ab c", max_tokens=0, echo=True, logprobs=0)).json()
    (choice,) = body["choices"]
    count = len(server.ids("ab c"))
    assert (choice["text"], choice["finish_reason"]) == ("ab c", "length")
    assert choice["logprobs"]["token_logprobs"] == [None, *[-2.5] * (count - 1)]
    assert (body["usage"]["prompt_tokens"], body["usage"]["completion_tokens"]) == (count, 0)
    message = assert_error(await server.complete(prompt="a", max_tokens=0), 400, "max_tokens")
    assert "echo" in message


async def test_usage_tells_what_capacity_has_done(server: Harness):
    server.worker.capacity = CapacityUsage(10, 3, 2, 0.25)
    expected = {"pairs": 20, "pairs_dropped": 6, "pairs_rerouted": 4, "gate_mass_lost": 0.25}
    body = (await server.complete(prompt="a", max_tokens=2, n=2)).json()
    assert body["usage"]["capacity"] == expected
    options = {"stream": True, "stream_options": {"include_usage": True}}
    *_, last = events(await server.complete(prompt="a", max_tokens=2, n=2, **options))
    assert last["usage"]["capacity"] == expected
    *_, last = events(await server.chat(max_tokens=2, n=2, **options))
    assert last["usage"]["capacity"] == expected


@pytest.mark.parametrize(
    "fields",
    [
        {"capacity": "some"},
        {"capacity": 1},
        {"droppable_spans": "0-3"},
        {"droppable_spans": [3]},
        {"droppable_spans": [[0, 1, 2]]},
        {"droppable_spans": [[0, "1"]]},
        {"droppable_spans": [[2, 2]]},
        {"droppable_spans": [[-1, 2]]},
        {"droppable_spans": [[0, 4]]},
        {"droppable_spans": [[0, 1]] * 65},
        {"prompt": [[70, 71, 72], [70]], "droppable_spans": [[0, 1]]},
    ],
)
async def test_wrong_capacity_fields_are_named(server: Harness, fields):
    response = await server.complete(**{"prompt": [70, 71, 72], "max_tokens": 1} | fields)
    name = "capacity" if "capacity" in fields else "droppable_spans"
    assert name in assert_error(response, 400, name)


async def test_spans_of_a_chat_are_of_its_templated_prompt(server: Harness):
    assert (await server.chat(capacity="exact", droppable_spans=[[0, 2]], max_tokens=1)).status_code == 200
    assert (server.params.capacity, server.params.droppable_spans) == ("exact", ((0, 2),))
    assert_error(await server.chat(droppable_spans=[[0, 1000]], max_tokens=1), 400, "droppable_spans")


async def test_request_id_and_model_names(server: Harness):
    body = (await server.complete(prompt="a", max_tokens=1, request_id="mine", model="alias")).json()
    assert (body["id"], body["model"]) == ("cmpl-mine", "alias")
    assert (await server.complete(prompt="a", max_tokens=1)).json()["model"] == "fake"


async def test_unknown_fields_are_allowed(server: Harness):
    response = await server.complete(prompt="a", max_tokens=1, something_new={"x": 1}, metadata={"a": "b"}, store=False)
    assert response.status_code == 200


async def test_stream(server: Harness):
    chunks = events(await server.complete(prompt="ab", max_tokens=4, stream=True))
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "abab"
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert all(chunk["object"] == "text_completion" and "usage" not in chunk for chunk in chunks)
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]


async def test_stream_bytes_are_exact(server: Harness):
    response = await server.complete(prompt="☃", max_tokens=3, stream=True, request_id="r", model="fake")
    head, tail = response.text.split('"created":', 1)
    assert head == 'data: {"id":"cmpl-r","object":"text_completion",'
    _, rest = tail.split(",", 1)
    assert rest == (
        '"model":"fake","choices":[{"index":0,"text":"☃","logprobs":null,"finish_reason":"length","stop_reason":null}]}'
        "\n\ndata: [DONE]\n\n"
    )


async def test_stream_of_several_choices(server: Harness):
    chunks = events(await server.complete(prompt=["ab", "xy"], n=2, max_tokens=6, stream=True))
    texts = [""] * 4
    for chunk in chunks:
        (choice,) = chunk["choices"]
        texts[choice["index"]] += choice["text"]
    assert texts == ["ababab", "ababab", "xyxyxy", "xyxyxy"]
    assert sum(chunk["choices"][0]["finish_reason"] == "length" for chunk in chunks) == 4


async def test_stream_usage(server: Harness):
    chunks = events(
        await server.complete(prompt="ab", max_tokens=4, stream=True, stream_options={"include_usage": True})
    )
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == {
        "prompt_tokens": 2,
        "completion_tokens": 4,
        "total_tokens": 6,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = events(await server.complete(prompt="ab", max_tokens=4, stream=True, stream_options=options))
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == 4
    chunks = events(await server.complete(prompt="ab", max_tokens=4, stream=True, stream_options={}))
    assert not any("usage" in chunk for chunk in chunks)


async def test_stream_logprobs_keep_their_offsets(server: Harness):
    chunks = events(await server.complete(prompt="ab", max_tokens=5, stream=True, logprobs=1))
    offsets = [offset for chunk in chunks for offset in chunk["choices"][0]["logprobs"]["text_offset"]]
    assert offsets == [0, 1, 2, 3, 4]


async def test_stream_never_shows_a_stop_string(server: Harness):
    chunks = events(await server.complete(prompt="abc END ", max_tokens=40, stream=True, stop=[" END "]))
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "abc"
    assert chunks[-1]["choices"][0]["stop_reason"] == " END "
