"""Routing of tokens to experts, and the index by which experts find their tokens.

    p_i = softmax(x)_i                      # x: router logits of a token, fp32
    i_k = the top_k largest x, ties to the lower id; or the replayed ids
    w_k = p_{i_k} / sum_j p_{i_j}           # norm_topk_prob; else p_{i_k}
    n_e = #{(t, k): i_tk = e},  P_e = sum_t p_te
    normalised:  dx_{i_k} += w_k (g_k - sum_j g_j w_j)           # g: upstream of w
    else:        dx_i += p_i (sum_{k: i_k = i} g_k - sum_j g_j w_j)
    and          dx_i += p_i (h_i - sum_j p_j h_j)                # h: upstream of P
    load balancing, transformers' scale: E sum_e (n_e / T) (P_e / T)    (arXiv 2101.03961, eq. 4-6)

Selection compares logits, not probabilities: softmax is monotone, and two logits that differ may
round to one probability. So every implementation picks the same experts, bit for bit.

Bytes: the forward reads the logits once and writes 8 bytes a (token, slot), the backward reads and
writes the logits once. The index reads the ids twice and writes 8 bytes a (token, slot).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from qlkernels import _checks
from qlkernels._dispatch import pick_impl
from qlkernels._target import why_not_triton
from qlkernels.moe_routing import native, ops
from qlkernels.moe_routing.reference import build_expert_index_ref, moe_route_ref
from qlkernels.moe_routing.results import INDEX_OP, OP, ExpertIndex, Routing
from qlkernels.moe_routing.triton import aot_variants

_LOGITS = (torch.bfloat16, torch.float16, torch.float32)
_IDS = (torch.int32, torch.int64)


def _blockers(x: torch.Tensor, num_experts: int, top_k: int) -> dict:
    return {
        "cuda": partial(native.why_not_cuda, x, num_experts, top_k),
        "triton": partial(why_not_triton, x),
        "cpu": partial(native.why_not_cpu, x),
        "torch": None,
        "reference": None,
    }


def _check_replay(
    replay_ids: torch.Tensor, T: int, top_k: int, like: torch.Tensor, validate: bool
) -> None:
    _checks.check_shape(OP, "replay_ids", replay_ids, "T top_k", {"T": T, "top_k": top_k})
    _checks.check_dtype(OP, "replay_ids", replay_ids, _IDS)
    _checks.check_device(OP, "replay_ids", replay_ids, like, "router_logits")
    if torch.compiler.is_compiling() or not (validate or like.device.type == "cpu"):
        return
    E = like.shape[1]
    is_known = ((replay_ids >= 0) & (replay_ids < E)).all(1)
    wrong = ~(is_known | (replay_ids == -1).all(1))
    if bool(wrong.any()):
        t = int(wrong.nonzero()[0])
        raise ValueError(
            f"{OP}: replay_ids[{t}] = {replay_ids[t].tolist()}, but a row holds expert ids in "
            f"[0, {E}), or -1 everywhere to route live"
        )


def moe_route(
    router_logits: torch.Tensor,
    top_k: int,
    *,
    norm_topk_prob: bool = True,
    replay_ids: torch.Tensor | None = None,
    weights_dtype: torch.dtype | None = None,
    validate: bool = False,
    impl: str = "auto",
) -> Routing:
    """The experts of every token, their weights, and what the load-balancing loss needs.

    A result depends on its own row alone (``prob_sums`` aside), so routing in chunks of tokens
    changes no bit. Compute the logits once for all tokens, though: a library GEMM may change its
    algorithm with the number of rows.

    Args:
        router_logits: ``[T, E]`` bf16, fp16 or fp32, any row stride, last dim contiguous. -inf has
            probability 0. NaN counts as the largest logit and makes the row's weights NaN.
        top_k: experts a token, in ``[1, E]``.
        norm_topk_prob: the weights of a token sum to 1; else they are its softmax probabilities.
        replay_ids: ``[T, top_k]`` int32 or int64: the experts to use, as recorded in another pass.
            Weights are taken from the live softmax, and carry gradient. A row of -1 routes live.
            Any other id outside ``[0, E)``: raises on the CPU and with ``validate=True``; on the
            GPU that row routes live with NaN weights.
        weights_dtype: round the weights through this dtype, as transformers does with the dtype of
            the activations; None keeps them in fp32. The gradient ignores the rounding.
        validate: check ``replay_ids`` on the GPU too (synchronises).
        impl: ``"auto"``, ``"cuda"``, ``"triton"``, ``"cpu"``, ``"torch"`` or ``"reference"``; an
            explicit choice never falls back.

    Returns:
        ``Routing``: ``topk_ids [T, top_k]`` int32, likeliest first, ``topk_weights [T, top_k]``
        fp32, ``tokens_per_expert [E]`` int32 and ``prob_sums [E]`` fp32. Weights and ``prob_sums``
        are differentiable with respect to ``router_logits``.

    Raises:
        ValueError, TypeError: a shape, dtype, device or value that does not fit, by name.
        RuntimeError: ``impl`` cannot run here, with the reason.
    """
    _checks.check_shape(OP, "router_logits", router_logits, "T E", {})
    allowed = _LOGITS + ((torch.float64,) if impl == "reference" else ())
    _checks.check_dtype(OP, "router_logits", router_logits, allowed)
    _checks.check_last_dim_contiguous(OP, "router_logits", router_logits)
    T, E = router_logits.shape
    if not 1 <= top_k <= E:
        raise ValueError(f"{OP}: top_k must be in [1, E] = [1, {E}], got {top_k}")
    if weights_dtype not in (None, *_LOGITS):
        raise TypeError(
            f"{OP}: weights_dtype must be None, bfloat16, float16 or float32, got {weights_dtype}"
        )
    if replay_ids is not None:
        _check_replay(replay_ids, T, top_k, router_logits, validate)
        replay_ids = replay_ids.contiguous()
    chosen = pick_impl(OP, impl, _blockers(router_logits, E, top_k))
    if chosen == "reference":
        return moe_route_ref(
            router_logits, top_k, norm_topk_prob=norm_topk_prob, replay_ids=replay_ids,
            weights_dtype=weights_dtype,
        )  # fmt: skip
    weights, prob_sums, ids, counts = ops.route(
        router_logits, replay_ids, top_k, norm_topk_prob, weights_dtype, chosen
    )
    return Routing(ids, weights, counts, prob_sums)


def build_expert_index(
    topk_ids: torch.Tensor, num_experts: int, *, impl: str = "auto"
) -> ExpertIndex:
    """Where the rows of every expert are: a stable counting sort of (token, slot) by expert.

    Nothing synchronises, so the call can be captured in a CUDA graph.

    Args:
        topk_ids: ``[T, top_k]`` int32 or int64, fewer than ``2**31`` entries. Ids outside
            ``[0, num_experts)``, such as those by which expert parallelism marks experts of other
            ranks, sort to the end, behind the last expert.
        num_experts: ``E``, positive.
        impl: ``"auto"``, ``"cuda"``, ``"triton"``, ``"cpu"``, ``"torch"`` or ``"reference"``; an
            explicit choice never falls back.

    Returns:
        ``ExpertIndex`` of int32: ``sort_order [T * top_k]``, equal to a stable argsort of
        ``topk_ids.flatten()`` (the token of a row is ``sort_order // top_k``), its inverse
        ``inverse_order [T * top_k]``, and ``expert_offsets [E + 1]``: expert e owns the sorted rows
        ``[expert_offsets[e], expert_offsets[e + 1])``.

    Raises:
        ValueError, TypeError: a shape, dtype or value that does not fit, by name.
        RuntimeError: ``impl`` cannot run here, with the reason.
    """
    _checks.check_shape(INDEX_OP, "topk_ids", topk_ids, "T top_k", {})
    _checks.check_dtype(INDEX_OP, "topk_ids", topk_ids, _IDS)
    if num_experts < 1:
        raise ValueError(f"{INDEX_OP}: num_experts must be positive, got {num_experts}")
    if topk_ids.numel() >= 2**31:
        raise ValueError(
            f"{INDEX_OP}: topk_ids has {topk_ids.numel()} entries, but positions are int32; "
            "split the tokens into chunks"
        )
    chosen = pick_impl(INDEX_OP, impl, _blockers(topk_ids, num_experts, 1))
    if chosen == "reference":
        return build_expert_index_ref(topk_ids, num_experts)
    return ExpertIndex(*ops.build_index(topk_ids.contiguous(), num_experts, chosen))


def load_balancing_loss(
    routing: Routing | Sequence[Routing], *, normalization: str = "transformers"
) -> torch.Tensor:
    """Auxiliary loss that grows as tokens crowd on few experts (arXiv 2101.03961, eq. 4-6).

    Args:
        routing: of one layer, or of several: counts and probabilities are pooled over the layers
            before they are multiplied, as transformers does.
        normalization: ``"transformers"`` counts every slot, so that balanced routing gives
            ``top_k``; ``"switch"`` divides by ``top_k``, and balanced routing gives 1.

    Returns:
        0-d fp32, differentiable with respect to the router logits through ``prob_sums``; 0 for no
        token.

    Raises:
        ValueError: no layer, or an unknown ``normalization``.
    """
    routings = [routing] if isinstance(routing, Routing) else list(routing)
    if not routings:
        raise ValueError("load_balancing_loss: routing holds no layer")
    if normalization not in ("transformers", "switch"):
        raise ValueError(
            "load_balancing_loss: normalization must be 'transformers' or 'switch', got "
            f"{normalization!r}"
        )
    device = routings[0].prob_sums.device
    counts = sum(r.tokens_per_expert.to(device).float() for r in routings)  # [E]
    prob_sums = sum(r.prob_sums.to(device) for r in routings)
    rows = max(1, sum(r.topk_ids.shape[0] for r in routings))
    scale = counts.numel() / float(rows) ** 2
    if normalization == "switch":
        scale /= routings[0].topk_ids.shape[1]
    return scale * (counts * prob_sums).sum()
