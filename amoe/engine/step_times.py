"""What steps have taken so far, by their kind: a block, or all blocks on about so many tokens."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from amoe.core.steps import AttentionStep, ForwardStep, HeadStep, Step

COLD_STEPS = 20  # of one kind and size, which say nothing of the later ones
WELL_KNOWN_STEPS = 20  # behind those
_WINDOW = 256  # steps after which the longest of those before is forgotten, twice over

Kind = str | int  # name of a kind of block, or bits of a number of tokens
Size = tuple[str, int, int]  # name of a kind of step; bits of its number of tokens, and of how far its prompts reach


@dataclass(slots=True)
class _Longest:
    """Of the last steps: one that other processes held up, or a disk, is not remembered for ever."""

    count: int = 0
    before: float = 0.0
    now: float = 0.0

    def observe(self, seconds: float) -> None:
        self.count += 1
        if self.count <= COLD_STEPS:
            return
        if self.count % _WINDOW == 0:
            self.before, self.now = self.now, 0.0
        self.now = max(self.now, seconds)

    @property
    def seconds(self) -> float | None:
        """None: there have been too few."""
        return max(self.before, self.now) if self.count >= COLD_STEPS + WELL_KNOWN_STEPS else None


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
        self._longest[_size_of(step)].observe(seconds)

    def usual_s(self, step: Step) -> float | None:
        """What so many tokens have taken on average, in each layer if it was all; None: there have been none."""
        seconds, num_tokens = self._spent.get(_kind_of(step), (0.0, 0))
        return seconds / num_tokens * step.num_tokens / self._num_parts(step) if num_tokens else None

    def longest_s(self, step: Step) -> float | None:
        """What the longest of the last steps of that kind and size has taken; None: it is not well known.

        A layer's share if it was on all layers and had no head: that is one part of a step, whatever its size.
        """
        longest = self._longest.get(_size_of(step))
        if self._may_compile or longest is None or longest.seconds is None or _scores_prompts(step):
            return None
        has_head = not isinstance(step, ForwardStep) or step.head is not None
        return longest.seconds if has_head else longest.seconds / self._num_layers

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


def _scores_prompts(step: Step) -> bool:
    """Log-probabilities of prompts take a thousand times a sampled token's time, and come without a warning."""
    head = step.head if isinstance(step, ForwardStep) else step
    return isinstance(head, HeadStep) and head.prompt is not None
