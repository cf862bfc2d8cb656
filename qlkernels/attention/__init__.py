"""Causal attention over packed sequences, and over groups that share a prompt.

    out_t = sum_s p_ts v_s,  p_t = softmax over the visible s of (scale q_t . k_s)
    dv_s = sum_t p_ts dout_t,  ds_ts = p_ts (dout_t . v_s - delta_t),  delta_t = dout_t . out_t
    dq_t = scale sum_s ds_ts k_s,  dk_s = scale sum_t ds_ts q_t

The kernels are other libraries' (see ``backends``); grouped-query heads stay as they are. In a
shared-prefix layout the prompt's keys are visited once a group, by all answers together:
P^2 / 2 + P sum R_i + sum R_i^2 / 2 products instead of sum (P + R_i)^2 / 2. Memory beyond inputs
and results: one more ``[T, Hq, D]`` and the log-sum-exp ``[Hq, T]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch

from qlkernels import _checks
from qlkernels._nvtx import op_range
from qlkernels.attention import passes
from qlkernels.attention.backends import BACKENDS, Call, choose_backend, why_not
from qlkernels.attention.merge import aot_variants
from qlkernels.attention.reference import attention_ref, prefix_attention_ref
from qlkernels.prefix_group import PackedGroups

# --- custom ops and autograd -------------------------------------------------


def _plan(q, cu_seqlens, max_seqlen, lengths, prompt_lengths, group_rows, backend):
    T, S = len(q), len(cu_seqlens) - 1
    if lengths or T == 0:
        runs = passes.runs_of(tuple(lengths), passes.packs(backend, q))
    else:
        runs = (passes.Run(0, S, 0, T, max_seqlen),)
    return runs, passes.crosses_of(prompt_lengths, group_rows)


@torch.library.custom_op("qlkernels::attention", mutates_args=())
def _op(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    lengths: Sequence[int],
    prompt_lengths: Sequence[int],
    group_rows: Sequence[int],
    scale: float,
    backend: str,
    deterministic: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``lengths`` is empty where the host does not know them; ``prompt_lengths`` and
    ``group_rows`` are empty for plain packed attention.
    """
    plan = _plan(q, cu_seqlens, max_seqlen, lengths, prompt_lengths, group_rows, backend)
    with op_range("prefix_attention" if prompt_lengths else "attention", q):
        return passes.forward(backend, q, k, v, cu_seqlens, *plan, Call(scale, True))


@_op.register_fake
def _(q, k, v, *_args):
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    return out, torch.empty(q.shape[1], q.shape[0], dtype=dtype, device=q.device)


@torch.library.custom_op("qlkernels::attention_bwd", mutates_args=())
def _op_bwd(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    lengths: Sequence[int],
    prompt_lengths: Sequence[int],
    group_rows: Sequence[int],
    scale: float,
    backend: str,
    deterministic: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    plan = _plan(q, cu_seqlens, max_seqlen, lengths, prompt_lengths, group_rows, backend)
    call = Call(scale, True, deterministic=deterministic)
    with op_range("prefix_attention_bwd" if prompt_lengths else "attention_bwd", q):
        return passes.backward(backend, dout, q, k, v, out, lse, cu_seqlens, *plan, call)


@_op_bwd.register_fake
def _(dout, q, k, v, *_args):
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))


def _setup_context(ctx, inputs, output):
    q, k, v, cu_seqlens, *options = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output, cu_seqlens)
    ctx.options = options


def _autograd_backward(ctx, dout, _dlse):
    if dout is None:
        return (None,) * 11
    q, k, v, out, lse, cu_seqlens = ctx.saved_tensors
    grads = torch.ops.qlkernels.attention_bwd(
        dout.contiguous(), q, k, v, out, lse, cu_seqlens, *ctx.options
    )
    return (*grads, *(None,) * 8)


_op.register_autograd(_autograd_backward, setup_context=_setup_context)


def _refuse_double_backward(ctx, *_grads):
    raise RuntimeError(
        "attention: double backward is not supported; use backend='reference' for it"
    )


_op_bwd.register_autograd(_refuse_double_backward)

# --- public ------------------------------------------------------------------


def _checked(op: str, q, k, v, softmax_scale):
    """Operands that fit together, in autocast's dtype inside of it, and the scale as a float."""
    sizes: dict[str, int] = {}
    _checks.check_shape(op, "q", q, "T Hq D", sizes)
    _checks.check_shape(op, "k", k, "T Hkv D", sizes)
    _checks.check_shape(op, "v", v, "T Hkv D", sizes)
    if torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = (x.to(dtype) if x.is_floating_point() else x for x in (q, k, v))
    _checks.check_dtype(op, "q", q, _checks.FLOATS)
    for name, x in (("k", k), ("v", v)):
        _checks.check_dtype(op, name, x, (q.dtype,))
        _checks.check_device(op, name, x, q, "q")
    for name, x in (("q", q), ("k", k), ("v", v)):
        _checks.check_last_dim_contiguous(op, name, x)
    Hq, Hkv, D = sizes["Hq"], sizes["Hkv"], sizes["D"]
    if not Hkv or not Hq or not D or Hq % Hkv:
        raise ValueError(
            f"{op}: q has {Hq} heads of {D} and k has {Hkv}; the number of query heads must be a "
            "multiple of the number of kv heads"
        )
    scale = D**-0.5 if softmax_scale is None else float(softmax_scale)
    _checks.check_positive(op, "softmax_scale", scale)
    return q, k, v, scale


