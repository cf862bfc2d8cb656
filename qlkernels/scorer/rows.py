"""What a pass reads and scores: ids, positions, targets and the borders of its sequences."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qlkernels.prefix_group import PackedGroups
from qlkernels.scorer.decoder import Decoder


@dataclass(frozen=True)
class Rows:
    """T packed rows on the device of the pass. Row t holds the score of the token after it."""

    input_ids: torch.Tensor  # [T] int64
    position_ids: torch.Tensor  # [T] int64
    target_ids: torch.Tensor  # [T] int64, 0 where there is none
    is_scored: torch.Tensor  # [T] bool
    cu_seqlens: torch.Tensor  # [S + 1] int32
    seqlens: tuple[int, ...]  # of each sequence, on the host; of full sequences for groups
    layout: PackedGroups | None

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    @property
    def max_seqlen(self) -> int:
        return max(self.seqlens, default=0)


def rows_of(
    inputs: torch.Tensor | PackedGroups,
    cu_seqlens: torch.Tensor | None,
    positions: str | torch.Tensor,
    decoder: Decoder,
    device: torch.device,
) -> Rows:
    """Check what was given and lay it out on ``device``.

    Raises:
        ValueError, TypeError: ids outside the vocabulary, a sequence longer than the positions of
            the model, borders or a mask that do not fit, by name.
    """
    if isinstance(inputs, PackedGroups):
        if cu_seqlens is not None:
            raise ValueError("Scorer: cu_seqlens belongs to plain input_ids; a layout has its own")
        rows = _of_groups(inputs, device)
        ids, targets = inputs.input_ids, inputs.target_ids
        _check_ids("target_ids", targets, decoder.V)
    else:
        ids = _check_input_ids(inputs)
        rows = _of_sequences(ids, cu_seqlens, device)
    _check_ids("input_ids", ids, decoder.V)
    longest = max(rows.seqlens, default=0)
    if longest > decoder.max_positions:
        raise ValueError(
            f"Scorer: a sequence has {longest} tokens and the model {decoder.max_positions} "
            "positions (max_position_embeddings); score windows of it, or set rope_parameters of "
            "the config for longer ones"
        )
    return _with_positions(rows, positions)


def _of_groups(layout: PackedGroups, device: torch.device) -> Rows:
    layout = layout.to(device)
    lengths = []
    for P, answers in zip(layout.prompt_lengths, layout.answer_lengths, strict=True):
        lengths += [P - 1, *(P - 1 + R for R in answers)]
    return Rows(
        input_ids=layout.input_ids,
        position_ids=layout.position_ids,
        target_ids=layout.target_ids,
        is_scored=torch.ones_like(layout.is_answer),
        cu_seqlens=layout.cu_seqlens,
        seqlens=tuple(lengths),
        layout=layout,
    )


def _of_sequences(ids: torch.Tensor, cu_seqlens: torch.Tensor | None, device: torch.device) -> Rows:
    T = ids.shape[0]
    borders = _borders(cu_seqlens, T)
    starts = torch.tensor(borders[:-1], dtype=torch.int64)
    lengths = torch.tensor(borders, dtype=torch.int64).diff()
    position_ids = torch.arange(T) - starts.repeat_interleave(lengths)
    is_scored = torch.ones(T, dtype=torch.bool)
    is_scored[torch.tensor(borders[1:], dtype=torch.int64)[lengths > 0] - 1] = False
    input_ids = ids.to(device)
    is_scored = is_scored.to(device)
    target_ids = torch.where(is_scored, input_ids.roll(-1), 0)
    return Rows(
        input_ids=input_ids,
        position_ids=position_ids.to(device),
        target_ids=target_ids,
        is_scored=is_scored,
        cu_seqlens=torch.tensor(borders, dtype=torch.int32).to(device),
        seqlens=tuple(lengths.tolist()),
        layout=None,
    )


def _with_positions(rows: Rows, positions: str | torch.Tensor) -> Rows:
    if isinstance(positions, torch.Tensor):
        if positions.dtype != torch.bool or tuple(positions.shape) != (len(rows),):
            raise ValueError(
                f"Scorer: positions must be bool [T] = {(len(rows),)}, got "
                f"{str(positions.dtype).removeprefix('torch.')} {tuple(positions.shape)}"
            )
        chosen = rows.is_scored & positions.to(rows.is_scored.device)
    elif positions == "answers":
        if rows.layout is None:
            raise ValueError(
                "Scorer: positions='answers' needs a layout of pack_groups; give a mask [T] for "
                "plain sequences"
            )
        chosen = rows.layout.is_answer
    elif positions == "all":
        return rows
    else:
        raise ValueError(
            f"Scorer: positions must be 'all', 'answers' or a mask [T], got {positions!r}"
        )
    fields = {**vars(rows), "is_scored": chosen}
    return Rows(**fields)


def _check_input_ids(ids: torch.Tensor) -> torch.Tensor:
    if not isinstance(ids, torch.Tensor):
        raise TypeError(
            f"Scorer: inputs must be input_ids [T] or PackedGroups, got {type(ids).__name__}"
        )
    if ids.dim() != 1:
        raise ValueError(
            f"Scorer: input_ids must be packed [T] with cu_seqlens, got shape {tuple(ids.shape)}"
        )
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"Scorer: input_ids must be int64 or int32, got {ids.dtype}")
    return ids.to(torch.int64)


def _check_ids(name: str, ids: torch.Tensor, V: int) -> None:
    """Reads one flag from the device where the ids are on one."""
    wrong = (ids < 0) | (ids >= V)
    if bool(wrong.any()):
        t = int(wrong.nonzero()[0])
        raise ValueError(
            f"Scorer: {name}[{t}] = {int(ids[t])} is outside the vocabulary [0, {V}); use the "
            "tokenizer that belongs to the model"
        )


def _borders(cu_seqlens: torch.Tensor | None, T: int) -> list[int]:
    if cu_seqlens is None:
        return [0, T]
    borders = [int(b) for b in cu_seqlens.tolist()]
    if not borders or borders[0] != 0 or borders[-1] != T or borders != sorted(borders):
        raise ValueError(
            f"Scorer: cu_seqlens must rise from 0 to T = {T}, got {borders[:4]} ... {borders[-1:]}"
        )
    return borders
