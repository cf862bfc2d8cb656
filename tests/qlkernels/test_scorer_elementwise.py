"""Norm and rotation of the scorer: kernels in Triton's interpreter, transformers, and by hand."""

import math

import pytest
import torch

from qlkernels._target import has_triton
from qlkernels.scorer.elementwise import (
    norm_and_rotate_,
    norm_and_rotate_ref,
    rms_norm,
    rms_norm_ref,
)
from qlkernels.testing import assert_as_accurate

needs_triton = pytest.mark.skipif(not has_triton(), reason="triton is not installed")
IMPLS = [pytest.param("triton", marks=needs_triton), "reference"]
# The interpreter cuts fp32 to bf16 instead of rounding; bf16 kernels run in the tests of a GPU.
PAIRS = [
    pytest.param("triton", torch.float32, marks=needs_triton),
    pytest.param("triton", torch.float16, marks=needs_triton),
    ("reference", torch.float32),
    ("reference", torch.bfloat16),
]


def angles(T, half, dtype):
    found = torch.arange(T)[:, None] * 0.7 ** torch.arange(half)[None]
    return found.cos().to(dtype), found.sin().to(dtype)


@pytest.mark.parametrize("impl, dtype", PAIRS)
@pytest.mark.parametrize("T, H", [(1, 1), (3, 37), (5, 128), (2, 600)])
def test_norm(impl, dtype, T, H):
    torch.manual_seed(T)
    x, weight = 5 * torch.randn(T, H).to(dtype), torch.rand(H).to(dtype)
    actual = rms_norm(x, weight, 1e-6, impl=impl)
    assert actual.dtype == dtype and actual.is_contiguous()
    truth = rms_norm_ref(x.double(), weight.double(), 1e-6)
    assert_as_accurate("norm", actual, truth, rms_norm_ref(x, weight, 1e-6))


