"""The oracle of `sampler.py`: one row at a time, in plain Python numbers. Slow on purpose."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

import torch

from amoe.types import SamplingParams

_MASK = (1 << 64) - 1


def uniform_reference(seed: int, step: int) -> float:
    """The random number in [0, 1) of output token `step` of a sequence with this seed."""

    def mix(state: int) -> int:
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        return state ^ (state >> 31)

    key = mix((seed & _MASK) ^ 0x6A09E667F3BCC909)
    return (mix((key + (step + 1) * 0x9E3779B97F4A7C15) & _MASK) >> 16) / 2**48


def permitted_reference(
    params: SamplingParams,
    output: Sequence[int],
    eos_token_ids: Sequence[int],
    vocab_size: int,
    grammar: Collection[int] | None,
) -> set[int]:
    """Ids that may come next. `grammar`: those that the grammar admits; None: there is none."""
    permitted = set(params.allowed_token_ids or range(vocab_size))
    if grammar is not None:
        permitted &= set(grammar)
    for word in params.bad_words:
        prefix = list(word[:-1])
        if list(output[len(output) - len(prefix) :]) == prefix and len(output) >= len(prefix):
            permitted.discard(word[-1])
    if grammar is not None and params.ignore_eos:
        permitted = permitted.difference(eos_token_ids) or permitted
    if len(output) < params.min_tokens:
        stop_ids = {*params.stop_token_ids, *(() if params.ignore_eos else eos_token_ids)}
        permitted = permitted.difference(stop_ids) or permitted
    return permitted


def penalised_reference(
    logits: torch.Tensor,
    params: SamplingParams,
    prompt: Sequence[int],
    output: Sequence[int],
    permitted: Collection[int],
) -> torch.Tensor:
    """Logits [V] of the ids `permitted` after bias and penalties, -inf of all others; a new tensor."""
    result = logits.clone()
    for token, bias in params.logit_bias:
        result[token] += bias
    counts = Counter(output)
    for token in {*prompt, *output}:
        value = result[token]
        value = value / params.repetition_penalty if value > 0 else value * params.repetition_penalty
        value = value - (params.frequency_penalty * counts[token] + params.presence_penalty * (counts[token] > 0))
        result[token] = value
    for token in set(range(len(logits))).difference(permitted):
        result[token] = -torch.inf
    return result


def weights_reference(logits: torch.Tensor, params: SamplingParams) -> list[int]:
    """Integer weights [V] of the tokens after temperature and truncation; 0 is impossible."""
    scaled = torch.softmax(logits / torch.tensor(params.temperature), dim=-1)
    weights = [round(p * 2**45) for p in scaled.tolist()]
    floor = float(torch.tensor(params.min_p) * torch.tensor(float(max(weights))))
    weights = [w if w >= floor else 0 for w in weights]
    if params.top_k:
        kth = sorted(weights, reverse=True)[min(params.top_k, len(weights)) - 1]
        weights = [w if w >= kth else 0 for w in weights]
    remaining = float(torch.tensor(params.top_p)) * sum(weights)
    last_kept = 0
    for weight in sorted(weights, reverse=True):
        if remaining <= 0 or weight == 0:
            break
        last_kept, remaining = weight, remaining - weight
    return [w if w >= last_kept else 0 for w in weights]


def sample_reference(
    logits: torch.Tensor,
    params: SamplingParams,
    *,
    seed: int,
    prompt: Sequence[int],
    output: Sequence[int],
    eos_token_ids: Sequence[int],
    grammar: Collection[int] | None = None,
) -> int | None:
    """The next token of one sequence; None: the rules leave none.

    Args:
        logits: [V] float32, left as they are.
        params: of the sequence; its own seed wins over `seed`.
        seed: used where `params` brings none.
        prompt, output: the tokens so far.
        eos_token_ids: of the model.
        grammar: ids that the grammar admits, if there is one.
    """
    permitted = permitted_reference(params, output, eos_token_ids, len(logits), grammar)
    if not permitted:
        return None
    penalised = penalised_reference(logits, params, prompt, output, permitted)
    if params.temperature < 1e-5:
        return int(penalised.argmax())
    weights = weights_reference(penalised, params)
    target = int(uniform_reference(seed if params.seed is None else params.seed, len(output)) * sum(weights))
    for token, weight in enumerate(weights):
        if target < weight:
            return token
        target -= weight
    raise AssertionError("the target is below the sum of the weights")
