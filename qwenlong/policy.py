"""The policy that is trained: trajectories as packed groups, scored or trained on in one pass.

Answers to one prompt share it: a group is one prefix and G answer segments, so that P + G R rows go
through the model, not G (P + R). Turns of an agent are grouped in the same way: all first turns of
a sample have one prompt, later ones mostly have their own.

    loss = -sum over tokens of w(trajectory) A(trajectory) logprob      (arXiv 2512.12967, eq. 4)
    w = 1 / (generated tokens of the group, all turns; number of groups)  for group-token-mean
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import nn

from qlkernels import LinearPolicyLoss, TokenScores, linear_logprob, linear_policy_loss
from qlkernels.hf import packed_groups
from qlkernels.prefix_group import PackedGroups, pack_groups
from qwenlong.types import Trajectory

T = TypeVar("T")

# --- packing -----------------------------------------------------------------


class MicroBatch(NamedTuple):
    """Groups of one forward pass. Answer a of the layout is a turn of ``trajectory_of[a]``."""

    layout: PackedGroups
    trajectory_of: torch.Tensor  # [A] int64, index into the trajectories that were packed
    turns: list[tuple[int, int]]  # (trajectory, turn) of each answer
    is_live: bool  # whether any answer can have a gradient


def pack_trajectories(
    trajectories: Sequence[Trajectory], live: Sequence[bool], max_tokens: int
) -> list[MicroBatch]:
    """Micro-batches of at most ``max_tokens`` rows (one answer with its prompt may be longer).

    Turns with the same prompt and group share it. Answers without a gradient come last, in
    micro-batches of their own where a whole prompt has none. Turns without a token are left out.
    """
    groups: dict[tuple, list[tuple[int, int]]] = {}
    for i, trajectory in enumerate(trajectories):
        for j, turn in enumerate(trajectory.turns):
            if turn.response_ids:
                key = (trajectory.group_id, tuple(turn.prompt_ids))
                groups.setdefault(key, []).append((i, j))

    pieces: list[tuple[int, bool, list[tuple[int, int]]]] = []  # rows, live, turns of one prompt
    for (_, prompt), turns in groups.items():
        prefix = rows = len(prompt) - 1
        piece: list[tuple[int, int]] = []
        for i, j in sorted(turns, key=lambda turn: not live[turn[0]]):
            length = len(trajectories[i].turns[j].response_ids)
            if piece and rows + length > max_tokens:
                pieces.append((rows, any(live[k] for k, _ in piece), piece))
                piece, rows = [], prefix
            piece.append((i, j))
            rows += length
        pieces.append((rows, any(live[k] for k, _ in piece), piece))

    batches: list[list[list[tuple[int, int]]]] = []
    filled, kind = 0, None
    for rows, is_live, piece in sorted(pieces, key=lambda piece: not piece[1]):
        if kind is not is_live or filled + rows > max_tokens:
            batches.append([])
            filled, kind = 0, is_live
        batches[-1].append(piece)
        filled += rows
    return [_micro_batch(trajectories, live, batch) for batch in batches]


def _micro_batch(trajectories, live, pieces: list[list[tuple[int, int]]]) -> MicroBatch:
    turns = [turn for piece in pieces for turn in piece]
    layout = pack_groups(
        [trajectories[piece[0][0]].turns[piece[0][1]].prompt_ids for piece in pieces],
        [[trajectories[i].turns[j].response_ids for i, j in piece] for piece in pieces],
    )
    trajectory_of = torch.tensor([i for i, _ in turns], dtype=torch.int64)
    return MicroBatch(layout, trajectory_of, turns, any(live[i] for i, _ in turns))


def token_weights(
    trajectories: Sequence[Trajectory], counted: torch.Tensor, rule: str, totals: torch.Tensor
) -> torch.Tensor:
    """``[N]`` fp64: what a token of each trajectory weighs in the loss, 0 where not counted.

    Args:
        trajectories: of this rank; a group lies on one rank.
        counted: ``[N]`` bool; with ``denominator="kept"`` the trajectories that AEPO keeps.
        rule: of ``qwenlong.config.AGGREGATIONS``. A trajectory is one sequence, with all its turns.
        totals: what ``loss_totals`` gave, summed over all ranks.
    """
    lengths = _lengths(trajectories) * counted
    n_groups, n_tokens, n_sequences = totals.clamp_min(1)
    if rule == "token-mean":
        per_token = torch.ones_like(lengths) / n_tokens
    elif rule == "seq-mean-token-mean":
        per_token = 1 / (lengths.clamp_min(1) * n_sequences)
    elif rule == "group-token-mean":
        groups = [t.group_id for t in trajectories]
        in_group = dict.fromkeys(groups, 0.0)
        for group, length in zip(groups, lengths.tolist(), strict=True):
            in_group[group] += length
        sizes = torch.tensor([in_group[group] for group in groups], dtype=torch.float64)
        per_token = 1 / (sizes.clamp_min(1) * n_groups)
    else:
        raise ValueError(f"token_weights: unknown rule {rule!r}")
    return torch.where(counted, per_token, 0.0)


def loss_totals(trajectories: Sequence[Trajectory], counted: torch.Tensor) -> torch.Tensor:
    """``[3]`` fp64: groups and tokens and trajectories that count and have a token."""
    lengths = _lengths(trajectories) * counted
    groups = {t.group_id for t, n in zip(trajectories, lengths.tolist(), strict=True) if n}
    found = [len(groups), float(lengths.sum()), float((lengths > 0).sum())]
    return torch.tensor(found, dtype=torch.float64)


def _lengths(trajectories: Sequence[Trajectory]) -> torch.Tensor:
    """``[N]`` fp64: generated tokens of each trajectory, all turns."""
    lengths = [sum(len(turn.response_ids) for turn in t.turns) for t in trajectories]
    return torch.tensor(lengths, dtype=torch.float64)


# --- model -------------------------------------------------------------------


class LossInputs(NamedTuple):
    """One value an answer of the micro-batch, and one a row for the old policy."""

    advantages: torch.Tensor  # [A]
    keep: torch.Tensor  # [A] bool
    weights: torch.Tensor  # [A]
    old_logprobs: torch.Tensor | None  # [T]; None: the policy that sampled is the current one
    eps_low: float
    eps_high: float


class PackedPolicy(nn.Module):
    """A causal language model whose forward takes packed groups.

    The head's weight is read inside ``forward``, which is where sharding engines have it whole.
    """

    def __init__(
        self,
        model: nn.Module,
        temperature: float,
        *,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        offload_activations: bool = False,
    ):
        super().__init__()
        self.model = model
        self._head = dict(temperature=temperature, logit_scale=logit_scale, softcap=softcap)
        self._offload = offload_activations

    @property
    def causal_lm(self) -> nn.Module:
        """The transformers model, inside of what peft puts around it."""
        wrapped = hasattr(self.model, "get_base_model")
        return self.model.get_base_model() if wrapped else self.model

    def call(self, work: Callable[[], T]) -> T:
        """``work()`` where the weights outside of the layers are whole, as in ``forward``."""
        return work()

    def forward(
        self, layout: PackedGroups, inputs: LossInputs | None = None
    ) -> TokenScores | LinearPolicyLoss:
        """Scores of every answer token; with ``inputs`` the loss, its gradients and the scores."""
        head = self.causal_lm.get_output_embeddings()
        hidden_states = self._hidden_states(layout)  # [T, H]
        if inputs is None:
            return linear_logprob(
                hidden_states,
                head.weight,
                layout.target_ids,
                bias=head.bias,
                row_mask=layout.is_answer,
                **self._head,
            )
        return linear_policy_loss(
            hidden_states,
            head.weight,
            layout.target_ids,
            inputs.old_logprobs,
            layout.spread_answers(inputs.advantages),
            layout.is_answer,
            cu_seqlens=layout.cu_seqlens,
            bias=head.bias,
            **self._head,
            keep_mask=layout.spread_answers(inputs.keep),
            aggregation=layout.spread_answers(inputs.weights),
            eps_low=inputs.eps_low,
            eps_high=inputs.eps_high,
        )

    def _hidden_states(self, layout: PackedGroups) -> torch.Tensor:
        """``[T, H]`` of the last layer."""
        offload = contextlib.nullcontext()
        if self._offload and torch.is_grad_enabled():
            offload = torch.autograd.graph.save_on_cpu(pin_memory=layout.device.type == "cuda")
        with packed_groups(self.causal_lm, layout), offload:
            out = self.causal_lm.base_model(input_ids=layout.input_ids[None], use_cache=False)
        return out.last_hidden_state[0]
