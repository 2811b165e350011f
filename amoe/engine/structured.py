"""Structured output at one home: where each sequence stands in its grammar, and what may come next.

The mask of the next token is computed in a thread while the last one goes through the model, so that the head rarely
waits for it. Parsers belong to requests, not to rows: a preempted sequence comes back to where it stood.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import ParamSpec

import numpy as np
from llguidance import LLExecutor, LLMatcher

from amoe.engine.grammar_compiler import Compiled, GrammarCompiler, complaint_of, fill_masks
from amoe.engine.sampling_table import FINISH_COMPLETE, FINISH_STUCK, GO_ON
from amoe.engine.token_masks import MaskArray, num_words
from amoe.errors import AmoeError

logger = logging.getLogger(__name__)

P = ParamSpec("P")

_CONTRADICTION = "no token is possible here: the grammar, allowed_token_ids and bad_words leave none"


@dataclass(slots=True)
class _Stand:
    """Of one sequence.

    Attributes:
        matcher: has taken all generated tokens. Nobody touches it while `job` is at work.
        mask: [W, or one more] what it admits next, once `job` is done.
        job: computes the mask; None: it is there.
    """

    matcher: LLMatcher
    mask: MaskArray
    job: Future[None] | None = None


class Grammars:
    """The grammars of one home's sequences. All methods are for the worker's loop, and none waits for the compiler.

    Args:
        vocab_size: V.
        num_threads: that compute the masks of one step.
    """

    def __init__(self, compiler: GrammarCompiler, vocab_size: int, num_threads: int) -> None:
        self._compiler = compiler
        self._num_words = num_words(vocab_size)
        self._num_threads = num_threads
        self._compiling: dict[int, tuple[Future[Compiled], Sequence[int]]] = {}
        self._stands: dict[int, _Stand] = {}
        self._thread: ThreadPoolExecutor | None = None
        self._executor: LLExecutor | None = None

    # ---- sequences come and go

    @property
    def is_compiling(self) -> bool:
        """Somebody waits for a grammar."""
        return bool(self._compiling)

    def __contains__(self, request_id: int) -> bool:
        return request_id in self._stands

    def warm_up(self) -> None:
        """Read the vocabulary beside the loop, now that there is time."""
        self._compiler.warm_up()

    def add(self, request_id: int, grammar: str, generated: Sequence[int] = ()) -> None:
        """Compile the grammar of a request. `take_ready` tells when it is done.

        Args:
            generated: tokens that the sequence has got elsewhere: the grammar goes on behind them.
        """
        self._compiling[request_id] = self._compiler.compile(grammar), generated

    def take_ready(self) -> list[tuple[int, str]]:
        """Requests whose grammars have been compiled since the last call, each with what is wrong with it, or ""."""
        done = [request_id for request_id, (future, _) in self._compiling.items() if future.done()]
        return [(request_id, self._begin(request_id)) for request_id in done]

    def _begin(self, request_id: int) -> str:
        future, generated = self._compiling.pop(request_id)
        try:
            compiled = future.result()
        except AmoeError as error:
            return str(error)
        except Exception:
            logger.exception("a grammar could not be compiled")
            return "the grammar cannot be compiled"
        stand = self._stands[request_id] = _Stand(compiled.matcher.deep_copy(), compiled.mask)
        if generated:  # a wrong one leaves a matcher that has failed, which admits nothing and can say why
            stand.mask = np.zeros_like(compiled.mask)
            stand.job = self._beside(_catch_up, stand.matcher, generated, stand.mask)
        return ""

    def discard(self, request_id: int) -> None:
        """The sequence has ended, or will never begin. Nothing happens if it has no grammar."""
        self._compiling.pop(request_id, None)
        self._stands.pop(request_id, None)

    def close(self) -> None:
        """Begin nothing any more."""
        self._compiler.close()
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)

    # ---- tokens

    def masks(self, requests: Mapping[int, int]) -> dict[int, MaskArray]:
        """[W] what the sequences admit next, by row; nothing at all, where a grammar has failed.

        Args:
            requests: request ids by row. Those without a grammar are left out of the answer.
        """
        stands = {row: self._stands[request] for row, request in requests.items() if request in self._stands}
        for stand in stands.values():
            if stand.job is not None:
                stand.job.result()
                stand.job = None
        return {row: self._admitted(stand) for row, stand in stands.items()}

    def _admitted(self, stand: _Stand) -> MaskArray:
        if stand.matcher.is_error():
            return np.zeros(self._num_words, np.uint32)
        return stand.mask[: self._num_words]  # the vocabulary may have got an end of sequence that the model has not

    def advance(self, request_id: int, token_id: int) -> int:
        """The sequence has got this token: `GO_ON`, `FINISH_COMPLETE` or `FINISH_STUCK`."""
        matcher = self._stands[request_id].matcher
        if not matcher.consume_token(token_id):
            return FINISH_STUCK
        return FINISH_COMPLETE if matcher.is_stopped() else GO_ON

    def prepare(self, request_ids: Iterable[int]) -> None:
        """Compute the next masks of these sequences, while their tokens go through the model."""
        stands = [self._stands[request_id] for request_id in request_ids]
        if not stands:
            return
        masks = np.zeros((len(stands), len(stands[0].mask)), np.uint32)
        matchers = [stand.matcher for stand in stands]
        job = self._beside(self._fill, matchers, masks)
        for stand, mask in zip(stands, masks, strict=True):
            stand.mask, stand.job = mask, job

    def _beside(self, work: Callable[P, None], *args: P.args, **named: P.kwargs) -> Future[None]:
        """Do something in the thread beside the loop, one thing after the other."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="amoe-masks")
        return self._thread.submit(work, *args, **named)

    def _fill(self, matchers: list[LLMatcher], masks: MaskArray) -> None:
        if len(matchers) == 1 or self._num_threads == 1:
            fill_masks(matchers, masks)
            return
        if self._executor is None:
            self._executor = LLExecutor(self._num_threads)
        rows = [(matcher, row) for row, matcher in enumerate(matchers)]
        self._executor.unsafe_compute_mask_ptr(rows, masks.ctypes.data, masks.shape[1] * masks.itemsize, len(masks))

    def complaint(self, request_id: int) -> str:
        """Why no token is possible, for the user."""
        stand = self._stands.get(request_id)
        text = complaint_of(stand.matcher) if stand is not None else ""
        return f"the grammar cannot go on: {text}" if text else _CONTRADICTION


def _catch_up(matcher: LLMatcher, token_ids: Sequence[int], mask: MaskArray) -> None:
    """Take the tokens of an earlier life, and write what may come next into `mask` [W]."""
    if matcher.consume_tokens(list(token_ids)):
        fill_masks([matcher], mask[None])
