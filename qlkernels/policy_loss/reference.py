"""The policy loss as formulas: eager, differentiable by autograd, any device, fp32 or fp64."""

from __future__ import annotations

import torch

LOG_RATIO_LIMIT = 20.0  # nats; beyond it a log-ratio is cut and passes no gradient


def aggregation_weights(
    response_mask: torch.Tensor,
    cu_seqlens: torch.Tensor,
    rule: str,
    *,
    keep_mask: torch.Tensor | None = None,
    denominator: str = "all",
    group_ids: torch.Tensor | None = None,
    num_tokens: int | torch.Tensor | None = None,
    num_sequences: int | torch.Tensor | None = None,
    num_groups: int | torch.Tensor | None = None,
    max_completion_tokens: float | None = None,
) -> torch.Tensor:
    """The weight w_t with which each row's loss is added, for a rule of ``policy_loss``. Does not
    synchronise.

    Args: as in ``policy_loss``, packed; masks ``[T]`` bool, ``cu_seqlens`` ``[B + 1]``.

    Returns:
        ``[T]`` fp64 on the device of the mask; 0 outside ``response_mask`` (and, with
        ``denominator="kept"``, outside ``keep_mask``). All 0 where nothing is left to count.
    """
    counted = response_mask
    if denominator == "kept" and keep_mask is not None:
        counted = response_mask & keep_mask
    T, B = counted.shape[0], cu_seqlens.shape[0] - 1
    row = torch.arange(T, device=counted.device)
    seq_ids = torch.searchsorted(cu_seqlens[1:].contiguous(), row, right=True)  # [T], B on padding
    counted = counted & (seq_ids < B)
    # one slot more than there are sequences, for the rows past the last one
    n_tokens = torch.zeros(B + 1, dtype=torch.float64, device=counted.device)
    n_tokens = n_tokens.index_add(0, seq_ids, counted.double())

    def share(given, here):
        total = here if given is None else torch.as_tensor(given, device=here.device).to(here.dtype)
        return torch.where(total > 0, 1.0 / total.clamp_min(1e-300), 0.0)

    n_live = (n_tokens > 0).sum().double()
    if rule == "token-mean":
        per_sequence = torch.ones_like(n_tokens) * share(num_tokens, n_tokens.sum())
    elif rule == "seq-mean-token-mean":
        per_sequence = share(None, n_tokens) * share(num_sequences, n_live)
    elif rule == "constant":
        per_sequence = torch.ones_like(n_tokens) * share(num_sequences, n_live)
        per_sequence = per_sequence / max_completion_tokens
    elif rule == "group-token-mean":
        group = torch.cat([group_ids.long(), group_ids.new_zeros(1).long()])
        in_group = torch.zeros_like(n_tokens).index_add(0, group, n_tokens)
        n_groups = (in_group > 0).sum().double()
        per_sequence = share(None, in_group)[group] * share(num_groups, n_groups)
    else:
        raise ValueError(f"policy_loss: unknown aggregation rule {rule!r}")
    return torch.where(counted, per_sequence[seq_ids], 0.0)


def _cut(x: torch.Tensor) -> torch.Tensor:
    """x within the limit: gradient 1 there, 0 beyond, NaN at NaN (clamp would give 0)."""
    x = torch.where(x > LOG_RATIO_LIMIT, LOG_RATIO_LIMIT, x)
    return torch.where(x < -LOG_RATIO_LIMIT, -LOG_RATIO_LIMIT, x)


def kl_estimate(logprobs: torch.Tensor, ref_logprobs: torch.Tensor, estimator: str) -> torch.Tensor:
    """KL(policy || reference) estimated from a sampled token, nats (J. Schulman's k1, k2, k3)."""
    if estimator == "k1":
        return logprobs - ref_logprobs
    if estimator == "k2":
        return 0.5 * (logprobs - ref_logprobs) ** 2
    d = _cut(ref_logprobs - logprobs)
    return torch.expm1(d) - d


