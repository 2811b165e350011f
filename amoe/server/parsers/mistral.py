"""`[TOOL_CALLS]` and then a list of objects or, of newer models, `name{...}` or `name[ARGS]{...}`."""

from __future__ import annotations

import re

from amoe.server.parsers.base import partial_marker
from amoe.server.parsers.json_scan import ValueScanner, skip_space
from amoe.server.parsers.plain_json import JsonListParser

MARKER = "[TOOL_CALLS]"
ARGS = "[ARGS]"
_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")
# What stands between a name and its arguments: nothing, or an id and a mark.
_HEAD = re.compile(r"(?:\[CALL_ID\][a-zA-Z0-9_-]{0,64})?(?:\[ARGS\])?\s*")
_PARTIAL_HEAD = re.compile(r"\[[A-Z_]{0,7}(?:\][a-zA-Z0-9_-]{0,64})?(?:\[[A-Z]{0,4}\]?)?\s*\Z")


class MistralParser(JsonListParser):
    """Calls after a mark, in either form."""

    def read_content(self) -> bool:
        at = self.text.find(MARKER)
        if at < 0:
            self.pass_on(len(self.text) - partial_marker(self.text, (MARKER,)))
            return False
        self.pass_on(at)
        self.skip(len(MARKER))
        self.mode = self._read_start
        return True

    def _read_start(self) -> bool:
        at = skip_space(self.text, 0)
        if at == len(self.text):
            return False
        if self.text[at] == "[":
            self.skip(at + 1)
            self.expect_list()
        elif self.text[at] == "{":
            self.expect_object()
        else:
            self.skip(at)
            self.mode = self._read_name
        return True

    def _read_name(self) -> bool:
        name = _NAME.match(self.text)
        if name is None:
            return self.reject()
        if name.end() == len(self.text):
            return False
        head = _HEAD.match(self.text, name.end())
        end = name.end() if head is None else head.end()
        if end == len(self.text) or _PARTIAL_HEAD.match(self.text, name.end()):
            return False
        if self.text[end] != "{":
            return self.reject()
        self.text = self.text[end:]
        self.begin(name.group())
        self._value = ValueScanner()
        self.mode = self._read_arguments
        return True

    def _read_arguments(self) -> bool:
        taken = self._value.scan(self.text, 0)
        self.arguments(self.text[:taken])
        self.text = self.text[taken:]
        if self._value.done:
            self.mode = self.read_content
        return self._value.done
