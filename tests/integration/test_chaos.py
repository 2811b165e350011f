"""Workers die, hang and are cut off while 200 streams run: nobody gets an error, or another token than undisturbed.

`python -m benchmarks.chaos` does more of it, one fault at a time, and measures what users notice.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.chaos.faults import Fault
from benchmarks.chaos.run import Run, run
from benchmarks.chaos.server import ChaosServer
from benchmarks.chaos.streams import Answer, Load, make_load
from benchmarks.chaos.ties import clear_requests

pytestmark = pytest.mark.cluster

QUIET = ("--uvicorn-log-level", "warning", "--disable-uvicorn-access-log")
MAX_TOKENS = 40
VOCAB_SIZE = 101

kill = functools.partial(Fault, kind="kill")
stop = functools.partial(Fault, kind="stop")
cut = functools.partial(Fault, kind="cut")
delay = functools.partial(Fault, kind="delay")


async def undisturbed(server: ChaosServer, model: Path, max_tokens: int) -> tuple[Load, list[Answer]]:
    """200 requests or more, and what they get."""
    load = make_load(225, 25, max_tokens, VOCAB_SIZE)
    load, answers = clear_requests(model, load, (await run(server, load)).answers)
    assert len(load.bodies) >= 200
    return load, answers


def assert_unharmed(disturbed: Run, oracle: Sequence[Answer], load: Load) -> None:
    """All ended as they were asked to, with the same tokens, and all workers serve again."""
    complaints = [answer.complaint(load.max_tokens) for answer in disturbed.answers]
    assert complaints == [""] * len(complaints)
    others = [n for n, (a, o) in enumerate(zip(disturbed.answers, oracle, strict=True)) if a.token_ids != o.token_ids]
    assert others == []
    assert all(incident.healed is not None for incident in disturbed.incidents)


async def suffer(server: ChaosServer, model: Path, faults: Sequence[Fault], max_tokens: int = MAX_TOKENS) -> None:
    load, oracle = await undisturbed(server, model, max_tokens)
    before = server.residue()
    disturbed = await run(server, load, faults)
    assert_unharmed(disturbed, oracle, load)
    assert server.leaks(before) == []


APART = ("--attention-workers", "2", "--expert-workers", "2")


async def test_one_after_another(checkpoint_factory: Callable[..., Path], tmp_path: Path) -> None:
    model = checkpoint_factory("qwen3_moe")
    with ChaosServer(tmp_path, str(model), *APART, *QUIET) as server:
        faults = [
            kill(workers=("expert 0",), at=0.1),
            stop(workers=("expert 1",), at=0.3),
            kill(workers=("attention 0",), at=0.5),
            cut(workers=("expert 0",), at=0.7),
        ]
        await suffer(server, model, faults)


async def test_two_at_once(checkpoint_factory: Callable[..., Path], tmp_path: Path) -> None:
    """With replicas of all experts: nobody has to wait for a worker that comes back."""
    model = checkpoint_factory("qwen3_moe")
    with ChaosServer(tmp_path, str(model), *APART, "--redundant-experts", "4", *QUIET) as server:
        faults = [
            delay(workers=("expert 1",), at=0.1, seconds=1.0),
            kill(workers=("expert 0", "attention 1"), at=0.3),
            stop(workers=("expert 1", "attention 0"), at=0.6),
        ]
        await suffer(server, model, faults)


async def test_the_only_attention_worker(checkpoint_factory: Callable[..., Path], tmp_path: Path) -> None:
    """Nobody else could go on with its sequences: they wait for its next life."""
    model = checkpoint_factory("qwen3_moe")
    with ChaosServer(tmp_path, str(model), "--expert-workers", "2", *QUIET) as server:
        await suffer(server, model, [kill(workers=("attention 0",), at=0.4)])


async def test_one_worker_that_runs_all_layers_at_once(checkpoint_factory: Callable[..., Path], tmp_path: Path) -> None:
    """What `amoe serve` does by itself on a small machine. All wait for its next life, and for the one after that."""
    model = checkpoint_factory("qwen3_moe")
    with ChaosServer(tmp_path, str(model), "--warm-spare", *QUIET) as server:
        assert "schedule forward" in server.printed()
        faults = [kill(workers=("worker 0",), at=0.2), stop(workers=("worker 0",), at=0.6)]
        await suffer(server, model, faults, 2 * MAX_TOKENS)  # it is so fast that they would be over before both


async def test_who_may_lose_experts_goes_on_without_and_is_told(
    checkpoint_factory: Callable[..., Path], tmp_path: Path
) -> None:
    """With `--on-expert-loss reroute`; exact requests wait, and get the same tokens as ever."""
    model = checkpoint_factory("qwen3_moe")
    with ChaosServer(tmp_path, str(model), "--expert-workers", "2", "--on-expert-loss", "reroute", *QUIET) as server:
        load = make_load(64, 0, 60, VOCAB_SIZE)
        exact = [body | {"capacity": "exact"} for body in load.bodies[:32]]
        load = replace(load, bodies=(*exact, *load.bodies[32:]))
        undisturbed = (await run(server, load)).answers
        assert not any(lost(answer) for answer in undisturbed)
        told = (await run(server, load, [kill(workers=("expert 1",), at=0.2)])).answers
        assert [answer.complaint(load.max_tokens) for answer in told] == [""] * len(told)
        assert not any(lost(answer) for answer in told[:32])
        assert any(lost(answer) for answer in told[32:])
        oracle, _ = clear_requests(model, replace(load, bodies=tuple(exact)), undisturbed[:32])
        for body, before, after in zip(exact, undisturbed, told, strict=False):
            assert body not in oracle.bodies or before.token_ids == after.token_ids


def lost(answer: Answer) -> int:
    """Pairs of a token and an expert that were computed elsewhere, or nowhere, as the answer's `usage` tells."""
    told = answer.usage["capacity"]
    return told["pairs_dropped"] + told["pairs_rerouted"]


@pytest.mark.matrix
@pytest.mark.parametrize("transport", ["shm", "tcp", "distributed"])
async def test_a_worker_that_is_both(transport: str, checkpoint_factory: Callable[..., Path], tmp_path: Path) -> None:
    model = checkpoint_factory("qwen3_moe")
    with ChaosServer(tmp_path, str(model), "--colocated", "2", "--transport", transport, *QUIET) as server:
        await suffer(server, model, [kill(workers=("worker 0",), at=0.3), stop(workers=("worker 1",), at=0.6)])
