"""How a process ends in which threads of libraries may still be at work: at once, with its interpreter as it is.

In a worker these are those of a link of torch.distributed whose peer has not answered yet, or all of them, where
somebody else ends the process; in a server that of a call of Ray's whose cluster does not answer. An interpreter that
is torn down unwinds each thread that asks for its lock; if there is C++ between, as there is in torch, the process
aborts, or crashes (pytorch issue 38228). Nothing there needs the tearing down: what the process holds the kernel takes
back, and what others are to know they have been told.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import traceback
from collections.abc import Callable
from typing import NoReturn

EXIT_FAILURE = 1
RAY_THREAD = "amoe-ray"  # makes the calls of Ray's, and ends with the connection


def leave(status: int) -> NoReturn:
    """End this process, from any thread, once what it has said is written."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):  # nobody reads it any more, or it was never there
            continue
    os._exit(status)


def is_in_a_call_of_rays() -> bool:
    """Some thread is, or has just come out of one."""
    return any(thread.name == RAY_THREAD for thread in threading.enumerate())


def run_and_leave(main: Callable[[], int]) -> NoReturn:
    """End this process with the status that `main` returns, or gives to `sys.exit`; what else it raises is printed."""
    try:
        status = main()
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else EXIT_FAILURE if error.code else 0
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = EXIT_FAILURE
    leave(status)
