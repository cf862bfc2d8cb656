"""The expert layer: values and gradients against fp64, bits, memory, errors."""

import sys

import pytest
import torch
import torch.nn.functional as F

from qlkernels.grouped_gemm import configs, launch
from qlkernels.moe import chunks_of, moe_mlp, moe_mlp_ref
from qlkernels.testing import assert_as_accurate, outputs_and_grads

moe = sys.modules["qlkernels.moe"]
NAMES = ("hidden_states", "topk_weights", "w_gate_up", "w_down", "residual")


def make(T, H, I, E, top_k, dtype=torch.float32, *, seed=0, ids="random", device="cpu"):  # noqa: E741
    """Arguments of ``moe_mlp`` and an upstream gradient."""
    g = torch.Generator(device).manual_seed(seed)
    options = dict(generator=g, device=device)
    scores = torch.rand(T, E, **options)
    if ids == "one":  # every token prefers the same experts
        scores = torch.arange(E, 0, -1.0, device=device).expand(T, E)
    elif ids == "zipf":
        scores = scores.log() * torch.arange(1, E + 1, device=device)
    topk_ids = scores.topk(top_k, dim=1).indices.int()
    if ids == "outside":
        topk_ids[torch.rand(T, top_k, **options) < 0.3] = E
        topk_ids[:1] = E
    weights = torch.rand(T, top_k, **options)
    weights = torch.where(topk_ids < E, weights / weights.sum(1, keepdim=True), torch.nan)
    made = dict(
        hidden_states=torch.randn(T, H, **options).to(dtype),
        topk_ids=topk_ids,
        topk_weights=weights,
        w_gate_up=(torch.randn(E, 2 * I, H, **options) / H**0.5).to(dtype),
        w_down=(torch.randn(E, H, I, **options) / I**0.5).to(dtype),
        residual=torch.randn(T, H, **options).to(dtype),
    )
    for name in NAMES:
        made[name].requires_grad_()
    return made, torch.randn(T, H, **options)


def run(inputs, upstream, function=moe_mlp, **options):
    return outputs_and_grads(lambda **i: function(**i, **options), inputs, [upstream])


def in_fp64(inputs):
    return {k: x if k == "topk_ids" else x.detach().double().requires_grad_()
            for k, x in inputs.items()}  # fmt: skip


def eager_layer(hidden_states, topk_ids, topk_weights, w_gate_up, w_down, residual):
    """The layer as a user writes it, rounded where the dtype rounds."""
    x, parts = hidden_states, []
    for t in range(x.shape[0]):
        total = residual[t].float()
        for j, e in enumerate(topk_ids[t].tolist()):
            if 0 <= e < w_down.shape[0]:
                gate, up = (w_gate_up[e] @ x[t]).chunk(2)
                y = w_down[e] @ (F.silu(gate.float()) * up.float()).to(x.dtype)
                total = total + topk_weights[t, j] * y.float()
        parts.append(total.to(x.dtype))
    return torch.stack(parts) if parts else residual * 1.0


def check(inputs, upstream, **options):
    truth = run(in_fp64(inputs), upstream.double(), moe_mlp_ref)
    baseline = run(inputs, upstream, eager_layer)
    found = run(inputs, upstream, **options)
    for name in truth:
        actual, want, base = found[name], truth[name], baseline[name]
        if name == "dtopk_weights":  # NaN weights of other ranks' slots
            live = inputs["topk_ids"] < inputs["w_down"].shape[0]
            assert (actual[~live] == 0).all()
            actual, want, base = actual[live], want[live], base[live]
        assert_as_accurate(name, actual, want, base)
    return found


SHAPES = {  # T, H, I, E, top_k
    "one": (1, 8, 8, 2, 1),
    "tiles": (20, 32, 32, 3, 2),
    "ragged": (13, 24, 20, 5, 3),
}


