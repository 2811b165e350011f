"""The process that compiles users' grammars: one line of JSON in, one out, until its parent has gone.

Its stack, memory and time are smaller than those of a worker: what passes here does no harm there.
"""

from __future__ import annotations

import json
import re
import resource
import signal
import sys
import threading

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

MAX_LINE_BYTES = 4 * 1024 * 1024
READY = b"ready\n"
MAX_COMPLAINT_CHARS = 400
STACK_BYTES = 2 * 1024 * 1024  # a worker's threads have 8 MiB
MEMORY_BYTES = 2 * 1024 * 1024 * 1024
MAX_CPU_S = 2.0  # for one grammar; time of the processor, so that a busy machine refuses nothing more

_SPACES = re.compile(r"\s+")
_UNSATISFIABLE = "NoExtension"  # how llguidance says that there is no text at all


def complaint_about(grammar: str) -> str | None:
    """Compile `grammar` here and now, over single bytes instead of a model's tokens, and take its first step.

    Returns:
        What is wrong with it, fit for a user; None: nothing.
    """
    limits = LLParserLimits(verbose_errors=False)
    matcher = LLMatcher(LLTokenizer("byte"), grammar, log_level=0, limits=limits)
    if not matcher.is_error():
        matcher.compute_bitmask()
    return _readable(matcher.get_error()) if matcher.is_error() else None


def _readable(complaint: str) -> str:
    if complaint.startswith(_UNSATISFIABLE):
        return "no text follows it"
    text = _SPACES.sub(" ", complaint.replace("<non-verbose/>", "")).strip()
    return text if len(text) <= MAX_COMPLAINT_CHARS else text[:MAX_COMPLAINT_CHARS] + "..."


def _answer_all() -> None:
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, MAX_CPU_S)
        complaint = complaint_about(json.loads(line))
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        print(json.dumps(complaint), flush=True)


def main() -> None:
    """Serve standard input. An interrupt of the terminal is the parent's to handle."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    sys.stdout.write(READY.decode())
    sys.stdout.flush()
    threading.stack_size(STACK_BYTES)
    server = threading.Thread(target=_answer_all)
    server.start()
    server.join()


if __name__ == "__main__":
    main()
