"""Weights in panels: what is packed comes out again, and what fills panels up is zero."""

from __future__ import annotations

import errno
import mmap
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from amoe.errors import ConfigError
from amoe.kernels.native import reference
from amoe.kernels.native.memory import HUGE_PAGE, empty
from amoe.kernels.native.packing import (
    PANEL,
    PackedExperts,
    PackedMatrix,
    interleave,
    pack_into,
    packed_shape,
    quantize_rows,
)
from tests.unit.kernels.native_cases import each_dtype, needs_native, resident
from tests.unit.kernels.native_products import Kind, each_kind, random

pytestmark = needs_native

THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 100), pairs=st.integers(1, 40), dtype=st.sampled_from([torch.bfloat16, torch.float32]))
def test_a_matrix_comes_out_as_it_went_in(rows, pairs, dtype):
    weight = random(rows, 2 * pairs, dtype=dtype)
    packed = PackedMatrix.of(weight)
    assert torch.equal(reference.unpacked_matrix(packed), weight)
    assert not reference.unpacked(packed.data, None)[rows:].any(), "what fills up the last panel"
    assert packed.nbytes == -(-rows // PANEL) * PANEL * 2 * pairs * dtype.itemsize


@each_dtype
def test_where_a_number_lies(dtype):
    weight = torch.arange(40 * 6).view(40, 6).to(dtype)
    data = PackedMatrix.of(weight).data
    if dtype == torch.float32:
        assert data.shape == (2, 6, PANEL)
        assert data[1, 4, 3] == weight[35, 4]
    else:
        assert data.shape == (2, 3, PANEL)
        assert torch.equal(data[1, 2, 3:4].view(dtype), weight[35, 4:6])


def test_memory_that_is_not_contiguous_is_packed_as_what_it_shows():
    weight = random(64, 50)
    assert torch.equal(reference.unpacked_matrix(PackedMatrix.of(weight.T)), weight.T)


def test_memory_is_overwritten_up_to_the_end_of_the_last_panel():
    packed = torch.full(packed_shape(33, 8, torch.float32), 7.0)
    pack_into(packed, random(33, 8))
    assert (packed[1, :, 1:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_an_odd_depth_has_no_pairs(dtype):
    with pytest.raises(ValueError, match="a depth of 45 is odd"):
        packed_shape(64, 45, dtype)
    assert packed_shape(64, 45, torch.float32) == (2, 45, PANEL)


@pytest.mark.parametrize("intermediate", [16, 36, 5])
def test_gate_and_up_rows_that_belong_together_share_a_panel(intermediate):
    gate, up = random(intermediate, 3), random(intermediate, 3, seed=1)
    panels = interleave(torch.cat((gate, up))).view(-1, 2, 16, 3)
    assert torch.equal(panels[:, 0].flatten(0, 1)[:intermediate], gate)
    assert torch.equal(panels[:, 1].flatten(0, 1)[:intermediate], up)
    assert not panels.transpose(0, 1).flatten(1, 2)[:, intermediate:].any()


@each_kind
@pytest.mark.parametrize(("hidden", "intermediate"), [(48, 36), (64, 32), (34, 2)])
def test_experts_come_out_as_they_went_in(kind, hidden, intermediate):
    packed = PackedExperts.empty((1, 4, 6), hidden, intermediate, kind.dtype, quantize=kind.quantize)
    put = [
        (random(2 * intermediate, hidden, seed=n, dtype=kind.dtype), random(hidden, intermediate, dtype=kind.dtype) * n)
        for n in (1, 2, 3)
    ]
    for local in (2, 0, 1):
        packed.put(local, *put[local])
    for local, weights in enumerate(put):
        for ours, expected in zip(reference.unpacked_expert(packed, local, hidden, intermediate), weights, strict=True):
            if kind.quantize:
                quantized, scales = quantize_rows(expected)
                expected = quantized.float() * scales[:, None]
            assert torch.equal(ours, expected)


def put_random(packed: PackedExperts, places: tuple[int, ...], hidden: int, size: int, kind: Kind) -> None:
    for place in places:
        w13, w2 = (random(*shape, seed=place, dtype=kind.dtype) for shape in ((2 * size, hidden), (hidden, size)))
        packed.put(place, w13, w2)


@each_kind
def test_experts_come_and_go_while_others_stay_where_they_are(kind):
    hidden, size = 1024, 512  # large enough for memory of its own
    first = PackedExperts.empty((1, 4, 6), hidden, size, kind.dtype, quantize=kind.quantize, room=5)
    put_random(first, (0, 1, 2), hidden, size, kind)
    before = [reference.unpacked_expert(first, place, hidden, size) for place in (0, 1, 2)]
    more = first.holding((0, 1, 4, 6))
    assert (first.ids, first.places) == ((1, 4, 6), (0, 1, 2))
    assert (more.ids, more.places) == ((0, 1, 4, 6), (3, 0, 1, 2))
    put_random(more, (3,), hidden, size, kind)
    fewer = more.holding((0, 6))
    assert fewer.places == (3, 2)
    assert 2 * fewer.num_bytes == more.num_bytes
    fewer.forget_others()
    for place, expected in ((2, before[2]), (3, reference.unpacked_expert(more, 3, hidden, size))):
        ours = reference.unpacked_expert(fewer, place, hidden, size)
        assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    again = fewer.holding((0, 1, 2, 3, 6))
    assert again.places == (3, 0, 1, 4, 2), "free ones, in order"
    put_random(again, (0,), hidden, size, kind)
    ours = reference.unpacked_expert(again, 0, hidden, size)
    assert all(torch.equal(a, b) for a, b in zip(ours, before[0], strict=True)), (
        "memory that was given back is taken anew"
    )
    with pytest.raises(ValueError, match="1 more experts, and 0 free places"):
        again.holding((0, 1, 2, 3, 5, 6))


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="Linux")
def test_what_is_forgotten_takes_no_memory():
    packed = PackedExperts.empty(range(6), 1024, 1024, torch.bfloat16, room=12)
    assert resident(packed.w13[6:]) < HUGE_PAGE, "nothing is there before it is written"
    for place in range(6):
        packed.w13[place].fill_(1)
        packed.w2[place].fill_(1)
    before = resident(packed.w13), resident(packed.w2)
    packed.holding((0, 4, 5)).forget_others()
    forgotten = before[0] - resident(packed.w13), before[1] - resident(packed.w2)
    whole = 3 * packed.w13[0].nbytes, 3 * packed.w2[0].nbytes
    assert all(bytes_ >= expected - 2 * mmap.PAGESIZE for bytes_, expected in zip(forgotten, whole, strict=True))
    assert int(packed.w13[0].sum()) == packed.w13[0].numel(), "neighbours lose nothing"
    assert int(packed.w2[4].sum()) == packed.w2[4].numel()


@each_kind
def test_small_ones_are_forgotten_in_words_only(kind):
    packed = PackedExperts.empty((0, 1), 64, 48, kind.dtype, quantize=kind.quantize, room=3)
    put_random(packed, (0, 1), 64, 48, kind)
    before = reference.unpacked_expert(packed, 0, 64, 48)
    packed.holding((0,)).forget_others()
    after = reference.unpacked_expert(packed, 0, 64, 48)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@each_kind
def test_bytes_are_those_of_the_memory(kind):
    packed = PackedExperts.empty((0, 1), 64, 48, kind.dtype, quantize=kind.quantize)
    numbers = 2 * 3 * 64 * 48
    if kind.quantize:
        assert packed.num_bytes == numbers + 4 * 2 * (96 + 64), "a byte each, and a scale for each row"
    else:
        assert packed.num_bytes == numbers * kind.dtype.itemsize


def test_no_experts_take_no_memory():
    assert PackedExperts.empty((), 64, 48, torch.bfloat16, quantize=True).num_bytes == 0


@given(st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_rows_are_quantized_to_half_a_step(seed):
    weight = random(20, 30, seed=seed) * random(20, 1, seed=seed + 1).exp()
    weight[3] = 0
    quantized, scales = quantize_rows(weight)
    assert quantized.dtype == torch.int8
    assert (quantized.float() * scales[:, None] - weight).abs().le(scales[:, None] * 0.5001).all()
    assert quantized.abs().amax(dim=1).tolist() == [0 if row == 3 else 127 for row in range(20)]
    assert not quantized[3].any() and scales[3] == 0


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.float32])
def test_large_memory_begins_at_a_huge_page(dtype):
    large = empty((3, HUGE_PAGE // dtype.itemsize), dtype)
    assert large.data_ptr() % HUGE_PAGE == 0
    assert large.shape == (3, HUGE_PAGE // dtype.itemsize) and large.dtype == dtype and large.is_contiguous()
    large.fill_(3)
    assert (large == 3).all()
    assert empty((3, 5), dtype).shape == (3, 5)


def flags_of(address: int) -> list[str]:
    """VmFlags of the mapping that holds an address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in (first := line.split(" ", 1)[0]):
            start, end = (int(part, 16) for part in first.split("-"))
            inside = start <= address < end
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise AssertionError("no mapping holds it")


@pytest.mark.skipif(not THP.exists() or "[never]" in THP.read_text(), reason="this system gives huge pages to nobody")
def test_large_memory_asks_for_huge_pages():
    """Asks: whether the system has any to give is its own affair. Shared memory, which is a file's, would get none."""
    large = empty((8 * HUGE_PAGE,), torch.int8)
    flags = flags_of(large.data_ptr())
    assert "hg" in flags
    assert "sh" not in flags


def test_no_address_space_is_told(monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(mmap, "mmap", refuse)
    with pytest.raises(ConfigError, match=r"no 4,194,304 bytes of address space \(Cannot allocate memory\)"):
        empty((4 << 20,), torch.int8)
