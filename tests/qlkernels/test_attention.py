from functools import partial

import pytest
import torch

from qlkernels import attention, prefix_attention
from qlkernels.attention import backends, merge, passes, prefix_attention_ref
from qlkernels.attention.backends import Call
from qlkernels.testing import outputs_and_grads
from tests.qlkernels.attention_cases import (
    CPU_BACKENDS,
    GROUPS,
    HEADS,
    check,
    check_groups,
    check_merge,
    check_packed,
    layout_of,
    make,
    name_of,
    offsets,
)  # fmt: skip

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("N, Hq, D", [(1, 1, 1), (5, 3, 7), (33, 2, 16), (64, 1, 5)])
def test_merge_kernel(N, Hq, D, dtype):
    check_merge(N, Hq, D, dtype, "cpu")


def test_a_group_is_the_same_without_triton(monkeypatch):
    monkeypatch.setattr(merge, "why_not_triton", lambda *_: "not here")
    layout = layout_of(*GROUPS["many"])
    check_groups(layout, *make(len(layout.input_ids), 4, 2, 8))


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
        (dict(cu_seqlens=torch.tensor([1, 8], dtype=torch.int32)), ValueError, "from 0 to T = 8"),
        (dict(cu_seqlens=offsets((7,))), ValueError, "from 0 to T = 8"),
        (dict(cu_seqlens=offsets((3, 5)), lengths=[5, 3]), ValueError, "from 0 to T = 8"),
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
