"""Argument checks of the policy loss."""

from __future__ import annotations

from typing import NamedTuple

import torch

from qlkernels import _checks

OP = "policy_loss"
# the aggregation each loss is published with
RULE_OF = {
    "grpo": "seq-mean-token-mean",
    "bnpo": "token-mean",
    "dr_grpo": "constant",
    "dapo": "token-mean",
    "gspo": "seq-mean-token-mean",
    "cispo": "token-mean",
}
# where an implementation puts each metric in its 16 numbers
METRIC_COLUMNS = {
    "num_tokens": 0,
    "live_fraction": 1,
    "clip_low": 2,
    "kl": 5,
    "entropy_token_mean": 6,
    "ratio_mean": 7,
    "masked_fraction": 8,
    "clip_cap": 9,
    "clip_high": 10,
    "entropy_sequence_mean": 11,
    "ratio_min": 14,
    "ratio_max": 15,
}
# what each aggregation divides by
COUNT_OF = {
    "token-mean": "num_tokens",
    "seq-mean-token-mean": "num_sequences",
    "constant": "num_sequences",
    "group-token-mean": "num_groups",
}


def detached(x):
    return x.detach() if isinstance(x, torch.Tensor) else x


def check_choices(loss_type, kl_estimator, denominator) -> None:
    choices = {
        "loss_type": (loss_type, tuple(RULE_OF)),
        "kl_estimator": (kl_estimator, ("k1", "k2", "k3")),
        "denominator": (denominator, ("all", "kept")),
    }
    for name, (value, allowed) in choices.items():
        if value not in allowed:
            raise ValueError(f"{OP}: {name} must be one of {', '.join(allowed)}, got {value!r}")


def check_scalars(loss_type, eps_low, eps_high, dual_clip, ratio_cap) -> None:
    if not 0.0 <= eps_low <= 1.0:
        raise ValueError(f"{OP}: eps_low must lie in [0, 1], got {eps_low}")
    if not eps_high >= 0.0:
        raise ValueError(f"{OP}: eps_high must be at least 0, got {eps_high}")
    for name, value in (("dual_clip", dual_clip), ("ratio_cap", ratio_cap)):
        if value is None:
            continue
        if loss_type == "cispo":
            raise ValueError(f"{OP}: {name} has no meaning for cispo, whose ratio is a weight")
        if not value > 1.0:
            raise ValueError(f"{OP}: {name} must be greater than 1, got {value}")


def sequence_bounds(logprobs, cu_seqlens) -> torch.Tensor:
    if logprobs.dim() == 2:
        if cu_seqlens is not None:
            raise ValueError(f"{OP}: cu_seqlens is for packed [T] inputs, but logprobs is (B, S)")
        B, S = logprobs.shape
        return torch.arange(B + 1, device=logprobs.device) * S
    if cu_seqlens is None:
        raise ValueError(
            f"{OP}: packed [T] inputs need cu_seqlens [B + 1]; one sequence is tensor([0, T])"
        )
    _checks.check_dtype(OP, "cu_seqlens", cu_seqlens, (torch.int32, torch.int64))
    _checks.check_device(OP, "cu_seqlens", cu_seqlens, logprobs, "logprobs")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(f"{OP}: cu_seqlens must be [B + 1], got {tuple(cu_seqlens.shape)}")
    return cu_seqlens.contiguous()


def check_cu_seqlens(cu_seqlens, T) -> None:
    """Values, where looking costs no synchronisation."""
    if cu_seqlens.device.type != "cpu":
        return
    if cu_seqlens[0] != 0 or cu_seqlens[-1] > T or (cu_seqlens[1:] < cu_seqlens[:-1]).any():
        raise ValueError(
            f"{OP}: cu_seqlens must start at 0, never decrease and end at most at T = {T}"
        )


def check_rule(rule, counts, group_ids, max_completion_tokens, logprobs, B) -> None:
    if rule != "weights" and rule not in COUNT_OF:
        raise ValueError(
            f"{OP}: aggregation must be a tensor of weights or one of {', '.join(COUNT_OF)}, "
            f"got {rule!r}"
        )
    for name, value in counts.items():
        if value is not None and name != COUNT_OF.get(rule):
            raise ValueError(f"{OP}: {name} has no meaning for aggregation {rule!r}")
    if (group_ids is not None) != (rule == "group-token-mean"):
        raise ValueError(f"{OP}: group_ids belongs to aggregation 'group-token-mean', got {rule!r}")
    if group_ids is not None:
        _checks.check_dtype(OP, "group_ids", group_ids, (torch.int32, torch.int64))
        _checks.check_device(OP, "group_ids", group_ids, logprobs, "logprobs")
        _checks.check_shape(OP, "group_ids", group_ids, "B", {"B": B})
    if (max_completion_tokens is not None) != (rule == "constant"):
        raise ValueError(
            f"{OP}: max_completion_tokens belongs to aggregation 'constant' (dr_grpo), got {rule!r}"
        )
    if max_completion_tokens is not None:
        _checks.check_positive(OP, "max_completion_tokens", max_completion_tokens)


