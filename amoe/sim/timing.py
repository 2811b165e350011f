"""How long a step takes: its kernels by the cost model, and the clock of a device that gets slower or stops."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from amoe.core.experts import count_pairs
from amoe.core.steps import AttentionStep, BlockStep, ExpertsStep
from amoe.profiles.context import ContextCounter
from amoe.profiles.costs import BlockCosts, RooflineCosts
from amoe.profiles.devices import DeviceProfile
from amoe.profiles.models import ModelSizes
from amoe.sim.config import Outage, Slowdown

CostModel = Callable[[ModelSizes, DeviceProfile], BlockCosts]
ROOFLINE: CostModel = RooflineCosts


class StepTimer:
    """Seconds of device time of the steps of one worker.

    Args:
        slowdowns: of this worker.
        context_offset: tokens of context that every token sees beside those before it (see `Workload`).
    """

    def __init__(
        self,
        sizes: ModelSizes,
        device: DeviceProfile,
        slowdowns: Sequence[Slowdown] = (),
        *,
        cost_model: CostModel = ROOFLINE,
        context_offset: int = 0,
    ) -> None:
        self._sizes = sizes
        self._context = ContextCounter(sizes, device, context_offset)
        # (from when, costs), the latest first.
        phases = [(0.0, cost_model(sizes, device))]
        for slowdown in sorted(slowdowns, key=lambda item: item.at_s):
            phases.append((slowdown.at_s, cost_model(sizes, device.slowed(slowdown.factor))))
        self._phases = phases[::-1]

    def seconds(self, step: BlockStep, now: float) -> float:
        """Of a step that begins at `now`; 0 of a step without tokens (a lockstep marker)."""
        num_tokens = step.num_tokens
        if num_tokens == 0:
            return 0.0
        costs = next(costs for since, costs in self._phases if since <= now)
        if isinstance(step, AttentionStep):
            return costs.attention(step.block.layer, num_tokens, round(self._context.count(step)))
        if isinstance(step, ExpertsStep):
            counts = count_pairs(step.expert_ids, self._sizes.num_experts)
            return float(costs.experts(step.block.layer, counts))
        return costs.head(num_tokens)


class Timeline:
    """When a worker that has outages does what."""

    def __init__(self, outages: Sequence[Outage] = ()) -> None:
        self._outages = sorted(outages, key=lambda item: item.start_s)

    def available(self, now: float) -> float:
        """`now`, or the end of the outage that holds then (+inf: it is dead)."""
        for outage in self._outages:
            if outage.start_s <= now < outage.end_s:
                now = outage.end_s
        return now

    def finish(self, begin: float, seconds: float) -> float:
        """When `seconds` of work that begins at `begin` are done: outages stop the work, they do not lose it."""
        end = begin + seconds
        for outage in self._outages:
            if begin < outage.end_s and outage.start_s < end:
                end += outage.end_s - max(begin, outage.start_s)
        return end