def test_by_hand():
    """One feature: silu(1) = 0.7311, times up 2, times down 3, weight 0.5, for the first expert."""
    w_gate_up = torch.tensor([[[1.0], [2.0]], [[-1.0], [1.0]]])
    w_down = torch.tensor([[[3.0]], [[4.0]]])
    silu = lambda v: v / (1 + 2.718281828**-v)  # noqa: E731
    for impl in ("torch", "reference", "triton"):
        out = moe_mlp(
            torch.ones(1, 1), torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.25]]), w_gate_up,
            w_down, residual=torch.tensor([[10.0]]), impl=impl,
        )  # fmt: skip
        want = 10 + 0.5 * 3 * silu(1.0) * 2 + 0.25 * 4 * silu(-1.0)
        assert out.item() == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("ids", ["random", "one", "zipf", "outside"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("options", [{}, dict(chunk_tokens=1), dict(recompute=True)], ids=str)
def test_torch_matches_the_reference(shape, ids, options):
    check(*make(*SHAPES[shape], ids=ids), impl="torch", **options)


@pytest.mark.parametrize(
    "impl, dtype",
    [
        ("torch", torch.float32), ("torch", torch.bfloat16), ("torch", torch.float16),
        # no bf16: the interpreter truncates where a card rounds
        ("triton", torch.float32), ("triton", torch.float16),
    ],
)  # fmt: skip
def test_dtypes(impl, dtype):
    found = check(*make(9, 24, 20, 3, 2, dtype), impl=impl)
    assert found["out0"].dtype == dtype == found["dw_down"].dtype
    assert found["dtopk_weights"].dtype == torch.float32


@pytest.mark.parametrize(
    "shape, ids", [("one", "random"), ("tiles", "one"), ("ragged", "random"), ("ragged", "outside")]
)
def test_triton_matches_the_reference(shape, ids):
    check(*make(*SHAPES[shape], ids=ids), impl="triton")


@pytest.fixture(scope="module")
def saved():
    """One run that the laws below compare with."""
    inputs, upstream = make(*SHAPES["ragged"], ids="outside")
    return inputs, upstream, run(inputs, upstream, impl="triton")


def same_bits(a, b, names=None):
    for name in names or a:
        assert torch.equal(a[name].nan_to_num(7.0), b[name].nan_to_num(7.0)), name


def test_two_runs_and_recomputing_have_the_same_bits(saved):
    inputs, upstream, want = saved
    same_bits(run(inputs, upstream, impl="triton"), want)
    same_bits(run(inputs, upstream, impl="triton", recompute=True), want)


@pytest.mark.parametrize("chunk_tokens", [3, 8])
def test_the_chunk_size_changes_no_bit(saved, chunk_tokens):
    inputs, upstream, want = saved
    same_bits(run(inputs, upstream, impl="triton", chunk_tokens=chunk_tokens), want)


def test_the_tile_of_few_rows_changes_no_bit(saved, monkeypatch):
    inputs, upstream, want = saved
    assert (
        configs.DOWN_CONFIG["interpreter", 4, "many"]
        != (configs.DOWN_CONFIG["interpreter", 4, "few"])
    )
    monkeypatch.setattr(configs, "FEW_ROWS", 0)
    same_bits(run(inputs, upstream, impl="triton"), want)


def test_other_tokens_change_no_bit(saved):
    inputs, _, want = saved
    some = {k: (x if k.startswith("w_") else x[5:12]).detach() for k, x in inputs.items()}
    assert torch.equal(moe_mlp(**some, impl="triton"), want["out0"][5:12])


def test_gathering_by_copy_changes_no_bit(saved, monkeypatch):
    """Through the descriptors of the copy engine, with and without a copy of x beforehand."""
    inputs, upstream, want = saved
    for name in ("GATE_UP", "DOWN", "DX", "SWIGLU_BACKWARD", "DW_DOWN", "DW_GATE_UP"):
        table = getattr(configs, f"{name}_CONFIG")
        for rows in ("many", "few"):
            tiles = table["interpreter", 4, rows]
            monkeypatch.setitem(table, ("tma-sm90", 4, rows), tiles)
    monkeypatch.setattr(configs, "path_of", lambda *_: "tma-sm90")
    launched = []
    kernel = launch.gate_up_kernel

    class Watch:
        def __getitem__(self, grid):
            def call(*args, **options):
                launched.append((options["USE_TMA"], options["IS_GATHERED"]))
                return kernel[grid](*args, **options)

            return call

    monkeypatch.setattr(launch, "gate_up_kernel", Watch())
    for by_copy in (False, True):
        monkeypatch.setitem(configs.GATHER_BY_COPY, "tma-sm90", by_copy)
        same_bits(run(inputs, upstream, impl="triton"), want)
    assert launched == [(True, False), (True, True)]


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_are_added_to_buffers(impl, dtype):
    inputs, upstream = make(9, 16, 16, 3, 2, dtype)
    want = run(inputs, upstream, impl=impl)
    buffers = [
        torch.full_like(inputs[n], 3.0, dtype=torch.float32) for n in ("w_gate_up", "w_down")
    ]
    found = run(inputs, upstream, impl=impl, grad_buffers=tuple(buffers))
    same_bits(found, want, ["out0", "dhidden_states", "dtopk_weights", "dresidual"])
    for name, buffer in zip(("dw_gate_up", "dw_down"), buffers, strict=True):
        assert not found[name].any()  # nothing is returned
        close = dict(rtol=1e-2, atol=1e-2) if dtype == torch.bfloat16 else dict(rtol=0, atol=1e-5)
        torch.testing.assert_close(buffer - 3.0, want[name].float(), **close)


@torch.no_grad()
def test_without_gradients_buffers_of_frozen_weights_do_no_harm():
    inputs, _ = make(9, 16, 16, 3, 2, torch.float32)
    frozen = {name: x.detach() for name, x in inputs.items()}
    buffers = tuple(torch.zeros_like(frozen[name]) for name in ("w_gate_up", "w_down"))
    assert torch.equal(moe_mlp(**frozen, grad_buffers=buffers), moe_mlp(**frozen))


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_experts_without_tokens_get_zeros(impl):
    inputs, upstream = make(6, 16, 16, 4, 2, ids="one")
    found = run(inputs, upstream, impl=impl)
    for name in ("dw_gate_up", "dw_down"):
        assert not found[name][2:].any() and found[name][:2].any()


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("frozen", [["w_gate_up", "w_down"], ["w_down"], ["hidden_states"]])
def test_frozen_tensors_cost_nothing(impl, frozen, monkeypatch):
    inputs, upstream = make(6, 16, 16, 3, 2)
    want = run(inputs, upstream, impl=impl)
    for name in frozen:
        inputs[name].requires_grad_(False)
    made = []
    for module, name in ((moe.eager, "_add_weight_gradient"), (launch, "weight_gradient")):
        original = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *a, f=original, **k: (made.append(1), f(*a, **k))[1]
        )
    found = run(inputs, upstream, impl=impl)
    same_bits(found, want, [n for n in want if n.removeprefix("d") not in frozen])
    assert not any(f"d{name}" in found for name in frozen)
    assert len(made) == sum(name not in frozen for name in ("w_gate_up", "w_down"))


@pytest.mark.parametrize("impl", ["torch", "triton", "reference"])
def test_no_token(impl):
    inputs, upstream = make(0, 8, 8, 3, 2)
    found = run(inputs, upstream, impl=impl)
    assert found["out0"].shape == (0, 8) and found["dhidden_states"].shape == (0, 8)
    assert found["dw_gate_up"].shape == (3, 16, 8) and not found["dw_gate_up"].any()


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_nothing_is_saved_without_a_gradient(impl, monkeypatch):
    inputs, _ = make(4, 8, 8, 3, 2)
    seen = []
    original = torch.ops.qlkernels.moe_mlp.default
    with torch.no_grad():
        out = moe_mlp(**inputs, impl=impl)
        _, h, *_ = original(*list(inputs.values()), None, None, None, False, impl)
    assert h.shape == (0, 16) and not out.requires_grad and not seen


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_nan_of_a_token_stays_in_its_row(impl):
    inputs, _ = make(8, 16, 16, 3, 2)
    inputs = {k: x.detach() for k, x in inputs.items()}
    want = moe_mlp(**inputs, impl=impl)
    inputs["hidden_states"][3] = torch.nan
    found = moe_mlp(**inputs, impl=impl)
    assert found[3].isnan().all()
    keep = torch.arange(8) != 3
    assert torch.equal(found[keep], want[keep])


def test_strided_rows_and_int64_ids():
    inputs, upstream = make(7, 16, 16, 3, 2)
    want = run(inputs, upstream, impl="triton")
    wide = torch.randn(7, 40)
    wide[:, 8:24] = inputs["hidden_states"].detach()
    ids = inputs["topk_ids"].long().repeat(1, 2)[:, :2]
    other = inputs | dict(hidden_states=wide[:, 8:24], topk_ids=ids)
    for impl in ("triton", "torch"):
        out = moe_mlp(**other, impl=impl)
        torch.testing.assert_close(out, want["out0"], rtol=1e-5, atol=1e-5)


def test_autocast_casts_both_operands():
    inputs, _ = make(5, 16, 16, 3, 2)
    with torch.autocast("cpu", torch.bfloat16):
        out = moe_mlp(**inputs)
    halves = {k: x.bfloat16() if k.startswith(("w_", "h", "res")) else x for k, x in inputs.items()}
    assert out.dtype == torch.bfloat16 and torch.equal(out, moe_mlp(**halves))


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_opcheck(impl):
    inputs, upstream = make(3, 8, 8, 2, 1)
    arguments = (*inputs.values(), None, None, None, True, impl)
    torch.library.opcheck(torch.ops.qlkernels.moe_mlp.default, arguments)
    found = torch.ops.qlkernels.moe_mlp(*arguments)
    operands = [x.detach() for x in list(inputs.values())[:5]]
    saved = [t.detach() for t in found[1:]]
    backward = (upstream, *operands, saved, None, impl, [True, True, True])
    torch.library.opcheck(torch.ops.qlkernels.moe_mlp_bwd.default, backward)
    buffers = [torch.zeros_like(w) for w in operands[3:]]
    into = (upstream, *operands, saved, *buffers, None, impl, [True, True, True])
    torch.library.opcheck(torch.ops.qlkernels.moe_mlp_bwd_into.default, into)


def test_compiles_to_one_graph():
    inputs, upstream = make(6, 16, 16, 3, 2)
    compiled = torch.compile(moe_mlp, fullgraph=True, backend="aot_eager")
    same_bits(run(inputs, upstream, compiled), run(inputs, upstream))


def test_double_backward_is_refused():
    inputs, upstream = make(3, 8, 8, 2, 1)
    out = moe_mlp(**inputs)
    (dx,) = torch.autograd.grad(out, inputs["hidden_states"], upstream, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        dx.sum().backward()


def test_chunks():
    assert chunks_of(10, 4) == [(0, 4), (4, 8), (8, 10)]
    assert chunks_of(9, 5) == [(0, 5), (5, 9)] and chunks_of(3, 99) == [(0, 3)]
    assert chunks_of(0, 4) == []


WRONG = {
    "hidden_states must be [T, H]": dict(hidden_states=torch.zeros(4)),
    "hidden_states must be bfloat16": dict(hidden_states=torch.zeros(4, 8).double()),
    "last dim of hidden_states": dict(hidden_states=torch.zeros(8, 4).T),
    "topk_ids is [T, top_k] = (3, 2), but T = 4": dict(topk_ids=torch.zeros(3, 2).int()),
    "topk_ids must be int32": dict(topk_ids=torch.zeros(4, 2)),
    "topk_weights is [T, top_k] = (4, 1), but top_k = 2": dict(topk_weights=torch.zeros(4, 1)),
    "w_down is [E, H, I] = (3, 9, 6), but H = 8": dict(w_down=torch.zeros(3, 9, 6)),
    "w_gate_up must be [E, 2 * I, H] = (3, 12, 8)": dict(w_gate_up=torch.zeros(3, 8, 12)),
    "w_gate_up must be contiguous": dict(w_gate_up=torch.zeros(3, 8, 12).transpose(1, 2)),
    "w_down must be float32, got bfloat16": dict(w_down=torch.zeros(3, 8, 6).bfloat16()),
    "residual is [T, H] = (4, 7)": dict(residual=torch.zeros(4, 7)),
    "nothing to multiply": dict(w_down=torch.zeros(0, 8, 6), w_gate_up=torch.zeros(0, 12, 8)),
    "chunk_tokens must be at least 1": dict(chunk_tokens=0),
    "grad_buffers must be (dw_gate_up, dw_down)": dict(grad_buffers=(torch.zeros(1),)),
    "dw_gate_up must be contiguous (3, 12, 8)": dict(grad_buffers=(torch.zeros(1),) * 2),
    "w_gate_up does not require a gradient, so the backward would add nothing to dw_gate_up": dict(
        grad_buffers=(torch.zeros(3, 12, 8), torch.zeros(3, 8, 6))
    ),
    "w_down does not require a gradient, so the backward would add nothing to dw_down": dict(
        grad_buffers=(torch.zeros(3, 12, 8), torch.zeros(3, 8, 6)),
        w_gate_up=torch.zeros(3, 12, 8, requires_grad=True),
    ),
    "unknown impl 'cuda'": dict(impl="cuda"),
}


@pytest.mark.parametrize("message", WRONG)
def test_errors_say_what_is_wrong(message):
    right = dict(
        hidden_states=torch.zeros(4, 8), topk_ids=torch.zeros(4, 2).int(),
        topk_weights=torch.zeros(4, 2), w_gate_up=torch.zeros(3, 12, 8),
        w_down=torch.zeros(3, 8, 6),
    )  # fmt: skip
    assert not moe_mlp(**right).any()
    with pytest.raises((ValueError, TypeError)) as caught:
        moe_mlp(**right | WRONG[message])
    assert message in str(caught.value) and str(caught.value).startswith("moe_mlp: ")


# --- on a card -----------------------------------------------------------------------

QWEN3 = (2048, 768, 128, 8)  # H, I, E, top_k of Qwen3-30B-A3B


def rows_of(inputs, rows):
    """The arguments without all tokens but some."""
    return {k: x.detach() if k.startswith("w_") else x.detach()[rows] for k, x in inputs.items()}


def some_rows(T, device="cuda"):
    """Both ends, and whatever lies either side of 2**31 values of the routed rows."""
    edge = 2**31 // (8 * 2048)
    at = [0, 1, T // 3, edge - 1, edge, edge + 1, T - 2, T - 1]
    return torch.tensor(sorted({t for t in at if 0 <= t < T}), device=device)


GPU_CASES = {  # T, H, I, E, top_k
    "whole tiles": ((300, 256, 128, 8, 2), torch.bfloat16, ["random", "one", "zipf", "outside"]),
    "ragged tiles": ((70, 200, 104, 5, 3), torch.bfloat16, ["outside"]),
    "rows that start anywhere": ((33, 100, 36, 3, 2), torch.bfloat16, ["random"]),
    "one token": ((1, 64, 64, 4, 2), torch.bfloat16, ["random"]),
    "fp16": ((300, 256, 128, 8, 2), torch.float16, ["random"]),
    "fp32": ((70, 200, 104, 5, 3), torch.float32, ["zipf"]),
}


@pytest.mark.parametrize("gather_left", [False, True])
@pytest.mark.parametrize(
    "size, first, stride, stages",
    [(48, 0, 48, 7), (40, 0, 48, 6), (48, 0, 56, 6), (48, 4, 64, 6)],
    ids=["16 apart", "a short row", "8 apart", "a start between"],
)
def test_stages_of_a_weight_gradient_on_sm_90(
    size, first, stride, stages, gather_left, monkeypatch
):
    """One less where Triton cannot tell that the gathered rows are 16 elements apart."""
    launched = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *_, num_stages, **__: launched.append(num_stages)

    monkeypatch.setattr(configs, "path_of", lambda *_: "tma-sm90")
    monkeypatch.setattr(launch, "weight_gradient_kernel", Kernel())
    monkeypatch.setattr(launch, "bounded_descriptor", lambda x, _block: x)
    order = torch.arange(4, dtype=torch.int32)
    routed = launch.RoutedRows(order[:, None], order, order, torch.tensor([0, 4]))
    memory = torch.empty(4 * stride + first, dtype=torch.bfloat16)  # allocated on 64 bytes
    gathered = memory.as_strided((4, size), (stride, 1), first)
    others = torch.empty(4, 32, dtype=torch.bfloat16)
    left, right = (gathered, others) if gather_left else (others, gathered)
    out = torch.empty(1, left.shape[1], right.shape[1])
    launch.weight_gradient(left, right, routed, out, gather_left=gather_left, accumulate=False)
    assert launched == [stages]


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case, ids", [(name, ids) for name, (*_, kinds) in GPU_CASES.items() for ids in kinds]
)
def test_gpu_matches_the_reference(case, ids):
    shape, dtype, _ = GPU_CASES[case]
    inputs, upstream = make(*shape, dtype, ids=ids, device="cuda")
    for options in (dict(impl="triton"), dict(impl="torch"), dict(impl="triton", recompute=True)):
        check(inputs, upstream, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("ids", ["random", "one", "zipf"])
@pytest.mark.parametrize("T", [1, 255, 4096])
def test_gpu_qwen3_layer(T, ids):
    """Against the torch implementation, which the test above compares with fp64."""
    inputs, upstream = make(T, *QWEN3, torch.bfloat16, ids=ids, device="cuda")
    found, want = (run(inputs, upstream, impl=impl) for impl in ("triton", "torch"))
    for name in want:
        scale = want[name].float().abs().max()
        torch.testing.assert_close(
            found[name].float(), want[name].float(), rtol=0, atol=0.02 * float(scale), msg=name
        )


@pytest.mark.gpu
@pytest.mark.parametrize("T", [40, 2000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gpu_gradients_are_added_to_buffers(dtype, T):
    """The sum is taken in fp32 and rounded once, so the bits are known."""
    inputs, upstream = make(T, *QWEN3, torch.bfloat16, ids="zipf", device="cuda")
    weights = ("w_gate_up", "w_down")
    fresh = [torch.zeros_like(inputs[n], dtype=torch.float32) for n in weights]
    run(inputs, upstream, impl="triton", grad_buffers=tuple(fresh))
    want = run(inputs, upstream, impl="triton")
    for name, buffer in zip(weights, fresh, strict=True):
        assert torch.equal(buffer.bfloat16(), want[f"d{name}"])
    before = [torch.randn_like(inputs[n]).to(dtype) for n in weights]
    buffers = [b.clone() for b in before]
    run(inputs, upstream, impl="triton", grad_buffers=tuple(buffers))
    for buffer, old, new in zip(buffers, before, fresh, strict=True):
        assert torch.equal(buffer, (old.float() + new).to(dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("ids", ["random", "zipf", "outside"])
def test_gpu_bits(ids, monkeypatch):
    """Two runs, recomputing, any chunk, the tiles of few rows, other tokens."""
    inputs, upstream = make(3000, *QWEN3, torch.bfloat16, ids=ids, device="cuda")
    want = run(inputs, upstream, impl="triton")
    same_bits(run(inputs, upstream, impl="triton"), want)
    same_bits(run(inputs, upstream, impl="triton", recompute=True), want)
    for chunk_tokens in (100, 1111):
        same_bits(run(inputs, upstream, impl="triton", chunk_tokens=chunk_tokens), want)
    some = moe_mlp(**rows_of(inputs, slice(700, 733)), impl="triton")
    assert torch.equal(some, want["out0"][700:733])
    for few_rows in (0, 10**6):
        monkeypatch.setattr(configs, "FEW_ROWS", few_rows)
        same_bits(run(inputs, upstream, impl="triton"), want)
    monkeypatch.setitem(configs.GATHER_BY_COPY, "tma-sm90", True)
    same_bits(run(inputs, upstream, impl="triton"), want)


@pytest.mark.gpu
@pytest.mark.large
@pytest.mark.parametrize("T", [131_072, 270_000])
def test_gpu_offsets_past_two_to_the_31(T):
    """Routed rows times H pass 2**31 at T = 131,072; some tokens must equal the same tokens alone.

    Their dx too: it does not depend on the others, and the gradients of the weights are those of
    the same rows by the torch implementation where everything else has no upstream.
    """
    inputs, _ = make(T, *QWEN3, torch.bfloat16, device="cuda")
    rows = some_rows(T)
    upstream = torch.zeros(T, 2048, device="cuda")
    upstream[rows] = torch.randn(len(rows), 2048, device="cuda")
    found = run(inputs, upstream.bfloat16(), impl="triton", recompute=T > 200_000)
    small = rows_of(inputs, rows)
    for name in NAMES:
        small[name].requires_grad_()
    want = run(small, upstream[rows], impl="triton")
    for name in ("out0", "dhidden_states", "dtopk_weights"):
        assert torch.equal(found[name][rows], want[name]), name
    for name in ("dw_gate_up", "dw_down"):
        scale = float(want[name].float().abs().max())
        torch.testing.assert_close(found[name], want[name], rtol=0, atol=1e-2 * scale, msg=name)
    untouched = torch.ones(T, dtype=torch.bool, device="cuda").index_fill_(0, rows, False)
    assert not found["dhidden_states"][untouched].any()


@pytest.mark.gpu
@pytest.mark.parametrize("T", [1, 256, 3000])
def test_gpu_graph_replay(T):
    inputs, upstream = make(T, *QWEN3, torch.bfloat16, device="cuda")
    leaves = {k: x.detach().requires_grad_(k in NAMES[:4]) for k, x in inputs.items()}
    upstream = upstream.bfloat16()

    def step():
        out = moe_mlp(**leaves, impl="triton")
        return out, *torch.autograd.grad(out, [leaves[n] for n in NAMES[:4]], upstream)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    other, _ = make(T, *QWEN3, torch.bfloat16, seed=5, ids="zipf", device="cuda")
    with torch.no_grad():  # new tokens and another routing into the same memory
        for name in ("hidden_states", "topk_ids", "topk_weights"):
            leaves[name].copy_(other[name])
    graph.replay()
    for found, want in zip(captured, step(), strict=True):
        assert torch.equal(found, want)


@pytest.mark.gpu
@pytest.mark.large
def test_gpu_memory():
    """At T = 32,768: 3.0 GB beside inputs, weights, out and dx; the weights' gradients count."""
    inputs, upstream = make(32_768, *QWEN3, torch.bfloat16, device="cuda")
    leaves = [inputs[n] for n in NAMES[:4]]
    del inputs["residual"]
    upstream = upstream.bfloat16()

    def step():
        out = moe_mlp(**inputs, impl="triton")
        return out, *torch.autograd.grad(out, leaves, upstream)

    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = step()
    extra = torch.cuda.max_memory_allocated() - before
    extra -= sum(x.nbytes for x in kept[:2])
    assert extra <= 3.0e9, f"{extra / 1e9:.2f} GB"
