"""The store of responses stays within its bounds, and forgets what was used longest ago."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from amoe.server.errors import NotFoundError
from amoe.server.responses.assembler import ResponseAssembler
from amoe.server.responses.background import BackgroundRun
from amoe.server.responses.run import ResponseRun
from amoe.server.responses.store import ResponseStore, StoredResponse


def stored(response_id: str, text: str = "hi", *, is_over: bool = True) -> StoredResponse:
    assembler = ResponseAssembler({"id": response_id})
    assembler.begin()
    if is_over:
        assembler.finish("stop", {})
    item = {"type": "message", "id": f"msg_{response_id}", "role": "user", "content": text}
    return StoredResponse(assembler, [], [item])


def ids(store: ResponseStore) -> list[str]:
    return [response_id for response_id in "abcdef" if response_id in store]


def test_least_recently_used_goes_first():
    store = ResponseStore(max_responses=2)
    for response_id in "ab":
        store.put(stored(response_id))
    assert store.get("a").id == "a"
    store.put(stored("c"))
    assert ids(store) == ["a", "c"]
    assert len(store) == 2
    with pytest.raises(NotFoundError) as caught:
        store.get("b", "previous_response_id")
    assert caught.value.param == "previous_response_id"


def test_bytes_are_bounded():
    size = stored("a", "x" * 1000).num_bytes()
    store = ResponseStore(max_bytes=2 * size + 100)
    for response_id in "abc":
        store.put(stored(response_id, "x" * 1000))
    assert ids(store) == ["b", "c"]
    assert store.num_bytes <= store.max_bytes
    store.put(stored("d", "x" * 5000))  # more than all others together, and than there is room
    assert ids(store) == []
    assert store.num_bytes == 0


def test_what_is_being_made_is_not_forgotten():
    store = ResponseStore(max_responses=1)
    store.put(stored("a", is_over=False))
    store.put(stored("b"))
    assert ids(store) == ["a"]


def test_items_are_found_as_long_as_their_response_is_there():
    store = ResponseStore(max_responses=1)
    first = stored("a")
    store.put(first)
    assert store.find_item("msg_a") == first.items[0]
    answer = first.body["output"][0]
    assert store.find_item(answer["id"]) == answer
    store.put(stored("b"))
    assert store.find_item("msg_a") is None
    assert store.find_item(answer["id"]) is None
    assert store.find_item("msg_b") is not None
    store.delete("b")
    assert store.find_item("msg_b") is None


def test_an_item_of_two_responses_outlives_the_first():
    store = ResponseStore()
    first, second = stored("a"), stored("b")
    second.items[:] = first.items
    store.put(first)
    store.put(second)
    store.delete("a")
    assert store.find_item("msg_a") is not None


def test_putting_again_counts_once():
    store = ResponseStore()
    store.put(stored("a"))
    size = store.num_bytes
    store.put(stored("a"))
    assert store.num_bytes == size


def test_events_that_are_kept_count():
    store = ResponseStore(max_bytes=6000)
    for response_id in "ab":
        response = stored(response_id)
        response.run = cast(BackgroundRun, SimpleNamespace(num_bytes=5000))
        store.put(response)
    assert ids(store) == ["b"]


def test_items_are_not_found_by_names_that_clients_have_chosen():
    store = ResponseStore()
    theirs = stored("a", "secret")
    theirs.given_ids = frozenset({"msg_a"})
    store.put(theirs)
    assert store.find_item("msg_a") is None


def test_an_item_cannot_be_replaced_by_its_name():
    store = ResponseStore()
    store.put(stored("a", "true"))
    for response_id, text in (("b", "false"), ("c", "true")):
        copy = stored(response_id)
        copy.items = [{**copy.items[0], "id": "msg_a", "content": text}]
        copy.given_ids = frozenset({"msg_a"})
        store.put(copy)
        assert store.find_item("msg_a") == {"type": "message", "id": "msg_a", "role": "user", "content": "true"}
    store.delete("a")  # a copy of the true one is there
    assert store.find_item("msg_a") is not None


async def test_a_run_that_has_ended_keeps_its_events_and_nothing_else():
    class Run:
        assembler = ResponseAssembler({"id": "a"})
        job = SimpleNamespace(generations=[])

        async def events(self) -> AsyncIterator[dict[str, Any]]:
            for event in (*self.assembler.begin(), *self.assembler.finish("stop", {})):
                yield event

    run = Run()
    gone = weakref.ref(run)
    tasks: set[asyncio.Task[None]] = set()
    ended = asyncio.Event()
    background = BackgroundRun(cast(ResponseRun, run), tasks, keeps_events=True, on_end=ended.set)
    del run
    await ended.wait()
    frames = [frame async for frame in background.follow()]
    await asyncio.gather(*tasks)
    gc.collect()
    assert gone() is None
    assert background.num_bytes == sum(map(len, frames)) > 0
    await background.cancel()  # changes nothing
