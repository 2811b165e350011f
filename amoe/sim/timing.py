"""How long a step takes: its kernels by the cost model, and the clock of a device that gets slower or stops."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from amoe.core.experts import count_pairs
from amoe.core.steps import AttentionStep, ChunkSpan, ExpertsStep, Step
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
        self._offset = context_offset
        # (from when, costs), the latest first.
        phases = [(0.0, cost_model(sizes, device))]
        for slowdown in sorted(slowdowns, key=lambda item: item.at_s):
            phases.append((slowdown.at_s, cost_model(sizes, device.slowed(slowdown.factor))))
        self._phases = phases[::-1]
        # Seconds per (query, context) pair by computing, and per context token by reading.
        self._pair_s = sizes.attention_flops / device.flops
        self._read_s = sizes.kv_bytes / device.bandwidth

    def seconds(self, step: Step, now: float) -> float:
        """Of a step that begins at `now`; 0 of a step without tokens (a lockstep marker)."""
        num_tokens = step.num_tokens
        if num_tokens == 0:
            return 0.0
        costs = next(costs for since, costs in self._phases if since <= now)
        if isinstance(step, AttentionStep):
            return costs.attention(step.block.layer, num_tokens, round(self._context(step)))
        if isinstance(step, ExpertsStep):
            counts = count_pairs(step.expert_ids, self._sizes.num_experts)
            return float(costs.experts(step.block.layer, counts))
        return costs.head(num_tokens)

    def _context(self, step: AttentionStep) -> float:
        """Context tokens that the step's attention costs as much as."""
        count = step.num_decodes
        total = float(int(step.positions[:count].sum()) + count * (1 + self._offset))
        for span in step.chunks:
            total += self._chunk_context(span, int(step.positions[span.start]))
        return total

    def _chunk_context(self, span: ChunkSpan, first: int) -> float:
        """The queries of a chunk share what is read: decode tokens that cost the same have that much context."""
        count = span.end - span.start
        longest = self._offset + first + count
        pairs = count * (self._offset + first) + count * (count + 1) / 2
        return max(pairs * self._pair_s, longest * self._read_s) / max(self._pair_s, self._read_s)


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
