"""Forward and backward of each implementation."""

from __future__ import annotations

import torch

from qlkernels import _ext, _rows
from qlkernels.logprob_entropy import kernels

# Rows of fp32 temporaries that the torch implementation holds at a time.
_TORCH_CHUNK_BYTES = 64 << 20


def _chunks(T: int, V: int) -> list[slice]:
    rows = max(1, _TORCH_CHUNK_BYTES // (4 * V))
    return [slice(start, min(T, start + rows)) for start in range(0, T, rows)]


def _part(x, rows):
    return x[rows] if isinstance(x, torch.Tensor) else x


def forward(logits, target_ids, row_mask, temperature, softcap, logit_scale, impl):
    T, V = logits.shape
    if impl in ("cuda", "cpu"):
        return _ext.logprob_entropy_fwd(
            logits, target_ids, row_mask, temperature, softcap, logit_scale
        )
    out = tuple(torch.empty(T, dtype=torch.float32, device=logits.device) for _ in range(3))
    if T == 0:
        return out
    if impl == "triton":
        block, warps = kernels.block_v(V, kernels.FWD_CONFIG)
        is_tensor = isinstance(temperature, torch.Tensor)
        kernels.logprob_entropy_fwd_kernel[(T,)](
            logits,
            target_ids,
            row_mask,
            temperature if is_tensor else None,
            *out,
            logits.stride(0),
            V,
            1.0 if is_tensor else temperature,
            logit_scale,
            softcap or 0.0,
            HAS_ROW_MASK=row_mask is not None,
            HAS_TEMPERATURE=is_tensor,
            HAS_SOFTCAP=softcap is not None,
            BLOCK_V=block,
            num_warps=warps,
        )
        return out
    for rows in _chunks(T, V):
        r, y = logits[rows].float(), target_ids[rows]
        if row_mask is not None:
            r = torch.where(row_mask[rows, None], r, 0.0)
            y = torch.where(row_mask[rows], y, 0)
        in_range = (y >= 0) & (y < V)
        scores = _rows.fold_rows(
            r, torch.where(in_range, y, 0), _part(temperature, rows), logit_scale, softcap
        )
        for whole, part in zip(out, scores, strict=True):
            whole[rows] = part if row_mask is None else torch.where(row_mask[rows], part, 0.0)
        out[0][rows] = torch.where(in_range, out[0][rows], torch.nan)
    return out


def backward(
    logits, target_ids, row_mask, temperature, softcap, logit_scale, scores, grads, impl, out
):
    """Write dlogits into ``out``, which may be ``logits`` itself."""
    T, V = logits.shape
    if T == 0:
        return
    logprobs, entropy, lse = scores
    if impl in ("cuda", "cpu"):
        _ext.logprob_entropy_bwd(
            logits, target_ids, row_mask, temperature, softcap, logit_scale,
            entropy, lse, *grads, out,
        )  # fmt: skip
        return
    if impl == "triton":
        block, warps = kernels.block_v(V, kernels.BWD_CONFIG)
        is_tensor = isinstance(temperature, torch.Tensor)
        kernels.logprob_entropy_bwd_kernel[(T,)](
            logits,
            target_ids,
            row_mask,
            temperature if is_tensor else None,
            logprobs,
            entropy,
            lse,
            *grads,
            out,
            logits.stride(0),
            out.stride(0),
            V,
            1.0 if is_tensor else temperature,
            logit_scale,
            softcap or 0.0,
            HAS_ROW_MASK=row_mask is not None,
            HAS_TEMPERATURE=is_tensor,
            HAS_SOFTCAP=softcap is not None,
            HAS_DLOGPROBS=grads[0] is not None,
            HAS_DENTROPY=grads[1] is not None,
            HAS_DLSE=grads[2] is not None,
            BLOCK_V=block,
            num_warps=warps,
        )
        return
    for rows in _chunks(T, V):
        g = [_part(x, rows) for x in grads]
        live = _rows.live_rows(_part(row_mask, rows), *g)
        y = target_ids[rows]
        y = torch.where(live & (y >= 0) & (y < V), y, 0)
        dr = _rows.row_gradient(
            torch.where(live[:, None], logits[rows].float(), 0.0),
            y,
            _part(temperature, rows),
            logit_scale,
            softcap,
            *(x[rows] for x in scores),
            *g,
        )
        out[rows] = torch.where(live[:, None], dr, 0.0).to(out.dtype)
