"""What steps have taken so far, by their kind: a block, or all blocks on about so many tokens."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from amoe.core.steps import AttentionStep, ForwardStep, Step

WELL_KNOWN_STEPS = 20  # of one kind and size

Kind = str | int  # name of a kind of block, or bits of a number of tokens
Size = tuple[str, int, int]  # name of a kind of step; bits of its number of tokens, and of how far its prompts reach


@dataclass(slots=True)
class _Longest:
    count: int = 0
    seconds: float = 0.0


class StepTimes:
    """See above.

    A token of a large step costs far less than one of a small step where each reads all weights of a model, so that a
    step of a size that has never been seen is the first of its kind.

    Args:
        num_layers: of a step on all blocks.
        may_compile: any step may have to wait for code that is made for it, however many have run before: none is ever
            well known.
    """

    def __init__(self, num_layers: int = 1, *, may_compile: bool = False) -> None:
        self._num_layers = num_layers
        self._may_compile = may_compile
        self._spent: dict[Kind, list[float]] = defaultdict(lambda: [0.0, 0])
        self._longest: dict[Size, _Longest] = defaultdict(_Longest)

    def observe(self, step: Step, seconds: float) -> None:
        """A step has run."""
        spent = self._spent[_kind_of(step)]
        spent[0] += seconds
        spent[1] += step.num_tokens
        longest = self._longest[_size_of(step)]
        longest.count += 1
        longest.seconds = max(longest.seconds, seconds)

    def usual_s(self, step: Step) -> float | None:
        """What so many tokens have taken on average, in each layer if it was all; None: there have been none."""
        seconds, num_tokens = self._spent.get(_kind_of(step), (0.0, 0))
        return seconds / num_tokens * step.num_tokens / self._num_parts(step) if num_tokens else None

    def longest_s(self, step: Step) -> float | None:
        """What the longest step of that kind and size has taken, shared out among its layers if it was on all; None: it
        is not well known."""
        longest = self._longest.get(_size_of(step))
        if self._may_compile or longest is None or longest.count < WELL_KNOWN_STEPS:
            return None
        return longest.seconds / self._num_parts(step)

    def _num_parts(self, step: Step) -> int:
        return self._num_layers if isinstance(step, ForwardStep) else 1


def _kind_of(step: Step) -> Kind:
    return step.num_tokens.bit_length() if isinstance(step, ForwardStep) else step.block.kind.name


def _size_of(step: Step) -> Size:
    """Chunks of prompts are told apart by how much they attend to, which may be a thousand times as much behind a
    prefix that was cached. Single tokens come to that one by one."""
    name = "forward" if isinstance(step, ForwardStep) else step.block.kind.name
    reach = 0
    if isinstance(step, AttentionStep | ForwardStep) and step.chunks:
        reach = int(step.positions.max())
    return name, step.num_tokens.bit_length(), reach.bit_length()
