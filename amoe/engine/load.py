"""What the server has given to its attention workers and not got back: whether there is room for more, and where.

The server cannot see which of its requests wait inside a worker: it takes for waiting who has got no token yet.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from amoe.config import EngineConfig, SchedulingPolicy
from amoe.engine.model_info import ModelInfo
from amoe.errors import RequestError
from amoe.policy import admission
from amoe.types import SamplingParams


class Refusal(NamedTuple):
    """Why there is no room now: a word for metrics, a sentence for the user, and seconds after which to try again."""

    reason: str
    message: str
    retry_after_s: int


@dataclass(slots=True)
class Choices:
    """The sequences that one prompt of a user's request is continued in.

    Attributes:
        count: how many there are; num_open: of them.
        longest: most tokens that one of them has generated.
    """

    count: int = 0
    num_open: int = 0
    longest: int = 0

    def enter(self) -> None:
        """One more."""
        self.count += 1
        self.num_open += 1

    def leave(self, num_generated_tokens: int) -> bool:
        """One has ended. Whether it was the last."""
        self.num_open -= 1
        self.longest = max(self.longest, num_generated_tokens)
        return self.num_open == 0


def first_choices(requests: Sequence[tuple[Sequence[int], SamplingParams]]) -> list[int]:
    """For each of the sequences that start together, the index of the first one with the same prompt.

    Choices of one prompt are neighbours. Prompts are the same only where their KV may be shared.
    """
    firsts: list[int] = []
    for index, (prompt, params) in enumerate(requests):
        first = firsts[-1] if firsts else 0
        other, other_params = requests[first]
        same_kv = (params.cache_salt, params.capacity) == (other_params.cache_salt, other_params.capacity)
        is_same = same_kv and (prompt is other or prompt == other)
        firsts.append(first if is_same else index)
    return firsts


def validate(
    requests: Sequence[tuple[Sequence[int], SamplingParams]],
    firsts: Sequence[int],
    model: ModelInfo,
    policy: SchedulingPolicy,
    param: str,
) -> int:
    """Refuse what can never be served. Returns the number of different prompts' tokens.

    Args:
        firsts: see `first_choices`.
        param: the field of the user's request that the prompts come from.

    Raises:
        RequestError: naming the field that is wrong.
    """
    num_prompt_tokens = 0
    for index, (prompt_token_ids, params) in enumerate(requests):
        if firsts[index] == index:
            admission.validate_prompt(prompt_token_ids, model.vocab_size, param)
            num_prompt_tokens += len(prompt_token_ids)
        admission.validate_length(len(prompt_token_ids), params.max_tokens, model.max_model_len, param)
        admission.validate_priority(params.priority, policy)
    return num_prompt_tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class Front:
    """Which of `count` processes that send requests to the workers this is. One that takes the place of another has an
    index of its own, which numbers its requests: it may be any number."""

    index: int = 0
    count: int = 1


class OpenLoad:
    """Counts open sequences and their tokens, by attention worker, and tokens of prompts that wait.

    Args:
        num_fronts: processes that send requests to the same workers. Each has its part of the room.
    """

    def __init__(self, config: EngineConfig, num_fronts: int = 1) -> None:
        ranks = config.placement.attention_ranks
        self._max_num_seqs = config.scheduler.max_num_seqs
        limit = config.max_waiting_tokens
        self._max_waiting_tokens = None if limit is None else -(-limit // num_fronts)
        self._capacity = -(-admission.queue_capacity(len(ranks), self._max_num_seqs, config.max_waiting) // num_fronts)
        self._num_requests = dict.fromkeys(ranks, 0)
        self._num_tokens = dict.fromkeys(ranks, 0)
        self._num_waiting_tokens = 0
        self._finished_at: deque[float] = deque(maxlen=64)
        self._max_queue_s = config.max_queue_s
        self._num_seats = max(1, len(ranks) * self._max_num_seqs // num_fronts)
        self._full_since: float | None = None  # somebody waits since then, and so many have ended
        self._finished_since_full = 0

    @property
    def is_empty(self) -> bool:
        """Nothing is out."""
        return not any((*self._num_requests.values(), *self._num_tokens.values(), self._num_waiting_tokens))

    def check_count(self, count: int, param: str | None = None) -> None:
        """Refuse more sequences at once than ever fit.

        Raises:
            RequestError: naming `param`.
        """
        if count > self._capacity:
            raise RequestError(
                f"the request asks for {count} sequences at once, but this server holds {self._capacity}: split it",
                param=param,
            )

    def refusal(self, count: int, num_prompt_tokens: int, now: float) -> Refusal | None:
        """Why `count` more sequences, with prompts of so many tokens together, cannot enter now; None: they can.

        Raises:
            RequestError: they never can.
        """
        self.check_count(count)
        num_open = sum(self._num_requests.values())
        if num_open + count > self._capacity:
            excess = num_open + count - self._capacity
            return Refusal(
                "queue_full",
                f"the queue is full: {num_open} requests are open, and {self._capacity} is the limit "
                "(--max-num-seqs, --max-waiting); try again later",
                admission.retry_after_s(excess, self._finish_rate(now)),
            )
        limit, waiting = self._max_waiting_tokens, self._num_waiting_tokens
        # A prompt above the limit goes where nobody waits: it would wait for ever otherwise.
        if limit is not None and waiting and waiting + num_prompt_tokens > limit:
            return Refusal(
                "queue_tokens",
                f"{waiting} prompt tokens wait, and with {num_prompt_tokens} more there would be over {limit}, the "
                "limit (--max-waiting-tokens); try again later",
                admission.retry_after_s(1, self._finish_rate(now)),
            )
        return self._refusal_for_time(num_open + count - self._num_seats, now)

    def _refusal_for_time(self, num_waiting: int, now: float) -> Refusal | None:
        """A queue within its bounds may still take longer than any client waits."""
        if self._full_since is None or self._max_queue_s == 0:
            return None
        expected = admission.expected_wait_s(num_waiting, self._finished_since_full, now - self._full_since)
        if expected is None or expected <= self._max_queue_s:
            return None
        return Refusal(
            "queue_time",
            f"{num_waiting} requests wait, which will take about {expected:.0f} s, and {self._max_queue_s:g} s is the "
            "limit (--max-queue-time); try again later",
            max(1, min(admission.MAX_RETRY_AFTER_S, round(expected - self._max_queue_s))),
        )

    def _finish_rate(self, now: float) -> float:
        """Requests that ended per second, lately; 0 if too few have."""
        if len(self._finished_at) < 2:
            return 0.0
        return len(self._finished_at) / max(1e-3, now - self._finished_at[0])

    def choose(self, home_share: Mapping[int, float]) -> int:
        """Rank of the attention worker for the next sequence; `home_share`: of all sequences, by rank."""
        return admission.choose_worker(
            [
                admission.WorkerLoad(rank, self._num_requests[rank], self._num_tokens[rank], share)
                for rank, share in home_share.items()
            ],
            self._max_num_seqs,
        )

    def enter(self, rank: int, num_prompt_tokens: int, num_waiting_tokens: int, now: float) -> None:
        """A sequence goes to a worker; `num_waiting_tokens` of its prompt wait to be computed there."""
        self._num_requests[rank] += 1
        self._num_tokens[rank] += num_prompt_tokens
        self._num_waiting_tokens += num_waiting_tokens
        if self._full_since is None and sum(self._num_requests.values()) > self._num_seats:
            self._full_since, self._finished_since_full = now, 0

    def move(self, rank: int, to: int, num_tokens: int) -> None:
        """A sequence of so many tokens, prompt and generated, goes on at another worker."""
        self._num_requests[rank] -= 1
        self._num_tokens[rank] -= num_tokens
        self._num_requests[to] += 1
        self._num_tokens[to] += num_tokens

    def grow(self, rank: int, count: int) -> None:
        """A sequence has got tokens."""
        self._num_tokens[rank] += count

    def begin(self, num_waiting_tokens: int) -> None:
        """A sequence whose prompt has waited got its first token, or has ended without one."""
        self._num_waiting_tokens -= num_waiting_tokens

    def leave(self, rank: int, num_tokens: int, now: float) -> None:
        """A sequence of so many tokens, prompt and generated, has ended."""
        self._num_requests[rank] -= 1
        self._num_tokens[rank] -= num_tokens
        self._finished_at.append(now)
        self._finished_since_full += 1
        if sum(self._num_requests.values()) <= self._num_seats:
            self._full_since = None
