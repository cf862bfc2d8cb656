"""Which tokens keep their policy gradient: negative-gradient clipping and AEPO.

    eq. 8-10   I(i, t) = 0 where A_i < 0 and the entropy of the token (or the mean of its sequence)
               is above tau, else 1; the "clip low" variants turn the inequality round
    eq. 11     H(batch) = mean over sequences of the mean token entropy
    sec. 4.4   AEPO: once H(batch) is above ``high``, every sample with a negative advantage is
               dropped; once it is below ``low``, they are back       (all arXiv 2512.12967)

Masks say True for "keep". They go to ``qlkernels.policy_loss`` as ``keep_mask``, and whether
dropped tokens still count in the denominator is the loss's ``denominator``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from qwenlong.advantages import spread_to_tokens

ENTROPIES = ("sequence_mean", "token_mean")
MODES = ("latch", "above-high", "band")
DROPS = ("negative", "nonpositive")
EMPTY_POLICIES = ("skip", "keep-all")
SOURCES = ("previous_step", "scoring_pass")


def _check_choice(owner: str, name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{owner}: {name} must be one of {', '.join(allowed)}, got {value!r}")


# --- entropy of a batch ------------------------------------------------------


@dataclass
class EntropyMeter:
    """Entropy of a batch that comes in micro-batches and over ranks.

    ``"sequence_mean"`` is eq. 11, the mean over sequences of their token means. ``"token_mean"``
    weighs every token alike, as verl's ``actor/entropy_loss`` does by default, which the published
    AEPO snippet reads. Sums are fp64; nothing synchronises.

    A sequence of eq. 11 is a trajectory. inference: the paper's memory agent (section 2.3) is
    updated by eq. 4 over trajectories whose tokens are those of all turns, so that eq. 11 has them
    too; with turns in their place, a long document would count for more than a short one.
    """

    kind: str = "sequence_mean"
    _sums: torch.Tensor | None = field(default=None, init=False, repr=False)
    # (sequence_of, sums and counts [2, B]) of the sequences that may go on in another micro-batch
    _open: list[tuple[torch.Tensor, torch.Tensor]] = field(
        default_factory=list, init=False, repr=False
    )

    def __post_init__(self) -> None:
        _check_choice("EntropyMeter", "kind", self.kind, ENTROPIES)

    def add(
        self,
        entropy: torch.Tensor,
        response_mask: torch.Tensor,
        cu_seqlens: torch.Tensor | None = None,
        *,
        sequence_of: torch.Tensor | None = None,
    ) -> None:
        """Take in rows: ``[T]`` with ``cu_seqlens`` ``[B + 1]``, or ``(B, S)``. Masked rows may be
        NaN.

        Args:
            sequence_of: ``[B]`` integers on the CPU, which sequence of this rank each block is a
                part of, where one has several (the turns of a trajectory), in one micro-batch or
                over many. None: each is a sequence of its own.
        """
        sums, counts = _sequence_sums(entropy, response_mask, cu_seqlens)
        if sequence_of is not None and sequence_of.shape != sums.shape:
            raise ValueError(
                f"EntropyMeter: sequence_of is {tuple(sequence_of.shape)} for {len(sums)} blocks"
            )
        if sequence_of is not None and self.kind == "sequence_mean":
            self._open.append((sequence_of, torch.stack([sums, counts])))
            return
        if self.kind == "token_mean":
            found = torch.stack([sums.sum(), counts.sum()])
        else:
            found = _means(sums, counts)
        self._sums = found if self._sums is None else self._sums + found

    def value(self, process_group: dist.ProcessGroup | None = None) -> torch.Tensor:
        """0-d fp64, nats, over all that was added, on every rank of the group; NaN over nothing."""
        parts = [] if self._sums is None else [self._sums]
        if self._open:
            order = torch.cat([sequence_of for sequence_of, _ in self._open])
            blocks = torch.cat([found for _, found in self._open], dim=1)  # [2, blocks]
            order, at = order.sort(stable=True)
            ends = order.unique_consecutive(return_counts=True)[1].cumsum(0)
            offsets = torch.cat([ends.new_zeros(1), ends]).to(blocks.device)
            parts.append(_means(*_block_sums(blocks[:, at.to(blocks.device)], offsets)))
        if not parts:
            raise ValueError("EntropyMeter: nothing was added")
        total = torch.stack(parts).sum(0)
        if process_group is not None:
            dist.all_reduce(total, group=process_group)
        return total[0] / total[1]


def batch_entropy(
    entropy: torch.Tensor,
    response_mask: torch.Tensor,
    cu_seqlens: torch.Tensor | None = None,
    *,
    kind: str = "sequence_mean",
    process_group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """Entropy of one batch in one piece, 0-d fp64, nats; see ``EntropyMeter``."""
    meter = EntropyMeter(kind)
    meter.add(entropy, response_mask, cu_seqlens)
    return meter.value(process_group)


def _sequence_sums(entropy, response_mask, cu_seqlens) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of entropy and token counts of each sequence, ``[B]`` fp64 both."""
    if entropy.shape != response_mask.shape:
        raise ValueError(
            f"entropy is {tuple(entropy.shape)}, but response_mask is {tuple(response_mask.shape)}"
        )
    if (entropy.dim() == 1) != (cu_seqlens is not None):
        raise ValueError(
            f"entropy must be [T] with cu_seqlens or (B, S) without, got {tuple(entropy.shape)} "
            f"and cu_seqlens {None if cu_seqlens is None else tuple(cu_seqlens.shape)}"
        )
    parts = torch.stack([torch.where(response_mask, entropy, 0.0).double(), response_mask.double()])
    if cu_seqlens is None:
        return tuple(parts.sum(dim=2))
    return _block_sums(parts, cu_seqlens.long())


