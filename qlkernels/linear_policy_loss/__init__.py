"""Policy loss from hidden states: loss, scores and both gradients in one pass over the logits.

A GRPO step needs logprob, entropy, the loss and dL/dX, dL/dW. Where the derivative g_t = dL/dl_t of
a row is known as soon as the row's own score is (every token-level loss; every loss without old
log-probs), the logits of a chunk of rows give all of it while they are there: 6 T H V FLOPs, not 8.

    h_t: an offset known before the GEMM, the target's z, less tau l_old where l_old is given
    E_i = e^((z_i - h) / tau),  S = sum E_i,  Q = sum E_i (z_i - h) / tau
    logprob = (z_y - h) / tau - log S,  H = log S - Q / S,  lse = h / tau + log S
    E_y <- S expm1(logprob),  v = -g s / (tau S)          # du_i = -g (p_i - 1[i = y])
    dX = v * (E W),  dW = E^T (v * X)                     # plain GEMMs over the stored chunk of E

Rows are spent where they matter: prompt rows are not multiplied at all, rows whose derivative must
be zero (masked by AEPO, zero advantage, zero weight) are scored and nothing more, 2 T H V, and rows
that the clip takes out of a chunk skip the gradient GEMMs. A row whose S leaves [2^-100, 2^100],
where the offset was wrong by 69 nats, is computed again in two passes.

Two passes, (2 + 6f) T H V with a fraction f of live rows: a sequence-level ratio with old
log-probs, whose derivative needs the whole sequence; fp16, whose gradients vanish before the loss
scale of the backward reaches them; and on the GPU an entropy bonus and a soft-cap.
"""

from __future__ import annotations

import torch

from qlkernels import _checks, _ext
from qlkernels._dispatch import pick_impl
from qlkernels._nvtx import op_range
from qlkernels._scores import TokenScores
from qlkernels._target import is_capturing, why_not_triton
from qlkernels.linear_logprob import autocast_operands, linear_logprob
from qlkernels.linear_logprob.passes import Options
from qlkernels.linear_policy_loss.kernels import aot_variants
from qlkernels.linear_policy_loss.passes import Call, scores_and_gradients
from qlkernels.linear_policy_loss.reference import LinearPolicyLoss, linear_policy_loss_ref
from qlkernels.policy_loss import RULE_OF, PolicyOptions, aggregation_weights, policy_loss
from qlkernels.policy_loss.arguments import check_cu_seqlens, policy_loss_arguments

OP = "linear_policy_loss"

# --- custom ops and autograd -------------------------------------------------

_ROWS = (
    "old_logprobs", "advantages", "response_mask", "keep_mask", "ref_logprobs",
    "rollout_is_weights",
)  # fmt: skip


