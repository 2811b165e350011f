"""Fields that vLLM has beside OpenAI's: each reaches the worker, or shows in the answer, or is refused by name."""

from __future__ import annotations

import base64
import io
import logging

import numpy as np
import pytest

from amoe.engine.async_engine import ModelInfo
from amoe.engine.generation import GenerationDelta
from amoe.server.completion_choices import ChoiceWriter
from amoe.server.completion_schemas import CompletionRequest
from amoe.server.constraints import bad_word_tokens
from tests.unit.server.conftest import Harness, assert_error, events


async def test_constraints_reach_the_worker(server: Harness):
    fields = {
        "logit_bias": {"7": -100, "5": 1.5},
        "allowed_token_ids": [9, 8, 8],
        "bad_words": ["dog"],
        "cache_salt": "mine",
        "return_routed_experts": True,
    }
    assert (await server.complete(prompt=[70], max_tokens=1, **fields)).status_code == 200
    params = server.params
    assert params.logit_bias == ((5, 1.5), (7, -100.0))
    assert params.allowed_token_ids == (8, 9)
    assert params.bad_words == tuple(tuple(server.ids(text)) for text in ("dog", " dog"))
    assert (params.cache_salt, params.return_routed_experts) == ("mine", True)


async def test_bad_words_are_meant_with_and_without_a_space(server: Harness):
    variants = [tuple(server.ids(text)) for text in ("fox", " fox")]
    assert bad_word_tokens(server.engine.tokenizer, ["fox", " fox", "fox"]) == tuple(variants)


async def test_many_bad_words(server: Harness):
    words = [f"w{index}" for index in range(64)]
    assert (await server.complete(prompt="a", max_tokens=1, bad_words=words)).status_code == 200
    assert len(server.params.bad_words) == 128


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({"truncate_prompt_tokens": 3}, [77, 78, 79]),
        ({"truncate_prompt_tokens": 3, "truncation_side": "right"}, [70, 71, 72]),
        ({"truncate_prompt_tokens": 10}, list(range(70, 80))),
        ({"truncate_prompt_tokens": 100}, list(range(70, 80))),
        ({"truncate_prompt_tokens": -1}, list(range(70, 80))),
        ({"truncate_prompt_tokens": -1, "max_tokens": 60}, list(range(76, 80))),
    ],
)
async def test_prompts_are_cut(server: Harness, fields, kept):
    body = (await server.complete(**{"prompt": list(range(70, 80)), "max_tokens": 1, "echo": True} | fields)).json()
    assert server.worker.requests[-1].prompt_token_ids == kept
    assert body["usage"]["prompt_tokens"] == len(kept)
    assert body["choices"][0]["text"].startswith(server.engine.tokenizer.decode(kept))


async def test_a_prompt_that_is_too_long_fits_once_it_is_cut(server: Harness):
    assert_error(await server.complete(prompt=[70] * 64, max_tokens=4), 400, "prompt")
    assert (await server.complete(prompt=[70] * 64, max_tokens=4, truncate_prompt_tokens=-1)).status_code == 200
    assert len(server.worker.requests[-1].prompt_token_ids) == 60


