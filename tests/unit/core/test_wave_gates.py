"""The gates of waves, by hand: what is ready, what is announced, who is left behind."""

from __future__ import annotations

import numpy as np

from amoe.config import SchedulerConfig
from amoe.core.batcher import Entry
from amoe.core.expert_waves import ExpertWaves
from amoe.core.home_waves import HomeWaves
from amoe.core.join import Join
from amoe.core.micro_queue import MicroQueues
from amoe.core.waves import FixedWaves, WaveGates, make_controller
from amoe.types import Batch, BatchKind, BlockId, BlockKind

HOMES, OWNERS = (0, 1), (2, 3)
LAYERS, HOLD = 3, 1.0
ATTENTION, EXPERTS, HEAD = BlockKind.ATTENTION, BlockKind.EXPERTS, BlockKind.HEAD


def make_gates(num_waves=1, lanes=4):
    return WaveGates(LAYERS, lanes, HOMES[0], num_waves, HOLD)


def announce(src, count, wave=0, epoch=0, pass_number=0, num_waves=1):
    kind = BatchKind.ANNOUNCE
    return Batch(kind, src, 0, 0, wave, epoch, count, latest_iteration=pass_number, num_waves=num_waves)


class Experts:
    """An `ExpertWaves` with its queues: dispatches carry `count` tokens."""

    def __init__(self, homes=HOMES):
        self.gates = make_gates()
        self.queues = MicroQueues(LAYERS, 4)
        self.waves = ExpertWaves(homes, LAYERS, self.queues, self.gates)

    def announce(self, src, count, epoch=0):
        self.waves.on_announce(announce(src, count, epoch=epoch))

    def dispatch(self, src, count=1, layer=0, epoch=0, now=0.0):
        lane = self.waves.on_dispatch(Batch(BatchKind.DISPATCH, src, 2, layer, 0, epoch, count))
        block = BlockId(EXPERTS, layer, lane)
        self.queues.push(block, (np.full(count, src),), np.full(count, epoch, np.int32), now)
        return lane

    def ready(self, now=0.0):
        view = self.gates.view(self.queues, now)
        return [(block.layer, block.wave) for block in map(self.queues.block, np.flatnonzero(view.ready).tolist())]

    def run(self, layer=0, lane=0):
        block = BlockId(EXPERTS, layer, lane)
        self.waves.on_run(block)
        (homes,) = self.queues.drain(self.queues.index(block))
        return sorted(homes.tolist())


LOOSE = 3


def test_experts_wait_for_every_home_that_brings_tokens():
    experts = Experts()
    experts.announce(0, 5)
    experts.announce(1, 3)
    assert experts.dispatch(0) == 0
    assert experts.ready() == []
    experts.dispatch(1)
    assert experts.ready() == [(0, 0)]
    assert experts.run() == [0, 1]
    assert experts.ready() == []


def test_a_marker_is_as_good_as_tokens_and_a_home_without_any_sends_none():
    experts = Experts(homes=(0, 1, 4))
    experts.announce(0, 5)
    experts.announce(1, 3)
    experts.dispatch(0)
    experts.dispatch(1, count=0)
    assert experts.ready() == [], "nobody knows what home 4 will bring"
    experts.announce(4, 0)
    assert experts.ready() == [(0, 0)]


def test_markers_alone_make_nothing_ready():
    experts = Experts()
    for home in HOMES:
        experts.announce(home, 1)
        experts.dispatch(home, count=0)
    assert experts.ready() == []


def test_a_home_that_withdraws_or_is_an_epoch_ahead_is_not_waited_for():
    for count, epoch in ((0, 0), (4, 1)):
        experts = Experts()
        experts.announce(0, 5)
        experts.announce(1, 3)
        experts.dispatch(0)
        assert experts.ready() == []
        experts.announce(1, count, epoch)
        assert experts.ready() == [(0, 0)]


def test_a_hold_ends_and_the_late_share_runs_at_once():
    experts = Experts()
    experts.announce(0, 5)
    experts.dispatch(0, now=10.0)
    assert experts.ready(now=10.0) == []
    deadline = experts.gates.deadline(experts.queues)
    assert deadline == 10.0 + HOLD
    assert experts.ready(now=deadline) == [(0, 0)]
    assert experts.run() == [0]
    assert experts.waves.num_slips == 1
    experts.announce(1, 3)
    assert experts.dispatch(1, now=12.0) == LOOSE
    assert experts.ready(now=12.0) == [(0, LOOSE)]


def test_whoever_let_others_wait_is_waited_for_again_when_it_has_caught_up():
    experts = Experts()
    experts.announce(0, 5)
    experts.dispatch(0)
    experts.run()
    experts.dispatch(0, layer=1)
    assert experts.ready() == [(1, 0)], "home 1 is still silent, and has been waited for"
    experts.run(layer=1)
    experts.announce(0, 5, epoch=1)
    experts.announce(1, 3, epoch=0)
    experts.dispatch(0, epoch=1)
    assert experts.ready() == [(0, 0)], "it speaks, but of what is past"
    experts.run()
    experts.announce(1, 2, epoch=1)
    experts.dispatch(0, layer=1, epoch=1)
    assert experts.ready() == []


