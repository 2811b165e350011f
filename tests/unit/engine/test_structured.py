"""Grammars over real vocabularies, without a model: whatever is drawn from the masks is a text of the grammar."""

from __future__ import annotations

import json
import random
import re
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import validate
from llguidance import LLMatcher, LLParserLimits

from amoe.builtin import builtin_model_path
from amoe.engine import grammar_compiler
from amoe.engine.grammar_compiler import Compiled, GrammarCompiler, GrammarVocabulary
from amoe.engine.sampling_table import FINISH_COMPLETE, FINISH_STUCK, GO_ON
from amoe.engine.structured import Grammars
from amoe.engine.token_masks import ids_of
from amoe.engine.tokenizer import Tokenizer
from amoe.errors import CheckpointError
from tests.checkpoints import write_tokenizer

BUILTIN_SIZE = 4096
WIDE = "start: " + " | ".join(f'"a{i}"' for i in range(3000))  # as many rules at once
AMBIGUOUS = 'start: e\ne: e e | e e e | "a" | "b" | '  # every text has as many readings as there are trees


def json_grammar(schema):
    return LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_flexible": False})


@pytest.fixture(scope="module")
def builtin():
    return GrammarVocabulary(builtin_model_path(), BUILTIN_SIZE, (0,))


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(builtin_model_path())


@pytest.fixture
def grammars(builtin):
    found = Grammars(GrammarCompiler(builtin), BUILTIN_SIZE, num_threads=2)
    yield found
    found.close()


def wait_ready(grammars, count):
    """What `take_ready` tells of the next `count` requests."""
    told = {}
    while len(told) < count:
        told.update(grammars.take_ready())
    return told


def draw(grammars, request_ids, rng, max_tokens, eos=(0,)):
    """Tokens of each request, drawn evenly from what is admitted, all requests in step; and how each ended."""
    texts = {request_id: [] for request_id in request_ids}
    ends = {}
    for _ in range(max_tokens):
        running = [request_id for request_id in request_ids if request_id not in ends]
        if not running:
            break
        masks = grammars.masks({10 + request_id: request_id for request_id in running})
        for request_id in running:
            admitted = ids_of(masks[10 + request_id]).tolist()
            token = rng.choice(admitted)
            if token in eos:
                ends[request_id] = "eos"
                continue
            texts[request_id].append(token)
            code = grammars.advance(request_id, token)
            assert code != FINISH_STUCK
            if code == FINISH_COMPLETE:
                ends[request_id] = "complete"
        grammars.prepare([request_id for request_id in running if request_id not in ends])
    return texts, ends


def text_of(tokenizer, token_ids):
    return b"".join(map(tokenizer.token_bytes, token_ids)).decode()


PATTERNS = ["[a-z]+@[a-z]{2,9}\\.(com|org)", "(yes|no)", "a{3,7}b?", "[0-9]{4}-[0-9]{2}", "é+ü", "x"]


def test_what_is_drawn_matches_the_pattern(grammars, tokenizer):
    """All patterns in one step, several times: their masks are computed together."""
    rng = random.Random(0)
    requests = dict(enumerate(PATTERNS * 4))
    for request_id, pattern in requests.items():
        grammars.add(request_id, LLMatcher.grammar_from_regex(pattern))
    assert wait_ready(grammars, len(requests)) == dict.fromkeys(requests, "")
    texts, ends = draw(grammars, list(requests), rng, 60)
    assert {requests[i] for i in ends} >= {"(yes|no)", "a{3,7}b?", "[0-9]{4}-[0-9]{2}", "x"}
    for request_id, end in ends.items():
        text = text_of(tokenizer, texts[request_id])
        assert re.fullmatch(requests[request_id], text), (requests[request_id], text, end)
    for request_id in requests:
        grammars.discard(request_id)
        assert request_id not in grammars


def test_a_whole_text_ends_at_once(grammars, tokenizer):
    grammars.add(1, LLMatcher.grammar_from_regex("abc"))
    wait_ready(grammars, 1)
    texts, ends = draw(grammars, [1], random.Random(0), 9)
    assert (text_of(tokenizer, texts[1]), ends) == ("abc", {1: "complete"})


def test_an_end_of_sequence_is_admitted_where_a_text_may_end(grammars, tokenizer):
    grammars.add(1, LLMatcher.grammar_from_regex("a+"))
    wait_ready(grammars, 1)
    a = tokenizer.encode("a")[0]
    assert 0 not in ids_of(grammars.masks({0: 1})[0])
    assert grammars.advance(1, a) == GO_ON
    grammars.prepare([1])
    assert 0 in ids_of(grammars.masks({0: 1})[0])
    assert grammars.advance(1, 0) == FINISH_COMPLETE


