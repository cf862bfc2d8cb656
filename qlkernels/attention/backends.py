"""Attention kernels of other libraries behind one signature.

A backend runs a *call*: either one block of queries against one block of keys (``cu_seqlens`` is
None; causal only with as many keys as queries), or several packed sequences, causal, each with
itself. Everything returns the log-sum-exp of the scaled scores, and a backward takes ``out`` and
``lse`` as arguments: those of a softmax over more keys than the call has are just as good, which is
what lets parts be merged.

    forward(q, k, v, call) -> out [N, Hq, D], lse [Hq, N]
    backward(dout, q, k, v, out, lse, call) -> dq, dk, dv

q is ``[N, Hq, D]``, k and v ``[M, Hkv, D]``, last dim contiguous; no head is repeated in memory.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from qlkernels._target import compute_capability

aten = torch.ops.aten
HALVES = (torch.bfloat16, torch.float16)


class Call(NamedTuple):
    """What a backend is asked to compute."""

    scale: float
    causal: bool
    cu_seqlens: torch.Tensor | None = None  # [B + 1] int32; None: one block
    max_seqlen: int = 0  # with cu_seqlens
    deterministic: bool = True  # of the backward


class Backend(NamedTuple):
    why_not: Callable  # (device, dtype, D) -> reason or None
    forward: Callable
    backward: Callable
    packs: bool = True  # runs several sequences in one call on a GPU; else they come one by one


def _why_not_half_cuda(device: torch.device, dtype: torch.dtype, D: int, largest: int):
    if device.type != "cuda":
        return f"it needs tensors on a CUDA device, got {device}"
    if dtype not in HALVES:
        return f"it needs bfloat16 or float16, got {str(dtype).removeprefix('torch.')}"
    if D % 8 or D > largest:
        return f"it needs a head_dim of at most {largest} that 8 divides, got {D}"
    if compute_capability(device.index or 0) < 80:
        return f"it needs compute capability 8.0, this device is below ({device})"
    return None


@functools.cache
def _import_error(module: str, *names: str) -> str | None:
    """Why ``module`` with ``names`` cannot be used, or None. Imports it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = importlib.import_module(module)
    except Exception as error:  # a broken build of a compiled package raises anything
        return f"{type(error).__name__}: {error}"
    missing = [name for name in names if not hasattr(found, name)]
    return f"{module} has no {', '.join(missing)} (another version?)" if missing else None


# --- torch: the flash kernels that every build of it has --------------------------


def _why_not_sdpa(device, dtype, D):
    if device.type != "cpu":
        return _why_not_half_cuda(device, dtype, D, largest=256)
    if dtype not in (*HALVES, torch.float32, torch.float64):
        return f"it has no kernel for {dtype}"
    return None


def _blocks(*tensors):
    """``[N, H, D]`` -> ``[1, H, N, D]``, as views."""
    return tuple(x.transpose(0, 1).unsqueeze(0) for x in tensors)


def _on_cpu(*tensors):
    """In fp32 where they are halves: the CPU kernel adds its gradients up in their own dtype."""
    return _blocks(*(x.to(torch.promote_types(x.dtype, torch.float32)) for x in tensors))


def _sdpa_forward(q, k, v, call):
    if q.device.type == "cpu":
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
            *_on_cpu(q, k, v), 0.0, call.causal, scale=call.scale
        )
        return out[0].transpose(0, 1).to(q.dtype), lse[0]
    if call.cu_seqlens is None:
        found = aten._flash_attention_forward(
            q[None], k[None], v[None], None, None, len(q), len(k), 0.0, call.causal, False,
            scale=call.scale,
        )  # fmt: skip
        return found[0][0], found[1][0]
    cu, longest = call.cu_seqlens, call.max_seqlen
    found = aten._flash_attention_forward(
        q, k, v, cu, cu, longest, longest, 0.0, call.causal, False, scale=call.scale
    )
    return found[0], found[1]


def _sdpa_backward(dout, q, k, v, out, lse, call):
    if q.device.type == "cpu":
        grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *_on_cpu(dout, q, k, v, out), lse[None], 0.0, call.causal, scale=call.scale
        )
        return tuple(g[0].transpose(0, 1).to(q.dtype) for g in grads)
    # without dropout the random state is not read
    state, unused = (torch.empty(n, dtype=torch.uint64, device=q.device) for n in (2, 0))
    cu, longest = call.cu_seqlens, call.max_seqlen
    with _deterministic_kernels(call.deterministic):
        if cu is None:
            grads = aten._flash_attention_backward(
                dout[None], q[None], k[None], v[None], out[None], lse[None], None, None,
                len(q), len(k), 0.0, call.causal, state, unused, scale=call.scale,
            )  # fmt: skip
            return tuple(g[0] for g in grads)
        return aten._flash_attention_backward(
            dout, q, k, v, out, lse, cu, cu, longest, longest, 0.0, call.causal, state, unused,
            scale=call.scale,
        )  # fmt: skip


