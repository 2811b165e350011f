"""How a server treats conversations: what its flags say, and what follows from the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from amoe.engine.chat_template import ChatTemplate
from amoe.errors import ConfigError
from amoe.server.parsers.formats import TOOL_FORMATS, FormatName, ToolFormat, format_for
from amoe.server.parsers.reasoning import REASONING_FORMATS, ReasoningFormat

ToolParserName = Literal["auto", FormatName]
TOOL_PARSER_NAMES: tuple[str, ...] = ("auto", *get_args(FormatName))
REASONING_PARSER_NAMES: tuple[str, ...] = ("none", *REASONING_FORMATS, "custom")


@dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """What the operator decides about conversations.

    Attributes:
        chat_template: file of the template to use instead of the checkpoint's own.
        tool_call_parser: how the model writes tool calls; `auto`: as its chat template does.
        auto_tool_choice: the model may call tools that a request brings without being told to.
        reasoning_parser: how it marks its thoughts; `none`: thoughts are text like any other.
        reasoning_markers: of the reasoning parser `custom`: the marks before and after thoughts.
        trust_request_chat_template: requests may bring a chat template.
    """

    chat_template: str | None = None
    tool_call_parser: ToolParserName = "auto"
    auto_tool_choice: bool = True
    reasoning_parser: str = "none"
    reasoning_markers: tuple[str, str] | None = None
    trust_request_chat_template: bool = False

    def __post_init__(self) -> None:
        if self.tool_call_parser not in TOOL_PARSER_NAMES:
            raise ConfigError(f"--tool-call-parser must be one of {', '.join(TOOL_PARSER_NAMES)}")
        if self.reasoning_parser not in REASONING_PARSER_NAMES:
            raise ConfigError(f"--reasoning-parser must be one of {', '.join(REASONING_PARSER_NAMES)}")
        if (self.reasoning_parser == "custom") != (self.reasoning_markers is not None):
            raise ConfigError("--reasoning-parser custom and --reasoning-markers START END go together")
        if self.reasoning_markers is not None and not all(self.reasoning_markers):
            raise ConfigError("--reasoning-markers must not be empty")

    def tool_format(self, template: ChatTemplate) -> ToolFormat:
        """How a model with this template writes tool calls."""
        if self.tool_call_parser == "auto":
            return format_for(template.source)
        return TOOL_FORMATS[self.tool_call_parser]

    @property
    def reasoning(self) -> ReasoningFormat | None:
        """How the model marks its thoughts; None: it does not."""
        if self.reasoning_markers is not None:
            start, end = self.reasoning_markers
            return ReasoningFormat(start=start, end=end)
        return REASONING_FORMATS.get(self.reasoning_parser)
