"""The codec gives back what it was given, bit for bit, and refuses what is not a batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from amoe.errors import TransportError
from amoe.transport.record_size import ALIGNMENT, HEADER_BYTES, max_record_bytes
from amoe.transport.wire import (
    WireBuffer,
    decode,
    dtype_of,
    encode_into,
    encoded_size,
    layout_at,
    layout_of,
)
from amoe.types import Batch, BatchKind
from tests.unit.transport.transport_batches import assert_same, make_batch

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

batches = st.builds(
    make_batch,
    st.integers(0, 70),
    kind=st.sampled_from([BatchKind.DISPATCH, BatchKind.RESULT]),
    src=st.integers(0, 1000),
    dst=st.integers(0, 1000),
    top_k=st.integers(1, 9),
    hidden_size=st.integers(1, 130),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
    layer=st.integers(-1, 200),
    wave=st.integers(0, 3),
    epoch=st.integers(-1, 2**40),
)


@given(batch=batches, lines=st.integers(0, 5))
def test_round_trip_at_any_aligned_offset(batch: Batch, lines: int) -> None:
    offset = lines * ALIGNMENT
    size = encoded_size(batch)
    buffer = WireBuffer.allocate(offset + size)
    assert size % ALIGNMENT == 0
    assert encode_into(batch, buffer, offset) == size
    assert_same(decode(buffer, offset), batch)


@given(batch=batches)
def test_bound_holds_for_every_record(batch: Batch) -> None:
    hidden_size = 0 if batch.payload is None else batch.payload.shape[1]
    item_bytes = 0 if batch.payload is None else batch.payload.element_size()
    top_k = batch.expert_ids.shape[1]
    assert encoded_size(batch) <= max_record_bytes(len(batch.slots), hidden_size, top_k, item_bytes)


@pytest.mark.parametrize("kind", [BatchKind.ANNOUNCE, BatchKind.DISPATCH, BatchKind.RESULT])
def test_batch_without_tokens_is_a_header(kind: BatchKind) -> None:
    batch = make_batch(0, kind=kind, count=17)
    buffer = WireBuffer.allocate(HEADER_BYTES)
    assert encode_into(batch, buffer) == encoded_size(batch) == HEADER_BYTES
    received = decode(buffer)
    assert_same(received, batch)
    assert received.count == 17
    assert received.payload is None


def test_strided_payload_and_columns_arrive() -> None:
    batch = make_batch(6, hidden_size=8, top_k=4)
    assert batch.payload is not None
    batch.payload = batch.payload.repeat(1, 2)[:, ::2]
    batch.expert_ids = np.repeat(batch.expert_ids, 2, axis=1)[:, ::2]
    batch.slots = np.repeat(batch.slots, 3)[::3]
    assert not batch.payload.is_contiguous()
    buffer = WireBuffer.allocate(encoded_size(batch))
    encode_into(batch, buffer)
    assert_same(decode(buffer), batch)


def test_decoded_arrays_are_views_at_aligned_addresses() -> None:
    batch = make_batch(5, top_k=3, hidden_size=7, dtype=torch.bfloat16)
    buffer = WireBuffer.allocate(encoded_size(batch))
    encode_into(batch, buffer)
    received = decode(buffer)
    base = np.frombuffer(buffer.octets, np.uint8).ctypes.data
    columns = (received.slots, received.generations, received.iterations, received.expert_ids, received.expert_weights)
    for column in columns:
        assert (column.ctypes.data - base) % ALIGNMENT == 0
    assert received.payload is not None
    assert (received.payload.data_ptr() - base) % ALIGNMENT == 0
    buffer.octets[:] = bytes(buffer.nbytes)
    assert not received.slots.any()
    assert not received.payload.any()


@given(batch=batches, position=st.integers(0, HEADER_BYTES - 1), flip=st.integers(1, 255))
def test_flipped_header_byte_is_refused_or_harmless(batch: Batch, position: int, flip: int) -> None:
    """A wrong header may tell a wrong layer, but never makes the reader step outside the record."""
    buffer = WireBuffer.allocate(encoded_size(batch))
    encode_into(batch, buffer)
    buffer.octets[position] ^= flip
    try:
        received = decode(buffer)
    except TransportError:
        return
    payload_bytes = 0 if received.payload is None else received.payload.nbytes
    assert payload_bytes + received.slots.nbytes * 2 + HEADER_BYTES <= buffer.nbytes


@pytest.mark.parametrize(
    ("position", "name"), [(0, "size"), (8, "magic"), (12, "version"), (13, "kind"), (14, "dtype"), (32, "n")]
)
def test_corrupt_header_is_an_error(position: int, name: str) -> None:
    batch = make_batch(40)
    buffer = WireBuffer.allocate(encoded_size(batch))
    encode_into(batch, buffer)
    buffer.octets[position] ^= 0x7F
    with pytest.raises(TransportError):
        decode(buffer)


@given(batch=batches)
def test_first_bytes_tell_the_layout(batch: Batch) -> None:
    buffer = WireBuffer.allocate(encoded_size(batch))
    encode_into(batch, buffer)
    head = WireBuffer(bytearray(buffer.octets[:HEADER_BYTES]))
    assert layout_at(head) == layout_of(batch)
    if batch.payload is not None:
        assert dtype_of(layout_at(head)) == batch.payload.dtype


@given(batch=batches)
def test_payload_that_travels_beside_its_record(batch: Batch) -> None:
    layout = layout_of(batch)
    nbytes = layout.payload if batch.payload is not None else layout.size
    buffer = WireBuffer.allocate(nbytes)
    encode_into(batch, buffer, with_payload=False)
    assert_same(decode(buffer, 0, nbytes, batch.payload), batch)


def test_record_without_its_payload_is_an_error_unless_that_is_given() -> None:
    batch = make_batch(40)
    nbytes = layout_of(batch).payload
    buffer = WireBuffer.allocate(nbytes)
    encode_into(batch, buffer, with_payload=False)
    with pytest.raises(TransportError, match="contradicts"):
        decode(buffer, 0, nbytes)
    with pytest.raises(TransportError, match="contradicts"):
        decode(buffer, 0, nbytes - ALIGNMENT, batch.payload)


def test_truncated_record_is_an_error() -> None:
    batch = make_batch(40)
    buffer = WireBuffer.allocate(encoded_size(batch))
    encode_into(batch, buffer)
    with pytest.raises(TransportError, match="contradicts"):
        decode(buffer, 0, buffer.nbytes - ALIGNMENT)
    with pytest.raises(TransportError, match="shorter"):
        decode(buffer, 0, HEADER_BYTES // 2)


def test_payloads_that_cannot_travel() -> None:
    buffer = WireBuffer.allocate(1 << 16)
    batch = make_batch(3)
    batch.payload = None
    with pytest.raises(TransportError, match="no payload"):
        encoded_size(batch)
    with pytest.raises(TransportError, match="no payload"):
        encode_into(batch, buffer)
    batch.payload = torch.zeros(3, 8, dtype=torch.int64)
    with pytest.raises(TransportError, match="int64"):
        encode_into(batch, buffer)
    batch.payload = torch.zeros(2, 8)
    with pytest.raises(TransportError, match="shape"):
        encode_into(batch, buffer)
