"""What every route needs."""

from __future__ import annotations

import asyncio
import time
import uuid
from dataclasses import dataclass, field

from amoe.engine.async_engine import AsyncEngine
from amoe.errors import RequestError
from amoe.server.errors import ModelNotFoundError
from amoe.server.grammar_check import GrammarCheck, check_in_thread
from amoe.server.sampling import SamplingDefaults

# A text of this many characters tokenizes in well under a millisecond: not worth a thread.
SHORT_TEXT_CHARS = 4096


@dataclass(frozen=True, kw_only=True)
class ServerContext:
    """The engine, and how it is presented.

    Attributes:
        model_names: names that requests may use; the first one is the default.
        defaults: sampling values of requests that bring none.
        created: Unix time of the server's start.
        check_grammar: says what is wrong with a user's grammar.
    """

    engine: AsyncEngine
    model_names: tuple[str, ...]
    defaults: SamplingDefaults = field(default_factory=SamplingDefaults)
    created: int = field(default_factory=lambda: int(time.time()))
    check_grammar: GrammarCheck = check_in_thread

    def resolve_model(self, name: str | None) -> str:
        """The served name that a request means.

        Raises:
            ModelNotFoundError: if it is none of this server's.
        """
        if not name:
            return self.model_names[0]
        if name not in self.model_names:
            served = ", ".join(self.model_names)
            raise ModelNotFoundError(f"the model {name!r} is not served here; served: {served}", param="model")
        return name

    async def tokenize(self, text: str, add_special_tokens: bool, param: str) -> list[int]:
        """Token ids of `text`; a long one is tokenized beside the event loop, a hopelessly long one not at all.

        Raises:
            RequestError: naming `param`.
        """
        tokenizer, limit = self.engine.tokenizer, self.engine.model.max_model_len
        if len(text) > limit * tokenizer.max_token_chars:
            raise RequestError(
                f"{param} has {len(text)} characters, far more than this model's {limit} tokens can hold", param=param
            )
        try:
            if len(text) <= SHORT_TEXT_CHARS:
                return tokenizer.encode(text, add_special_tokens)
            return await asyncio.to_thread(tokenizer.encode, text, add_special_tokens)
        except RequestError as error:
            raise RequestError(str(error), param=param) from error


def new_id(prefix: str, request_id: str | None) -> str:
    """Id of a response: the client's own, if it brought one."""
    return f"{prefix}-{request_id or uuid.uuid4().hex}"
