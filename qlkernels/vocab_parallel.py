"""Token scores where every rank holds a slice of the vocabulary.

Each rank scores its own slice with any scorer; three numbers a row cross the group.

    lse = log sum_r e^lse_r,  w_r = e^(lse_r - lse)              # r in rank order, on every rank
    H = sum_r w_r (H_r + lse - lse_r)                            # no term is negative
    logprob = u_y - lse,  u_y = logprob_r + lse_r of the rank that holds the target
    dH/dlse_r = w_r (H_r - lse_r - H + lse),  dH/dH_r = w_r,  dlse/dlse_r = w_r

The merge has no communication in its backward: every rank receives the same upstream gradient and
keeps what belongs to its own slice. The gradient of the hidden states is a sum over ranks.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from qlkernels import _checks
from qlkernels._scores import TokenScores
from qlkernels.linear_logprob import linear_logprob

OP = "merge_scores"


class _MergeScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logprobs, entropy, lse, owns_target, group):
        u_y = torch.where(owns_target, logprobs + lse, torch.nan)  # NaN: not in this slice
        mine = torch.stack([lse, entropy, u_y])
        parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, mine, group=group)
        lse_r, entropy_r, u_r = torch.stack(parts, dim=1)  # [R, T], in rank order everywhere
        whole = lse_r.logsumexp(dim=0)
        w = (lse_r - whole).exp()
        # a slice without mass (all of its logits -inf) has no entropy to add
        surprise = torch.where(w > 0, entropy_r + whole - lse_r, 0.0)
        merged = (w * surprise).sum(dim=0)
        rank = dist.get_rank(group)
        ctx.save_for_backward(w[rank], surprise[rank], merged, owns_target)
        ctx.set_materialize_grads(True)
        u = torch.where(u_r.isnan().all(dim=0), torch.nan, u_r.nansum(dim=0))
        return u - whole, merged, whole

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g_logprob, g_entropy, g_lse):
        w, surprise, merged, owns_target = ctx.saved_tensors
        g_y = torch.where(owns_target, g_logprob, 0.0)
        own = w * (g_lse - g_logprob + g_entropy * (surprise - merged)) + g_y
        return g_y, w * g_entropy, own, None, None


def merge_scores(
    local: TokenScores, owns_target: torch.Tensor, group: dist.ProcessGroup | None = None
) -> TokenScores:
    """Scores over the whole vocabulary from the scores of each rank's slice.

    Args:
        local: ``TokenScores`` of this rank's slice, fp32 ``[T]``. ``logprobs`` is read where
            ``owns_target`` is True and may be of any token elsewhere.
        owns_target: ``[T]`` bool: the row's target lies in this rank's slice. True on exactly one
            rank; a target that no rank owns gets NaN.
        group: process group over which the vocabulary is split; None is the default group.

    Returns:
        ``TokenScores`` fp32 ``[T]``, the same bits on every rank. Differentiable with respect to
        ``local``; every rank must backpropagate the same upstream gradient.
    """
    sizes: dict[str, int] = {}
    for name, value in local._asdict().items():
        _checks.check_shape(OP, f"local.{name}", value, "T", sizes)
        _checks.check_dtype(OP, f"local.{name}", value, (torch.float32, torch.float64))
    _checks.check_shape(OP, "owns_target", owns_target, "T", sizes)
    _checks.check_dtype(OP, "owns_target", owns_target, (torch.bool,))
    return TokenScores(*_MergeScores.apply(*local, owns_target, group))


class _SumGradientOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dx):
        # summed in fp32: the parts are as large as their sum
        total = dx.float().contiguous()
        dist.all_reduce(total, group=ctx.group)
        return total.to(dx.dtype), None


def vocab_parallel_logprob(
    hidden_states: torch.Tensor,
    lm_head_slice: torch.Tensor,
    target_ids: torch.Tensor,
    *,
    first_id: int,
    group: dist.ProcessGroup | None = None,
    **options,
) -> TokenScores:
    """``linear_logprob`` over a head whose rows are split over ranks.

    Args:
        hidden_states: ``[T, H]``, the same on every rank; its gradient is summed over ranks.
        lm_head_slice: ``[V_r, H]``, this rank's rows of the head; it gets its own gradient.
        target_ids: ``[T]`` int64 in ``[0, V)`` of the whole vocabulary.
        first_id: vocabulary id of the first row of the slice.
        group: process group; None is the default group.
        options: further arguments of ``linear_logprob``. A ``bias`` is the slice's.

    Returns:
        ``TokenScores`` fp32 ``[T]``, equal on every rank; masked rows hold 0.
    """
    owns = (target_ids >= first_id) & (target_ids < first_id + lm_head_slice.shape[0])
    local_ids = torch.where(owns, target_ids - first_id, 0)
    x = _SumGradientOverRanks.apply(hidden_states, group)
    merged = merge_scores(linear_logprob(x, lm_head_slice, local_ids, **options), owns, group)
    mask = options.get("row_mask")
    if mask is None:
        return merged
    return TokenScores(*(torch.where(mask, value, 0.0) for value in merged))
