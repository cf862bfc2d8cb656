"""TRL's batch of (prompt, completion) rows with every prompt forwarded once.

TRL repeats a prompt for each of its G completions. Rows with the same prompt become one packed
group of P + sum R_i rows, whose scores are those of the full sequences; they go back to TRL's
padded places.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from qlkernels.hf import packed_groups
from qlkernels.prefix_group import PackedGroups, pack_groups


class RowScores(NamedTuple):
    """Of TRL's rows; 0 where a completion has no token."""

    logprobs: torch.Tensor  # (B, R)
    entropy: torch.Tensor | None  # (B, R)
    aux_loss: torch.Tensor | None  # 0-d


def group_rows(
    input_ids: torch.Tensor, attention_mask: torch.Tensor, completion_length: int
) -> tuple[PackedGroups, torch.Tensor]:
    """Pack rows with the same prompt.

    Args:
        input_ids, attention_mask: ``(B, P + R)``, prompts padded on the left and completions on the
            right (reads both once from the device).
        completion_length: R, the padded length of completions.

    Returns:
        The layout on the device of ``input_ids``, and ``[B]`` int64, the row of each answer of it.
        Prompts of one token without completions have no row to forward: the first row's completion
        then keeps one token, which the mask hides as before.
    """
    ids, mask = input_ids.cpu(), attention_mask.cpu().bool()
    prompt_length = ids.shape[1] - completion_length
    lengths = mask[:, prompt_length:].sum(dim=1)
    if not torch.equal(mask[:, prompt_length:], torch.arange(completion_length) < lengths[:, None]):
        raise ValueError("shared_prefix: completions must be padded on the right only")
    if mask.sum() == len(ids):
        lengths[0] = 1
    groups: dict[bytes, list[int]] = {}
    for row in range(len(ids)):
        prompt = ids[row, :prompt_length][mask[row, :prompt_length]]
        groups.setdefault(prompt.numpy().tobytes(), []).append(row)
    rows = [row for group in groups.values() for row in group]
    layout = pack_groups(
        [
            ids[group[0], :prompt_length][mask[group[0], :prompt_length]]
            for group in groups.values()
        ],
        [
            [ids[row, prompt_length : prompt_length + int(lengths[row])] for row in group]
            for group in groups.values()
        ],
    )
    return layout.to(input_ids.device), torch.tensor(rows, device=input_ids.device)


def shared_prefix_scores(
    model: nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    completion_length: int,
    *,
    autocast: Callable[[], AbstractContextManager],
    compute_entropy: bool,
    compute_aux_loss: bool,
    deterministic: bool = True,
    head: Callable[[tuple[PackedGroups, torch.Tensor]], AbstractContextManager] | None = None,
) -> RowScores:
    """What TRL's ``_get_per_token_logps_and_entropies`` gives for these rows, differentiable.

    The router's loss counts every packed row once: a prompt once a group, not G times.
    ``deterministic`` is for the backward of ``qlkernels.prefix_attention``. ``head``, called with
    what ``group_rows`` found, is entered around the model's forward.
    """
    layout, rows = group_rows(input_ids, attention_mask, completion_length)
    labels = torch.where(layout.is_answer, layout.target_ids, -100)
    extra = {"output_router_logits": True} if compute_aux_loss else {}
    around = nullcontext() if head is None else head((layout, rows))
    packed = packed_groups(model, layout, deterministic=deterministic)
    with packed, autocast(), around:
        out = model(
            input_ids=layout.input_ids[None],
            shift_labels=labels[None],
            fused_lm_head=True,
            **extra,
        )

    def padded(values: torch.Tensor) -> torch.Tensor:
        """``[1, T]`` to ``(B, R)`` in TRL's order of rows."""
        found = layout.gather_answers(values[0])
        found = F.pad(found, (0, completion_length - found.shape[1]))
        return torch.zeros_like(found).index_copy(0, rows, found)

    return RowScores(
        padded(out.log_probs),
        padded(out.entropy) if compute_entropy else None,
        out.aux_loss if compute_aux_loss else None,
    )
