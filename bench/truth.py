"""fp64 truth and fp32 baseline of token scores and their gradients, block by block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from bench.gate import Comparison, require
from bench.registry import Outputs

_BLOCK_BYTES = 512 << 20  # of fp64 logits at a time


def token_scores(logits: torch.Tensor, target_ids: torch.Tensor) -> Outputs:
    """Scores of logits ``[T, V]`` by the textbook formulas, in the dtype of ``logits``;
    differentiable.
    """
    logp = logits.log_softmax(dim=1)
    return {
        "logprobs": logp.gather(1, target_ids[:, None]).squeeze(1),
        "entropy": -(logp.exp() * logp).sum(dim=1),
        "lse": logits.logsumexp(dim=1),
    }


def _blocks(T: int, V: int) -> Iterator[slice]:
    rows = max(1, _BLOCK_BYTES // (8 * V))
    for start in range(0, T, rows):
        yield slice(start, min(T, start + rows))


def _grads(
    scores: Outputs,
    leaves: list[torch.Tensor],
    upstream: Mapping[str, torch.Tensor],
    rows: slice | torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    used = list(upstream)
    return torch.autograd.grad(
        [scores[name] for name in used],
        leaves,
        [upstream[name][rows].to(scores[name].dtype) for name in used],
    )


class LogitsTruth:
    """Truth for ops on logits ``[T, V]``. The gradient is never held whole in fp64.

    ``names`` are the outputs that a complete provider returns; ``upstream`` maps outputs to ``[T]``
    gradients, and a provider that lacks an output is compared with the gradient of the others.
    """

    def __init__(
        self,
        logits: torch.Tensor,
        target_ids: torch.Tensor,
        names: tuple[str, ...],
        upstream: Mapping[str, torch.Tensor] | None = None,
    ):
        self.logits, self.target_ids = logits.detach(), target_ids
        self.names = names + (("dlogits",) if upstream else ())
        self.upstream = upstream or {}

    def _at(self, rows: slice, dtype: torch.dtype, upstream: Mapping[str, torch.Tensor]) -> Outputs:
        leaf = self.logits[rows].detach().to(dtype).requires_grad_(bool(upstream))
        scores = token_scores(leaf, self.target_ids[rows])
        found = {name: x.detach() for name, x in scores.items()}
        if upstream:
            (found["dlogits"],) = _grads(scores, [leaf], upstream, rows)
        return found

    def check(self, outputs: Outputs, strict: bool, complete: bool) -> float:
        present = require(outputs, self.names, complete)
        upstream = {name: g for name, g in self.upstream.items() if name in outputs}
        found = {name: Comparison(name) for name in present}
        T, V = self.logits.shape
        for name in present:  # a missing row must not pass because the blocks do not reach it
            if outputs[name].shape[0] != T:
                found[name].add(outputs[name], torch.empty(T, *outputs[name].shape[1:]))
        for rows in _blocks(T, V):
            truth = self._at(rows, torch.float64, upstream)
            baseline = self._at(rows, torch.float32, upstream)
            if upstream:  # the gradient has the dtype of the logits
                baseline["dlogits"] = baseline["dlogits"].to(self.logits.dtype)
            for name in present:
                found[name].add(outputs[name][rows], truth[name], baseline[name])
        return _verdict(found, strict)


class LinearTruth:
    """Truth for ops on hidden states ``[T, H]`` and weight ``[V, H]``; masked rows hold 0 and get
    no gradient.
    """

    def __init__(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        target_ids: torch.Tensor,
        row_mask: torch.Tensor | None = None,
        upstream: Mapping[str, torch.Tensor] | None = None,
    ):
        self.hidden, self.weight = hidden.detach(), weight.detach()
        self.target_ids, self.row_mask = target_ids, row_mask
        self.upstream = upstream or {}
        self.names = ("logprobs", "entropy") + (("dhidden", "dweight") if upstream else ())
        self._known: dict[tuple[str, ...], tuple[Outputs, dict[str, float]]] = {}

    def _compute(self, dtype: torch.dtype, upstream: Mapping[str, torch.Tensor]) -> Outputs:
        T, device = self.hidden.shape[0], self.hidden.device
        weight = self.weight.to(dtype).detach().requires_grad_(bool(upstream))
        found = {
            name: torch.zeros(T, dtype=dtype, device=device) for name in ("logprobs", "entropy")
        }
        if upstream:
            found["dhidden"] = torch.zeros(self.hidden.shape, dtype=dtype, device=device)
            found["dweight"] = torch.zeros(weight.shape, dtype=dtype, device=device)
        index = torch.arange(T, device=device)
        if self.row_mask is not None:
            index = index[self.row_mask]
        for block in _blocks(len(index), self.weight.shape[0]):
            rows = index[block]
            hidden = self.hidden[rows].to(dtype).requires_grad_(bool(upstream))
            logits = hidden @ weight.T
            if dtype == torch.float32 and upstream:
                # what tensor cores multiply: the gradient of the logits in the operands' 16 bits
                logits.register_hook(lambda g: g.to(self.hidden.dtype).to(g.dtype))
            scores = token_scores(logits, self.target_ids[rows])
            for name in ("logprobs", "entropy"):
                found[name][rows] = scores[name].detach()
            if upstream:
                dhidden, dweight = _grads(scores, [hidden, weight], upstream, rows)
                found["dhidden"][rows] = dhidden
                found["dweight"] += dweight
        return found

    def _truth(self, upstream: Mapping[str, torch.Tensor]) -> tuple[Outputs, dict[str, float]]:
        """fp64 outputs, and the largest error of the fp32 baseline in each: dlogits rounded to the
        operands' dtype before the products, gradients as they are stored.
        """
        key = tuple(upstream)
        if key not in self._known:
            truth = self._compute(torch.float64, upstream)
            slips = {}
            for name, x in self._compute(torch.float32, upstream).items():
                stored = x.to(self.hidden.dtype) if name.startswith("d") else x
                slips[name] = float((stored.double() - truth[name]).abs().max())
            self._known = {key: (truth, slips)}  # one at a time: dweight in fp64 is large
        return self._known[key]

    def exact(self) -> Outputs:
        """logprobs and entropy ``[T]`` in fp64."""
        return self._compute(torch.float64, {})

    def check(self, outputs: Outputs, strict: bool, complete: bool) -> float:
        present = require(outputs, self.names, complete)
        upstream = {name: g for name, g in self.upstream.items() if name in outputs}
        # one that returns a loss alone has differentiated all of it
        truth, slips = self._truth(upstream or self.upstream)
        found = {name: Comparison(name, slip=slips[name]) for name in present}
        for name in present:
            found[name].add(outputs[name], truth[name])
        return _verdict(found, strict)


def _verdict(found: Mapping[str, Comparison], strict: bool) -> float:
    for comparison in found.values():
        comparison.judge(strict)
    return max(comparison.relative for comparison in found.values())
