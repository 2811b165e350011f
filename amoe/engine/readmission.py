"""How sequences whose worker has died go on at another one: with what the user has been told as their prompt.

Sampling depends on the request's number, its seed and the number of its generated tokens, not on the worker. So the
tokens that follow are those that would have followed.
"""

from __future__ import annotations

from collections.abc import Iterable

from amoe.engine.async_generation import Generation
from amoe.engine.messages import AddRequest


def count_vain_lives(lost: Iterable[Generation], num_seats: int) -> None:
    """Their worker, which computed `num_seats` sequences at a time, has died: those that had begun, and then those that
    came first."""
    for place, generation in enumerate(sorted(lost, key=lambda g: (not g.state.generated_token_ids, g.request_id))):
        generation.lose_worker(has_run=place < num_seats)


def families(lost: Iterable[Generation]) -> list[list[Generation]]:
    """Sequences that go to one worker together, because they share a prompt: whose first one computes it for all.

    In order of arrival; within a family those that have begun come first, whose readers wait for the next token.
    """
    by_choices: dict[int, list[Generation]] = {}
    for generation in sorted(lost, key=lambda g: g.request_id):
        by_choices.setdefault(id(generation.choices), []).append(generation)
    return [sorted(family, key=lambda g: not g.state.generated_token_ids) for family in by_choices.values()]


def resumed_request(generation: Generation, leader: Generation, routed_bytes: int) -> AddRequest:
    """What is sent to the worker that goes on with a sequence.

    Args:
        leader: the first of its family.
        routed_bytes: of what is told of one token's experts.
    """
    state = generation.state
    return AddRequest(
        generation.request_id,
        [*state.prompt_token_ids, *state.generated_token_ids],
        state.params,
        None if leader is generation else leader.request_id,
        num_generated=state.num_generated_tokens,
        num_routed=state.num_routed_bytes // routed_bytes,
    )
