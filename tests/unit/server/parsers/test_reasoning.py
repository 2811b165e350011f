"""Thoughts apart from answers."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amoe.server.parsers.reasoning import REASONING_FORMATS, ReasoningParser, ReasoningTokens

R1, QWEN = REASONING_FORMATS["deepseek_r1"], REASONING_FORMATS["qwen3"]


def read(inside: bool | None, pieces: Sequence[str]) -> tuple[str, str]:
    parser = ReasoningParser(QWEN, inside)
    parts = [*map(parser.push, pieces), parser.finish()]
    return "".join(part[0] for part in parts), "".join(part[1] for part in parts)


@pytest.mark.parametrize(
    ("inside", "text", "reasoning", "answer"),
    [
        (None, "<think>\nhm \n</think>\n\nHello </think>", "hm", "Hello </think>"),
        (None, "\n<think>hm</think>", "hm", ""),
        (None, "<think>hm", "hm", ""),
        (None, "<think></think>yes", "", "yes"),
        (None, " Hello <think>x</think>", "", " Hello <think>x</think>"),
        (None, "<thi", "", "<thi"),
        (True, "hm\n\nso </thin </think>\n\nA\n\nB ", "hm\n\nso </thin", "A\n\nB "),
        (True, "<think>hm</think>A", "hm", "A"),
        (True, "hm", "hm", ""),
        (True, "<th", "<th", ""),
        (False, " A<think>b</think>", "", " A<think>b</think>"),
        (True, "", "", ""),
    ],
)
def test_split(inside, text, reasoning, answer):
    assert read(inside, [text]) == (reasoning, answer)
    assert read(inside, list(text)) == (reasoning, answer)


SNIPPETS = st.sampled_from(["<think>", "</think>", "<", "</th", "ink>", " ", "\n", "a", "hm", "🙂"])


@given(inside=st.sampled_from([None, True, False]), snippets=st.lists(SNIPPETS, max_size=12), data=st.data())
def test_pieces_do_not_matter(inside, snippets, data):
    text = "".join(snippets)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[start:end] for start, end in itertools.pairwise([0, *cuts, len(text)])]
    whole = read(inside, [text])
    assert read(inside, pieces) == read(inside, list(text)) == whole


@pytest.mark.parametrize(
    ("prompt", "r1", "qwen"),
    [("<user>hi<assistant>", True, None), ("... <think>\n", True, True), ("... <think>\n\n</think>\n\n", False, False)],
)
def test_the_prompt_may_open_and_close_thoughts(prompt, r1, qwen):
    assert (R1.is_inside(prompt), QWEN.is_inside(prompt)) == (r1, qwen)


@pytest.mark.parametrize(
    ("inside", "tokens", "count"),
    [
        (True, ["h", "m", "</thi", "nk>", "A"], 4),
        (True, ["h", "m"], 2),
        (None, ["\n", "<th", "ink>", "h", "</think>A", "B"], 5),
        (None, ["A", "<think>", "h"], 0),
        (False, ["h", "</think>"], 0),
    ],
)
def test_tokens_of_thoughts_are_counted(inside, tokens, count):
    counter = ReasoningTokens(QWEN, inside, lambda token: tokens[token].encode())
    for token in range(len(tokens)):
        counter.push([token])
    assert counter.count == count
    whole = ReasoningTokens(QWEN, inside, lambda token: tokens[token].encode())
    whole.push(range(len(tokens)))
    assert whole.count == count
