"""The policy loss in library calls with the derivative written out: any device, fp32 or fp64,
nothing synchronises."""

from __future__ import annotations

import torch

from qlkernels.policy_loss.arguments import METRIC_COLUMNS
from qlkernels.policy_loss.reference import LOG_RATIO_LIMIT


def _sequence_ids(cu_seqlens: torch.Tensor, T: int) -> torch.Tensor:
    """``[T]`` int64: the sequence of each row, B for rows past the last one."""
    row = torch.arange(T, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), row, right=True)


def _sequence_sum(x: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """``[T]`` -> ``[B]`` fp64, in a fixed order on every device (``index_add`` has none on a
    GPU)."""
    return torch.segment_reduce(
        x.double(), "sum", offsets=cu_seqlens.long(), axis=0, initial=0, unsafe=True
    )


def _spread(x: torch.Tensor, seq_ids: torch.Tensor) -> torch.Tensor:
    """``[B]`` -> ``[T]``, 0 on rows past the last sequence."""
    return torch.cat([x, x.new_zeros(1)])[seq_ids]


def forward(rows, cu_seqlens, count, options) -> tuple[torch.Tensor, ...]:
    """``rows``: the ``[T]`` inputs by name, or None. Returns loss, metrics, g, coef.

    The weight of a row is w_t = a_i * factor; g is dL/dl without it, and row t of sequence i has
    the derivative upstream * factor * a_i * (g_t + c_i), where c_i is what reaches every token of i
    through a sequence-level ratio. coef ``[2 B + 1]`` is a, c, factor.
    """
    dtype, device = rows["logprobs"].dtype, rows["logprobs"].device
    T, B = rows["logprobs"].shape[0], cu_seqlens.shape[0] - 1
    seq_ids = _sequence_ids(cu_seqlens, T)
    mask = rows["response_mask"] & (seq_ids < B)
    kept = mask if rows["keep_mask"] is None else mask & rows["keep_mask"]
    zero = torch.zeros(T, dtype=dtype, device=device)

    def read(name):
        return zero if rows[name] is None else torch.where(mask, rows[name], 0.0)

    logprobs, entropy = read("logprobs"), read("entropy")
    A = rows["advantages"]
    A = torch.where(mask, A if options.advantages_per_token else _spread(A, seq_ids), 0.0)
    n_tokens = _sequence_sum(mask, cu_seqlens)  # [B]
    is_sequence, is_cispo = options.loss_type == "gspo", options.loss_type == "cispo"

    old = logprobs if rows["old_logprobs"] is None else read("old_logprobs")
    log_ratio = logprobs - old
    if is_sequence:
        per_sequence = _sequence_sum(log_ratio, cu_seqlens) / n_tokens.clamp_min(1)
        log_ratio = _spread(per_sequence.to(dtype), seq_ids)
    follows = ~(log_ratio.abs() > LOG_RATIO_LIMIT)  # NaN goes through
    ratio = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()

    low, high = 1.0 - options.eps_low, 1.0 + options.eps_high
    clip_low, clip_high, clip_cap = ratio < low, ratio > high, torch.zeros_like(mask)
    clipped = ratio.clamp(low, high)
    if is_cispo:
        dratio = -clipped * A
        loss = dratio * logprobs
    else:
        capped = ratio.clamp(max=options.ratio_cap)
        r = torch.where(A > 0, torch.minimum(capped, clipped), torch.maximum(capped, clipped))
        r = torch.where(A < 0, r.clamp(max=options.dual_clip), r)
        loss = -A * r
        # r is the ratio itself or a bound: comparing says which, and a bound has no gradient
        stopped = (r < ratio) | (r > ratio)
        dratio = torch.where(follows & ~stopped, loss, 0.0)
        clip_low, clip_high = clip_low & (A < 0), clip_high & (A > 0)
        clip_cap = (A != 0) & stopped & ~clip_low & ~clip_high
    if rows["rollout_is_weights"] is not None:
        loss, dratio = loss * read("rollout_is_weights"), dratio * read("rollout_is_weights")
    loss, dratio = torch.where(kept, loss, 0.0), torch.where(kept, dratio, 0.0)

    g = kl = zero
    if rows["ref_logprobs"] is not None:
        d = read("ref_logprobs") - logprobs
        if options.kl_estimator == "k1":
            kl, dkl = -d, torch.ones_like(d)
        elif options.kl_estimator == "k2":
            kl, dkl = 0.5 * d * d, -d
        else:
            moves = ~(d.abs() > LOG_RATIO_LIMIT)
            d = d.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
            kl, dkl = d.expm1() - d, torch.where(moves, -d.expm1(), 0.0)
        if options.kl_importance:
            kl, dkl = ratio * kl, ratio * dkl
            dratio = dratio + options.kl_coef * torch.where(follows, kl, 0.0)
        loss, g = loss + options.kl_coef * kl, options.kl_coef * dkl
    if options.entropy_coef != 0.0:
        loss = loss - options.entropy_coef * entropy

    counted = kept if options.kept_only else mask
    n_counted = _sequence_sum(counted, cu_seqlens)
    if rows["weights"] is not None:
        weights = torch.where(counted, rows["weights"], 0.0)
        loss, dratio, g = loss * weights, dratio * weights, g * weights
        counted = counted & (weights != 0)
    loss, dratio, g = (torch.where(counted, x, 0.0) for x in (loss, dratio, g))

    # --- reductions
    n, n_sequences = n_tokens.sum(), (n_tokens > 0).sum()
    a = torch.ones_like(n_tokens)
    if options.rule == "seq-mean-token-mean":
        a = torch.where(n_counted > 0, 1.0 / n_counted.clamp_min(1), 0.0)
    factor = torch.full_like(n, options.scale)
    if options.rule != "weights":
        if count is None:
            by_token = options.rule == "token-mean"
            count = n_counted.sum() if by_token else (n_counted > 0).sum()
        factor = torch.where(count > 0, factor / torch.where(count > 0, count, 1), 0.0)
    total = (a * _sequence_sum(loss, cu_seqlens)).sum() * factor
    c = torch.zeros_like(n_tokens)
    if is_sequence:
        c = _sequence_sum(dratio, cu_seqlens) / n_tokens.clamp_min(1)
        derivative = torch.where(mask, g + _spread(c.to(dtype), seq_ids), 0.0)
    else:
        g = derivative = g + dratio
    live = derivative != 0
    if options.entropy_coef != 0.0:
        live = live | counted

    nan = torch.full_like(n, torch.nan)

    def mean(x):
        return torch.where(n > 0, torch.where(mask, x, 0).sum(dtype=torch.float64) / n, nan)

    entropy_means = _sequence_sum(entropy, cu_seqlens) / n_tokens.clamp_min(1)
    least = torch.where(mask, ratio, torch.inf).amin()
    largest = torch.where(mask, ratio, -torch.inf).amax()
    has_entropy = rows["entropy"] is not None
    found = {
        "num_tokens": n,
        "live_fraction": mean(live),
        "clip_low": mean(clip_low),
        "clip_high": mean(clip_high),
        "clip_cap": mean(clip_cap),
        "kl": mean(kl) if rows["ref_logprobs"] is not None else nan,
        "entropy_token_mean": mean(entropy) if has_entropy else nan,
        "entropy_sequence_mean": entropy_means.sum() / n_sequences if has_entropy else nan,
        "ratio_mean": mean(ratio),
        "ratio_min": torch.where(n > 0, least.double(), nan),
        "ratio_max": torch.where(n > 0, largest.double(), nan),
        "masked_fraction": mean(~kept),
    }
    by_column = {METRIC_COLUMNS[name]: x for name, x in found.items()}
    metrics = torch.stack([by_column.get(column, 0 * n) for column in range(16)])
    coef = torch.cat([a, c, factor.view(1)]).to(dtype)
    return total.to(dtype), metrics.to(dtype), g, coef


def backward(dloss, coef, g, masks, cu_seqlens, options, dentropy) -> torch.Tensor:
    """dlogprobs; ``masks`` are response, keep, weights. Fills ``dentropy`` unless it is None."""
    response_mask, keep_mask, weights = masks
    T, B = g.shape[0], cu_seqlens.shape[0] - 1
    seq_ids = _sequence_ids(cu_seqlens, T)
    mask = response_mask & (seq_ids < B)
    upstream = _spread(dloss * coef[-1] * coef[:B], seq_ids)
    if options.loss_type == "gspo":
        g = torch.where(mask, g + _spread(coef[B : 2 * B], seq_ids), 0.0)
    if dentropy is not None:
        own = torch.full_like(g, -options.entropy_coef).masked_fill(~mask, 0.0)
        if options.kept_only and keep_mask is not None:
            own = torch.where(keep_mask, own, 0.0)
        if weights is not None:
            own = torch.where(own != 0, own * weights, 0.0)
        dentropy.copy_(torch.where(own != 0, own * upstream, 0.0))
    # rows whose derivative is exactly 0 stay 0, whatever the upstream scalar is
    return torch.where(g != 0, g * upstream, 0.0)
