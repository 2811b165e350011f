"""Waves at a home: which sequences march in which wave, and when the wave has come home from the experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from amoe.core.join import Join
from amoe.core.micro_queue import MicroQueues
from amoe.core.steps import Outgoing
from amoe.core.waves import WaveController, WaveGates
from amoe.types import Batch, BatchKind, BlockId, BoolArray, Int32Array

if TYPE_CHECKING:
    from amoe.core.attention import AttentionCore


EPOCHS_PER_LIFE = 1 << 40


@dataclass(slots=True)
class HomeWave:
    """One wave at one home.

    Attributes:
        epoch: under way if `running`, else the next.
        running: the home has announced tokens for the epoch, and they are not all through.
        num_decodes: of the tokens that it has announced; the others are prompts'.
        next_layer: expert workers have been told of all layers before it.
        dispatched_at: when its tokens last went to experts.
        heard_epoch, heard_pass: the latest epoch that any home has announced, and the greatest pass number with it.
    """

    epoch: int = 0
    running: bool = False
    num_decodes: int = 0
    next_layer: int = 0
    dispatched_at: float = 0.0
    heard_epoch: int = -1
    heard_pass: int = -1

    def hear(self, epoch: int, pass_number: int) -> None:
        """A home has announced an epoch."""
        if epoch >= self.heard_epoch:
            self.heard_epoch = epoch
            self.heard_pass = max(self.heard_pass, pass_number)

    @property
    def is_invited(self) -> bool:
        """Others have begun an epoch of which this home has not said what it brings."""
        return not self.running and self.heard_epoch >= self.epoch


class HomeWaves:
    """Starts the epochs of one home, and knows when its attention blocks and its head are ready.

    A wave is home when no answer is outstanding for it (`Join.outstanding`). A token that is aborted or preempted takes
    its outstanding answers with it, so nobody waits for it. A wave whose tokens are all gone in the middle of the model
    withdraws: it announces that it has nothing more to bring, or expert workers would wait for its markers.

    Args:
        last_layer: the last one with experts.
        incarnation: which life of this home it is.

    Attributes:
        num_slips: waves that went on without tokens that were still away.
    """

    def __init__(
        self,
        rank: int,
        home_ranks: Sequence[int],
        owner_ranks: Sequence[int],
        last_layer: int,
        *,
        join: Join,
        queues: MicroQueues,
        gates: WaveGates,
        controller: WaveController,
        incarnation: int = 0,
    ) -> None:
        self.num_slips = 0
        self._rank = rank
        self._leads = rank == min(home_ranks)
        self._everybody = sorted({*home_ranks, *owner_ranks})
        self._last_layer = last_layer
        self._join = join
        self._gates = gates
        self._controller = controller
        # Expert workers remember the epochs of the one that was here before: this one's come behind them.
        self._waves = [HomeWave(epoch=incarnation * EPOCHS_PER_LIFE) for _ in range(gates.loose)]
        self._depth = queues.depth.reshape(gates.open.shape)[: gates.loose, ::2]  # of attention and head, by wave
        self._greatest_pass = 0
        # Expert workers that kept a wave waiting for too long, and have not answered since, and nobody: [D + 1].
        self._suspects: BoolArray = np.zeros(join.dispatched.shape[1], np.bool_)
        self._suspects[-1] = True
        self._has_suspects = self._has_missing = False

    # ---- epochs begin and end

    def start(self, core: AttentionCore, now: float) -> list[Outgoing]:
        """End the epochs that are over, start those that can be. Returns the announcements to send."""
        outgoing: list[Outgoing] = []
        at_home: BoolArray = np.any(self._depth, axis=1, keepdims=True).ravel()
        away = self._join.outstanding[: len(self._waves)] > 0
        willing = True
        # In the same order at all homes: where sequences are fewer than a wave each, others would start another wave
        # than this home, and every wave would march with the sequences of one home alone.
        for index, wave in enumerate(self._waves):
            if away[index] and not at_home[index] and self._is_stuck(wave, core, now):
                self._let_go(index, core)
            elif at_home[index] or away[index] or core.stepping == index:
                continue
            if wave.running:
                outgoing += self._end(index, wave, now)
            takes_part = willing and index < self._gates.num_waves and core.batcher.num_ready > 0
            if takes_part and not wave.is_invited and self._is_close_behind(index):
                continue
            if takes_part or wave.is_invited:
                announced = self._begin(index, wave, core, now, takes_part)
                outgoing += announced
                willing &= not takes_part or wave.running  # where nobody can start, the next wave need not try
        return outgoing

    def _is_close_behind(self, index: int) -> bool:
        """Another wave of this home has only just begun. If a wave that other homes have begun waited for that, they
        would have to do without its tokens."""
        stages = [2 * other.next_layer for number, other in enumerate(self._waves) if other.running and number != index]
        return self._gates.order.must_hold(stages)

    def _begin(self, index: int, wave: HomeWave, core: AttentionCore, now: float, takes_part: bool) -> list[Outgoing]:
        if self._leads:
            self._gates.set_num_waves(self._controller.num_waves)
        num_tokens, num_decodes, invited = 0, 0, wave.is_invited
        epoch = max(wave.epoch, wave.heard_epoch)
        pass_number = self._next_pass(wave, epoch)
        if takes_part:
            entry = core.batcher.start(now, max_decodes=self._share(core))
            num_tokens, num_decodes = entry.num_tokens, len(entry.decodes)
            core.enter(entry, index, now, pass_number)
        if num_tokens == 0 and not invited:
            return []
        wave.running, wave.num_decodes, wave.next_layer = num_tokens > 0, num_decodes, 0
        wave.epoch = epoch if wave.running else epoch + 1
        wave.hear(epoch, pass_number)
        self._greatest_pass = max(self._greatest_pass, pass_number)
        return self._announce(index, epoch, num_tokens, pass_number)

    def _end(self, index: int, wave: HomeWave, now: float) -> list[Outgoing]:
        wave.running = False
        wave.epoch += 1
        if wave.next_layer <= self._last_layer:  # its tokens are gone before they were through
            return self._announce(index, wave.epoch - 1, 0, wave.heard_pass)
        self._controller.observe(wave.num_decodes, now)
        return []

    def _share(self, core: AttentionCore) -> int | None:
        """A wave takes its share of the running sequences and leaves the others theirs."""
        num_waves = self._gates.num_waves
        return -(-len(core.batcher.running) // num_waves) if num_waves > 1 else None

    def _next_pass(self, wave: HomeWave, epoch: int) -> int:
        """The progress of an epoch that starts: one pass after the wave's last one, or what another home has said.

        A wave that has been idle comes back level with the others: with its old count it would have the least progress
        of all, and be served alone until it has caught up; a pass behind it would go first for ever, as if its handicap
        were negative.
        """
        successor = wave.heard_pass + (epoch > wave.heard_epoch)
        return max(successor, self._greatest_pass)

    def _announce(self, index: int, epoch: int, count: int, pass_number: int) -> list[Outgoing]:
        return [
            Outgoing(
                Batch(
                    BatchKind.ANNOUNCE,
                    self._rank,
                    rank,
                    0,
                    index,
                    epoch,
                    count,
                    latest_iteration=pass_number,
                    num_waves=self._gates.num_waves,
                )
            )
            for rank in self._everybody
        ]

    def on_announce(self, batch: Batch) -> None:
        """Some home, perhaps this one, has spoken."""
        self._waves[batch.wave].hear(batch.epoch, batch.latest_iteration)
        self._greatest_pass = max(self._greatest_pass, batch.latest_iteration)

    # ---- tokens go and come back

    def refresh(self) -> None:
        """Open the gates of the waves that are at home."""
        self._gates.open[: self._gates.loose, ::2] = (self._join.outstanding[: len(self._waves)] == 0)[:, None]

    def leaving(self, slots: Int32Array, leaders: Int32Array, dispatched: BoolArray) -> None:
        """Tokens [n] are about to be dispatched to the owners in `dispatched` [n, D]: part with those whose answer
        nobody should wait for. Whole groups stay together."""
        if self._has_suspects:
            hopeless = dispatched[:, self._suspects].any(axis=1)
            self._join.lane[slots[np.isin(leaders, leaders[hopeless])]] = self._gates.loose

    def dispatched(self, block: BlockId, now: float) -> int | None:
        """Tokens go to the experts of a layer. Returns the epoch; None: they are loose, and need no markers."""
        if block.wave == self._gates.loose:
            return None
        wave = self._waves[block.wave]
        wave.next_layer = block.layer + 1
        wave.dispatched_at = now
        return wave.epoch

    def on_result(self, owner: int) -> None:
        """An expert worker has answered: it lives."""
        if self._has_suspects and self._suspects[owner]:
            self._suspects[owner] = False
            self._has_suspects = self._has_missing or bool(self._suspects[:-1].any())

    # ---- workers come and go

    @property
    def loose(self) -> int:
        """The lane that waits for nobody."""
        return self._gates.loose

    def on_roster(self, changed: BoolArray, *, has_missing: bool) -> None:
        """`changed` [D] expert workers are not whom they were; `has_missing`: some experts are nowhere."""
        self._suspects[:-1] &= ~changed
        self._has_missing = has_missing
        self._has_suspects = has_missing or bool(self._suspects[:-1].any())

    def part_with(self, leaders: Int32Array, leader_of: Int32Array) -> None:
        """The groups of `leaders` [n] will be away for long: they march alone. `leader_of` [S] tells all leaders."""
        if len(leaders):
            self._join.part_with(leaders, self._gates.loose, leader_of)

    # ---- nobody waits for ever

    def on_run(self, lane: int, core: AttentionCore) -> None:
        """Attention or head of a lane runs, on what is there: tokens still away have to follow on their own."""
        if lane != self._gates.loose and self._join.outstanding[lane]:
            self._let_go(lane, core)

    def deadline(self, core: AttentionCore) -> float | None:
        """When a wave of which nobody is back will have kept other sequences waiting for too long."""
        stuck = self._join.outstanding[: len(self._waves)] > 0
        stuck &= ~self._depth.any(axis=1)
        if not stuck.any() or not core.batcher.num_ready:
            return None
        return min(self._waves[index].dispatched_at for index in np.flatnonzero(stuck)) + self._gates.max_hold_s

    def _is_stuck(self, wave: HomeWave, core: AttentionCore, now: float) -> bool:
        """Nobody of the wave has come back, and others could use it."""
        return wave.dispatched_at + self._gates.max_hold_s <= now and core.batcher.num_ready > 0

    def _let_go(self, index: int, core: AttentionCore) -> None:
        """Tokens of a wave that are still away are loose from now on."""
        self.num_slips += 1
        self._suspects |= self._join.loosen(index, self._gates.loose, core.batcher.tokens.leader)
        self._has_suspects = self._has_missing or bool(self._suspects[:-1].any())
