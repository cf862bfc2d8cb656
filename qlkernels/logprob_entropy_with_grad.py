"""Token scores and their gradient together, where the upstream gradient is known beforehand.

On-policy GRPO without a KL term is the case: the ratio is 1, so dL/dlogprob = -w A whatever the
scores turn out to be. On sm_90 the CUDA kernel keeps each row of logits on chip between the two
passes over it: T V itemsize bytes read and as many written. A row that is longer than one
multiprocessor's shared memory is held by a cluster of 2, 4 or 8. Elsewhere it is the forward and
then the backward of ``logprob_entropy``, two reads and a write.
"""

from __future__ import annotations

import torch

from qlkernels import _checks, _ext
from qlkernels._direct import is_watched
from qlkernels._dispatch import pick_impl
from qlkernels._nvtx import op_range
from qlkernels._scores import TokenScores
from qlkernels.logprob_entropy import blockers_of, check_arguments, logprob_entropy_ref
from qlkernels.logprob_entropy.passes import backward, forward

OP = "logprob_entropy_with_grad"

# --- reference ---------------------------------------------------------------


def logprob_entropy_with_grad_ref(
    logits, target_ids, dlogprobs=None, dentropy=None, dlse=None, **options
) -> tuple[TokenScores, torch.Tensor]:
    """Ground truth: the eager scores, and autograd."""
    leaf = logits.detach().requires_grad_()
    with torch.enable_grad():
        scores = logprob_entropy_ref(leaf, target_ids, **options)
        pairs = zip(scores, (dlogprobs, dentropy, dlse), strict=True)
        given = [(x, g.to(x.dtype)) for x, g in pairs if g is not None]
        # the sum of all, times 0 where nothing is given, keeps the graph
        total = sum((torch.where(g != 0, x * g, 0.0).sum() for x, g in given), 0.0 * leaf.sum())
    (dlogits,) = torch.autograd.grad(total, leaf)
    return TokenScores(*(x.detach() for x in scores)), dlogits


# --- custom op ---------------------------------------------------------------


def _run(
    dlogits: torch.Tensor,
    logits: torch.Tensor | None,
    target_ids: torch.Tensor,
    row_mask: torch.Tensor | None,
    temperatures: torch.Tensor | None,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    dlogprobs: torch.Tensor | None,
    dentropy: torch.Tensor | None,
    dlse: torch.Tensor | None,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Write ``dlogits``, which holds the logits where ``logits`` is None."""
    logits = dlogits if logits is None else logits
    tau = temperature if temperatures is None else temperatures
    grads = (dlogprobs, dentropy, dlse)
    row = (logits, target_ids, row_mask, tau, softcap, logit_scale)
    with op_range(OP, logits):
        if impl == "cuda" and logits.shape[0]:
            scores = _ext.logprob_entropy_grad(*row, *grads, dlogits)
            if scores is not None:
                return scores
        scores = forward(*row, impl)
        backward(*row, scores, grads, impl, dlogits)
        return scores


_op = torch.library.custom_op(
    "qlkernels::logprob_entropy_with_grad", _run, mutates_args={"dlogits"}
)


@_op.register_fake
def _(dlogits, *_args):
    return tuple(dlogits.new_empty(dlogits.shape[0], dtype=torch.float32) for _ in range(3))


# --- public ------------------------------------------------------------------


def logprob_entropy_with_grad(
    logits: torch.Tensor,
    target_ids: torch.Tensor,
    dlogprobs: torch.Tensor | None,
    dentropy: torch.Tensor | None = None,
    dlse: torch.Tensor | None = None,
    *,
    temperature: float | torch.Tensor = 1.0,
    row_mask: torch.Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    inplace: bool = False,
    validate: bool = False,
    impl: str = "auto",
) -> tuple[TokenScores, torch.Tensor]:
    """Scores of every row and the gradient of the logits, for an upstream gradient that is known.

    Args:
        logits: ``[T, V]`` bf16, fp16 or fp32, any row stride, last dim contiguous.
        target_ids: ``[T]`` int64, already shifted; as in ``logprob_entropy``.
        dlogprobs, dentropy, dlse: ``[T]`` fp32, the derivatives of the loss with respect to the
            three scores; None for zero.
        temperature, row_mask, softcap, logit_scale, validate: as in ``logprob_entropy``.
        inplace: write the gradient over ``logits``, which nothing may read afterwards.
        impl: ``"auto"``, ``"cuda"``, ``"triton"``, ``"cpu"``, ``"torch"`` or ``"reference"``; an
            explicit choice never falls back.

    Returns:
        ``TokenScores``, fp32 ``[T]``, and ``dlogits``, ``[T, V]`` in the dtype of ``logits``.
        Neither is differentiable. Rows that are masked, or whose upstream gradients are all exactly
        0, have a gradient of 0.

    Raises:
        ValueError, TypeError: a shape, dtype, device or value that does not fit, by name.
        RuntimeError: ``impl`` cannot run here, with the reason.
    """
    sizes = check_arguments(
        OP, logits, target_ids, temperature, row_mask, softcap, logit_scale,
        inplace="inplace" if inplace else None, validate=validate, impl=impl,
    )  # fmt: skip
    grads = dict(dlogprobs=dlogprobs, dentropy=dentropy, dlse=dlse)
    for name, g in grads.items():
        if g is not None:
            _checks.check_shape(OP, name, g, "T", sizes)
            if g.device != logits.device:
                raise ValueError(f"{OP}: {name} is on {g.device}, but logits is on {logits.device}")
    chosen = pick_impl(OP, impl, blockers_of(logits))
    if chosen == "reference":
        scores, dlogits = logprob_entropy_with_grad_ref(
            logits, target_ids, **grads, temperature=temperature, row_mask=row_mask,
            softcap=softcap, logit_scale=logit_scale,
        )  # fmt: skip
        return scores, logits.detach().copy_(dlogits) if inplace else dlogits
    if all(g is None for g in grads.values()):
        grads["dlogprobs"] = torch.zeros(sizes["T"], dtype=torch.float32, device=logits.device)
    is_tensor = isinstance(temperature, torch.Tensor)
    x = logits.detach()
    out = x if inplace else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    arguments = (
        out,
        None if inplace else x,
        target_ids.contiguous(),
        None if row_mask is None else row_mask.contiguous(),
        temperature.float().contiguous() if is_tensor else None,
        1.0 if is_tensor else float(temperature),
        softcap,
        float(logit_scale),
        *(None if g is None else g.detach().float().contiguous() for g in grads.values()),
        chosen,
    )
    if is_watched(*arguments):
        scores = torch.ops.qlkernels.logprob_entropy_with_grad(*arguments)
    else:
        scores = _run(*arguments)
        torch.autograd.graph.increment_version(out)
    return TokenScores(*scores), out
