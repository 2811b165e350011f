"""LangChain's own conformance suite for chat models, over `ChatOpenAI`, against a model that follows a script."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from langchain_core.language_models import BaseChatModel
from langchain_openai import ChatOpenAI
from langchain_tests.integration_tests import ChatModelIntegrationTests

from tests.clients.scripted import ScriptedServer

_url = ""


@pytest.fixture(scope="module", autouse=True)
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    global _url
    with ScriptedServer(tmp_path_factory.mktemp("scripted")) as server:
        _url = f"{server.url}/v1"
        yield


class TestChatOpenAI(ChatModelIntegrationTests):
    """Skipped by the suite itself: images, audio, PDF and Anthropic's inputs, which no model here takes, and its timing
    of recorded streams."""

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatOpenAI

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {
            "model": "scripted",
            "base_url": _url,
            "api_key": "none",
            "max_retries": 0,
            "stream_usage": True,
            # ChatOpenAI would lend its connections to the next test, which has another event loop.
            "http_async_client": httpx.AsyncClient(),
        }

    @property
    def has_tool_choice(self) -> bool:
        return True

    @property
    def supports_json_mode(self) -> bool:
        return True

    @property
    def supports_model_override(self) -> bool:
        return False  # one name is served
