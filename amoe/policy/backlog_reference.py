"""The slow oracle of `amoe.policy.backlog.late_pairs`: worker by worker, token by token."""

from __future__ import annotations

from collections.abc import Sequence

Pair = tuple[int, int]  # (token, index among its pairs)


def late_pairs(
    owners: Sequence[Sequence[int]],
    scores: Sequence[Sequence[float]],
    droppable: Sequence[bool],
    drop_first: Sequence[bool],
    wait_s: Sequence[float],
    row_s: Sequence[float],
    is_known: Sequence[bool],
    slack_s: Sequence[float],
    late: Sequence[bool],
    *,
    keep_best: bool,
) -> set[Pair]:
    """Pairs for which the join would wait longer than the slack; all arguments as in the fast one."""
    num_tokens, num_owners = len(owners), len(wait_s)
    rows_of = [sum(owner in places for places in owners) for owner in range(num_owners)]
    ends = [wait_s[owner] + rows_of[owner] * row_s[owner] for owner in range(num_owners)]
    in_order = sorted(range(num_owners), key=lambda owner: -ends[owner])
    rank = {owner: place for place, owner in enumerate(in_order)}
    lost: set[Pair] = set()
    relieved: list[set[int]] = [set() for _ in range(num_tokens)]

    def may_be_relieved(token: int, owner: int) -> bool:
        """`owner` is the latest that the token still waits for, knows of another, and is allowed to let go of it."""
        waits_for = set(owners[token]) - relieved[token]
        later = [other for other in waits_for if rank[other] < rank[owner]]
        others = [other for other in waits_for if rank[other] > rank[owner]]
        return (
            droppable[token]
            and not later
            and bool(others)
            and all(is_known[other] for other in set(owners[token]))
            and not (keep_best and owners[token][0] == owner)
        )

    for owner in in_order:
        if not late[owner]:
            continue
        there = [token for token in range(num_tokens) if owner in owners[token]]
        weight = {
            token: sum(s for s, place in zip(scores[token], owners[token], strict=True) if place == owner)
            for token in there
        }
        free = {token: may_be_relieved(token, owner) for token in there}
        there.sort(key=lambda token: (free[token], drop_first[token], -weight[token]))
        for position, token in enumerate(there, start=1):
            if not free[token]:
                continue
            next_latest = max(ends[other] for other in set(owners[token]) if rank[other] > rank[owner])
            if wait_s[owner] + position * row_s[owner] - next_latest > slack_s[owner]:
                lost |= {(token, index) for index, place in enumerate(owners[token]) if place == owner}
                relieved[token].add(owner)
    return lost
