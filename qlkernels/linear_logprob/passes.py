"""Forward and backward of each implementation, on packed rows without masks."""

from __future__ import annotations

from contextlib import contextmanager

import torch

from qlkernels import _ext, _rows
from qlkernels._target import is_interpreting
from qlkernels._triton import cdiv
from qlkernels.linear_logprob.kernels import (
    FOLD_CONFIG,
    MERGE_CONFIG,
    TARGET_CONFIG,
    dlogits_config,
    dlogits_kernel,
    fold_kernel,
    launch_options,
    merge_kernel,
    precision,
    target_logit_kernel,
    tile_sizes,
    uses_tma,
)

# Temporaries at a time where chunk_tokens is not given: a [chunk_tokens, V] block of 2-byte values
# on the GPU, of 4-byte values on the CPU.
GPU_WORKSPACE_BYTES = 512 << 20
CPU_WORKSPACE_BYTES = 64 << 20
# Columns of dR at a time on the GPU, however many rows there are: each block of them reads and
# writes the fp32 dx once, which with fewer takes longer than its product hides.
LEAST_COLUMNS = 4096


class Options:
    """What both passes of one call share. ``temperature`` is a float or fp32 ``[T]``."""

    def __init__(self, temperature, logit_scale, softcap, chunk_tokens, compact, impl):
        self.temperature = temperature
        self.logit_scale = logit_scale
        self.softcap = softcap
        self.chunk_tokens = chunk_tokens
        self.compact = compact
        self.impl = impl

    @property
    def row_options(self):
        return self.temperature, self.logit_scale, self.softcap

    def of_rows(self, rows):
        """The same for a subset of the rows."""
        part = self.temperature
        part = part[rows] if isinstance(part, torch.Tensor) else part
        return Options(
            part, self.logit_scale, self.softcap, self.chunk_tokens, self.compact, self.impl
        )


def matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``a @ b`` in fp32: 16-bit operands are accumulated and returned in fp32, never rounded to 16
    bits.
    """
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def add_matmul(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """``total += a @ b`` with an fp32 ``total``."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a.float(), b.float())


class WeightGradient:
    """``sum of a @ b`` over chunks of rows, ``[V, H]`` in the dtype of ``w``, accumulated in fp32.

    The first product is written, not added to zeros, and an only one is rounded where it is
    accumulated: [V, H] is 1.2 GB in fp32 at V = 151936, H = 2048.
    """

    def __init__(self, w: torch.Tensor):
        self.w = w
        self.total: torch.Tensor | None = None

    def add_product(self, a: torch.Tensor, b: torch.Tensor, *, only: bool) -> None:
        """``only``: nothing else will be added."""
        if self.total is not None:
            add_matmul(self.total, a, b)
        elif only and a.is_cuda and a.dtype == self.w.dtype == torch.bfloat16:
            with fp32_reductions():
                self.total = a @ b
        else:
            self.total = matmul(a, b)

    def add(self, part: torch.Tensor) -> None:
        self.total = part.float() if self.total is None else self.total.add_(part)

    def result(self) -> torch.Tensor:
        return torch.zeros_like(self.w) if self.total is None else self.total.to(self.w.dtype)


@contextmanager
def fp32_reductions():
    """cuBLAS must not add the parts of a split sum in bf16, which it may by default."""
    backend, name = torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction"
    before, off = getattr(backend, name), False
    if hasattr(backend, f"{name}_split_k"):  # a bool alone would turn it on
        split_k = getattr(backend, f"{name}_split_k")
        before, off = (before, split_k), (False, split_k)
    setattr(backend, name, off)
    try:
        yield
    finally:
        setattr(backend, name, before)