@pytest.mark.parametrize("impl, dtype", PAIRS)
@pytest.mark.parametrize("T, N, D", [(1, 1, 2), (3, 5, 8), (17, 4, 32)])
@pytest.mark.parametrize("has_norm", [True, False])
def test_norm_and_rotation(impl, dtype, T, N, D, has_norm):
    torch.manual_seed(T)
    heads, weight = torch.randn(T, N, D).to(dtype), torch.rand(D).to(dtype)
    weight = weight if has_norm else None
    cos, sin = angles(T, D // 2, dtype)
    actual = heads.clone()
    norm_and_rotate_(actual, weight, cos, sin, 1e-6, impl=impl)
    wide = [None if y is None else y.double() for y in (heads, weight, cos, sin)]
    truth = norm_and_rotate_ref(*wide, 1e-6)
    assert_as_accurate("heads", actual, truth, norm_and_rotate_ref(heads, weight, cos, sin, 1e-6))


@pytest.mark.parametrize("impl", IMPLS)
def test_by_hand(impl):
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    normed = rms_norm(x, torch.tensor([1.0, 2.0]), 0.0 + 1e-30, impl=impl)
    torch.testing.assert_close(normed[0], torch.tensor([3.0, 8.0]) / math.sqrt(12.5))
    assert normed[1].tolist() == [0.0, 0.0]
    heads = torch.tensor([[[1.0, 0.0]], [[1.0, 0.0]]])  # turned by 0 and by a quarter
    cos, sin = torch.tensor([[1.0], [0.0]]), torch.tensor([[0.0], [1.0]])
    norm_and_rotate_(heads, None, cos, sin, 1e-6, impl=impl)
    assert heads.flatten().tolist() == [1.0, 0.0, 0.0, 1.0]


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_of_a_wider_tensor(impl):
    wide = torch.randn(4, 20)
    x, weight = wide[:, :10], torch.ones(10)
    torch.testing.assert_close(rms_norm(x, weight, 1e-6, impl=impl), rms_norm_ref(x, weight, 1e-6))


@pytest.mark.parametrize("impl, dtype", PAIRS)
def test_the_roundings_are_those_of_transformers(impl, dtype):
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb

    torch.manual_seed(0)
    T, N, D = 9, 3, 16
    heads = torch.randn(T, N, D).to(dtype)
    norm = Qwen3RMSNorm(D).to(dtype)
    norm.weight.data.uniform_(0.5, 1.5)
    cos, sin = angles(T, D // 2, dtype)
    q = norm(heads).transpose(0, 1)[None]
    twice = (torch.cat([y, y], 1)[None] for y in (cos, sin))
    want = apply_rotary_pos_emb(q, q, *twice)[0][0].transpose(0, 1)
    with torch.no_grad():
        norm_and_rotate_(heads, norm.weight, cos, sin, norm.variance_epsilon, impl=impl)
    if dtype == torch.float32:  # sums in another order
        torch.testing.assert_close(heads, want, atol=1e-6, rtol=0)
    else:
        assert torch.equal(heads, want)


def test_nothing():
    empty = torch.empty(0, 8)
    assert rms_norm(empty, torch.ones(8), 1e-6).shape == (0, 8)
    norm_and_rotate_(empty.view(0, 2, 4), None, torch.empty(0, 2), torch.empty(0, 2), 1e-6)


def test_refusals():
    x = torch.ones(3, 4)
    with pytest.raises(ValueError, match="rms_norm: weight is .* H = 4"):
        rms_norm(x, torch.ones(5), 1e-6)
    with pytest.raises(ValueError, match="contiguous"):
        rms_norm(x.T, torch.ones(3), 1e-6)
    with pytest.raises(ValueError, match="contiguous"):
        norm_and_rotate_(torch.ones(2, 4, 6)[..., :4], None, *angles(2, 2, torch.float32), 1e-6)
    with pytest.raises(ValueError, match="unknown impl"):
        rms_norm(x, torch.ones(4), 1e-6, impl="magic")


@pytest.mark.gpu
@pytest.mark.parametrize("H", [2048, 2560, 5120])
def test_bf16_kernels_on_a_gpu(H):
    torch.manual_seed(0)
    x, weight = torch.randn(1000, H), torch.rand(H)
    x, weight = x.to("cuda", torch.bfloat16), weight.to("cuda", torch.bfloat16)
    truth = rms_norm_ref(x.double(), weight.double(), 1e-6)
    assert_as_accurate("norm", rms_norm(x, weight, 1e-6), truth, rms_norm_ref(x, weight, 1e-6))
    heads, weight = x[:, :2048].reshape(1000, 16, 128).contiguous(), weight[:128]
    cos, sin = (y.cuda() for y in angles(1000, 64, torch.bfloat16))
    want = norm_and_rotate_ref(heads, weight, cos, sin, 1e-6)
    truth = norm_and_rotate_ref(*(y.double() for y in (heads, weight, cos, sin)), 1e-6)
    norm_and_rotate_(heads, weight, cos, sin, 1e-6, impl="triton")
    assert_as_accurate("heads", heads, truth, want)


@pytest.mark.gpu
@pytest.mark.large
def test_offsets_past_2_31():
    """T * H = 2.2e9: the last rows are those of the same rows alone."""
    T, H = 1_050_000, 2048
    x = torch.randn(T, H, dtype=torch.bfloat16, device="cuda")
    weight = torch.ones(H, dtype=torch.bfloat16, device="cuda")
    whole = rms_norm(x, weight, 1e-6)
    assert torch.equal(whole[-5:], rms_norm(x[-5:].clone(), weight, 1e-6))
    del whole
    heads = x.view(T, 16, 128)
    last = heads[-5:].clone()
    cos, sin = (torch.randn(T, 64, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    norm_and_rotate_(last, None, cos[-5:].contiguous(), sin[-5:].contiguous(), 1e-6)
    norm_and_rotate_(heads, None, cos, sin, 1e-6)
    assert torch.equal(heads[-5:], last)