def _block_sums(parts: torch.Tensor, offsets: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Sums over the blocks of the last axis, in a fixed order, which index_add has not on a GPU."""
    return tuple(
        torch.segment_reduce(x, "sum", offsets=offsets, axis=0, initial=0, unsafe=True)
        for x in parts
    )


def _means(sums: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """``[2]``: the sum of the means of the sequences that have a token, and their number."""
    return torch.stack([(sums / counts.clamp_min(1)).sum(), (counts > 0).sum().double()])


# --- negative-gradient clipping ----------------------------------------------


def clip_negative_gradients(
    advantages: torch.Tensor,
    entropy: torch.Tensor,
    response_mask: torch.Tensor,
    cu_seqlens: torch.Tensor | None = None,
    *,
    level: str = "sequence",
    clip: str = "high",
    threshold: float | None = None,
    quantile: float | None = None,
) -> torch.Tensor:
    """Keep mask of eq. 8-10: drops what has a negative advantage and too high (or low) an entropy.

    Args:
        advantages: ``[B]``, one per sequence.
        entropy, response_mask: ``[T]`` with ``cu_seqlens`` ``[B + 1]``, or ``(B, S)`` without.
            Masked rows may hold NaN.
        level: ``"token"`` compares each token's entropy, ``"sequence"`` the mean of its sequence.
        clip: ``"high"`` drops above the threshold, ``"low"`` below it.
        threshold: tau in nats. The paper gives no value.
        quantile: in its place, tau is this quantile (linear interpolation) of the entropies of the
            negative tokens, or sequences, of this call: ``0.8`` with ``"high"`` drops a fifth of
            the negative gradient. inference: the paper does not say what a quantile would be of.

    Returns:
        Bool, shape of ``entropy``; False outside the response. Does not synchronise.
    """
    _check_choice("clip_negative_gradients", "level", level, ("token", "sequence"))
    _check_choice("clip_negative_gradients", "clip", clip, ("high", "low"))
    if (threshold is None) == (quantile is None):
        raise ValueError("clip_negative_gradients: give exactly one of threshold and quantile")
    if quantile is not None and not 0.0 <= quantile <= 1.0:
        raise ValueError(f"clip_negative_gradients: quantile must lie in [0, 1], got {quantile}")
    negative = advantages < 0  # [B]
    if level == "token":
        negative = spread_to_tokens(negative, response_mask, cu_seqlens)
        values = torch.where(response_mask, entropy, 0.0)
    else:
        sums, counts = _sequence_sums(entropy, response_mask, cu_seqlens)
        values = sums / counts.clamp_min(1)
        negative = negative & (counts > 0)
    tau = threshold if quantile is None else _masked_quantile(values, negative, quantile)
    drop = negative & (values > tau if clip == "high" else values < tau)
    if level == "sequence":
        drop = spread_to_tokens(drop, response_mask, cu_seqlens)
    return response_mask & ~drop


def _masked_quantile(values: torch.Tensor, mask: torch.Tensor, q: float) -> torch.Tensor:
    """0-d quantile of the masked values, any number of them; NaN (compares False) of none."""
    values = values.double().flatten()
    ordered = torch.where(mask.flatten(), values, torch.inf).sort().values
    n = mask.sum()
    position = q * (n - 1).clamp_min(0)
    below = position.floor().long()
    above = torch.minimum(below + 1, (n - 1).clamp_min(0))
    if ordered.numel() == 0:
        return values.new_full((), torch.nan)
    low, high = ordered.gather(0, below.view(1)), ordered.gather(0, above.view(1))
    found = torch.where(high == low, low, low + (high - low) * (position - below))
    return torch.where(n > 0, found.squeeze(0), torch.nan)


# --- AEPO --------------------------------------------------------------------


@dataclass
class EntropyController:
    """AEPO: decides for a whole step whether negative advantages are trained on.

    ``"latch"``: above ``high`` drop them, until below ``low``; between the two the last decision
    stands. inference: the paper does not say what holds between the bounds, and "back when it drops
    below" makes sense only with memory. ``"above-high"``: no memory, drop while above ``high``.
    ``"band"``: no memory, drop while between the two, which is what the published snippet does.

    A step is ``begin_step``, ``keep_sequences``, training, ``end_step``. The entropy of a batch
    exists only after a pass over it. With ``entropy_source="previous_step"`` a decision rests on
    what training measured one step before (free); with ``"scoring_pass"`` on the batch itself,
    which costs a forward pass without gradient.

    The paper publishes no bounds. All ranks must be given the same entropy (``EntropyMeter.value``
    with the process group does that).
    """

    low: float  # nats
    high: float  # nats
    mode: str = "latch"
    drop: str = "negative"  # A < 0 (the paper), or "nonpositive": A <= 0 (the published snippet)
    if_empty: str = "skip"  # nothing left: train on nothing, or "keep-all"
    entropy_source: str = "previous_step"
    dropping: bool = False  # the standing decision; a run begins with training on everything
    last_entropy: float | None = None  # nats, what the decision rests on

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("mode", self.mode, MODES),
            ("drop", self.drop, DROPS),
            ("if_empty", self.if_empty, EMPTY_POLICIES),
            ("entropy_source", self.entropy_source, SOURCES),
        ):
            _check_choice("EntropyController", name, value, allowed)
        if not 0.0 <= self.low <= self.high < math.inf:
            raise ValueError(
                f"EntropyController: 0 <= low <= high is needed, got {self.low} and {self.high}"
            )

    def begin_step(self, scoring_entropy: float | torch.Tensor | None = None) -> bool:
        """Whether this step drops. ``scoring_entropy`` is for ``"scoring_pass"`` alone."""
        if (scoring_entropy is not None) != (self.entropy_source == "scoring_pass"):
            given = "no" if scoring_entropy is None else "an"
            raise ValueError(
                f"EntropyController: entropy_source is {self.entropy_source!r}, "
                f"but begin_step got {given} entropy"
            )
        if scoring_entropy is not None:
            self._observe(scoring_entropy)
        return self.dropping

    def end_step(self, training_entropy: float | torch.Tensor) -> None:
        """Take the entropy that the training pass measured, for the next step.

        With ``"scoring_pass"`` the decision already rests on this batch: there is nothing to take.
        """
        if self.entropy_source == "previous_step":
            self._observe(training_entropy)

    def _observe(self, entropy: float | torch.Tensor) -> None:
        entropy = float(entropy)  # the one synchronisation of a step
        if not math.isfinite(entropy):
            raise ValueError(
                f"EntropyController: the entropy of the batch is {entropy}; was it empty?"
            )
        self.last_entropy = entropy
        if self.mode == "band":
            self.dropping = self.low < entropy < self.high
        elif self.mode == "above-high":
            self.dropping = entropy > self.high
        elif entropy > self.high:
            self.dropping = True
        elif entropy < self.low:
            self.dropping = False

    def keep_sequences(
        self, advantages: torch.Tensor, *, process_group: dist.ProcessGroup | None = None
    ) -> torch.Tensor:
        """``[N]`` bool for the ``[N]`` advantages of the whole step (of this rank).

        Spread it over tokens with ``spread_to_tokens``. The step is empty where no kept sequence,
        on any rank of the group, has an advantage other than 0; ``if_empty`` says what then
        happens.
        """
        if advantages.dim() != 1:
            raise ValueError(
                f"EntropyController: advantages must be [N], one per sequence, "
                f"got {tuple(advantages.shape)}"
            )
        everything = torch.ones_like(advantages, dtype=torch.bool)
        if not self.dropping:
            return everything
        keep = advantages >= 0 if self.drop == "negative" else advantages > 0
        if self.if_empty == "skip":
            return keep
        useful = (keep & (advantages != 0)).sum()
        if process_group is not None:
            dist.all_reduce(useful, group=process_group)
        return torch.where(useful > 0, keep, everything)

    def state_dict(self) -> dict[str, Any]:
        return {"dropping": self.dropping, "last_entropy": self.last_entropy}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if set(state) != {"dropping", "last_entropy"}:
            raise ValueError(
                f"EntropyController: state must hold dropping and last_entropy, got {sorted(state)}"
            )
        self.dropping, self.last_entropy = bool(state["dropping"]), state["last_entropy"]


def replay(controller: EntropyController, entropies: Iterable[float]) -> list[bool]:
    """The decision of every step of a run whose batch entropies are known."""
    decisions = []
    for entropy in entropies:
        known = entropy if controller.entropy_source == "scoring_pass" else None
        decisions.append(controller.begin_step(known))
        controller.end_step(entropy)
    return decisions
