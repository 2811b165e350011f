"""Waves at an expert worker: experts(l) of a wave waits for the share of every home, or for word that there is none."""

from __future__ import annotations

from collections.abc import Sequence

from amoe.core.micro_queue import MicroQueues
from amoe.core.waves import WaveGates
from amoe.types import Batch, BlockId, BlockKind

_NONE = -1  # an epoch before all epochs


class ExpertWaves:
    """When the expert blocks of one worker are ready.

    Homes are bits of an integer, so that a marker, of which each home sends one per layer, wave and expert worker,
    costs a few integer operations however many homes there are.

    Args:
        is_late: the homes have begun without this worker: what it has not heard of is not waited for, until each has
            spoken of the latest epoch.

    Attributes:
        num_slips: steps that ran without a home that was still expected.
    """

    def __init__(
        self,
        home_ranks: Sequence[int],
        num_layers: int,
        queues: MicroQueues,
        gates: WaveGates,
        *,
        is_late: bool = False,
    ) -> None:
        num_waves = gates.loose
        self.num_slips = 0
        self._queues = queues
        self._gates = gates
        self._home_of_rank = {rank: home for home, rank in enumerate(home_ranks)}
        self._everybody = (1 << len(home_ranks)) - 1
        # By wave and layer: the epoch that gathers there, the homes whose share is here, the last epoch that has run.
        self._epoch = [[_NONE] * num_layers for _ in range(num_waves)]
        self._arrived = [[0] * num_layers for _ in range(num_waves)]
        self._done = [[_NONE] * num_layers for _ in range(num_waves)]
        # By wave: layers that wait for a home; the latest epoch that anybody has spoken of; homes that kept others
        # waiting for too long, and are not waited for until they have caught up.
        self._gathering: list[set[int]] = [set() for _ in range(num_waves)]
        self._latest = [_NONE] * num_waves
        self._absent = [self._everybody if is_late else 0] * num_waves
        self._gone = 0  # homes that are not there
        # By wave and home: the last epoch to which it has nothing (more) to bring; and that as bits for one epoch.
        self._through = [[_NONE] * len(home_ranks) for _ in range(num_waves)]
        self._through_bits: list[tuple[int, int]] = [(_NONE, 0)] * num_waves

    def on_announce(self, batch: Batch) -> None:
        """A home brings `count` tokens to an epoch, and so has nothing more to bring to those before it."""
        wave, home = batch.wave, self._home_of_rank[batch.src]
        through = batch.epoch if batch.count == 0 else batch.epoch - 1
        if through > self._through[wave][home]:
            self._through[wave][home] = through
            self._through_bits[wave] = (_NONE, 0)
        self._heard(wave, batch.epoch, 1 << home)
        for layer in tuple(self._gathering[wave]):
            self._judge(wave, layer)

    def on_dispatch(self, batch: Batch) -> int:
        """A home's share, perhaps a mere marker, is here.

        Returns:
            The lane in whose queue its tokens belong: what comes after its epoch has run here waits for nobody.
        """
        wave, layer, epoch = batch.wave, batch.layer, batch.epoch
        if wave == self._gates.loose:
            return wave
        gathering = self._epoch[wave][layer]
        if epoch < gathering or epoch <= self._done[wave][layer]:
            return self._gates.loose
        bit = 1 << self._home_of_rank[batch.src]
        self._heard(wave, epoch, bit)
        if epoch > gathering:
            self._set_free(wave, layer)
            self._epoch[wave][layer] = epoch
            self._arrived[wave][layer] = bit
        else:
            self._arrived[wave][layer] |= bit
        self._judge(wave, layer)
        return wave

    def on_run(self, block: BlockId) -> None:
        """`block` runs now, on what is there."""
        wave, layer = block.wave, block.layer
        if wave == self._gates.loose:
            return
        self._done[wave][layer] = epoch = self._epoch[wave][layer]
        if layer not in self._gathering[wave]:
            return
        self.num_slips += 1
        self._absent[wave] |= self._everybody & ~(self._arrived[wave][layer] | self._through_of(wave, epoch))
        for gathering in tuple(self._gathering[wave]):
            self._judge(wave, gathering)

    def on_home_changed(self, home: int, *, is_there: bool) -> None:
        """A home is gone, or another life of it is there, which has to catch up before anybody waits for it."""
        bit = 1 << home
        self._gone = self._gone & ~bit if is_there else self._gone | bit
        for wave in range(len(self._absent)):
            self._absent[wave] |= bit
            for layer in tuple(self._gathering[wave]):
                self._judge(wave, layer)

    def _set_free(self, wave: int, layer: int) -> None:
        """Another epoch gathers at a block: what is left of the one before it waits for nobody any more. A home is
        ahead where its tokens needed fewer experts: those of a prompt do without the last layer's."""
        block = BlockId(BlockKind.EXPERTS, layer, wave)
        index = self._queues.index(block)
        if self._queues.depth[index]:
            self._queues.move(index, self._queues.index(block._replace(wave=self._gates.loose)))

    def _heard(self, wave: int, epoch: int, bit: int) -> None:
        """A home speaks of an epoch. It has caught up if nobody has spoken of a later one."""
        if epoch >= self._latest[wave]:
            self._latest[wave] = epoch
            self._absent[wave] &= ~bit

    def _through_of(self, wave: int, epoch: int) -> int:
        """Homes, as bits, that have nothing (more) to bring to an epoch."""
        known, bits = self._through_bits[wave]
        if known != epoch:
            bits = sum(1 << home for home, through in enumerate(self._through[wave]) if through >= epoch)
            self._through_bits[wave] = (epoch, bits)
        return bits

    def _judge(self, wave: int, layer: int) -> None:
        """Open the gate of a block if nobody is missing, else shut it."""
        here = self._arrived[wave][layer] | self._absent[wave] | self._gone
        complete = here == self._everybody or here | self._through_of(wave, self._epoch[wave][layer]) == self._everybody
        if complete:
            self._gathering[wave].discard(layer)
        else:
            self._gathering[wave].add(layer)
        self._gates.open[wave, 2 * layer + 1] = complete
