"""TRL's log-probabilities and entropies, computed by our ops. Nothing changes before ``patch_trl``.

TRL's trainers look two functions up in ``trl.trainer.utils`` whenever they score tokens: one from
hidden states (the fused head of GRPO, RLOO, SFT, DPO, KTO) and one from logits. ``patch_trl`` puts
ours there; losses, masks and metrics stay TRL's.
"""

from __future__ import annotations

from types import ModuleType

import torch

from qlkernels import linear_logprob, logprob_entropy
from qwenlong.integrations.patches import Patch, Replacements
from qwenlong.integrations.versions import require_version

WORKS_WITH = ((1, 16), (1, 17))  # from, and below
# the function from hidden states, whose statistics that are ours are _OURS; the two from logits
HEAD, _LOGITS, _IS_FOR_LOGITS = (
    "_ChunkedLogProbFunction",
    "_fused_logprob_entropy",
    "_supports_trl_loss_kernel",
)
_OURS = {"log_probs", "entropy"}

_replacements = Replacements()


def require_trl() -> ModuleType:
    """``trl.trainer.utils`` of a version that works.

    Raises:
        ImportError: there is no TRL, or it is another version; names the range.
    """
    require_version("trl", "TRL", WORKS_WITH, "replaces private functions")
    import trl.trainer.utils

    return trl.trainer.utils


def patch_trl() -> Patch:
    """Compute log-probabilities and entropies of every TRL trainer with our ops, from here on.

        patch_trl()                      # for the rest of the process, or
        with patch_trl():                # for a block
            trainer.train()

    A backward may run after the end of a block. Trainers that ask the head for other statistics
    too (SFT's token accuracy, DPO's mean logits) keep TRL's own head.

    Returns:
        A handle with ``undo()``; patches may be nested.

    Raises:
        ImportError: TRL is missing, or is a version other than those that work.
    """
    utils = require_trl()
    ours = {HEAD: _Head, _LOGITS: _from_logits, _IS_FOR_LOGITS: _is_for_logits}
    return _replacements.patch(
        (utils, name, value)
        for name, value in ours.items()
        if hasattr(utils, name)  # the one from logits exists only where Triton does
    )


# --- what TRL calls ----------------------------------------------------------


class _Head:
    """Stands for TRL's autograd function from hidden states."""

    @staticmethod
    def apply(
        hidden: torch.Tensor,  # [N, H]
        weight: torch.Tensor,  # [V, H]
        bias: torch.Tensor | None,
        targets: torch.Tensor,  # [N]
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = (),
    ) -> tuple[torch.Tensor | None, ...]:
        if set(outputs) - _OURS:
            return _replacements.originals[HEAD].apply(
                hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping,
                logit_scale, outputs,
            )  # fmt: skip
        # TRL scores in the dtype of the hidden states, whatever that of the weight
        weight = weight.to(hidden.dtype)
        bias = None if bias is None else bias.to(hidden.dtype)
        scores = linear_logprob(
            hidden, weight, targets, bias=bias, temperature=temperature,
            softcap=final_logit_softcapping, logit_scale=logit_scale,
        )  # fmt: skip
        entropy = scores.entropy if "entropy" in outputs else None
        return scores.logprobs, entropy, None, None, None


def _is_for_logits(
    logits: torch.Tensor, index: torch.Tensor | None = None, row_mask: torch.Tensor | None = None
) -> bool:
    """Whether the function from logits takes these; TRL goes on in plain torch where not."""
    if logits.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return False
    if logits.device.type not in ("cpu", "cuda") or not 1 <= logits.dim() <= 3:
        return False
    if logits.stride(-1) != 1 or logits.shape[-1] == 0:
        return False
    return all(
        x is None or (x.shape == logits.shape[:-1] and x.device == logits.device)
        for x in (index, row_mask)
    )


def _from_logits(
    logits: torch.Tensor,
    index: torch.Tensor,
    temperature: float = 1.0,
    row_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    shape = logits.shape[:-1]
    scores = logprob_entropy(
        logits.reshape(-1, logits.shape[-1]),
        index.reshape(-1).long(),
        temperature=temperature,
        row_mask=None if row_mask is None else row_mask.reshape(-1) != 0,
    )
    return scores.logprobs.view(shape), scores.entropy.view(shape)
