"""The argument parser of `amoe`: help by topic, and defaults from a file."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from amoe.errors import ConfigError
from amoe.server.config_file import read_config_file, tokens_of


class Parser(argparse.ArgumentParser):
    """`--help` takes a topic: `all`, the name of a group, a flag, or a word. `--config FILE`, where a command has that
    flag, gives defaults: what the command line says goes before the file, and the file before what is built in."""

    def __init__(self, *, add_help: bool = True, **kwargs: Any) -> None:
        super().__init__(add_help=False, **kwargs)
        self._config_source: str | None = None
        if add_help:
            self.add_argument(
                "-h",
                "--help",
                nargs="?",
                const="all",
                metavar="TOPIC",
                action=_HelpAction,
                help="show this; --help=TOPIC: of one group, one flag, or all flags that mention a word",
            )

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As in argparse, over the defaults of the configuration file.

        Unlike in argparse, a command that does not know an argument ends the program.

        Raises:
            ConfigError: what is wrong with the file.
        """
        if "--config" in self._option_string_actions and args is not None and (path := _config_path(args)) is not None:
            self._take_defaults(path)
        known, unknown = super().parse_known_args(args, namespace)
        if unknown and self._subparsers is None:  # here, where the flags are known: not in the command above this one
            self.error(f"unrecognized arguments: {' '.join(unknown)}{self._hint(unknown)}")
        return known, unknown

    def _hint(self, unknown: Sequence[str]) -> str:
        """The flag that the user may have meant."""
        flag = next((arg.partition("=")[0] for arg in unknown if arg.startswith("--")), None)
        near = difflib.get_close_matches(flag, self._option_string_actions, 1) if flag else []
        return f" (did you mean {near[0]}?)" if near else ""

    def error(self, message: str) -> NoReturn:
        """What is wrong with the command line ends the program; what is wrong with a file is told with its name."""
        if self._config_source is not None:
            raise ConfigError(f"{self._config_source}: {message.removeprefix('argument ')}")
        super().error(message)

    def _take_defaults(self, path: str) -> None:
        settings = read_config_file(path)
        before = {action.dest: action.default for action in self._actions}
        parsed = self.parse_settings(settings, f"--config {path}")
        given = {name.replace("-", "_") for name in settings}
        dests = {a.dest for a in self._actions if a.dest in before and _names(a) & given}
        self.set_defaults(**{dest: getattr(parsed, dest) for dest in dests})

    def parse_settings(self, settings: Mapping[str, Any], source: str) -> argparse.Namespace:
        """What a command line with these settings would give.

        Args:
            settings: see `tokens_of`.
            source: where they come from, for error messages.

        Raises:
            ConfigError: what is wrong with them.
        """
        tokens = tokens_of(settings, self._option_string_actions, source)
        self._config_source = source
        try:
            parsed, unknown = super().parse_known_args(tokens, None)
            if unknown:
                self.error(f"cannot use {' '.join(map(str, unknown))}")
            return parsed
        finally:
            self._config_source = None

    def topic_help(self, topic: str) -> str:
        """Help on one topic.

        Raises:
            ConfigError: there is nothing of that name.
        """
        if topic == "all":
            return self.format_help()
        groups = [group for group in self._action_groups if group._group_actions]
        wanted = topic.lower().lstrip("-").replace("_", "-")
        for group in groups:
            if (group.title or "").lower() == wanted.replace("-", " "):
                return self._format(group, group._group_actions)
        flag = next((a for a in self._actions if f"--{wanted}" in a.option_strings), None)
        found = [flag] if flag is not None else [a for a in self._actions if _mentions(a, topic.lower())]
        if not found:
            names = [group.title or "" for group in groups] + [o[2:] for o in self._option_string_actions]
            near = difflib.get_close_matches(wanted, names, 3)
            raise ConfigError(f"--help={topic}: no such topic" + (f"; near it: {', '.join(near)}" if near else ""))
        return self._format(None, found)

    def _format(self, group: Any, actions: Sequence[argparse.Action]) -> str:
        formatter = self._get_formatter()
        formatter.start_section(None if group is None else group.title)
        formatter.add_text(None if group is None else group.description)
        formatter.add_arguments(actions)
        formatter.end_section()
        return formatter.format_help()


class _HelpAction(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        print(parser.topic_help(values), end="")
        parser.exit()


def _names(action: argparse.Action) -> set[str]:
    options = {option.lstrip("-").replace("-", "_") for option in action.option_strings}
    return options or {action.dest}


def _mentions(action: argparse.Action, word: str) -> bool:
    text = " ".join([*action.option_strings, action.help or ""])
    return action.help is not argparse.SUPPRESS and word in text.lower()


def _config_path(args: Sequence[str]) -> str | None:
    """The value of the last `--config` among the arguments."""
    path = None
    for index, arg in enumerate(args):
        if arg == "--":
            break
        if arg.startswith("--config="):
            path = arg.removeprefix("--config=")
        elif arg == "--config" and index + 1 < len(args):
            path = args[index + 1]
    return path
