"""Weights in the order in which the native kernels read them.

A matrix [N, K] becomes panels of 32 rows of it: [ceil(N / 32), K / 2, 32], an element being two neighbouring numbers
of a row (bfloat16, int8), or [ceil(N / 32), K, 32] single ones (float32). A product then reads memory as one stream.

Shape letters: N rows (outputs), K depth (inputs), P panels, E experts, H hidden size, I intermediate size of an expert.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from amoe.kernels.native import _native
from amoe.kernels.native.memory import empty, give_back

PANEL = 32
HALF = PANEL // 2
# An element of packed storage: what one lane of the kernels takes in one step.
LANES = {torch.bfloat16: torch.int32, torch.float32: torch.float32, torch.int8: torch.int16}


@dataclass(frozen=True)
class PackedMatrix:
    """One matrix [N, K] for `Context.linear`.

    Attributes:
        data: [P, K / 2 or K, 32].
        scales: [32 P] float32 of int8 rows, else None.
        rows, depth: N and K.
        handle: what the kernels take.
    """

    data: torch.Tensor
    scales: torch.Tensor | None
    rows: int
    depth: int
    dtype: torch.dtype
    handle: _native.Weights

    @classmethod
    def of(cls, weight: torch.Tensor, *, quantize: bool = False) -> PackedMatrix:
        """Pack weight [N, K], as int8 if `quantize`."""
        rows, depth = weight.shape
        stored, scales = quantize_rows(weight) if quantize else (weight, None)
        packed = empty(packed_shape(rows, depth, stored.dtype), LANES[stored.dtype])
        pack_into(packed, stored)
        if scales is not None:
            scales = _padded(scales, len(packed) * PANEL)
        handle = weights_handle(packed, scales, rows, depth)
        return cls(packed, scales, rows, depth, stored.dtype, handle)

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + (0 if self.scales is None else self.scales.nbytes)


@dataclass(frozen=True)
class PackedExperts:
    """The experts of one layer that are here, for `Context.experts`.

    Each has a place in memory that may have room for more, so that experts come and go while the others stay where they
    are, and are computed with.

    Attributes:
        ids: global ids, ascending.
        places: of these experts.
        w13: [E, ceil(I / 16), H / 2 or H, 32]: a panel holds 16 gate rows, then the 16 up rows that belong to them.
        w2: [E, ceil(H / 32), I / 2 or I, 32].
        w13_scales, w2_scales: [E, rows rounded up] float32 of int8 rows, else None.
        handle: what the kernels take.
    """

    ids: tuple[int, ...]
    places: tuple[int, ...]
    w13: torch.Tensor
    w2: torch.Tensor
    w13_scales: torch.Tensor | None
    w2_scales: torch.Tensor | None
    handle: _native.Experts

    @classmethod
    def empty(
        cls,
        ids: Sequence[int],
        hidden: int,
        intermediate: int,
        dtype: torch.dtype,
        *,
        quantize: bool = False,
        room: int = 0,
    ) -> PackedExperts:
        """Room for the experts `ids`, which get the first places, or for `room` experts, if that is more. `put` fills
        it, and memory is taken only where it has."""
        stored = torch.int8 if quantize else dtype
        count, gate_up_rows = max(len(ids), room), 2 * HALF * math.ceil(intermediate / HALF)
        w13 = empty((count, *packed_shape(gate_up_rows, hidden, stored)), LANES[stored])
        w2 = empty((count, *packed_shape(hidden, intermediate, stored)), LANES[stored])
        w13_scales, w2_scales = (torch.zeros((count, w.shape[1] * PANEL)) if quantize else None for w in (w13, w2))
        handle = _native.Experts(
            weights_handle(w13, w13_scales, gate_up_rows, hidden),
            weights_handle(w2, w2_scales, hidden, intermediate),
            count,
            hidden,
            intermediate,
            w13.stride(0) * w13.itemsize,
            w2.stride(0) * w2.itemsize,
            0 if w13_scales is None else w13_scales.stride(0),
            0 if w2_scales is None else w2_scales.stride(0),
        )
        return cls(tuple(ids), tuple(range(len(ids))), w13, w2, w13_scales, w2_scales, handle)

    @property
    def num_bytes(self) -> int:
        """Of the experts that are here."""
        parts = (self.w13, self.w2, self.w13_scales, self.w2_scales)
        return sum(part[0].nbytes * len(self.ids) for part in parts if part is not None and len(part))

    def holding(self, ids: Sequence[int]) -> PackedExperts:
        """The experts `ids` in the same memory: those that are here stay in their places, the others get free ones,
        which `put` fills.

        Raises:
            ValueError: there is no room for so many.
        """
        at = dict(zip(self.ids, self.places, strict=True))
        new = [expert for expert in ids if expert not in at]
        free = self._free_places()
        if len(new) > len(free):
            raise ValueError(f"{len(new)} more experts, and {len(free)} free places")
        at |= dict(zip(new, free, strict=False))
        return replace(self, ids=tuple(ids), places=tuple(at[expert] for expert in ids))

    def forget_others(self) -> None:
        """Give the memory of all places back that have none of these experts."""
        for start, end in _runs(self._free_places()):
            give_back(self.w13[start:end])
            give_back(self.w2[start:end])

    def _free_places(self) -> list[int]:
        taken = set(self.places)
        return [place for place in range(len(self.w13)) if place not in taken]

    def put(self, place: int, w13: torch.Tensor, w2: torch.Tensor) -> None:
        """The expert in a place has weights w13 [2I, H], gate rows then up rows, and w2 [H, I]."""
        for source, packed, scales, is_gated in (
            (w13, self.w13, self.w13_scales, True),
            (w2, self.w2, self.w2_scales, False),
        ):
            if scales is not None:
                source, row_scales = quantize_rows(source)
                row_scales = interleave(row_scales) if is_gated else row_scales
                scales[place, : len(row_scales)] = row_scales
            pack_into(packed[place], source, is_gated=is_gated)


def packed_shape(rows: int, depth: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Of packed storage; an odd depth cannot be packed in pairs."""
    step = LANES[dtype].itemsize // dtype.itemsize
    if depth % step:
        raise ValueError(f"a depth of {depth} is odd")
    return math.ceil(rows / PANEL), depth // step, PANEL


