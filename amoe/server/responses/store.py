"""Responses that clients may come back to: in memory, bounded, gone when the server is."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

from amoe.server.encoding import json_bytes
from amoe.server.errors import NotFoundError
from amoe.server.responses.assembler import ResponseAssembler
from amoe.server.responses.background import BackgroundRun
from amoe.server.responses.schemas import Item

MAX_RESPONSES = 1000
MAX_BYTES = 64 * 1024 * 1024


@dataclass(slots=True)
class StoredResponse:
    """A response and what it answers.

    Attributes:
        assembler: has the response.
        history: items of the responses before it, oldest first.
        items: its own input.
        run: what works on it in the background; None if it was made in the foreground.
        given_ids: of its own items, those that the client has chosen.
    """

    assembler: ResponseAssembler
    history: list[Item]
    items: list[Item]
    run: BackgroundRun | None = None
    given_ids: frozenset[str] = frozenset()

    @property
    def id(self) -> str:
        """Of the response."""
        return self.assembler.id

    @property
    def body(self) -> dict[str, Any]:
        """The response as it is now."""
        return self.assembler.body

    @property
    def conversation(self) -> list[Item]:
        """All items up to and including the answer: the history of the next response."""
        return [*self.history, *self.items, *self.body["output"]]

    def num_bytes(self) -> int:
        """Size as JSON. What it shares with responses before it counts again, so that no chain escapes the bound."""
        size = len(json_bytes({"items": [self.history, self.items], "response": self.body}))
        return size + (0 if self.run is None else self.run.num_bytes)


@dataclass
class ResponseStore:
    """The responses used last. One that is still being made is not forgotten.

    Attributes:
        max_responses, max_bytes: bounds; the least recently used responses go first.
    """

    max_responses: int = MAX_RESPONSES
    max_bytes: int = MAX_BYTES
    _responses: OrderedDict[str, StoredResponse] = field(default_factory=OrderedDict)
    _sizes: dict[str, int] = field(default_factory=dict)
    _items: dict[str, tuple[str, Item]] = field(default_factory=dict)  # the response that has it, and the item

    def __len__(self) -> int:
        return len(self._responses)

    def __contains__(self, response_id: str) -> bool:
        return response_id in self._responses

    @property
    def num_bytes(self) -> int:
        """Of all responses."""
        return sum(self._sizes.values())

    def put(self, stored: StoredResponse) -> None:
        """Keep a response; again, once it has ended, since it has grown.

        Items are found by ids of ours only: what one client calls `msg_1` must be no other's.
        """
        self._responses[stored.id] = stored
        self._responses.move_to_end(stored.id)
        self._sizes[stored.id] = stored.num_bytes()
        for item in (*stored.items, *(stored.body["output"] if stored.assembler.is_over else ())):
            if item["id"] not in stored.given_ids or self.find_item(item["id"]) == item:
                self._items[item["id"]] = (stored.id, item)
        self._evict()

    def get(self, response_id: str, param: str | None = None) -> StoredResponse:
        """The response of this id, which counts as used now.

        Raises:
            NotFoundError: naming `param`.
        """
        if response_id not in self._responses:
            raise NotFoundError(
                f"there is no response {response_id!r}: it was not stored, or has been forgotten (this server keeps "
                f"the {self.max_responses} used last, while it runs)",
                param=param,
            )
        self._responses.move_to_end(response_id)
        return self._responses[response_id]

    def find_item(self, item_id: str) -> Item | None:
        """The item of this id, if a stored response has it."""
        return self._items[item_id][1] if item_id in self._items else None

    def delete(self, response_id: str) -> None:
        """Forget a response that is there."""
        stored = self._responses.pop(response_id)
        del self._sizes[response_id]
        for item in (*stored.items, *stored.body["output"]):
            if self._items.get(item["id"], ("", None))[0] == response_id:
                del self._items[item["id"]]

    def _evict(self) -> None:
        total = self.num_bytes
        for response_id in [i for i, stored in self._responses.items() if stored.assembler.is_over]:
            if len(self._responses) <= self.max_responses and total <= self.max_bytes:
                return
            total -= self._sizes[response_id]
            self.delete(response_id)
