"""Which backend runs, what it is handed, and every one of them on a GPU."""

import math
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from qlkernels import prefix_attention
from qlkernels.attention import backends, passes
from qlkernels.attention.backends import BACKENDS, Call, choose_backend, why_not
from qlkernels.testing import outputs_and_grads
from tests.qlkernels.attention_cases import (
    check_groups,
    check_merge,
    check_packed,
    cuda_or_skip,
    layout_of,
    make,
    name_of,
)  # fmt: skip

# --- backends ----------------------------------------------------------------------


def test_the_choice_is_reported():
    assert choose_backend("cpu", torch.float32, 64) == "sdpa"
    assert choose_backend("cpu", torch.float32, 64, backend="torch") == "torch"
    for name in ("flash-attn-4", "flash-attn-3", "cudnn", "flash-attn-2"):
        assert "needs tensors on a CUDA device" in why_not(name, "cpu", torch.bfloat16, 64)
        with pytest.raises(RuntimeError, match=f"backend='{name}' cannot run here: it needs"):
            choose_backend("cpu", torch.bfloat16, 64, backend=name)
    assert why_not("sdpa", "cpu", torch.float32, 64) is None
    with pytest.raises(ValueError, match="unknown backend 'flash'.*flash-attn-4"):
        choose_backend("cpu", torch.float32, 64, backend="flash")


def test_reasons_on_a_gpu(monkeypatch):
    monkeypatch.setattr(backends, "compute_capability", lambda _index: 80)
    assert "bfloat16 or float16" in why_not("sdpa", "cuda", torch.float32, 64)
    assert "at most 128" in why_not("cudnn", "cuda", torch.bfloat16, 256)
    assert "that 8 divides, got 20" in why_not("sdpa", "cuda", torch.bfloat16, 20)
    assert "9.0" in why_not("flash-attn-3", "cuda", torch.bfloat16, 64)
    assert "9.0" in why_not("flash-attn-4", "cuda", torch.bfloat16, 64)
    assert why_not("sdpa", "cuda", torch.bfloat16, 256) is None
    assert choose_backend("cuda", torch.float32, 64) == "torch"
    monkeypatch.setattr(backends, "compute_capability", lambda _index: 100)
    assert "at most 128, or 256" in why_not("flash-attn-4", "cuda", torch.bfloat16, 192)
    monkeypatch.setattr(backends, "compute_capability", lambda _index: 70)
    assert "8.0" in why_not("sdpa", "cuda", torch.bfloat16, 64)


def test_a_package_that_does_not_import_is_a_reason(monkeypatch):
    monkeypatch.setattr(backends, "compute_capability", lambda _index: 90)
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    backends._import_error.cache_clear()
    assert "flash_attn" in why_not("flash-attn-2", "cuda", torch.bfloat16, 64)
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(__path__=[]))
    monkeypatch.setitem(sys.modules, "flash_attn.cute", SimpleNamespace(__path__=[]))
    older = SimpleNamespace(_flash_attn_fwd=None)
    monkeypatch.setitem(sys.modules, "flash_attn.cute.interface", older)
    backends._import_error.cache_clear()
    assert "no _flash_attn_bwd" in why_not("flash-attn-4", "cuda", torch.bfloat16, 64)
    backends._import_error.cache_clear()


class Fakes:
    """flash-attn's entry points with the argument names of its versions, computed by products.

    They take what the real ones take: batched ``[1, N, H, D]``, or packed with offsets.
    """

    @staticmethod
    def call(scale, causal, q, cu):
        if cu is not None:
            return [slice(a, b) for a, b in zip(cu, cu[1:], strict=False)], Call(scale, causal)
        assert q.dim() == 4 and len(q) == 1
        return None, Call(scale, causal)

    @classmethod
    def run(cls, q, k, v, scale, causal, cu=None):
        parts, call = cls.call(scale, causal, q, None if cu is None else cu.tolist())
        if parts is None:
            out, lse = BACKENDS["torch"].forward(q[0], k[0], v[0], call)
            return out[None], lse[None]
        found = [BACKENDS["torch"].forward(q[p], k[p], v[p], call) for p in parts]
        return torch.cat([o for o, _ in found]), torch.cat([s for _, s in found], dim=1)

    @classmethod
    def run_back(cls, dout, q, k, v, out, lse, grads, scale, causal, cu=None):
        parts, call = cls.call(scale, causal, q, None if cu is None else cu.tolist())
        back = BACKENDS["torch"].backward
        if parts is None:
            found = [g[None] for g in back(*(x[0] for x in (dout, q, k, v, out, lse)), call)]
        else:
            found = [
                back(dout[p], q[p], k[p], v[p], out[p], lse[:, p], call) for p in parts
            ]  # fmt: skip
            found = [torch.cat(g) for g in zip(*found, strict=True)]
        for into, g in zip(grads, found, strict=True):
            into.copy_(g)
        return tuple(grads)


