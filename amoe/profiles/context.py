"""How much context a step of attention has to pay for: the one definition for simulated and for emulated devices."""

from __future__ import annotations

from amoe.core.steps import AttentionStep
from amoe.profiles.devices import DeviceProfile
from amoe.profiles.models import ModelSizes


class ContextCounter:
    """Turns the context of a step into that of decode tokens that cost the same.

    The queries of a prefill chunk share what is read, while every decode token reads its own context.

    Args:
        offset: tokens of context that every token sees beside those before it.
    """

    def __init__(self, sizes: ModelSizes, device: DeviceProfile, offset: int = 0) -> None:
        self._offset = offset
        # Seconds per (query, context) pair by computing, and per context token by reading.
        self._pair_s = sizes.attention_flops / device.flops
        self._read_s = sizes.kv_bytes / device.bandwidth

    def count(self, step: AttentionStep) -> float:
        """Context tokens of all tokens of the step together, as `BlockCosts.attention` takes them."""
        num_decodes = step.num_decodes
        total = float(int(step.positions[:num_decodes].sum()) + num_decodes * (1 + self._offset))
        for span in step.chunks:
            total += self._of_chunk(span.end - span.start, int(step.positions[span.start]))
        return total

    def _of_chunk(self, count: int, first: int) -> float:
        """A chunk of `count` tokens whose first is at position `first`."""
        longest = self._offset + first + count
        pairs = count * (self._offset + first) + count * (count + 1) / 2
        return max(pairs * self._pair_s, longest * self._read_s) / max(self._pair_s, self._read_s)