def schemas():
    names = st.sampled_from(["a", "b", "long name", "ü"])
    leaves = st.one_of(
        st.just({"type": "integer"}),
        st.just({"type": "boolean"}),
        st.just({"type": "null"}),
        st.builds(lambda n: {"type": "string", "maxLength": n}, st.integers(0, 5)),
        st.builds(lambda a, b: {"type": "integer", "minimum": a, "maximum": a + b}, *[st.integers(0, 500)] * 2),
        st.lists(st.text(max_size=4) | st.integers(-9, 9), min_size=1, max_size=3).map(lambda values: {"enum": values}),
    )

    def nest(inner):
        objects = st.dictionaries(names, inner, max_size=3).flatmap(
            lambda properties: st.builds(
                lambda required: {
                    "type": "object",
                    "properties": properties,
                    "required": sorted(required),
                    "additionalProperties": False,
                },
                st.sets(st.sampled_from(sorted(properties))) if properties else st.just(set()),
            )
        )
        arrays = st.builds(
            lambda items, low, more: {"type": "array", "items": items, "minItems": low, "maxItems": low + more},
            inner,
            st.integers(0, 2),
            st.integers(0, 2),
        )
        return objects | arrays | st.lists(inner, min_size=1, max_size=3).map(lambda options: {"anyOf": options})

    return st.recursive(leaves, nest, max_leaves=6)


@settings(max_examples=60, deadline=None)
@given(schema=schemas(), seed=st.integers(0, 2**32))
def test_what_is_drawn_is_json_that_follows_the_schema(builtin, tokenizer, schema, seed):
    grammars = Grammars(GrammarCompiler(builtin), BUILTIN_SIZE, num_threads=1)
    grammars.add(1, json_grammar(schema))
    (complaint,) = wait_ready(grammars, 1).values()
    assert complaint == ""
    texts, ends = draw(grammars, [1], random.Random(seed), 300)
    grammars.close()
    text = text_of(tokenizer, texts[1])
    assert ends, f"{schema} has no endless text, but {text!r} goes on"
    validate(json.loads(text), schema)


@pytest.mark.parametrize(
    ("grammar", "complaint"),
    [
        (LLMatcher.grammar_from_regex("a(b"), "unclosed group"),
        (LLMatcher.grammar_from_lark("start: nobody"), "nobody"),
        (json_grammar({"type": "nonsense"}), "nonsense"),
        ("{ not even", "the grammar cannot be compiled: "),
    ],
)
def test_a_wrong_grammar_is_told(grammars, grammar, complaint):
    grammars.add(1, grammar)
    told = wait_ready(grammars, 1)
    assert complaint in told[1]
    assert "\n" not in told[1]
    assert 1 not in grammars
    assert not grammars.is_compiling


@pytest.mark.parametrize("grammar", [WIDE, AMBIGUOUS])
def test_a_step_that_is_too_dear_fails_alone(grammars, tokenizer, grammar, monkeypatch):
    """Whether it shows in a mask or in a token that is taken: it is told, and a neighbour goes on."""
    limits = LLParserLimits(step_max_items=400, verbose_errors=False)  # a tenth of what is allowed, to be quick
    monkeypatch.setattr(grammar_compiler, "LIMITS", limits if grammar == AMBIGUOUS else grammar_compiler.LIMITS)
    grammars.add(1, LLMatcher.grammar_from_lark(grammar))
    grammars.add(2, LLMatcher.grammar_from_regex("[ab]+"))
    wait_ready(grammars, 2)
    a = tokenizer.encode("a")[0]
    for _ in range(400):
        masks = grammars.masks({0: 1, 1: 2})
        assert a in ids_of(masks[1])
        assert grammars.advance(2, a) == GO_ON
        if not masks[0].any() or grammars.advance(1, a) == FINISH_STUCK:
            break
        grammars.prepare([1, 2])
    else:
        pytest.fail("the grammar never met its limit")
    assert re.match("the grammar cannot go on: .*items", grammars.complaint(1))
    grammars.prepare([2])
    assert a in ids_of(grammars.masks({1: 2})[1])


def test_where_the_grammar_is_not_to_blame_the_rules_are(grammars):
    grammars.add(1, LLMatcher.grammar_from_regex("a"))
    wait_ready(grammars, 1)
    assert "allowed_token_ids" in grammars.complaint(1)
    assert "allowed_token_ids" in grammars.complaint(77)  # has none


