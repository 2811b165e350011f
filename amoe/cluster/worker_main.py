"""The main of a worker process: `python -m amoe.cluster.worker_main TITLE PARENT_PID`, with a `LaunchSpec` on stdin.

Everybody on the machine can read a command line, and a launch spec may hold secrets. The heavy imports come before it
is read, so that a *spare* process has them behind it when it is told which worker it is. If standard input ends without
a spec, nobody has needed it.

It leaves when the server says `Stop` or goes away, or on SIGTERM; SIGINT is the server's to handle. Exit status 0: it
was asked to leave; 2: it cannot start, and has told the server why in words for the user; 1: anything else, with a
traceback on standard error.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

import setproctitle

from amoe.cluster.leaving import EXIT_FAILURE, run_and_leave

_PR_SET_PDEATHSIG = 1


def main(title: str, parent_pid: int) -> int:
    """Run the worker to its end; returns the exit status.

    The heavy imports take seconds, so the process first says who it is and ties its life to its parent's.
    """
    setproctitle.setproctitle(f"amoe: {title}")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent(parent_pid)
    import faulthandler

    import msgspec

    import amoe.engine.build  # noqa: F401 - what nearly every worker is made by
    from amoe.cluster.process import LaunchSpec, title_of
    from amoe.cluster.worker_run import run_worker

    faulthandler.enable()
    launch_spec = sys.stdin.buffer.read()
    if not launch_spec:
        return 0
    spec = msgspec.json.decode(launch_spec, type=LaunchSpec)
    setproctitle.setproctitle(f"amoe: {title_of(spec.config.placement, spec.rank)}")
    return run_worker(spec)


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when the thread that started it ends, be it by `kill -9`."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent_pid:  # it died before the kernel could be asked
        sys.exit(EXIT_FAILURE)


if __name__ == "__main__":
    run_and_leave(lambda: main(sys.argv[1], int(sys.argv[2])))
