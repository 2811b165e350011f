"""The native RMSNorm against torch's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from amoe.kernels import native
from tests.unit.kernels.native_cases import address, each_dtype, each_isa, needs_native

pytestmark = needs_native


def rms_norm(context, x, weight, eps=1e-5):
    out = torch.empty(x.shape, dtype=x.dtype)
    n, width = x.shape
    context.rms_norm(x.data_ptr(), x.stride(0), address(weight), eps, out.data_ptr(), width, n, width)
    return out


@each_isa
@each_dtype
@pytest.mark.parametrize("width", [2, 16, 30, 100, 1024, 1090])
@pytest.mark.parametrize("with_weight", [True, False])
def test_equals_torch(isa, dtype, width, with_weight):
    generator = torch.Generator().manual_seed(width)
    x = torch.randn(17, width + 6, generator=generator).mul(3).to(dtype)[:, :width]
    weight = torch.randn(width, generator=generator).to(dtype) if with_weight else None
    ours = rms_norm(native.make_context(dtype, 2, isa=isa), x, weight)
    expected = F.rms_norm(x.float(), (width,), None if weight is None else weight.float(), 1e-5)
    tolerance = 2**-8 if dtype == torch.bfloat16 else 1e-5  # of bfloat16: half an ulp is 2^-9 of the number at most
    torch.testing.assert_close(ours.float(), expected, rtol=tolerance, atol=1e-6)


@each_isa
@each_dtype
def test_bits_depend_on_the_row_alone(isa, dtype):
    x = torch.randn(40, 530, generator=torch.Generator().manual_seed(0)).to(dtype)
    one, three = (native.make_context(dtype, threads, isa=isa) for threads in (1, 3))
    together = rms_norm(three, x, x[0])
    assert torch.equal(together, rms_norm(one, x, x[0]))
    for row in (0, 7, 39):
        assert torch.equal(together[row : row + 1], rms_norm(one, x[row : row + 1], x[0]))


@each_isa
@each_dtype
def test_zeros_stay_zeros_and_nan_stays_in_its_row(isa, dtype):
    x = torch.zeros(3, 64, dtype=dtype)
    x[1, 5] = float("nan")
    ours = rms_norm(native.make_context(dtype, 1, isa=isa), x, None)
    assert not ours[[0, 2]].any() and ours[1].isnan().all()