def fake_flash_2():
    def forward(q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right,
                softcap, alibi_slopes, return_softmax):  # fmt: skip
        assert dropout_p == softcap == 0.0 and window_size_left == window_size_right == -1
        assert alibi_slopes is None and not return_softmax
        return *Fakes.run(q, k, v, softmax_scale, causal), None, None

    def varlen_forward(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
                       softmax_scale, causal, window_size_left, window_size_right, softcap,
                       alibi_slopes, return_softmax):  # fmt: skip
        assert max_seqlen_q == max_seqlen_k == cu_seqlens_q.diff().max()
        return *Fakes.run(q, k, v, softmax_scale, causal, cu_seqlens_k), None, None

    def backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal,
                 window_size_left, window_size_right, softcap, alibi_slopes,
                 deterministic):  # fmt: skip
        assert deterministic
        grads = (dq, dk, dv)
        Fakes.run_back(dout, q, k, v, out, softmax_lse, grads, softmax_scale, causal)

    def varlen_backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k,
                        max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
                        window_size_left, window_size_right, softcap, alibi_slopes,
                        deterministic):  # fmt: skip
        assert deterministic and softmax_lse.is_contiguous()
        Fakes.run_back(
            dout, q, k, v, out, softmax_lse, (dq, dk, dv), softmax_scale, causal, cu_seqlens_q
        )

    return SimpleNamespace(
        _flash_attn_forward=forward, _flash_attn_varlen_forward=varlen_forward,
        _flash_attn_backward=backward, _flash_attn_varlen_backward=varlen_backward,
    )  # fmt: skip


def fake_flash_3():
    def forward(q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None,
                max_seqlen_k=None, softmax_scale=None, causal=False):  # fmt: skip
        return *Fakes.run(q, k, v, softmax_scale, causal, cu_seqlens_q), None, None

    def backward(dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None,
                 max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None,
                 softmax_scale=None, is_causal=False, deterministic=False):  # fmt: skip
        assert deterministic
        Fakes.run_back(
            dout, q, k, v, out, softmax_lse, (dq, dk, dv), softmax_scale, is_causal, cu_seqlens_k
        )

    return SimpleNamespace(_flash_attn_forward=forward, _flash_attn_backward=backward)


def fake_flash_4():
    def forward(q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None,
                max_seqlen_k=None, softmax_scale=None, causal=False,
                return_lse=False):  # fmt: skip
        assert return_lse
        return *Fakes.run(q, k, v, softmax_scale, causal, cu_seqlens_q), None, None, None

    def backward(q, k, v, out, dout, lse, softmax_scale=None, causal=False, cu_seqlens_q=None,
                 cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
                 deterministic=False):  # fmt: skip
        assert deterministic and (lse.dim() == 3) == (cu_seqlens_q is None)
        grads = tuple(torch.empty_like(x) for x in (q, k, v))
        return Fakes.run_back(dout, q, k, v, out, lse, grads, softmax_scale, causal, cu_seqlens_k)

    return SimpleNamespace(_flash_attn_fwd=forward, _flash_attn_bwd=backward)


@pytest.mark.parametrize(
    "backend, module, fake",
    [
        ("flash-attn-2", "flash_attn.flash_attn_interface", fake_flash_2),
        ("flash-attn-3", "flash_attn_interface", fake_flash_3),
        ("flash-attn-4", "flash_attn.cute.interface", fake_flash_4),
    ],
)
def test_what_flash_attn_is_handed(monkeypatch, backend, module, fake):
    """Packed runs, single blocks and prefixes reach the package as its signatures want them."""
    parents = module.split(".")[:-1]
    for i in range(len(parents)):
        name = ".".join(parents[: i + 1])
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(__path__=[]))
    monkeypatch.setitem(sys.modules, module, fake())
    monkeypatch.setattr(backends, "why_not", lambda *_: None)
    monkeypatch.setattr(passes, "packs", lambda *_: True)  # as on a GPU
    monkeypatch.setattr(passes, "_LONG", 6)  # so that some segments count as long
    passes.runs_of.cache_clear()
    layout = layout_of([9, 4, 1], [[2, 0, 3, 1], [7, 2], [3]])
    check_groups(layout, *make(len(layout.input_ids), 4, 2, 8), backend=backend)
    check_packed((2, 3, 8, 1), *make(14, 4, 2, 8), backend=backend)
    check_packed((14,), *make(14, 4, 2, 8), backend=backend)
    passes.runs_of.cache_clear()


