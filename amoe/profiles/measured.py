"""Block costs as measured on a machine: tables, interpolated. `benchmarks/measure_profile.py` writes the files.

A file is one JSON object:

    format      "amoe measured profile 1"
    name        of machine and model, for people
    machine     description of the machine
    dtype       of the model as measured
    threads     of a worker
    model       the fields of `ModelSizes`
    attention   {"points": [{"tokens", "context", "seconds"}, ...], "host": [{"tokens", "seconds"}, ...]}
    experts     {"fixed": seconds, "per_expert": [{"tokens", "seconds"}, ...], "host": [{"tokens", "seconds"}, ...]}
    head        {"points": [{"tokens", "seconds"}, ...], "host": [{"tokens", "seconds"}, ...]}

Points are kernel time, `host` is the host's share of the step around it; of experts, its tokens are pairs. Attention's
points form a full grid, whose `context` is tokens of context per token. Between points all is linear, beyond the last
it goes on with the slope of the last two. The grouped GEMM is a sum over its experts: one call of `fixed` seconds plus
each expert's own time by its number of pairs, so that skewed counts cost what they cost.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from amoe.errors import ConfigError
from amoe.profiles.costs import BlockCosts, Counts, FloatArray
from amoe.profiles.models import ModelSizes

FORMAT = "amoe measured profile 1"


class Curve:
    """A piecewise linear function of a number of tokens; never negative.

    Args:
        tokens: [P] ascending, at least 1.
        seconds: [P].
    """

    def __init__(self, tokens: Sequence[float] | FloatArray, seconds: Sequence[float]) -> None:
        self.tokens = np.asarray(tokens, np.float64)
        self.seconds = np.asarray(seconds, np.float64)
        if len(self.tokens) == 0 or len(self.tokens) != len(self.seconds):
            raise ConfigError("a curve needs at least one point")
        if self.tokens[0] < 0 or (np.diff(self.tokens) <= 0).any():
            raise ConfigError("the points of a curve must have different, ascending numbers of tokens")
        if not np.isfinite(self.seconds).all() or (self.seconds < 0).any():
            raise ConfigError("the seconds of a curve must be finite and not negative")

    def __call__(self, tokens: npt.ArrayLike) -> FloatArray:
        """Seconds at `tokens` [...]."""
        wanted = np.asarray(tokens, np.float64)
        if len(self.tokens) == 1:
            return np.full(wanted.shape, self.seconds[0])
        left = np.clip(np.searchsorted(self.tokens, wanted, side="right") - 1, 0, len(self.tokens) - 2)
        share = (wanted - self.tokens[left]) / (self.tokens[left + 1] - self.tokens[left])
        return np.maximum(0.0, self.seconds[left] * (1 - share) + self.seconds[left + 1] * share)


class Surface:
    """A function of a number of tokens and of the context of each: bilinear on a full grid.

    Args:
        points: (tokens, context per token, seconds) in any order.
    """

    def __init__(self, points: Sequence[tuple[float, float, float]]) -> None:
        table = {(tokens, context): seconds for tokens, context, seconds in points}
        tokens = sorted({tokens for tokens, _ in table})
        contexts = sorted({context for _, context in table})
        if not table or len(table) != len(points) or len(table) != len(tokens) * len(contexts):
            raise ConfigError("the points of attention must form a full grid: every context for every number of tokens")
        self._contexts = np.asarray(contexts, np.float64)
        self._curves = [Curve(tokens, [table[t, context] for t in tokens]) for context in contexts]

    def __call__(self, tokens: float, context: float) -> float:
        """Seconds of `tokens` tokens that look at `context` tokens each."""
        return float(Curve(self._contexts, [float(curve(tokens)) for curve in self._curves])(context))


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasuredProfile:
    """What a file says about its origin."""

    name: str
    machine: str
    dtype: str
    threads: int
    sizes: ModelSizes


class MeasuredCosts:
    """`BlockCosts` from a file's tables.

    Args:
        document: the object in the file.
        include_host: add the host's time of each step to its kernels: for a simulator that knows no host.

    Raises:
        ConfigError: the object is not such a table.
    """

    def __init__(self, document: Mapping[str, Any], *, include_host: bool = False) -> None:
        self.document = document
        try:
            self._read(document, include_host)
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"not a measured profile: {type(error).__name__}: {error}") from error

    def _read(self, document: Mapping[str, Any], include_host: bool) -> None:
        if document["format"] != FORMAT:
            raise ConfigError(f"not a measured profile: its format is {document['format']!r}, not {FORMAT!r}")
        known = {field.name for field in fields(ModelSizes)}
        if set(document["model"]) != known:
            raise ConfigError(f"a measured profile's model must have the fields {', '.join(sorted(known))}")
        self.sizes = ModelSizes(**document["model"])
        self.profile = MeasuredProfile(
            name=str(document["name"]),
            machine=str(document["machine"]),
            dtype=str(document["dtype"]),
            threads=int(document["threads"]),
            sizes=self.sizes,
        )
        attention, experts, head = document["attention"], document["experts"], document["head"]
        self._attention = Surface([(p["tokens"], p["context"], p["seconds"]) for p in attention["points"]])
        self._attention_host = _curve(attention["host"])
        self._experts_fixed = float(experts["fixed"])
        self._per_expert = _curve(experts["per_expert"])
        self._experts_host = _curve(experts["host"])
        self._head = _curve(head["points"])
        self._head_host = _curve(head["host"])
        self._include_host = include_host

    def with_host(self) -> MeasuredCosts:
        """The same, with the host's time in every block's."""
        return MeasuredCosts(self.document, include_host=True)

    def attention(self, layer: int, num_tokens: int, num_context: int) -> float:
        """See `BlockCosts`."""
        if num_tokens == 0:
            return 0.0
        host = float(self._attention_host(num_tokens)) if self._include_host else 0.0
        return self._attention(num_tokens, num_context / num_tokens) + host

    def experts(self, layer: int, counts: Counts) -> FloatArray:
        """See `BlockCosts`."""
        has_pairs = counts > 0
        times = np.where(has_pairs, self._per_expert(counts), 0.0).sum(axis=-1)
        fixed = self._experts_fixed + (self._experts_host(counts.sum(axis=-1)) if self._include_host else 0.0)
        return np.where(has_pairs.any(axis=-1), times + fixed, 0.0)

    def head(self, num_tokens: int) -> float:
        """See `BlockCosts`."""
        if num_tokens == 0:
            return 0.0
        return float(self._head(num_tokens)) + (float(self._head_host(num_tokens)) if self._include_host else 0.0)


class ScaledCosts:
    """Other costs, `factor` times as slow."""

    def __init__(self, costs: BlockCosts, factor: float) -> None:
        if not 0 < factor < float("inf"):
            raise ConfigError(f"a slowdown must be greater than 0 and finite, not {factor}")
        self._costs = costs
        self.factor = factor

    def attention(self, layer: int, num_tokens: int, num_context: int) -> float:
        """See `BlockCosts`."""
        return self.factor * self._costs.attention(layer, num_tokens, num_context)

    def experts(self, layer: int, counts: Counts) -> FloatArray:
        """See `BlockCosts`."""
        return self.factor * self._costs.experts(layer, counts)

    def head(self, num_tokens: int) -> float:
        """See `BlockCosts`."""
        return self.factor * self._costs.head(num_tokens)


def _curve(points: Sequence[Mapping[str, float]]) -> Curve:
    ordered = sorted(points, key=lambda point: point["tokens"])
    return Curve([point["tokens"] for point in ordered], [point["seconds"] for point in ordered])


def is_measured(name: str) -> bool:
    """A device's name is the path of a measured profile, not that of a `DeviceProfile`."""
    return name.endswith(".json")


def load_measured(path: str | Path) -> MeasuredCosts:
    """Costs from a file that `benchmarks/measure_profile.py` has written.

    Raises:
        ConfigError: there is no such file, or it is something else.
    """
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the measured profile {path}: {error}") from error
    if not isinstance(document, dict):
        raise ConfigError(f"{path} is not a measured profile")
    try:
        return MeasuredCosts(document)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
