"""Structured output by real workers: every text follows its grammar, and the neighbours do not notice.

The built-in model, with constrained and free sequences in the same batches; what is free stays what it is alone,
token for token.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, NamedTuple

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import validate
from llguidance import LLMatcher

from amoe.builtin import builtin_model_path
from amoe.config import CacheConfig, EngineConfig, PlacementConfig, SchedulerConfig
from amoe.engine import grammar_compiler
from amoe.engine.tokenizer import Tokenizer
from amoe.types import SamplingParams
from tests.cluster import Finished, InprocCluster
from tests.integration.exactness import BUILTIN, PLACEMENTS, make_prompts
from tests.served import ServedModel
from tests.unit.engine.test_structured import json_grammar, schemas

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "size": {"type": "integer", "minimum": 0, "maximum": 999},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 3},
    },
    "required": ["name", "size", "tags"],
    "additionalProperties": False,
}
LARK = 'start: call ("+" call)?\ncall: NAME "(" NUMBER ")"\nNAME: /[a-z]{1,6}/\nNUMBER: /[0-9]{1,4}/'
CHOICES = ["yes", "no", "perhaps not"]


class Wanted(NamedTuple):
    """A grammar, and a check of the texts that it must give."""

    grammar: str
    check: Callable[[str], Any]


def _matches(pattern: str) -> Callable[[str], Any]:
    def check(text: str) -> None:
        assert re.fullmatch(pattern, text), f"{text!r} does not match {pattern}"

    return check


WANTED = (
    Wanted(json_grammar(SCHEMA), lambda text: validate(json.loads(text), SCHEMA)),
    Wanted(
        LLMatcher.grammar_from_regex("[a-z]{2,8}@[a-z]{2,8}\\.(com|org)"), _matches("[a-z]{2,8}@[a-z]{2,8}\\.(com|org)")
    ),
    Wanted(json_grammar({"enum": CHOICES}), lambda text: CHOICES.index(json.loads(text))),
    Wanted(LLMatcher.grammar_from_lark(LARK), _matches(r"[a-z]{1,6}\([0-9]{1,4}\)(\+[a-z]{1,6}\([0-9]{1,4}\))?")),
)
MAX_NEW = 90  # enough for every text of these grammars
PROMPTS = [prompt[:40] for prompt in make_prompts(BUILTIN, 0)]
NUM_FREE = 4


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(builtin_model_path())


def config(schedule: str, count: int, placement: PlacementConfig, num_blocks: int = 400) -> EngineConfig:
    """Small budgets, so that prompts are chunked and sequences wait for each other."""
    return EngineConfig(
        model=str(builtin_model_path()),
        dtype="float32",
        threads_per_worker=1,
        max_model_len=160,
        placement=placement,
        scheduler=SchedulerConfig(
            schedule=schedule,
            micro_batches=count if schedule == "lockstep" else 1,
            num_waves=count if schedule == "waves" else None,
            max_num_seqs=8,
            max_num_batched_tokens=32,
        ),
        cache=CacheConfig(block_size=4, num_blocks=num_blocks),
    )


def constrained(wanted: Wanted, temperature: float, seed: int) -> SamplingParams:
    return SamplingParams(max_tokens=MAX_NEW, temperature=temperature, seed=seed, grammar=wanted.grammar, logprobs=1)


FREE = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True)


def num_preempted(cluster: InprocCluster) -> int:
    return sum(w.core.batcher.num_preemptions for w in cluster.workers if w.core.batcher is not None)


@pytest.fixture(scope="module")
def free_tokens() -> list[list[int]]:
    """Of the free prompts, with nobody beside them."""
    cluster = InprocCluster(config("progress", 1, PlacementConfig()))
    found = [result.token_ids for result in cluster.generate(PROMPTS[:NUM_FREE], FREE)]
    cluster.close()
    return found


@pytest.mark.parametrize(
    ("schedule", "count", "placement", "num_blocks"),
    [
        ("waves", 2, "2A2E", 400),
        ("waves", 2, "colocated2", 40),
        ("lockstep", 2, "colocated2", 400),
        ("lockstep", 1, "1A1E", 40),
        ("progress", 1, "1", 40),
    ],
)
def test_texts_are_valid_and_neighbours_unchanged(
    schedule: str, count: int, placement: str, num_blocks: int, tokenizer: Tokenizer, free_tokens: list[list[int]]
) -> None:
    """With few blocks, sequences are preempted in the middle of their texts."""
    cluster = InprocCluster(config(schedule, count, PLACEMENTS[placement], num_blocks))
    for home in cluster.config.placement.attention_ranks:  # compiled before, they all come in at once
        for wanted in WANTED:
            cluster.add(PROMPTS[0][:2], replace(constrained(wanted, 0.0, 0), max_tokens=1), home=home)
    cluster.run()
    asked: dict[int, Wanted] = {}
    free: list[int] = []
    for index, wanted in enumerate(WANTED * 2):
        temperature = float(index >= len(WANTED))
        asked[cluster.add(PROMPTS[index], constrained(wanted, temperature, index))] = wanted
        if index < NUM_FREE:
            free.append(cluster.add(PROMPTS[index], FREE))
    cluster.run()
    assert [cluster.requests[request_id].token_ids for request_id in free] == free_tokens
    for request_id, wanted in asked.items():
        result = cluster.requests[request_id]
        assert (result.finish_reason, result.error) == ("stop", "")
        wanted.check(tokenizer.decode(result.token_ids))
        assert len(result.logprobs) == len(result.token_ids)
    assert (num_preempted(cluster) > 0) == (num_blocks < 400)
    cluster.assert_nothing_left()
    cluster.close()


def alone(params: SamplingParams, prompt: list[int]) -> Finished:
    cluster = InprocCluster(config("progress", 1, PlacementConfig()))
    (result,) = cluster.generate([prompt], params)
    cluster.close()
    return result


def test_greedy_takes_the_best_token_that_is_valid(tokenizer: Tokenizer) -> None:
    """Ranks tell what the raw distribution would have liked better: of those, nothing was possible."""
    grammar = LLMatcher.grammar_from_regex("[0-9]{8}")
    params = SamplingParams(max_tokens=20, temperature=0.0, grammar=grammar, logprobs=20)
    result = alone(params, tokenizer.encode("def add(a, b):"))
    assert re.fullmatch("[0-9]{8}", tokenizer.decode(result.token_ids))
    assert max(entry.rank for entry in result.logprobs) > 1
    for entry, token in zip(result.logprobs, result.token_ids, strict=True):
        better = entry.top_ids[: entry.rank - 1]
        assert token not in better
        assert not any(re.fullmatch("[0-9]{1,8}", tokenizer.decode([other])) for other in better)
        assert sorted(entry.top_logprobs, reverse=True) == entry.top_logprobs


def test_a_request_ends_with_the_text_whatever_else_it_asks_for(tokenizer: Tokenizer) -> None:
    base = SamplingParams(max_tokens=30, temperature=0.0, grammar=LLMatcher.grammar_from_regex("ab|abc|a{4}"))
    prompt = tokenizer.encode("x = ")
    for extra in ({}, {"ignore_eos": True}, {"min_tokens": 25}, {"min_tokens": 25, "ignore_eos": True}):
        result = alone(replace(base, **extra), prompt)
        assert result.finish_reason == "stop"
        assert re.fullmatch("ab|abc|a{4}", tokenizer.decode(result.token_ids)), extra
    longer = replace(base, grammar=LLMatcher.grammar_from_regex("[0-9]+"), max_tokens=12)
    for extra in ({"ignore_eos": True}, {"min_tokens": 12}):
        result = alone(replace(longer, **extra), prompt)
        assert (result.finish_reason, len(result.token_ids)) == ("length", 12), extra
    (nothing,) = [alone(replace(base, grammar=LLMatcher.grammar_from_regex("")), prompt)]
    assert (nothing.finish_reason, tokenizer.decode(nothing.token_ids)) == ("stop", "")
    exact = alone(replace(base, grammar=LLMatcher.grammar_from_regex("[0-9]{12}"), max_tokens=12), prompt)
    assert exact.finish_reason == "stop"  # whole with the last token that it may have


def test_what_cannot_be_ends_alone_and_says_why(tokenizer: Tokenizer, free_tokens: list[list[int]]) -> None:
    cluster = InprocCluster(config("waves", 2, PLACEMENTS["colocated2"]))
    digits = tuple(tokenizer.encode(digit)[0] for digit in "0123456789")
    letters = LLMatcher.grammar_from_regex("[a-z]{4,9}")
    base = SamplingParams(max_tokens=20, temperature=0.0)
    contradictory = (
        replace(base, grammar=letters, allowed_token_ids=digits),
        replace(base, grammar=LLMatcher.grammar_from_regex("7"), bad_words=((digits[7],),)),
        replace(base, allowed_token_ids=digits[:2], bad_words=tuple((digit,) for digit in digits)),
    )
    broken = replace(base, grammar=LLMatcher.grammar_from_regex("a(b"))
    free = [cluster.add(PROMPTS[0], FREE) for _ in range(2)]
    stuck = [cluster.add(PROMPTS[0], params) for params in contradictory]
    wrong = cluster.add(PROMPTS[0], broken)
    both = cluster.add(PROMPTS[0], replace(base, grammar=letters, bad_words=(digits[:2],), logit_bias=((3, 5.0),)))
    cluster.run()
    assert [cluster.requests[request_id].token_ids for request_id in free] == [free_tokens[0]] * 2
    for request_id in stuck:
        result = cluster.requests[request_id]
        assert (result.finish_reason, result.token_ids) == ("error", [])
        assert "no token is possible" in result.error
    assert "unclosed group" in cluster.requests[wrong].error
    assert re.fullmatch("[a-z]{4,9}", tokenizer.decode(cluster.requests[both].token_ids))
    cluster.assert_nothing_left()
    cluster.close()


@pytest.mark.parametrize("turns", [0, 3, 40])
def test_aborted_at_any_time(turns: int) -> None:
    cluster = InprocCluster(config("waves", 2, PLACEMENTS["2A2E"]))
    ids = [cluster.add(PROMPTS[i], constrained(WANTED[i % 4], 0.0, i)) for i in range(8)]
    for _ in range(turns):
        cluster.turn()
    for request_id in ids[::2]:
        cluster.abort(request_id)
    cluster.run()
    assert all(cluster.requests[request_id].finish_reason == "stop" for request_id in ids[1::2])
    cluster.assert_nothing_left()
    cluster.close()


def test_nobody_waits_while_a_grammar_is_compiled(monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer) -> None:
    """The free sequence, which came later, is through before the compiler has said a word; aborting does not wait."""
    may_end = threading.Event()
    compile_grammar = grammar_compiler.compile_grammar

    def slow(*arguments: Any) -> Any:
        may_end.wait()
        return compile_grammar(*arguments)

    monkeypatch.setattr(grammar_compiler, "compile_grammar", slow)
    cluster = InprocCluster(config("progress", 1, PlacementConfig()))
    params = constrained(WANTED[3], 0.0, 0)
    slow_one, gone = cluster.add(PROMPTS[0], params), cluster.add(PROMPTS[0], params)
    free = cluster.add(PROMPTS[1], FREE)
    while cluster.requests[free].finish_reason is None:
        cluster.turn()
    cluster.abort(gone)
    cluster.turn()
    assert cluster.requests[gone].finish_reason == "abort"
    assert cluster.requests[slow_one].finish_reason is None
    may_end.set()
    cluster.run()
    WANTED[3].check(tokenizer.decode(cluster.requests[slow_one].token_ids))
    cluster.assert_nothing_left()
    cluster.close()


@pytest.fixture(scope="module")
def roomy() -> Iterator[InprocCluster]:
    """Twenty sequences at once."""
    few = config("progress", 1, PlacementConfig(), num_blocks=900)
    scheduler = replace(few.scheduler, max_num_seqs=20, max_num_batched_tokens=256)
    cluster = InprocCluster(replace(few, scheduler=scheduler))
    yield cluster
    cluster.assert_nothing_left()
    cluster.close()


@settings(max_examples=10)
@given(drawn=st.lists(schemas(), min_size=20, max_size=20), temperature=st.sampled_from([0.0, 1.0, 2.0]))
def test_random_schemas_give_json_that_follows_them(
    tokenizer: Tokenizer, roomy: InprocCluster, drawn: list[dict[str, Any]], temperature: float
) -> None:
    """Two hundred of them, unless the text was cut off."""
    params = SamplingParams(max_tokens=60, temperature=temperature, seed=1)
    ids = [roomy.add(PROMPTS[0][:8], replace(params, grammar=json_grammar(schema))) for schema in drawn]
    roomy.run()
    for request_id, schema in zip(ids, drawn, strict=True):
        result = roomy.requests[request_id]
        assert result.error == ""
        if result.finish_reason == "stop":
            validate(json.loads(tokenizer.decode(result.token_ids)), schema)
        else:
            assert (result.finish_reason, len(result.token_ids)) == ("length", 60)
    assert sum(roomy.requests[request_id].finish_reason == "stop" for request_id in ids) >= 10


def test_on_an_emulated_device(tokenizer: Tokenizer) -> None:
    """Tokens are drawn blindly there, but none that breaks the rules of its sequence."""
    cluster = InprocCluster(replace(config("waves", 2, PLACEMENTS["colocated2"]), device="emulated:h100"))
    ids = [cluster.add(PROMPTS[i][:20], constrained(WANTED[i % 4], 1.0, i)) for i in range(8)]
    digits = tuple(tokenizer.encode(digit)[0] for digit in "0123456789")
    ruled = cluster.add(
        PROMPTS[0][:20], SamplingParams(max_tokens=9, allowed_token_ids=digits, bad_words=(digits[:1],))
    )
    never = cluster.add(PROMPTS[0][:20], replace(constrained(WANTED[1], 1.0, 0), allowed_token_ids=digits))
    cluster.run()
    for i, request_id in enumerate(ids):
        result = cluster.requests[request_id]
        assert result.error == ""
        if result.finish_reason == "stop":
            WANTED[i % 4].check(tokenizer.decode(result.token_ids))
    assert any(cluster.requests[request_id].finish_reason == "stop" for request_id in ids)
    assert re.fullmatch("[1-9]{9}", tokenizer.decode(cluster.requests[ruled].token_ids))
    assert "no token is possible" in cluster.requests[never].error
    cluster.assert_nothing_left()
    cluster.close()


# ---- as users come


@pytest.fixture(scope="module")
def server() -> Iterator[ServedModel]:
    with ServedModel("--colocated", "2", "--max-model-len", "512") as served:
        yield served


def complete(url: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{url}/v1/completions", json={"prompt": "def add(a, b):", **body}, timeout=120)


def test_over_http_beside_free_requests(server: ServedModel) -> None:
    """All forms at once, at temperatures 0 and 1, while free requests run that give what they give alone."""
    forms = (
        ({"json": SCHEMA}, lambda text: validate(json.loads(text), SCHEMA)),
        ({"regex": "[a-z]{2,8}@[a-z]{2,8}\\.(com|org)"}, _matches("[a-z]{2,8}@[a-z]{2,8}\\.(com|org)")),
        ({"choice": CHOICES}, CHOICES.index),
        ({"grammar": LARK}, WANTED[3].check),
    )
    free = {"max_tokens": 24, "temperature": 0, "logprobs": 0}
    before = complete(server.url, **free).json()["choices"][0]["text"]
    with ThreadPoolExecutor(12) as pool:
        asked = [
            (check, pool.submit(complete, server.url, structured_outputs=form, temperature=t, max_tokens=MAX_NEW))
            for form, check in forms
            for t in (0, 1)
        ]
        beside = [pool.submit(complete, server.url, **free) for _ in range(3)]
        for check, future in asked:
            answer = future.result()
            assert answer.status_code == 200, answer.text
            choice = answer.json()["choices"][0]
            assert choice["finish_reason"] == "stop"
            check(choice["text"])
        assert [future.result().json()["choices"][0]["text"] for future in beside] == [before] * 3
    assert server.works()


def test_over_http_a_contradiction_is_the_users(server: ServedModel) -> None:
    answer = complete(server.url, structured_outputs={"regex": "[a-z]+"}, allowed_token_ids=[1, 2], max_tokens=5)
    assert answer.status_code == 400
    assert "no token is possible" in answer.json()["error"]["message"]
    assert server.works()
    assert server.tracebacks() == ""
