"""Fields that other servers know and this one does not: refused by name, never ignored, since they change the answer.

Each comes with the values that change nothing, which are accepted (as null is). Fields that are neither here nor in
`amoe.server.schemas` are unknown, and allowed.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from amoe.errors import RequestError

if TYPE_CHECKING:
    from amoe.server.schemas import GenerationRequest

logger = logging.getLogger(__name__)

Neutral = Mapping[str, tuple[Any, ...]]

COMMON: Neutral = {
    "custom_logit_processor": (),
    "early_stopping": (False,),
    "ebnf": (),
    "ec_transfer_params": (),
    "grammar": ("",),
    "guided_choice": (),
    "guided_decoding_backend": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_json_object": (False,),
    "guided_regex": (),
    "guided_whitespace_pattern": (),
    "json_schema": (),
    "kv_transfer_params": (),
    "length_penalty": (1.0,),
    "logits_processors": ([],),
    "lora_path": (),
    "regex": (),
    "repetition_detection": (),
    "return_hidden_states": (False,),
    "thinking_token_budget": (),
    "use_beam_search": (False,),
    "vllm_xargs": ({},),
}

COMPLETIONS: Neutral = {
    **COMMON,
    "prompt_embeds": (),
    "suffix": ("",),
    "max_completion_tokens": (),
}

CHAT: Neutral = {
    **COMMON,
    "audio": (),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "media_io_kwargs": ({},),
    "mm_processor_kwargs": ({},),
    "modalities": (["text"],),
    "web_search_options": (),
}


# What to send instead, where there is something.
INSTEAD: Mapping[str, str] = {
    **dict.fromkeys(
        (name for name in COMMON if name.startswith("guided_") or name in ("ebnf", "grammar", "json_schema", "regex")),
        "use structured_outputs or response_format instead",
    ),
    "functions": "use tools instead",
    "function_call": "use tool_choice instead",
    "max_completion_tokens": "use max_tokens instead",
}


def check_extra(request: GenerationRequest, unsupported: Neutral) -> None:
    """Look at the fields of `request` that its schema does not have: some are refused, the rest is logged.

    Raises:
        RequestError: naming the field.
    """
    extra = request.model_extra
    if not extra:
        return
    refuse_unsupported(extra, unsupported)
    refuse_best_of(extra, request.n)
    if logger.isEnabledFor(logging.DEBUG):
        for name in extra:
            if name not in unsupported and name != "best_of":
                logger.debug("%s", _unknown(name[:80], type(request).model_fields))


def _unknown(name: str, known: Mapping[str, Any]) -> str:
    """Words on a field that nobody knows."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
    return f"unknown field {name!r}" + (f": is {near[0]!r} meant?" if near else "")


def refuse_unsupported(extra: Mapping[str, Any], unsupported: Neutral) -> None:
    """Refuse the first field of `extra` that asks for something this server cannot do.

    Raises:
        RequestError: naming the field.
    """
    for name, value in extra.items():
        if name in unsupported and value is not None and value not in unsupported[name]:
            raise RequestError(
                f"{name} is not supported by this server: {INSTEAD.get(name, 'leave it out')}", param=name
            )


def refuse_best_of(extra: Mapping[str, Any], n: int) -> None:
    """`best_of` is gone from the API; the one value that asks for nothing more than `n` is accepted.

    Raises:
        RequestError: naming the field.
    """
    if extra.get("best_of") not in (None, n):
        raise RequestError("best_of is not supported by this server, other than equal to n", param="best_of")


def shared_extras(extra: Mapping[str, Any], not_here: Mapping[str, str], route: str) -> dict[str, Any]:
    """Fields of an API of its own that mean there what they mean in chat completions.

    Args:
        extra: fields that the API itself does not have.
        not_here: what chat completions have and `route` has not, with what to send instead.

    Raises:
        RequestError: naming a field that means nothing at `route`.
    """
    given = {name: value for name, value in extra.items() if value is not None}
    for name, value in given.items():
        if name in not_here and value not in (False, [], {}):
            raise RequestError(f"{name} cannot be used in {route}: {not_here[name]}", param=name)
    for name in ("n", "best_of"):
        if given.pop(name, 1) != 1:
            raise RequestError(f"{name} must be 1 in {route}, which gives one answer", param=name)
    return {name: value for name, value in given.items() if name not in not_here}