def pack_into(packed: torch.Tensor, weight: torch.Tensor, *, is_gated: bool = False) -> None:
    """weight [N, K] into packed [P, K / 2 or K, 32]; rows beyond N become zero.

    Args:
        is_gated: the first half of the rows are gates, the other half what they belong to: see `interleave`.
    """
    lanes = weight.contiguous().view(LANES[weight.dtype])
    num_rows, row_bytes = len(lanes), lanes.stride(0) * lanes.itemsize
    low_rows = num_rows // 2 if is_gated else num_rows
    second = num_rows // 2 if is_gated else HALF
    _native.pack(
        lanes.data_ptr(),
        low_rows,
        lanes.data_ptr() + second * row_bytes,
        max(0, num_rows - second),
        HALF if is_gated else PANEL,
        lanes.shape[1],
        len(packed),
        packed.data_ptr(),
        lanes.itemsize,
    )


def interleave(rows: torch.Tensor) -> torch.Tensor:
    """[2I, ...] gates, then what they belong to, as alternating groups of 16; I is filled up to 16 with zeros."""
    halves = [_padded(half, HALF * math.ceil(len(half) / HALF)) for half in rows.chunk(2)]
    return torch.stack([half.view(-1, HALF, *rows.shape[1:]) for half in halves], dim=1).flatten(0, 2)


def quantize_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """weight [N, K] as int8 [N, K] and float32 scales [N]: symmetric, so that the largest of a row becomes 127."""
    values = weight.float()
    scales = values.abs().amax(dim=1) / 127
    quantized = (values / torch.where(scales > 0, scales, 1.0)[:, None]).round_()
    return quantized.to(torch.int8), scales


def weights_handle(packed: torch.Tensor, scales: torch.Tensor | None, rows: int, depth: int) -> _native.Weights:
    """What the kernels take of a matrix, or of the first of a stack; keep the tensors alive as long as it."""
    address = 0 if scales is None else scales.data_ptr()
    return _native.Weights(packed.data_ptr(), address, rows, depth, packed.dtype == torch.int16)


def _runs(places: Sequence[int]) -> list[tuple[int, int]]:
    """[start, end) of neighbours among ascending places."""
    starts = [place for place in places if place - 1 not in places]
    ends = [place + 1 for place in places if place + 1 not in places]
    return list(zip(starts, ends, strict=True))


def _padded(rows: torch.Tensor, count: int) -> torch.Tensor:
    if len(rows) == count:
        return rows
    return torch.cat((rows, rows.new_zeros((count - len(rows), *rows.shape[1:]))))
