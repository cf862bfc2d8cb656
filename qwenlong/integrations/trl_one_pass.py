"""TRL's policy loss with its gradients from one pass over the logits: 6 T H V FLOPs, not 8.

TRL scores tokens, makes a loss of the scores, and its backward computes the logits again for their
gradients. ``linear_policy_loss`` gives scores and gradients while the logits of a chunk are there.
It stands in for TRL's head in one forward of the model: TRL gets the scores as constants and makes
its loss value, its router term and its metrics of them, and the backward of that value runs
through the gradients that are there already.

    head:  (h, W) -> log-probs, entropies, dL/dh, dL/dW        inside the model's forward
    loss:  TRL's value of the scores, whose gradient goes to the head's output and from there to
           (h, W): the wrappers of the model (DDP, FSDP) see the graph that they expect
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch.nn import functional as F
from trl import GRPOConfig
from trl.trainer import utils

from qlkernels import linear_policy_loss
from qlkernels.prefix_group import PackedGroups
from qwenlong.integrations.patches import Replacements
from qwenlong.integrations.trl_scores import HEAD

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo")
# exponentials that are stored at a time, about, 2 bytes a logit
WORKSPACE_BYTES = 512 << 20


def check_one_pass(args: GRPOConfig) -> None:
    """Refuse settings whose loss ``linear_policy_loss`` does not compute, by name."""
    high = args.epsilon if args.epsilon_high is None else args.epsilon_high
    is_cispo, by_sequence = args.loss_type == "cispo", args.importance_sampling_level == "sequence"
    refusals = {
        f"loss_type must be one of {', '.join(LOSS_TYPES)}, got {args.loss_type!r}": (
            args.loss_type not in LOSS_TYPES
        ),
        "loss_type='cispo' needs importance_sampling_level='token'": is_cispo and by_sequence,
        f"loss_type='cispo' needs epsilon_high of at least 1, the bound of the ratio, got {high}": (
            is_cispo and high < 1.0
        ),
        f"epsilon and epsilon_high must be at least 0, got {args.epsilon} and {high}": (
            min(args.epsilon, high) < 0.0
        ),
        f"delta must be greater than 1, got {args.delta}": (
            not is_cispo and args.delta is not None and not args.delta > 1.0
        ),
        "top_entropy_quantile must be 1: a quantile needs the entropies of all tokens": (
            args.top_entropy_quantile < 1.0
        ),
        "entropy_coef must be 0: TRL's bonus is averaged in another way than the loss": (
            args.entropy_coef != 0.0
        ),
        "use_adaptive_entropy is not supported": args.use_adaptive_entropy,
        "off_policy_mask_threshold is not supported: it needs the scores of whole sequences": (
            args.off_policy_mask_threshold is not None
        ),
        "torch_compile is not supported": args.torch_compile,
    }
    for reason, is_met in refusals.items():
        if is_met:
            raise ValueError(f"AEPOGRPOConfig: one_pass_loss=True: {reason}")


class _Places(NamedTuple):
    """Where the head's rows with a completion token come from."""

    rows: torch.Tensor | None  # [M] int64, rows of the head's input; None for all
    tokens: torch.Tensor  # [M] int64, their places in the flattened (B, R)
    cu_seqlens: torch.Tensor  # [B + 1] int64, completions among them


