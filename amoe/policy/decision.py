"""Why a worker ran the block that it ran, or none: a name for every outcome of its scheduler, to be counted."""

from __future__ import annotations

from enum import IntEnum


class Reason(IntEnum):
    """What decided. The first four are of a block that ran, the others of a turn in which none did.

    ONLY: no other block was ready.
    POLICY: the schedule's order among several ready blocks.
    OVERDUE: its oldest token had waited for longer than `max_wait_s`, which overrides that order.
    SLIP: a wave went on without somebody for whom it had waited for `max_hold_s`.
    IDLE: no token is here, and none belongs here.
    AWAY: those that belong here are at experts elsewhere, or between two iterations.
    HELD: tokens are here, but wait for others that are not.
    """

    ONLY = 0
    POLICY = 1
    OVERDUE = 2
    SLIP = 3
    IDLE = 4
    AWAY = 5
    HELD = 6


def reason_to_run(num_ready: int, *, is_open: bool, age_s: float, max_wait_s: float) -> Reason:
    """Why a block runs.

    Args:
        num_ready: blocks that could have run.
        is_open: nobody is missing at it.
        age_s: how long its oldest token has waited.
        max_wait_s: after so long it goes before all others.
    """
    if not is_open:
        return Reason.SLIP
    if num_ready == 1:
        return Reason.ONLY
    return Reason.OVERDUE if age_s > max_wait_s else Reason.POLICY
