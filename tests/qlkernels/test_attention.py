import math
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from qlkernels import attention, pack_groups, prefix_attention
from qlkernels.attention import attention_ref, backends, merge, passes, prefix_attention_ref
from qlkernels.attention.backends import BACKENDS, Call, choose_backend, why_not
from qlkernels.attention.merge import merge_into
from qlkernels.testing import assert_as_accurate, outputs_and_grads

CPU_BACKENDS = ["sdpa", "torch"]
# prompt lengths and answer lengths of groups
GROUPS = {
    "one": ([7], [[5, 2]]),
    "no-prefix": ([1], [[3, 2]]),
    "empty-answers": ([4], [[0, 3, 0]]),
    "no-answers": ([5], [[]]),
    "many": ([6, 1, 2, 9], [[4, 1], [2, 2], [], [0, 7, 1]]),
    "one-row": ([1], [[1]]),
    "nothing": ([1], [[0]]),
}
HEADS = [(4, 2, 16), (3, 3, 8), (6, 1, 5)]  # Hq, Hkv, D


def name_of(value):
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


def offsets(lengths, device="cpu"):
    return torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)


def layout_of(prompts, answers):
    ids = [list(range(P)) for P in prompts]
    return pack_groups(ids, [[list(range(R)) for R in group] for group in answers])


def make(T, Hq, Hkv, D, dtype=torch.float32, device="cpu", seed=0):
    g = torch.Generator().manual_seed(seed)
    inputs = {
        name: torch.randn(T, H, D, generator=g).to(dtype).to(device).requires_grad_()
        for name, H in (("q", Hq), ("k", Hkv), ("v", Hkv))
    }
    return inputs, [torch.randn(T, Hq, D, generator=g).to(dtype).to(device)]


def check(op, ref, inputs, upstream):
    """Forward and backward by the tolerance rule."""
    doubles = {n: x.detach().double().requires_grad_() for n, x in inputs.items()}
    actual = outputs_and_grads(op, inputs, upstream)
    truth = outputs_and_grads(ref, doubles, upstream)
    baseline = outputs_and_grads(ref, inputs, upstream)
    dtype, is_cuda = inputs["q"].dtype, inputs["q"].is_cuda
    # the interpreter of the merge kernel truncates to bf16 where the compiler rounds
    floor = 2**-7 if dtype == torch.bfloat16 and not is_cuda else 1e-5
    # delta comes from the rounded output, and the shares of dk and dv are rounded before they add
    rounded = torch.finfo(dtype).eps / 2 if dtype in backends.HALVES else 0.0
    # a row that sees one key has dq = 0 exactly: what is left of it is judged on the scale of dv
    scale = truth["dv"].abs().amax().reshape(1) if truth["dv"].numel() else truth["dv"].flatten()
    for name in truth:
        values = (torch.cat([x[name].flatten(), scale.to(x[name].dtype)])
                  for x in (actual, truth, baseline))  # fmt: skip
        assert actual[name].shape == truth[name].shape
        allowance = max(floor, rounded) if name.startswith("d") else floor
        assert_as_accurate(name, *values, floor=allowance)
    return actual


def check_packed(parts, inputs, upstream, **options):
    cu = offsets(parts, inputs["q"].device)
    op = partial(attention, cu_seqlens=cu, max_seqlen=max(parts), **options)
    return check(op, partial(attention_ref, cu_seqlens=cu), inputs, upstream)


def check_groups(layout, inputs, upstream, **options):
    op = partial(prefix_attention, layout=layout, **options)
    return check(op, partial(prefix_attention_ref, layout=layout), inputs, upstream)


# --- against the reference ---------------------------------------------------------


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("Hq, Hkv, D", HEADS)
@pytest.mark.parametrize("lengths", [(1,), (17,), (3, 0, 7, 1), (0, 0), (33, 64, 2)], ids=str)
def test_packed_matches_reference(backend, lengths, Hq, Hkv, D):
    check_packed(lengths, *make(sum(lengths), Hq, Hkv, D), backend=backend)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("Hq, Hkv, D", HEADS)
