"""moe_routing: router logits to experts, weights and sums, and the index of the experts' rows.
Memory bound: rows count bytes, no FLOPs.
"""

from __future__ import annotations

import torch

from bench.cases.providers import graphed, our_op, timed
from bench.gate import Comparison, WrongResult, require
from bench.registry import OPS, Outputs, Problem, Unavailable, register

_EXACT = ("ids", "counts", "sort_order", "inverse_order", "offsets")
_FLOATS = ("weights", "prob_sums")


def _logits(T: int, E: int, routing: str, dtype: torch.dtype, device: str) -> torch.Tensor:
    """``balanced``: standard normal; ``zipf1``: Gumbel noise on a Zipf law of exponent 1, so that
    expert r is first with probability proportional to 1 / r; ``one``: all tokens alike.
    """
    g = torch.Generator(device).manual_seed(0)
    rank = torch.arange(1, E + 1, device=device).float()
    if routing == "balanced":
        logits = torch.randn(T, E, generator=g, device=device)
    elif routing == "zipf1":
        uniform = torch.rand(T, E, generator=g, device=device).clamp(1e-6, 1 - 1e-6)
        logits = -(-uniform.log()).log() - rank.log()
    elif routing == "one":
        logits = (-0.25 * rank).expand(T, E).contiguous()
    else:
        raise ValueError(f"bench: routing is balanced, zipf1 or one, got {routing!r}")
    return logits.to(dtype)


def _truth(
    logits: torch.Tensor, top_k: int, dtype: torch.dtype, upstream: dict[str, torch.Tensor]
) -> Outputs:
    """Textbook routing in ``dtype``, the index by sorting, and the gradient of ``upstream``."""
    leaf = logits.detach().to(dtype).requires_grad_(bool(upstream))
    p = leaf.softmax(dim=1)
    ids = logits.detach().float().sort(dim=1, descending=True, stable=True).indices[:, :top_k]
    chosen = p.gather(1, ids)
    found = {"weights": chosen / chosen.sum(1, keepdim=True), "prob_sums": p.sum(0)}
    if upstream:
        total = sum((found[name] * g.to(dtype)).sum() for name, g in upstream.items())
        (dlogits,) = torch.autograd.grad(total, leaf)
        # the gradient has the dtype of the logits
        found["dlogits"] = dlogits if dtype == torch.float64 else dlogits.to(logits.dtype)
    flat = ids.reshape(-1)
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=logits.shape[1])
    exact = dict(ids=ids, counts=counts, sort_order=order, inverse_order=order.argsort())
    exact["offsets"] = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return {name: x.detach() for name, x in (found | exact).items()}


def _eager(logits: torch.Tensor, top_k: int) -> Outputs:
    """What transformers runs for it: a router and the sort before its grouped GEMM."""
    weights, ids = logits.softmax(dim=1, dtype=torch.float32).topk(top_k, dim=1)
    weights = (weights / weights.sum(1, keepdim=True)).to(logits.dtype)
    flat = ids.reshape(-1)
    order = flat.argsort()
    order.argsort()
    torch.histc(flat.float(), logits.shape[1], 0, logits.shape[1] - 1).cumsum(0, dtype=torch.int32)
    return {"weights": weights}


def _points(case: str, *sizes: tuple[int, str], dtype: str = "bf16", E: int = 128, top_k: int = 8):
    return [
        dict(case=case, dtype=dtype, T=T, E=E, top_k=top_k, routing=routing) for T, routing in sizes
    ]


@register(
    "moe_routing",
    impls=("cuda", "triton", "cpu", "torch"),
    cuda=[
        *_points("router", (512, "balanced"), (4096, "balanced"), (32_768, "balanced")),
        *_points("router", (32_768, "zipf1"), (32_768, "one"), (131_072, "balanced")),
        *_points("graph", (512, "balanced"), (4096, "balanced"), (32_768, "balanced")),
        *_points("fwd_bwd", (512, "balanced"), (32_768, "balanced")),
    ],
    cpu=[
        *_points("router", (4096, "balanced"), (4096, "one"), dtype="fp32"),
        *_points("fwd_bwd", (4096, "balanced"), dtype="fp32"),
    ],
)
def _moe_routing(
    device: str, case: str, dtype: torch.dtype, T: int, E: int, top_k: int, routing: str
) -> Problem:
    if case == "graph" and device != "cuda":
        raise Unavailable("a CUDA graph needs a CUDA device")
    route = our_op("moe_routing", "moe_route")
    build_index = our_op("moe_routing", "build_expert_index")
    logits = _logits(T, E, routing, dtype, device)
    gradients = {}
    if case == "fwd_bwd":
        g = torch.Generator(device).manual_seed(1)
        gradients["weights"] = torch.randn(T, top_k, generator=g, device=device)
        gradients["prob_sums"] = torch.randn(E, generator=g, device=device)
        logits.requires_grad_()

    def ours(impl: str) -> Outputs:
        ids, weights, counts, prob_sums = route(logits, top_k, impl=impl)
        found = dict(ids=ids, weights=weights, counts=counts, prob_sums=prob_sums)
        if case == "fwd_bwd":
            return found
        index = build_index(ids, E, impl=impl)
        return found | dict(zip(_EXACT[2:], index, strict=True))

    calls = {n: lambda impl=impl: ours(impl) for n, impl in OPS["moe_routing"].ours(device).items()}
    label = f"eager-torch-{torch.__version__}"
    if case != "fwd_bwd":
        calls[label] = lambda: _eager(logits, top_k)
    run = timed(calls, {"logits": logits}, gradients)
    if case == "graph":
        run = graphed(run)
    names = _FLOATS + (("dlogits",) if gradients else ())
    exact = _EXACT[: 2 if gradients else None]

    def check(outputs: Outputs, strict: bool, complete: bool) -> float:
        truth = _truth(logits, top_k, torch.float64, gradients)
        baseline = _truth(logits, top_k, torch.float32, gradients)
        worst = 0.0
        for name in require(outputs, names + exact, complete):
            if name in exact:
                if not torch.equal(outputs[name].long(), truth[name]):
                    raise WrongResult(f"{name} is not that of a stable sort")
                continue
            comparison = Comparison(name)
            comparison.add(outputs[name], truth[name], baseline[name])
            comparison.judge(strict)
            worst = max(worst, comparison.relative)
        return worst

    slots = T * top_k
    passes = 3 if gradients else 1  # read; read again, written
    index_bytes = 0 if gradients else 2 * slots * 4 + slots * 8 + (E + 1) * 4
    return Problem(
        run,
        check,
        bytes=passes * T * E * dtype.itemsize + slots * (8 if not gradients else 16) + index_bytes,
        useful_flops=0,
        peer_scope={label: "less"} if label in calls else {},
    )
