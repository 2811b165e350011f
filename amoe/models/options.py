"""Typed access to the options of a `config.json`: every wrong or unsupported value is a `CheckpointError` by name."""

from __future__ import annotations

import math
from typing import Any

from amoe.errors import CheckpointError
from amoe.models.config import RopeConfig, TorchDTypeName

_ABSENT = object()
_DTYPES: dict[str, TorchDTypeName] = {"float32": "float32", "bfloat16": "bfloat16", "float16": "float16"}
# Beside these a rope section may repeat what its type does not use; any other key would change the answer.
_ROPE_KEYS = {
    "default": set[str](),
    "linear": {"factor"},
    "llama3": {"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"},
    "yarn": {
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    },
}


class Options:
    """The object in `config.json`. A missing option takes the default of Hugging Face's class, given by the caller.

    Where a method takes several names they are spellings of one option: the first one present counts.
    """

    def __init__(self, raw: dict[str, Any]) -> None:
        self.raw = raw

    def _find(self, names: tuple[str, ...], default: object) -> tuple[str, Any]:
        for name in names:
            if self.raw.get(name) is not None:
                return name, self.raw[name]
        if default is _ABSENT:
            raise CheckpointError(f"{names[0]} is missing")
        return names[0], default

    def integer(self, *names: str, default: object = _ABSENT, minimum: int = 1) -> int:
        """A whole number of at least `minimum`; required if there is no default."""
        name, value = self._find(names, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise CheckpointError(f"{name} must be an integer of at least {minimum}, not {value!r}")
        return value

    def number(self, *names: str, default: object = _ABSENT) -> float:
        """A finite number greater than zero."""
        name, value = self._find(names, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
            raise CheckpointError(f"{name} must be a number greater than 0, not {value!r}")
        return float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        _, value = self._find((name,), default)
        if not isinstance(value, bool):
            raise CheckpointError(f"{name} must be true or false, not {value!r}")
        return value

    @staticmethod
    def check(holds: bool, message: str) -> None:
        if not holds:
            raise CheckpointError(message)

    def refuse_unless(self, name: str, *allowed: object) -> None:
        """Accept an option only if it is absent, null or one of `allowed`."""
        value = self.raw.get(name)
        if value is not None and value not in allowed:
            raise CheckpointError(f"{name} {value!r} is not supported")

    def refuse_sliding_window(self, max_position: int, active: bool = True) -> None:
        """A window that no sequence can outgrow changes nothing; a smaller one is not supported."""
        window, kinds = self.raw.get("sliding_window"), self.raw.get("layer_types") or []
        for kind in kinds if isinstance(kinds, list) else [kinds]:
            if kind not in ("full_attention", "sliding_attention"):
                raise CheckpointError(f"layer_types {kind!r} is not supported")
        if not active and "sliding_attention" not in kinds:
            return
        if window is not None and (not isinstance(window, int) or window < max_position):
            raise CheckpointError(
                f"sliding_window {window!r} is not supported: it is smaller than max_position_embeddings {max_position}"
            )

    def layers(self, name: str, num_layers: int) -> tuple[int, ...]:
        """A list of layer numbers."""
        _, value = self._find((name,), [])
        if not isinstance(value, list) or not all(
            isinstance(i, int) and not isinstance(i, bool) and 0 <= i < num_layers for i in value
        ):
            raise CheckpointError(f"{name} must be a list of layers below {num_layers}, not {value!r}")
        return tuple(value)

    def dtype(self) -> TorchDTypeName:
        name, value = self._find(("dtype", "torch_dtype"), "float32")
        if not isinstance(value, str) or value.removeprefix("torch.") not in _DTYPES:
            raise CheckpointError(f"{name} {value!r} is not supported; known: {', '.join(_DTYPES)}")
        return _DTYPES[value.removeprefix("torch.")]

    def eos_token_ids(self, vocab_size: int, default: int | None = None) -> tuple[int, ...]:
        """Ids of `config.json` and `generation_config.json`, ascending, less those outside the vocabulary."""
        ids: set[int] = set()
        for key, value in (
            ("eos_token_id", self.raw.get("eos_token_id", default)),
            ("eos_token_id of generation_config.json", self.raw.get("generation_eos_token_id")),
        ):
            values = value if isinstance(value, list) else [] if value is None else [value]
            if not all(isinstance(i, int) and not isinstance(i, bool) for i in values):
                raise CheckpointError(f"{key} must be an id or a list of ids, not {value!r}")
            ids.update(values)
        return tuple(sorted(i for i in ids if 0 <= i < vocab_size))

    def rope(self, max_position: int, default_theta: float) -> RopeConfig:
        """Rotary embedding, in the spelling of transformers 5 (`rope_parameters`) or before (`rope_scaling`)."""
        key = "rope_scaling" if self.raw.get("rope_scaling") else "rope_parameters"  # transformers' order
        section = self.raw.get(key)
        if section is None:
            section = {}
        if not isinstance(section, dict):
            raise CheckpointError(f"{key} must be an object, not {section!r}")
        kind = section.get("rope_type", section.get("type", "default"))
        if not isinstance(kind, str) or kind not in _ROPE_KEYS:
            raise CheckpointError(f"{key}: rope type {kind!r} is not supported; known: {', '.join(_ROPE_KEYS)}")
        rope = Options(section)
        try:
            self.refuse_unless("partial_rotary_factor", 1, 1.0)
            rope.refuse_unless("partial_rotary_factor", 1, 1.0)
            ignorable = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
            for name, value in section.items():
                if name not in _ROPE_KEYS[kind] | ignorable and value is not None:
                    raise CheckpointError(f"{name} {value!r} is not supported with rope type {kind!r}")
            theta = rope.number("rope_theta", default=self.number("rope_theta", default=default_theta))
            return _rope_of_type(kind, rope, theta, self._original_max_position(rope, max_position), max_position)
        except CheckpointError as error:
            raise CheckpointError(f"{key}: {error}") from None

    def _original_max_position(self, rope: Options, max_position: int) -> int:
        # An entry at the top level wins over the section's, as in transformers.
        if self.raw.get("original_max_position_embeddings") is not None:
            return self.integer("original_max_position_embeddings")
        return rope.integer("original_max_position_embeddings", default=max_position)


def _rope_of_type(kind: str, rope: Options, theta: float, original: int, max_position: int) -> RopeConfig:
    if kind == "linear":
        return RopeConfig(type="linear", theta=theta, factor=rope.number("factor"))
    if kind == "llama3":
        low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
        if low >= high:
            raise CheckpointError(f"low_freq_factor {low} must be below high_freq_factor {high}")
        return RopeConfig(
            type="llama3",
            theta=theta,
            factor=rope.number("factor"),
            original_max_position=original,
            low_freq_factor=low,
            high_freq_factor=high,
        )
    if kind == "yarn":
        factor = rope.number("factor", default=max_position / original)
        return RopeConfig(
            type="yarn",
            theta=theta,
            factor=factor,
            original_max_position=original,
            beta_fast=rope.number("beta_fast", default=32.0),
            beta_slow=rope.number("beta_slow", default=1.0),
            truncate=rope.flag("truncate", True),
            attention_factor=_yarn_attention_factor(rope, factor),
        )
    return RopeConfig(theta=theta)


def _yarn_attention_factor(rope: Options, factor: float) -> float:
    def magnitude(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if rope.raw.get("attention_factor") is not None:
        return rope.number("attention_factor")
    if rope.raw.get("mscale") and rope.raw.get("mscale_all_dim"):
        return magnitude(rope.number("mscale")) / magnitude(rope.number("mscale_all_dim"))
    return magnitude(1.0)
