"""How large a record of `amoe.transport.wire` is: also for who makes room for records, and never reads one."""

from __future__ import annotations

ALIGNMENT = 64
HEADER_BYTES = 64


def aligned(num_bytes: int) -> int:
    """The next multiple of `ALIGNMENT`."""
    return (num_bytes + ALIGNMENT - 1) & -ALIGNMENT


def row_bytes(hidden_size: int, top_k: int, item_bytes: int) -> int:
    """Bytes that one more token adds to a DISPATCH record (a RESULT record: less), without alignment."""
    return 3 * 4 + top_k * (4 + 2) + hidden_size * item_bytes


def max_record_bytes(num_tokens: int, hidden_size: int, top_k: int, item_bytes: int) -> int:
    """Bytes of the largest record with `num_tokens` tokens."""
    return HEADER_BYTES + 6 * ALIGNMENT + aligned(num_tokens * row_bytes(hidden_size, top_k, item_bytes))
