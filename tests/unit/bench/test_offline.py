"""`amoe bench offline` on an engine that is not there."""

import argparse

import numpy as np
import pytest

from amoe.bench import cli, offline
from amoe.bench.record import summarise
from amoe.bench.workload import RequestSpec
from amoe.clock import ManualClock
from amoe.engine.generation import GenerationDelta
from amoe.errors import AmoeError, EngineDeadError
from amoe.server.engine_flags import engine_config
from amoe.types import SamplingParams


class FakeEngine:
    """Answers in pieces of two tokens, a second each; a prompt that starts with 13 kills it."""

    def __init__(self, clock):
        self.clock = clock
        self.seen = []

    async def generate(self, prompt_token_ids, params):
        self.seen.append((list(prompt_token_ids), params))
        if prompt_token_ids[0] == 13:
            raise EngineDeadError("worker 1 has gone")
        left = params.max_tokens
        while left:
            count = min(2, left)
            left -= count
            self.clock.advance(1.0)
            yield GenerationDelta(token_ids=[5] * count)


async def test_measuring_counts_tokens_and_failures():
    clock = ManualClock()
    engine = FakeEngine(clock)
    specs = [RequestSpec(prompt=[i, i], max_tokens=5) for i in (12, 13, 14)]
    plan = offline.OfflinePlan(
        warmup=specs[:1], specs=specs, concurrency=1, params=SamplingParams(temperature=0, ignore_eos=True)
    )
    figures = summarise((await offline.measure(engine, plan, clock)).records)
    assert [prompt for prompt, _ in engine.seen] == [[12, 12], [12, 12], [13, 13], [14, 14]]
    assert all(params.max_tokens == 5 and params.ignore_eos for _, params in engine.seen)
    assert (figures.completed, figures.failed) == (2, 1)
    assert figures.failures == {"EngineDeadError: worker 1 has gone": 1}
    assert (figures.prompt_tokens, figures.output_tokens) == (4, 10)
    assert figures.time_to_first_token.p50 == 1000
    assert figures.time_per_output_token.p50 == pytest.approx(2000 / 3)


def parse(*flags):
    parser = argparse.ArgumentParser()
    cli.add_parser(parser.add_subparsers(dest="command"))
    return parser.parse_args(["bench", "offline", *flags])


def test_flags_become_a_configuration():
    args = parse("/somewhere", "--colocated", "2", "--schedules", "progress,lockstep:2,waves,waves:1,lockstep:1")
    config = engine_config(args)
    assert config.placement.num_workers == 2
    assert [str(variant) for variant in args.schedules] == ["progress", "lockstep:2", "waves", "waves:1", "lockstep"]
    progress, lockstep, waves, one_wave, _ = (variant.apply(config.scheduler) for variant in args.schedules)
    assert (progress.schedule, progress.micro_batches) == ("progress", 1)
    assert (lockstep.schedule, lockstep.micro_batches) == ("lockstep", 2)
    assert (waves.schedule, waves.num_waves) == ("waves", None)
    assert (one_wave.schedule, one_wave.num_waves) == ("waves", 1)
    assert not config.cache.enable_prefix_caching


@pytest.mark.parametrize(
    "flags",
    [
        ("m", "--schedules", "progress,nonsense"),
        ("m", "--schedules", "progress,progress"),
        ("m", "--schedules", "progress:2"),
        ("m", "--schedules", "waves:0"),
        ("m", "--schedules", "waves:17"),
        ("m", "--schedules", "lockstep:1,lockstep"),
        ("m", "--schedules", "lockstep:x"),
        ("m", "--num-prompts", "0"),
    ],
)
def test_wrong_flags_are_refused(flags):
    with pytest.raises(SystemExit):
        parse(*flags)


def test_a_model_that_is_not_there_is_a_message(tmp_path):
    args = parse(str(tmp_path / "nothing"))
    with pytest.raises(AmoeError, match="nothing"):
        args.func(args)


def test_imbalance_is_that_of_layers_that_ran():
    pairs = np.asarray([[3.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    assert offline.expert_imbalance(pairs) == (3.0 + 1.0) / 2
    assert np.isnan(offline.expert_imbalance(np.zeros((2, 4))))