class OnePassLoss:
    """TRL's head for one micro-batch, which computes the gradients of the policy loss too.

    Args:
        tokens: what ``linear_policy_loss`` takes of each token under its names, ``(B, R)`` or None;
            ``aggregation`` holds the weight of each token in TRL's loss.
        attention_mask: ``(B, R)`` of the completions.
        options: of ``linear_policy_loss``: loss type, clip, KL.
    """

    def __init__(
        self,
        tokens: dict[str, torch.Tensor | None],
        attention_mask: torch.Tensor,
        options: dict[str, object],
    ):
        self.attended, self.options = attention_mask.bool(), options
        self.flat = {k: None if v is None else v.flatten() for k, v in tokens.items()}
        self.loss: torch.Tensor | None = None  # without gradient, for comparisons
        self._packed: tuple[PackedGroups, torch.Tensor] | None = None
        self._carrier: torch.Tensor | None = None

    # --- around the model's forward -------------------------------------------------

    def as_head(
        self, packed: tuple[PackedGroups, torch.Tensor] | None = None
    ) -> AbstractContextManager:
        """TRL's head is this one within the block. ``packed``: as ``group_rows`` returns it."""
        self._packed = packed
        return Replacements().patch([(utils, HEAD, self)])

    def constants(
        self, logprobs: torch.Tensor, entropy: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``(B, R)`` scores as TRL's loss takes them, from the output of the model's forward.

        A token that the loss leaves out was not scored: it gets its old log-prob, hence a ratio
        of 1, since TRL multiplies what it computes of it by 0.
        """
        if self.loss is None:
            raise RuntimeError(
                "one_pass_loss=True: the model's forward did not reach TRL's head; leave its "
                "forward as the trainer made it"
            )
        self._carrier, found = logprobs, logprobs.detach()
        if self.flat["old_logprobs"] is not None:
            scored = self.flat["response_mask"].view_as(found)
            found = torch.where(scored, found, self.flat["old_logprobs"].view_as(found))
        return found, entropy.detach()

    def with_gradient(self, value: torch.Tensor) -> torch.Tensor:
        """``value`` plus the gradient of the policy loss."""
        first = self.attended.flatten().int().argmax()  # padding passes no gradient on
        return _WithGradient.apply(value, self._carrier, first)

    # --- in the place of TRL's autograd function --------------------------------------

    def apply(
        self,
        hidden: torch.Tensor,  # [N, H]
        weight: torch.Tensor,  # [V, H]
        bias: torch.Tensor | None,
        targets: torch.Tensor,  # [N]
        temperature: float,
        _chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        _outputs: tuple[str, ...] = (),
    ) -> tuple[torch.Tensor | None, ...]:
        """Log-probs and entropies of the rows, ``[N]``, and three statistics not asked for."""
        places = self._places(hidden)
        if places.rows is not None:
            hidden_rows, targets = hidden[places.rows], targets[places.rows]
        else:
            hidden_rows = hidden
        rows = {k: None if v is None else v[places.tokens] for k, v in self.flat.items()}
        found = linear_policy_loss(
            hidden_rows,
            weight.to(hidden.dtype),
            targets,
            rows.pop("old_logprobs"),
            rows.pop("advantages"),
            rows.pop("response_mask"),
            cu_seqlens=places.cu_seqlens,
            bias=None if bias is None else bias.to(hidden.dtype),
            temperature=temperature,
            softcap=final_logit_softcapping,
            logit_scale=logit_scale,
            chunk_tokens=chunk_tokens(weight),
            **rows,
            **self.options,
        )
        self.loss = found.loss.detach()
        logprobs, entropy = found.scores.logprobs, found.scores.entropy
        if places.rows is not None:
            nothing = logprobs.new_zeros(hidden.shape[0])
            logprobs = nothing.index_copy(0, places.rows, logprobs)
            entropy = nothing.index_copy(0, places.rows, entropy)
        return _Carry.apply(found.loss, logprobs), entropy, None, None, None

    def _places(self, hidden: torch.Tensor) -> _Places:
        """TRL hands over the rows whose label counts where it uses Triton, else all rows."""
        B, R = self.attended.shape
        all_rows = not utils._use_triton(hidden.device)
        if self._packed is None:
            tokens = self.attended.flatten().nonzero().squeeze(1)
            lengths = self.attended.sum(dim=1)
            # of each sequence the last R rows, which predict the completion
            rows = hidden.shape[0] // B * (tokens // R + 1) - R + tokens % R if all_rows else None
        else:
            layout, row_of = self._packed
            R_max = layout.max_answer_length
            slots = layout.answer_slots
            tokens = row_of[slots // R_max] * R + slots % R_max
            lengths = self.attended.sum(dim=1)[row_of]
            rows = layout.answer_rows if all_rows else None
        if rows is None and len(tokens) != len(hidden):
            raise RuntimeError(
                f"one_pass_loss=True: TRL's head got {len(hidden)} rows for {len(tokens)} "
                "completion tokens"
            )
        cu_seqlens = F.pad(lengths.cumsum(0), (1, 0))
        if tokens.shape[0] == B:
            # one value a token must not look like one a sequence: a sequence without tokens more
            cu_seqlens = torch.cat([cu_seqlens, cu_seqlens[-1:]])
        return _Places(rows, tokens, cu_seqlens)


def chunk_tokens(weight: torch.Tensor) -> int | None:
    """Rows at a time on the GPU, a power of two, which fills the tiles of the GEMMs; None leaves
    the choice to the op.
    """
    if not weight.is_cuda:
        return None
    return 1 << max(0, round(math.log2(WORKSPACE_BYTES / (2 * weight.shape[0]))))


class _Carry(torch.autograd.Function):
    """``values``, of which every entry passes its gradient on to ``loss``."""

    @staticmethod
    def forward(ctx, loss, values):
        return values.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad.sum(), None


class _WithGradient(torch.autograd.Function):
    """``value``, whose gradient also goes to the entry ``place`` of what ``_Carry`` gave."""

    @staticmethod
    def forward(ctx, value, carrier, place):
        ctx.save_for_backward(place)
        ctx.like = carrier.shape, carrier.dtype
        return value.clone()

    @staticmethod
    def backward(ctx, grad):
        (place,) = ctx.saved_tensors
        shape, dtype = ctx.like
        one_hot = torch.zeros(shape.numel(), dtype=dtype, device=grad.device)
        one_hot = one_hot.index_fill_(0, place, 1.0) * grad.to(dtype)
        return grad, one_hot.view(shape), None


# --- from TRL's settings ----------------------------------------------------------------


def one_pass_loss(trainer, inputs: Mapping[str, torch.Tensor]) -> OnePassLoss:
    """The loss that ``trainer._compute_loss`` makes of ``inputs`` in training, as a head."""
    args = trainer.args
    attended = inputs["completion_mask"]
    mask = attended * inputs["tool_mask"] if "tool_mask" in inputs else attended
    advantages = inputs["advantages"]
    if advantages.dim() == 1:
        advantages = advantages.unsqueeze(1)
    sampler_ratio = None
    if trainer.use_vllm and trainer.vllm_importance_sampling_correction:
        sampler_ratio = inputs["importance_sampling_ratio"].expand_as(mask)
    tokens = dict(
        old_logprobs=inputs.get("old_per_token_logps"),
        advantages=advantages.expand_as(mask),
        response_mask=mask.bool(),
        ref_logprobs=inputs["ref_per_token_logps"] if trainer.beta != 0.0 else None,
        rollout_is_weights=sampler_ratio,
        aggregation=token_weights(trainer, inputs, mask.float()),
    )
    options = dict(kl_coef=trainer.beta, kl_importance=args.use_bias_correction_kl)
    if trainer.loss_type == "cispo":  # its epsilon_high bounds the ratio itself
        options |= dict(loss_type="cispo", eps_low=1.0, eps_high=trainer.epsilon_high - 1.0)
    else:
        by_sequence = trainer.importance_sampling_level == "sequence"
        options |= dict(
            loss_type="gspo" if by_sequence else "grpo",
            eps_low=min(trainer.epsilon_low, 1.0),
            eps_high=trainer.epsilon_high,
            ratio_cap=args.delta,
        )
    return OnePassLoss(tokens, attended, options)


def token_weights(trainer, inputs: Mapping[str, torch.Tensor], mask: torch.Tensor) -> torch.Tensor:
    """``(B, R)`` fp32: the factor of each token's loss in TRL's loss; ``mask`` is ``(B, R)``."""
    B = mask.shape[0]
    accumulation = trainer.current_gradient_accumulation_steps
    kind = trainer.loss_type
    if kind in ("dapo", "cispo"):
        # the count of tokens spans the generation batch: one accumulation window of it counts
        tokens = inputs["num_items_in_batch"].clamp(min=1.0) / trainer.accelerator.num_processes
        return mask / (tokens * accumulation / trainer.args.steps_per_generation)
    if kind == "grpo":
        weights = mask / mask.sum(dim=1, keepdim=True).clamp(min=1.0) / B
    elif kind == "bnpo":
        weights = mask / mask.sum().clamp(min=1.0)
    elif kind == "dr_grpo":
        weights = mask / (B * trainer.max_completion_length)
    else:  # luspo
        weights = mask / B
    return weights / accumulation
