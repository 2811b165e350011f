"""A process that has run a worker ends with its own status, and all that it has said, whatever its threads are at."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Links of torch.distributed with traffic on them. Without `leave`, every single such process aborts.
IN_THE_MIDDLE = """
import select, sys, threading
from amoe.cluster.leaving import run_and_leave
from tests.transport_group import Group, batch_of

def main():
    group = Group("distributed", 2)
    ends = group.open_all(2)
    has_answer = threading.Event()

    def answer(end, other):
        end.send(batch_of(8, end.rank, other))
        while True:
            select.select([end.fileno()], [], [])
            for _ in end.poll():
                end.send(batch_of(8, end.rank, other))
                has_answer.set()

    for end, other in zip(ends, (1, 0)):
        threading.Thread(target=answer, args=(end, other), daemon=True).start()
    assert has_answer.wait(60)
    sys.stdout.write("the last word")
    return 7

run_and_leave(main)
"""


def ended(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )


def test_in_the_middle_of_traffic() -> None:
    done = ended(IN_THE_MIDDLE)
    assert (done.returncode, done.stdout) == (7, "the last word"), done.stderr


def test_by_an_error() -> None:
    done = ended("from amoe.cluster.leaving import run_and_leave\nrun_and_leave(lambda: 1 // 0)")
    assert done.returncode == 1 and "ZeroDivisionError" in done.stderr


def test_by_sys_exit() -> None:
    assert ended("import sys\nfrom amoe.cluster.leaving import run_and_leave\nrun_and_leave(sys.exit)").returncode == 0
    code = "import sys\nfrom amoe.cluster.leaving import run_and_leave\nrun_and_leave(lambda: sys.exit(3))"
    assert ended(code).returncode == 3
    words = ended(
        "import sys\nfrom amoe.cluster.leaving import run_and_leave\nrun_and_leave(lambda: sys.exit('no room'))"
    )
    assert (words.returncode, words.stderr) == (1, "no room\n")
