"""`--config FILE`: a YAML file whose keys are long flag names. Its values pass the very checks that flags pass."""

from __future__ import annotations

import argparse
import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from amoe.errors import ConfigError

_NOT_IN_FILES = ("config", "help")


class _Loader(yaml.SafeLoader):
    """Refuses a key that is there twice, of which YAML's own loader would take the last without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} is there twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_config_file(path: str) -> dict[str, Any]:
    """The settings of a file, by flag name with dashes.

    Raises:
        ConfigError: it cannot be read, or is no mapping of names.
    """
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path}: {getattr(error, 'strerror', None) or error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"--config {path}: not YAML: {' '.join(str(error).split())}") from error
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ConfigError(f"--config {path}: must be a mapping of flag names to values, as in `port: 8000`")
    settings: dict[str, Any] = {}
    for key, value in content.items():
        name = key.replace("_", "-")
        if name in settings:
            raise ConfigError(f"--config {path}: {name} is there twice, with a dash and with an underscore")
        settings[name] = value
    return settings


def tokens_of(settings: Mapping[str, Any], flags: Mapping[str, argparse.Action], source: str) -> list[str]:
    """The command line that says the same.

    Args:
        settings: by flag name with dashes; `model` is the positional argument. null leaves a flag at its default.
        flags: actions of the parser by option string.
        source: where they come from, for error messages: `--config FILE`.

    Raises:
        ConfigError: a name that is no flag, or a value of the wrong kind.
    """
    model: list[str] = []
    tokens: list[str] = []
    for name, value in settings.items():
        if name == "model":
            model = [] if value is None else [_scalar(name, value, source)]
            continue
        action = flags.get(f"--{name}")
        if action is None or name in _NOT_IN_FILES:
            raise ConfigError(f"{source}: unknown key {name!r}{_near(name, flags)}")
        if value is not None:
            tokens += _flag_tokens(name, value, action, source)
    return [*model, *tokens]


def _flag_tokens(name: str, value: Any, action: argparse.Action, source: str) -> list[str]:
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise ConfigError(f"{source}: {name} must be true or false, not {value!r}")
        if value:
            return [f"--{name}"]
        return [f"--no-{name}"] if f"--no-{name}" in action.option_strings else []
    if isinstance(value, list):
        if action.nargs not in ("+", "*"):
            raise ConfigError(f"{source}: {name} takes one value, not a list")
        if not value:
            return []
        return [f"--{name}", *(_scalar(name, item, source) for item in value)]
    return [f"--{name}={_scalar(name, value, source)}"]


def _scalar(name: str, value: Any, source: str) -> str:
    if isinstance(value, dict):
        return json.dumps(value)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ConfigError(f"{source}: {name} takes a value, not {value!r}")
    return str(value)


def _near(name: str, flags: Mapping[str, argparse.Action]) -> str:
    names = ["model", *(flag[2:] for flag in flags if flag.startswith("--") and flag[2:] not in _NOT_IN_FILES)]
    near = difflib.get_close_matches(name, names, 1)
    return f": did you mean {near[0]!r}?" if near else ""