def _host_lengths(op, q, cu_seqlens, max_seqlen, lengths, backend) -> tuple[int, ...]:
    """Lengths on the host, checked where that costs no synchronisation; () where not known."""
    T = len(q)
    is_free = q.device.type == "cpu" and not torch.compiler.is_compiling()  # to read cu_seqlens
    if lengths is not None:
        lengths = tuple(int(n) for n in lengths)
        wrong = len(lengths) != len(cu_seqlens) - 1 or sum(lengths) != T or min(lengths) < 0
        wrong = wrong or (is_free and cu_seqlens.tolist() != [0, *accumulate(lengths)])
    elif max_seqlen == T and len(cu_seqlens) == 2 and not is_free:
        return (T,)
    elif q.is_cuda and passes.BACKENDS[backend].packs and backend != "cudnn":
        return ()
    else:
        offsets = cu_seqlens.tolist()
        lengths = tuple(b - a for a, b in zip(offsets, offsets[1:], strict=False))
        wrong = offsets[0] != 0 or offsets[-1] != T or min(lengths) < 0
    if wrong:
        raise ValueError(
            f"{op}: cu_seqlens must rise from 0 to T = {T}, one segment a step; its lengths are "
            f"{lengths[:8]}{'...' if len(lengths) > 8 else ''}"
        )
    if max(lengths) > max_seqlen:
        raise ValueError(f"{op}: max_seqlen is {max_seqlen}, but a sequence has {max(lengths)}")
    return lengths


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    lengths: Sequence[int] | None = None,
    softmax_scale: float | None = None,
    backend: str = "auto",
    deterministic: bool = True,
) -> torch.Tensor:
    """Causal attention of packed sequences.

    Args:
        q: ``[T, Hq, D]`` bf16, fp16, fp32 or fp64, any row and head stride, last dim contiguous.
        k, v: ``[T, Hkv, D]``, dtype of ``q``; Hkv divides Hq and no head has to be repeated.
        cu_seqlens: ``[B + 1]`` int32, from 0 to T. Sequences may be empty.
        max_seqlen: length of the longest sequence.
        lengths: the B lengths on the host. Backends that run sequences one by one (``"cudnn"`` and
            ``"torch"``) read ``cu_seqlens`` back from the GPU without it.
        softmax_scale: positive; None for ``D ** -0.5``.
        backend: as in :func:`choose_backend`, or ``"reference"``; a name never falls back.
        deterministic: repeat the bits of the backward. False lets it use atomics, which is faster;
            ``"cudnn"`` then runs its own backward instead of torch's flash kernel.

    Returns:
        ``[T, Hq, D]``, dtype of ``q``. Differentiable with respect to q, k and v.
    """
    op = "attention"
    q, k, v, scale = _checked(op, q, k, v, softmax_scale)
    _checks.check_shape(op, "cu_seqlens", cu_seqlens, "B", {})
    _checks.check_dtype(op, "cu_seqlens", cu_seqlens, (torch.int32,))
    _checks.check_device(op, "cu_seqlens", cu_seqlens, q, "q")
    if len(cu_seqlens) < 2:
        raise ValueError(f"{op}: cu_seqlens must be [B + 1] with B >= 1, got {len(cu_seqlens)}")
    if backend == "reference":
        return attention_ref(q, k, v, cu_seqlens=cu_seqlens, softmax_scale=scale)
    backend = choose_backend(q.device, q.dtype, q.shape[2], backend=backend)
    lengths = _host_lengths(op, q, cu_seqlens, max_seqlen, lengths, backend)
    cu_seqlens = cu_seqlens.contiguous()
    return _op(q, k, v, cu_seqlens, max_seqlen, lengths, (), (), scale, backend, deterministic)[0]


def prefix_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: PackedGroups,
    *,
    softmax_scale: float | None = None,
    backend: str = "auto",
    deterministic: bool = True,
) -> torch.Tensor:
    """Attention of packed groups: prefixes causally, answers to their prefix and to themselves.

    Every row sees what it would see in its full sequence (prompt and answer).

    Args:
        q: ``[T, Hq, D]`` as in :func:`attention`, rows as in ``layout``.
        k, v: ``[T, Hkv, D]``.
        layout: from :func:`qlkernels.pack_groups`, on the device of ``q``.
        softmax_scale: positive; None for ``D ** -0.5``.
        backend: as in :func:`choose_backend`, or ``"reference"``; a name never falls back.
        deterministic: as in :func:`attention`.

    Returns:
        ``[T, Hq, D]``, dtype of ``q``. Differentiable with respect to q, k and v; the gradient of
        a prefix's keys and values sums the shares of the prefix and of all its answers.
    """
    op = "prefix_attention"
    q, k, v, scale = _checked(op, q, k, v, softmax_scale)
    if not isinstance(layout, PackedGroups):
        raise TypeError(f"{op}: layout must come from pack_groups, got {type(layout).__name__}")
    if len(q) != len(layout.input_ids):
        raise ValueError(f"{op}: q has {len(q)} rows, but the layout {len(layout.input_ids)}")
    if layout.device != q.device:
        raise ValueError(
            f"{op}: the layout is on {layout.device}, but q is on {q.device}; move it with "
            "layout.to(q.device)"
        )
    if backend == "reference":
        return prefix_attention_ref(q, k, v, layout, softmax_scale=scale)
    backend = choose_backend(q.device, q.dtype, q.shape[2], backend=backend)
    prompts, answers = layout.prompt_lengths, layout.answer_lengths
    lengths = [n for P, group in zip(prompts, answers, strict=True) for n in (P - 1, *group)]
    return _op(
        q, k, v, layout.cu_seqlens, layout.max_seqlen, lengths, prompts,
        [sum(group) for group in answers], scale, backend, deterministic,
    )[0]  # fmt: skip
