"""`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, as Hermes and Qwen write calls."""

from __future__ import annotations

from amoe.server.parsers.base import MarkedText, partial_marker
from amoe.server.parsers.json_scan import skip_space

OPEN = "<tool_call>"
CLOSE = "</tool_call>"


class HermesParser(MarkedText):
    """Calls between tags, one or several between each pair."""

    def read_content(self) -> bool:
        at = self.text.find(OPEN)
        if at < 0:
            self.pass_on(len(self.text) - partial_marker(self.text, (OPEN,)))
            return False
        self.pass_on(at)
        self.skip(len(OPEN))
        self.expect_object()
        return True

    def after_call(self) -> None:
        self.mode = self._between

    def _between(self) -> bool:
        """After a call: its tag closes, or another call comes. A tag that is not closed is forgiven."""
        at = skip_space(self.text, 0)
        rest = self.text[at:]
        if rest.startswith(CLOSE):
            self.text = rest[len(CLOSE) :]
            self.mode = self.read_content
            return True
        if CLOSE.startswith(rest):
            return False
        if rest[0] == "{":
            self.skip(at)
            self.expect_object()
            return True
        return self.reject()