@pytest.mark.parametrize("name", GROUPS)
def test_groups_match_reference(backend, name, Hq, Hkv, D):
    layout = layout_of(*GROUPS[name])
    check_groups(layout, *make(len(layout.input_ids), Hq, Hkv, D), backend=backend)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float16, torch.bfloat16], ids=lambda d: name_of(d)
)
def test_other_dtypes(backend, dtype):
    layout = layout_of(*GROUPS["many"])
    found = check_groups(
        layout, *make(len(layout.input_ids), 4, 2, 64, dtype), backend=backend
    )  # fmt: skip
    assert all(x.dtype == dtype for x in found.values())
    check_packed((20, 3), *make(23, 4, 2, 64, dtype), backend=backend)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_scale(backend):
    layout = layout_of(*GROUPS["one"])
    inputs, upstream = make(len(layout.input_ids), 4, 2, 8)
    op = partial(prefix_attention, layout=layout, softmax_scale=0.7, backend=backend)
    ref = partial(prefix_attention_ref, layout=layout, softmax_scale=0.7)
    check(op, ref, inputs, upstream)


# --- known answers -----------------------------------------------------------------


@pytest.mark.parametrize("backend", [*CPU_BACKENDS, "reference"])
def test_equal_scores_average_what_is_visible(backend):
    layout = layout_of([4], [[2, 1]])  # rows: prefix 0 1 2, answer 3 4, answer 5
    v = torch.tensor([1.0, 3.0, 5.0, 10.0, 20.0, 100.0])[:, None, None]
    zeros = torch.zeros_like(v)
    out = prefix_attention(zeros, zeros, v, layout, backend=backend).flatten()
    prefix = 1 + 3 + 5
    want = [1.0, 2.0, 3.0, (prefix + 10) / 4, (prefix + 30) / 5, (prefix + 100) / 4]
    torch.testing.assert_close(out, torch.tensor(want))
    out = attention(
        zeros, zeros, v, cu_seqlens=offsets((2, 4)), max_seqlen=4, backend=backend
    ).flatten()
    torch.testing.assert_close(out, torch.tensor([1.0, 2.0, 5.0, 7.5, 35 / 3, 33.75]))


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_a_prefix_collects_the_gradients_of_all_that_see_it(backend):
    layout = layout_of([3], [[1, 1, 1, 1]])  # two prefix rows, four answers of one row
    zeros = torch.zeros(6, 1, 1)
    v = torch.zeros(6, 1, 1, requires_grad=True)
    prefix_attention(zeros, zeros, v, layout, backend=backend).sum().backward()
    # row 0 averages 1 value, row 1 two, every answer row two of the prefix and its own
    want = [1 + 1 / 2 + 4 / 3, 1 / 2 + 4 / 3, *[1 / 3] * 4]
    torch.testing.assert_close(v.grad.flatten(), torch.tensor(want))


