"""How many waves: predicted from times, or probed without any model."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amoe.policy.wave_count import ProbeConfig, WaveEstimate, WaveProber, choose_num_waves

# ---- prediction


def estimate(num_waves: int, busy=(1.0, 2.0), port=0.1, latency=3.0, communication=0.5) -> WaveEstimate:
    return WaveEstimate(num_waves, np.array(busy), port, latency, communication)


def test_passes_by_hand():
    assert estimate(1).pass_s == 3.5
    assert estimate(2).pass_s == 2.0 + 3.0
    assert estimate(3).pass_s == 2 * 2.0 + 3.0
    assert estimate(2, busy=(0.1,), latency=1.0, communication=4.0).pass_s == 5.0  # nobody is faster than alone
    assert estimate(4, port=2.0).pass_s == 9.0
    assert estimate(4, port=3.0).pass_s == 12.0


@st.composite
def estimates(draw):
    """Of 1 to n waves: a wave's work falls as waves get smaller, but for a fixed part."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    fixed, work = rng.random(4) * draw(st.sampled_from([0.0, 1.0])), rng.random(4) * 5
    alone, link = float(rng.uniform(1, 2)), float(rng.random())
    return [
        WaveEstimate(waves, fixed + work / waves, link / 4 / waves, alone * float((fixed + work / waves).max()), link)
        for waves in range(1, draw(st.integers(1, 8)) + 1)
    ]


@given(estimates())
def test_the_shortest_pass_is_chosen_and_of_equals_the_fewest_waves(tried):
    chosen = choose_num_waves(tried)
    passes = {item.num_waves: item.pass_s for item in tried}
    assert all(passes[chosen] <= seconds for seconds in passes.values())
    assert all(passes[chosen] < seconds for waves, seconds in passes.items() if waves < chosen)
    assert choose_num_waves(tried[::-1]) == chosen


@given(estimates())
def test_no_pass_is_shorter_than_the_work_of_the_busiest_device(tried):
    for item in tried:
        assert item.pass_s >= item.num_waves * item.busy_s.max() * (1 - 1e-9) or item.num_waves == 1
        assert item.pass_s >= item.latency_s


# ---- probing


class Engine:
    """Waves that finish in turn; throughput by W, with noise."""

    def __init__(self, throughput: Callable[[int], float], tokens: int = 960, noise: float = 0.0, seed: int = 0):
        self.throughput, self.tokens, self.now = throughput, tokens, 0.0
        self._noise, self._rng = noise, np.random.default_rng(seed)

    def run(self, prober: WaveProber, num_passes: int) -> list[int]:
        """W in force at each of so many passes of all tokens."""
        history = []
        for _ in range(num_passes):
            waves = prober.num_waves
            history.append(waves)
            for wave in range(waves):
                tokens = self.tokens // waves + (wave < self.tokens % waves)
                factor = 1 + self._noise * self._rng.uniform(-1, 1)
                self.now += tokens / self.throughput(waves) * factor
                prober.observe(tokens, self.now)
                if prober.num_waves != waves:
                    break
        return history


def peak(best: int, slope: float = 0.08) -> Callable[[int], float]:
    """Concave: every step away from the best costs more."""
    return lambda waves: 1000.0 * (1 - slope * abs(waves - best) ** 1.2 / (1 + 0.1 * abs(waves - best)))


@settings(max_examples=60)
@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 99))
def test_climbs_to_the_best_and_stays(first, best, seed):
    prober = WaveProber(first, 8)
    engine = Engine(peak(best), noise=0.02, seed=seed)
    history = engine.run(prober, 2500)
    assert min(history) >= 1
    assert max(history) <= 8
    late = np.array(history[-1000:])
    assert np.median(late) == best
    assert (late == best).mean() > 0.9  # attempts in vain get rarer
    assert np.abs(late - best).max() <= 1


@settings(max_examples=40)
@given(st.integers(1, 6), st.integers(0, 99))
def test_stays_put_where_all_are_the_same(first, seed):
    prober = WaveProber(first, 6)
    history = Engine(lambda waves: 1000.0, noise=0.01, seed=seed).run(prober, 2000)
    assert set(history) <= {first - 1, first, first + 1}
    assert np.mean(np.array(history) == first) > 0.8


def test_the_best_after_a_change_of_load_is_found():
    """At low load one wave is best, at high load four; the load comes and goes."""
    prober = WaveProber(1, 6)
    engine = Engine(peak(4), tokens=8000, noise=0.01)
    for best, tokens in ((4, 8000), (1, 80), (4, 8000), (2, 800)):
        engine.throughput, engine.tokens = peak(best), tokens
        history = engine.run(prober, 1500)
        assert np.median(history[-300:]) == best


def test_a_change_of_load_is_answered_soon_after_a_long_calm():
    """Attempts in vain have become rare; what they taught holds no longer."""
    prober = WaveProber(1, 4)
    engine = Engine(peak(1), tokens=80)
    engine.run(prober, 5000)
    engine.throughput, engine.tokens = peak(3), 4000
    history = engine.run(prober, 200)
    assert history[-1] == 3


@pytest.mark.parametrize("seed", range(5))
def test_attempts_get_rarer_though_few_sequences_come_and_go(seed):
    """A load that differs from measurement to measurement is no other load, nor a reason to try W = 2 for ever."""
    prober, rng = WaveProber(1, 4), np.random.default_rng(seed)
    engine = Engine(peak(1))
    history = []
    for _ in range(600):
        engine.tokens = int(rng.integers(8, 15))
        history += engine.run(prober, 5)
    assert np.mean(np.array(history[-2000:]) == 1) > 0.9


def test_a_drifting_load_speaks_for_nobody():
    """The whole engine gets faster by a little in every pass: W is not the cause."""
    prober = WaveProber(3, 6)
    engine = Engine(lambda waves: 1000.0)
    for step in range(1500):
        engine.throughput = lambda waves, step=step: 1000.0 * 1.0005**step
        history = engine.run(prober, 1)
        assert history[0] in (2, 3, 4)
    assert prober.num_waves in (2, 3, 4)


def test_a_measurement_during_which_the_load_changed_is_thrown_away():
    """The neighbour is tried just when twice as many sequences come, and looks twice as good."""
    prober = WaveProber(2, 4, ProbeConfig(patience=1))
    engine = Engine(peak(2))
    while prober.num_waves == 2:
        engine.run(prober, 1)
    engine.tokens, engine.throughput = 1920, lambda waves: 2 * peak(2)(waves)
    while prober.num_waves != 2:
        engine.run(prober, 1)
    engine.tokens, engine.throughput = 960, peak(2)
    engine.run(prober, 8)
    assert prober._best == 2


@pytest.mark.parametrize("noise", [0.0, 0.5])
@given(st.integers(1, 4), st.integers(1, 4), st.lists(st.floats(10, 1000), min_size=4, max_size=4))
def test_never_leaves_its_bounds(noise, first, max_waves, rates):
    prober = WaveProber(min(first, max_waves), max_waves, ProbeConfig(patience=1, passes=1, settle_passes=1))
    history = Engine(lambda waves: rates[waves - 1], noise=noise).run(prober, 200)
    assert set(history) <= set(range(1, max_waves + 1))


def test_time_that_stands_still_is_no_measurement():
    prober = WaveProber(2, 4, ProbeConfig(passes=1, settle_passes=1, patience=1))
    for _ in range(50):
        prober.observe(10, 1.0)
    assert prober.num_waves == 2
