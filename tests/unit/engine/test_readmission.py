"""Workers that die under open sequences: every stream goes on where it stood, and ends once."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import numpy as np
import pytest

from amoe.clock import ManualClock
from amoe.engine.async_engine import AsyncEngine
from amoe.engine.async_generation import Generation
from amoe.engine.generation import GenerationDelta
from amoe.engine.messages import Applied, Failed, Outputs
from amoe.errors import AmoeError, EngineOverloadedError
from amoe.types import CapacityUsage, SamplingParams, SequenceOutput, SequenceTimes
from tests.fake_workers import FakeWorker, make_engine, make_tokenizer


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


MakeEngine = Callable[..., tuple[AsyncEngine, list[FakeWorker]]]


@pytest.fixture
async def make(directory: Path) -> AsyncIterator[MakeEngine]:
    made = []

    def factory(**options):
        made.append(make_engine(directory, supervised=True, **options))
        return made[-1]

    yield factory
    for engine, workers in made:
        await engine.close()
        for worker in workers:
            worker.die()


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def read(generation: AsyncIterator[GenerationDelta]) -> GenerationDelta:
    total = await anext(generation)
    async for delta in generation:
        assert total.finish_reason is None, "a delta after the terminal one"
        total.merge(delta)
    return total


async def kill(engine: AsyncEngine, worker: FakeWorker) -> None:
    worker.die()
    await engine.lose(worker.stats.rank, "it was killed")


def replace(engine: AsyncEngine, workers: list[FakeWorker], rank: int) -> FakeWorker:
    """A new life of a worker, attached."""
    old = workers[rank]
    workers[rank] = worker = FakeWorker(rank)
    worker.script, worker.capacity = old.script, old.capacity
    engine.attach(rank, worker)
    return worker


def metric(of: AsyncEngine, name: str, **labels: str) -> float | None:
    return of.metrics.registry.get_sample_value(f"amoe:{name}", {"model_name": "fake", **labels})


async def test_a_stream_goes_on_at_another_worker_without_a_gap(make):
    engine, workers = make(num_workers=2)
    prompt = engine.tokenizer.encode("the dog 🙂 ")
    (generation,) = engine.start([(prompt, SamplingParams(max_tokens=4 * len(prompt), logprobs=1))])
    total = await anext(generation)
    await kill(engine, workers[0])
    total.merge(await read(generation))
    assert total.text == "the dog 🙂 " * 4
    assert total.token_ids == prompt * 4
    assert len(total.logprobs) == total.num_generated_tokens == 4 * len(prompt)
    assert total.num_prompt_tokens == len(prompt)
    (resumed,) = workers[1].requests
    assert resumed.request_id == generation.request_id
    assert resumed.params == generation.state.params
    assert resumed.num_generated > 0
    assert resumed.prompt_token_ids == (prompt * 5)[: len(prompt) + resumed.num_generated]
    assert engine.num_open == 0
    assert engine._load.is_empty
    assert engine.healthy
    assert metric(engine, "request_success_total", engine="1", finished_reason="length") == 1
    assert metric(engine, "time_to_first_token_seconds_count", engine="0") == 1
    assert metric(engine, "time_to_first_token_seconds_count", engine="1") == 0


async def test_what_a_worker_has_said_before_it_died_counts(make):
    engine, workers = make(num_workers=2)
    workers[0].runs.clear()
    (generation,) = engine.start([([5, 6], SamplingParams(max_tokens=4))])
    await settle()
    for token in (5, 6):
        workers[0].say(Outputs([SequenceOutput(0, [token])]))
    await kill(engine, workers[0])
    assert (await read(generation)).token_ids == [5, 6, 5, 6]
    assert [request.num_generated for request in workers[1].requests] == [2]


async def test_an_end_that_was_said_in_time_is_the_end(make):
    engine, workers = make(num_workers=2)
    workers[0].runs.clear()
    (generation,) = engine.start([([5, 6], SamplingParams(max_tokens=2))])
    await settle()
    workers[0].say(Outputs([SequenceOutput(0, [5, 6], finish_reason="length")]))
    await kill(engine, workers[0])
    assert (await read(generation)).token_ids == [5, 6]
    assert not workers[1].requests


async def test_nothing_that_a_lost_worker_says_later_counts(make, monkeypatch):
    monkeypatch.setattr("amoe.engine.async_engine.LAST_WORDS_S", 0.01)
    engine, workers = make(num_workers=2)
    for worker in workers:
        worker.runs.clear()
    (generation,) = engine.start([([5, 6], SamplingParams(max_tokens=2))])
    await engine.lose(0, "its link is cut")  # its channel never ends
    workers[0].say(Outputs([SequenceOutput(0, [7, 8], finish_reason="length")]))
    await settle()
    workers[1].runs.set()
    assert (await read(generation)).token_ids == [5, 6]


async def test_without_another_worker_everything_waits_for_one(make):
    engine, workers = make(max_num_seqs=8)
    params = SamplingParams(max_tokens=6)
    (begun,) = engine.start([([5, 6], params)])
    total = await anext(begun)
    workers[0].runs.clear()
    await kill(engine, workers[0])
    engine.note = "colocated 0 is being started anew"
    (new,) = engine.start([([7], params)])
    gone = engine.start([([8], params)])[0]
    gone.close()
    assert engine.healthy
    await settle()
    worker = replace(engine, workers, 0)
    total.merge(await read(begun))
    assert total.token_ids == [5, 6] * 3
    assert (await read(new)).token_ids == [7] * 6
    assert [request.request_id for request in worker.requests] == [begun.request_id, new.request_id]
    assert engine._load.is_empty


async def test_a_worker_can_die_again_and_again(make):
    engine, workers = make()
    prompt = [5, 6, 7]
    (generation,) = engine.start([(prompt, SamplingParams(max_tokens=57, return_routed_experts=True))])
    total = GenerationDelta()
    for _ in range(6):
        delta = await anext(generation)
        total.merge(delta)
        await kill(engine, workers[0])
        replace(engine, workers, 0)
        await settle()
    total.merge(await read(generation))
    assert total.token_ids == prompt * 19
    assert generation.num_moves == 6
    # One number for each token that went through the model, once and in order.
    assert np.frombuffer(bytes(total.routed_experts), "<i2").tolist() == list(range(59))


@pytest.mark.parametrize("has_begun", [False, True])
async def test_prompt_logprobs_come_once_and_whole(make, has_begun):
    engine, workers = make(num_workers=2)
    workers[0].runs.clear()
    params = SamplingParams(max_tokens=4, prompt_logprobs=1, logprobs=1)
    (generation,) = engine.start([([5, 6, 7, 8], params)])
    await settle()
    if has_begun:
        workers[0].runs.set()
        await settle()
    await kill(engine, workers[0])
    total = await read(generation)
    assert [item.top_ids for item in total.prompt_logprobs] == [[6], [7], [8]]
    assert total.token_ids == [5, 6, 7, 8]


async def test_what_kills_every_worker_ends_and_its_neighbours_do_not(make):
    engine, workers = make(max_num_seqs=8)
    poison, neighbour = engine.start([([token], SamplingParams(max_tokens=50)) for token in (5, 6)])
    workers[0].script = lambda request: [6] * 50 if request.prompt_token_ids == [6] else []
    told: list[int] = []
    for _ in range(engine.config.failure.max_crashes):
        told += (await anext(neighbour)).token_ids
        await kill(engine, workers[0])
        replace(engine, workers, 0)
        await settle()
    with pytest.raises(AmoeError, match="5 workers in a row have died before they gave this request a token"):
        await read(poison)
    told += (await read(neighbour)).token_ids
    assert told == [6] * 50
    assert engine._load.is_empty


async def test_who_waits_for_its_turn_is_not_to_blame(make):
    engine, workers = make(max_num_seqs=1)
    workers[0].runs.clear()
    generations = engine.start([([token], SamplingParams(max_tokens=2)) for token in (5, 6)])
    for _ in range(engine.config.failure.max_crashes):
        await kill(engine, workers[0])
        replace(engine, workers, 0).runs.clear()
        await settle()
    with pytest.raises(AmoeError, match="5 workers in a row"):
        await read(generations[0])
    workers[0].runs.set()
    assert (await read(generations[1])).token_ids == [6, 6]


async def test_prompt_logprobs_alone(make):
    engine, workers = make(num_workers=2)
    workers[0].script = lambda request: []
    (generation,) = engine.start([([5, 6, 7], SamplingParams(max_tokens=1, prompt_logprobs=0))])
    await settle()
    await kill(engine, workers[0])
    assert len((await read(generation)).prompt_logprobs) == 2


async def test_choices_stay_together_and_the_one_that_was_read_goes_first(make):
    engine, workers = make(num_workers=2, max_num_seqs=8)
    for worker in workers:
        worker.runs.clear()
    choices = engine.start([([5, 6], SamplingParams(max_tokens=4))] * 3)
    other = engine.start([([7], SamplingParams(max_tokens=4))])[0]
    assert [generation.rank for generation in (*choices, other)] == [0, 0, 0, 1]
    workers[0].say(Outputs([SequenceOutput(1, [5])]))
    await settle()
    await kill(engine, workers[0])
    resumed = workers[1].requests[1:]
    assert [(item.request_id, item.sibling_of, item.num_generated) for item in resumed] == [
        (1, None, 1),
        (0, 1, 0),
        (2, 1, 0),
    ]
    workers[1].runs.set()
    for generation in choices:
        assert (await read(generation)).token_ids == [5, 6, 5, 6]


async def test_the_lost_are_spread_over_those_that_are_left(make):
    engine, workers = make(num_workers=3, max_num_seqs=8)
    for worker in workers:
        worker.runs.clear()
    engine.start([([token], SamplingParams(max_tokens=4)) for token in range(1, 13)])
    await kill(engine, workers[0])
    assert [len(worker.requests) for worker in workers] == [4, 6, 6]
    assert metric(engine, "requests_readmitted_total", engine="0") == 4
    replace(engine, workers, 0).runs.clear()
    assert engine.start([([1], SamplingParams())])[0].rank == 0


async def test_aborts_and_stop_strings_at_the_moment_of_the_loss(make):
    engine, workers = make(num_workers=2)
    workers[0].runs.clear()
    ids = engine.tokenizer.encode("abab")
    a, b = engine.tokenizer.encode("ab")
    stopped, left = engine.start([(ids, SamplingParams(max_tokens=9, stop=("ba",)))] * 2)
    await settle()
    workers[0].say(Outputs([SequenceOutput(stopped.request_id, [a, b, a, b])]))
    workers[0].die()
    losing = asyncio.create_task(engine.lose(0, "it was killed"))
    left.close()
    await losing
    total = await read(stopped)
    assert (total.text, total.finish_reason, total.stop_reason) == ("a", "stop", "ba")
    assert not workers[1].requests
    assert engine._load.is_empty


async def test_a_stop_string_may_span_two_lives(make):
    engine, workers = make(num_workers=2)
    workers[0].runs.clear()
    ids = engine.tokenizer.encode("xyz")
    (generation,) = engine.start([(ids, SamplingParams(max_tokens=9, stop=("yz",)))])
    await settle()
    workers[0].say(Outputs([SequenceOutput(0, ids[:2])]))
    await kill(engine, workers[0])
    total = await read(generation)
    assert (total.text, total.finish_reason) == ("x", "stop")
    assert workers[1].aborted == [0]


async def test_what_capacity_has_done_is_added_up_over_lives(make):
    engine, workers = make(num_workers=2)
    workers[0].capacity = CapacityUsage(30, 3, 6, 0.5)
    (generation,) = engine.start([([5], SamplingParams(max_tokens=8))])
    total = await anext(generation)
    await kill(engine, workers[0])
    workers[1].capacity = CapacityUsage(10, 1, 0, 0.1)
    total.merge(await read(generation))
    assert total.capacity is not None
    assert total.capacity == CapacityUsage(40, 4, 6, pytest.approx(0.4))


async def test_times_and_cached_tokens_are_those_of_the_first_token(make):
    engine, workers = make(num_workers=2)
    for worker in workers:
        worker.runs.clear()
    (generation,) = engine.start([([5] * 9, SamplingParams(max_tokens=3))])
    workers[0].say(Outputs([SequenceOutput(0, [5], num_cached_tokens=4, times=SequenceTimes(0.5, 2.0, 1))]))
    await settle()
    await kill(engine, workers[0])
    end = SequenceOutput(0, [5, 5], finish_reason="length", num_cached_tokens=8, times=SequenceTimes(9.0, 7.0, 2))
    workers[1].say(Outputs([end]))
    total = await read(generation)
    assert (total.num_cached_tokens, total.num_prompt_tokens) == (4, 9)
    assert (generation.queue_s, generation.prefill_s, generation.num_preemptions) == (0.5, 2.0, 3)


async def test_who_had_no_token_has_waited_all_the_time(make):
    engine, workers = make(num_workers=2)
    for worker in workers:
        worker.runs.clear()
    engine._clock = engine._accounts._clock = clock = ManualClock(100.0)
    (generation,) = engine.start([([5] * 9, SamplingParams(max_tokens=3))])
    clock.advance(4.0)
    await kill(engine, workers[0])
    workers[1].say(Outputs([SequenceOutput(0, [5], num_cached_tokens=4, times=SequenceTimes(0.5, 2.0))]))
    assert (await anext(generation)).num_cached_tokens == 4
    assert (generation.queue_s, generation.prefill_s) == (4.5, 2.0)


async def test_who_goes_on_elsewhere_is_not_refused_for_want_of_room(make):
    engine, workers = make(num_workers=2, max_num_seqs=1, max_waiting=2, max_waiting_tokens=8)
    for worker in workers:
        worker.runs.clear()
    generations = engine.start([([token] * 2, SamplingParams(max_tokens=2)) for token in range(1, 5)])
    await kill(engine, workers[0])
    with pytest.raises(EngineOverloadedError, match="queue is full"):
        engine.start([([9], SamplingParams(max_tokens=2))])
    workers[1].runs.set()
    for token, generation in enumerate(generations, start=1):
        assert (await read(generation)).token_ids == [token] * 2
    assert engine._load.is_empty


async def test_the_supervisor_hears_everything(make):
    engine, workers = make(num_workers=2)
    heard, gone = [], []
    engine.on_message = lambda rank, message: heard.append((rank, message))
    engine.on_gone = lambda rank, reason: gone.append((rank, reason))
    workers[1].say(Applied(3))
    workers[1].say(Failed("out of memory", user_error=False))
    await settle()
    assert heard == [(1, Applied(3)), (1, Failed("out of memory", user_error=False))]
    workers[1].die()
    await settle()
    assert gone == [(1, "worker 1 has gone")]
    assert engine.healthy
    with pytest.raises(ValueError, match="attached already"):
        engine.attach(1, FakeWorker(1))
    await engine.lose(1, "it has gone")
    await engine.lose(1, "it has gone")
    replace(engine, workers, 1).say(Applied(4))
    spare = FakeWorker(5, "experts")
    engine.attach(5, spare)
    spare.say(Applied(4))
    await settle()
    assert heard[2:] == [(1, Applied(4)), (5, Applied(4))]
    spare.die()
    assert gone == [(1, "worker 1 has gone")]


async def test_nothing_is_sent_to_a_worker_that_is_known_to_have_gone(make):
    engine, workers = make(num_workers=2)
    workers[0].die()
    await settle()
    assert engine.start([([5], SamplingParams(max_tokens=1))])[0].rank == 1


async def test_trouble_makes_unhealthy_and_refuses_only_where_nothing_goes_on(make):
    engine, workers = make(num_workers=2, max_num_seqs=8, stall_timeout_s=10.0)
    engine._clock = engine._accounts._clock = clock = ManualClock(100.0)
    engine.trouble = "colocated 0 has died 5 times in a row"
    assert not engine.healthy
    assert engine.complaint == engine.trouble
    workers[1].runs.clear()
    await kill(engine, workers[0])
    assert (await read_one(engine, workers[1])).token_ids == [5]
    (waiting,) = engine.start([([5], SamplingParams(max_tokens=1))])
    clock.advance(11.0)
    with pytest.raises(EngineOverloadedError, match=r"died 5 times in a row: nothing new is taken"):
        engine.start([([5], SamplingParams(max_tokens=1))])
    workers[1].runs.set()
    await read(waiting)
    engine.trouble = ""
    assert engine.healthy
    await read_one(engine, workers[1])


async def read_one(engine: AsyncEngine, worker: FakeWorker) -> GenerationDelta:
    had_run = worker.runs.is_set()
    worker.runs.set()
    total = await read(engine.generate([5], SamplingParams(max_tokens=1)))
    if not had_run:
        worker.runs.clear()
    return total


async def test_a_server_that_leaves_in_the_middle_of_a_loss_ends_everything(make):
    engine, workers = make()
    workers[0].runs.clear()
    (generation,) = engine.start([([5], SamplingParams())])
    await kill(engine, workers[0])
    await engine.close()
    with pytest.raises(AmoeError, match="has stopped"):
        await read(generation)
    assert engine._load.is_empty


@pytest.mark.parametrize("seed", range(30))
async def test_any_interleaving_of_losses_gives_every_reader_the_undisturbed_tokens(make, seed):
    """Starts, readers, readers that leave, stop strings, and workers that die and come back, in random order."""
    rng = random.Random(seed)
    engine, workers = make(num_workers=rng.randint(1, 3), max_num_seqs=4, max_waiting=6, max_crashes=1000)
    prompt = engine.tokenizer.encode("bab")
    outcomes: list[str] = []

    async def consume(generation: Generation, patience: int) -> None:
        got: list[int] = []
        text = ""
        params = generation.state.params
        try:
            async for delta in generation:
                await asyncio.sleep(0)
                got += delta.token_ids
                text += delta.text
                assert got == (prompt * 9)[: len(got)]
                patience -= 1
                if delta.finish_reason is not None:
                    assert await anext(generation, None) is None
                    if params.stop:
                        assert delta.finish_reason == "stop" or params.max_tokens == len(got)
                        assert params.stop[0] not in text
                    else:
                        assert (delta.finish_reason, len(got)) == ("length", params.max_tokens)
                    return outcomes.append(delta.finish_reason)
                if patience == 0:
                    return outcomes.append("left")
        finally:
            generation.close()
        raise AssertionError("ended without a terminal delta")

    tasks = []
    absent: set[int] = set()
    for _ in range(60):
        params = SamplingParams(max_tokens=rng.randint(1, 12), stop=rng.choice([(), ("a",), ("ba",)]))
        try:
            generations = engine.start([(prompt, params)] * rng.randint(1, 3))
        except EngineOverloadedError:
            pass
        else:
            tasks += [asyncio.create_task(consume(generation, rng.randint(1, 20))) for generation in generations]
        if rng.random() < 0.1 and tasks:
            rng.choice(tasks).cancel()
        rank = rng.randrange(len(workers))
        if rank in absent:
            absent.discard(rank)
            replace(engine, workers, rank)
        elif rng.random() < 0.4:
            absent.add(rank)
            await kill(engine, workers[rank])
        for _ in range(rng.randint(0, 4)):
            await asyncio.sleep(0)
    for rank in absent:
        replace(engine, workers, rank)
    done = await asyncio.gather(*tasks, return_exceptions=True)
    assert not [result for result in done if isinstance(result, Exception)]
    num_cancelled = sum(isinstance(result, asyncio.CancelledError) for result in done)
    assert len(outcomes) + num_cancelled == len(tasks)
    await engine.drain()
    assert engine.num_open == 0
    assert engine._load.is_empty
    await settle()
    assert not any(worker.open for worker in workers)
