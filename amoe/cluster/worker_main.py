"""The main of a worker process: `python -m amoe.cluster.worker_main TITLE PARENT_PID LAUNCH_SPEC`.

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

EXIT_FAILURE = 1
EXIT_USER_ERROR = 2
_PR_SET_PDEATHSIG = 1


def main(title: str, parent_pid: int, launch_spec: str) -> int:
    """Run the worker to its end; returns the exit status.

    The heavy imports take seconds, so the process first says who it is and ties its life to its parent's.
    """
    setproctitle.setproctitle(f"amoe: {title}")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent(parent_pid)
    return _serve(title, launch_spec)


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when the thread that started it ends, be it by `kill -9`."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent_pid:  # it died before the kernel could be asked
        sys.exit(EXIT_FAILURE)


def _serve(title: str, launch_spec: str) -> int:
    import faulthandler
    import importlib
    import traceback

    import msgspec

    from amoe.cluster.process import LaunchSpec
    from amoe.engine.messages import Failed
    from amoe.engine.shared_control import control_port
    from amoe.errors import AmoeError
    from amoe.logs import configure
    from amoe.transport.shm import ShmTransport

    faulthandler.enable()
    spec = msgspec.json.decode(launch_spec, type=LaunchSpec)
    configure(spec.logs, title)
    control = control_port(spec.control_fd, spec.front_fds)
    transport = ShmTransport.attach(spec.shm, spec.rank)
    is_built = False
    try:
        module, _, function = spec.entry.partition(":")
        build_worker = getattr(importlib.import_module(module), function)
        worker = build_worker(spec.config, spec.rank, transport, control)
        is_built = True
        # Until here SIGTERM ends the process at once: there is nothing to leave orderly.
        signal.signal(signal.SIGTERM, lambda _number, _frame: control.interrupt())
        worker.run()
        return 0
    except Exception as error:
        is_user_error = isinstance(error, AmoeError) and not is_built
        if is_user_error:
            control.send(Failed(str(error), user_error=True))
            return EXIT_USER_ERROR
        traceback.print_exc()
        control.send(Failed(f"{type(error).__name__}: {error}", user_error=False))
        return EXIT_FAILURE
    finally:
        transport.close()
        control.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), sys.argv[3]))
