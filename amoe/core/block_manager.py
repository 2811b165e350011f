"""Blocks of the paged KV cache: who owns which, and which can be found again by their content."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

from amoe.types import Int32Array

ROOT_HASH = b""


def root_hash(*, best_effort: bool = False, salt: str = "", group: int | None = None) -> bytes:
    """Name of an empty prefix: sequences find each other's blocks where it is the same.

    Args:
        best_effort: KV that may lack experts must not be found by those who asked for exactness.
        salt: of the user, whose context is nobody else's business.
        group: of sequences that share among themselves only.
    """
    if not best_effort and not salt and group is None:
        return ROOT_HASH
    words = f"{int(best_effort)}:{'' if group is None else group}:{salt}".encode("utf-8", "surrogatepass")
    return hashlib.blake2b(words, digest_size=16, person=b"amoe-root").digest()


def hash_block(parent: bytes, token_ids: Int32Array) -> bytes:
    """Name of a full block: a digest of its tokens and of all tokens before it.

    Cryptographic, because a collision would show one user's context to another.
    """
    return hashlib.blake2b(parent + token_ids.tobytes(), digest_size=16).digest()


class BlockManager:
    """Reference counts of `num_blocks` blocks of `block_size` tokens, and the prefix cache over those that are named.

    A block is free (its content means nothing), referenced (by one or more sequences), or cached: unreferenced, but
    found under its hash until it is needed, the longest unused first.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._references = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._hash_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        self.num_queries = 0
        self.num_hits = 0
        self.num_changes = 0  # grows with whatever may let somebody in who has been refused

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` could give now."""
        return len(self._free) + len(self._cached)

    @property
    def num_used(self) -> int:
        """Blocks that some sequence references."""
        return self.num_blocks - self.num_available

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that `num_tokens` tokens fill, the last one perhaps in part."""
        return -(-num_tokens // self.block_size)

    def match_prefix(self, token_ids: Int32Array, root: bytes = ROOT_HASH) -> tuple[list[int], list[bytes]]:
        """Longest cached prefix of `token_ids` [n] in full blocks, at least one token short of n.

        The last token is never matched: somebody has to compute its logits. References nothing yet: see `acquire`.

        Args:
            root: the parent of first blocks. What was committed under another root is not found.

        Returns:
            The blocks and their hashes.
        """
        blocks: list[int] = []
        hashes: list[bytes] = []
        parent = root
        for start in range(0, len(token_ids) - self.block_size, self.block_size):
            parent = hash_block(parent, token_ids[start : start + self.block_size])
            block = self._block_of.get(parent)
            if block is None:
                break
            blocks.append(block)
            hashes.append(parent)
        return blocks, hashes

    def count_lookup(self, num_tokens: int, num_found: int) -> None:
        """Count a prefix lookup that led to an admission."""
        self.num_queries += num_tokens
        self.num_hits += num_found

    def num_available_beside(self, blocks: Sequence[int]) -> int:
        """Blocks that `allocate` could give after `acquire(blocks)`."""
        return self.num_available - sum(1 for block in blocks if self._references[block] == 0)

    def acquire(self, blocks: Sequence[int]) -> None:
        """Reference blocks that `match_prefix` has found."""
        for block in blocks:
            if self._references[block] == 0:
                del self._cached[block]
            self._references[block] += 1

    def allocate(self, count: int) -> list[int] | None:
        """`count` blocks with one reference each, or None if there are not as many."""
        if count > self.num_available:
            return None
        blocks = []
        for _ in range(count):
            block = self._free.pop() if self._free else self._evict()
            self._references[block] = 1
            blocks.append(block)
        return blocks

    def _evict(self) -> int:
        block, _ = self._cached.popitem(last=False)
        del self._block_of[self._hash_of.pop(block)]
        return block

    def commit(self, block: int, parent: bytes, token_ids: Int32Array) -> bytes:
        """A referenced block is full and computed in every layer: from now on it can be found by its content.

        Returns:
            Its hash, the parent of the next block's.
        """
        name = hash_block(parent, token_ids)
        # Another sequence may have computed the same content at the same time: the first one keeps the name.
        if name not in self._block_of and block not in self._hash_of:
            self._hash_of[block] = name
            self._block_of[name] = block
            self.num_changes += 1
        return name

    def release(self, blocks: Sequence[int]) -> None:
        """Drop one reference each. The last block of a sequence is forgotten first, since prefixes are worth more."""
        self.num_changes += 1
        for block in reversed(blocks):
            assert self._references[block] > 0, f"block {block} released twice"
            self._references[block] -= 1
            if self._references[block] == 0:
                if block in self._hash_of:
                    self._cached[block] = None
                else:
                    self._free.append(block)

    def check(self) -> None:
        """Assert the invariants; for tests."""
        referenced = {block for block, count in enumerate(self._references) if count > 0}
        free, cached = set(self._free), set(self._cached)
        assert len(free) == len(self._free)
        assert referenced.isdisjoint(free)
        assert referenced.isdisjoint(cached)
        assert free.isdisjoint(cached)
        assert len(referenced) + len(free) + len(cached) == self.num_blocks
        assert {self._block_of[name]: name for name in self._block_of} == self._hash_of
        assert cached <= set(self._hash_of)
