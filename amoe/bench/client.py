"""Talks to a server with OpenAI's API: streaming completions, observed piece by piece."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import httpx

from amoe.bench.record import RequestRecord
from amoe.bench.workload import RequestSpec
from amoe.clock import Clock
from amoe.errors import AmoeError

MAX_MESSAGE_CHARS = 120


class ServerClient:
    """Sends streaming requests to POST /v1/completions.

    Args:
        http: with the server's address as base URL, and the timeouts.
        model: name in the requests.
        body: fields of every request (temperature, seed, ...).
    """

    def __init__(self, http: httpx.AsyncClient, clock: Clock, *, model: str, body: dict[str, Any]) -> None:
        self._http = http
        self._clock = clock
        self._body = {
            "model": model,
            "stream": True,
            # Token counts in every piece: text may lag behind tokens, so that pieces are not tokens.
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
            **body,
        }

    async def send(self, spec: RequestSpec, record: RequestRecord) -> None:
        """Send `spec`, and note in `record` what comes back and when."""
        body = {**self._body, "prompt": spec.prompt, "max_tokens": spec.max_tokens}
        try:
            async with self._http.stream("POST", "/v1/completions", json=body) as response:
                if response.status_code != 200:
                    await response.aread()
                    record.failure = f"HTTP {response.status_code}: {_error_message(response.text)}"
                    return
                record.failure = await self._read(response, record)
        except httpx.HTTPError as error:
            record.failure = type(error).__name__

    async def _read(self, response: httpx.Response, record: RequestRecord) -> str | None:
        """Follow the stream to its end. Returns the kind of failure, if any."""
        is_finished = False
        async for line in response.aiter_lines():
            if not line.startswith("data:"):
                continue
            now = self._clock.now()
            data = line[5:].strip()
            if data == "[DONE]":
                return None if is_finished else "the stream ended without a finish_reason"
            try:
                chunk = json.loads(data)
            except ValueError:
                return "an event of the stream is not JSON"
            if not isinstance(chunk, dict) or "error" in chunk:
                return f"error in the stream: {_error_message(data)}"
            is_finished |= self._note(chunk, record, now)
        return "the stream broke off"

    @staticmethod
    def _note(chunk: dict[str, Any], record: RequestRecord, now: float) -> bool:
        """Note one event. Returns whether it has a finish reason."""
        choices = chunk.get("choices") or []
        usage = chunk.get("usage")
        if usage:
            count = usage["completion_tokens"] - record.output_tokens if choices else 0
            record.prompt_tokens = usage["prompt_tokens"]
            record.output_tokens = usage["completion_tokens"]
        else:  # a server without continuous usage: a piece with text is taken for a token
            count = int(bool(choices and choices[0].get("text")))
            record.output_tokens += count
        if count > 0:
            record.arrivals.append(now)
            record.tokens.append(count)
        return bool(choices and choices[0].get("finish_reason"))


async def list_models(http: httpx.AsyncClient) -> list[dict[str, Any]]:
    """What the server serves: `id`, `max_model_len` where it tells, ...

    Raises:
        AmoeError: there is no such server, or it answers otherwise.
    """
    try:
        response = await http.get("/v1/models")
        response.raise_for_status()
        models = response.json()["data"]
    except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
        url = f"{str(http.base_url).rstrip('/')}/v1/models"
        raise AmoeError(f"no list of models from {url}: {str(error) or type(error).__name__}") from error
    if not models:
        raise AmoeError(f"{http.base_url} serves no model")
    return models


def _error_message(text: str) -> str:
    """The message in an OpenAI error body, or the body itself, cut."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        text = json.loads(text)["error"]["message"]
    return " ".join(str(text).split())[:MAX_MESSAGE_CHARS]
