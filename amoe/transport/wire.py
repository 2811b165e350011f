"""The wire format of a batch: a 64-byte header, then the columns, then the payload, in one contiguous record.

    offset  field                 bytes
    0       size of the record    8       a multiple of 64; `amoe.transport.ring` relies on it being first
    8       magic "AMOE"          4
    12      version, kind, dtype  1 each  and one byte of padding
    16      src, dst              2 each
    20      layer                 2
    22      incarnations          1 each  of src and dst
    24      wave, top_k           2 each
    28      hidden size, n        4 each
    36      count                 4
    40      epoch                 8
    48      latest_iteration      8
    56      num_waves             2
    58      backlog_s             4       float32
    62      row_s                 2       float16, in microseconds; below 0: not known
    64      slots, generations    4n each
    ...     iterations            4n      DISPATCH only, as are the next two
    ...     expert_weights        4nK
    ...     expert_ids            2nK
    ...     payload               n · hidden size · item size

Little endian. Each column and the payload begin at a multiple of 64 bytes, so that a record that lies at such a
multiple can be read in place. There is one definition of all this, here; both directions are numpy and torch views of
the record, whose number does not depend on the number of tokens.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import struct
from typing import NamedTuple

import numpy as np
import torch

from amoe.errors import TransportError
from amoe.transport.record_size import ALIGNMENT, HEADER_BYTES, aligned
from amoe.types import Batch, BatchKind, Float32Array, Int16Array, Int32Array

MAGIC = int.from_bytes(b"AMOE", "little")
VERSION = 4

_HEADER = struct.Struct("<QIBBBxHHhBBHHIIiqqHfe")
_LARGEST_HALF = 65504.0
_NO_PAYLOAD = 0
_CODE_OF_DTYPE: dict[torch.dtype, int] = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
_DTYPE_OF_CODE: dict[int, torch.dtype] = {code: dtype for dtype, code in _CODE_OF_DTYPE.items()}
_ITEM_BYTES: tuple[int, ...] = (0, 4, 2, 2)  # by dtype code
_KINDS: dict[int, BatchKind] = {int(kind): kind for kind in BatchKind}
_DISPATCH = int(BatchKind.DISPATCH)
_ANNOUNCE = int(BatchKind.ANNOUNCE)

# Shared by all decoded batches that have no such column; nothing can be written into an empty array.
_NO_INT32: Int32Array = np.empty(0, np.int32)
_NO_IDS: Int16Array = np.empty((0, 0), np.int16)
_NO_WEIGHTS: Float32Array = np.empty((0, 0), np.float32)


class WireBuffer:
    """A writable region of memory that batches are encoded into and decoded from.

    It keeps one view per element type, because slicing a view is several times cheaper than making one.

    Attributes:
        nbytes: size of the region; a multiple of 64.
        octets: the region as bytes.
    """

    __slots__ = ("_address", "_tensors", "float32", "int16", "int32", "nbytes", "octets")

    def __init__(self, region: bytearray | mmap.mmap) -> None:
        self.octets = memoryview(region)
        self.nbytes = len(self.octets)
        if self.nbytes % ALIGNMENT:
            raise ValueError(f"a wire buffer needs a multiple of {ALIGNMENT} bytes, not {self.nbytes}")
        base = np.frombuffer(region, np.uint8)
        self.int32: Int32Array = base.view(np.int32)
        self.int16: Int16Array = base.view(np.int16)
        self.float32: Float32Array = base.view(np.float32)
        with torch.inference_mode():  # a view of an inference tensor costs two thirds of one of a normal tensor
            octets = torch.frombuffer(region, dtype=torch.uint8)
            self._tensors = (octets, *(octets.view(_DTYPE_OF_CODE[code]) for code in (1, 2, 3)))
        self._address = octets.data_ptr()

    @property
    def tensor(self) -> torch.Tensor:
        """The region as uint8, an inference tensor."""
        return self._tensors[0]

    @classmethod
    def allocate(cls, nbytes: int) -> WireBuffer:
        """A fresh private region of `nbytes`, rounded up to a multiple of 64."""
        return cls(bytearray(aligned(nbytes)))

    def read_payload(self, code: int, offset: int, n: int, hidden_size: int) -> torch.Tensor:
        """A view [n, hidden_size] of the region, of the dtype with this `code`, from byte `offset`.

        It is an inference tensor: read it anywhere, write it in inference mode only.
        """
        return self._tensors[code].as_strided((n, hidden_size), (hidden_size, 1), offset // _ITEM_BYTES[code])

    def write_payload(self, code: int, offset: int, payload: torch.Tensor) -> None:
        """Copy `payload` [n, H], which may lie on an accelerator, to byte `offset`."""
        num_bytes = payload.nbytes
        if payload.is_cpu and payload.is_contiguous() and offset + num_bytes <= self.nbytes:
            # A third of the price of copy_: at one token per batch the two tensor calls cost more than the bytes.
            ctypes.memmove(self._address + offset, payload.data_ptr(), num_bytes)
        else:
            n, hidden_size = payload.shape
            with torch.inference_mode():
                self.read_payload(code, offset, n, hidden_size).copy_(payload)


class Layout(NamedTuple):
    """Where the parts of one kind and shape of record lie, from its beginning; in items of each column's type."""

    size: int  # bytes
    kind: int
    code: int
    top_k: int
    hidden_size: int
    n: int
    pairs: int
    step: int  # int32 items from one [n] column to the next
    weights: int
    ids: int
    payload: int  # bytes


