"""The KV cache's books: none leaked, none shared by mistake, found again only by equal content."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from amoe.core.block_manager import ROOT_HASH, BlockManager, root_hash
from tests.unit.core.examples import examples

# Two letters and short stems, so that prefixes meet often.
token_lists = st.lists(st.integers(0, 1), min_size=1, max_size=14)
# None: blocks without names, as without a prefix cache.
ROOTS = (
    ROOT_HASH,
    None,
    root_hash(best_effort=True),
    root_hash(salt="alice"),
    root_hash(salt="bob"),
    root_hash(group=1),
    root_hash(group=2, salt="bob"),
)


class Holder:
    """A sequence as the batcher keeps it: its tokens, its blocks, the names of its committed blocks."""

    def __init__(self, root, tokens, blocks, hashes):
        self.root, self.tokens, self.blocks, self.hashes = root, tokens, blocks, hashes


class BlockManagerMachine(RuleBasedStateMachine):
    """Sequences come, are computed block by block, grow and go; `content` is what the KV memory would hold."""

    @initialize(num_blocks=st.integers(1, 12), block_size=st.integers(1, 4), num_roots=st.integers(1, len(ROOTS)))
    def build(self, num_blocks, block_size, num_roots):
        self.size, self.roots = block_size, ROOTS[:num_roots]
        self.manager = BlockManager(num_blocks, block_size)
        self.holders: list[Holder] = []
        self.content: dict[int, tuple[bytes, tuple[int, ...]]] = {}

    def held(self):
        return {block for holder in self.holders for block in holder.blocks}

    def fresh(self, count):
        """Allocate, and check that nobody holds what is given."""
        available = self.manager.num_available
        blocks = self.manager.allocate(count)
        assert (blocks is None) == (count > available)
        if blocks is not None:
            assert len(set(blocks)) == count
            assert self.held().isdisjoint(blocks)
            for block in blocks:
                self.content.pop(block, None)
        return blocks

    @rule(tokens=token_lists, data=st.data())
    def admit(self, tokens, data):
        root = data.draw(st.sampled_from(self.roots))
        array = np.asarray(tokens, np.int32)
        found, hashes = ([], []) if root is None else self.manager.match_prefix(array, root)
        assert len(found) == len(hashes) <= (len(tokens) - 1) // self.size, "the last token must be computed"
        for index, block in enumerate(found):
            assert self.content[block] == (root, tuple(tokens[: (index + 1) * self.size])), "somebody else's content"
        missing = self.manager.blocks_for(len(tokens)) - len(found)
        enough = missing <= self.manager.num_available_beside(found)
        if not enough:
            return
        self.manager.acquire(found)
        blocks = self.fresh(missing)
        assert blocks is not None
        assert set(blocks).isdisjoint(found)
        self.holders.append(Holder(root, list(tokens), found + blocks, hashes))

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def compute_a_block(self, data):
        holder = data.draw(st.sampled_from(self.holders))
        index = len(holder.hashes)
        if holder.root is None or (index + 1) * self.size > len(holder.tokens):
            return
        tokens = holder.tokens[index * self.size : (index + 1) * self.size]
        parent = holder.hashes[-1] if holder.hashes else holder.root
        self.content[holder.blocks[index]] = (holder.root, tuple(holder.tokens[: (index + 1) * self.size]))
        holder.hashes.append(self.manager.commit(holder.blocks[index], parent, np.asarray(tokens, np.int32)))

    @precondition(lambda self: self.holders)
    @rule(data=st.data(), token=st.integers(0, 1))
    def grow(self, data, token):
        holder = data.draw(st.sampled_from(self.holders))
        if len(holder.tokens) == len(holder.blocks) * self.size:
            blocks = self.fresh(1)
            if blocks is None:
                return
            holder.blocks += blocks
        holder.tokens.append(token)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def leave(self, data):
        """Finish, abort and preempt are the same to the books."""
        holder = data.draw(st.sampled_from(self.holders))
        self.holders.remove(holder)
        self.manager.release(holder.blocks)

    @invariant()
    def books_are_right(self):
        self.manager.check()
        assert self.manager.num_used == len(self.held())
        assert self.manager.num_available + self.manager.num_used == self.manager.num_blocks

    @invariant()
    def only_equal_computed_content_is_shared(self):
        seen: dict[int, tuple[bytes | None, tuple[int, ...]]] = {}
        for holder in self.holders:
            assert len(set(holder.blocks)) == len(holder.blocks)
            for index, block in enumerate(holder.blocks):
                content = (holder.root, tuple(holder.tokens[: (index + 1) * self.size]))
                if block in seen:
                    assert seen[block] == content == self.content[block]
                seen[block] = content
                if index < len(holder.hashes):
                    assert self.content[block] == content, "a computed block was overwritten"

    def teardown(self):
        if hasattr(self, "manager"):
            for holder in self.holders:
                self.manager.release(holder.blocks)
            self.manager.check()
            assert self.manager.num_used == 0


BlockManagerMachine.TestCase.settings = settings(examples(60), stateful_step_count=40)
TestBlockManager = BlockManagerMachine.TestCase


def filled(manager, tokens):
    """A sequence that has been admitted and computed; returns its blocks."""
    array = np.asarray(tokens, np.int32)
    found, hashes = manager.match_prefix(array)
    manager.acquire(found)
    blocks = found + manager.allocate(manager.blocks_for(len(tokens)) - len(found))
    for index in range(len(found), len(tokens) // manager.block_size):
        part = array[index * manager.block_size : (index + 1) * manager.block_size]
        hashes.append(manager.commit(blocks[index], hashes[-1] if hashes else ROOT_HASH, part))
    return blocks


def test_a_released_prefix_is_found_again_and_referenced_twice():
    manager = BlockManager(8, 2)
    first = filled(manager, [1, 2, 3, 4, 5])
    manager.release(first)
    assert manager.num_used == 0
    second, third = filled(manager, [1, 2, 3, 4, 6]), filled(manager, [1, 2, 3, 4, 7])
    assert second[:2] == third[:2] == first[:2]
    assert second[2] != third[2]
    manager.release(second)
    assert manager.num_used == 3
    manager.release(third)
    assert manager.num_used == 0


def test_a_prompt_of_whole_blocks_leaves_its_last_block_to_be_computed():
    manager = BlockManager(8, 2)
    manager.release(filled(manager, [1, 2, 3, 4]))
    assert len(manager.match_prefix(np.asarray([1, 2, 3, 4], np.int32))[0]) == 1
    assert len(manager.match_prefix(np.asarray([1, 2, 3, 4, 5], np.int32))[0]) == 2


def test_the_longest_unused_block_goes_first_and_of_a_sequence_its_end():
    manager = BlockManager(4, 1)
    manager.release(filled(manager, [1, 2]))
    manager.release(filled(manager, [3, 4]))
    manager.allocate(1)
    assert len(manager.match_prefix(np.asarray([1, 2, 9], np.int32))[0]) == 1
    assert len(manager.match_prefix(np.asarray([3, 4, 9], np.int32))[0]) == 2


def test_the_same_tokens_behind_other_tokens_are_another_block():
    manager = BlockManager(8, 2)
    manager.release(filled(manager, [1, 2, 3, 4, 5]))
    assert manager.match_prefix(np.asarray([3, 4, 5], np.int32))[0] == []
    assert len(manager.match_prefix(np.asarray([1, 2, 4, 3, 5], np.int32))[0]) == 1


def test_what_is_found_is_not_evicted_for_what_is_missing():
    manager = BlockManager(3, 1)
    manager.release(filled(manager, [1, 2, 3]))
    tokens = np.asarray([1, 2, 3, 4], np.int32)
    found, _ = manager.match_prefix(tokens)
    assert len(found) == 3
    assert manager.num_available == 3
    assert manager.num_available_beside(found) == 0


def test_roots_differ_wherever_sequences_must_not_meet():
    roots = [root for root in ROOTS if root is not None]
    roots += [root_hash(salt=salt) for salt in ("1", "1:", ":1", "alice ", "\ud800")]
    roots += [root_hash(group=0), root_hash(best_effort=True, salt="alice"), root_hash(best_effort=True, group=1)]
    assert len(set(roots)) == len(roots)
    assert root_hash(salt="alice", group=7) == root_hash(salt="alice", group=7)


def test_releasing_twice_is_an_error():
    manager = BlockManager(2, 1)
    blocks = manager.allocate(1)
    manager.release(blocks)
    with pytest.raises(AssertionError, match="released twice"):
        manager.release(blocks)
