"""Clipped policy loss of the GRPO family, its derivative and its statistics, from log-probs.

    rho_t = exp(l_t - l_old_t)         # gspo: exp(mean over sequence i of l - l_old), for all its t
    r_t   = min(rho, clip(rho, 1 - e_low, 1 + e_high))  for A > 0,  max(...)  for A < 0
    pg_t  = -A_t r_t                   # cispo: -stop_gradient(clip(rho_t)) A_t l_t
    L_t   = keep_t v_t pg_t + kl_coef kl_t - entropy_coef H_t    # v: rollout importance weights
    loss  = sum_t w_t L_t              # w: the aggregation, 0 outside the response
    dpg_t/dl_t = -A_t rho_t where r_t = rho_t, 0 where a bound was taken; without l_old -A_t

    kl:  k1 = l - l_ref,  k2 = k1^2 / 2,  k3 = e^-k1 - 1 + k1;  with importance rho_t kl_t
    w_t: token-mean 1 / N,  seq-mean-token-mean 1 / (B n_i),  constant 1 / (B M),
         group-token-mean 1 / (n_groups N_group)

The forward reads each input once (gspo: log-probs twice) and writes one fp32 value a row; the
backward reads that value and writes the gradient. Masked rows are not read beyond their mask.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from qlkernels import _checks
from qlkernels._direct import call_direct, direct_function, is_watched
from qlkernels._dispatch import pick_impl
from qlkernels._nvtx import op_range
from qlkernels._target import why_not_triton
from qlkernels.policy_loss import arguments, eager
from qlkernels.policy_loss import triton as triton_kernels
from qlkernels.policy_loss.arguments import METRIC_COLUMNS, OP, RULE_OF
from qlkernels.policy_loss.reference import aggregation_weights, policy_loss_ref


class PolicyLossMetrics(NamedTuple):
    """0-d tensors on the device of the loss, without gradient.

    All are taken over the response tokens of the call, kept or not, and weigh every token alike.
    An average over no token, or of an absent input, is NaN.
    """

    num_tokens: torch.Tensor  # response tokens
    clip_low: torch.Tensor  # fraction with A < 0 and ratio < 1 - eps_low; cispo: any A
    clip_high: torch.Tensor  # fraction with A > 0 and ratio > 1 + eps_high; cispo: any A
    clip_cap: torch.Tensor  # fraction stopped by dual_clip or ratio_cap
    kl: torch.Tensor  # mean KL estimate, as it is multiplied by kl_coef
    # mean over sequences of their token means (arXiv 2512.12967, eq. 11)
    entropy_sequence_mean: torch.Tensor
    entropy_token_mean: torch.Tensor
    ratio_mean: torch.Tensor
    ratio_min: torch.Tensor
    ratio_max: torch.Tensor
    masked_fraction: torch.Tensor  # fraction that keep_mask drops
    live_fraction: torch.Tensor  # fraction whose derivative is not exactly 0


class PolicyLoss(NamedTuple):
    loss: torch.Tensor  # 0-d
    metrics: PolicyLossMetrics


class PolicyOptions(NamedTuple):
    """What the implementations need beside tensors. Schemas with many arguments are slow to call
    (torch 2.13 checks them in quadratic time), so that the ops take it in three.
    """

    eps_low: float
    eps_high: float
    dual_clip: float  # inf for none, as ratio_cap
    ratio_cap: float
    kl_coef: float
    entropy_coef: float
    scale: float  # the loss is multiplied by it
    kl_importance: bool
    kept_only: bool
    advantages_per_token: bool
    loss_type: str
    kl_estimator: str
    rule: str  # "weights", or a named rule that needs no prelude

    @staticmethod
    def of(*, dual_clip, ratio_cap, scale=1.0, advantages_per_token=True, **options):
        """From the arguments of ``policy_loss``, which says None where there is no bound."""
        return PolicyOptions(
            dual_clip=math.inf if dual_clip is None else float(dual_clip),
            ratio_cap=math.inf if ratio_cap is None else float(ratio_cap),
            scale=float(scale),
            advantages_per_token=advantages_per_token,
            **{k: float(v) if isinstance(v, int) and not isinstance(v, bool) else v
               for k, v in options.items()},
        )  # fmt: skip

    def packed(self) -> tuple[list[float], list[bool], str]:
        return list(self[:7]), list(self[7:10]), " ".join(self[10:])

    @staticmethod
    def unpacked(numbers: list[float], flags: list[bool], words: str) -> PolicyOptions:
        return PolicyOptions(*numbers, *flags, *words.split())


_ROWS = (
    "logprobs", "old_logprobs", "advantages", "response_mask", "keep_mask", "ref_logprobs",
    "rollout_is_weights", "entropy", "weights",
)  # fmt: skip

# --- custom ops and autograd -------------------------------------------------


def _run(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor | None,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    keep_mask: torch.Tensor | None,
    ref_logprobs: torch.Tensor | None,
    rollout_is_weights: torch.Tensor | None,
    entropy: torch.Tensor | None,
    weights: torch.Tensor | None,
    cu_seqlens: torch.Tensor,
    count: torch.Tensor | None,
    numbers: list[float],
    flags: list[bool],
    words: str,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss, metrics [16], g [T] and coef [2 B + 1]: see ``eager.py`` for the last two."""
    tensors = (
        logprobs, old_logprobs, advantages, response_mask, keep_mask, ref_logprobs,
        rollout_is_weights, entropy, weights,
    )  # fmt: skip
    options = PolicyOptions.unpacked(numbers, flags, words)
    arguments.check_cu_seqlens(cu_seqlens, logprobs.shape[0])
    T, B = logprobs.shape[0], cu_seqlens.shape[0] - 1
    if T == 0 or B == 0:
        metrics = logprobs.new_full((16,), torch.nan)
        metrics[0] = 0.0
        empty = torch.zeros_like(logprobs), logprobs.new_zeros(2 * B + 1)
        return logprobs.new_zeros(()), metrics, *empty
    with op_range(OP, logprobs):
        rows = dict(zip(_ROWS, tensors, strict=True))
        implementation = triton_kernels if impl == "triton" else eager
        return implementation.forward(rows, cu_seqlens, count, options)


