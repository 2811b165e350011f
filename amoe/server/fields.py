"""Fields that other servers know and this one does not: refused by name, never ignored, since they change the answer.

Each comes with the values that change nothing, which are accepted (as null is). Fields that are neither here nor in
`amoe.server.schemas` are unknown, and allowed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from amoe.errors import RequestError

Neutral = Mapping[str, tuple[Any, ...]]

COMMON: Neutral = {
    "early_stopping": (False,),
    "ec_transfer_params": (),
    "guided_choice": (),
    "guided_decoding_backend": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "kv_transfer_params": (),
    "length_penalty": (1.0,),
    "logits_processors": ([],),
    "repetition_detection": (),
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


def refuse_unsupported(extra: Mapping[str, Any], unsupported: Neutral) -> None:
    """Refuse the first field of `extra` that asks for something this server cannot do.

    Raises:
        RequestError: naming the field.
    """
    for name, value in extra.items():
        if name in unsupported and value is not None and value not in unsupported[name]:
            raise RequestError(f"{name} is not supported by this server: leave it out", param=name)


def refuse_best_of(extra: Mapping[str, Any], n: int) -> None:
    """`best_of` is gone from the API; the one value that asks for nothing more than `n` is accepted.

    Raises:
        RequestError: naming the field.
    """
    if extra.get("best_of") not in (None, n):
        raise RequestError("best_of is not supported by this server, other than equal to n", param="best_of")