def test_a_heavy_grammar_keeps_nobody_waiting(grammars, monkeypatch):
    begun, may_end = threading.Event(), threading.Event()
    compiled = []
    compile_grammar = grammar_compiler.compile_grammar

    def slow(vocabulary, grammar):
        compiled.append(grammar)
        if grammar == "heavy":
            begun.set()
            may_end.wait()
            grammar = LLMatcher.grammar_from_regex("heavy")
        return compile_grammar(vocabulary, grammar)

    monkeypatch.setattr(grammar_compiler, "compile_grammar", slow)
    light = LLMatcher.grammar_from_regex("light")
    for request_id, grammar in enumerate(["heavy", light, "heavy", light, "heavy"]):
        grammars.add(request_id, grammar)
    begun.wait()
    assert wait_ready(grammars, 2) == {1: "", 3: ""}
    assert grammars.is_compiling
    grammars.discard(2)  # its user has gone
    may_end.set()
    assert wait_ready(grammars, 2) == {0: "", 4: ""}
    assert 2 not in grammars
    assert sorted(compiled) == sorted(["heavy", light])  # once each


def test_grammars_of_many_users_are_forgotten_in_turn(builtin):
    compiler = GrammarCompiler(builtin)
    futures = [compiler.compile(LLMatcher.grammar_from_regex(f"a{{{i}}}")) for i in range(1, 40)]
    assert all(isinstance(future.result(), Compiled) for future in futures)
    assert compiler.compile(LLMatcher.grammar_from_regex("a{39}")) is futures[-1]
    assert compiler.compile(LLMatcher.grammar_from_regex("a{1}")) is not futures[0]
    compiler.close()


def test_special_tokens_stand_for_no_text(tmp_path):
    """A grammar that admits any text admits no special token but the end."""
    write_tokenizer(tmp_path, 101)
    vocabulary = GrammarVocabulary(tmp_path, 101, (2,))
    compiled = grammar_compiler.compile_grammar(vocabulary, LLMatcher.grammar_from_regex("(.|\n)*"))
    assert ids_of(compiled.mask).tolist() == [2, *range(3, 101)]


@pytest.mark.parametrize("vocab_size", [101, 128])  # 128: the end that the model has not needs a word of its own
def test_a_model_without_an_end_of_sequence(tmp_path, vocab_size):
    write_tokenizer(tmp_path, vocab_size)
    grammars = Grammars(GrammarCompiler(GrammarVocabulary(tmp_path, vocab_size, ())), vocab_size, num_threads=1)
    grammars.add(1, LLMatcher.grammar_from_regex("(ab)+c"))
    wait_ready(grammars, 1)
    texts, ends = draw(grammars, [1], random.Random(1), 50, eos=())
    grammars.close()
    assert re.fullmatch("(ab)+c", text_of(Tokenizer(tmp_path), texts[1]))
    assert ends == {1: "complete"}


def test_rows_that_the_tokenizer_does_not_know_are_never_admitted(tmp_path):
    write_tokenizer(tmp_path, 90)
    vocabulary = GrammarVocabulary(tmp_path, 130, (2,))
    compiled = grammar_compiler.compile_grammar(vocabulary, LLMatcher.grammar_from_regex("(.|\n)*"))
    assert ids_of(compiled.mask).max() == 89


def test_prescribed_text_is_written_as_the_tokenizer_would(builtin, tokenizer):
    """Not letter by letter, which no model has learnt."""
    text = "import os, sys\n\ndef main(argv):\n    return None"
    matcher = grammar_compiler.compile_grammar(builtin, LLMatcher.grammar_from_lark(f"start: {json.dumps(text)}"))
    expected = tokenizer.encode(text, add_special_tokens=False)
    assert ids_of(matcher.mask).tolist() == expected[:1]


def test_no_tokenizer_is_told(tmp_path):
    grammars = Grammars(GrammarCompiler(GrammarVocabulary(tmp_path, 100, (2,))), 100, num_threads=1)
    grammars.add(1, LLMatcher.grammar_from_regex("a"))
    assert "tokenizer.json is missing" in wait_ready(grammars, 1)[1]
    grammars.close()
    with pytest.raises(CheckpointError):
        GrammarVocabulary(tmp_path, 100, (2,)).get()


def test_masks_of_a_step_do_not_change_under_the_reader(grammars, tokenizer):
    """The array that the sampler has taken is not the one that the next job fills."""
    grammars.add(1, LLMatcher.grammar_from_regex("a[0-9]+"))
    wait_ready(grammars, 1)
    first = grammars.masks({0: 1})[0]
    before = first.copy()
    grammars.advance(1, tokenizer.encode("a")[0])
    grammars.prepare([1])
    second = grammars.masks({0: 1})[0]
    np.testing.assert_array_equal(first, before)
    assert not (first & second).any()
