"""The front's engine over workers that repeat the prompt: one terminal event each, nothing left behind."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from amoe.engine import vigil
from amoe.engine.async_engine import AsyncEngine
from amoe.engine.async_generation import Generation
from amoe.engine.generation import GenerationDelta
from amoe.engine.messages import AbortRequests, AddRequest, Failed, Outputs
from amoe.errors import AmoeError, EngineDeadError, EngineOverloadedError, RequestError
from amoe.types import SamplingParams, SequenceOutput, SequenceTimes
from tests.fake_workers import FakeWorker, make_engine, make_tokenizer


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


MakeEngine = Callable[..., tuple[AsyncEngine, list[FakeWorker]]]


@pytest.fixture
async def make(directory: Path) -> AsyncIterator[MakeEngine]:
    made = []

    def factory(**options):
        made.append(make_engine(directory, **options))
        return made[-1]

    yield factory
    for engine, workers in made:
        await engine.close()
        for worker in workers:
            worker.die()


async def read(generation: AsyncIterator[GenerationDelta]) -> GenerationDelta:
    total = await anext(generation)
    async for delta in generation:
        assert total.finish_reason is None, "a delta after the terminal one"
        total.merge(delta)
    return total


def metric(engine: AsyncEngine, name: str, **labels: str) -> float | None:
    return engine.metrics.registry.get_sample_value(f"amoe:{name}", {"model_name": "fake", "engine": "0", **labels})


async def test_generate(make):
    engine, _ = make()
    prompt = engine.tokenizer.encode("the dog 🙂 ")
    result = await read(engine.generate(prompt, SamplingParams(max_tokens=2 * len(prompt))))
    assert result.text == "the dog 🙂 the dog 🙂 "
    assert result.token_ids == prompt * 2
    assert result.finish_reason == "length"
    assert (result.num_prompt_tokens, result.num_generated_tokens) == (len(prompt), 2 * len(prompt))
    assert engine.num_open == 0
    assert metric(engine, "request_success_total", finished_reason="length") == 1
    assert metric(engine, "prompt_tokens_total") == len(prompt)
    assert metric(engine, "generation_tokens_total") == 2 * len(prompt)
    assert metric(engine, "time_to_first_token_seconds_count") == 1
    assert metric(engine, "inter_token_latency_seconds_count") == 2 * len(prompt) - 1
    assert metric(engine, "e2e_request_latency_seconds_count") == 1


async def test_end_of_text_is_counted_but_no_text(make):
    engine, (worker,) = make()
    ids = engine.tokenizer.encode("ab")
    worker.script = lambda request: [*ids, 0, *ids]
    result = await read(engine.generate(ids, SamplingParams(max_tokens=9, skip_special_tokens=False)))
    assert (result.text, result.token_ids, result.finish_reason) == ("ab", [*ids, 0], "stop")
    assert result.stop_reason is None
    result = await read(engine.generate(ids, SamplingParams(max_tokens=9, ignore_eos=True)))
    assert (result.text, result.finish_reason) == ("abab", "length")


async def test_stop_token_ids(make):
    engine, _ = make()
    ids = engine.tokenizer.encode("abc")
    result = await read(engine.generate(ids, SamplingParams(max_tokens=9, stop_token_ids=(ids[1],))))
    assert (result.text, result.finish_reason, result.stop_reason) == ("a", "stop", ids[1])
    params = SamplingParams(max_tokens=9, stop_token_ids=(ids[1],), include_stop_str_in_output=True)
    assert (await read(engine.generate(ids, params))).text == "ab"


async def test_stop_string_ends_the_sequence_at_the_worker(make):
    engine, (worker,) = make()
    ids = engine.tokenizer.encode("a\nbc\n")
    result = await read(engine.generate(ids, SamplingParams(max_tokens=50, stop=("c\na",))))
    assert (result.text, result.finish_reason, result.stop_reason) == ("a\nb", "stop", "c\na")
    assert result.num_generated_tokens == len(result.token_ids) == 6
    assert worker.aborted == [0]
    assert not worker.open
    assert metric(engine, "request_success_total", finished_reason="stop") == 1
    assert metric(engine, "request_success_total", finished_reason="abort") == 0


async def test_stop_string_within_a_longer_output_cuts_its_tokens(make):
    engine, (worker,) = make()
    worker.runs.clear()
    a, b, c = engine.tokenizer.encode("abc")
    (generation,) = engine.start([([a], SamplingParams(max_tokens=9, stop=("b",)))])
    worker.say(Outputs([SequenceOutput(0, [a, b, c], finish_reason="length")]))
    result = await read(generation)
    assert (result.text, result.token_ids, result.finish_reason) == ("a", [a, b], "stop")
    assert worker.aborted == []  # it has ended there too


async def test_columns_of_tokens_reach_the_sequences_that_are_still_open(make):
    engine, (worker,) = make()
    worker.runs.clear()
    a, b, c = engine.tokenizer.encode("abc")
    first, second = engine.start([([a], SamplingParams(max_tokens=9)), ([b], SamplingParams(max_tokens=9))])
    worker.say(Outputs([], [0, 1, 77], [b, c, a]))  # 77 has been aborted, while the worker was still at it
    worker.say(Outputs([SequenceOutput(1, [a], finish_reason="length")], [0], [c]))
    worker.say(Outputs([SequenceOutput(0, [], finish_reason="length")]))
    results = [await read(generation) for generation in (first, second)]
    assert [(result.text, result.token_ids) for result in results] == [("bc", [b, c]), ("ca", [c, a])]


async def test_leaving_the_iteration_frees_the_sequence(make):
    engine, (worker,) = make()
    stream = engine.generate([5, 6], SamplingParams(max_tokens=50))
    await anext(stream)
    assert engine.num_open == len(worker.open) == 1
    await stream.aclose()
    assert engine.num_open == len(worker.open) == 0
    assert worker.aborted == [0]
    assert metric(engine, "request_success_total", finished_reason="abort") == 1


async def test_cancelled_consumer_frees_the_sequence(make):
    engine, (worker,) = make()
    worker.runs.clear()
    task = asyncio.create_task(read(engine.generate([5], SamplingParams(max_tokens=50))))
    await worker.has_open(1)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert engine.num_open == len(worker.open) == 0


async def test_close_after_the_end_sends_nothing(make):
    engine, (worker,) = make()
    (generation,) = engine.start([([5], SamplingParams(max_tokens=1))])
    await read(generation)
    generation.close()
    assert not any(isinstance(message, AbortRequests) for message in worker.received)


async def test_slow_consumer_gets_merged_deltas(make):
    engine, _ = make()
    (generation,) = engine.start([([5, 6], SamplingParams(max_tokens=8, logprobs=1))])
    await engine.drain()
    deltas = [delta async for delta in generation]
    assert len(deltas) == 1
    assert deltas[0].token_ids == [5, 6] * 4
    assert len(deltas[0].logprobs) == 8


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "message", "param"),
    [
        ([], 1, "prompt is empty", "prompt"),
        ([1, 300], 1, "token id 300, but ids go from 0 to 299", "prompt"),
        ([-1], 1, "token id -1", "prompt"),
        ([1] * 64, 1, "prompt has 64 tokens", "prompt"),
        ([1] * 60, 5, "only 4 of this model's 64", "max_tokens"),
    ],
)
async def test_bad_prompts(make, prompt, max_tokens, message, param):
    engine, (worker,) = make()
    with pytest.raises(RequestError, match=message) as caught:
        engine.start([([1], SamplingParams()), (prompt, SamplingParams(max_tokens=max_tokens))])
    assert caught.value.param == param
    assert not worker.received


async def test_full_queue_refuses_all_or_nothing(make):
    engine, (worker,) = make(max_num_seqs=2, max_waiting=1)
    worker.runs.clear()
    request = ([1], SamplingParams(max_tokens=2))
    generations = engine.start([request, request])
    with pytest.raises(EngineOverloadedError, match="queue is full: 2 requests are open, and 3"):
        engine.start([request, request])
    generations += engine.start([request])
    with pytest.raises(EngineOverloadedError) as caught:
        engine.start([request])
    assert caught.value.retry_after_s >= 1
    with pytest.raises(RequestError, match="4 sequences at once"):
        engine.start([request] * 4)
    assert len(worker.requests) == 3
    worker.runs.set()
    for generation in generations:
        await read(generation)
    await read(engine.start([request])[0])
    assert (
        engine.metrics.registry.get_sample_value(
            "amoe:admission_rejections_total", {"model_name": "fake", "reason": "queue_full"}
        )
        == 2
    )


async def test_requests_go_to_the_least_loaded_worker(make):
    engine, workers = make(num_workers=2)
    for worker in workers:
        worker.runs.clear()
    prompts = [[1] * 5, [1], [2]]
    generations = engine.start([(prompt, SamplingParams(max_tokens=1)) for prompt in prompts])
    assert [generation.rank for generation in generations] == [0, 1, 1]
    generations[0].close()
    assert engine.start([([1], SamplingParams())])[0].rank == 0


async def test_choices_of_one_prompt_go_to_one_worker(make):
    engine, workers = make(num_workers=2, max_num_seqs=8)
    for worker in workers:
        worker.runs.clear()
    prompts = [[5, 6]] * 3 + [[7], [5, 6]]
    params = [SamplingParams(max_tokens=1 + index, seed=index) for index in range(5)]
    generations = engine.start(list(zip(prompts, params, strict=True)))
    assert [generation.rank for generation in generations] == [0, 0, 0, 1, 1]
    assert [(r.request_id, r.sibling_of) for r in workers[0].requests] == [(0, None), (1, 0), (2, 0)]
    assert [(r.request_id, r.sibling_of) for r in workers[1].requests] == [(3, None), (4, None)]
    for worker in workers:
        worker.runs.set()
    for generation, prompt in zip(generations, prompts, strict=True):
        assert (await read(generation)).num_prompt_tokens == len(prompt)
    assert metric(engine, "request_params_n_sum") == 3
    assert metric(engine, "request_params_n_count") == 1
    assert metric(engine, "request_max_num_generation_tokens_sum") == 3


async def test_prompts_whose_kv_must_not_be_shared_are_no_choices(make):
    engine, (worker,) = make(max_num_seqs=8)
    options = [{}, {"cache_salt": "a"}, {"cache_salt": "b"}, {"cache_salt": "b"}, {"capacity": "exact"}]
    engine.start([([5, 6], SamplingParams(**option)) for option in options])
    assert [request.sibling_of for request in worker.requests] == [None, None, None, 2, None]


async def test_a_priority_is_refused_where_it_changes_nothing(make):
    engine, (worker,) = make()
    with pytest.raises(RequestError, match="--scheduling-policy priority") as caught:
        engine.start([([5], SamplingParams(priority=-1))])
    assert caught.value.param == "priority"
    assert not worker.received
    engine, (worker,) = make(scheduling_policy="priority")
    engine.start([([5], SamplingParams(priority=-1))])
    assert worker.requests[0].params.priority == -1


async def test_prompt_tokens_that_wait_are_bounded(make):
    engine, (worker,) = make(max_num_seqs=8, max_waiting_tokens=10)
    worker.runs.clear()
    long = ([1] * 12, SamplingParams(max_tokens=2))
    short = ([2] * 4, SamplingParams(max_tokens=2))
    started = engine.start([long])  # it would never fit: it goes where nobody waits
    with pytest.raises(EngineOverloadedError, match="12 prompt tokens wait, and with 4 more") as caught:
        engine.start([short])
    assert caught.value.retry_after_s >= 1
    started[0].close()
    started = engine.start([short] * 3)  # the choices' prompt is computed once
    started += engine.start([([3] * 6, SamplingParams(max_tokens=2))])
    with pytest.raises(EngineOverloadedError):
        engine.start([([1], SamplingParams())])
    worker.say(Outputs([SequenceOutput(started[0].request_id, [7])]))  # it waits no longer
    await anext(started[0])
    started += engine.start([short])
    worker.runs.set()
    for generation in started:
        async for _ in generation:
            pass
    assert engine._load.is_empty
    labels = {"model_name": "fake", "reason": "queue_tokens"}
    assert engine.metrics.registry.get_sample_value("amoe:admission_rejections_total", labels) == 2


async def test_where_the_time_of_a_sequence_went(make):
    engine, (worker,) = make()
    worker.runs.clear()
    (generation,) = engine.start([([5] * 9, SamplingParams(max_tokens=2))])
    worker.say(Outputs([SequenceOutput(0, [5], num_cached_tokens=4, times=SequenceTimes(0.5, 2.0))]))
    await anext(generation)
    assert (generation.queue_s, generation.prefill_s, generation.num_preemptions) == (0.5, 2.0, 0)
    worker.say(Outputs([SequenceOutput(0, [5], finish_reason="length", times=SequenceTimes(0.5, 2.0, 3))]))
    await read(generation)
    assert generation.num_preemptions == 3
    assert metric(engine, "request_queue_time_seconds_sum") == 0.5
    assert metric(engine, "request_prefill_time_seconds_sum") == 2.0
    assert metric(engine, "request_inference_time_seconds_sum") >= 2.0
    assert metric(engine, "request_num_preemptions_sum") == 3
    assert metric(engine, "request_prefill_kv_computed_tokens_sum") == 5
    assert metric(engine, "request_params_max_tokens_sum") == 2


async def test_dead_worker_ends_every_request(make):
    engine, workers = make(num_workers=2)
    for worker in workers:
        worker.runs.clear()
    generations = engine.start([([1], SamplingParams()), ([2], SamplingParams())])
    assert engine.healthy
    workers[1].die()
    for generation in generations:
        with pytest.raises(EngineDeadError, match="worker 1 has gone"):
            await read(generation)
    assert not engine.healthy
    assert engine.num_open == 0
    with pytest.raises(EngineDeadError, match="worker 1 has gone"):
        engine.start([([1], SamplingParams())])
    assert metric(engine, "request_success_total", finished_reason="error") == 1


async def test_failed_worker_tells_why(make):
    engine, (worker,) = make()
    worker.runs.clear()
    (generation,) = engine.start([([1], SamplingParams())])
    worker.say(Failed("out of memory", user_error=False))
    with pytest.raises(EngineDeadError, match="worker 0 failed: out of memory"):
        await read(generation)


async def test_silent_worker_is_dead(make, monkeypatch):
    monkeypatch.setattr(vigil, "WATCHDOG_PERIOD_S", 0.001)
    engine, (worker,) = make(heartbeat_timeout_s=0.01)
    worker.runs.clear()
    (generation,) = engine.start([([1], SamplingParams())])
    with pytest.raises(EngineDeadError, match=r"worker 0 has made no progress for 0.01 s"):
        await read(generation)
    assert not engine.healthy


async def test_a_stalled_worker_gets_nothing_new_and_what_is_open_goes_on(make):
    engine, workers = make(num_workers=2)
    workers[0].runs.clear()
    (generation,) = engine.start([([1], SamplingParams(max_tokens=3))])
    engine._watchdog.advance(2e5)
    workers[0].beat()
    await asyncio.sleep(0)
    with pytest.raises(EngineOverloadedError, match=r"worker 1 gives no sign of life for 200000\.0 s") as caught:
        engine.start([([2], SamplingParams())])
    assert caught.value.retry_after_s >= 1
    labels = {"model_name": "fake", "reason": "stalled"}
    assert engine.metrics.registry.get_sample_value("amoe:admission_rejections_total", labels) == 1
    workers[0].runs.set()
    assert (await read(generation)).token_ids == [1, 1, 1]
    workers[1].beat()
    await asyncio.sleep(0)
    assert (await read(engine.generate([2], SamplingParams(max_tokens=1)))).token_ids == [2]


async def test_a_watchdog_that_fails_is_no_good_sign(make, monkeypatch):
    monkeypatch.setattr(vigil, "WATCHDOG_PERIOD_S", 0.001)
    engine, (worker,) = make()
    worker.runs.clear()
    (generation,) = engine.start([([1], SamplingParams())])

    def explode(seconds: float) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(engine.metrics.http, "lagged", explode)
    with pytest.raises(EngineDeadError, match="the watchdog has failed"):
        await read(generation)
    assert not engine.healthy


async def test_refusal_by_the_worker_is_an_error(make):
    engine, (worker,) = make()
    worker.runs.clear()
    (generation,) = engine.start([([1], SamplingParams())])
    worker.say(Outputs([SequenceOutput(0, [], finish_reason="error")]))
    with pytest.raises(AmoeError, match="could not serve"):
        await read(generation)
    assert engine.num_open == 0


async def test_what_the_server_cannot_handle_ends_one_request_and_no_worker(make, monkeypatch):
    engine, (worker,) = make()
    worker.runs.clear()
    spoilt, other = engine.start([([1], SamplingParams()), ([2], SamplingParams())])

    def fail(output):
        raise ZeroDivisionError("a bug of ours")

    monkeypatch.setattr(spoilt.state, "advance", fail)
    worker.say(Outputs([SequenceOutput(0, [1]), SequenceOutput(1, [2], finish_reason="stop")]))
    with pytest.raises(AmoeError, match="could not handle what was generated"):
        await read(spoilt)
    assert (await read(other)).token_ids == [2]
    assert engine.num_open == 0 and engine.healthy
    assert 0 not in worker.open, "it is told to stop"


async def test_late_and_unknown_outputs_change_nothing(make):
    engine, (worker,) = make()
    worker.say(Outputs([SequenceOutput(77, [1], finish_reason="stop")]))
    assert (await read(engine.generate([5], SamplingParams(max_tokens=2)))).token_ids == [5, 5]
    assert engine.healthy


async def test_what_cannot_be_sent_does_not_stay_open(make, monkeypatch):
    engine, (worker,) = make()

    def refuse(message):
        raise OverflowError("no such integer in msgpack")

    monkeypatch.setattr(worker, "send", refuse)
    with pytest.raises(OverflowError):
        engine.start([([1], SamplingParams())])
    assert engine.num_open == 0
    await asyncio.wait_for(engine.drain(), 5)


async def test_all_are_started_or_none(make, monkeypatch):
    engine, (worker,) = make()
    worker.runs.clear()
    send = worker.send

    def refuse(message):
        if isinstance(message, AddRequest) and message.prompt_token_ids == [2]:
            raise OverflowError("no such integer in msgpack")
        send(message)

    monkeypatch.setattr(worker, "send", refuse)
    with pytest.raises(OverflowError):
        engine.start([([1], SamplingParams()), ([2], SamplingParams())])
    assert engine.num_open == 0 and engine._load.is_empty
    assert not worker.open


async def test_drain_waits_and_refuses(make):
    engine, (worker,) = make()
    worker.runs.clear()
    (generation,) = engine.start([([5], SamplingParams(max_tokens=2))])
    drained = asyncio.create_task(engine.drain())
    await asyncio.sleep(0)
    with pytest.raises(EngineOverloadedError, match="shutting down"):
        engine.start([([5], SamplingParams())])
    assert not drained.done()
    worker.runs.set()
    assert (await read(generation)).token_ids == [5, 5]
    await drained


async def test_close_ends_what_is_open(make):
    engine, (worker,) = make()
    worker.runs.clear()
    (generation,) = engine.start([([5], SamplingParams())])
    await engine.close()
    with pytest.raises(EngineDeadError, match="has stopped"):
        await read(generation)


@pytest.mark.parametrize("seed", range(20))
async def test_any_interleaving_ends_every_request_once(make, seed):
    """Starts, readers, readers that leave, stop strings, refusals and at times a death, in random order."""
    rng = random.Random(seed)
    engine, workers = make(num_workers=2, max_num_seqs=3, max_waiting=3)
    outcomes: list[str] = []

    async def consume(generation: Generation, patience: int) -> None:
        try:
            async for delta in generation:
                await asyncio.sleep(0)
                patience -= 1
                if delta.finish_reason is not None:
                    assert await anext(generation, None) is None
                    return outcomes.append(delta.finish_reason)
                if patience == 0:
                    generation.close()
                    return outcomes.append("left")
        except AmoeError:
            assert await anext(generation, None) is None
            outcomes.append("error")
        finally:
            generation.close()
        return None

    tasks, num_refused = [], 0
    for turn in range(60):
        params = SamplingParams(max_tokens=rng.randint(1, 8), stop=rng.choice([(), ("a",), ("ba",)]))
        try:
            generations = engine.start([(engine.tokenizer.encode("bab"), params)] * rng.randint(1, 3))
        except AmoeError:
            num_refused += 1
        else:
            tasks += [asyncio.create_task(consume(generation, rng.randint(1, 9))) for generation in generations]
        if rng.random() < 0.2 and tasks:
            rng.choice(tasks).cancel()
        if turn == 50 and seed % 4 == 0:
            workers[0].die()
        for _ in range(rng.randint(0, 4)):
            await asyncio.sleep(0)
    done = await asyncio.gather(*tasks, return_exceptions=True)
    num_cancelled = sum(isinstance(result, asyncio.CancelledError) for result in done)
    assert len(outcomes) + num_cancelled == len(tasks)
    assert not [result for result in done if isinstance(result, Exception)]
    await engine.drain()
    assert engine.num_open == 0
    assert engine._load.is_empty
    assert not workers[1].open
