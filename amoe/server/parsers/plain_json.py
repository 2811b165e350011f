"""`{"name": ..., "arguments": {...}}`, or a list of such, without any mark: for models that know no better.

A text for people may hold objects too: only one counts that starts a line, and begins like a call of a function that
there is.
"""

from __future__ import annotations

import re

from amoe.server.parsers.base import MarkedText
from amoe.server.parsers.json_scan import skip_space

_START = re.compile(r"\{|\[\s*\{")
_PARTIAL_START = re.compile(r"\[\s*\Z")
_SEPARATOR = re.compile(r"\s*[,;]?\s*")


class JsonListParser(MarkedText):
    """Calls as objects or in lists; a subclass says where they start."""

    _in_list = False

    def after_call(self) -> None:
        self.mode = self._between

    def expect_list(self) -> None:
        """A call comes next, then maybe more, then `]`."""
        self._in_list = True
        self.expect_object()

    def _between(self) -> bool:
        """After a call: another one, the end of the list, or something else."""
        at = skip_space(self.text, 0)
        if self._in_list and self.text[at : at + 1] == "]":
            self.text = self.text[at + 1 :]
            self._in_list = False
            self.mode = self.read_content
            return True
        match = _SEPARATOR.match(self.text)
        end = 0 if match is None else match.end()
        if end == len(self.text):
            return False
        if self.text[end] == "{":
            self.skip(end)
            self.expect_object()
            return True
        self._in_list = False
        return self.reject()

    def reject(self) -> bool:
        self._in_list = False
        return super().reject()


class PlainJsonParser(JsonListParser):
    """Calls that start a line."""

    _line_is_blank = True  # so far

    def content(self, text: str) -> None:
        line = text[text.rfind("\n") + 1 :]
        self._line_is_blank = (self._line_is_blank or "\n" in text) and not line.strip()
        super().content(text)

    def read_content(self) -> bool:
        found = _START.search(self.text)
        if found is None:
            partial = _PARTIAL_START.search(self.text)
            self.pass_on(len(self.text) if partial is None else partial.start())
            return False
        self.pass_on(found.start())
        if not self._line_is_blank:
            self.pass_on(1)
        elif found.group() == "{":
            self.expect_object()
        else:
            self.skip(len(found.group()) - 1)
            self.expect_list()
        return True
