"""Repeats in the virtual shell what a core has been through in another one, and tells where it decides differently."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from amoe.core.steps import AttentionStep, ExpertsStep, ForwardStep, HeadStep, Step
from amoe.core.trace import Entry, Trace, decode_batch, decode_roster, record
from amoe.core.worker import WorkerCore
from amoe.errors import ConfigError
from amoe.sim.worker import NewRequest, News, Routing, VirtualWorker
from amoe.types import Batch, BoolArray, Int64Array, SamplingParams

SHOWN = 160  # characters of a value in a report
_MESSAGES = {"add", "abort", "set_shares", "on_roster"}


@dataclass(frozen=True, slots=True)
class Difference:
    """The first entry of a trace that came out otherwise.

    Attributes:
        index: of the entry.
        call: what was called.
        where: path to the value inside the entry.
        recorded, replayed: the two values, as text, perhaps cut off.
    """

    index: int
    call: str
    where: str
    recorded: str
    replayed: str

    def __str__(self) -> str:
        return f"entry {self.index}, {self.call}, {self.where}: recorded {self.recorded}, replayed {self.replayed}"


@dataclass(slots=True)
class Turn:
    """What one round of a shell's loop meets.

    Attributes:
        messages: entries of requests that come, of those that are aborted, of other shares, and of other workers.
        batches: that have arrived.
        answers: entries of what the router, the sampler, or all layers say, by their calls, if the turn asks them.
        seconds: that the step took, where the core was told.
        retried_at: when the turn asked again for what is owed; None: it did not.
    """

    now: float = 0.0
    messages: list[Entry] = field(default_factory=list)
    batches: list[Batch] = field(default_factory=list)
    answers: dict[str, Entry] = field(default_factory=dict)
    seconds: float | None = None
    retried_at: float | None = None

    @property
    def answered_at(self) -> float:
        """When the kernels answered, if that was told."""
        return next((entry.now for entry in self.answers.values() if entry.now is not None), self.now)


class Shell(Protocol):
    """Whatever drives a core."""

    def run(self, turn: Turn) -> None:
        """One round of the loop."""
        ...


def load_trace(path: Path) -> Trace:
    """Read a trace.

    Raises:
        ConfigError: the file holds none.
        OSError: it cannot be read.
    """
    try:
        return Trace.from_lines(path.read_text(encoding="utf-8").splitlines())
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None


def save_trace(trace: Trace, path: Path) -> None:
    """Write a trace, a line per entry."""
    path.write_text("".join(f"{line}\n" for line in trace.to_lines()), encoding="utf-8")


def replay(trace: Trace, make_shell: Callable[[WorkerCore], Shell] | None = None) -> Difference | None:
    """Run the same kind of core through the same events.

    Args:
        make_shell: puts a shell around the core; None: the simulator's `VirtualWorker`.

    Returns:
        The first difference between what was recorded and what comes now; None if there is none.
    """
    origin = trace.origin
    core = origin.make_core()
    owners = None if origin.owners is None else np.array(origin.owners, np.int16)
    repeated = record(core, origin.config, origin.shape, owners)
    shell = (make_shell or VirtualShell)(core)
    compared = 0
    for turn in _turns(trace.entries):
        shell.run(turn)
        end = len(repeated.entries)
        difference = _compare(trace.entries[compared:end], repeated.entries[compared:], compared)
        if difference is not None:
            return difference
        compared = end
    return _compare(trace.entries[compared:], repeated.entries[compared:], compared)


class RecordedAnswers:
    """What a router, a sampler or all layers said in the turn that is repeated.

    Attributes:
        entries: by their calls.
    """

    def __init__(self) -> None:
        self.entries: Mapping[str, Entry] = {}

    def is_for(self, step: Step) -> bool:
        """There is an answer of the kind and size that the step asks for. If not, the comparison will tell."""
        if isinstance(step, ExpertsStep):
            return False
        if isinstance(step, ForwardStep):
            passed = self.entries.get("on_forward")
            if passed is None or (step.head is not None and not self.is_for(step.head)):
                return False
            return (passed.given["num_tokens"], passed.given["num_wanted"]) == (step.num_tokens, step.num_wanted)
        entry = self.entries.get("on_attention" if isinstance(step, AttentionStep) else "on_head")
        if entry is None:
            return False
        first = entry.given["topk_ids"] if isinstance(step, AttentionStep) else entry.given[0]
        return first is None or len(first) == len(step.slots)

    def experts_of(self, step: ForwardStep) -> Mapping[int, Int64Array]:
        """As recorded."""
        given = self.entries["on_forward"].given["expert_ids"]
        # [0, K] lists as nothing: K does not matter then.
        return {int(layer): np.array(ids, np.int64).reshape(len(ids), -1 if ids else 1) for layer, ids in given.items()}

    def route(self, step: AttentionStep, now: float) -> Routing | None:
        """As recorded."""
        given, num_tokens = self.entries["on_attention"].given, step.num_tokens
        if given["topk_ids"] is None:
            return None
        topk_ids = np.array(given["topk_ids"], np.int64).reshape(num_tokens, -1 if num_tokens else 1)
        scores = np.array(given["scores"], np.float32) if "scores" in given else None
        return Routing(topk_ids, np.array(given["topk_weights"], np.float32).reshape(topk_ids.shape), scores)

    def sample(self, step: HeadStep, now: float) -> tuple[Int64Array, BoolArray]:
        """As recorded."""
        token_ids, finished = self.entries["on_head"].given
        return np.array(token_ids, np.int64), np.array(finished, np.bool_)


class VirtualShell:
    """Drives a `VirtualWorker` by recorded turns."""

    def __init__(self, core: WorkerCore) -> None:
        self._answers = RecordedAnswers()
        self._worker = VirtualWorker(core, self._answers, send=lambda batch: None)

    def run(self, turn: Turn) -> None:
        """See `Shell`."""
        worker, self._answers.entries = self._worker, turn.answers
        for message in turn.messages:
            if message.call == "abort":
                worker.abort(message.given)
            elif message.call == "set_shares":
                worker.steer(np.array(message.given))
            elif message.call == "on_roster":
                worker.tell(News(decode_roster(message.given), message.now or 0.0))
            else:
                worker.submit(new_request(message))
        for batch in turn.batches:
            worker.deliver(batch)
        step = worker.turn(turn.now)
        if step is not None and (isinstance(step, ExpertsStep) or self._answers.is_for(step)):
            worker.finish(step, turn.answered_at, turn.seconds)
        if turn.retried_at is not None:
            worker.retry(turn.retried_at)


def new_request(entry: Entry) -> NewRequest:
    """The request of an `add`."""
    given = entry.given
    seen = given["params"]
    spans = tuple((start, end) for start, end in seen["droppable_spans"])
    params = SamplingParams(**seen | {"droppable_spans": spans})
    told = (given["num_generated"], given["num_routed"])
    return NewRequest(given["request_id"], np.array(given["token_ids"], np.int32), params, given["sibling_of"], *told)


def _turns(entries: Sequence[Entry]) -> Iterator[Turn]:
    """Messages, batches, start, next_step, what came of the step, and questions to those who do not answer."""
    turn, is_begun = Turn(), False
    for entry in entries:
        if is_begun and entry.call in {*_MESSAGES, "on_batch", "start"}:
            yield turn
            turn, is_begun = Turn(), False
        if entry.call in _MESSAGES:
            turn.messages.append(entry)
        elif entry.call == "on_batch":
            turn.batches.append(decode_batch(entry.given))
        elif entry.call == "start":
            turn.now = entry.now or 0.0
            is_begun = True
        elif entry.call == "observe":
            turn.seconds = entry.given
        elif entry.call == "retry":
            turn.retried_at = entry.now
        elif entry.call != "next_step":
            turn.answers[entry.call] = entry
    if is_begun:
        yield turn


# ---- comparison


def _compare(recorded: Sequence[Entry], replayed: Sequence[Entry], offset: int) -> Difference | None:
    for index, (before, after) in enumerate(zip_longest(recorded, replayed), offset):
        if before is None or after is None:
            present = before or after
            where = "not recorded" if before is None else "not replayed"
            return Difference(index, present.call, where, _text(before), _text(after))
        for name in ("call", "now", "given", "said"):
            found = _first_difference(getattr(before, name), getattr(after, name), name)
            if found is not None:
                return Difference(index, before.call, *found)
    return None


def _first_difference(before: Any, after: Any, where: str) -> tuple[str, str, str] | None:
    """Path and values of the first difference between two values, None if they are equal."""
    if before == after:
        return None
    if isinstance(before, dict) and isinstance(after, dict) and before.keys() == after.keys():
        pairs = [(f"{where}.{key}", before[key], after[key]) for key in before]
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        pairs = [(f"{where}[{index}]", *pair) for index, pair in enumerate(zip(before, after, strict=True))]
    else:
        return where, _text(before), _text(after)
    return next(found for path, a, b in pairs if (found := _first_difference(a, b, path)) is not None)


def _text(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
