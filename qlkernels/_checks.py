"""Argument checks that name the op, the argument, what was expected and what came."""

from collections.abc import Sequence

import torch

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_PLAIN = (torch.Tensor, torch.nn.Parameter)


def check_shape(op: str, name: str, x: torch.Tensor, letters: str, sizes: dict[str, int]) -> None:
    """Check ``x`` against ``letters`` such as ``"T V"``; a letter seen first fixes its size in
    ``sizes``.
    """
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a tensor [{letters}], got {type(x).__name__}")
    wanted = letters.split()
    if x.dim() != len(wanted):
        raise ValueError(f"{op}: {name} must be [{', '.join(wanted)}], got shape {tuple(x.shape)}")
    for letter, size in zip(wanted, x.shape, strict=True):
        if sizes.setdefault(letter, size) != size:
            raise ValueError(
                f"{op}: {name} is [{', '.join(wanted)}] = {tuple(x.shape)}, "
                f"but {letter} = {sizes[letter]} elsewhere"
            )


def check_dtype(op: str, name: str, x: torch.Tensor, dtypes: Sequence[torch.dtype]) -> None:
    if x.dtype not in dtypes:
        allowed = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(
            f"{op}: {name} must be {allowed}, got {str(x.dtype).removeprefix('torch.')}"
        )


def check_device(op: str, name: str, x: torch.Tensor, like: torch.Tensor, like_name: str) -> None:
    if x.device != like.device:
        raise ValueError(f"{op}: {name} is on {x.device}, but {like_name} is on {like.device}")


def check_last_dim_contiguous(op: str, name: str, x: torch.Tensor) -> None:
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        raise ValueError(
            f"{op}: the last dim of {name} must be contiguous, got strides {x.stride()}; "
            f"call {name}.contiguous()"
        )


def as_wanted(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Contiguous and in ``dtype``; x itself where it is both, without asking it to become so."""
    x = x if x.dtype == dtype else x.to(dtype)
    return x if x.is_contiguous() else x.contiguous()


def check_positive(op: str, name: str, value: float) -> None:
    if not value > 0.0 or value == float("inf"):
        raise ValueError(f"{op}: {name} must be positive and finite, got {value}")


def check_rows(
    op: str,
    rows: torch.Tensor,
    rows_name: str,
    target_ids: torch.Tensor,
    temperature: float | torch.Tensor,
    row_mask: torch.Tensor | None,
    sizes: dict[str, int],
) -> None:
    """The arguments that every row op has: ``[T]`` targets, an optional ``[T]`` mask, a float or
    ``[T]`` temperature.
    """
    check_shape(op, "target_ids", target_ids, "T", sizes)
    check_dtype(op, "target_ids", target_ids, (torch.int64,))
    check_device(op, "target_ids", target_ids, rows, rows_name)
    if row_mask is not None:
        check_shape(op, "row_mask", row_mask, "T", sizes)
        check_dtype(op, "row_mask", row_mask, (torch.bool,))
        check_device(op, "row_mask", row_mask, rows, rows_name)
    if isinstance(temperature, torch.Tensor):
        check_shape(op, "temperature", temperature, "T", sizes)
        check_device(op, "temperature", temperature, rows, rows_name)
        if temperature.requires_grad:
            raise ValueError(f"{op}: temperature has no gradient here; pass temperature.detach()")


def check_head(
    op: str,
    hidden_states: torch.Tensor,
    lm_head_weight: torch.Tensor,
    target_ids: torch.Tensor,
    bias: torch.Tensor | None,
    temperature: float | torch.Tensor,
    row_mask: torch.Tensor | None,
    sizes: dict[str, int],
    impl: str,
) -> None:
    """Packed hidden states ``[T, H]``, the head ``[V, H]`` and the rows that go with them."""
    check_shape(op, "hidden_states", hidden_states, "T H", sizes)
    check_unsharded(op, "lm_head_weight", lm_head_weight)
    check_shape(op, "lm_head_weight", lm_head_weight, "V H", sizes)
    allowed = FLOATS if impl == "reference" else FLOATS[:3]
    check_dtype(op, "hidden_states", hidden_states, allowed)
    operands = {"lm_head_weight": lm_head_weight} | ({} if bias is None else {"bias": bias})
    for name, operand in operands.items():
        check_dtype(op, name, operand, (hidden_states.dtype,))
        check_device(op, name, operand, hidden_states, "hidden_states")
    if bias is not None:
        check_shape(op, "bias", bias, "V", sizes)
    check_last_dim_contiguous(op, "hidden_states", hidden_states)
    check_last_dim_contiguous(op, "lm_head_weight", lm_head_weight)
    check_rows(op, hidden_states, "hidden_states", target_ids, temperature, row_mask, sizes)
    V, H = lm_head_weight.shape
    if V == 0 or H == 0:
        raise ValueError(f"{op}: lm_head_weight is [V, H] = {(V, H)}: nothing to multiply")


def check_scalars(
    op: str, temperature: float | torch.Tensor, softcap: float | None, logit_scale: float
) -> None:
    if not isinstance(temperature, torch.Tensor):
        check_positive(op, "temperature", temperature)
    if softcap is not None:
        check_positive(op, "softcap", softcap)
    check_positive(op, "logit_scale", logit_scale)


def check_targets(op: str, target_ids: torch.Tensor, row_mask: torch.Tensor | None, V: int) -> None:
    """Raise for a target outside ``[0, V)`` in a row that counts. Synchronises on the GPU; traced
    code is not checked.
    """
    if torch.compiler.is_compiling():
        return
    if target_ids.numel() == 0:
        return
    least, most = target_ids.aminmax()
    if 0 <= int(least) and int(most) < V:
        return
    wrong = (target_ids < 0) | (target_ids >= V)
    if row_mask is not None:
        wrong = wrong & row_mask
    if bool(wrong.any()):
        t = int(wrong.nonzero()[0])
        raise ValueError(
            f"{op}: target_ids[{t}] = {int(target_ids[t])} is outside [0, {V}); "
            "exclude the row with row_mask"
        )


def check_unsharded(op: str, name: str, weight: torch.Tensor) -> None:
    """Refuse a weight of which this rank holds a part, with what to do about it."""
    if not isinstance(weight, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(weight).__name__}")
    # asking a tensor for what it has not got takes a microsecond
    if type(weight) not in _PLAIN and hasattr(weight, "full_tensor"):
        raise ValueError(
            f"{op}: {name} is a DTensor; pass {name}.full_tensor(grad_placements=[Partial('avg')]) "
            "(without grad_placements its gradient is not reduced over ranks), or call the op "
            "inside the module's forward, where FSDP2 has gathered the weight"
        )
    if weight.numel() == 0 and hasattr(weight, "ds_id"):
        raise ValueError(
            f"{op}: {name} is partitioned by ZeRO-3; call the op inside the model's forward, or "
            "under deepspeed.zero.GatheredParameters around forward and backward"
        )
