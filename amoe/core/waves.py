"""Staggered strict waves: what every worker knows of them, whether it is a home, holds experts, or both.

A home splits its running sequences into W *waves*. The tokens of one wave, of all homes, march through the model
together, each with the others of its wave and with nobody else:

    attention(l)  of a wave runs at a home when all tokens of that wave *of this home* are back: the home's own join
                  says so, and no other home can hold it up here (`HomeWaves`);
    experts(l)    of a wave runs at an expert worker when every home has brought its share, or has said that it has
                  none: one dispatch or one zero-row marker per home and layer (`ExpertWaves`).

So every step is as large as it can be, as in lockstep, but nobody stands still for it: while one wave waits for its
last tokens, the others run. Which of the ready steps comes first, and how far apart waves are kept so that hot experts
of different layers work at the same time, is the business of `amoe.policy.wave_order`. W = 1 is lockstep without the
barrier between homes, W = 2 overlaps two micro-batches, and W without bound would be `progress`.

A pass of one wave through the model is an *epoch*, numbered by wave, the same number at all homes. A home announces
with it how many tokens it brings; to be silent is to be waited for, so a home that hears of an epoch and has nothing to
bring says so at once. Announcements also carry the *pass number*, the epoch's progress on a scale that all waves share,
and W, which the leader (the home of the lowest rank) decides.

All waiting is advisory, and bounded by `max_hold_s`. Tokens are told apart by slots and generations alone, never by the
epoch with which they came, so whoever is missing can always be left behind. What is left behind goes through the *loose
lane*, a set of μ-queues that waits for nobody, until the next border of an iteration, where a wave takes it in again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from amoe.config import SchedulerConfig
from amoe.core.micro_queue import MicroQueues
from amoe.policy.scheduler import NEVER, QueueView, expired, num_stages
from amoe.policy.wave_count import WaveProber
from amoe.policy.wave_order import WaveOrder
from amoe.types import Batch, BoolArray


class WaveController(Protocol):
    """Decides W while the engine runs.

    Attributes:
        num_waves: 1 to max_waves; may change after `observe`.
    """

    num_waves: int

    def observe(self, tokens: int, now: float) -> None:
        """A wave of this home has finished an iteration with so many decode tokens: prompts come in bursts, which would
        look like a change of load."""


@dataclass(slots=True)
class FixedWaves:
    """A `WaveController` that never changes its mind."""

    num_waves: int

    def observe(self, tokens: int, now: float) -> None:
        """Nothing to learn."""


FIRST_WAVES = 1  # right at low load, where a wrong number costs most


def make_controller(config: SchedulerConfig) -> WaveController:
    """The controller that the configuration asks for."""
    if config.num_waves is not None or config.max_waves == 1:
        return FixedWaves(config.num_waves or 1)
    return WaveProber(min(FIRST_WAVES, config.max_waves), config.max_waves)


class WaveGates:
    """Which blocks of one worker may run, and how they are ordered.

    Attributes:
        open: [num_lanes, S] nobody is missing at the block. Attention and head (even stages) are kept by `HomeWaves`,
            experts (odd stages) by `ExpertWaves`.
        loose: the lane that waits for nobody: the last one.
        order: of the waves that there are now.
    """

    def __init__(self, num_layers: int, num_lanes: int, leader: int, num_waves: int, max_hold_s: float) -> None:
        self.loose = num_lanes - 1
        self.max_hold_s = max_hold_s
        self.open: BoolArray = np.zeros((num_lanes, num_stages(num_layers)), np.bool_)
        self.open[self.loose] = True
        self._num_layers = num_layers
        self._leader = leader
        self.num_waves = 0
        self.set_num_waves(num_waves)

    def set_num_waves(self, num_waves: int) -> None:
        """W is another from now on. Waves beyond it go on to their border, and take no more sequences."""
        if num_waves != self.num_waves:
            self.num_waves = min(num_waves, self.loose)
            self.order = WaveOrder(num_stages(self._num_layers), self.num_waves)
            self._handicaps = self.order.handicaps(self.loose + 1)

    def hear(self, batch: Batch) -> None:
        """An announcement has come: the leader's decides W."""
        if batch.src == self._leader:
            self.set_num_waves(batch.num_waves)

    def view(self, queues: MicroQueues, now: float) -> QueueView:
        """Statistics for the policy: ready is who waits for nobody, or has done so for too long."""
        waiting = queues.depth > 0
        ready = waiting & (self.open.ravel() | expired(queues.oldest, now, self.max_hold_s))
        kappa = np.where(waiting, queues.min_kappa, 0) + self._handicaps
        return QueueView(ready, queues.depth, queues.oldest, np.where(waiting, kappa, NEVER))

    def deadline(self, queues: MicroQueues) -> float | None:
        """When the first of those that wait for somebody has waited long enough; None: nobody waits."""
        oldest = queues.oldest[~self.open.ravel()].min(initial=np.inf)  # of an empty queue: +inf
        return None if oldest == np.inf else float(oldest) + self.max_hold_s