async def test_token_ids(server: Harness):
    fields = {"prompt": ["ab", "xy"], "n": 2, "max_tokens": 3, "return_token_ids": True}
    whole = (await server.complete(**fields)).json()["choices"]
    for choice in whole:
        prompt = server.ids(fields["prompt"][choice["index"] // 2])
        assert choice["prompt_token_ids"] == prompt
        assert choice["token_ids"] == [*prompt, prompt[0]]
    parts = [chunk["choices"][0] for chunk in events(await server.complete(stream=True, **fields))]
    for choice in whole:
        mine = [part for part in parts if part["index"] == choice["index"]]
        assert [token for part in mine for token in part["token_ids"]] == choice["token_ids"]
        assert ["prompt_token_ids" in part for part in mine] == [True] + [False] * (len(mine) - 1)


async def test_tokens_that_are_no_text_yet_are_told_at_once(server: Harness):
    chunks = events(await server.complete(prompt="☃", max_tokens=3, stream=True, return_token_ids=True))
    assert [chunk["choices"][0]["token_ids"] for chunk in chunks] == [[token] for token in server.ids("☃")]


async def test_tokens_named_by_their_ids(server: Harness):
    body = (await server.complete(prompt="a", max_tokens=1, logprobs=2, return_tokens_as_token_ids=True)).json()
    logprobs, (token,) = body["choices"][0]["logprobs"], server.ids("a")
    assert logprobs["tokens"] == [f"token_id:{token}"]
    assert set(logprobs["top_logprobs"][0]) == {f"token_id:{token}", "token_id:5"}


@pytest.mark.parametrize("stream", [False, True])
async def test_prompt_logprobs_come_once_for_each_prompt(server: Harness, stream: bool):
    ids = server.ids("ab c")
    fields = {"prompt": "ab c", "max_tokens": 2, "n": 2, "prompt_logprobs": 2}
    if stream:
        parts = [chunk["choices"][0] for chunk in events(await server.complete(stream=True, **fields))]
    else:
        parts = (await server.complete(**fields)).json()["choices"]
    told = {part["index"]: part["prompt_logprobs"] for part in parts if "prompt_logprobs" in part}
    assert told[1] is None
    assert told[0][0] is None
    for token, entry in zip(ids[1:], told[0][1:], strict=True):
        assert list(entry) == [str(token), "5"]
        assert entry["5"] == {"logprob": -3.5, "rank": 2, "decoded_token": server.engine.tokenizer.decode([5])}
        assert entry[str(token)]["logprob"] == -2.5
    assert [request.params.prompt_logprobs for request in server.worker.requests] == [2, None]


async def test_echo_and_prompt_logprobs_together(server: Harness):
    fields = {"prompt": "ab c", "max_tokens": 1, "echo": True, "logprobs": 1, "prompt_logprobs": 2}
    (choice,) = (await server.complete(**fields)).json()["choices"]
    assert server.params.prompt_logprobs == 2
    assert all(len(top) == 1 for top in choice["logprobs"]["top_logprobs"][1:])
    assert all(len(entry) == 2 for entry in choice["prompt_logprobs"][1:])


def test_experts_come_with_the_last_part():
    request = CompletionRequest(prompt="a", return_routed_experts=True)
    model = ModelInfo(name="m", max_model_len=9, vocab_size=9, num_moe_layers=2, pairs_per_token=3)
    writer = ChoiceWriter(0, request, [1, 2], "", model, lambda _: b"x")
    experts = np.arange(5 * 2 * 3, dtype="<i2").reshape(5, 2, 3)
    first = writer.part(GenerationDelta(text="x", routed_experts=experts[:3].tobytes()))
    assert writer.part(GenerationDelta(text="", routed_experts=experts[3:4].tobytes())) is None
    last = writer.part(GenerationDelta(finish_reason="length", routed_experts=experts[4:].tobytes()))
    assert "routed_experts" not in (first or {})
    told = np.load(io.BytesIO(base64.b64decode((last or {})["routed_experts"])))
    assert told.dtype == np.int16
    assert np.array_equal(told, experts)


@pytest.mark.parametrize("name", ["guided_json", "guided_regex", "guided_choice", "guided_grammar", "regex"])
async def test_old_names_of_structured_output_say_the_new_one(server: Harness, name: str):
    for answer in (await server.complete(prompt="a", **{name: "x"}), await server.chat(**{name: "x"})):
        assert "use structured_outputs or response_format instead" in assert_error(answer, 400, name)


async def test_unknown_fields_are_logged_for_those_who_debug(server: Harness, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.DEBUG, logger="amoe.server.fields")
    assert (await server.complete(prompt="a", max_tokens=1, capcity="exact", other=1)).status_code == 200
    messages = [record.getMessage() for record in caplog.records if record.name == "amoe.server.fields"]
    assert messages == ["unknown field 'capcity': is 'capacity' meant?", "unknown field 'other'"]


async def test_every_field_is_described(server: Harness):
    document = (await server.http.get("/openapi.json")).json()
    operation = document["paths"]["/v1/completions"]["post"]
    assert set(operation["responses"]) == {"200", "4XX", "503"}
    fields = document["components"]["schemas"]["CompletionRequest"]["properties"]
    assert fields["n"]["maximum"] == 128
    bounds = {name: schema.get("anyOf", [schema])[0] for name, schema in fields.items()}
    assert (bounds["logprobs"]["minimum"], bounds["logprobs"]["maximum"]) == (0, 20)
    assert bounds["logit_bias"]["maxProperties"] == 1024
