"""A checkpoint's chat template: Jinja in a sandbox, with the helpers that templates in the wild expect."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from amoe.errors import CheckpointError, RequestError


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks what a trainer learns from; for serving it is only its content."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it as a plain class attribute

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format_: str) -> str:
    return datetime.datetime.now().strftime(format_)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """JSON as it is: Jinja's own filter escapes for HTML, which would change the prompt."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


class ChatTemplate:
    """One compiled template.

    Raises:
        CheckpointError: if `source` is no valid template.
    """

    def __init__(self, source: str, origin: str) -> None:
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationTag]
        )
        helpers: dict[str, Callable[..., Any]] = {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
        environment.globals.update(helpers)
        environment.filters["tojson"] = _to_json
        self._knows_developers = "developer" in source
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise CheckpointError(f"{origin}: the chat template is invalid: {error}") from error

    @classmethod
    def from_directory(cls, directory: Path, config: Mapping[str, Any]) -> ChatTemplate | None:
        """From chat_template.jinja, else from `config` (tokenizer_config.json); None if neither has one."""
        file = directory / "chat_template.jinja"
        if file.is_file():
            try:
                return cls(file.read_text(encoding="utf-8"), str(file))
            except (OSError, UnicodeDecodeError) as error:
                raise CheckpointError(f"{file}: {error}") from error
        source = config.get("chat_template")
        if isinstance(source, list):  # several by name
            by_name = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
            source = by_name.get("default")
        if not isinstance(source, str):
            return None
        return cls(source, str(directory / "tokenizer_config.json"))

    def render(self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> str:
        """Prompt text.

        Raises:
            RequestError: with the template's own words, if it rejects the messages.
        """
        if not self._knows_developers:  # OpenAI's newer name of the system role
            messages = [{**m, "role": "system"} if m.get("role") == "developer" else m for m in messages]
        try:
            return self._template.render({"tools": None, "documents": None, **variables, "messages": messages})
        except jinja2.TemplateError as error:
            raise RequestError(f"the chat template rejects the messages: {error}", param="messages") from error
        except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as error:
            # What a template does to messages of a shape that it does not expect: None + str, and the like.
            raise RequestError(f"the chat template cannot render these messages: {error}", param="messages") from error