# --- laws --------------------------------------------------------------------------


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("name", ["one", "no-prefix", "empty-answers", "many"])
def test_a_group_equals_its_full_sequences(backend, name):
    """The copied last prompt token sees the prefix and itself, as it does in the full sequence."""
    prompts, answers = GROUPS[name]
    layout = layout_of(prompts, answers)
    T = len(layout.input_ids)
    inputs, _ = make(T, 4, 2, 8, torch.float64)
    q, k, v = (x.detach() for x in inputs.values())
    out = prefix_attention(q, k, v, layout, backend=backend)
    cu = layout.cu_seqlens.tolist()
    for segment, answer in enumerate(layout.answer_of.tolist()):
        if answer < 0:
            continue
        prefix = int(layout.prefix_of[segment])
        rows = [*range(cu[prefix], cu[prefix + 1]), *range(cu[segment], cu[segment + 1])]
        full = attention(
            q[rows], k[rows], v[rows],
            cu_seqlens=offsets((len(rows),)), max_seqlen=len(rows), backend=backend,
        )  # fmt: skip
        n = cu[segment + 1] - cu[segment]
        torch.testing.assert_close(out[cu[segment] : cu[segment + 1]], full[len(rows) - n :])


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("shift", [100.0, -100.0])
def test_a_vector_added_to_every_key_changes_nothing(backend, shift):
    layout = layout_of(*GROUPS["many"])
    inputs, _ = make(len(layout.input_ids), 4, 2, 8, torch.float64)
    q, k, v = (x.detach() for x in inputs.values())
    plain = prefix_attention(q, k, v, layout, backend=backend)
    torch.testing.assert_close(prefix_attention(q, k + shift, v, layout, backend=backend), plain)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_groups_and_answers_do_not_see_each_other(backend):
    layout = layout_of([4, 3], [[2, 3], [1, 2]])
    inputs, upstream = make(len(layout.input_ids), 4, 2, 8)
    op = partial(prefix_attention, layout=layout, backend=backend)
    plain = outputs_and_grads(op, inputs, upstream)
    first, second = layout.spans()
    hurt = slice(second.start, second.stop)
    with torch.no_grad():
        for x in inputs.values():
            x[hurt] = torch.nan
    found = outputs_and_grads(op, inputs, upstream)
    for name in plain:
        assert torch.equal(found[name][: first.stop], plain[name][: first.stop]), name
        assert found[name][hurt].isnan().any(), name


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_same_input_same_bits(backend):
    layout = layout_of(*GROUPS["many"])
    inputs, upstream = make(len(layout.input_ids), 4, 2, 16)
    op = partial(prefix_attention, layout=layout, backend=backend)
    first, second = (outputs_and_grads(op, inputs, upstream) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_chunks_of_rows_change_nothing(monkeypatch):
    layout = layout_of(*GROUPS["many"])
    inputs, upstream = make(len(layout.input_ids), 4, 2, 16, torch.float64)
    op = partial(prefix_attention, layout=layout, backend="torch")
    whole = outputs_and_grads(op, inputs, upstream)
    monkeypatch.setattr(backends, "_SCORE_BYTES", 4 * 4 * 8 * 2)  # two rows of eight keys
    assert len(backends._row_chunks(torch.empty(9, 4, 16), torch.empty(8, 2, 16))) == 5
    for name, value in outputs_and_grads(op, inputs, upstream).items():
        torch.testing.assert_close(value, whole[name])


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_strided_operands(backend):
    """Heads first in memory, as transformers hands them over, and a slice of a wider tensor."""
    layout = layout_of(*GROUPS["many"])
    T = len(layout.input_ids)
    q = torch.randn(4, T, 8).transpose(0, 1)
    kv = torch.randn(T, 2, 24)
    k, v = kv[..., :8], kv[..., 8:16]
    found = prefix_attention(q, k, v, layout, backend=backend)
    plain = prefix_attention(*(x.contiguous() for x in (q, k, v)), layout, backend=backend)
    torch.testing.assert_close(found, plain)


# --- plan --------------------------------------------------------------------------


def test_runs_by_hand():
    Run = passes.Run
    assert passes.runs_of((3, 0, 2), packs=True) == (Run(0, 3, 0, 5, 3),)
    assert passes.runs_of((3, 0, 2), packs=False) == (Run(0, 1, 0, 3, 3), Run(2, 3, 3, 5, 2))
    # a long prefix by itself, its answers in one call; the next group likewise
    assert passes.runs_of((9000, 10, 20, 0, 5000, 7), packs=True) == (
        Run(0, 1, 0, 9000, 9000), Run(1, 3, 9000, 9030, 20), Run(4, 5, 9030, 14030, 5000),
        Run(5, 6, 14030, 14037, 7),
    )  # fmt: skip
    assert passes.runs_of((0, 0), packs=True) == ()


def test_crosses_by_hand():
    # P = 4 with 5 answer rows, P = 1 (nothing to see), P = 3 without answer rows, P = 2 with 1
    found = passes.crosses_of((4, 1, 3, 2), (5, 6, 0, 1))
    assert found == [(slice(3, 8), slice(0, 3)), (slice(17, 18), slice(16, 17))]


def test_a_packed_call_is_offset_to_its_first_row():
    run = passes.Run(1, 3, 10, 15, 3)
    call = passes._own_call(run, offsets((10, 2, 3)), Call(1.0, False))
    assert call.cu_seqlens.tolist() == [0, 2, 5] and call.max_seqlen == 3 and call.causal


# --- merge kernel ------------------------------------------------------------------


def check_merge(N, Hq, D, dtype, device):
    g = torch.Generator().manual_seed(0)
    out, part = (torch.randn(N + 2, Hq, D, generator=g).to(dtype).to(device) for _ in range(2))
    lse, part_lse = (30 * torch.randn(Hq, N + 2, generator=g).to(device) for _ in range(2))
    lse[0, 1], part_lse[0, 1] = 5000.0, -5000.0  # one side alone
    before, before_lse = out.clone(), lse.clone()
    rows = slice(1, N + 1)
    both = torch.logaddexp(lse.double(), part_lse.double())
    w_a, w_b = ((x.double() - both).exp().T[..., None] for x in (lse, part_lse))
    want = (w_a * out.double() + w_b * part.double())[rows]
    merge_into(out[rows], lse[:, rows], part[rows], part_lse[:, rows])
    rounding = {torch.float32: 1e-5, torch.float16: 2**-10, torch.bfloat16: 2**-7}[dtype]
    assert (out[rows].double() - want).abs().max() <= rounding * want.abs().max()
    torch.testing.assert_close(lse[:, rows].double(), both[:, rows], rtol=1e-6, atol=1e-6)
    for edge in (0, N + 1):  # rows outside of the slice
        assert torch.equal(out[edge], before[edge])
        assert torch.equal(lse[:, edge], before_lse[:, edge])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("N, Hq, D", [(1, 1, 1), (5, 3, 7), (33, 2, 16), (64, 1, 5)])
def test_merge_kernel(N, Hq, D, dtype):
    check_merge(N, Hq, D, dtype, "cpu")


def test_a_group_is_the_same_without_triton(monkeypatch):
    monkeypatch.setattr(merge, "why_not_triton", lambda *_: "not here")
    layout = layout_of(*GROUPS["many"])
    check_groups(layout, *make(len(layout.input_ids), 4, 2, 8))


# --- backends ----------------------------------------------------------------------


def test_the_choice_is_reported():
    assert choose_backend("cpu", torch.float32, 64) == "sdpa"
    assert choose_backend("cpu", torch.float32, 64, backend="torch") == "torch"
    for name in ("flash-attn-4", "flash-attn-3", "cudnn", "flash-attn-2"):
        assert "needs tensors on a CUDA device" in why_not(name, "cpu", torch.bfloat16, 64)
        with pytest.raises(RuntimeError, match=f"backend='{name}' cannot run here: it needs"):
            choose_backend("cpu", torch.bfloat16, 64, backend=name)
    assert why_not("sdpa", "cpu", torch.float32, 64) is None
    with pytest.raises(ValueError, match="unknown backend 'flash'.*flash-attn-4"):
        choose_backend("cpu", torch.float32, 64, backend="flash")


def test_reasons_on_a_gpu(monkeypatch):
    monkeypatch.setattr(backends, "compute_capability", lambda _index: 80)
    assert "bfloat16 or float16" in why_not("sdpa", "cuda", torch.float32, 64)
    assert "at most 128" in why_not("cudnn", "cuda", torch.bfloat16, 256)
    assert "that 8 divides, got 20" in why_not("sdpa", "cuda", torch.bfloat16, 20)
    assert "9.0" in why_not("flash-attn-3", "cuda", torch.bfloat16, 64)
    assert "9.0" in why_not("flash-attn-4", "cuda", torch.bfloat16, 64)
    assert why_not("sdpa", "cuda", torch.bfloat16, 256) is None
    assert choose_backend("cuda", torch.float32, 64) == "torch"
    monkeypatch.setattr(backends, "compute_capability", lambda _index: 100)
    assert "at most 128, or 256" in why_not("flash-attn-4", "cuda", torch.bfloat16, 192)
    monkeypatch.setattr(backends, "compute_capability", lambda _index: 70)
    assert "8.0" in why_not("sdpa", "cuda", torch.bfloat16, 64)


def test_a_package_that_does_not_import_is_a_reason(monkeypatch):
    monkeypatch.setattr(backends, "compute_capability", lambda _index: 90)
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    backends._import_error.cache_clear()
    assert "flash_attn" in why_not("flash-attn-2", "cuda", torch.bfloat16, 64)
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(__path__=[]))
    monkeypatch.setitem(sys.modules, "flash_attn.cute", SimpleNamespace(__path__=[]))
    older = SimpleNamespace(_flash_attn_fwd=None)
    monkeypatch.setitem(sys.modules, "flash_attn.cute.interface", older)
    backends._import_error.cache_clear()
    assert "no _flash_attn_bwd" in why_not("flash-attn-4", "cuda", torch.bfloat16, 64)
    backends._import_error.cache_clear()