def policy_loss_ref(
    logprobs: torch.Tensor, *, entropy: torch.Tensor | None = None, **inputs
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Ground truth on packed ``[T]`` rows: the loss and every metric. Arguments as ``evaluate``."""
    loss, metrics = evaluate(logprobs, entropy=entropy, **inputs)
    # a row is live where a derivative is not exactly 0: ask autograd, with leaves of our own
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in (logprobs, entropy) if x is not None]
        again, _ = evaluate(leaves[0], entropy=leaves[1] if entropy is not None else None, **inputs)
        gradients = torch.autograd.grad(again, leaves, allow_unused=True)
    live = sum((g != 0).int() for g in gradients if g is not None) > 0
    n = metrics["num_tokens"]
    metrics["live_fraction"] = torch.where(n > 0, live.sum() / n, torch.nan)
    return loss, metrics


def evaluate(
    logprobs: torch.Tensor,
    *,
    old_logprobs: torch.Tensor | None,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    cu_seqlens: torch.Tensor,
    weights: torch.Tensor,
    loss_type: str,
    eps_low: float,
    eps_high: float,
    keep_mask: torch.Tensor | None = None,
    ref_logprobs: torch.Tensor | None = None,
    rollout_is_weights: torch.Tensor | None = None,
    entropy: torch.Tensor | None = None,
    dual_clip: float | None = None,
    ratio_cap: float | None = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    kl_importance: bool = False,
    entropy_coef: float = 0.0,
    denominator: str = "all",
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss and all metrics but ``live_fraction``. Arguments as in ``policy_loss``, packed.

    ``weights`` is w_t, ``[T]``, 0 outside the rows that the rule counts. Sums are taken in fp64.
    """
    dtype = logprobs.dtype
    T, B = logprobs.shape[0], cu_seqlens.shape[0] - 1
    row = torch.arange(T, device=logprobs.device)
    seq_ids = torch.searchsorted(cu_seqlens[1:].contiguous(), row, right=True)  # [T], B on padding
    mask = response_mask & (seq_ids < B)
    kept = mask if keep_mask is None else mask & keep_mask

    def rows(x):  # masked rows may hold NaN: selected away before anything is computed
        return None if x is None else torch.where(mask, x.to(dtype), 0.0)

    def seq_sum(x):  # [T] -> [B + 1], fp64
        zeros = torch.zeros(B + 1, dtype=torch.float64, device=x.device)
        return zeros.index_add(0, seq_ids, x.double())

    logprobs, old, ref = rows(logprobs), rows(old_logprobs), rows(ref_logprobs)
    rollout_is_weights, entropy = rows(rollout_is_weights), rows(entropy)
    if advantages.shape[0] == B:  # one per sequence
        advantages = torch.cat([advantages, advantages.new_zeros(1)])[seq_ids]
    A = rows(advantages)
    old = logprobs.detach() if old is None else old
    n_tokens = seq_sum(mask)

    # --- ratio
    log_ratio = logprobs - old
    if loss_type == "gspo":
        log_ratio = (seq_sum(log_ratio) / n_tokens.clamp_min(1)).to(dtype)[seq_ids]
    ratio = _cut(log_ratio).exp()
    low, high = 1.0 - eps_low, 1.0 + eps_high

    # --- policy term
    clip_cap = torch.zeros_like(mask)
    if loss_type == "cispo":
        pg = -ratio.clamp(low, high).detach() * A * logprobs
        clip_low, clip_high = ratio < low, ratio > high
    else:
        capped = ratio if ratio_cap is None else ratio.clamp(max=ratio_cap)
        clipped = ratio.clamp(low, high)
        r = torch.where(A > 0, torch.minimum(capped, clipped), torch.maximum(capped, clipped))
        if dual_clip is not None:
            r = torch.where(A < 0, r.clamp(max=dual_clip), r)
        # where a bound was chosen the ratio is a constant; where it was not, r is the ratio itself
        stopped = (r < ratio) | (r > ratio)
        r = torch.where(stopped, r.detach(), ratio)
        pg = -A * r
        clip_low, clip_high = (A < 0) & (ratio < low), (A > 0) & (ratio > high)
        clip_cap = (A != 0) & stopped & ~clip_low & ~clip_high
    if rollout_is_weights is not None:
        pg = pg * rollout_is_weights
    token_loss = torch.where(kept, pg, 0.0)

    # --- reference policy and entropy
    if ref is not None:
        kl = kl_estimate(logprobs, ref, kl_estimator)
        kl = ratio * kl if kl_importance else kl
        if kl_coef != 0.0:
            token_loss = token_loss + kl_coef * kl
    if entropy_coef != 0.0:
        token_loss = token_loss - entropy_coef * entropy

    counted = kept if denominator == "kept" else mask
    terms = torch.where(counted, torch.where(counted, weights, 0.0) * token_loss.double(), 0.0)
    loss = terms.sum().to(dtype)

    # --- metrics: over response tokens, whatever was kept
    n = n_tokens[:B].sum()
    nan = torch.full_like(n, torch.nan)

    def mean(x):
        return torch.where(n > 0, torch.where(mask, x.detach().double(), 0.0).sum() / n, nan)

    inf = torch.inf
    n_live_sequences = (n_tokens[:B] > 0).sum()
    metrics = {
        "num_tokens": n,
        "clip_low": mean(clip_low),
        "clip_high": mean(clip_high),
        "clip_cap": mean(clip_cap),
        "kl": nan if ref is None else mean(kl),
        "entropy_sequence_mean": nan,
        "entropy_token_mean": nan if entropy is None else mean(entropy),
        "ratio_mean": mean(ratio),
        "ratio_min": torch.where(n > 0, _amin(torch.where(mask, ratio, inf)), nan),
        "ratio_max": torch.where(n > 0, -_amin(torch.where(mask, -ratio, inf)), nan),
        "masked_fraction": mean(mask & ~kept),
    }
    if entropy is not None:
        sequence_means = (seq_sum(entropy.detach()) / n_tokens.clamp_min(1))[:B]
        metrics["entropy_sequence_mean"] = torch.where(
            n_live_sequences > 0, sequence_means.sum() / n_live_sequences, nan
        )
    return loss, metrics


def _amin(x: torch.Tensor) -> torch.Tensor:
    x = x.detach().double()
    return x.amin() if x.numel() else x.new_full((), torch.inf)