def row_chunks(T: int, w: torch.Tensor, chunk_tokens: int | None) -> list[slice]:
    workspace = GPU_WORKSPACE_BYTES if w.is_cuda else CPU_WORKSPACE_BYTES
    rows = chunk_tokens or max(1, workspace // (4 * w.shape[0]))
    return [slice(start, min(T, start + rows)) for start in range(0, T, rows)]


def forward(x, w, bias, target_ids, options):
    """logprobs, entropy, lse and the target's z, each fp32 ``[T]``; no masks here."""
    T, V = x.shape[0], w.shape[0]
    out = tuple(torch.empty(T, dtype=torch.float32, device=x.device) for _ in range(4))
    if T == 0:
        return out
    if options.impl == "triton":
        _forward_triton(x, w, bias, target_ids, options, out)
        return out
    w = w if x.is_cuda else w.float()  # once, not once a chunk
    in_range = (target_ids >= 0) & (target_ids < V)
    y = torch.where(in_range, target_ids, 0)
    for rows in row_chunks(T, w, options.chunk_tokens):
        r = matmul(x[rows], w.t())
        if bias is not None:
            r += bias.float()
        tau, scale, cap = options.of_rows(rows).row_options
        if options.impl == "cpu":
            scores = _ext.logprob_entropy_fwd(r, y[rows], None, tau, cap, scale)
        else:
            scores = _rows.fold_rows(r, y[rows], tau, scale, cap)
        z_y = _rows.scale_and_cap(r.gather(1, y[rows, None]).squeeze(1), scale, cap)
        for whole, part in zip(out, (*scores, z_y), strict=True):
            whole[rows] = part
    out[0][:] = torch.where(in_range, out[0], torch.nan)
    return out


def target_logits(x, w, bias, target_ids, out, scale, cap) -> None:
    """Write z of each row's target into ``out``, fp32 ``[T]``, with the bits of the fold's GEMM."""
    (T, H), V = x.shape, w.shape[0]
    block_t, block_h, warps, stages = TARGET_CONFIG[x.element_size()]
    if is_interpreting():
        block_t, block_h = 16, 16
    target_logit_kernel[(cdiv(T, block_t),)](
        x, w, bias, target_ids, out, x.stride(0), w.stride(0), T, V, H, scale, cap or 0.0,
        HAS_BIAS=bias is not None, HAS_SOFTCAP=cap is not None, UPCAST=is_interpreting(),
        PRECISION=precision(x), BLOCK_T=block_t, BLOCK_H=block_h, num_warps=warps,
        num_stages=stages,
    )  # fmt: skip


def _forward_triton(x, w, bias, target_ids, options, out):
    T, H = x.shape
    V = w.shape[0]
    tau, scale, cap = options.row_options
    use_tma = uses_tma(x, w)
    flags = dict(HAS_BIAS=bias is not None, HAS_SOFTCAP=cap is not None)
    has_taus = isinstance(tau, torch.Tensor)
    per_row = dict(HAS_TEMPERATURE=has_taus)
    taus, tau = (tau, 1.0) if has_taus else (None, tau)
    target_logits(x, w, bias, target_ids, out[3], scale, cap)
    chunk = options.chunk_tokens or max(1, GPU_WORKSPACE_BYTES // (2 * V))
    block_v = tile_sizes(FOLD_CONFIG, x, use_tma)[1]
    n_parts = -(-V // block_v)
    # three fp32 parts a row and tile, in the memory of [chunk, V] 2-byte values
    step = max(1, chunk * V // (6 * n_parts))
    for start in range(0, T, step):
        rows = slice(start, min(T, start + step))
        n = rows.stop - rows.start
        per_row_inputs = (x, target_ids, taus, *out)
        x_part, y, tau_part, *found, target_z = (
            t if t is None or n == T else t[rows] for t in per_row_inputs
        )
        parts = torch.empty(3, n_parts, n, dtype=torch.float32, device=x.device).unbind()
        operands, launch = launch_options(FOLD_CONFIG, x_part, w, use_tma)
        fold_kernel[(launch["NUM_PROGRAMS"],)](
            *operands, bias, tau_part, *parts, x.stride(0), w.stride(0), n, V, H, tau, scale,
            cap or 0.0, **flags, **per_row, EVEN_V=V % block_v == 0, **launch,
        )  # fmt: skip
        block_t, block_n = MERGE_CONFIG
        merge_kernel[(cdiv(n, block_t),)](
            *parts, y, tau_part, target_z, *found,
            n, V, n_parts, tau, **per_row, BLOCK_T=block_t, BLOCK_N=block_n, num_warps=4,
        )  # fmt: skip


def backward(x, w, bias, target_ids, scores, grads, needs, options, main_grad=None):
    """(dx, dw, db), each None where ``needs`` says so. ``scores`` ends with the target's z. dw is
    added to ``main_grad`` where there is one, and is then None.
    """
    needs_dx, needs_dw, needs_db = needs
    dx = torch.zeros(x.shape, dtype=torch.float32, device=x.device) if needs_dx else None
    db = torch.zeros(w.shape[0], dtype=torch.float32, device=x.device) if needs_db else None
    dw = None
    if main_grad is None and needs_dw:
        # Triton writes every entry once; the others add chunks of rows to it
        is_sum = options.impl != "triton" or x.shape[0] == 0
        dw = w.new_zeros(w.shape, dtype=torch.float32) if is_sum else torch.empty_like(w)
    if x.shape[0]:
        run = _backward_triton if options.impl == "triton" else _backward_chunks
        run(x, w, bias, target_ids, scores, grads, dx, dw, main_grad, db, options)
    return (
        None if dx is None else dx.to(x.dtype),
        None if dw is None else dw.to(w.dtype),
        None if db is None else db.to(bias.dtype),
    )


def _backward_chunks(x, w, bias, target_ids, scores, grads, dx, dw, main_grad, db, options):
    """Rows in chunks: logits again, dR over them, dx of the chunk, dw accumulated in fp32."""
    V = w.shape[0]
    w = w if x.is_cuda else w.float()
    dw = dw if main_grad is None else main_grad
    y = torch.where((target_ids >= 0) & (target_ids < V), target_ids, 0)
    for rows in row_chunks(x.shape[0], w, options.chunk_tokens):
        r = matmul(x[rows], w.t())
        if bias is not None:
            r += bias.float()
        tau, scale, cap = options.of_rows(rows).row_options
        logprobs, entropy, lse, _ = (s[rows] for s in scores)
        g = [None if v is None else v[rows] for v in grads]
        if options.impl == "cpu":
            dr = r
            _ext.logprob_entropy_bwd(r, y[rows], None, tau, cap, scale, entropy, lse, *g, dr)
        else:
            dr = _rows.row_gradient(r, y[rows], tau, scale, cap, logprobs, entropy, lse, *g)
            live = _rows.live_rows(None, *g)
            dr = torch.where(live[:, None], dr, 0.0)
        dr = dr.to(x.dtype) if x.is_cuda else dr
        if dx is not None:
            dx[rows] = matmul(dr, w)
        if dw is not None:
            add_matmul(dw, dr.t(), x[rows])
        if db is not None:
            db += dr.sum(dim=0, dtype=torch.float32)


def _backward_triton(x, w, bias, target_ids, scores, grads, dx, dw, main_grad, db, options):
    """Blocks of the vocabulary: dR of one block, its slice of dw written once, dx accumulated in
    fp32.
    """
    T, H = x.shape
    V = w.shape[0]
    tau, scale, cap = options.row_options
    has_taus = isinstance(tau, torch.Tensor)
    logprobs, entropy, lse, target_z = scores
    use_tma = uses_tma(x, w)
    table = dlogits_config(V, bias is not None, cap is not None)
    tile = tile_sizes(table, x, use_tma)[1]
    chunk = options.chunk_tokens or max(1, GPU_WORKSPACE_BYTES // (2 * V))
    # as many values as a [chunk, V] block holds, in whole tiles
    least = tile if options.chunk_tokens else max(tile, LEAST_COLUMNS)
    width = min(-(-V // tile) * tile, max(least, chunk * V // T // tile * tile))
    block = torch.empty(T, width, dtype=x.dtype, device=x.device)
    for first in range(0, V, width):
        columns = slice(first, min(V, first + width))
        n = columns.stop - first
        w_part, bias_part, dw_part = (
            t if t is None or n == V else t[columns]
            for t in (w, bias, dw if main_grad is None else main_grad)
        )
        operands, launch = launch_options(table, x, w_part, use_tma)
        dlogits_kernel[(launch["NUM_PROGRAMS"],)](
            *operands, bias_part, target_ids,
            tau if has_taus else None, target_z, logprobs, entropy, lse, *grads, block,
            x.stride(0), w.stride(0), block.stride(0), T, n, H, first, 1.0 if has_taus else tau,
            scale, cap or 0.0, HAS_BIAS=bias is not None, HAS_TEMPERATURE=has_taus,
            HAS_SOFTCAP=cap is not None, HAS_DLOGPROBS=grads[0] is not None,
            HAS_DENTROPY=grads[1] is not None, HAS_DLSE=grads[2] is not None, **launch,
        )  # fmt: skip
        dr = block if n == width else block[:, :n]
        if dx is not None:
            add_matmul(dx, dr, w_part)
        if main_grad is not None:
            add_matmul(dw_part, dr.t(), x)
        elif dw is not None:
            dw_part.copy_(matmul(dr.t(), x))  # fp32: a bf16 result may be reduced in bf16
        if db is not None:
            db[columns] = dr.sum(dim=0, dtype=torch.float32)
