"""One line per log record, whatever is in it."""

from __future__ import annotations

import json
import logging
import sys
from typing import Any

import pytest

from amoe.errors import ConfigError
from amoe.logs import JsonFormatter, LogOptions, TextFormatter, configure, level_from_environment

NASTY = "a\nFAKE 200 ok\r\u2028\x1b[31m\u202e"


def record(message: str, fields: dict[str, Any] | None = None, exc_info: Any = None) -> logging.LogRecord:
    made = logging.LogRecord("amoe.x", logging.WARNING, __file__, 1, message, (), exc_info)
    if fields is not None:
        made.fields = fields
    return made


def test_text_is_one_line():
    line = TextFormatter("server").format(record(NASTY, {"path": NASTY, "n": 3, "quoted": 'a "b" c=d', "none": ""}))
    assert line.isprintable()
    assert " WARNING server: a\\nFAKE 200 ok" in line
    assert " n=3 " in line
    assert 'quoted="a \\"b\\" c=d"' in line


def test_json_is_one_object_per_line():
    line = JsonFormatter("worker 1").format(record(NASTY, {"path": NASTY, "message": "not this"}))
    assert "\n" not in line and line.isascii()
    body = json.loads(line)
    assert (body["level"], body["process"], body["logger"]) == ("warning", "worker 1", "amoe.x")
    assert (body["message"], body["path"]) == (NASTY, NASTY)


def test_tracebacks_are_told():
    try:
        raise KeyError("x")
    except KeyError:
        info = sys.exc_info()
    assert TextFormatter("s").format(record("m", exc_info=info)).splitlines()[-1] == "KeyError: 'x'"
    assert "KeyError" in json.loads(JsonFormatter("s").format(record("m", exc_info=info)))["traceback"]


def test_options():
    assert level_from_environment({"AMOE_LOGGING_LEVEL": "DEBUG"}) == "debug"
    assert level_from_environment({}) is None
    with pytest.raises(ConfigError, match="AMOE_LOGGING_LEVEL"):
        LogOptions(level="loud")
    with pytest.raises(ConfigError, match="--log-format"):
        LogOptions(format="xml")  # type: ignore[arg-type]


@pytest.fixture
def restored_root():
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield root
    root.handlers[:] = handlers
    root.setLevel(level)


def test_configure(restored_root, capsys):
    configure(LogOptions(format="json", level="warning"), "server")
    logging.getLogger("amoe.x").info("not told")
    logging.getLogger("amoe.x").warning("told", extra={"fields": {"n": 1}})
    (line,) = capsys.readouterr().err.splitlines()
    assert (json.loads(line)["message"], json.loads(line)["n"]) == ("told", 1)


def test_a_file_decides_everything(restored_root, tmp_path, capsys):
    path = tmp_path / "logging.json"
    path.write_text(json.dumps({"version": 1, "disable_existing_loggers": False, "root": {"level": "ERROR"}}))
    configure(LogOptions(config_path=str(path)), "server")
    assert restored_root.level == logging.ERROR
    for content in ("{", "[]", '{"version": 7}'):
        path.write_text(content)
        with pytest.raises(ConfigError, match="AMOE_LOGGING_CONFIG_PATH"):
            configure(LogOptions(config_path=str(path)), "server")