class Fakes:
    """flash-attn's entry points with the argument names of its versions, computed by products.

    They take what the real ones take: batched ``[1, N, H, D]``, or packed with offsets.
    """

    @staticmethod
    def call(scale, causal, q, cu):
        if cu is not None:
            return [slice(a, b) for a, b in zip(cu, cu[1:], strict=False)], Call(scale, causal)
        assert q.dim() == 4 and len(q) == 1
        return None, Call(scale, causal)

    @classmethod
    def run(cls, q, k, v, scale, causal, cu=None):
        parts, call = cls.call(scale, causal, q, None if cu is None else cu.tolist())
        if parts is None:
            out, lse = BACKENDS["torch"].forward(q[0], k[0], v[0], call)
            return out[None], lse[None]
        found = [BACKENDS["torch"].forward(q[p], k[p], v[p], call) for p in parts]
        return torch.cat([o for o, _ in found]), torch.cat([s for _, s in found], dim=1)

    @classmethod
    def run_back(cls, dout, q, k, v, out, lse, grads, scale, causal, cu=None):
        parts, call = cls.call(scale, causal, q, None if cu is None else cu.tolist())
        back = BACKENDS["torch"].backward
        if parts is None:
            found = [g[None] for g in back(*(x[0] for x in (dout, q, k, v, out, lse)), call)]
        else:
            found = [
                back(dout[p], q[p], k[p], v[p], out[p], lse[:, p], call) for p in parts
            ]  # fmt: skip
            found = [torch.cat(g) for g in zip(*found, strict=True)]
        for into, g in zip(grads, found, strict=True):
            into.copy_(g)
        return tuple(grads)


