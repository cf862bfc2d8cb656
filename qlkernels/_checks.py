"""Argument checks that name the op, the argument, what was expected and what came."""

from collections.abc import Sequence

import torch

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def check_shape(op: str, name: str, x: torch.Tensor, letters: str, sizes: dict[str, int]) -> None:
    """Check ``x`` against ``letters`` such as ``"T V"``; a letter seen first fixes its size in ``sizes``."""
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


def check_positive(op: str, name: str, value: float) -> None:
    if not value > 0.0 or value == float("inf"):
        raise ValueError(f"{op}: {name} must be positive and finite, got {value}")
