"""The threads of the native kernels: every task once, awake or parked, however many pools there are."""

from __future__ import annotations

import os
import resource
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch

from amoe.errors import ConfigError
from amoe.kernels import native
from tests.unit.kernels.native_cases import each_isa, needs_native
from tests.unit.kernels.native_products import KINDS, linear, matrix_of, random

TASKS = Path("/proc/self/task")
needs_proc = pytest.mark.skipif(not TASKS.exists(), reason="needs Linux's /proc")


@pytest.mark.skipif(sys.platform == "win32", reason="the kernels are written for GCC and Clang")
def test_the_extension_is_built_here():
    """Without it all other tests of native kernels would be left out, and nobody would know."""
    assert native.is_available()
    assert native.instruction_sets()[0] == "generic"


def threads_now():
    return {int(task.name) for task in TASKS.iterdir()}


def state_of(thread):
    """R running, S sleeping, and so on."""
    return (TASKS / str(thread) / "stat").read_text().rpartition(")")[2].split()[0]


def wait_until(is_so):
    """Within seconds where milliseconds are expected."""
    until = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < until, "it never came to that"
        time.sleep(0.001)


def adds_once(context):
    """A product that is added to its target: a task that ran twice, or never, would show."""
    matrix, _ = matrix_of(KINDS["float32"], 320, 8)
    x = random(100, 8)
    product, total = linear(context, x, matrix), torch.zeros(100, 320)
    for _ in range(4):
        linear(context, x, matrix, residual=total, out=total)
    return torch.equal(total, product + product + product + product)


@needs_native
@pytest.mark.parametrize("num_threads", [1, 2, 3, 4])
def test_every_task_runs_once(num_threads):
    context = native.make_context(torch.float32, num_threads)
    assert context.num_threads == num_threads
    assert all(adds_once(context) for _ in range(4))


@needs_native
@needs_proc
def test_idle_threads_sleep_and_wake_up_again():
    before = threads_now()
    context = native.make_context(torch.float32, 3)
    ours = threads_now() - before
    assert len(ours) == 2, "the caller is the third"
    for _ in range(3):
        assert adds_once(context)
        wait_until(lambda: {state_of(thread) for thread in ours} == {"S"})
    del context
    wait_until(lambda: not ours & threads_now())


@needs_native
def test_pools_of_several_callers_do_not_meet():
    outcomes = []

    def work():
        context = native.make_context(torch.float32, 2)
        outcomes.append(all(adds_once(context) for _ in range(4)))

    callers = [threading.Thread(target=work) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert outcomes == [True] * 3


@needs_native
@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system pins no threads")
def test_threads_keep_to_their_cpus():
    """The caller's stays where it was: threads that it starts later would have to share its one CPU."""
    cpus = sorted(os.sched_getaffinity(0))
    wanted = [cpus[-1], cpus[0]]
    found = []

    def work():
        before = threads_now()
        context = native.make_context(torch.float32, 2, wanted)
        (second,) = threads_now() - before
        assert adds_once(context)
        found.extend([os.sched_getaffinity(0), os.sched_getaffinity(second)])

    caller = threading.Thread(target=work)
    caller.start()
    caller.join()
    assert found == [set(cpus), {wanted[1]}]


@needs_native
def test_the_system_gives_no_more_threads():
    """Each needs room for its stack. Those that there are end, and the process lives."""
    before = threads_now()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + (256 << 20), hard))
    try:
        with pytest.raises(ConfigError, match="--threads-per-worker 2000: this system gives no more threads"):
            native.make_context(torch.float32, 2000)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert threads_now() <= before


@each_isa
def test_the_environment_chooses_the_instruction_set(monkeypatch, isa):
    monkeypatch.setenv(native.ISA_VARIABLE, isa)
    assert native.choose_isa() == isa


@needs_native
def test_the_fastest_instruction_set_is_chosen(monkeypatch):
    monkeypatch.delenv(native.ISA_VARIABLE, raising=False)
    assert native.choose_isa() == native.instruction_sets()[-1]


@needs_native
def test_an_instruction_set_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setenv(native.ISA_VARIABLE, "avx9000")
    with pytest.raises(ConfigError, match="AMOE_CPU_ISA=avx9000: this processor has generic"):
        native.make_context(torch.float32, 1)
    with pytest.raises(ValueError, match="no instruction set avx9000"):
        native.make_context(torch.float32, 1, isa="avx9000")
