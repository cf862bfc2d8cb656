"""The ``P + sum R_i`` layout: one prompt, its answers, and the prompt's tokens stored once.

A group is a prompt of P >= 1 tokens and answers of R_i >= 0 tokens. It becomes 1 + G segments of
the packed axis, in this order:

    prefix      prompt[0 .. P-2]                            targets prompt[1 .. P-1]
    answer i    prompt[P-1], answer_i[0 .. R_i-2]           targets answer_i[0 .. R_i-1]

so that every row has exactly one target. The last prompt token is copied to the head of each
answer, where its target differs. It keeps position P-1 and the answer goes on from P. A row of an
answer attends to the whole prefix and causally to its own answer: what it would see in the full
sequence. T = sum over groups of (P - 1 + sum R_i); full sequences cost sum (P - 1 + R_i) instead.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

Ids = Sequence[int] | torch.Tensor


class GroupSpan(NamedTuple):
    """Rows of one group: the prefix is ``[start, answers_start)``, the answers lie behind it."""

    start: int
    answers_start: int
    stop: int
    answer_lengths: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class PackedGroups:
    """Groups packed into one axis of T rows and S segments. Built by :func:`pack_groups`.

    A is the number of answers of all groups, in order; N the number of their rows. The lengths are
    also kept on the host, so that nothing has to be read back from the device.
    """

    input_ids: torch.Tensor  # [T] int64
    position_ids: torch.Tensor  # [T] int64, of the full sequence
    target_ids: torch.Tensor  # [T] int64
    cu_seqlens: torch.Tensor  # [S + 1] int32, over segments
    prefix_of: torch.Tensor  # [S] int32, segment of the group's prefix; a prefix has itself
    group_of: torch.Tensor  # [S] int32
    answer_of: torch.Tensor  # [S] int32, index among all answers; -1 for a prefix
    segment_of: torch.Tensor  # [T] int64
    is_answer: torch.Tensor  # [T] bool
    answer_rows: torch.Tensor  # [N] int64, rows where is_answer, in order
    answer_slots: torch.Tensor  # [N] int64, their places in a flattened (A, R_max)
    prompt_lengths: tuple[int, ...]  # P of each group
    answer_lengths: tuple[tuple[int, ...], ...]  # R_i of each group

    def to(self, device: torch.device | str) -> PackedGroups:
        """The same layout with its tensors on ``device``."""
        moved = {
            field.name: getattr(self, field.name).to(device)
            for field in dataclasses.fields(self)
            if isinstance(getattr(self, field.name), torch.Tensor)
        }
        return dataclasses.replace(self, **moved)

    @property
    def device(self) -> torch.device:
        return self.input_ids.device

    @property
    def num_groups(self) -> int:
        return len(self.prompt_lengths)

    @property
    def num_answers(self) -> int:
        """A, answers of all groups."""
        return sum(len(lengths) for lengths in self.answer_lengths)

    @property
    def max_answer_length(self) -> int:
        """R_max, 0 without answers."""
        return max([0, *[r for lengths in self.answer_lengths for r in lengths]])

    @property
    def max_seqlen(self) -> int:
        """Length of the longest segment."""
        return max([self.max_answer_length, *[P - 1 for P in self.prompt_lengths]])

    @property
    def num_full_tokens(self) -> int:
        """Rows that the same scores cost without sharing: sum of (P + R_i - 1)."""
        return sum(
            P + R - 1
            for P, lengths in zip(self.prompt_lengths, self.answer_lengths, strict=True)
            for R in lengths
        )

    def spans(self) -> list[GroupSpan]:
        """Row ranges of every group, from the host's copy of the lengths."""
        found, start = [], 0
        for P, lengths in zip(self.prompt_lengths, self.answer_lengths, strict=True):
            answers_start = start + P - 1
            stop = answers_start + sum(lengths)
            found.append(GroupSpan(start, answers_start, stop, lengths))
            start = stop
        return found

    def answer_mask(self) -> torch.Tensor:
        """``(A, R_max)`` bool: places of :meth:`gather_answers` that hold a token."""
        flat = self.is_answer.new_zeros(self.num_answers * self.max_answer_length)
        flat = flat.index_fill(0, self.answer_slots, True)
        return flat.view(self.num_answers, self.max_answer_length)

    def gather_answers(self, values: torch.Tensor) -> torch.Tensor:
        """Answer rows of ``values``, padded: entry ``[a, r]`` belongs to token r of answer a.

        Args:
            values: ``[T, ...]``, on the device of the layout. Prefix rows are not read, so they may
                hold NaN.

        Returns:
            ``(A, R_max, ...)``, 0 behind the end of an answer. Differentiable; the gradient of a
            prefix row is 0.
        """
        self._check("gather_answers", "values", values, (self.input_ids.shape[0],), "[T, ...]")
        A, R_max, tail = self.num_answers, self.max_answer_length, values.shape[1:]
        flat = values.new_zeros(A * R_max, *tail)
        flat = flat.index_copy(0, self.answer_slots, values.index_select(0, self.answer_rows))
        return flat.view(A, R_max, *tail)

    def scatter_answers(self, padded: torch.Tensor) -> torch.Tensor:
        """Inverse of :meth:`gather_answers`.

        Args:
            padded: ``(A, R_max, ...)``; what lies behind the end of an answer is not read.

        Returns:
            ``[T, ...]``, 0 in prefix rows. Differentiable.
        """
        shape = (self.num_answers, self.max_answer_length)
        self._check("scatter_answers", "padded", padded, shape, "(A, R_max, ...)")
        tail = padded.shape[2:]
        rows = padded.reshape(shape[0] * shape[1], *tail).index_select(0, self.answer_slots)
        out = padded.new_zeros(self.input_ids.shape[0], *tail)
        return out.index_copy(0, self.answer_rows, rows)

    def spread_answers(self, values: torch.Tensor) -> torch.Tensor:
        """One value an answer, such as its advantage, to all of its rows.

        Args:
            values: ``[A, ...]``.

        Returns:
            ``[T, ...]``, 0 in prefix rows. Differentiable.
        """
        self._check("spread_answers", "values", values, (self.num_answers,), "[A, ...]")
        if not self.num_answers:
            return values.new_zeros(self.input_ids.shape[0], *values.shape[1:])
        answers = self.answer_of.index_select(0, self.segment_of.index_select(0, self.answer_rows))
        out = values.new_zeros(self.input_ids.shape[0], *values.shape[1:])
        return out.index_copy(0, self.answer_rows, values.index_select(0, answers))

    def _check(self, method: str, name: str, x: torch.Tensor, sizes: tuple, letters: str) -> None:
        if tuple(x.shape[: len(sizes)]) != sizes:
            raise ValueError(
                f"PackedGroups.{method}: {name} must be {letters} with leading sizes {sizes}, got "
                f"shape {tuple(x.shape)}"
            )
        if x.device != self.device:
            raise ValueError(
                f"PackedGroups.{method}: {name} is on {x.device}, but the layout is on "
                f"{self.device}; move it with layout.to({str(x.device)!r})"
            )