def fake_flash_2():
    def forward(q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right,
                softcap, alibi_slopes, return_softmax):  # fmt: skip
        assert dropout_p == softcap == 0.0 and window_size_left == window_size_right == -1
        assert alibi_slopes is None and not return_softmax
        return *Fakes.run(q, k, v, softmax_scale, causal), None, None

    def varlen_forward(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
                       softmax_scale, causal, window_size_left, window_size_right, softcap,
                       alibi_slopes, return_softmax):  # fmt: skip
        assert max_seqlen_q == max_seqlen_k == cu_seqlens_q.diff().max()
        return *Fakes.run(q, k, v, softmax_scale, causal, cu_seqlens_k), None, None

    def backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal,
                 window_size_left, window_size_right, softcap, alibi_slopes,
                 deterministic):  # fmt: skip
        assert deterministic
        grads = (dq, dk, dv)
        Fakes.run_back(dout, q, k, v, out, softmax_lse, grads, softmax_scale, causal)

    def varlen_backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k,
                        max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
                        window_size_left, window_size_right, softcap, alibi_slopes,
                        deterministic):  # fmt: skip
        assert deterministic and softmax_lse.is_contiguous()
        Fakes.run_back(
            dout, q, k, v, out, softmax_lse, (dq, dk, dv), softmax_scale, causal, cu_seqlens_q
        )

    return SimpleNamespace(
        _flash_attn_forward=forward, _flash_attn_varlen_forward=varlen_forward,
        _flash_attn_backward=backward, _flash_attn_varlen_backward=varlen_backward,
    )  # fmt: skip


def fake_flash_3():
    def forward(q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None,
                max_seqlen_k=None, softmax_scale=None, causal=False):  # fmt: skip
        return *Fakes.run(q, k, v, softmax_scale, causal, cu_seqlens_q), None, None

    def backward(dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None,
                 max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None,
                 softmax_scale=None, is_causal=False, deterministic=False):  # fmt: skip
        assert deterministic
        Fakes.run_back(
            dout, q, k, v, out, softmax_lse, (dq, dk, dv), softmax_scale, is_causal, cu_seqlens_k
        )

    return SimpleNamespace(_flash_attn_forward=forward, _flash_attn_backward=backward)