@contextlib.contextmanager
def _deterministic_kernels(wanted: bool) -> Iterator[None]:
    """torch's flash backward adds dq with atomics unless its global switch is on, without the
    warning-only mode. Uninitialised memory is not filled: the kernels write all of theirs.
    """
    was = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    if not wanted or (was and not warn_only):
        yield
        return
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill


# --- cuDNN ------------------------------------------------------------------------

# cuDNN builds a plan for every new pair of lengths, which takes longer than a short call saves
_CUDNN_ROWS = 1024


def _why_not_cudnn(device, dtype, D):
    why = _why_not_half_cuda(device, dtype, D, largest=128)
    if why is not None:
        return why
    if not torch.backends.cudnn.is_available():
        return "torch was built without cuDNN"
    if torch.backends.cudnn.version() < 90000:
        return f"it needs cuDNN 9, got {torch.backends.cudnn.version()}"
    if compute_capability(device.index or 0) < 90:
        return "its fast kernels are for compute capability 9.0 and later"
    return None


def _suits_cudnn(q, k, call) -> bool:
    return call.cu_seqlens is None and min(len(q), len(k)) >= _CUDNN_ROWS


def _cudnn_forward(q, k, v, call):
    if not _suits_cudnn(q, k, call):
        return _sdpa_forward(q, k, v, call)
    found = aten._scaled_dot_product_cudnn_attention(
        *_blocks(q, k, v), None, True, 0.0, call.causal, False, scale=call.scale
    )
    return found[0][0].transpose(0, 1), found[1].reshape(q.shape[1], len(q))


@functools.cache
def _cudnn_lse_dims(device: torch.device) -> int:
    """3 or 4: versions of torch differ in whether the statistics end in a dim of 1."""
    x = torch.zeros(1, 1, 128, 64, dtype=torch.bfloat16, device=device)
    return aten._scaled_dot_product_cudnn_attention(x, x, x, None, True)[1].dim()


def _cudnn_backward(dout, q, k, v, out, lse, call):
    # torch offers no repeatable form of cuDNN's backward
    if call.deterministic or not _suits_cudnn(q, k, call):
        return _sdpa_backward(dout, q, k, v, out, lse, call)
    lse = lse.contiguous()[None]
    if _cudnn_lse_dims(q.device) == 4:
        lse = lse[..., None]
    seed, offset = (torch.zeros((), dtype=torch.int64, device=q.device) for _ in range(2))
    grads = aten._scaled_dot_product_cudnn_attention_backward(
        *_blocks(dout, q, k, v, out), lse, seed, offset, None, None, None,
        len(q), len(k), 0.0, call.causal, scale=call.scale,
    )  # fmt: skip
    return tuple(g[0].transpose(0, 1) for g in grads)


# --- flash-attn 2, 3 and 4 --------------------------------------------------------


def _why_not_flash_2(device, dtype, D):
    why = _why_not_half_cuda(device, dtype, D, largest=256)
    return why or _import_error(
        "flash_attn.flash_attn_interface",
        "_flash_attn_forward", "_flash_attn_backward",
        "_flash_attn_varlen_forward", "_flash_attn_varlen_backward",
    )  # fmt: skip


def _flash_2_forward(q, k, v, call):
    flash = importlib.import_module("flash_attn.flash_attn_interface")
    options = dict(
        dropout_p=0.0, softmax_scale=call.scale, causal=call.causal, window_size_left=-1,
        window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False,
    )  # fmt: skip
    if call.cu_seqlens is None:
        out, lse, *_ = flash._flash_attn_forward(q[None], k[None], v[None], **options)
        return out[0], lse[0]
    cu, longest = call.cu_seqlens, call.max_seqlen
    return flash._flash_attn_varlen_forward(q, k, v, cu, cu, longest, longest, **options)[:2]


def _flash_2_backward(dout, q, k, v, out, lse, call):
    flash = importlib.import_module("flash_attn.flash_attn_interface")
    grads = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    options = dict(
        dropout_p=0.0, softmax_scale=call.scale, causal=call.causal, window_size_left=-1,
        window_size_right=-1, softcap=0.0, alibi_slopes=None, deterministic=call.deterministic,
    )  # fmt: skip
    tensors = (dout, q, k, v, out, lse)
    if call.cu_seqlens is None:
        flash._flash_attn_backward(*(x[None] for x in (*tensors, *grads)), **options)
    else:
        cu, longest = call.cu_seqlens, call.max_seqlen
        flash._flash_attn_varlen_backward(*tensors, *grads, cu, cu, longest, longest, **options)
    return grads


