"""Groups, operands and the comparisons that the tests of attention share."""

from functools import partial

import pytest
import torch

from qlkernels import attention, pack_groups, prefix_attention
from qlkernels.attention import attention_ref, backends, prefix_attention_ref
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


def cuda_or_skip(backend, dtype, D):
    """For a test that needs a backend on a card: another machine, or a card or package without it,
    proves nothing about it.
    """
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    why = backends.why_not(backend, "cuda", dtype, D)
    if why is not None:
        pytest.skip(f"{backend}: {why}")