def pack_groups(prompts: Sequence[Ids], answers: Sequence[Sequence[Ids]]) -> PackedGroups:
    """Pack prompts and their answers so that every prompt is stored once.

    Args:
        prompts: token ids of every group's prompt, lists of int or ``[P]`` integer tensors, P >= 1.
        answers: for every group its answers, each a list of int or an ``[R]`` integer tensor; R may
            be 0, and a group may have no answers. Tensors must all lie on one device.

    Returns:
        The layout, on the device of the given tensors (the CPU for lists).
    """
    if len(prompts) != len(answers):
        raise ValueError(
            f"pack_groups: {len(prompts)} prompts but answers of {len(answers)} groups; give one "
            "list of answers for each prompt"
        )
    given = [*prompts, *(answer for group in answers for answer in group)]
    devices = {x.device for x in given if isinstance(x, torch.Tensor)}
    if len(devices) > 1:
        raise ValueError(f"pack_groups: ids lie on several devices: {sorted(map(str, devices))}")
    device = next(iter(devices), torch.device("cpu"))

    ids, targets, positions = [], [], []
    lengths, prefix_of, group_of, answer_of = [], [], [], []
    num_answers = 0
    for g, (prompt, group) in enumerate(zip(prompts, answers, strict=True)):
        prompt = _as_ids(prompt, f"prompts[{g}]", device)
        P = prompt.shape[0]
        if P == 0:
            raise ValueError(f"pack_groups: prompts[{g}] is empty; a prompt needs at least 1 token")
        prefix = len(lengths)
        ids.append(prompt[:-1])
        targets.append(prompt[1:])
        positions.append(torch.arange(P - 1))
        lengths.append(P - 1)
        answer_of.append(-1)
        for i, answer in enumerate(group):
            answer = _as_ids(answer, f"answers[{g}][{i}]", device)
            R = answer.shape[0]
            ids.append(torch.cat([prompt[-1:], answer])[:R])
            targets.append(answer)
            positions.append(torch.arange(P - 1, P - 1 + R))
            lengths.append(R)
            answer_of.append(num_answers)
            num_answers += 1
        prefix_of += [prefix] * (1 + len(group))
        group_of += [g] * (1 + len(group))

    answer_lengths = tuple(tuple(len(answer) for answer in group) for group in answers)
    R_max = max((r for group in answer_lengths for r in group), default=0)
    lengths = torch.tensor(lengths, dtype=torch.int64)
    cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    if int(cu_seqlens[-1]) >= 2**31:
        raise ValueError(f"pack_groups: {int(cu_seqlens[-1])} rows; offsets are int32")
    segment_of = torch.arange(len(lengths)).repeat_interleave(lengths)
    answer_of = torch.tensor(answer_of, dtype=torch.int64)
    of_row = answer_of[segment_of]
    answer_rows = (of_row >= 0).nonzero().squeeze(1)
    within = answer_rows - cu_seqlens[segment_of[answer_rows]]
    host = dict(
        position_ids=_joined(positions),
        cu_seqlens=cu_seqlens.to(torch.int32),
        prefix_of=torch.tensor(prefix_of, dtype=torch.int32),
        group_of=torch.tensor(group_of, dtype=torch.int32),
        answer_of=answer_of.to(torch.int32),
        segment_of=segment_of,
        is_answer=of_row >= 0,
        answer_rows=answer_rows,
        answer_slots=of_row[answer_rows] * R_max + within,
    )
    return PackedGroups(
        input_ids=_joined(ids).to(device),
        target_ids=_joined(targets).to(device),
        prompt_lengths=tuple(len(prompt) for prompt in prompts),
        answer_lengths=answer_lengths,
        **{name: x.to(device) for name, x in host.items()},
    )


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)


def _as_ids(ids: Ids, name: str, device: torch.device) -> torch.Tensor:
    """``ids`` as a one-dimensional int64 tensor."""
    try:
        found = torch.as_tensor(ids, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"pack_groups: {name} must hold token ids: {error}") from error
    if found.dim() != 1:
        raise ValueError(f"pack_groups: {name} must be 1-D token ids, got {tuple(found.shape)}")
    if found.numel() and (found.is_floating_point() or found.is_complex()):
        raise TypeError(f"pack_groups: {name} must hold integers, got {found.dtype}")
    if found.dtype == torch.bool:
        raise TypeError(f"pack_groups: {name} must hold token ids, got bool (a mask?)")
    return found.to(torch.int64)