def _why_not_flash_3(device, dtype, D):
    why = _why_not_half_cuda(device, dtype, D, largest=256)
    if why is None and compute_capability(device.index or 0) // 10 != 9:
        why = "it is built for compute capability 9.0"
    return why or _import_error(
        "flash_attn_interface", "_flash_attn_forward", "_flash_attn_backward"
    )


def _lengths_3_4(call) -> dict:
    """The packed lengths, as flash-attn 3 and 4 name them."""
    if call.cu_seqlens is None:
        return {}
    return dict(
        cu_seqlens_q=call.cu_seqlens, cu_seqlens_k=call.cu_seqlens,
        max_seqlen_q=call.max_seqlen, max_seqlen_k=call.max_seqlen,
    )  # fmt: skip


def _flash_3_forward(q, k, v, call):
    flash = importlib.import_module("flash_attn_interface")
    options = dict(softmax_scale=call.scale, causal=call.causal) | _lengths_3_4(call)
    if call.cu_seqlens is None:
        out, lse, *_ = flash._flash_attn_forward(q[None], k[None], v[None], **options)
        return out[0], lse[0]
    return flash._flash_attn_forward(q, k, v, **options)[:2]


def _flash_3_backward(dout, q, k, v, out, lse, call):
    flash = importlib.import_module("flash_attn_interface")
    grads = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    options = dict(softmax_scale=call.scale, is_causal=call.causal) | _lengths_3_4(call)
    tensors, into = (dout, q, k, v, out, lse), dict(zip(("dq", "dk", "dv"), grads, strict=True))
    if call.cu_seqlens is None:
        tensors = tuple(x[None] for x in tensors)
        into = {name: x[None] for name, x in into.items()}
    flash._flash_attn_backward(*tensors, **into, deterministic=call.deterministic, **options)
    return grads


def _why_not_flash_4(device, dtype, D):
    why = _why_not_half_cuda(device, dtype, D, largest=256)
    if why is not None:
        return why
    generation = compute_capability(device.index or 0) // 10
    if generation not in (9, 10, 11):
        return "it is built for compute capability 9.0 to 11.0"
    if generation > 9 and D > 128 and D != 256:
        return f"on this card it needs a head_dim of at most 128, or 256, got {D}"
    return _import_error("flash_attn.cute.interface", "_flash_attn_fwd", "_flash_attn_bwd")


def _flash_4_forward(q, k, v, call):
    flash = importlib.import_module("flash_attn.cute.interface")
    options = dict(softmax_scale=call.scale, causal=call.causal, return_lse=True)
    if call.cu_seqlens is None:
        out, lse, *_ = flash._flash_attn_fwd(q[None], k[None], v[None], **options)
        return out[0], lse[0]
    return flash._flash_attn_fwd(q, k, v, **options, **_lengths_3_4(call))[:2]


def _flash_4_backward(dout, q, k, v, out, lse, call):
    flash = importlib.import_module("flash_attn.cute.interface")
    options = dict(
        softmax_scale=call.scale, causal=call.causal, deterministic=call.deterministic
    ) | _lengths_3_4(call)
    if call.cu_seqlens is None:
        grads = flash._flash_attn_bwd(*(x[None] for x in (q, k, v, out, dout, lse)), **options)
        return tuple(g[0] for g in grads)
    return flash._flash_attn_bwd(q, k, v, out, dout, lse, **options)


# --- torch, by matrix products ----------------------------------------------------

# Scores that the products below hold at a time, in fp32 (or fp64)
_SCORE_BYTES = 256 << 20


def _why_not_torch(device, dtype, D):
    return None


