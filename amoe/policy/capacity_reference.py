"""The slow oracle of `amoe.policy.capacity`: the same decisions, pair by pair, as sets."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

Pair = tuple[int, int]  # (token, expert)


@dataclass
class Problem:
    """One micro-batch.

    Attributes:
        topk: of each token its experts, best first; a padded token has none.
        score: of every (token, expert).
        droppable, drop_first: by token.
        group_of: whose capacity a pair uses.
        capacity: by group, in pairs.
    """

    topk: Sequence[Sequence[int]]
    score: Callable[[int, int], float]
    droppable: Sequence[bool]
    group_of: Callable[[int, int], int]
    capacity: Sequence[int]
    drop_first: Sequence[bool] = field(default_factory=list)
    keep_best: bool = True

    def pairs(self) -> list[Pair]:
        return [(token, expert) for token, experts in enumerate(self.topk) for expert in experts]

    def is_protected(self, pair: Pair) -> bool:
        token, expert = pair
        is_best = expert == self.topk[token][0]
        return expert in self.topk[token] and (not self.droppable[token] or (self.keep_best and is_best))

    def is_late(self, token: int) -> bool:
        return bool(self.drop_first) and self.drop_first[token]


def capacity(factor: float, num_tokens: int, top_k: int, num_experts: int) -> int:
    """Pairs that an expert may take of so many tokens, none of them padding."""
    return max(1, math.ceil(Fraction(str(factor)) * num_tokens * top_k / num_experts))


def keep_first(problem: Problem, pairs: Sequence[Pair], key: Callable[[Pair], float]) -> tuple[set[Pair], int]:
    """(pairs that stay, protected ones among them for which there was no room)."""
    kept: set[Pair] = set()
    over = 0
    for group, most in enumerate(problem.capacity):
        mine = [pair for pair in pairs if problem.group_of(*pair) == group]
        mine.sort(key=lambda pair: (not problem.is_protected(pair), problem.is_late(pair[0]), key(pair)))
        for index, pair in enumerate(mine):
            if index < most:
                kept.add(pair)
            elif problem.is_protected(pair):
                kept.add(pair)
                over += 1
    return kept, over


def drop(problem: Problem, key: Callable[[Pair], float] | None = None) -> tuple[set[Pair], int]:
    """Token Drop; `key`: the pair with the smallest one stays longest; None: by score."""
    return keep_first(problem, problem.pairs(), key or (lambda pair: -problem.score(*pair)))


def reroute(problem: Problem, num_experts: int) -> tuple[set[Pair], int]:
    """Token Reroute: bids of tokens that have lost something, taken from the highest to the lowest."""
    kept, over = drop(problem)
    taken = [problem.group_of(*pair) for pair in kept]
    room = [most - taken.count(group) for group, most in enumerate(problem.capacity)]
    wanted = [sum((token, expert) not in kept for expert in experts) for token, experts in enumerate(problem.topk)]
    bids = [
        (token, expert)
        for token, experts in enumerate(problem.topk)
        for expert in range(num_experts)
        if wanted[token] and expert not in experts
    ]
    for token, expert in sorted(bids, key=lambda pair: -problem.score(*pair)):
        group = problem.group_of(token, expert)
        if wanted[token] > 0 and room[group] > 0:
            kept.add((token, expert))
            wanted[token] -= 1
            room[group] -= 1
    return kept, over


def expand(problem: Problem, local: Sequence[Sequence[int]], top_k: int | None) -> tuple[set[Pair], int]:
    """Expanded Drop; `local`: by token, experts that cost it no transfer; `top_k`: pairs per token at most."""
    pairs = set(problem.pairs())
    for token, experts in enumerate(local):
        if problem.topk[token] and problem.droppable[token]:
            pairs |= {(token, expert) for expert in experts}
    kept, over = keep_first(problem, sorted(pairs), lambda pair: -problem.score(*pair))
    if top_k is not None:
        for token in range(len(problem.topk)):
            mine = sorted(
                (pair for pair in kept if pair[0] == token),
                key=lambda pair: (not problem.is_protected(pair), -problem.score(*pair)),
            )
            kept -= set(mine[top_k:])
    return kept, over
