"""Flags of `amoe serve` about conversations. vLLM's names."""

from __future__ import annotations

import argparse
from typing import cast

from amoe.server.chat_options import REASONING_PARSER_NAMES, TOOL_PARSER_NAMES, ChatOptions, ToolParserName


def add_chat_flags(parser: argparse.ArgumentParser) -> None:
    """Add them, as a group of their own."""
    group = parser.add_argument_group(
        "conversations", "templates, tools and thoughts of /v1/chat/completions and its kin"
    )
    group.add_argument("--chat-template", metavar="FILE", help="Jinja, instead of the checkpoint's own template")
    group.add_argument(
        "--trust-request-chat-template",
        action="store_true",
        help="requests may bring a chat template; it runs in a sandbox, and not for long, but may take any memory",
    )
    group.add_argument(
        "--tool-call-parser",
        choices=TOOL_PARSER_NAMES,
        default="auto",
        help="how the model writes tool calls; auto: as its chat template does, else plain JSON",
    )
    group.add_argument(
        "--enable-auto-tool-choice",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="the model may call tools unasked; without, requests with tools have to name one or say `required`",
    )
    group.add_argument(
        "--reasoning-parser",
        choices=REASONING_PARSER_NAMES,
        default="none",
        help="how the model marks its thoughts, which then are told apart from the answer",
    )
    group.add_argument(
        "--reasoning-markers",
        nargs=2,
        metavar=("START", "END"),
        help="the marks around thoughts, for --reasoning-parser custom",
    )


def chat_options(args: argparse.Namespace) -> ChatOptions:
    """What the flags say.

    Raises:
        ConfigError: they contradict each other.
    """
    markers = args.reasoning_markers
    return ChatOptions(
        chat_template=args.chat_template,
        tool_call_parser=cast(ToolParserName, args.tool_call_parser),
        auto_tool_choice=args.enable_auto_tool_choice,
        reasoning_parser=args.reasoning_parser,
        reasoning_markers=None if markers is None else (markers[0], markers[1]),
        trust_request_chat_template=args.trust_request_chat_template,
    )