def _row_chunks(q, k):
    rows = max(1, _SCORE_BYTES // max(1, q.shape[1] * len(k) * 4))
    return [slice(start, min(len(q), start + rows)) for start in range(0, len(q), rows)]


def _heads_first(x, Hkv: int, dtype):
    """``[N, H, D]`` -> ``[Hkv, (H / Hkv) * N, D]``: the query heads of a kv head lie together."""
    N, H, D = x.shape
    return x.to(dtype).view(N, Hkv, H // Hkv, D).permute(1, 2, 0, 3).reshape(Hkv, -1, D)


def _rows_first(x, N: int):
    """Inverse of :func:`_heads_first`."""
    Hkv, _, D = x.shape
    return x.view(Hkv, -1, N, D).permute(2, 0, 1, 3).reshape(N, -1, D)


def _chunk_scores(q, k_t, rows, call):
    """Scaled scores ``[Hkv, heads * n, M]`` of the rows of a chunk; k_t is ``[Hkv, D, M]``."""
    scores = torch.bmm(_heads_first(q[rows], k_t.shape[0], k_t.dtype), k_t).mul_(call.scale)
    if call.causal:
        n, M = rows.stop - rows.start, k_t.shape[2]
        at = torch.arange(rows.start, rows.stop, device=q.device)[:, None]
        hidden = torch.arange(M, device=q.device) > at  # [n, M]
        scores.view(k_t.shape[0], -1, n, M).masked_fill_(hidden, -torch.inf)
    return scores


def _torch_forward(q, k, v, call):
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    (N, Hq, D), Hkv = q.shape, k.shape[1]
    k_t, v_h = k.to(dtype).permute(1, 2, 0), v.to(dtype).transpose(0, 1)
    out = torch.empty(N, Hq, D, dtype=q.dtype, device=q.device)
    lse = torch.empty(Hq, N, dtype=dtype, device=q.device)
    for rows in _row_chunks(q, k):
        scores = _chunk_scores(q, k_t, rows, call)
        part = scores.logsumexp(dim=2)  # [Hkv, heads * n]
        n = rows.stop - rows.start
        out[rows] = _rows_first(torch.bmm(scores.sub_(part[:, :, None]).exp_(), v_h), n)
        lse[:, rows] = part.view(Hkv, -1, n).flatten(0, 1)
    return out, lse


def _torch_backward(dout, q, k, v, out, lse, call):
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    Hkv = k.shape[1]
    k_t, v_t = (x.to(dtype).permute(1, 2, 0) for x in (k, v))  # [Hkv, D, M]
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dk, dv = (torch.zeros(Hkv, len(k), q.shape[2], dtype=dtype, device=q.device) for _ in "kv")
    for rows in _row_chunks(q, k):
        n = rows.stop - rows.start
        p = _chunk_scores(q, k_t, rows, call)
        p.sub_(lse[:, rows].reshape(Hkv, -1, 1)).exp_()  # [Hkv, heads * n, M]
        g = _heads_first(dout[rows], Hkv, dtype)
        delta = (g * _heads_first(out[rows], Hkv, dtype)).sum(dim=2, keepdim=True)
        dv.baddbmm_(p.transpose(1, 2), g)
        ds = p.mul_(torch.bmm(g, v_t).sub_(delta)).mul_(call.scale)
        dk.baddbmm_(ds.transpose(1, 2), _heads_first(q[rows], Hkv, dtype))
        dq[rows] = _rows_first(torch.bmm(ds, k_t.transpose(1, 2)), n).to(q.dtype)
    return dq, dk.transpose(0, 1).to(k.dtype), dv.transpose(0, 1).to(v.dtype)


# Fastest first on an H100 (causal, heads of 128, 32K tokens); `python -m bench attention` measures
# those that are installed. inference: flash-attn 3's place was not measured.
BACKENDS: dict[str, Backend] = {
    "flash-attn-4": Backend(_why_not_flash_4, _flash_4_forward, _flash_4_backward),
    "flash-attn-3": Backend(_why_not_flash_3, _flash_3_forward, _flash_3_backward),
    "cudnn": Backend(_why_not_cudnn, _cudnn_forward, _cudnn_backward),
    "flash-attn-2": Backend(_why_not_flash_2, _flash_2_forward, _flash_2_backward),
    "sdpa": Backend(_why_not_sdpa, _sdpa_forward, _sdpa_backward),
    "torch": Backend(_why_not_torch, _torch_forward, _torch_backward, packs=False),
}


def why_not(backend: str, device: torch.device | str, dtype: torch.dtype, head_dim: int):
    """Why ``backend`` cannot run attention of this kind here, as a sentence, or None if it can."""
    if backend not in BACKENDS:
        raise ValueError(
            f"attention: unknown backend {backend!r}; choose 'auto', 'reference' or one of "
            f"{list(BACKENDS)}"
        )
    return BACKENDS[backend].why_not(torch.device(device), dtype, head_dim)


def choose_backend(
    device: torch.device | str, dtype: torch.dtype, head_dim: int, *, backend: str = "auto"
) -> str:
    """The backend that attention of this kind will run on.

    Args:
        device: where q, k and v lie.
        dtype: of q, k and v.
        head_dim: D.
        backend: ``"auto"`` for the fastest that can run here, or a name, which runs or raises.

    Returns:
        One of ``"flash-attn-4"``, ``"flash-attn-3"``, ``"cudnn"``, ``"flash-attn-2"``, ``"sdpa"``
        (torch's own flash kernel, on GPU and CPU), ``"torch"`` (matrix products in chunks, for
        what no kernel covers, such as fp32 on a GPU).
    """
    if backend == "auto":
        return next(n for n in BACKENDS if why_not(n, device, dtype, head_dim) is None)
    why = why_not(backend, device, dtype, head_dim)
    if why is not None:
        raise RuntimeError(f"attention: backend={backend!r} cannot run here: {why}")
    return backend
