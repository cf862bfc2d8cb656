"""Ops, shapes and providers: one ``@register`` function per op says what is compared and how it is
checked.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from qlkernels._target import is_interpreting

Outputs = dict[str, torch.Tensor]
IMPL_DEVICES = {"triton": "cuda", "cuda": "cuda", "cpu": "cpu", "torch": "any"}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Unavailable(RuntimeError):
    """An op or a provider that cannot run here; the message is the reason."""


@dataclass(frozen=True)
class Point:
    """One line of work: an op at one case, dtype and shape. ``shape`` keeps its order."""

    op: str
    case: str
    dtype: str
    shape: Mapping[str, int | str]

    @property
    def shape_text(self) -> str:
        return ";".join(f"{key}={value}" for key, value in self.shape.items())

    def __str__(self) -> str:
        return f"{self.op} {self.case} {self.shape_text} {self.dtype}"


@dataclass
class Problem:
    """What a ``@register`` function returns: everything about one point except the timing.

    ``impls`` maps a provider's name (``ours-<impl>``, or a peer's name with its version) to a
    callable without arguments that returns its outputs by name. ``check(outputs, strict,
    complete)`` compares them with fp64, raises ``gate.WrongResult``, and returns the worst relative
    error; ``strict`` is the rule for our own kernels, and a ``complete`` provider must return every
    output. ``bytes`` is the least traffic, ``useful_flops`` the least work.
    """

    impls: dict[str, Callable[[], Outputs]]
    check: Callable[[Outputs, bool, bool], float]
    bytes: int
    useful_flops: int
    peer_scope: dict[str, str] = field(default_factory=dict)  # "same" or "less"; ours has none
    absent: dict[str, str] = field(default_factory=dict)  # provider -> why it cannot run here


Builder = Callable[..., Problem]


@dataclass(frozen=True)
class Op:
    name: str
    build: Builder
    impls: tuple[str, ...]  # values of ``impl=`` that are timed
    points: Mapping[str, tuple[Point, ...]]  # "cuda" or "cpu" -> points, smallest first

    def ours(self, device: str) -> dict[str, str]:
        """``ours-<impl>`` -> impl, for the implementations that such a device can have."""
        return {f"ours-{i}": i for i in self.impls if IMPL_DEVICES[i] in (device, "any")}


OPS: dict[str, Op] = {}


def register(
    op: str, *, impls: Sequence[str] = (), cuda: Sequence[dict], cpu: Sequence[dict]
) -> Callable[[Builder], Builder]:
    """Add an op. Every dict holds ``case``, ``dtype`` and the shape in the order in which it is
    printed.

    The decorated function is called as ``build(device, case, dtype, **shape)`` with a
    ``torch.dtype``, and may raise ``Unavailable``. Points are listed smallest first: ``--quick``
    and the profiler take the first of each case.
    """

    def points(dicts: Sequence[dict]) -> tuple[Point, ...]:
        found = []
        for entry in dicts:
            shape = {k: v for k, v in entry.items() if k not in ("case", "dtype")}
            found.append(Point(op, entry["case"], entry["dtype"], shape))
        if len({str(p) for p in found}) != len(found):
            raise ValueError(f"bench: {op} registers the same point twice")
        return tuple(found)

    def wrap(build: Builder) -> Builder:
        if op in OPS:
            raise ValueError(f"bench: the op {op!r} is registered twice")
        OPS[op] = Op(op, build, tuple(impls), {"cuda": points(cuda), "cpu": points(cpu)})
        return build

    return wrap


def select(
    ops: Sequence[str],
    device: str,
    cases: Sequence[str] = (),
    shapes: Sequence[str] = (),
    *,
    quick: bool = False,
) -> list[Point]:
    """Points of ``ops`` (all where empty or ``all``) whose case and shape match a pattern of
    ``cases`` and of ``shapes`` (all where empty).
    """
    names = list(OPS) if not ops or "all" in ops else list(dict.fromkeys(ops))
    unknown = [name for name in names if name not in OPS]
    if unknown:
        raise ValueError(f"bench: unknown op {unknown[0]!r}; choose from {', '.join(OPS)}, or all")
    found: list[Point] = []
    for name in names:
        chosen = [
            p
            for p in OPS[name].points[device]
            if (not cases or any(fnmatch.fnmatchcase(p.case, x) for x in cases))
            and (not shapes or any(fnmatch.fnmatchcase(p.shape_text, x) for x in shapes))
        ]
        if quick:
            chosen = list({p.case: p for p in reversed(chosen)}.values())[::-1]
        found += chosen
    if not found:
        wanted = [*cases, *shapes]
        matching = f" that matches {', '.join(wanted)}" if wanted else ""
        raise ValueError(f"bench: {', '.join(names)} has no case on {device}{matching}")
    return found


def build(point: Point, device: str) -> Problem:
    """The problem of ``point`` on ``device``; raises ``Unavailable`` where the op itself is
    missing.
    """
    if device == "cuda" and is_interpreting():
        raise Unavailable("TRITON_INTERPRET=1 is set, and the interpreter's speed says nothing")
    return OPS[point.op].build(device, point.case, DTYPES[point.dtype], **point.shape)