@torch.library.custom_op("qlkernels::linear_policy_loss", mutates_args=())
def _op(
    hidden_states: torch.Tensor,
    lm_head_weight: torch.Tensor,
    target_ids: torch.Tensor,
    bias: torch.Tensor | None,
    temperatures: torch.Tensor | None,
    old_logprobs: torch.Tensor | None,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    keep_mask: torch.Tensor | None,
    ref_logprobs: torch.Tensor | None,
    rollout_is_weights: torch.Tensor | None,
    weights: torch.Tensor,
    cu_seqlens: torch.Tensor,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    chunk_tokens: int | None,
    numbers: list[float],
    flags: list[bool],
    words: str,
    needs_dx: bool,
    needs_dw: bool,
    needs_db: bool,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of the loss, empty where not needed, and scores."""
    check_cu_seqlens(cu_seqlens, hidden_states.shape[0])
    tau = temperature if temperatures is None else temperatures
    rows = dict(
        zip(
            _ROWS,
            (old_logprobs, advantages, response_mask, keep_mask, ref_logprobs, rollout_is_weights),
            strict=True,
        )
    )
    options = Options(tau, logit_scale, softcap, chunk_tokens, True, impl)
    rows["weights"] = weights
    policy = PolicyOptions.unpacked(numbers, flags, words)
    call = Call(hidden_states, lm_head_weight, target_ids, bias, options, rows, cu_seqlens, policy)
    with (
        op_range(OP, hidden_states),
        torch.autocast(hidden_states.device.type, enabled=False),
    ):
        dx, dw, db, *scores = scores_and_gradients(call, (needs_dx, needs_dw, needs_db))
    like = (hidden_states, lm_head_weight, bias)
    grads = (
        hidden_states.new_empty(0) if g is None else g.to(x.dtype)
        for g, x in zip((dx, dw, db), like, strict=True)
    )
    return (*grads, *scores)


@_op.register_fake
def _(hidden_states, lm_head_weight, target_ids, bias, *args):
    def like(x, needed):
        nothing = hidden_states.new_empty(0)
        return torch.empty(x.shape, dtype=x.dtype, device=x.device) if needed else nothing

    needs = args[-4:-1]
    grads = [like(x, n) for x, n in zip((hidden_states, lm_head_weight, bias), needs, strict=True)]
    T = hidden_states.shape[0]
    return (*grads, *(hidden_states.new_empty(T, dtype=torch.float32) for _ in range(3)))


@torch.library.custom_op("qlkernels::attach_gradients", mutates_args=())
def _attach(
    value: torch.Tensor,
    hidden_states: torch.Tensor,
    lm_head_weight: torch.Tensor,
    bias: torch.Tensor | None,
    grads: list[torch.Tensor],
) -> torch.Tensor:
    """``value``, whose gradients with respect to the three operands are ``grads``."""
    return value.clone()


@_attach.register_fake
def _(value, *_args):
    return torch.empty_like(value)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[4])


def _attached_backward(ctx, dloss):
    if torch.is_grad_enabled() and dloss.requires_grad:
        raise RuntimeError(f"{OP}: double backward is not supported; use impl='reference' for it")
    # a multiplication on the device: whether the upstream scalar is 1 is never asked
    needs = (ctx.needs_input_grad[1], ctx.needs_input_grad[2], ctx.needs_input_grad[3])
    grads = zip(ctx.saved_tensors, needs, strict=True)
    return (None, *((g * dloss.to(g.dtype)) if n else None for g, n in grads), [None] * 3)


_attach.register_autograd(_attached_backward, setup_context=_setup_context)

# --- public ------------------------------------------------------------------


def linear_policy_loss(
    hidden_states: torch.Tensor,
    lm_head_weight: torch.Tensor,
    target_ids: torch.Tensor,
    old_logprobs: torch.Tensor | None,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    *,
    cu_seqlens: torch.Tensor,
    bias: torch.Tensor | None = None,
    temperature: float | torch.Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    keep_mask: torch.Tensor | None = None,
    ref_logprobs: torch.Tensor | None = None,
    rollout_is_weights: torch.Tensor | None = None,
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
    chunk_tokens: int | None = None,
    validate: bool = False,
    impl: str = "auto",
    **counts,
) -> LinearPolicyLoss:
    """Policy loss of packed tokens from hidden states, with scores and both gradients in one pass.

    Equal to ``policy_loss(linear_logprob(...).logprobs, ...)``. The gradients are computed in the
    forward (not under ``torch.no_grad``) and multiplied by the upstream scalar in the backward.

    Args:
        hidden_states: ``[T, H]`` bf16, fp16 or fp32, last dim contiguous.
        lm_head_weight: ``[V, H]``, same dtype. A frozen one (LoRA) skips its gradient.
        target_ids: ``[T]`` int64, already shifted; read in response rows only.
        old_logprobs: ``[T]`` or None, which means the current policy: ratio 1. Also the offset of
            the exponentials: the closer it is, the better, and 69 nats off is still exact.
        advantages: ``[B]`` or ``[T]``.
        response_mask: ``[T]`` bool. Rows outside it are not multiplied and may hold anything.
        cu_seqlens: ``[B + 1]`` int32 or int64.
        bias, temperature, logit_scale, softcap: as in ``linear_logprob``.
        keep_mask, ref_logprobs, rollout_is_weights, loss_type, eps_low, eps_high, dual_clip,
            ratio_cap, kl_coef, kl_estimator, kl_importance, entropy_coef, aggregation, denominator,
            counts (``group_ids``, ``num_tokens``, ``num_sequences``, ``num_groups``,
            ``max_completion_tokens``): as in ``policy_loss``.
        chunk_tokens: rows whose exponentials (2 bytes a logit) or, on the CPU, logits (4 bytes) are
            stored at a time. Default 8192 on the GPU, 64 MB on the CPU.
        validate: check the targets on the GPU too (synchronises).
        impl: ``"auto"``, ``"triton"``, ``"cpu"``, ``"torch"`` or ``"reference"``; an explicit
            choice never falls back.

    Returns:
        ``LinearPolicyLoss``: the loss, its metrics and the ``TokenScores`` of the response rows,
        fp32. Reads a few counts from the device: which rows are live, once a call and once a chunk.

    Raises:
        ValueError, TypeError: an argument that does not fit, by name.
        RuntimeError: ``impl`` cannot run here, with the reason.
    """
    sizes: dict[str, int] = {}
    _checks.check_unsharded(OP, "lm_head_weight", lm_head_weight)
    x, w, bias = autocast_operands(hidden_states, lm_head_weight, bias)
    y = target_ids
    if is_capturing():
        raise RuntimeError(f"{OP}: it counts live rows, which a CUDA graph capture does not allow")
    _checks.check_head(OP, x, w, y, bias, temperature, response_mask, sizes, impl)
    _checks.check_scalars(OP, temperature, softcap, logit_scale)
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"{OP}: chunk_tokens must be at least 1, got {chunk_tokens}")
    if validate or x.device.type == "cpu":
        _checks.check_targets(OP, y, response_mask, w.shape[0])
    blockers = {
        "triton": why_not_triton(x),
        "cpu": _ext.why_not_cpu(x),
        "torch": None,
        "reference": None,
    }
    chosen = pick_impl(OP, impl, blockers)
    policy = dict(
        loss_type=loss_type, eps_low=eps_low, eps_high=eps_high, dual_clip=dual_clip,
        ratio_cap=ratio_cap, kl_coef=kl_coef, kl_estimator=kl_estimator,
        kl_importance=kl_importance, entropy_coef=entropy_coef,
    )  # fmt: skip
    rows = dict(
        keep_mask=keep_mask, ref_logprobs=ref_logprobs, rollout_is_weights=rollout_is_weights
    )
    shared = policy | rows | dict(aggregation=aggregation, denominator=denominator, **counts)
    head = dict(bias=bias, temperature=temperature, logit_scale=logit_scale, softcap=softcap)
    if chosen == "reference":
        return linear_policy_loss_ref(
            x, w, y, old_logprobs, advantages, response_mask, cu_seqlens=cu_seqlens, **head,
            **shared,
        )  # fmt: skip

    # every remaining argument is checked here, by the op that defines it, before the GEMMs
    nothing = torch.zeros(x.shape[0], dtype=torch.float32, device=x.device)
    policy_loss_arguments(
        nothing, old_logprobs, advantages, response_mask, cu_seqlens=cu_seqlens, entropy=nothing,
        **shared,
    )  # fmt: skip

    if isinstance(aggregation, torch.Tensor):
        weights = aggregation
    else:
        weights = aggregation_weights(
            response_mask, cu_seqlens, aggregation or RULE_OF[loss_type], keep_mask=keep_mask,
            denominator=denominator, **counts,
        )  # fmt: skip
    T, B = x.shape[0], cu_seqlens.shape[0] - 1
    tokens = torch.arange(T, device=x.device)
    seq_ids = torch.searchsorted(cu_seqlens[1:].contiguous(), tokens, right=True)
    mask = response_mask & (seq_ids < B)  # rows past the last sequence are padding
    if advantages.shape == (B,):
        spread = torch.cat([advantages, advantages.new_zeros(1)])
        advantages = spread[seq_ids]

    def packed(v):  # rows outside the mask may hold NaN: select before anything reads them
        return None if v is None else torch.where(mask, v.detach().float(), 0.0)

    grads_on = torch.is_grad_enabled()
    operands = (x, w, bias)
    needs = [grads_on and v is not None and v.requires_grad for v in operands]
    if x.dtype == torch.float16 and any(needs):
        # its gradients need the loss scale, which only the backward knows
        scores = linear_logprob(
            x, w, y, row_mask=mask, chunk_tokens=chunk_tokens, impl=chosen, **head
        )
        result = policy_loss(
            scores.logprobs, old_logprobs, advantages, response_mask, cu_seqlens=cu_seqlens,
            entropy=scores.entropy, impl="triton" if chosen == "triton" else "torch", **shared,
        )  # fmt: skip
        return LinearPolicyLoss(*result, TokenScores(*(v.detach() for v in scores)))
    is_tensor = isinstance(temperature, torch.Tensor)
    *grads, logprobs, entropy, lse = torch.ops.qlkernels.linear_policy_loss(
        x.detach(),
        w.detach(),
        torch.where(mask, y, 0),
        None if bias is None else bias.detach().contiguous(),
        temperature.float().contiguous() if is_tensor else None,
        packed(old_logprobs),
        packed(advantages),
        mask,
        None if keep_mask is None else keep_mask.contiguous(),
        packed(ref_logprobs),
        packed(rollout_is_weights),
        packed(weights),
        cu_seqlens.contiguous(),
        1.0 if is_tensor else float(temperature),
        float(logit_scale),
        softcap,
        chunk_tokens,
        *PolicyOptions.of(**policy, rule="weights", kept_only=denominator == "kept").packed(),
        *needs,
        chosen,
    )
    result = policy_loss(
        logprobs, old_logprobs, advantages, response_mask, cu_seqlens=cu_seqlens, entropy=entropy,
        impl="triton" if chosen == "triton" else "torch", **shared,
    )  # fmt: skip
    loss = result.loss
    if any(needs):
        loss = torch.ops.qlkernels.attach_gradients(loss.detach(), x, w, bias, grads)
    return LinearPolicyLoss(loss, result.metrics, TokenScores(logprobs, entropy, lse))