def test_a_complete_step_that_has_not_run_yet_is_not_shut_in_by_the_next_epoch():
    experts = Experts()
    for home in HOMES:
        experts.announce(home, 1)
        experts.dispatch(home)
    experts.announce(0, 1, epoch=1)
    experts.dispatch(0, epoch=1)
    assert experts.ready() == [(0, LOOSE)]
    assert experts.run(lane=LOOSE) == [0, 1]
    assert experts.run() == [0]


class FakeCore:
    """Stands in for an `AttentionCore`: `tokens` wait to start, at most `max_decodes` at once."""

    stepping = -1

    def __init__(self, tokens=0, running=0):
        self.num_ready = tokens
        self.running = dict.fromkeys(range(running))
        self.entered = []
        self.leader = np.arange(100, dtype=np.int32)

    batcher = tokens = property(lambda self: self)

    def start(self, now, max_decodes=None):
        taken = self.num_ready if max_decodes is None else min(self.num_ready, max_decodes)
        self.num_ready -= taken
        return Entry(np.arange(taken, dtype=np.int32))

    def enter(self, entry, wave, now, iteration=None):
        if entry.num_tokens:
            self.entered.append((wave, entry.num_tokens, iteration))


class Home:
    """A `HomeWaves` with its queues and its join; `go` and `come` move one token of a wave."""

    def __init__(self, rank=0, num_waves=1, max_waves=3, **core):
        self.core = FakeCore(**core)
        self.gates = make_gates(num_waves, max_waves + 1)
        self.queues = MicroQueues(LAYERS, max_waves + 1)
        self.join = Join(100, len(OWNERS) + 1, max_waves + 1)  # and nobody
        self.controller = FixedWaves(num_waves)
        self.waves = HomeWaves(
            rank,
            HOMES,
            OWNERS,
            LAYERS - 1,
            join=self.join,
            queues=self.queues,
            gates=self.gates,
            controller=self.controller,
        )

    def start(self, now=0.0):
        return [out.batch for out in self.waves.start(self.core, now)]

    def told(self, now=0.0):
        """What is announced: (wave, epoch, count, pass number), once per worker."""
        batches = self.start(now)
        told = [(b.wave, b.epoch, b.count, b.latest_iteration) for b in batches]
        assert [b.dst for b in batches] == [0, 1, 2, 3] * (len(told) // 4)
        return told[::4]

    def go(self, slot, owners, layer=0, wave=0, now=0.0):
        slots, dispatched = np.array([slot], np.int32), np.isin((*OWNERS, -1), owners)[None]
        self.join.lane[slot] = wave
        self.waves.leaving(slots, slots, dispatched)
        self.join.open(slots, slots, layer, dispatched, now)
        return self.waves.dispatched(BlockId(ATTENTION, layer, wave), now)

    def come(self, slot, owner, layer=0, now=0.0):
        slots = np.array([slot], np.int32)
        self.waves.on_result(OWNERS.index(owner))
        if len(self.join.settle(slots, slots, OWNERS.index(owner))):
            lane = int(self.join.lane[slot])
            self.queues.push(BlockId(ATTENTION, layer + 1, lane), (slots,), np.zeros(1, np.int32), now)

    def ready(self, now=0.0):
        self.waves.refresh()
        view = self.gates.view(self.queues, now)
        return [(block.layer, block.wave) for block in map(self.queues.block, np.flatnonzero(view.ready).tolist())]


def test_a_home_starts_and_announces_without_waiting_for_others():
    home = Home(tokens=3)
    assert home.told() == [(0, 0, 3, 0)]
    assert home.core.entered == [(0, 3, 0)]


def test_nobody_speaks_without_tokens_or_an_invitation():
    assert Home().told() == []


def test_an_invited_home_without_tokens_says_so_at_once():
    home = Home(rank=1)
    home.waves.on_announce(announce(0, 5, epoch=7, pass_number=9))
    assert home.told() == [(0, 7, 0, 9)]
    assert home.told() == []
    home.core.num_ready = 2
    assert home.told() == [(0, 8, 2, 10)]


def test_waves_share_the_running_sequences():
    home = Home(num_waves=3, tokens=7, running=7)
    for wave in range(3):  # each starts when the one before it has got out of its way
        home.start()
        home.go(wave, owners=[2], wave=wave)
    assert home.core.entered == [(0, 3, 0), (1, 3, 0), (2, 1, 0)]


def test_a_wave_does_not_start_close_behind_another_unless_another_home_has_begun_it():
    home = Home(num_waves=2, tokens=4, running=4)
    home.start()
    home.queues.depth[0] = 2  # wave 0 waits for attention(0)
    home.start()
    assert home.core.entered == [(0, 2, 0)]
    home.waves.on_announce(announce(1, 2, wave=1))
    home.start()
    assert [wave for wave, _, _ in home.core.entered] == [0, 1]


def test_waves_beyond_their_number_take_no_sequences_but_answer():
    home = Home(rank=1, num_waves=1, tokens=4)
    home.waves.on_announce(announce(0, 5, wave=2))
    assert home.told() == [(0, 0, 4, 0), (2, 0, 0, 0)]


def test_the_leader_decides_the_number_of_waves():
    leader, other = Home(rank=0, tokens=2, running=2), Home(rank=1, tokens=2, running=2)
    leader.controller.num_waves = 2
    batches = leader.start()
    assert {batch.num_waves for batch in batches} == {2}
    other.gates.hear(batches[0])
    assert other.gates.num_waves == 2
    other.gates.hear(announce(1, 1, num_waves=3))
    assert other.gates.num_waves == 2


def test_a_wave_that_was_idle_comes_back_level():
    home = Home(num_waves=2, tokens=1, running=2)
    home.waves.on_announce(announce(1, 5, wave=1, epoch=50, pass_number=80))
    assert home.told()[0] == (0, 0, 1, 80)


def test_attention_waits_for_the_wave_s_own_tokens_and_nobody_else():
    home = Home(tokens=2, num_waves=2, running=4)
    home.start()
    assert home.go(0, owners=[2, 3]) == 0
    home.go(1, owners=[3])
    home.go(2, owners=[2], wave=1)
    home.come(0, 2)
    home.come(0, 3)
    assert home.ready() == []
    home.come(1, 3)
    assert home.ready() == [(1, 0)]


def test_a_token_that_is_gone_is_not_waited_for():
    home = Home(tokens=2)
    home.start()
    home.go(0, owners=[2])
    home.go(1, owners=[2, 3])
    home.come(0, 2)
    home.join.cancel(np.array([1], np.int32))
    assert home.ready() == [(1, 0)]


def test_a_wave_whose_tokens_are_all_gone_withdraws():
    home = Home(tokens=1)
    home.start()
    home.go(0, owners=[2])
    assert home.told() == []
    home.join.cancel(np.array([0], np.int32))
    assert home.told() == [(0, 0, 0, 0)]
    assert home.told() == []


def test_a_wave_that_has_told_of_its_last_layer_ends_without_a_word():
    home = Home(tokens=1)
    home.start()
    for layer in range(LAYERS):
        home.go(0, owners=[2], layer=layer)
        home.come(0, 2, layer=layer)
        home.queues.drain(home.queues.index(BlockId(ATTENTION, layer + 1, 0)))
    assert home.told() == []
    home.core.num_ready = 1
    assert home.told() == [(0, 1, 1, 1)]


def test_a_wave_that_is_being_stepped_is_not_over():
    home = Home(tokens=1)
    home.start()
    home.core.stepping = 0
    home.core.num_ready = 1
    assert home.told() == []


def test_a_wave_goes_on_without_those_that_stay_away_and_parts_with_their_kind_at_once():
    home = Home(tokens=3)
    home.start()
    for slot, owners in ((0, [2]), (1, [3]), (2, [2, 3])):
        home.go(slot, owners)
    home.come(0, 2, now=5.0)
    home.come(2, 2, now=5.0)
    assert home.ready(now=5.0) == []
    assert home.ready(now=5.0 + HOLD) == [(1, 0)]
    home.waves.on_run(0, home.core)
    assert home.waves.num_slips == 1
    assert home.join.lane[:3].tolist() == [0, LOOSE, LOOSE]
    assert home.join.outstanding.tolist() == [0, 0, 0, 2]
    home.queues.drain(home.queues.index(BlockId(ATTENTION, 1, 0)))
    home.go(0, [2, 3], layer=1)
    assert home.join.lane[0] == LOOSE, "whoever needs the silent worker 3 is not waited for"
    home.come(1, 3, now=7.0)
    assert home.ready(now=7.0) == [(1, LOOSE)]
    home.go(5, [3], layer=1)
    assert home.join.lane[5] == 0, "it has answered"


def test_a_wave_of_which_nobody_comes_back_is_given_up_when_others_wait_for_it():
    home = Home(tokens=2)
    home.start()
    home.go(0, owners=[2], now=5.0)
    assert home.waves.deadline(home.core) is None, "nobody wants it"
    home.core.num_ready = 4
    assert home.waves.deadline(home.core) == 5.0 + HOLD
    assert home.told(now=5.5) == []
    assert home.told(now=5.0 + HOLD) == [(0, 0, 0, 0), (0, 1, 4, 1)]
    assert home.waves.deadline(home.core) is None


def test_a_configured_number_of_waves_never_changes():
    controller = make_controller(SchedulerConfig(schedule="waves", num_waves=3))
    controller.observe(100, 1.0)
    assert controller.num_waves == 3
    assert make_controller(SchedulerConfig(schedule="waves", max_waves=1)).num_waves == 1
    assert 1 <= make_controller(SchedulerConfig(schedule="waves", max_waves=4)).num_waves <= 4
