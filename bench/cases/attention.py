"""attention and prefix_attention over every backend present, and what they replace.

Counted work, for heads of D: a visible (query, key) pair costs 4 Hq D FLOPs forward, 2.5 times that
backward. A causal sequence of T has T^2 / 2 pairs; a group P^2 / 2 + P G R + G R^2 / 2.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from bench.cases.providers import our_op, timed
from bench.gate import Comparison, require
from bench.registry import Outputs, Problem, register
from qlkernels.attention import BACKENDS, why_not
from qlkernels.prefix_group import PackedGroups, pack_groups

QWEN3 = {"Hq": 32, "Hkv": 4, "D": 128}  # Qwen3-30B-A3B
SMALL = {"Hq": 8, "Hkv": 2, "D": 64}
_CHUNK_BYTES = 1 << 30  # of fp64 scores at a time
_SAMPLES = 64  # rows and keys that are compared


class AttentionTruth:
    """fp64 truth at sampled rows, and at sampled keys for dk and dv.

    The gradient of a key needs the log-sum-exp and delta of every row, so with a backward all rows
    are computed once, in chunks.
    """

    def __init__(self, q, k, v, layout: PackedGroups, dout: torch.Tensor | None):
        self.q, self.k, self.v, self.dout = (
            x if x is None else x.detach() for x in (q, k, v, dout)
        )
        self.layout = layout
        self.scale = q.shape[2] ** -0.5
        self.names = ("out",) if dout is None else ("out", "dq", "dk", "dv")
        T = len(q)
        # both ends, the first rows of the answers, and rows spread between
        chosen = [torch.linspace(0, T - 1, min(T, _SAMPLES)).long()]
        starts = layout.cu_seqlens[:-1].cpu().long()
        chosen.append(starts[starts < T][:16])
        self.sample = torch.cat(chosen).unique().to(q.device)
        self._known: tuple[Outputs, Outputs] | None = None

    def _visible(self, rows: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        of = self.layout.segment_of
        prefix = self.layout.prefix_of.long()[of[rows]]
        own = (of[rows][:, None] == of[keys]) & (rows[:, None] >= keys)
        return own | ((prefix[:, None] == of[keys]) & self.layout.is_answer[rows][:, None])

    def _scores(self, rows: torch.Tensor, keys: torch.Tensor, dtype) -> torch.Tensor:
        """``[Hkv, heads, n, M]``, at least in fp32."""
        wide = torch.promote_types(dtype, torch.float32)
        q = self.q[rows].to(wide).unflatten(1, (self.k.shape[1], -1))  # [n, Hkv, heads, D]
        scores = torch.einsum("nghd,mgd->ghnm", q, self.k[keys].to(wide)) * self.scale
        return scores.masked_fill_(~self._visible(rows, keys), -torch.inf)

    def _rows(self, rows: torch.Tensor, dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Weights ``[Hkv, heads, n, T]``, out ``[Hkv, heads, n, D]`` and the log-sum-exp."""
        scores = self._scores(rows, torch.arange(len(self.k), device=rows.device), dtype)
        lse = scores.logsumexp(dim=3)
        p = scores.sub_(lse[..., None]).exp_()
        return p, torch.einsum("ghnm,mgd->ghnd", p.to(dtype), self.v.to(dtype)), lse

    def _dout(self, rows: torch.Tensor, dtype) -> torch.Tensor:
        return self.dout[rows].to(dtype).unflatten(1, (self.k.shape[1], -1)).permute(1, 2, 0, 3)

    def _compute(self, dtype) -> Outputs:
        def flat(x):  # [Hkv, heads, n, D] -> [n, Hq, D]
            return x.permute(2, 0, 1, 3).flatten(1, 2)

        rows, exact = self.sample, torch.float64
        p, out, _ = self._rows(rows, dtype)
        found = {"out": flat(out)}
        if self.dout is None:
            return found
        dout = self._dout(rows, dtype)
        wide = exact if dtype == exact else torch.float32
        delta = (dout.to(wide) * out.to(wide)).sum(dim=3, keepdim=True)
        ds = p * (torch.einsum("ghnd,mgd->ghnm", dout, self.v.to(dtype)) - delta) * self.scale
        found["dq"] = flat(torch.einsum("ghnm,mgd->ghnd", ds.to(dtype), self.k.to(dtype)))
        del p, ds
        T, Hq = self.q.shape[:2]
        step = max(1, _CHUNK_BYTES // (8 * Hq * T))
        dk, dv = (torch.zeros(self.k[rows].shape, dtype=wide, device=rows.device) for _ in "kv")
        for chunk in torch.arange(T, device=rows.device).split(step):
            _, out, lse = self._rows(chunk, exact)  # every row's own, whatever the dtype compared
            dout = self._dout(chunk, dtype)
            delta = (dout.to(exact) * out).sum(dim=3, keepdim=True).to(wide)
            p = (self._scores(chunk, rows, dtype) - lse[..., None]).exp().to(wide)
            dv += torch.einsum("ghnm,ghnd->mgd", p.to(dtype), dout).to(wide)
            ds = p * (torch.einsum("ghnd,mgd->ghnm", dout, self.v[rows].to(dtype)) - delta)
            q = self.q[chunk].to(dtype).unflatten(1, (self.k.shape[1], -1))
            dk += torch.einsum("ghnm,nghd->mgd", (ds * self.scale).to(dtype), q).to(wide)
        found["dk"], found["dv"] = dk.to(dtype), dv.to(dtype)
        return found

    def check(self, outputs: Outputs, strict: bool, complete: bool) -> float:
        present = require(outputs, self.names, complete)
        if self._known is None:
            self._known = self._compute(torch.float64), self._compute(self.q.dtype)
        truth, baseline = self._known
        worst = 0.0
        for name in present:
            found = Comparison(name)
            found.add(outputs[name][self.sample], truth[name], baseline[name])
            if name.startswith("d") and self.q.dtype != torch.float32:
                # flash kernels take delta from the rounded output, and the shares of dk and dv are
                # rounded before they add: half a unit in the last place more
                found.slip += found.scale * torch.finfo(self.q.dtype).eps / 4
            found.judge(strict)
            worst = max(worst, found.relative)
        return worst


def _problem(
    device: str,
    dtype: torch.dtype,
    case: str,
    layout: PackedGroups,
    Hq: int,
    Hkv: int,
    D: int,
    ours: Callable,
    peer_name: str,
    peer: Callable,
) -> Problem:
    """``ours(q, k, v, backend, deterministic)`` and ``peer(q, k, v)`` return ``[T, Hq, D]``."""
    T = len(layout.input_ids)
    generator = torch.Generator(device).manual_seed(0)
    q, k, v, dout = (
        torch.empty(T, H, D, dtype=dtype, device=device).normal_(generator=generator)
        for H in (Hq, Hkv, Hkv, Hq)
    )
    backward = case == "fwd_bwd"
    leaves = {"q": q, "k": k, "v": v}
    for x in leaves.values():
        x.requires_grad_(backward)
    calls, absent = {}, {}
    for name in BACKENDS:
        why = why_not(name, device, dtype, D)
        if why is not None:
            absent[f"ours-{name}"] = why
            continue
        calls[f"ours-{name}"] = lambda name=name: {"out": ours(q, k, v, name, True)}
        if backward and device == "cuda" and name != "torch":
            calls[f"ours-{name}-atomics"] = lambda name=name: {"out": ours(q, k, v, name, False)}
    calls[peer_name] = lambda: {"out": peer(q, k, v)}
    pairs = 0.0
    for span in layout.spans():
        P = span.answers_start - span.start
        own = [P, *span.answer_lengths]
        pairs += P * (span.stop - span.answers_start) + sum(n * (n + 1) / 2 for n in own)
    return Problem(
        timed(calls, leaves, {"out": dout} if backward else {}),
        AttentionTruth(q, k, v, layout, dout if backward else None).check,
        bytes=(2 if backward else 1) * dtype.itemsize * 2 * T * (Hq + Hkv) * D,
        useful_flops=int((3.5 if backward else 1.0) * 4 * Hq * D * pairs),
        peer_scope={peer_name: "same"},
        absent=absent,
    )


@register(
    "attention",
    cuda=[
        {"case": "fwd", "dtype": "bf16", "T": 32_768, **QWEN3},
        {"case": "fwd", "dtype": "bf16", "T": 120_000, **QWEN3},
        {"case": "fwd_bwd", "dtype": "bf16", "T": 32_768, **QWEN3},
    ],
    cpu=[
        {"case": "fwd", "dtype": "fp32", "T": 1024, **SMALL},
        {"case": "fwd_bwd", "dtype": "fp32", "T": 1024, **SMALL},
    ],
)
def _attention(
    device: str, case: str, dtype: torch.dtype, T: int, Hq: int, Hkv: int, D: int
) -> Problem:
    """One causal sequence."""
    op = our_op("attention")
    layout = pack_groups([torch.zeros(T + 1, dtype=torch.int64)], [[]]).to(device)
    options = dict(cu_seqlens=layout.cu_seqlens, max_seqlen=T)

    def ours(q, k, v, backend, deterministic):
        return op(q, k, v, backend=backend, deterministic=deterministic, **options)

    def sdpa(q, k, v):
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out[0].transpose(0, 1)

    name = f"torch.sdpa-{torch.__version__}"
    return _problem(device, dtype, case, layout, Hq, Hkv, D, ours, name, sdpa)


@register(
    "prefix_attention",
    cuda=[
        {"case": "fwd", "dtype": "bf16", "P": 32_768, "G": 8, "R": 2048, **QWEN3},
        {"case": "fwd", "dtype": "bf16", "P": 120_000, "G": 8, "R": 2048, **QWEN3},
        {"case": "fwd_bwd", "dtype": "bf16", "P": 32_768, "G": 8, "R": 2048, **QWEN3},
    ],
    cpu=[
        {"case": "fwd", "dtype": "fp32", "P": 1024, "G": 8, "R": 64, **SMALL},
        {"case": "fwd_bwd", "dtype": "fp32", "P": 1024, "G": 8, "R": 64, **SMALL},
    ],
)
def _prefix_attention(
    device: str, case: str, dtype: torch.dtype, P: int, G: int, R: int, Hq: int, Hkv: int, D: int
) -> Problem:
    """One prompt and its answers, against the G full sequences that they stand for."""
    op, full = our_op("attention", "prefix_attention"), our_op("attention")
    ids = torch.zeros(max(P, R), dtype=torch.int64)
    layout = pack_groups([ids[:P]], [[ids[:R]] * G]).to(device)
    prefix, answers = torch.arange(P - 1), torch.arange(P - 1, P - 1 + G * R).split(R)
    rows = torch.cat([torch.cat([prefix, own]) for own in answers]).to(device)
    length = P - 1 + R
    cu_seqlens = torch.arange(0, G * length + 1, length, dtype=torch.int32, device=device)
    # where each packed row is found among the full sequences; the prefix in the first of them
    back = torch.cat(
        [prefix, *(torch.arange(g * length + P - 1, (g + 1) * length) for g in range(G))]
    ).to(device)

    def ours(q, k, v, backend, deterministic):
        return op(q, k, v, layout, backend=backend, deterministic=deterministic)

    def full_sequences(q, k, v):
        out = full(
            *(x.index_select(0, rows) for x in (q, k, v)),
            cu_seqlens=cu_seqlens, max_seqlen=length, lengths=[length] * G,
        )  # fmt: skip
        return out.index_select(0, back)

    name = "full-sequences"
    return _problem(device, dtype, case, layout, Hq, Hkv, D, ours, name, full_sequences)