def fake_flash_4():
    def forward(q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None,
                max_seqlen_k=None, softmax_scale=None, causal=False,
                return_lse=False):  # fmt: skip
        assert return_lse
        return *Fakes.run(q, k, v, softmax_scale, causal, cu_seqlens_q), None, None, None

    def backward(q, k, v, out, dout, lse, softmax_scale=None, causal=False, cu_seqlens_q=None,
                 cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
                 deterministic=False):  # fmt: skip
        assert deterministic and (lse.dim() == 3) == (cu_seqlens_q is None)
        grads = tuple(torch.empty_like(x) for x in (q, k, v))
        return Fakes.run_back(dout, q, k, v, out, lse, grads, softmax_scale, causal, cu_seqlens_k)

    return SimpleNamespace(_flash_attn_fwd=forward, _flash_attn_bwd=backward)


@pytest.mark.parametrize(
    "backend, module, fake",
    [
        ("flash-attn-2", "flash_attn.flash_attn_interface", fake_flash_2),
        ("flash-attn-3", "flash_attn_interface", fake_flash_3),
        ("flash-attn-4", "flash_attn.cute.interface", fake_flash_4),
    ],
)
def test_what_flash_attn_is_handed(monkeypatch, backend, module, fake):
    """Packed runs, single blocks and prefixes reach the package as its signatures want them."""
    parents = module.split(".")[:-1]
    for i in range(len(parents)):
        name = ".".join(parents[: i + 1])
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(__path__=[]))
    monkeypatch.setitem(sys.modules, module, fake())
    monkeypatch.setattr(backends, "why_not", lambda *_: None)
    monkeypatch.setattr(passes, "packs", lambda *_: True)  # as on a GPU
    monkeypatch.setattr(passes, "_LONG", 6)  # so that some segments count as long
    passes.runs_of.cache_clear()
    layout = layout_of([9, 4, 1], [[2, 0, 3, 1], [7, 2], [3]])
    check_groups(layout, *make(len(layout.input_ids), 4, 2, 8), backend=backend)
    check_packed((2, 3, 8, 1), *make(14, 4, 2, 8), backend=backend)
    check_packed((14,), *make(14, 4, 2, 8), backend=backend)
    passes.runs_of.cache_clear()


# --- torch's own machinery ---------------------------------------------------------


def test_opcheck():
    layout = layout_of([4], [[2, 3]])
    inputs, upstream = make(8, 4, 2, 8)
    operands = (*inputs.values(), layout.cu_seqlens, 3, (3, 2, 3))
    for groups in (((), ()), ((4,), (5,))):
        rest = (*groups, 0.5, "sdpa", True)
        torch.library.opcheck(torch.ops.qlkernels.attention.default, (*operands, *rest))
        detached = [x.detach() for x in operands[:3]]
        out, lse = torch.ops.qlkernels.attention(*detached, *operands[3:], *rest)
        arguments = (upstream[0], *detached, out, lse, *operands[3:], *rest)
        torch.library.opcheck(torch.ops.qlkernels.attention_bwd.default, arguments)


def test_compiles_to_one_graph():
    layout = layout_of(*GROUPS["many"])
    inputs, upstream = make(len(layout.input_ids), 4, 2, 8)
    op = partial(prefix_attention, layout=layout)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    eager, found = (outputs_and_grads(f, inputs, upstream) for f in (op, compiled))
    assert all(torch.equal(eager[name], found[name]) for name in eager)


