"""POST /tokenize and /detokenize, GET /tokenizer_info: vLLM has them, and SGLang under /v1 too."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Response
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from amoe.engine.tokenizer import Tokenizer
from amoe.errors import RequestError
from amoe.server.chat_schemas import ChatPrompt
from amoe.server.context import SHORT_TEXT_CHARS, ServerContext
from amoe.server.encoding import json_response
from amoe.server.field_types import MAX_TOKEN_ID, null_means
from amoe.server.openapi import responses
from amoe.server.rendering import chat_prompt_ids

Model = Annotated[str | None, Field(description="A served name; left out: the first one.")]
ReturnTokenStrs = Annotated[bool, null_means(False), Field(description="Tell token_strs: the vocabulary's own words.")]


class TokenizeText(BaseModel):
    """POST /tokenize with a text."""

    model_config = ConfigDict(extra="allow")

    model: Model = None
    prompt: str
    add_special_tokens: Annotated[bool, null_means(True)] = Field(
        True, description="Put around the text what the model expects there."
    )
    return_token_strs: ReturnTokenStrs = False


class TokenizeChat(ChatPrompt):
    """POST /tokenize with a conversation, which the chat template makes a prompt of."""

    model: Model = None
    return_token_strs: ReturnTokenStrs = False


class DetokenizeRequest(BaseModel):
    """POST /detokenize."""

    model_config = ConfigDict(extra="allow")

    model: Model = None
    tokens: Annotated[list[Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)]], Field(fail_fast=True)]


# The tags are no identifiers, so that messages on wrong fields do not name them.
_TEXT, _CHAT = "a text", "a conversation"


def _kind(body: Any) -> str:
    has_messages = isinstance(body, dict) and body.get("messages") is not None
    return _CHAT if has_messages or isinstance(body, TokenizeChat) else _TEXT


TokenizeRequest = Annotated[
    Annotated[TokenizeText, Tag(_TEXT)] | Annotated[TokenizeChat, Tag(_CHAT)], Discriminator(_kind)
]

TOKENS = {"count": 2, "max_model_len": 4096, "tokens": [15339, 1917], "token_strs": None}
TEXT = {"prompt": "hello world"}
INFO = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "chat_template": "{%- for ..."}


def tokenize_router(context: ServerContext) -> APIRouter:
    """The routes, over `context`."""
    router = APIRouter()

    @router.post("/tokenize", response_model=None, responses=responses(TOKENS))
    @router.post("/v1/tokenize", response_model=None, responses=responses(TOKENS))
    async def tokenize(body: TokenizeRequest) -> Response:
        """Token ids of a text, or of a conversation's prompt."""
        context.resolve_model(body.model)
        if isinstance(body, TokenizeChat):
            _refuse_prompt(body)
            tokens = await chat_prompt_ids(context, body)
        else:
            tokens = await context.tokenize(body.prompt, body.add_special_tokens, "prompt")
        tokenizer = context.engine.tokenizer
        answer = {
            "count": len(tokens),
            "max_model_len": context.engine.model.max_model_len,
            "tokens": tokens,
            "token_strs": await _token_strs(tokenizer, tokens) if body.return_token_strs else None,
        }
        return json_response(answer)

    @router.post("/detokenize", response_model=None, responses=responses(TEXT))
    @router.post("/v1/detokenize", response_model=None, responses=responses(TEXT))
    async def detokenize(body: DetokenizeRequest) -> Response:
        """The text of token ids, special tokens included."""
        context.resolve_model(body.model)
        return json_response({"prompt": await _decode(context, body.tokens)})

    @router.get("/tokenizer_info", response_model=None, responses=responses(INFO))
    async def tokenizer_info() -> Response:
        """What tokenizer_config.json says: class, special tokens, chat template."""
        return json_response(context.engine.tokenizer.info())

    return router


def _refuse_prompt(body: TokenizeChat) -> None:
    if (body.model_extra or {}).get("prompt") is not None:
        raise RequestError("prompt cannot be used together with messages: send one of them", param="prompt")


async def _token_strs(tokenizer: Tokenizer, tokens: list[int]) -> list[str]:
    if len(tokens) <= SHORT_TEXT_CHARS:
        return [tokenizer.token(token) for token in tokens]
    return await asyncio.to_thread(lambda: [tokenizer.token(token) for token in tokens])


async def _decode(context: ServerContext, tokens: list[int]) -> str:
    tokenizer, vocab_size = context.engine.tokenizer, context.engine.model.vocab_size
    if tokens and max(tokens) >= vocab_size:
        raise RequestError(f"tokens holds id {max(tokens)}, but ids go from 0 to {vocab_size - 1}", param="tokens")
    if len(tokens) <= SHORT_TEXT_CHARS:
        return tokenizer.decode(tokens, skip_special_tokens=False)
    return await asyncio.to_thread(tokenizer.decode, tokens, False)
