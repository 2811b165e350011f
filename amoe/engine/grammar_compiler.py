"""Compiles grammars beside the worker's loop: llguidance's parsers, over the tokens of this checkpoint.

A grammar takes a millisecond as a rule, a schema of thousands of properties half a second; meanwhile the worker serves
the others, because llguidance releases Python's lock. Only reading the vocabulary mostly does not, for 30 ms (4,096
tokens) to 1.7 s (151,936): it is read once, when the worker has become ready.

What one step of a parser may cost is bounded by `LIMITS`: a grammar beyond them fails, and with it its request alone.
Measured in `benchmarks/results/2026-11-22-structured.md`.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from amoe.engine.token_masks import MaskArray, num_words
from amoe.engine.tokenizer import Tokenizer
from amoe.errors import RequestError

T = TypeVar("T")

# Below llguidance's defaults, which allow 500 MB a sequence, and six times the work a token: with these the worst mask
# found took half a second. What is refused beside such grammars: some schemas of more than a hundred alternatives that
# all stay possible for long.
LIMITS = LLParserLimits(step_max_items=8_000, max_lexer_states=50_000, verbose_errors=False)
_NUM_THREADS = 2  # so that a heavy grammar does not keep a light one waiting
_MAX_KEPT = 32  # compiled grammars: most users send the same one again and again
_MAX_COMPLAINT = 300  # characters


class GrammarVocabulary:
    """The tokens of a checkpoint as llguidance sees them, read when they are first wanted. Any thread may ask.

    Args:
        model: directory of the checkpoint.
        vocab_size: rows of the embedding: V. The tokenizer may know fewer ids.
        eos_token_ids: what ends a text.
    """

    def __init__(self, model: str | Path, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        self._model = model
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._lock = threading.Lock()
        self._tokens: LLTokenizer | None = None

    def get(self) -> LLTokenizer:
        """The vocabulary; its `vocab_size` is V, or one more.

        Raises:
            CheckpointError: the directory holds no tokenizer that can be read.
        """
        with self._lock:
            if self._tokens is None:
                self._tokens = self._read()
            return self._tokens

    def _read(self) -> LLTokenizer:
        adapter = _Adapter(Tokenizer(self._model), self._vocab_size, self._eos_token_ids)
        tokens = LLTokenizer(TokenizerWrapper(adapter), n_vocab=len(adapter.tokens), eos_token=adapter.eos_token_ids)
        adapter.greedy = tokens.greedy_tokenize
        return tokens


class _Adapter:
    """What `TokenizerWrapper` wants to know of a tokenizer. Not llguidance's own reader: it knows fewer decoders, and
    its bytes have to be those that our detokenizer tells the user."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        self._tokenizer = tokenizer
        self.tokens = [tokenizer.token_bytes(token_id) for token_id in range(vocab_size)]
        # A model without an end of sequence gets one that never comes.
        self.eos_token_ids = [i for i in eos_token_ids if i < vocab_size] or [vocab_size]
        self.tokens += [b""] * (self.eos_token_ids == [vocab_size])
        for token_id in self.eos_token_ids:
            self.tokens[token_id] = self.tokens[token_id] or b"<end>"
        # Special tokens stand for no text, whatever they look like.
        self.special_token_ids = sorted({*(i for i in tokenizer.special_ids if i < vocab_size), *self.eos_token_ids})
        self._special_ids = frozenset(self.special_token_ids)
        self.eos_token_id = self.eos_token_ids[0]
        self.bos_token_id = None
        self.greedy: Callable[[str], list[int]] | None = None

    def __call__(self, text: str) -> list[int]:
        """Tokens of a text that the grammar prescribes: as the model would write it, where the tokenizer can tell."""
        ids = self._tokenizer.encode(text, add_special_tokens=False)
        is_same = b"".join(self.tokens[i] for i in ids) == text.encode() and not self._special_ids.intersection(ids)
        if is_same or self.greedy is None:
            return ids
        return self.greedy(text)  # the tokenizer adds a space, say, or takes text for a special token


class Compiled(NamedTuple):
    """A grammar before its first token.

    Attributes:
        matcher: to be copied.
        mask: [W] its first tokens.
    """

    matcher: LLMatcher
    mask: MaskArray


class GrammarCompiler:
    """Compiles in threads of its own, each grammar once while it is remembered. Only the worker's loop may ask."""

    def __init__(self, vocabulary: GrammarVocabulary) -> None:
        self._vocabulary = vocabulary
        self._compiled: OrderedDict[str, Future[Compiled]] = OrderedDict()
        self._threads: ThreadPoolExecutor | None = None

    def compile(self, grammar: str) -> Future[Compiled]:
        """The grammar, at once or later. The future raises RequestError: what is wrong with it."""
        future = self._compiled.get(grammar)
        if future is None:
            future = self._submit(partial(compile_grammar, self._vocabulary, grammar))
            self._compiled[grammar] = future
            if len(self._compiled) > _MAX_KEPT:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(grammar)
        return future

    def warm_up(self) -> None:
        """Read the vocabulary now, beside the loop."""
        self._submit(self._vocabulary.get)

    def close(self) -> None:
        """Begin nothing any more."""
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)

    def _submit(self, work: Callable[[], T]) -> Future[T]:
        if self._threads is None:
            self._threads = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="amoe-grammar")
        return self._threads.submit(work)


def compile_grammar(vocabulary: GrammarVocabulary, grammar: str) -> Compiled:
    """Compile here and now, the first mask included, which often is the dearest.

    Raises:
        RequestError: what is wrong with the grammar.
    """
    tokens = vocabulary.get()
    matcher = LLMatcher(tokens, grammar, log_level=0, limits=LIMITS)
    mask = np.zeros((1, num_words(tokens.vocab_size)), np.uint32)
    if not matcher.is_error():
        fill_masks([matcher], mask)
    if matcher.is_error():
        raise RequestError(f"the grammar cannot be compiled: {complaint_of(matcher)}")
    return Compiled(matcher, mask[0])


def fill_masks(matchers: list[LLMatcher], masks: MaskArray) -> None:
    """Write what each matcher admits next into its row of `masks` [n, W]. Releases Python's lock."""
    width = masks.shape[1] * masks.itemsize
    for row, matcher in enumerate(matchers):
        matcher.unsafe_compute_mask_ptr(masks.ctypes.data + row * width, width)


def complaint_of(matcher: LLMatcher) -> str:
    """What is wrong, in llguidance's words; empty: nothing."""
    text = " ".join(matcher.get_error().replace("<non-verbose/>", "").split())
    return text if len(text) <= _MAX_COMPLAINT else text[:_MAX_COMPLAINT] + "..."
