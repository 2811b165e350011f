"""Admission: whether a request may enter, and at which attention worker. Pure functions over what the server knows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from amoe.config import MAX_NUM_SEQS, SchedulingPolicy
from amoe.errors import RequestError

MAX_RETRY_AFTER_S = 30
MIN_FINISHED = 8  # of which a rate can be told


class WorkerLoad(NamedTuple):
    """What the server has given to one attention worker and not yet got back.

    Attributes:
        rank: of the worker.
        num_requests: open requests there.
        num_tokens: tokens of their prompts, plus what they have generated.
        share: part of all requests that it should have, relative to the others'.
    """

    rank: int
    num_requests: int
    num_tokens: int
    share: float = 1.0


def choose_worker(loads: Sequence[WorkerLoad], max_num_seqs: int = MAX_NUM_SEQS) -> int:
    """Rank of the attention worker for the next request.

    The one that with it has the fewest requests for its share: in decode each of them is one row of every batch, which
    is what has to follow the shares. But nobody waits at a worker that runs `max_num_seqs` while another has room. Ties
    go to the worker with fewer tokens (less KV in use), then to the lower rank.
    """

    def order(load: WorkerLoad) -> tuple[bool, float, int, int]:
        return (
            load.num_requests >= max_num_seqs,
            (load.num_requests + 1) / load.share,
            load.num_tokens,
            load.rank,
        )

    return min(loads, key=order).rank


def place_in_line(policy: SchedulingPolicy, priority: int, arrival: int) -> tuple[int, int]:
    """Sort key of a sequence at its worker: the least is admitted first, and gives its KV blocks back last.

    `fcfs` goes by arrival alone; `priority` by the number that the request has brought, the lower first, and by arrival
    among equals. As in vLLM a better one overtakes only those that wait: nobody who runs has to go for it, but when KV
    blocks run out, the worst of the running goes, even if it came first. So under a steady load of better ones the
    worst wait for ever, which is what was asked for.
    """
    return (priority if policy == "priority" else 0, arrival)


def queue_capacity(num_workers: int, max_num_seqs: int, max_waiting: int) -> int:
    """Requests that may be open at once: those that can run, and those that may wait."""
    return num_workers * max_num_seqs + max_waiting


def expected_wait_s(num_waiting: int, num_finished: int, seconds: float) -> float | None:
    """Seconds until somebody behind `num_waiting` others is computed, if sequences go on to end as they have.

    Args:
        num_finished: sequences that have ended in the last `seconds`, in all of which somebody waited.

    Returns:
        None: too few have ended to tell.
    """
    if num_finished < MIN_FINISHED or seconds <= 0.0:
        return None
    return max(0, num_waiting) * seconds / num_finished


def retry_after_s(excess: int, finished_per_s: float) -> int:
    """Whole seconds until `excess` requests will probably have left; at least 1, at most `MAX_RETRY_AFTER_S`."""
    if finished_per_s <= 0.0:
        return 1
    return max(1, math.ceil(min(MAX_RETRY_AFTER_S, excess / finished_per_s)))


def validate_prompt(prompt_token_ids: Sequence[int], vocab_size: int, param: str) -> None:
    """Refuse an empty prompt and ids that the embedding has no row for.

    Raises:
        RequestError: naming `param`.
    """
    if not prompt_token_ids:
        raise RequestError(f"{param} is empty: give at least one token", param=param)
    low, high = min(prompt_token_ids), max(prompt_token_ids)
    if low < 0 or high >= vocab_size:
        wrong = low if low < 0 else high
        raise RequestError(f"{param} holds token id {wrong}, but ids go from 0 to {vocab_size - 1}", param=param)


def fitting_max_tokens(num_prompt_tokens: int, max_model_len: int, param: str) -> int:
    """Tokens that may still be generated after the prompt.

    Raises:
        RequestError: if there is no room for a single one.
    """
    room = max_model_len - num_prompt_tokens
    if room < 1:
        raise RequestError(
            f"{param} has {num_prompt_tokens} tokens, but this model takes {max_model_len} tokens of prompt and answer "
            "together, the answer at least one: shorten the prompt",
            param=param,
        )
    return room


def validate_priority(priority: int, policy: SchedulingPolicy) -> None:
    """Refuse a priority that would change nothing.

    Raises:
        RequestError: naming `priority`.
    """
    if priority != 0 and policy != "priority":
        raise RequestError(
            f"priority is {priority}, but this server goes by order of arrival: leave it away, or start it with "
            "--scheduling-policy priority",
            param="priority",
        )


def validate_length(num_prompt_tokens: int, max_tokens: int, max_model_len: int, param: str) -> None:
    """Refuse a prompt or a `max_tokens` that does not fit.

    Raises:
        RequestError: naming the field that is too large.
    """
    room = fitting_max_tokens(num_prompt_tokens, max_model_len, param)
    if max_tokens > room:
        raise RequestError(
            f"max_tokens is {max_tokens}, but after {num_prompt_tokens} prompt tokens only {room} of this model's "
            f"{max_model_len} are left: shorten the prompt or lower max_tokens",
            param="max_tokens",
        )