def as_scalar(name, x, device, dtype) -> torch.Tensor | None:
    if x is None:
        return None
    if isinstance(x, torch.Tensor):
        if x.numel() != 1:
            raise ValueError(f"{OP}: {name} must be a number, got shape {tuple(x.shape)}")
        _checks.check_device(OP, name, x, torch.empty(0, device=device), "logprobs")
        return x.detach().reshape(()).to(dtype)
    # a fill on the device: no copy from the host, so no synchronisation
    return torch.full((), float(x), dtype=dtype, device=device)


class Arguments(NamedTuple):
    rows: dict[str, torch.Tensor | None]  # [T] (advantages [T] or [B]), fp32 or fp64, contiguous
    weights: torch.Tensor | None  # [T], where the aggregation is given as weights
    cu_seqlens: torch.Tensor
    rule: str
    counts: dict[str, torch.Tensor | None]  # 0-d


def policy_loss_arguments(
    logprobs, old_logprobs, advantages, response_mask, *, cu_seqlens, keep_mask, ref_logprobs,
    rollout_is_weights, entropy, loss_type, eps_low, eps_high, dual_clip, ratio_cap, kl_coef,
    kl_estimator, kl_importance, entropy_coef, aggregation, denominator, group_ids=None,
    num_tokens=None, num_sequences=None, num_groups=None, max_completion_tokens=None,
) -> Arguments:  # fmt: skip
    """What ``policy_loss`` was given, checked by name and packed; nothing waits for the device."""
    check_choices(loss_type, kl_estimator, denominator)
    check_scalars(loss_type, eps_low, eps_high, dual_clip, ratio_cap)
    if not isinstance(logprobs, torch.Tensor) or logprobs.dim() not in (1, 2):
        got = tuple(logprobs.shape) if isinstance(logprobs, torch.Tensor) else type(logprobs)
        raise ValueError(f"{OP}: logprobs must be [T] or (B, S), got {got}")
    _checks.check_dtype(OP, "logprobs", logprobs, _checks.FLOATS)
    shape, device = logprobs.shape, logprobs.device
    cu_seqlens = sequence_bounds(logprobs, cu_seqlens)
    B = cu_seqlens.shape[0] - 1
    dtype = torch.float64 if logprobs.dtype == torch.float64 else torch.float32

    def rows(name, x, wanted=_checks.FLOATS):
        if x is None:
            return None
        if not isinstance(x, torch.Tensor) or x.shape != shape:
            got = tuple(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__
            raise ValueError(f"{OP}: {name} is {got}, but logprobs is {tuple(shape)}")
        _checks.check_dtype(OP, name, x, wanted)
        _checks.check_device(OP, name, x, logprobs, "logprobs")
        if x.dim() != 1:
            x = x.reshape(-1)
        return _checks.as_wanted(x, x.dtype if x.dtype == torch.bool else dtype)

    bools = (torch.bool,)
    if isinstance(advantages, torch.Tensor) and advantages.shape == (B,):
        _checks.check_dtype(OP, "advantages", advantages, _checks.FLOATS)
        _checks.check_device(OP, "advantages", advantages, logprobs, "logprobs")
        A = _checks.as_wanted(advantages.detach(), dtype)
    else:
        if not isinstance(advantages, torch.Tensor) or advantages.shape != shape:
            got = getattr(advantages, "shape", type(advantages).__name__)
            got = tuple(got) if isinstance(got, torch.Size) else got
            raise ValueError(
                f"{OP}: advantages must be [B] = {(B,)} or the shape of logprobs "
                f"{tuple(shape)}, got {got}"
            )
        A = rows("advantages", advantages.detach())
    found = dict(
        logprobs=rows("logprobs", logprobs),
        old_logprobs=rows("old_logprobs", detached(old_logprobs)),
        advantages=A,
        response_mask=rows("response_mask", response_mask, bools),
        keep_mask=rows("keep_mask", keep_mask, bools),
        ref_logprobs=rows("ref_logprobs", detached(ref_logprobs)),
        rollout_is_weights=rows("rollout_is_weights", detached(rollout_is_weights)),
        entropy=rows("entropy", entropy if entropy_coef else detached(entropy)),
    )
    if found["response_mask"] is None:
        raise TypeError(f"{OP}: response_mask is needed: bool, shape {tuple(shape)}")
    if kl_coef != 0.0 and ref_logprobs is None:
        raise ValueError(f"{OP}: kl_coef = {kl_coef} needs ref_logprobs")
    if entropy_coef != 0.0 and entropy is None:
        raise ValueError(f"{OP}: entropy_coef = {entropy_coef} needs entropy")

    rule, weights = RULE_OF[loss_type] if aggregation is None else aggregation, None
    if isinstance(rule, torch.Tensor):
        rule, weights = "weights", rows("aggregation", rule.detach())
    counts = dict(num_tokens=num_tokens, num_sequences=num_sequences, num_groups=num_groups)
    check_rule(rule, counts, group_ids, max_completion_tokens, logprobs, B)
    counts = {name: as_scalar(name, x, device, dtype) for name, x in counts.items()}
    return Arguments(found, weights, cu_seqlens, rule, counts)
