"""What every route needs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from amoe.cluster.admin import AdminDesk
from amoe.engine.async_engine import AsyncEngine
from amoe.engine.async_generation import Generation
from amoe.errors import RequestError
from amoe.server.chat_options import ChatOptions
from amoe.server.errors import ModelNotFoundError
from amoe.server.grammar_check import GrammarCheck, check_in_thread
from amoe.server.request_record import current_record
from amoe.server.request_record import new_id as new_id
from amoe.server.sampling import SamplingDefaults
from amoe.types import SamplingParams

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
        chat: how conversations are treated.
        admin: shows and changes the workers; None: they stay as they are, and the server ends with any of them.
        background: work that goes on without a client; a server that leaves waits for it as for open requests.
    """

    engine: AsyncEngine
    model_names: tuple[str, ...]
    defaults: SamplingDefaults = field(default_factory=SamplingDefaults)
    created: int = field(default_factory=lambda: int(time.time()))
    check_grammar: GrammarCheck = check_in_thread
    chat: ChatOptions = field(default_factory=ChatOptions)
    admin: AdminDesk | None = None
    background: set[asyncio.Task[None]] = field(default_factory=set)

    def resolve_model(self, name: str | None) -> str:
        """The served name that a request means.

        Raises:
            ModelNotFoundError: if it is none of this server's.
        """
        name = name or self.model_names[0]
        if name not in self.model_names:
            served = ", ".join(self.model_names)
            raise ModelNotFoundError(f"the model {name!r} is not served here; served: {served}", param="model")
        if (record := current_record()) is not None:
            record.model = name
        return name

    def start(
        self, requests: Sequence[tuple[Sequence[int], SamplingParams]], *, param: str = "prompt"
    ) -> list[Generation]:
        """`AsyncEngine.start`, remembered in the record of the HTTP request that this task serves."""
        generations = self.engine.start(requests, param=param)
        if (record := current_record()) is not None:
            record.started(requests, generations)
        return generations

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
