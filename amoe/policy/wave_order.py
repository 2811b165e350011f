"""In which order a worker serves the waves, and how far apart they are kept: pure functions.

Lockstep, two-batch overlap and full asynchrony are one family: W waves of tokens are in flight, and a wave's step runs
when all of it is there. What W waves gain is that while one waits for the hottest device of its layer, the others use
the devices that are idle meanwhile. Two things decide whether they do.

**Attention first.** Between an attention step and an expert step that are both complete, the attention step runs. A
late attention share holds up the experts of *all* devices, since strict waves are complete only when every home has
spoken; a late expert step holds up only the homes that have tokens there, and while an expert step runs for long on a
hot device, the attention of the other waves that it delays would have given everybody else work. In simulation this
is worth up to 12 % where the placement is stale, and nothing measurable elsewhere.

**Apart.** Among steps of one kind the least κ + j·δ runs: κ = S·pass + stage is the progress of wave j, S = 2L + 1. δ
puts wave j behind wave 0 by a part of the model, so that different waves meet *different* hot devices; with δ = 0 they
gather at the same layer and queue up before the same one. ¾ of an even spread was the best on average. Two waves are
never both complete on one device, once they have found their rhythm, so no order can part them: they trail each other
by one block for ever, and both wait for the same hot device. So a home also *holds* a wave at the border between
two passes while another is less than half of an even spread ahead. Once apart they stay apart, and the hold costs
nothing.

A hold ends when any home has started the same pass of the wave: that home's announcement is an invitation, and nobody
may hold a wave to which it has been invited. Otherwise two homes that have started different waves, and each holds the
other's, would wait for each other for ever, since experts wait for all homes.

Nobody waits for a timer here; `amoe.core` bounds all waits besides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from amoe.types import Int64Array

SPREAD = 0.75
GAP = 0.5
EXPERTS_LAST = 1 << 40  # more than any κ


@dataclass(frozen=True, slots=True)
class WaveOrder:
    """Order and distance of `num_waves` waves over `num_stages` = 2L + 1 stages.

    Attributes:
        spread: δ in parts of an even spread S / W.
        gap: least distance at which a wave starts behind another, in parts of S / W.
        attention_first: see above.
    """

    num_stages: int
    num_waves: int
    spread: float = SPREAD
    gap: float = GAP
    attention_first: bool = True

    def handicap(self, is_experts: bool, wave: int) -> int:
        """What is added to κ: the least sum runs first. Waves from `num_waves` on, which only finish what they have
        begun when W has shrunk, share the handicaps of the first."""
        offset = int(wave % self.num_waves * self.spread * self.num_stages / self.num_waves)
        return offset + (EXPERTS_LAST if is_experts and self.attention_first else 0)

    def handicaps(self, num_lanes: int) -> Int64Array:
        """[num_lanes · S] of all blocks; the last lane, of tokens that march alone, has no wave's."""
        waves = [*range(num_lanes - 1), 0]
        return np.array(
            [self.handicap(stage % 2 == 1, wave) for wave in waves for stage in range(self.num_stages)], np.int64
        )

    def key(self, is_experts: bool, stage: int, wave: int, num_passes: int) -> int:
        """The step with the least runs first. `num_passes`: of the wave so far."""
        return self.num_stages * num_passes + stage + self.handicap(is_experts, wave)

    def must_hold(self, stages: Sequence[int]) -> bool:
        """Whether a wave must not start a pass that no home has started, with its other waves at `stages`."""
        least = self.gap * self.num_stages / self.num_waves
        return self.num_waves > 1 and any(stage < least for stage in stages)
