"""What of a request has to be looked at with the tokenizer, the vocabulary or the grammar compiler in hand."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from amoe.engine.tokenizer import Tokenizer
from amoe.errors import RequestError
from amoe.server.context import ServerContext
from amoe.server.sampling import Constraints
from amoe.server.schemas import GenerationRequest
from amoe.server.structured import requested_grammar

FEW_WORDS = 16  # not worth a thread


async def constraints_of(context: ServerContext, request: GenerationRequest) -> Constraints:
    """Check what `request` constrains, and put it into the words of the workers.

    Raises:
        RequestError: naming the field.
    """
    _check_priority(context, request)
    _check_token_ids("logit_bias", (token for token, _ in request.logit_bias), context)
    _check_token_ids("allowed_token_ids", request.allowed_token_ids, context)
    return Constraints(
        bad_words=await _bad_words(context.engine.tokenizer, request.bad_words),
        grammar=await requested_grammar(context, request),
    )


def _check_priority(context: ServerContext, request: GenerationRequest) -> None:
    if request.priority and context.engine.config.scheduler.scheduling_policy != "priority":
        raise RequestError(
            "priority has no effect at this server, which serves in order of arrival "
            "(--scheduling-policy priority would change that): leave it out",
            param="priority",
        )


def _check_token_ids(name: str, token_ids: Iterable[int], context: ServerContext) -> None:
    vocab_size = context.engine.model.vocab_size
    for token_id in token_ids:
        if not 0 <= token_id < vocab_size:
            raise RequestError(f"{name} holds token id {token_id}, but ids go from 0 to {vocab_size - 1}", param=name)


async def _bad_words(tokenizer: Tokenizer, words: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
    if len(words) <= FEW_WORDS:
        return bad_word_tokens(tokenizer, words)
    return await asyncio.to_thread(bad_word_tokens, tokenizer, words)


def bad_word_tokens(tokenizer: Tokenizer, words: Iterable[str]) -> tuple[tuple[int, ...], ...]:
    """Token sequences of `words`: as each begins a text, and as it follows a space, which often is another token."""
    found: dict[tuple[int, ...], None] = {}
    for word in words:
        for text in (word.lstrip(), " " + word.lstrip()):
            tokens = tuple(tokenizer.encode(text, add_special_tokens=False))
            if tokens:
                found[tokens] = None
    return tuple(found)
