"""The barrier baseline: the same blocks and queues, marched layer by layer.

An *epoch* of a wave (a ping-pong micro-batch) is one pass through the model. Before it, every home announces to every
worker how many tokens it brings; it starts when all have spoken, so a home with nothing to do speaks too, with zero.
Then, layer by layer, every home that brings tokens sends a dispatch to *every* expert worker, with zero rows where it
has none (a marker); experts(l) runs when all of them have come, and answers all of them; attention(l + 1) runs when
*every* expert worker has answered. That is the all-to-all before and after the experts of an engine in lockstep.

The barrier decides only what is ready. Tokens pass through the same μ-queues and the same join as without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from amoe.core.steps import Outgoing
from amoe.types import Batch, BatchKind, BlockId, BlockKind

if TYPE_CHECKING:
    from amoe.core.attention import AttentionCore


class Phase(Enum):
    """Of one wave at one home."""

    IDLE = "idle"
    ANNOUNCED = "announced"
    RUNNING = "running"


@dataclass(slots=True)
class Wave:
    """One wave at one home: it is about to run attention(layer) (`layer` = L: the head) when nobody is missing."""

    phase: Phase = Phase.IDLE
    epoch: int = 0
    layer: int = 0
    missing: set[int] = field(default_factory=set)  # ranks of expert workers that have not answered


class Announcements:
    """Tokens that each home brings, by (wave, epoch)."""

    def __init__(self, num_homes: int) -> None:
        self._num_homes = num_homes
        self._counts: dict[tuple[int, int], dict[int, int]] = {}

    def add(self, batch: Batch) -> None:
        """A home has spoken. Hearing it twice changes nothing."""
        self._counts.setdefault((batch.wave, batch.epoch), {})[batch.src] = batch.count

    def any(self, wave: int, epoch: int) -> bool:
        """Somebody wants this epoch."""
        return (wave, epoch) in self._counts

    def all(self, wave: int, epoch: int) -> bool:
        """Every home has spoken."""
        return len(self._counts.get((wave, epoch), ())) == self._num_homes

    def participants(self, wave: int, epoch: int) -> frozenset[int]:
        """Ranks of the homes that bring tokens."""
        return frozenset(rank for rank, count in self._counts.get((wave, epoch), {}).items() if count > 0)

    def forget_before(self, wave: int, epoch: int) -> None:
        """Epochs before this one are over."""
        for key in [key for key in self._counts if key[0] == wave and key[1] < epoch]:
            del self._counts[key]


class HomeBarrier:
    """When the attention blocks and the head of one home are ready."""

    def __init__(
        self, rank: int, home_ranks: Sequence[int], owner_ranks: Sequence[int], num_layers: int, num_waves: int
    ) -> None:
        self._rank = rank
        self._owner_ranks = frozenset(owner_ranks)
        self._everybody = sorted({*home_ranks, *owner_ranks})
        self._num_layers = num_layers
        self._waves = [Wave() for _ in range(num_waves)]
        self._announcements = Announcements(len(home_ranks))

    def start(self, core: AttentionCore, now: float) -> list[Outgoing]:
        """Start and announce the epochs that can be. Returns the announcements to send, this worker's own included."""
        outgoing: list[Outgoing] = []
        for index, wave in enumerate(self._waves):
            if wave.phase is Phase.ANNOUNCED and self._announcements.all(index, wave.epoch):
                self._begin(index, wave)
            # After that: an epoch without tokens here is over as it begins, and the next may have been announced.
            if wave.phase is Phase.IDLE:
                outgoing += self._announce(core, index, wave, now)
        return outgoing

    def _announce(self, core: AttentionCore, index: int, wave: Wave, now: float) -> list[Outgoing]:
        invited = self._announcements.any(index, wave.epoch)
        if not invited and not core.batcher.num_ready:
            return []
        # Ping-pong: a wave takes its share of the running sequences and leaves the others theirs.
        share = -(-len(core.batcher.running) // len(self._waves)) if len(self._waves) > 1 else None
        entry = core.batcher.start(now, max_decodes=share)
        if not invited and entry.num_tokens == 0:
            return []
        core.enter(entry, index, now)
        wave.phase = Phase.ANNOUNCED
        return [
            Outgoing(Batch(BatchKind.ANNOUNCE, self._rank, rank, 0, index, wave.epoch, entry.num_tokens))
            for rank in self._everybody
        ]

    def _begin(self, index: int, wave: Wave) -> None:
        self._announcements.forget_before(index, wave.epoch)
        if self._rank in self._announcements.participants(index, wave.epoch):
            wave.phase, wave.layer, wave.missing = Phase.RUNNING, 0, set()
        else:
            wave.phase, wave.epoch = Phase.IDLE, wave.epoch + 1

    def on_announce(self, batch: Batch) -> None:
        """Some home, perhaps this one, has spoken."""
        if batch.epoch >= self._waves[batch.wave].epoch:
            self._announcements.add(batch)

    def dispatched(self, wave: int) -> int:
        """The wave's tokens go to the experts of its layer. Returns the epoch, for the batches' headers."""
        self._waves[wave].layer += 1
        self._waves[wave].missing = set(self._owner_ranks)
        return self._waves[wave].epoch

    def passed(self, wave: int) -> None:
        """The wave has passed a dense layer: there is nobody to wait for."""
        self._waves[wave].layer += 1

    def on_result(self, batch: Batch) -> None:
        """An expert worker has answered, perhaps with zero rows."""
        wave = self._waves[batch.wave]
        if wave.phase is Phase.RUNNING and batch.epoch == wave.epoch and batch.layer == wave.layer - 1:
            wave.missing.discard(batch.src)

    def finish(self, wave: int) -> None:
        """The head has run: the epoch is over."""
        self._waves[wave].phase = Phase.IDLE
        self._waves[wave].epoch += 1

    def ready(self) -> list[tuple[BlockId, int]]:
        """Blocks that may run, each with its epoch."""
        blocks = []
        for index, wave in enumerate(self._waves):
            if wave.phase is Phase.RUNNING and not wave.missing:
                kind = BlockKind.HEAD if wave.layer == self._num_layers else BlockKind.ATTENTION
                blocks.append((BlockId(kind, wave.layer, index), wave.epoch))
        return blocks


class ExpertsBarrier:
    """When the expert blocks of one worker are ready."""

    def __init__(self, home_ranks: Sequence[int]) -> None:
        self._announcements = Announcements(len(home_ranks))
        self._arrived: dict[BlockId, tuple[int, set[int]]] = {}  # epoch and homes whose dispatch is here

    def on_announce(self, batch: Batch) -> None:
        """A home has spoken."""
        self._announcements.add(batch)

    def on_dispatch(self, batch: Batch) -> None:
        """A home's dispatch, perhaps a mere marker, is here."""
        block = BlockId(BlockKind.EXPERTS, batch.layer, batch.wave)
        epoch, homes = self._arrived.get(block, (batch.epoch, set()))
        if batch.epoch > epoch:
            epoch, homes = batch.epoch, set()
        if batch.epoch == epoch:
            homes.add(batch.src)
        self._arrived[block] = (epoch, homes)

    def ready(self) -> list[tuple[BlockId, int]]:
        """Blocks that may run, each with its epoch."""
        return [
            (block, epoch)
            for block, (epoch, homes) in self._arrived.items()
            if self._announcements.all(block.wave, epoch)
            and homes >= self._announcements.participants(block.wave, epoch)
        ]

    def complete(self, block: BlockId) -> tuple[int, frozenset[int]]:
        """`block` runs. Returns its epoch and the homes that wait for an answer."""
        epoch, _ = self._arrived.pop(block)
        participants = self._announcements.participants(block.wave, epoch)
        self._announcements.forget_before(block.wave, epoch)
        return epoch, participants
