"""From Hugging Face labels to the targets and the mask that every scorer takes.

``labels[t]`` is the token at t itself, -100 where it does not count; ``target_ids[t]`` is the token
that row t predicts, the one at t + 1 of the same sequence.
"""

from __future__ import annotations

import torch

from qlkernels import _checks

OP = "targets_from_labels"
IGNORED = -100


def targets_from_labels(
    labels: torch.Tensor, cu_seqlens: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Shifted targets, and the rows that have one.

    Args:
        labels: ``[B, S]`` int64, padded with -100; or packed ``[T]`` with ``cu_seqlens``.
        cu_seqlens: ``[B + 1]`` int32 or int64, first 0; None for padded labels. Rows past the last
            entry are padding.

    Returns:
        ``(target_ids, row_mask)`` of the shape of ``labels``, int64 and bool. The last row of a
        sequence has no target. Where the mask is False the target is 0.
    """
    if not isinstance(labels, torch.Tensor):
        raise TypeError(f"{OP}: labels must be a tensor, got {type(labels).__name__}")
    _checks.check_dtype(OP, "labels", labels, (torch.int64,))
    if (labels.dim() == 1) != (cu_seqlens is not None) or labels.dim() not in (1, 2):
        raise ValueError(
            f"{OP}: labels must be [B, S] without cu_seqlens, or packed [T] with them; "
            f"got {tuple(labels.shape)} {'without' if cu_seqlens is None else 'with'} cu_seqlens"
        )
    shifted = torch.full_like(labels, IGNORED)
    shifted[..., :-1] = labels[..., 1:]
    if cu_seqlens is not None:
        last = cu_seqlens[1:].long() - 1  # an empty sequence repeats its predecessor's last row
        ends = torch.zeros(labels.shape[0] + 1, dtype=torch.bool, device=labels.device)
        ends[last] = True  # -1 of a leading empty sequence falls on the spare row
        rows = torch.arange(labels.shape[0], device=labels.device)
        shifted = torch.where(ends[:-1] | (rows >= cu_seqlens[-1]), IGNORED, shifted)
    row_mask = shifted != IGNORED
    return torch.where(row_mask, shifted, 0), row_mask
