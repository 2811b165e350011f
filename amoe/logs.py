"""Log lines of the server and its workers, as text or as JSON; always one line each, whatever is in them."""

from __future__ import annotations

import json
import logging
import logging.config
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from amoe.errors import ConfigError

LogFormat = Literal["text", "json"]
FORMATS: tuple[str, ...] = get_args(LogFormat)
LEVELS = ("critical", "error", "warning", "info", "debug")


@dataclass(frozen=True, kw_only=True, slots=True)
class LogOptions:
    """How this process and its workers log.

    Attributes:
        level: one of `LEVELS`.
        config_path: a JSON file for `logging.config.dictConfig`, which then decides everything here; None: none.
    """

    format: LogFormat = "text"
    level: str = "info"
    config_path: str | None = None

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ConfigError(f"--log-format must be one of {', '.join(FORMATS)}, not {self.format!r}")
        if self.level not in LEVELS:
            raise ConfigError(f"--log-level (AMOE_LOGGING_LEVEL) must be one of {', '.join(LEVELS)}")


def level_from_environment(environment: Mapping[str, str]) -> str | None:
    """AMOE_LOGGING_LEVEL, in lower case, if it is set."""
    return (environment.get("AMOE_LOGGING_LEVEL") or "").lower() or None


def one_line(text: str) -> str:
    """`text` with everything escaped that does not print, line ends included: nobody begins a line in our name."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    """What was logged with `extra={"fields": {...}}`."""
    fields = getattr(record, "fields", None)
    return fields if isinstance(fields, dict) else {}


def _text_value(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return one_line(text) if text and not set(' "=') & set(text) else one_line(json.dumps(text, ensure_ascii=False))


class TextFormatter(logging.Formatter):
    """`2026-11-22 14:00:00,123 INFO server: message key=value`; a traceback follows on lines of its own."""

    def __init__(self, who: str) -> None:
        super().__init__()
        self._who = who

    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.created))
        head = f"{stamp},{int(record.msecs):03d} {record.levelname} {self._who}: {one_line(record.getMessage())}"
        line = " ".join([head, *(f"{name}={_text_value(value)}" for name, value in _fields(record).items())])
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class JsonFormatter(logging.Formatter):
    """One JSON object per line: time, level, process, logger, message, the fields, and a traceback if there is one."""

    def __init__(self, who: str) -> None:
        super().__init__()
        self._who = who

    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        body: dict[str, Any] = {
            "time": f"{stamp}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "process": self._who,
            "logger": record.name,
            "message": record.getMessage(),
        }
        body |= {name: value for name, value in _fields(record).items() if name not in body}
        if record.exc_info:
            body["traceback"] = self.formatException(record.exc_info)
        return json.dumps(body, default=str)


def configure(options: LogOptions, who: str) -> None:
    """Log to standard error from now on, as `who`.

    Raises:
        ConfigError: the file of AMOE_LOGGING_CONFIG_PATH cannot be used.
    """
    if options.config_path is not None:
        _configure_by_file(options.config_path)
        return
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(who) if options.format == "json" else TextFormatter(who))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(options.level.upper())


def _configure_by_file(path: str) -> None:
    try:
        logging.config.dictConfig(json.loads(Path(path).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, AttributeError, ImportError) as error:
        raise ConfigError(f"AMOE_LOGGING_CONFIG_PATH {os.fspath(path)}: {error}") from error
