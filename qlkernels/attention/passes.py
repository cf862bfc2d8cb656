"""Forward and backward over the calls that packed and shared-prefix attention are made of.

The part that every segment has with itself is causal. Long segments run as calls of their own,
neighbouring short ones together. In a group, the answers stacked as one block of queries attend to
the prefix in one more call, not causal, and the two parts merge (see ``merge``). No key or value is
repeated, nothing of size P x R exists.

Backward of the softmax over all keys, split by keys: with the merged out and lse,
p = e^(s - lse) and delta = sum(dout out) are those of the whole row, so every call returns its
exact share of dq, and dk, dv of its own keys. The shares are added in a fixed order: own part
first, then answers.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch

from qlkernels.attention.backends import BACKENDS, Backend, Call
from qlkernels.attention.merge import merge_into

# Rows from which a segment fills a GPU by itself; inference: from 132 blocks of 128 rows a head
_LONG = 4096


class Run(NamedTuple):
    """Neighbouring segments ``[first, last)`` that one call covers, and their rows."""

    first: int
    last: int
    start: int
    stop: int
    longest: int

    @property
    def rows(self) -> slice:
        return slice(self.start, self.stop)


@functools.lru_cache(maxsize=64)
def runs_of(lengths: tuple[int, ...], packs: bool) -> tuple[Run, ...]:
    """Calls for the causal part of segments of these lengths; empty ones cost none."""
    found: list[Run] = []
    start = 0
    for i, length in enumerate(lengths):
        stop = start + length
        before = found[-1] if found else None
        if length == 0:
            continue
        joins = packs and before is not None and max(length, before.longest) < _LONG
        if joins:
            found[-1] = Run(before.first, i + 1, before.start, stop, max(before.longest, length))
        else:
            found.append(Run(i, i + 1, start, stop, length))
        start = stop
    return tuple(found)


class Cross(NamedTuple):
    """A group's answers, as one block of queries, and the prefix that they attend to."""

    answers: slice
    prefix: slice


def crosses_of(prompt_lengths: Sequence[int], group_rows: Sequence[int]) -> list[Cross]:
    """``group_rows`` is the number of answer rows of every group."""
    found, start = [], 0
    for P, rows in zip(prompt_lengths, group_rows, strict=True):
        middle = start + P - 1
        if P > 1 and rows > 0:
            found.append(Cross(slice(middle, middle + rows), slice(start, middle)))
        start = middle + rows
    return found


def _own_call(run: Run, cu_seqlens: torch.Tensor, call: Call) -> Call:
    if run.last - run.first == 1:
        return call._replace(causal=True)
    cu = cu_seqlens[run.first : run.last + 1]
    cu = cu - cu[0] if run.start else cu.contiguous()
    return call._replace(causal=True, cu_seqlens=cu, max_seqlen=run.longest)


def _part(run_or_slice, *tensors):
    rows = run_or_slice.rows if isinstance(run_or_slice, Run) else run_or_slice
    return tuple(x[rows] for x in tensors)


def packs(backend: str, q: torch.Tensor) -> bool:
    return BACKENDS[backend].packs and q.is_cuda


def forward(
    backend: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    runs: Sequence[Run],
    crosses: Sequence[Cross],
    call: Call,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out ``[T, Hq, D]`` contiguous and lse ``[Hq, T]``, fp32 (fp64 for fp64)."""
    T, Hq, D = q.shape
    run_call = BACKENDS[backend].forward
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    if len(runs) == 1 and runs[0].rows == slice(0, T):
        out, lse = run_call(q, k, v, _own_call(runs[0], cu_seqlens, call))
        out, lse = out.contiguous(), lse.contiguous()
    else:
        out = torch.empty(T, Hq, D, dtype=q.dtype, device=q.device)
        lse = torch.empty(Hq, T, dtype=lse_dtype, device=q.device)
        for run in runs:
            own = run_call(*_part(run, q, k, v), _own_call(run, cu_seqlens, call))
            out[run.rows], lse[:, run.rows] = own
            del own  # before the next call allocates
    for answers, prefix in crosses:
        part, part_lse = run_call(q[answers], *_part(prefix, k, v), call._replace(causal=False))
        merge_into(out[answers], lse[:, answers], part, part_lse)
        del part, part_lse
    return out, lse


def backward(
    backend: str,
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens: torch.Tensor,
    runs: Sequence[Run],
    crosses: Sequence[Cross],
    call: Call,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk, dv in the shapes and dtypes of q, k and v, contiguous."""
    chosen: Backend = BACKENDS[backend]
    if len(runs) == 1 and runs[0].rows == slice(0, len(q)):
        own = chosen.backward(dout, q, k, v, out, lse, _own_call(runs[0], cu_seqlens, call))
        grads = tuple(g.contiguous() for g in own)
    else:
        grads = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        for run in runs:
            own = chosen.backward(
                *_part(run, dout, q, k, v, out),
                lse[:, run.rows].contiguous(),
                _own_call(run, cu_seqlens, call),
            )
            for whole, part in zip(grads, own, strict=True):
                whole[run.rows] = part
            del own
    dq, dk, dv = grads
    for answers, prefix in crosses:
        part = chosen.backward(
            dout[answers], q[answers], *_part(prefix, k, v), out[answers],
            lse[:, answers].contiguous(), call._replace(causal=False),
        )  # fmt: skip
        for whole, rows, share in zip((dq, dk, dv), (answers, prefix, prefix), part, strict=True):
            whole[rows] += share
        del part
    return dq, dk, dv
