"""verl's fused log-probabilities and entropies, computed by our op. Nothing changes before
``patch_verl``.

The forward that verl gives a model with ``use_fused_kernels=True`` scores tokens with a
``FusedLinearForPPO``, looked up by name at every call, of the backend that
``fused_kernel_options.impl_backend`` names. ``patch_verl`` adds the backend ``qwenlong``; verl's
own backends stay what they are.
"""

from __future__ import annotations

import torch

from qlkernels import linear_logprob
from qwenlong.integrations.patches import Patch, Replacements
from qwenlong.integrations.versions import require_version

BACKEND = "qwenlong"
WORKS_WITH = ((0, 9, 1), (0, 10))  # from, and below

_replacements = Replacements()


def require_verl() -> None:
    """Check that verl is here, in a version that works.

    Raises:
        ImportError: there is no verl, or it is another version; names the range.
    """
    require_version("verl", "verl", WORKS_WITH, "builds on methods that verl may change")


def patch_verl() -> Patch:
    """Make ``impl_backend: qwenlong`` a backend of verl's fused kernels, in this process.

    verl's workers are processes of their own: there it is one key of the configuration,
    ``actor_rollout_ref.model.external_lib: qwenlong.integrations.verl_external``. For verl's FSDP
    engines; Megatron's fused forward has no such place.

    Returns:
        A handle with ``undo()``; patches may be nested.

    Raises:
        ImportError: verl is missing, or is a version other than those that work.
    """
    require_verl()
    from verl.models.transformers import monkey_patch
    from verl.utils.experimental import torch_functional

    forwards, head = "patch_forward_with_backends", "FusedLinearForPPO"
    return _replacements.patch(
        [
            (monkey_patch, forwards, _forwards_with_ours(getattr(monkey_patch, forwards))),
            (torch_functional, head, _head_with_ours(getattr(torch_functional, head))),
        ]
    )


def _forwards_with_ours(original):
    def patch_forward_with_backends(model, use_fused_kernels=False, fused_kernels_backend=None):
        if not use_fused_kernels or fused_kernels_backend != BACKEND:
            original(model, use_fused_kernels, fused_kernels_backend)
            return
        # the forward of the backend "torch" reads the head's backend from the model
        original(model, True, "torch")
        model._verl_fused_kernels_backend = BACKEND

    return patch_forward_with_backends


def _head_with_ours(original: type[torch.nn.Module]) -> type[torch.nn.Module]:
    class FusedLinearForPPO(original):
        def __init__(self, chunk_size: int = 512, impl_backend: str = "torch") -> None:
            super().__init__(chunk_size, "torch" if impl_backend == BACKEND else impl_backend)
            self.impl_backend = impl_backend

        def forward(
            self,
            hidden_states: torch.Tensor,  # [T, H] or [B, S, H]
            vocab_weights: torch.Tensor,  # [V, H]
            input_ids: torch.Tensor,  # [T] or [B, S], already shifted
            temperature: float = 1.0,
        ) -> tuple[torch.Tensor, torch.Tensor]:
            if self.impl_backend != BACKEND:
                return super().forward(hidden_states, vocab_weights, input_ids, temperature)
            scores = linear_logprob(
                hidden_states, vocab_weights, input_ids.long(), temperature=temperature
            )
            return scores.logprobs, scores.entropy

    return FusedLinearForPPO
