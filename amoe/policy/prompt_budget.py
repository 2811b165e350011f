"""How many prompt tokens go into a step that takes all its tokens through the whole model.

Whoever decodes in such a step waits for its prompts, too: with thousands of tokens, for a second on a processor. So
where somebody decodes, a step gets as many prompt tokens as it gets through in a quarter of a second. That costs the
prompts little, since the weights are read for hundreds of tokens at a time still, and those who decode get a token with
every such step. Two cases are different. Where nobody decodes, nobody is kept waiting. And where a crowd waits for its
first tokens, most of those who wait are in that crowd: large steps get it through sooner.
"""

from __future__ import annotations

STEP_S = 0.25
FIRST_BOUND = 512  # before anything has been measured
LEAST_BOUND = 128  # on a processor so slow that a quarter of a second is nothing: prompts have to get on, too
CROWD = 8
MEMORY = 0.75  # what an estimate keeps of itself when it learns of another step


def prompt_budget(most: int, num_decodes: int, num_prompts: int, token_s: float | None) -> int:
    """Prompt tokens that may go into the next step.

    Args:
        most: in any step.
        num_decodes: sequences that decode in it.
        num_prompts: sequences whose prompts are not through, and could get on.
        token_s: seconds per prompt token of a step of about that size; None: not known.
    """
    if num_decodes == 0 or num_prompts >= max(CROWD, num_decodes // 2):
        return most
    return _bound(token_s, most)


def learn_token_s(token_s: float | None, most: int, num_tokens: int, seconds: float) -> float | None:
    """The estimate after a step with `num_tokens` prompt tokens.

    What a step costs whatever its size (weights, those who decode) is spread over its prompt tokens. So a bound that is
    made of the estimate leads to steps that take `STEP_S` in the end, and small steps teach nothing: they say little of
    what large ones cost.
    """
    if num_tokens < _bound(token_s, most) // 2:
        return token_s
    seen = seconds / num_tokens
    return seen if token_s is None else MEMORY * token_s + (1 - MEMORY) * seen


def _bound(token_s: float | None, most: int) -> int:
    """Tokens of a step that others wait for."""
    return min(most, max(LEAST_BOUND, int(STEP_S / token_s)) if token_s else FIRST_BOUND)
