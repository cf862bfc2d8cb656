"""Loads ``qlkernels._C`` (built from ``csrc/``), or keeps the reason why not; calls it."""

import torch

from qlkernels._target import compute_capability

try:
    import qlkernels._C as _C

    missing_reason: str | None = None
except ImportError as error:  # built without a compiler, or for another Python
    _C = None
    missing_reason = (
        f"the extension qlkernels._C is not built ({error}); reinstall with a C++ compiler on PATH"
    )

# how csrc/ names a dtype
DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def why_not_cpu(*tensors: torch.Tensor) -> str | None:
    """Why the C++ kernels cannot run on these tensors, or None."""
    if _C is None:
        return missing_reason
    if not all(t.device.type == "cpu" for t in tensors):
        return f"it needs CPU tensors, got {tensors[0].device}"
    return None


def why_not_cuda(*tensors: torch.Tensor) -> str | None:
    """Why the CUDA C++ kernels cannot run on these tensors, or None."""
    if _C is None:
        return missing_reason
    if not _C.has_cuda:
        return "the extension was built without CUDA (no nvcc at build time, or QL_BUILD_CUDA=0)"
    if not all(t.is_cuda for t in tensors):
        return f"it needs tensors on a CUDA device, got {tensors[0].device}"
    capability = compute_capability(tensors[0].device.index or 0)
    if not 80 <= capability <= 90:
        return f"it is built for {', '.join(_C.cuda_archs)}, this device is sm_{capability}"
    return None


def logprob_entropy_fwd(
    logits: torch.Tensor,
    target_ids: torch.Tensor,
    row_mask: torch.Tensor | None,
    temperature: float | torch.Tensor,
    softcap: float | None,
    logit_scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probability of the target, entropy and log-sum-exp of every row, in nats.

    Args:
        logits: ``[T, V]`` fp32, fp16 or bf16, last dim contiguous, V < 2**31, on the CPU or a CUDA
            device, which decides what runs.
        target_ids: ``[T]`` int64. One outside [0, V) gives NaN as the row's logprob; callers refuse
            it where they can.
        row_mask: ``[T]`` bool or None. Rows with False are never read and give 0.
        temperature: positive; a float or ``[T]`` fp32.
        softcap: positive, or None for none.
        logit_scale: positive.

    Returns:
        ``(logprobs, entropy, lse)``, each ``[T]`` fp32.
    """
    logprobs, entropy, lse = (
        torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device) for _ in range(3)
    )
    shared, keep = _shared_arguments(
        logits, target_ids, row_mask, temperature, softcap, logit_scale
    )
    outputs = (logprobs.data_ptr(), entropy.data_ptr(), lse.data_ptr())
    call("logprob_entropy_fwd", logits.device, *shared, *outputs)
    return logprobs, entropy, lse


def logprob_entropy_bwd(
    logits: torch.Tensor,
    target_ids: torch.Tensor,
    row_mask: torch.Tensor | None,
    temperature: float | torch.Tensor,
    softcap: float | None,
    logit_scale: float,
    entropy: torch.Tensor,
    lse: torch.Tensor,
    g_logprobs: torch.Tensor | None,
    g_entropy: torch.Tensor | None,
    g_lse: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """Write the gradient with respect to ``logits`` into ``out``.

    The first six arguments are the forward's, ``entropy`` and ``lse`` its results. ``g_*`` are the
    upstream gradients, ``[T]`` fp32, None for zero. ``out`` is ``[T, V]`` in the dtype of
    ``logits``, last dim contiguous, and may be ``logits`` itself. Rows that are masked, or whose
    upstream gradients are all exactly 0, become 0 unread.
    """
    shared, keep = _shared_arguments(
        logits, target_ids, row_mask, temperature, softcap, logit_scale
    )
    rows = [
        None if x is None else x.to(torch.float32).contiguous()
        for x in (entropy, lse, g_logprobs, g_entropy, g_lse)
    ]
    pointers = [0 if x is None else x.data_ptr() for x in rows]
    stride = out.stride(0)
    call("logprob_entropy_bwd", logits.device, *shared, *pointers, out.data_ptr(), stride)


def logprob_entropy_grad(
    logits: torch.Tensor,
    target_ids: torch.Tensor,
    row_mask: torch.Tensor | None,
    temperature: float | torch.Tensor,
    softcap: float | None,
    logit_scale: float,
    g_logprobs: torch.Tensor | None,
    g_entropy: torch.Tensor | None,
    g_lse: torch.Tensor | None,
    out: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """Both of the above in one read of the logits, on a card of sm_90; None where the rows do not
    start on 16 bytes or the card is another, and then nothing ran.
    """
    scores = tuple(
        torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device) for _ in range(3)
    )
    shared, keep = _shared_arguments(
        logits, target_ids, row_mask, temperature, softcap, logit_scale
    )
    upstream = [
        None if x is None else x.to(torch.float32).contiguous()
        for x in (g_logprobs, g_entropy, g_lse)
    ]
    pointers = [0 if x is None else x.data_ptr() for x in (*scores, *upstream)]
    ran = call(
        "logprob_entropy_grad", logits.device, *shared, *pointers, out.data_ptr(), out.stride(0)
    )
    return scores if ran else None


def _shared_arguments(logits, target_ids, row_mask, temperature, softcap, logit_scale):
    """The arguments that both directions begin with, and the tensors that must outlive the call."""
    target_ids = target_ids.contiguous()
    row_mask = None if row_mask is None else row_mask.to(torch.bool).contiguous()
    per_row = isinstance(temperature, torch.Tensor)
    taus = temperature.to(torch.float32).expand(logits.shape[0]).contiguous() if per_row else None
    shared = (
        logits.data_ptr(),
        DTYPE_CODES[logits.dtype],
        *logits.shape,
        logits.stride(0),
        target_ids.data_ptr(),
        0 if row_mask is None else row_mask.data_ptr(),
        0 if taus is None else taus.data_ptr(),
        1.0 if per_row else temperature,
        softcap or 0.0,
        logit_scale,
    )
    return shared, (target_ids, row_mask, taus)


def call(name: str, device: torch.device, *arguments):
    """Run ``name`` of the extension for the device, with the number of threads or the current
    stream as its last argument, and return what it returns.
    """
    if device.type == "cpu":
        return getattr(_C, f"{name}_cpu")(*arguments, torch.get_num_threads())
    function = getattr(_C, f"{name}_cuda")
    # torch.cuda.current_stream() makes an object of it, which takes longer than the launch
    stream = torch._C._cuda_getCurrentRawStream(device.index)
    if device.index == torch.cuda.current_device():
        return function(*arguments, stream)
    with torch.cuda.device(device):
        return function(*arguments, stream)
