"""A checkpoint's chat template: Jinja in a sandbox, with the helpers that templates in the wild expect."""

from __future__ import annotations

import datetime
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from amoe.errors import CheckpointError, QuotingError

# Lines of compiled template that a client's own template may run: a long conversation takes thousands, an endless loop
# takes them all within a second.
MAX_UNTRUSTED_LINES = 1_000_000
MAX_UNTRUSTED_PRODUCT = 1_000_000  # of `*`: characters, items, or a number


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks what a trainer learns from; for serving it is only its content."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it as a plain class attribute

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _UntrustedEnvironment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """For templates that come with requests: no operation makes something huge out of something small."""

    intercepted_binops = frozenset(("*", "**", "%"))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" or (operator == "%" and not isinstance(left, int | float)):
            raise jinja2.TemplateError(f"the operator {operator} is not for templates of requests")
        sizes = [side if isinstance(side, int | float) else len(side) for side in (left, right)]
        if operator == "*" and abs(sizes[0] * sizes[1]) > MAX_UNTRUSTED_PRODUCT:
            raise jinja2.TemplateError("a product is too large")
        return super().call_binop(context, operator, left, right)


# Filters and functions whose result can be far larger than what they are given.
_INFLATING = ("center", "format", "indent", "wordwrap", "slice", "batch")


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format_: str) -> str:
    return datetime.datetime.now().strftime(format_)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """JSON as it is: Jinja's own filter escapes for HTML, which would change the prompt."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _environment(*, trusted: bool) -> jinja2.Environment:
    kind = jinja2.sandbox.ImmutableSandboxedEnvironment if trusted else _UntrustedEnvironment
    environment = kind(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols", _GenerationTag],
        optimized=trusted,  # constants would be computed while it is compiled, before any limit counts
    )
    helpers: dict[str, Callable[..., Any]] = {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    environment.globals.update(helpers)
    if not trusted:
        del environment.globals["lipsum"]
        for name in _INFLATING:
            del environment.filters[name]
    environment.filters["tojson"] = _to_json
    return environment


class _LineLimit:
    """A tracer that ends what runs for too long: counted in lines, so that it ends at the same place every time."""

    def __init__(self, num_lines: int) -> None:
        self._left = num_lines

    def __call__(self, frame: FrameType, event: str, argument: object) -> _LineLimit:
        self._left -= 1
        if self._left < 0:
            raise jinja2.TemplateError("it runs for too long")
        return self


class ChatTemplate:
    """One compiled template.

    Args:
        source: Jinja.
        origin: where it is from, for messages.
        trusted: it belongs to the server; one of a request is watched while it runs.

    Attributes:
        source: as given.
        knows_tools: it reads the variable `tools`.

    Raises:
        CheckpointError: if `source` is no valid template.
    """

    def __init__(self, source: str, origin: str, *, trusted: bool = True) -> None:
        self.source = source
        self._trusted = trusted
        self._knows_developers = "developer" in source
        environment = _environment(trusted=trusted)
        try:
            self.knows_tools = "tools" in jinja2.meta.find_undeclared_variables(environment.parse(source))
            self._template = environment.from_string(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise CheckpointError(f"{origin}: the chat template is invalid: {error}") from error

    def render(self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> str:
        """Prompt text.

        Raises:
            QuotingError: with the template's own words, if it rejects the messages.
        """
        if not self._knows_developers:  # OpenAI's newer name of the system role
            messages = [{**m, "role": "system"} if m.get("role") == "developer" else m for m in messages]
        try:
            return self._run({"tools": None, "documents": None, **variables, "messages": messages})
        except jinja2.TemplateError as error:
            raise QuotingError(f"the chat template rejects the messages: {error}", param="messages") from error
        except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
            # What a template does to messages of a shape that it does not expect: None + str, and the like.
            raise QuotingError(f"the chat template cannot render these messages: {error}", param="messages") from error

    def _run(self, variables: Mapping[str, Any]) -> str:
        if self._trusted:
            return self._template.render(variables)
        previous = sys.gettrace()
        sys.settrace(_LineLimit(MAX_UNTRUSTED_LINES))
        try:
            return self._template.render(variables)
        finally:
            sys.settrace(previous)


class ChatTemplates:
    """The templates of a checkpoint by name: `default`, and maybe `tool_use`."""

    def __init__(self, by_name: Mapping[str, ChatTemplate]) -> None:
        self._by_name = by_name

    @classmethod
    def from_file(cls, file: Path) -> ChatTemplates:
        """The one template in `file`.

        Raises:
            CheckpointError: if it cannot be read, or is no template.
        """
        return cls({"default": _read(file)})

    @classmethod
    def from_directory(cls, directory: Path, config: Mapping[str, Any]) -> ChatTemplates:
        """From chat_template.jinja and its additions, else from `config` (tokenizer_config.json); maybe none at all."""
        file = directory / "chat_template.jinja"
        if file.is_file():
            additions = sorted((directory / "additional_chat_templates").glob("*.jinja"))
            return cls({"default": _read(file), **{addition.stem: _read(addition) for addition in additions}})
        origin = str(directory / "tokenizer_config.json")
        source = config.get("chat_template")
        if isinstance(source, str):
            return cls({"default": ChatTemplate(source, origin)})
        found: dict[str, ChatTemplate] = {}
        for entry in source if isinstance(source, list) else []:
            name, text = (entry.get("name"), entry.get("template")) if isinstance(entry, dict) else (None, None)
            if name in ("default", "tool_use") and isinstance(text, str):
                found[name] = ChatTemplate(text, origin)
        return cls(found)

    def choose(self, *, with_tools: bool) -> ChatTemplate | None:
        """The template for a conversation with or without tools; None if there is none."""
        return (self._by_name.get("tool_use") if with_tools else None) or self._by_name.get("default")


def _read(file: Path) -> ChatTemplate:
    try:
        return ChatTemplate(file.read_text(encoding="utf-8"), str(file))
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file}: {error}") from error
