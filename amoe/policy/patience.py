"""How long is waited for what, so that a worker that is lost is told within the failure timeout T, whatever its fault.

All periods are shares of T, so that any T works. From the fault to the loss, where nothing is starved of processors:

- *silence*: a loop gives a sign of life every T/8, and so does a thread beside it while it is inside a long turn. Signs
  are at most T/4 apart: one of the loop, just before a turn that is long, and one of the thread, which looks every T/8.
  The last one comes before the fault, and the loss is told at the first look, every T/20, at which 0.9 T have passed:
  0.95 T. Whose signs are late by less than 0.6 T is never lost: of 0.9 T, T/4 is their usual distance, and T/20 is what
  a look that comes just behind a sign counts too much.
- *hang inside a step*: after up to T/4 the thread notices that the loop is where it was, and then looks every T/8 what
  keeps it there. More than half of T in which nothing did, told up to T/8 later, prove that it hangs: 0.95 T. That
  holds of steps, or layers of them, that take less than T/20; of longer ones, ten times what they take has to pass.
  What else it needs, and what is done where it cannot be had: `StepTime`.
- *cut*: homes name whom they wait for, every T/8, from T/4 on; ask again at T/2, lest a lost message cost a worker its
  life; and accuse from 0.75 T on: 0.925 T. By then the accused has given two signs that it has nothing to answer. It
  counts from the first question that is lost: a link that nobody uses is found to be cut when somebody does.

The rest of T is for messages on their way, and for a server that is busy.

A worker that is killed in error costs its sequences a prefill, and everybody the seconds of a start; if the reason
stays it is killed again and again, and then nothing is served at all. A hang that is found late costs seconds, once. So
where there is doubt more is waited: for whoever visibly runs, for a step of a kind or size that is not well known (it
may compile), for one that was kept from running by other processes or by a disk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

STALL_TIMEOUT_S = 7.0  # no step is suspected before, unless it is proven that it hangs
FIRST_STEP_S = 60.0
USUAL_TIMES = 10.0  # a step may take so many times what its tokens take on average

_SIGNS = 8  # per timeout
_LOOKS = 20
_NAMED_SHARE, _CUT_SHARE = 0.25, 0.75
_MAX_SIGN_S = 0.5
_MAX_LOOK_S = 0.1


class StepTime(NamedTuple):
    """How long a loop has been inside one step, or one layer of a step through all layers.

    A step that usually takes 5 ms may take a thousand times as long on a machine that is overloaded, or that reads its
    weights from a disk. What tells a hang from that is whether something kept it: a loop that nothing keeps from
    running, for most of the failure timeout, hangs, be it that it waits for what never comes or that it computes for
    ever. That is said only of kinds and sizes that are well known; of all others time alone has to tell.

    Attributes:
        step_s: in all.
        usual_s: what steps of that kind have taken on average, for as many tokens; None: it is the first one.
        free_s: of `step_s`, for how long it has been seen that nothing kept it from running.
        longest_s: the longest of the last steps of that kind and size; None: there have been too few to know it.
    """

    step_s: float
    usual_s: float | None
    free_s: float = 0.0
    longest_s: float | None = None


def step_limit_s(usual_s: float | None, stall_timeout_s: float) -> float:
    """How long a step may take before it counts as hung, for whatever reason.

    Args:
        usual_s: see `StepTime`.
    """
    return max(stall_timeout_s, FIRST_STEP_S if usual_s is None else USUAL_TIMES * usual_s)


@dataclass(frozen=True, slots=True)
class Patience:
    """Seconds that follow from the failure timeout, see above."""

    timeout_s: float

    @property
    def sign_s(self) -> float:
        """Signs of life, and reports of homes about answers that they wait for, come so often."""
        return min(_MAX_SIGN_S, self.timeout_s / _SIGNS)

    @property
    def look_s(self) -> float:
        """Who has given signs, and who not, is looked at so often."""
        return min(_MAX_LOOK_S, self.timeout_s / _LOOKS)

    @property
    def silence_s(self) -> float:
        """Whoever has given no sign for so long is silent."""
        return self.timeout_s - 2 * self.look_s

    @property
    def named_s(self) -> float:
        """Whoever has owed an answer for so long is named by whom waits for it."""
        return _NAMED_SHARE * self.timeout_s

    @property
    def answer_s(self) -> float:
        """Whoever has owed an answer for so long, and has nothing to do, is cut off."""
        return _CUT_SHARE * self.timeout_s

    @property
    def lapse_s(self) -> float:
        """A home that has not named somebody for so long waits for him no more."""
        return _CUT_SHARE * self.timeout_s

    @property
    def free_s(self) -> float:
        """A step of a well known kind and size that nothing has kept for so long hangs."""
        return self.timeout_s - 3 * self.sign_s - 2 * self.look_s

    def is_hung(self, step: StepTime) -> bool:
        """Whether a loop will not come out of the step that it is in."""
        if step.longest_s is not None and step.free_s >= max(self.free_s, USUAL_TIMES * step.longest_s):
            return True
        return step.step_s >= step_limit_s(step.usual_s, max(STALL_TIMEOUT_S, self.timeout_s))
