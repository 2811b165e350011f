"""Streams of text: as decoded at once, whatever the pieces; stop strings as if seen character by character."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as HfTokenizer
from tokenizers import decoders, models

from amoe.engine.detokenizer import StopFilter, WindowDecoder
from amoe.engine.tokenizer import Tokenizer
from amoe.types import SamplingParams
from tests.fake_workers import make_tokenizer

TEXTS = st.text(alphabet=st.sampled_from("ab ßé你🙂\n"), max_size=40)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(make_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def stream(tokenizer: Tokenizer, token_ids: list[int], **params) -> tuple[list[str], str | None]:
    """Deltas, the flushed rest the last, and the stop string."""
    detokenizer = tokenizer.detokenizer(SamplingParams(max_tokens=1000, **params))
    deltas = []
    for token_id in token_ids:
        deltas.append(detokenizer.push(token_id))
        if detokenizer.stop_string is not None:
            return deltas, detokenizer.stop_string
    deltas.append(detokenizer.flush())
    return deltas, detokenizer.stop_string


def reference_cut(text: str, stops: list[str], include: bool) -> str:
    """Where reading character by character would stop."""
    for end in range(len(text) + 1):
        ends = [stop for stop in stops if text[:end].endswith(stop)]
        if ends:
            return text[:end] if include else text[: end - max(map(len, ends))]
    return text


@given(text=TEXTS)
def test_deltas_add_up_to_the_text(tokenizer, text):
    deltas, _ = stream(tokenizer, tokenizer.encode(text))
    assert "".join(deltas) == text
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(deltas[:-1])


@given(token_ids=st.lists(st.integers(0, 310), max_size=30), skip=st.booleans())
def test_any_tokens_decode_as_the_library_decodes_them(tokenizer, token_ids, skip):
    deltas, _ = stream(tokenizer, token_ids, skip_special_tokens=skip)
    assert "".join(deltas) == tokenizer.decode(token_ids, skip_special_tokens=skip)


def test_a_character_comes_whole(tokenizer):
    ids = tokenizer.encode("\N{SNOWMAN}")
    assert len(ids) == 3
    assert stream(tokenizer, ids)[0] == ["", "", "\N{SNOWMAN}", ""]
    assert stream(tokenizer, ids[:2])[0] == ["", "", "\N{REPLACEMENT CHARACTER}"]


@given(
    text=st.text(alphabet="ab", max_size=30),
    stops=st.lists(st.text(alphabet="ab", min_size=1, max_size=6), min_size=1, max_size=3),
    include=st.booleans(),
    seed=st.integers(0, 100),
)
@settings(max_examples=300)
def test_stop_strings_across_pieces(text, stops, include, seed):
    rng = random.Random(seed)
    stop_filter = StopFilter(stops, include)
    out, position = "", 0
    expected = reference_cut(text, stops, include)
    while position < len(text) and stop_filter.matched is None:
        size = rng.randint(1, 5)
        out += stop_filter.push(text[position : position + size])
        position += size
        assert expected.startswith(out), "text went out that is part of a stop string"
    if stop_filter.matched is None:
        out += stop_filter.flush()
    assert out == expected
    assert (stop_filter.matched is not None) == any(stop in text for stop in stops)


def test_text_that_cannot_become_a_stop_string_goes_out_at_once():
    stop_filter = StopFilter(["END"])
    assert stop_filter.push("an E") == "an "
    assert stop_filter.push("N") == ""
    assert stop_filter.push("x") == "ENx"


def test_no_stop_string_within_min_tokens(tokenizer):
    ids = tokenizer.encode("a\na\na")
    assert stream(tokenizer, ids, stop=("\n",), min_tokens=2) == (["a", "\n", "a", ""], "\n")


@pytest.fixture(scope="module")
def byte_fallback() -> HfTokenizer:
    """Llama's way: ▁ for a space, byte tokens for what the vocabulary lacks, a leading space stripped."""
    pieces = ["<unk>", "▁", "▁hello", "▁world", "lo", "x", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = HfTokenizer(
        models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], byte_fallback=True)
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


BYTES_OF = {text: [6 + byte for byte in text.encode()] for text in ("é", "你", "🙂")}


@given(pieces=st.lists(st.sampled_from([[1], [2], [3], [4], [5], *BYTES_OF.values()]), max_size=20))
def test_window_decoder_adds_up_to_the_text(byte_fallback, pieces):
    ids = [token_id for piece in pieces for token_id in piece]
    decoder = WindowDecoder(byte_fallback.decode)
    deltas = [decoder.push(token_id) for token_id in ids]
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(deltas)
    assert "".join(deltas) + decoder.flush() == byte_fallback.decode(ids)


def test_window_stays_short(byte_fallback):
    seen = []

    def decode(ids):
        seen.append(len(ids))
        return byte_fallback.decode(ids)

    decoder = WindowDecoder(decode)
    for _ in range(50):
        decoder.push(2)
        decoder.push(6 + 0xFF)  # never a character
    assert max(seen) <= 4 * WindowDecoder.MAX_PENDING
