"""moe_layer: router and experts of one mixture-of-experts layer. 6·T·top_k·H·I forward, 12 more
backward.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from bench import peers
from bench.cases.providers import graphed, our_op, timed
from bench.gate import Comparison, require
from bench.peers_moe import OP
from bench.registry import OPS, Outputs, Problem, Unavailable, register

QWEN3_30B = {"H": 2048, "I": 768, "E": 128, "top_k": 8}
SMALL = {"H": 64, "I": 32, "E": 8, "top_k": 2}
_GAP = 0.02  # between the last logit chosen and the first one not: more than bf16 rounds away
_MARGIN = 8.0  # of the logits of preferred experts where routing is "one"


def layer_inputs(
    T: int, H: int, I: int, E: int, top_k: int, routing: str, dtype: torch.dtype, device: str  # noqa: E741
) -> dict[str, torch.Tensor]:  # fmt: skip
    """hidden ``[T, H]`` and the parameters router, gate_up and down.

    Feature 0 of every token is 1, so column 0 of the router is a bias: none (``balanced``), the
    logarithm of a Zipf law of exponent 1 (``zipf1``), or one that sends every token to the same
    experts (``one``). Tokens whose choice hangs on a rounding are drawn again, so that all
    providers choose alike.
    """
    g = torch.Generator(device).manual_seed(0)
    rank = torch.arange(1, E + 1, device=device).float()
    biases = {
        "balanced": torch.zeros_like(rank),
        "zipf1": -rank.log(),
        "one": _MARGIN * (rank <= top_k).float(),
    }
    if routing not in biases:
        raise ValueError(f"bench: routing is {', '.join(biases)}, got {routing!r}")
    router = torch.randn(E, H, generator=g, device=device) / H**0.5
    if routing == "zipf1":
        router *= math.pi / 6**0.5  # the spread of the noise by which a law of logits is sampled
    router[:, 0] = biases[routing]
    router = router.to(dtype)
    hidden = torch.randn(T, H, generator=g, device=device).to(dtype)
    for _ in range(100):
        hidden[:, 0] = 1.0
        best = F.linear(hidden, router).float().topk(min(top_k + 1, E), dim=1).values
        close = best.diff(dim=1)[:, -1].abs() < _GAP * best[:, -1].abs().clamp_min(1.0)
        rows = close.nonzero().squeeze(1)
        if top_k == E or rows.numel() == 0:
            break
        hidden[rows] = torch.randn(len(rows), H, generator=g, device=device).to(dtype)
    weights = {}
    for name, shape in (("gate_up", (E, 2 * I, H)), ("down", (E, H, I))):
        w = torch.empty(shape, dtype=dtype, device=device).normal_(generator=g)
        weights[name] = w * shape[2] ** -0.5
    made = dict(router=router, **weights)
    return dict(hidden=hidden) | {k: torch.nn.Parameter(v, False) for k, v in made.items()}


class LayerTruth:
    """fp64 truth of the layer and its gradients, expert by expert. The baseline has the same steps
    in fp32, and rounds what is stored between two products.
    """

    def __init__(self, inputs: dict[str, torch.Tensor], top_k: int, dout: torch.Tensor | None):
        self.inputs, self.top_k, self.dout = inputs, top_k, dout
        self.names = ("out",) + (() if dout is None else tuple(f"d{name}" for name in inputs))
        self._known: tuple[Outputs, dict[str, float]] | None = None

    def _compute(self, dtype: torch.dtype) -> Outputs:
        stored = self.inputs["hidden"].dtype

        def rounded(x: torch.Tensor) -> torch.Tensor:
            return x if dtype == torch.float64 else x.to(stored).to(dtype)

        x, router, gate_up, down = (t.detach() for t in self.inputs.values())
        logits = F.linear(x, router).to(dtype)  # [T, E], rounded as every provider rounds them
        x = x.to(dtype)
        p, ids = logits.softmax(dim=1).topk(self.top_k, dim=1)
        weights = p / p.sum(1, keepdim=True)
        found = {"out": torch.zeros_like(x)}
        if self.dout is not None:
            dout = self.dout.to(dtype)
            found |= dict(dhidden=torch.zeros_like(x), drouter=None)
            for name, w in (("dgate_up", gate_up), ("ddown", down)):
                found[name] = torch.zeros(w.shape, dtype=dtype, device=x.device)
            dweights = torch.zeros_like(weights)
        for e in range(gate_up.shape[0]):
            token, slot = (ids == e).nonzero(as_tuple=True)
            w_e, x_e = weights[token, slot, None], x[token]
            w1, w2 = gate_up[e].to(dtype), down[e].to(dtype)
            h = x_e @ w1.T
            gate, up = h.chunk(2, dim=1)
            a = rounded(F.silu(gate) * up)
            found["out"].index_add_(0, token, w_e * rounded(a @ w2.T))
            if self.dout is None:
                continue
            gate, up = rounded(h).chunk(2, dim=1)
            s = gate.sigmoid()
            a = gate * s * up
            g = dout[token] @ w2
            dweights[token, slot] = (g * a).sum(1)
            found["ddown"][e] = dout[token].T @ rounded(w_e * a)
            dgate = w_e * g * up * s * (1 + gate * (1 - s))
            dh = rounded(torch.cat([dgate, w_e * g * gate * s], 1))
            found["dgate_up"][e] = dh.T @ x_e
            found["dhidden"].index_add_(0, token, rounded(dh @ w1))
        if self.dout is not None:
            inner = (dweights * weights).sum(1, keepdim=True)
            dlogits = torch.zeros_like(logits).scatter_(1, ids, weights * (dweights - inner))
            dlogits = rounded(dlogits)
            found["drouter"] = dlogits.T @ x
            found["dhidden"] = rounded(found["dhidden"]) + rounded(dlogits @ router.to(dtype))
        return found

    def check(self, outputs: Outputs, strict: bool, complete: bool) -> float:
        present = require(outputs, self.names, complete)
        if self._known is None:
            truth, slips = self._compute(torch.float64), {}
            for name, value in self._compute(torch.float32).items():
                kept = value.to(self.inputs["hidden"].dtype).double()
                slips[name] = float((kept - truth[name]).abs().max())
            self._known = truth, slips
        truth, slips = self._known
        worst = 0.0
        for name in present:
            found = Comparison(name, slip=slips[name])
            found.add(outputs[name], truth[name])
            found.judge(strict)
            worst = max(worst, found.relative)
        return worst


def _points(case: str, dtype: str, layer: dict[str, int], *sizes: tuple[int, str]) -> list[dict]:
    return [dict(case=case, dtype=dtype, T=T, **layer, routing=routing) for T, routing in sizes]


_EVEN = [(T, "balanced") for T in (1, 256, 4096, 32_768)]
_SKEWED = [(32_768, "zipf1"), (32_768, "one")]


@register(
    OP,
    impls=("triton", "torch"),
    cuda=[
        *_points("fwd", "bf16", QWEN3_30B, *_EVEN, *_SKEWED, (131_072, "balanced")),
        *_points("fwd_graph", "bf16", QWEN3_30B, *_EVEN[:3]),
        *_points("fwd_bwd", "bf16", QWEN3_30B, *_EVEN[2:], *_SKEWED),
    ],
    cpu=[
        *_points("fwd", "fp32", SMALL, (128, "balanced"), (512, "zipf1")),
        *_points("fwd_bwd", "fp32", SMALL, (128, "balanced"), (512, "zipf1")),
    ],
)
def _moe_layer(
    device: str, case: str, dtype: torch.dtype, T: int, H: int, I: int, E: int, top_k: int,  # noqa: E741
    routing: str,
) -> Problem:  # fmt: skip
    if case == "fwd_graph" and device != "cuda":
        raise Unavailable("a CUDA graph needs a CUDA device")
    route, experts = our_op("moe_routing", "moe_route"), our_op("moe", "moe_mlp")
    inputs = layer_inputs(T, H, I, E, top_k, routing, dtype, device)
    dout = None
    if case == "fwd_bwd":
        g = torch.Generator(device).manual_seed(1)
        dout = torch.randn(T, H, generator=g, device=device).to(dtype)
        for x in inputs.values():
            x.requires_grad_()
    hidden, router, gate_up, down = inputs.values()

    def ours(impl: str) -> Outputs:
        how = "auto" if impl == "triton" else impl
        routed = route(F.linear(hidden, router), top_k, impl=how)
        out = experts(hidden, routed.topk_ids, routed.topk_weights, gate_up, down, impl=impl)
        return {"out": out}

    calls = {n: lambda impl=impl: ours(impl) for n, impl in OPS[OP].ours(device).items()}
    found, scopes, absent = peers.find(OP, device, backward=dout is not None)
    if case == "fwd_graph":  # a peer that waits for the host cannot be captured
        found, scopes, absent = {}, {}, {}
    for name, peer in found.items():
        calls[name] = lambda peer=peer: peer(hidden, router, gate_up, down, top_k)
    run = timed(calls, inputs, {} if dout is None else {"out": dout})
    passes = 1 if dout is None else 3
    touched = min(E, T * top_k)  # experts whose weights are read
    tokens = 2 * T * H * (1 if dout is None else 2)
    return Problem(
        graphed(run) if case == "fwd_graph" else run,
        LayerTruth(inputs, top_k, dout).check,
        bytes=dtype.itemsize * (passes * 3 * touched * I * H + tokens),
        useful_flops=passes * 6 * T * top_k * H * I,
        peer_scope=scopes,
        absent=absent,
    )
