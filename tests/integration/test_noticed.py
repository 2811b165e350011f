"""The faults that a server sees in workers that live and do nothing: one hangs inside a step, a home is cut off.

How soon is shown in virtual time (tests/unit/engine/test_noticed_in_time.py), and measured by `benchmarks.chaos`; that
no token changes, by test_chaos.py.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from pathlib import Path

import pytest

from benchmarks.chaos.faults import Fault
from benchmarks.chaos.run import run
from benchmarks.chaos.server import ChaosServer
from benchmarks.chaos.streams import make_load

pytestmark = pytest.mark.cluster

FLAGS = ("--attention-workers", "2", "--expert-workers", "1", "--uvicorn-log-level", "warning")
FAULTS = [
    Fault(kind="hang", workers=("expert 0",), at=0.2),
    Fault(kind="cut", workers=("attention 1",), at=0.5, seconds=inf),
]


async def test_a_hang_and_a_home_that_is_cut_off(checkpoint_factory: Callable[..., Path], tmp_path: Path) -> None:
    """The only expert worker, which the other home reaches, is not replaced for the home that does not."""
    model = checkpoint_factory("qwen3_moe")
    with ChaosServer(tmp_path, str(model), *FLAGS) as server:
        # So many that they are not over before the second fault is done.
        load = make_load(24, 0, 128, 101)
        await run(server, load)  # steps are well known then
        disturbed = await run(server, load, FAULTS)
        assert {answer.complaint(load.max_tokens) for answer in disturbed.answers} == {""}
        assert all(incident.noticed is not None for incident in disturbed.incidents)
        losses = {
            (labels["worker"], labels["kind"])
            for name, labels, value in server.series()
            if name == "worker_losses_total" and value
        }
        assert losses >= {("2", "hung"), ("1", "cut")}
        assert ("2", "cut") not in losses