# A server sees few hidden sizes, but as many n as there are token slots; bounded all the same.
@functools.lru_cache(maxsize=1 << 16)
def _layout(kind: int, n: int, top_k: int, hidden_size: int, code: int) -> Layout:
    step = aligned(4 * n)
    if kind == _DISPATCH:
        pairs = n * top_k
        weights = HEADER_BYTES + 3 * step
        ids = weights + aligned(4 * pairs)
        payload = ids + aligned(2 * pairs)
    else:
        pairs = top_k = 0
        weights = ids = payload = HEADER_BYTES + 2 * step
    size = payload + aligned(n * hidden_size * _ITEM_BYTES[code])
    return Layout(size, kind, code, top_k, hidden_size, n, pairs, step // 4, weights // 4, ids // 2, payload)


def dtype_of(layout: Layout) -> torch.dtype:
    """Of the payload, which there must be."""
    return _DTYPE_OF_CODE[layout.code]


def layout_of(batch: Batch) -> Layout:
    """The layout of the record of `batch`.

    Raises:
        TransportError: the batch has tokens but no payload, or one of an unknown dtype or shape.
    """
    n = len(batch.slots)
    if n == 0:
        return _layout(batch.kind, 0, 0, 0, _NO_PAYLOAD)
    payload = batch.payload
    if payload is None:
        raise TransportError(f"a batch of {n} tokens from rank {batch.src} to {batch.dst} has no payload")
    code = _CODE_OF_DTYPE.get(payload.dtype)
    if code is None:
        raise TransportError(f"a payload of {payload.dtype} cannot travel: float32, bfloat16 and float16 can")
    shape = payload.shape
    if len(shape) != 2 or shape[0] != n:
        raise TransportError(f"a batch of {n} tokens has a payload of shape {tuple(shape)}")
    return _layout(batch.kind, n, batch.expert_ids.shape[1], shape[1], code)


def encoded_size(batch: Batch) -> int:
    """Bytes of the record of `batch`: a multiple of 64. Raises as `layout_of` does."""
    return layout_of(batch).size


def layout_at(buffer: WireBuffer, offset: int = 0) -> Layout:
    """The layout of the record whose first 64 bytes lie at byte `offset`, whether or not the rest has come already.

    Raises:
        TransportError: it is not one of ours or contradicts itself.
    """
    size, magic, version, kind_code, code, *rest = _HEADER.unpack_from(buffer.octets, offset)
    top_k, hidden_size, n = rest[6:9]
    return _checked_layout(size, magic, version, kind_code, code, top_k, hidden_size, n)


def _checked_layout(
    size: int, magic: int, version: int, kind_code: int, code: int, top_k: int, hidden_size: int, n: int
) -> Layout:
    kind = _KINDS.get(kind_code)
    if magic != MAGIC or version != VERSION or kind is None or code >= len(_ITEM_BYTES):
        raise TransportError(
            f"not a batch: magic {magic:#x}, version {version} (this is {VERSION}), kind {kind_code}, dtype {code}"
        )
    layout = _layout(kind_code, n, top_k, hidden_size, code)
    if size != layout.size or (n and (code == _NO_PAYLOAD or kind_code == _ANNOUNCE)):
        raise TransportError(
            f"a {kind.name} record of {size} bytes contradicts its header: "
            f"{n} tokens, top-{top_k}, hidden size {hidden_size}, dtype {code}"
        )
    return layout


def encode_into(
    batch: Batch, buffer: WireBuffer, offset: int = 0, layout: Layout | None = None, *, with_payload: bool = True
) -> int:
    """Write the record of `batch` at byte `offset` (a multiple of 64) and return its size.

    The caller has made sure that the bytes are there. Raises as `layout_of` does, unless given its result.

    Args:
        with_payload: False leaves the payload's bytes as they are: it travels beside the record's first
            `layout.payload` bytes.
    """
    size, kind, code, top_k, hidden_size, n, pairs, step, weights, ids, payload_at = layout or layout_of(batch)
    if n:
        at = (offset + HEADER_BYTES) >> 2
        int32 = buffer.int32
        int32[at : at + n] = batch.slots
        at += step
        int32[at : at + n] = batch.generations
        if pairs:
            at += step
            int32[at : at + n] = batch.iterations
            at = (offset >> 2) + weights
            buffer.float32[at : at + pairs] = batch.expert_weights.ravel()
            at = (offset >> 1) + ids
            buffer.int16[at : at + pairs] = batch.expert_ids.ravel()
        if with_payload:
            payload = batch.payload
            assert payload is not None  # layout_of has looked
            buffer.write_payload(code, offset + payload_at, payload)
    _HEADER.pack_into(
        buffer.octets,
        offset,
        size,
        MAGIC,
        VERSION,
        kind,
        code,
        batch.src,
        batch.dst,
        batch.layer,
        batch.src_incarnation,
        batch.dst_incarnation,
        batch.wave,
        top_k,
        hidden_size,
        n,
        batch.count,
        batch.epoch,
        batch.latest_iteration,
        batch.num_waves,
        batch.backlog_s,
        -1.0 if batch.row_s < 0 else min(batch.row_s * 1e6, _LARGEST_HALF),
    )
    return size


def decode(buffer: WireBuffer, offset: int = 0, limit: int | None = None, payload: torch.Tensor | None = None) -> Batch:
    """The batch whose record begins at byte `offset`: its arrays and payload are views of `buffer`, on the CPU.

    Args:
        limit: bytes that belong to the record at most; None: what the buffer holds.
        payload: [n, H], where it has travelled beside the record: the record then ends where it would begin.

    Raises:
        TransportError: the record is not one of ours or contradicts itself.
    """
    limit = buffer.nbytes - offset if limit is None else limit
    if limit < HEADER_BYTES:
        raise TransportError(f"a record of {limit} bytes is shorter than its header")
    header = _HEADER.unpack_from(buffer.octets, offset)
    size, magic, version, kind_code, code, src, dst, layer, src_life, dst_life, wave, top_k, *rest = header
    hidden_size, n, count, epoch, latest, waves, backlog_s, row_us = rest
    layout = _checked_layout(size, magic, version, kind_code, code, top_k, hidden_size, n)
    if (size if payload is None else layout.payload) > limit:
        raise TransportError(f"a record of {size} bytes contradicts the {limit} that there are")
    kind = _KINDS[kind_code]
    slots = generations = iterations = _NO_INT32
    expert_ids, expert_weights = _NO_IDS, _NO_WEIGHTS
    if n:
        int32, step = buffer.int32, layout.step
        at = (offset + HEADER_BYTES) >> 2
        slots = int32[at : at + n]
        at += step
        generations = int32[at : at + n]
        if layout.pairs:
            at += step
            iterations = int32[at : at + n]
            at = (offset >> 2) + layout.weights
            expert_weights = buffer.float32[at : at + layout.pairs].reshape(n, top_k)
            at = (offset >> 1) + layout.ids
            expert_ids = buffer.int16[at : at + layout.pairs].reshape(n, top_k)
        if payload is None:
            payload = buffer.read_payload(code, offset + layout.payload, n, hidden_size)
    return Batch(
        kind,
        src,
        dst,
        layer,
        wave,
        epoch,
        count,
        slots,
        generations,
        iterations,
        expert_ids,
        expert_weights,
        payload,
        latest,
        waves,
        backlog_s,
        -1.0 if row_us < 0 else row_us * 1e-6,
        src_life,
        dst_life,
    )