# --- on a GPU ----------------------------------------------------------------------

GPU_BACKENDS = list(BACKENDS)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", GPU_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
@pytest.mark.parametrize("Hq, Hkv, D", [(8, 2, 128), (4, 4, 64), (4, 1, 256)])
def test_gpu_groups(backend, dtype, Hq, Hkv, D):
    cuda_or_skip(backend, dtype, D)
    for prompts, answers in (([1500], [[1100, 300]]), ([130, 1, 2], [[0, 65, 1], [200], [3, 129]])):
        layout = layout_of(prompts, answers).to("cuda")
        inputs, upstream = make(len(layout.input_ids), Hq, Hkv, D, dtype, "cuda")
        check_groups(layout, inputs, upstream, backend=backend)
        check_groups(layout, inputs, upstream, backend=backend, deterministic=False)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", GPU_BACKENDS)
@pytest.mark.parametrize("lengths", [(1,), (2049,), (1300, 0, 3, 1025, 127)], ids=str)
def test_gpu_packed(backend, lengths):
    cuda_or_skip(backend, torch.bfloat16, 128)
    inputs, upstream = make(sum(lengths), 8, 2, 128, torch.bfloat16, "cuda")
    check_packed(lengths, inputs, upstream, backend=backend)
    check_packed(
        lengths, inputs, upstream, backend=backend, lengths=lengths, deterministic=False
    )  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_gpu_long_and_short_segments(backend):
    """A prefix that runs by itself beside packed answers, in heads-first memory."""
    cuda_or_skip(backend, torch.bfloat16, 64)
    layout = layout_of([4200, 50], [[300, 0, 17], [5, 9]]).to("cuda")
    inputs, upstream = make(len(layout.input_ids), 2, 1, 64, torch.bfloat16, "cuda")
    strided = {
        n: x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
        for n, x in inputs.items()
    }
    check_groups(layout, strided, upstream, backend=backend)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_gpu_same_input_same_bits(backend):
    cuda_or_skip(backend, torch.bfloat16, 128)
    layout = layout_of([6000], [[500] * 4]).to("cuda")
    inputs, upstream = make(len(layout.input_ids), 8, 2, 128, torch.bfloat16, "cuda")
    op = partial(prefix_attention, layout=layout, backend=backend)
    first, second = (outputs_and_grads(op, inputs, upstream) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.gpu
def test_gpu_fp32():
    cuda_or_skip("torch", torch.float32, 64)
    layout = layout_of([700, 1], [[50, 0, 17], [5, 9]]).to("cuda")
    assert choose_backend("cuda", torch.float32, 64) == "torch"
    inputs, upstream = make(len(layout.input_ids), 4, 2, 64, torch.float32, "cuda")
    check_groups(layout, inputs, upstream)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("N, Hq, D", [(1, 1, 64), (33, 8, 128), (257, 3, 80), (64, 2, 256)])
def test_gpu_merge_kernel(N, Hq, D, dtype):
    cuda_or_skip("torch", dtype, D)
    check_merge(N, Hq, D, dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_gpu_memory_is_linear(backend):
    """No head is repeated and nothing of size P x R exists: 268 MB of bf16 would be one head's."""
    cuda_or_skip(backend, torch.bfloat16, 128)
    if backend == "torch":
        pytest.skip("its chunks of scores have a budget of their own")
    P, R, G = 32768, 512, 8
    layout = layout_of([P], [[R] * G]).to("cuda")
    T = len(layout.input_ids)
    q, k, v = (torch.randn(T, H, 128, device="cuda", dtype=torch.bfloat16) for H in (16, 4, 4))
    prefix_attention(q, k, v, layout, backend=backend)  # workspaces of first use
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = prefix_attention(q, k, v, layout, backend=backend)
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before - out.numel() * 2
    # the part before it is copied, the log-sum-exp, and as much again for the kernel's workspace
    assert extra <= 2 * (out.numel() * 2 + 16 * T * 4), extra
    assert math.isfinite(float(out.float().abs().max()))
