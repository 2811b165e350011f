"""A record of all that a core was told and of all that it said: so that another shell can repeat it.

Entries are plain lists, numbers and dictionaries, the same before and after a trip through JSON:

    add, abort           a request came, or was aborted
    set_shares           other shares of the replicas hold from now on
    on_roster            other workers serve, or hold other experts, from now on; said: what is sent anew
    on_batch             a batch came; said: the rows that are kept
    start                said: announcements, and how much of slots and KV blocks is in use
    next_step            said: the step, with the batches that an experts step answers
    on_attention         what the router said; said: dispatches
    on_forward           a step through all layers is done; given: the experts, if a user wants to know them
    on_head              what the sampler said
    observe              what the step has taken, where the core decides by that
    retry                said: what is sent again to those who do not answer
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np

from amoe.config import (
    CacheConfig,
    CapacityConfig,
    EngineConfig,
    FailureConfig,
    PlacementConfig,
    SchedulerConfig,
    SteeringConfig,
)
from amoe.core.members import Roster
from amoe.core.sequence import SequenceTable
from amoe.core.steps import AttentionStep, ExpertsStep, ForwardStep, HeadStep, Outgoing, Step
from amoe.core.worker import ModelShape, WorkerCore
from amoe.types import Batch, BatchKind, Int16Array, Int32Array, Int64Array, SamplingParams

FORMAT = 5
_COLUMNS: dict[str, Any] = {
    "slots": np.int32,
    "generations": np.int32,
    "iterations": np.int32,
    "expert_ids": np.int16,
    "expert_weights": np.float32,
}
# Where a call is made, its name, what to keep of its arguments (with the time that they tell), and of its answer.
_Call = tuple[object, str, Callable[..., tuple[float | None, Any]], Callable[[Any], Any]]
_HEADERS = tuple(item.name for item in fields(Batch) if item.name not in {*_COLUMNS, "payload"})


@dataclass(frozen=True, slots=True)
class Entry:
    """One call: what was `given`, and what the core `said`. `now` is None of calls that are not told the time."""

    call: str
    now: float | None
    given: Any
    said: Any


@dataclass(frozen=True, slots=True)
class Origin:
    """What core it was: enough to make another one like it.

    Attributes:
        owners: where experts lived as it began; None: no replicas.
        incarnation: which life of its worker it was.
        incarnations: of the others, if it came while they served; None: it began with them.
    """

    config: EngineConfig
    shape: ModelShape
    rank: int
    num_kv_blocks: int
    max_model_len: int
    owners: list[list[list[int]]] | None = None
    incarnation: int = 0
    incarnations: list[int] | None = None

    def make_core(self) -> WorkerCore:
        """A core in its first state."""
        return WorkerCore(
            self.config,
            self.shape,
            self.rank,
            num_kv_blocks=self.num_kv_blocks,
            max_model_len=self.max_model_len,
            owners=None if self.owners is None else np.array(self.owners, np.int16),
            incarnation=self.incarnation,
            incarnations=self.incarnations,
        )


@dataclass(slots=True)
class Trace:
    """The life of one core."""

    origin: Origin
    entries: list[Entry] = field(default_factory=list)

    def to_lines(self) -> Iterator[str]:
        """One JSON object per line: the origin, then the entries."""
        origin = self.origin
        yield json.dumps(
            {
                "format": FORMAT,
                "config": asdict(origin.config),
                "sparse_layers": list(origin.shape.sparse_layers),
                "num_experts": origin.shape.num_experts,
                "renormalises": origin.shape.renormalises,
                "rank": origin.rank,
                "num_kv_blocks": origin.num_kv_blocks,
                "max_model_len": origin.max_model_len,
                "owners": origin.owners,
                "incarnation": origin.incarnation,
                "incarnations": origin.incarnations,
            }
        )
        for entry in self.entries:
            yield json.dumps([entry.call, entry.now, entry.given, entry.said])

    @classmethod
    def from_lines(cls, lines: Iterable[str]) -> Trace:
        """What `to_lines` has written.

        Raises:
            ValueError: the lines are something else, or of another version.
        """
        rest = iter(lines)
        try:
            head = json.loads(next(rest, ""))
            if head["format"] != FORMAT:
                raise ValueError(f"the trace has format {head['format']}, and this version reads {FORMAT}")
            config = head["config"]
            config["cpu_sets"] = tuple(tuple(cpus) for cpus in config["cpu_sets"])
            config["placement"] = PlacementConfig(**config["placement"])
            config["scheduler"] = SchedulerConfig(**config["scheduler"])
            config["cache"] = CacheConfig(**config["cache"])
            config["steering"] = SteeringConfig(**config["steering"])
            config["capacity"] = CapacityConfig(**config["capacity"])
            config["failure"] = FailureConfig(**config["failure"])
            shape = ModelShape(tuple(head["sparse_layers"]), head["num_experts"], head["renormalises"])
            sizes = (head["num_kv_blocks"], head["max_model_len"])
            life = (head["owners"], head["incarnation"], head["incarnations"])
            origin = Origin(EngineConfig(**config), shape, head["rank"], *sizes, *life)
            return cls(origin, [Entry(*json.loads(line)) for line in rest if line.strip()])
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"this is not a trace of a core: {error!r}") from error


def record(core: WorkerCore, config: EngineConfig, shape: ModelShape, owners: Int16Array | None = None) -> Trace:
    """Record `core` from now on; it must be in its first state for the trace to be repeatable.

    The calls that a shell makes are intercepted on these very objects, so neither core nor shell know of it, and cores
    that are not recorded pay nothing.

    Args:
        config, shape, owners: what the core was made with. A `wave_controller` of its own cannot be repeated.

    Returns:
        The trace, which grows as the core is used.
    """
    batcher, members = core.batcher, core.members
    num_blocks = batcher.blocks.num_blocks if batcher is not None else 0
    length = batcher.max_model_len if batcher is not None else 0
    places = None if owners is None else owners.tolist()
    others = members.incarnations if core.is_late else None
    origin = Origin(config, shape, core.rank, num_blocks, length, places, members.incarnation, others)
    trace = Trace(origin)
    for owner, name, given, said in (*_calls(core, config), *_calls_at_home(core)):
        _intercept(owner, name, given, said, trace.entries)
    return trace


def _calls(core: WorkerCore, config: EngineConfig) -> list[_Call]:
    """Of any worker."""
    calls: list[_Call] = [
        (core, "on_batch", lambda batch, now: (now, encode_batch(batch)), _as_list),
        (core, "on_roster", lambda roster, now: (now, encode_roster(roster)), _encode_outgoing),
        (core, "start", lambda now: (now, None), lambda outgoing: [_encode_outgoing(outgoing), _usage(core)]),
        (core, "next_step", lambda now: (now, None), _encode_step),
    ]
    if config.capacity.slack_s is not None:
        calls.append((core, "observe", _encode_seconds, _as_nothing))
    return calls


def _calls_at_home(core: WorkerCore) -> list[_Call]:
    """Of a worker that is a home of sequences."""
    batcher, attention, forward = core.batcher, core.attention, core.forward
    calls: list[_Call] = []
    if batcher is not None:
        calls += [
            (batcher, "add", _encode_request, lambda sequence: sequence.order[1]),
            (batcher, "abort", lambda request_id: (None, request_id), lambda sequence: sequence is not None),
        ]
    if attention is not None:
        calls += [
            (attention, "set_shares", lambda shares: (None, shares.tolist()), _as_nothing),
            (attention, "on_attention", _encode_routing, _encode_outgoing),
            (attention, "on_head", _encode_sampled, _as_nothing),
            (attention.recovery, "retry", lambda now: (now, None), _encode_outgoing),
        ]
    if forward is not None:
        calls += [
            (forward, "on_forward", functools.partial(_encode_passed, forward.batcher.table), _as_nothing),
            (forward, "on_head", _encode_sampled, _as_nothing),
            (forward, "observe", _encode_seconds, _as_nothing),
        ]
    return calls


def _intercept(
    owner: object,
    name: str,
    given: Callable[..., tuple[float | None, Any]],
    said: Callable[[Any], Any],
    entries: list[Entry],
) -> None:
    method = getattr(owner, name)

    def recorded(*args: Any, **named: Any) -> Any:
        now, encoded = given(*args, **named)  # before the call: nobody promises that arguments stay what they are
        answer = method(*args, **named)
        entries.append(Entry(name, now, encoded, said(answer)))
        return answer

    setattr(owner, name, recorded)


# ---- encoding


def encode_batch(batch: Batch) -> dict[str, Any]:
    """Header and columns; no payload."""
    headers = {name: _plain(getattr(batch, name)) for name in _HEADERS}
    return headers | {name: getattr(batch, name).tolist() for name in _COLUMNS}


def decode_batch(encoded: dict[str, Any]) -> Batch:
    """The batch that `encode_batch` has encoded."""
    columns = {name: np.array(encoded[name], dtype) for name, dtype in _COLUMNS.items()}
    for name in ("expert_ids", "expert_weights"):
        if columns[name].ndim == 1:
            columns[name] = columns[name].reshape(0, 0)
    return Batch(**(encoded | columns | {"kind": BatchKind(encoded["kind"])}))


def encode_roster(roster: Roster) -> dict[str, Any]:
    """All of it."""
    owners = roster.owners.tolist()
    return {"version": roster.version, "incarnations": list(roster.incarnations), "owners": owners}


def decode_roster(encoded: dict[str, Any]) -> Roster:
    """The roster that `encode_roster` has encoded."""
    return Roster(encoded["version"], encoded["incarnations"], np.array(encoded["owners"], np.int16))


def _encode_passed(
    table: SequenceTable, step: ForwardStep, expert_ids: Mapping[int, Int64Array]
) -> tuple[None, dict[str, Any]]:
    told = {str(layer): ids.tolist() for layer, ids in expert_ids.items()} if table.num_telling else {}
    return None, {"num_tokens": step.num_tokens, "num_wanted": step.num_wanted, "expert_ids": told}


def _encode_sampled(step: HeadStep, *sampled: Any) -> tuple[None, Any]:
    return None, [_as_list(item) for item in sampled]


def _encode_seconds(step: Step, seconds: float) -> tuple[None, float]:
    return None, seconds


def _as_nothing(answer: Any) -> None:
    return None


def _plain(value: float) -> float:
    return value if isinstance(value, float) else int(value)


def _as_list(array: Any) -> Any:
    return None if array is None else array.tolist()


def _encode_request(
    request_id: int,
    token_ids: Int32Array,
    params: SamplingParams,
    sibling_of: int | None = None,
    *,
    num_generated: int = 0,
    num_routed: int = 0,
) -> tuple[None, Any]:
    """Of the parameters, what a core looks at."""
    spans = [list(span) for span in params.droppable_spans]
    seen = {
        "max_tokens": params.max_tokens,
        "prompt_logprobs": params.prompt_logprobs,
        "capacity": params.capacity,
        "droppable_spans": spans,
        "priority": params.priority,
        "cache_salt": params.cache_salt,
        "return_routed_experts": params.return_routed_experts,
    }
    request = {"request_id": request_id, "token_ids": token_ids.tolist(), "params": seen, "sibling_of": sibling_of}
    return None, request | {"num_generated": num_generated, "num_routed": num_routed}


def _encode_routing(
    step: AttentionStep, topk_ids: Any, topk_weights: Any, now: float, scores: Any = None
) -> tuple[float, Any]:
    routing = {"topk_ids": _as_list(topk_ids), "topk_weights": _as_list(topk_weights)}
    return now, routing | ({} if scores is None else {"scores": _as_list(scores)})


def _encode_outgoing(outgoing: Sequence[Outgoing]) -> list[Any]:
    return [{"batch": encode_batch(item.batch), "rows": _encode_rows(item.rows)} for item in outgoing]


def _encode_rows(rows: Int32Array | slice | None) -> Any:
    return [rows.start, rows.stop] if isinstance(rows, slice) else _as_list(rows)


def _encode_step(step: Step | None) -> Any:
    if step is None:
        return None
    if isinstance(step, ExpertsStep):
        return {
            "block": _encode_block(step),
            "slab_rows": step.slab_rows.tolist(),
            "expert_ids": step.expert_ids.tolist(),
            "replies": _encode_outgoing(step.replies),
        }
    if isinstance(step, HeadStep):
        return {"block": _encode_block(step)} | _encode_head(step)
    encoded = {
        "slots": step.slots.tolist(),
        "rows": step.rows.tolist(),
        "positions": step.positions.tolist(),
        "num_decodes": step.num_decodes,
        "chunks": [[span.start, span.end, span.row] for span in step.chunks],
    }
    if isinstance(step, ForwardStep):
        head = None if step.head is None else _encode_head(step.head)
        return {"block": None} | encoded | {"wanted": _as_list(step.wanted), "head": head}
    return {"block": _encode_block(step)} | encoded


def _encode_block(step: AttentionStep | HeadStep | ExpertsStep) -> list[Any]:
    return [step.block.kind.name, step.block.layer, step.block.wave]


def _encode_head(step: HeadStep) -> dict[str, Any]:
    encoded: dict[str, Any] = {"slots": step.slots.tolist(), "rows": step.rows.tolist()}
    if step.prompt is not None:
        encoded["prompt"] = [step.prompt.slots.tolist(), step.prompt.positions.tolist()]
    return encoded


def _usage(core: WorkerCore) -> dict[str, int] | None:
    batcher = core.batcher
    if batcher is None:
        return None
    return {
        "kv_blocks": batcher.blocks.num_used,
        "free_slots": batcher.slots.num_free,
        "preemptions": batcher.num_preemptions,
    }