def test_autocast():
    layout = layout_of(*GROUPS["one"])
    inputs, upstream = make(len(layout.input_ids), 4, 2, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = outputs_and_grads(partial(prefix_attention, layout=layout), inputs, upstream)
    assert found["out0"].dtype == torch.bfloat16 and found["dq"].dtype == torch.float32
    plain = prefix_attention(*(x.detach().bfloat16() for x in inputs.values()), layout)
    assert torch.equal(found["out0"], plain)


def test_double_backward_is_refused():
    inputs, _ = make(3, 2, 2, 4)
    out = attention(*inputs.values(), cu_seqlens=offsets((3,)), max_seqlen=3)
    (dq,) = torch.autograd.grad(out.sum(), inputs["q"], create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        dq.sum().backward()


def test_nothing_is_differentiable():
    layout = layout_of([1], [[0]])
    inputs, _ = make(0, 4, 2, 8)
    out = prefix_attention(*inputs.values(), layout)
    assert out.shape == (0, 4, 8)
    out.sum().backward()
    assert all(x.grad.shape == x.shape for x in inputs.values())
    out = attention(*inputs.values(), cu_seqlens=offsets((0,)), max_seqlen=0)
    assert out.shape == (0, 4, 8)


# --- wrong arguments ---------------------------------------------------------------


@pytest.mark.parametrize(
    "change, error, words",
    [
        (dict(q=torch.zeros(8, 3, 8)), ValueError, "3 heads of 8 and k has 2"),
        (dict(q=torch.zeros(8, 32)), ValueError, r"q must be \[T, Hq, D\]"),
        (dict(v=torch.zeros(8, 2, 4)), ValueError, "D = 8 elsewhere"),
        (dict(k=torch.zeros(8, 2, 8).half()), TypeError, "k must be float32, got float16"),
        (dict(k=torch.zeros(8, 2, 8, device="meta")), ValueError, "k is on meta"),
        (dict(q=torch.zeros(8, 8, 4).transpose(1, 2)), ValueError, "last dim of q must be contig"),
        (dict(v=torch.zeros(8, 2, 8).long(), k=torch.zeros(8, 2, 8).long(),
              q=torch.zeros(8, 4, 8).long()), TypeError, "q must be bfloat16"),
        (dict(softmax_scale=0.0), ValueError, "softmax_scale must be positive"),
        (dict(backend="fa"), ValueError, "unknown backend 'fa'"),
    ],
)  # fmt: skip
def test_wrong_operands(change, error, words):
    arguments = dict(q=torch.zeros(8, 4, 8), k=torch.zeros(8, 2, 8), v=torch.zeros(8, 2, 8))
    with pytest.raises(error, match=words):
        attention(**arguments | change, cu_seqlens=offsets((8,)), max_seqlen=8)
    with pytest.raises(error, match=words):
        prefix_attention(**arguments | change, layout=layout_of([4], [[2, 3]]))


@pytest.mark.parametrize(
    "change, error, words",
    [
        (dict(cu_seqlens=offsets((3, 4))), ValueError, "from 0 to T = 8"),
        (dict(cu_seqlens=torch.tensor([0, 6, 4, 8], dtype=torch.int32)), ValueError, "must rise"),
        (dict(cu_seqlens=offsets((8,)).long()), TypeError, "cu_seqlens must be int32"),
        (dict(cu_seqlens=offsets(())), ValueError, r"\[B \+ 1\] with B >= 1"),
        (dict(cu_seqlens=offsets((2, 6)), max_seqlen=5), ValueError, "max_seqlen is 5, but"),
        (dict(lengths=[3, 3]), ValueError, "from 0 to T = 8"),
    ],
)
def test_wrong_offsets(change, error, words):
    inputs, _ = make(8, 4, 2, 8)
    arguments = dict(cu_seqlens=offsets((8,)), max_seqlen=8) | change
    with pytest.raises(error, match=words):
        attention(*inputs.values(), **arguments)


def test_wrong_layouts():
    inputs, _ = make(8, 4, 2, 8)
    with pytest.raises(ValueError, match="q has 8 rows, but the layout 3"):
        prefix_attention(*inputs.values(), layout_of([1], [[3]]))
    with pytest.raises(ValueError, match=r"layout is on meta.*layout.to\(q.device\)"):
        prefix_attention(*inputs.values(), layout_of([4], [[2, 3]]).to("meta"))
    with pytest.raises(TypeError, match="layout must come from pack_groups, got int"):
        prefix_attention(*inputs.values(), 3)


# --- on a GPU ----------------------------------------------------------------------

GPU_BACKENDS = list(BACKENDS)


def cuda_or_skip(backend, dtype, D):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    why = why_not(backend, "cuda", dtype, D)
    if why is not None:
        pytest.skip(f"{backend}: {why}")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", GPU_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
@pytest.mark.parametrize("Hq, Hkv, D", [(8, 2, 128), (4, 4, 64), (4, 1, 256)])
def test_gpu_groups(backend, dtype, Hq, Hkv, D):
    cuda_or_skip(backend, dtype, D)
    for prompts, answers in (([1500], [[1100, 300]]), ([130, 1, 2], [[0, 65, 1], [200], [3, 129]])):
        layout = layout_of(prompts, answers).to("cuda")
        inputs, upstream = make(len(layout.input_ids), Hq, Hkv, D, dtype, "cuda")
        check_groups(layout, inputs, upstream, backend=backend)
        check_groups(layout, inputs, upstream, backend=backend, deterministic=False)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", GPU_BACKENDS)
@pytest.mark.parametrize("lengths", [(1,), (2049,), (1300, 0, 3, 1025, 127)], ids=str)
def test_gpu_packed(backend, lengths):
    cuda_or_skip(backend, torch.bfloat16, 128)
    inputs, upstream = make(sum(lengths), 8, 2, 128, torch.bfloat16, "cuda")
    check_packed(lengths, inputs, upstream, backend=backend)
    check_packed(
        lengths, inputs, upstream, backend=backend, lengths=lengths, deterministic=False
    )  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_gpu_long_and_short_segments(backend):
    """A prefix that runs by itself beside packed answers, in heads-first memory."""
    cuda_or_skip(backend, torch.bfloat16, 64)
    layout = layout_of([4200, 50], [[300, 0, 17], [5, 9]]).to("cuda")
    inputs, upstream = make(len(layout.input_ids), 2, 1, 64, torch.bfloat16, "cuda")
    strided = {
        n: x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
        for n, x in inputs.items()
    }
    check_groups(layout, strided, upstream, backend=backend)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_gpu_same_input_same_bits(backend):
    cuda_or_skip(backend, torch.bfloat16, 128)
    layout = layout_of([6000], [[500] * 4]).to("cuda")
    inputs, upstream = make(len(layout.input_ids), 8, 2, 128, torch.bfloat16, "cuda")
    op = partial(prefix_attention, layout=layout, backend=backend)
    first, second = (outputs_and_grads(op, inputs, upstream) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.gpu
def test_gpu_fp32():
    cuda_or_skip("torch", torch.float32, 64)
    layout = layout_of([700, 1], [[50, 0, 17], [5, 9]]).to("cuda")
    assert choose_backend("cuda", torch.float32, 64) == "torch"
    inputs, upstream = make(len(layout.input_ids), 4, 2, 64, torch.float32, "cuda")
    check_groups(layout, inputs, upstream)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("N, Hq, D", [(1, 1, 64), (33, 8, 128), (257, 3, 80), (64, 2, 256)])
def test_gpu_merge_kernel(N, Hq, D, dtype):
    cuda_or_skip("torch", dtype, D)
    check_merge(N, Hq, D, dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_gpu_memory_is_linear(backend):
    """No head is repeated and nothing of size P x R exists: 268 MB of bf16 would be one head's."""
    cuda_or_skip(backend, torch.bfloat16, 128)
    if backend == "torch":
        pytest.skip("its chunks of scores have a budget of their own")
    P, R, G = 32768, 512, 8
    layout = layout_of([P], [[R] * G]).to("cuda")
    T = len(layout.input_ids)
    q, k, v = (torch.randn(T, H, 128, device="cuda", dtype=torch.bfloat16) for H in (16, 4, 4))
    prefix_attention(q, k, v, layout, backend=backend)  # workspaces of first use
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = prefix_attention(q, k, v, layout, backend=backend)
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before - out.numel() * 2
    # the part before it is copied, the log-sum-exp, and as much again for the kernel's workspace
    assert extra <= 2 * (out.numel() * 2 + 16 * T * 4), extra
    assert math.isfinite(float(out.float().abs().max()))