_op = torch.library.custom_op("qlkernels::policy_loss", _run, mutates_args=())


@_op.register_fake
def _(logprobs, *args):
    B = args[8].shape[0] - 1
    new = logprobs.new_empty
    return new(()), new(16), torch.empty_like(logprobs), new(2 * B + 1)


def _run_backward(
    dloss: torch.Tensor,
    coef: torch.Tensor,
    g: torch.Tensor,
    response_mask: torch.Tensor,
    keep_mask: torch.Tensor | None,
    weights: torch.Tensor | None,
    cu_seqlens: torch.Tensor,
    numbers: list[float],
    flags: list[bool],
    words: str,
    needs_dentropy: bool,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """dlogprobs and dentropy, ``[T]``; dentropy is empty where it is not needed."""
    dentropy = torch.zeros_like(g) if needs_dentropy else None
    if g.shape[0] == 0 or cu_seqlens.shape[0] == 1:
        dlogprobs = torch.zeros_like(g)
    else:
        implementation = triton_kernels if impl == "triton" else eager
        with op_range(f"{OP}_bwd", g):
            dlogprobs = implementation.backward(
                dloss, coef, g, (response_mask, keep_mask, weights), cu_seqlens,
                PolicyOptions.unpacked(numbers, flags, words), dentropy,
            )  # fmt: skip
    return dlogprobs, g.new_empty(0) if dentropy is None else dentropy


_op_bwd = torch.library.custom_op("qlkernels::policy_loss_bwd", _run_backward, mutates_args=())


@_op_bwd.register_fake
def _(dloss, coef, g, *args):
    return torch.empty_like(g), torch.empty_like(g) if args[-2] else g.new_empty(0)


def _setup_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    response_mask, keep_mask, weights, cu_seqlens = (inputs[i] for i in (3, 4, 8, 9))
    ctx.save_for_backward(output[3], output[2], response_mask, keep_mask, weights, cu_seqlens)
    ctx.options = inputs[11:]


def _autograd_backward(ctx, dloss, *_others):
    none = (None,) * 15
    if dloss is None:
        return none
    *options, impl = ctx.options
    needs_dentropy = ctx.needs_input_grad[7]
    # with gradients on, the op is there to refuse a second backward
    watched = torch.is_grad_enabled() or is_watched(dloss, *ctx.saved_tensors)
    run = torch.ops.qlkernels.policy_loss_bwd if watched else _run_backward
    dlogprobs, dentropy = run(dloss, *ctx.saved_tensors, *options, needs_dentropy, impl)
    return dlogprobs, *none[1:7], dentropy if needs_dentropy else None, *none[8:]


_op.register_autograd(_autograd_backward, setup_context=_setup_context)
_PolicyLoss = direct_function(OP, _run, _setup_context, _autograd_backward)


def _refuse_double_backward(ctx, *_grads):
    raise RuntimeError(f"{OP}: double backward is not supported; use impl='reference' for it")


_op_bwd.register_autograd(_refuse_double_backward)


def aot_variants():
    """Every kernel as it is launched: (name, kernel, signature, constexprs, aligned, options)."""
    return triton_kernels.aot_variants()


# --- public ------------------------------------------------------------------


def policy_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor | None,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    *,
    cu_seqlens: torch.Tensor | None = None,
    keep_mask: torch.Tensor | None = None,
    ref_logprobs: torch.Tensor | None = None,
    rollout_is_weights: torch.Tensor | None = None,
    entropy: torch.Tensor | None = None,
    loss_type: str = "grpo",
    eps_low: float = 0.2,
    eps_high: float = 0.2,
    dual_clip: float | None = None,
    ratio_cap: float | None = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    kl_importance: bool = False,
    entropy_coef: float = 0.0,
    aggregation: str | torch.Tensor | None = None,
    denominator: str = "all",
    group_ids: torch.Tensor | None = None,
    num_tokens: int | torch.Tensor | None = None,
    num_sequences: int | torch.Tensor | None = None,
    num_groups: int | torch.Tensor | None = None,
    max_completion_tokens: float | None = None,
    impl: str = "auto",
) -> PolicyLoss:
    """Policy loss over packed ``[T]`` or padded ``(B, S)`` tokens, with statistics, without a sync.

    "Rows" below are ``[T]`` with ``cu_seqlens``, or ``(B, S)`` without; both give the same result.
    A row that ``response_mask`` hides may hold NaN in any input: it is never read into a result or
    a gradient.

    Args:
        logprobs: rows, floating; computed in fp32 (fp64 stays fp64). Log-probability of each row's
            token, nats.
        old_logprobs: rows, of the policy that sampled; None means the current policy: ratio 1,
            gradient flows.
        advantages: ``[B]``, one per sequence, or rows. Packed with ``T == B``: taken as one per
            sequence.
        response_mask: rows, bool: tokens that the policy wrote.
        cu_seqlens: ``[B + 1]`` int32 or int64, first 0, not decreasing. Rows past the last entry
            are padding.
        keep_mask: rows, bool. Where it is False the policy term is dropped (AEPO, negative-gradient
            clipping); KL and entropy terms stay, unless ``denominator="kept"``.
        ref_logprobs: rows, of the reference policy.
        rollout_is_weights: rows, multiply the policy term (correction for a sampler that differs
            from the trainer).
        entropy: rows, nats.
        loss_type: ``"grpo"``, ``"bnpo"``, ``"dr_grpo"``, ``"dapo"``: per-token ratio with clipping,
            which differ in their aggregation (``RULE_OF``) alone; ``"gspo"``: one ratio per
            sequence, the length-normalised likelihood ratio of its response tokens; ``"cispo"``:
            clipped ratio as a constant weight of ``logprobs``.
        eps_low, eps_high: the ratio is clipped to ``[1 - eps_low, 1 + eps_high]``. ``eps_low=1`` is
            no lower bound.
        dual_clip: for A < 0 the ratio counts at most this much, > 1 (PPO with dual clip, arXiv
            1912.09729).
        ratio_cap: the unclipped ratio counts at most this much, > 1 (two-sided clip, arXiv
            2505.07291). Equal to ``dual_clip`` where it is at least ``1 + eps_high``.
        kl_coef, kl_estimator: weight and estimator (``"k1"``, ``"k2"``, ``"k3"``) of the KL to the
            reference policy.
        kl_importance: multiply the estimate by the ratio, gradient included, which makes it
            unbiased off-policy.
        entropy_coef: weight of an entropy bonus, aggregated as the loss is.
        aggregation: a rule, or rows of weights w_t used as they are; None is the rule of
            ``loss_type``.
            ``"token-mean"``: 1 / tokens. ``"seq-mean-token-mean"``: mean over sequences of their
            token means.
            ``"group-token-mean"``: mean over prompt groups of their token means (arXiv 2512.12967,
            eq. 4).
            ``"constant"``: 1 / (sequences * max_completion_tokens).
        denominator: ``"all"``: dropped tokens count in every mean (arXiv 2512.12967, eq. 8).
            ``"kept"``: they leave the batch, from all terms and all counts.
        group_ids: ``[B]`` integers in ``[0, B)``, the prompt group of a sequence, for
            ``"group-token-mean"``.
        num_tokens, num_sequences, num_groups: what the rule divides by in place of this call's
            count, for micro-batches and ranks: the total over them, divided by the number of ranks
            where gradients are averaged. int or 0-d tensor. The count of the call leaves out
            sequences and groups without a counted token.
        max_completion_tokens: M of ``"constant"``.
        impl: ``"auto"``, ``"triton"``, ``"torch"`` or ``"reference"``; an explicit choice never
            falls back.

    Returns:
        ``PolicyLoss``: the loss, 0-d, differentiable with respect to ``logprobs`` and, with
        ``entropy_coef``, to ``entropy``; nothing else receives a gradient. An empty or fully masked
        batch gives a differentiable 0. A log-ratio, or a difference to the reference under k3, is
        cut at 20 nats and has no gradient beyond.

    Raises:
        ValueError, TypeError: an argument that does not fit, by name.
        RuntimeError: ``impl`` cannot run here, with the reason.
    """
    given = arguments.policy_loss_arguments(
        logprobs, old_logprobs, advantages, response_mask, cu_seqlens=cu_seqlens,
        keep_mask=keep_mask, ref_logprobs=ref_logprobs, rollout_is_weights=rollout_is_weights,
        entropy=entropy, loss_type=loss_type, eps_low=eps_low, eps_high=eps_high,
        dual_clip=dual_clip, ratio_cap=ratio_cap, kl_coef=kl_coef, kl_estimator=kl_estimator,
        kl_importance=kl_importance, entropy_coef=entropy_coef, aggregation=aggregation,
        denominator=denominator, group_ids=group_ids, num_tokens=num_tokens,
        num_sequences=num_sequences, num_groups=num_groups,
        max_completion_tokens=max_completion_tokens,
    )  # fmt: skip
    tensors, weights, cu_seqlens, rule, counts = given
    dtype = tensors["logprobs"].dtype
    wrong_dtype = "it computes in fp32; use 'torch' or 'reference' for fp64"
    blockers = {
        "triton": wrong_dtype if dtype == torch.float64 else why_not_triton(logprobs),
        "torch": None,
        "reference": None,
    }
    chosen = pick_impl(OP, impl, blockers)
    if weights is None and (chosen == "reference" or rule == "group-token-mean"):
        weights = aggregation_weights(
            tensors["response_mask"], cu_seqlens, rule, keep_mask=tensors["keep_mask"],
            denominator=denominator, group_ids=group_ids,
            max_completion_tokens=max_completion_tokens, **counts,
        )  # fmt: skip
    if chosen == "reference":
        arguments.check_cu_seqlens(cu_seqlens, tensors["logprobs"].shape[0])
        loss, metrics = policy_loss_ref(
            **tensors, cu_seqlens=cu_seqlens, weights=weights, denominator=denominator,
            loss_type=loss_type, eps_low=eps_low, eps_high=eps_high, dual_clip=dual_clip,
            ratio_cap=ratio_cap, kl_coef=kl_coef, kl_estimator=kl_estimator,
            kl_importance=kl_importance, entropy_coef=entropy_coef,
        )  # fmt: skip
        values = [metrics[name].to(loss.dtype) for name in PolicyLossMetrics._fields]
        return PolicyLoss(loss, PolicyLossMetrics(*values))

    if weights is not None:
        rule, weights = "weights", weights.to(dtype)
    count = counts["num_tokens"] if counts["num_tokens"] is not None else counts["num_sequences"]
    options = PolicyOptions.of(
        eps_low=eps_low,
        eps_high=eps_high,
        dual_clip=dual_clip,
        ratio_cap=ratio_cap,
        kl_coef=kl_coef,
        entropy_coef=entropy_coef,
        scale=1.0 / max_completion_tokens if rule == "constant" else 1.0,
        kl_importance=kl_importance,
        kept_only=denominator == "kept",
        advantages_per_token=tensors["advantages"].shape != (cu_seqlens.shape[0] - 1,),
        loss_type=loss_type,
        kl_estimator=kl_estimator,
        rule=rule,
    )
    count = count if rule != "weights" else None
    inputs = (*tensors.values(), weights, cu_seqlens, count, *options.packed(), chosen)
    if is_watched(*inputs):
        loss, metrics, *_ = torch.ops.qlkernels.policy_loss(*inputs)
    else:
        loss, metrics, *_ = call_direct(_PolicyLoss, inputs)
    values = metrics.detach().unbind()
    by_name = {name: values[column] for name, column in METRIC_COLUMNS.items()}
    return PolicyLoss(loss, PolicyLossMetrics(**by_name))
