"""The native kernels of ``qlkernels._C``: values, gradients, and what must not happen."""

import math
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch

from qlkernels import _ext
from qlkernels.testing import AWKWARD_TV, assert_as_accurate, peaked_logits

ROOT = Path(__file__).resolve().parents[2]
INF = math.inf
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
NAMES = ("logprobs", "entropy", "lse", "dlogits")
PLAIN = {"row_mask": None, "temperature": 1.0, "softcap": None, "logit_scale": 1.0}
# Either side of a vector, of a block on the CPU (2048), and of a block's loads on CUDA (8192)
SHAPES = [*AWKWARD_TV, (3, 15), (2, 2047), (2, 2048), (2, 2049), (2, 8191), (2, 8201)]


def available_isas() -> list[str]:
    if _ext._C is None:
        return []
    before, found = _ext._C.cpu_isa(), []
    for name in ("baseline", "avx2", "avx512"):
        try:
            _ext._C.set_cpu_isa(name)
        except ValueError:
            continue
        found.append(name)
    _ext._C.set_cpu_isa(before)
    return found


ISAS = available_isas()


def test_extension_is_built_where_a_compiler_is():
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("no C++ compiler")
    assert _ext._C is not None, _ext.missing_reason


@pytest.fixture(autouse=True)
def _same_isa_afterwards():
    if _ext._C is None:
        yield
        return
    before = _ext._C.cpu_isa()
    yield
    _ext._C.set_cpu_isa(before)


def reference(logits, target_ids, row_mask=None, temperature=1.0, softcap=None, logit_scale=1.0):
    """(logprobs, entropy, lse), differentiable, in the dtype of ``logits``."""
    keep = torch.ones_like(target_ids, dtype=torch.bool) if row_mask is None else row_mask
    z = logit_scale * torch.where(keep[:, None], logits, 0.0)
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    tau = temperature[:, None].to(z) if isinstance(temperature, torch.Tensor) else temperature
    logp = (z / tau).log_softmax(-1)  # [T, V]
    entropy = -(logp.exp() * logp.masked_fill(logp == -INF, 0.0)).sum(-1)
    logprobs = logp.gather(1, target_ids[:, None]).squeeze(1)
    lse = (z / tau).logsumexp(-1)
    return tuple(torch.where(keep, x, 0.0) for x in (logprobs, entropy, lse))


def reference_with_gradient(logits, target_ids, upstream, dtype, **options):
    leaf = logits.detach().to(dtype).requires_grad_()
    options = {k: x.to(dtype) if k == "temperature" and torch.is_tensor(x) else x
               for k, x in options.items()}  # fmt: skip
    outputs = reference(leaf, target_ids, **options)
    pairs = [(x, g) for x, g in zip(outputs, upstream, strict=True) if g is not None]
    sum((x * g.to(dtype)).sum() for x, g in pairs).backward()
    return *outputs, leaf.grad.to(logits.dtype if dtype == torch.float32 else dtype)


def native(logits, target_ids, upstream, *, out=None, **options):
    """(logprobs, entropy, lse, dlogits) by the extension, on the device of ``logits``."""
    device = logits.device
    if device.type == "cuda":
        assert _ext.why_not_cuda(logits) is None, _ext.why_not_cuda(logits)
    arguments = {k: x.to(device) if torch.is_tensor(x) else x for k, x in options.items()}
    arguments = PLAIN | arguments
    target_ids = target_ids.to(device)
    scores = _ext.logprob_entropy_fwd(logits, target_ids, **arguments)
    out = torch.empty_like(logits) if out is None else out
    upstream = [None if g is None else g.to(device) for g in upstream]
    _ext.logprob_entropy_bwd(logits, target_ids, *arguments.values(), *scores[1:], *upstream, out)
    return *scores, out


def check(logits, target_ids, upstream, *, device="cpu", out=None, **options):
    """Native against fp64, allowed what the fp32 reference errs; returns the native results."""
    truth = reference_with_gradient(logits, target_ids, upstream, torch.float64, **options)
    baseline = reference_with_gradient(logits, target_ids, upstream, torch.float32, **options)
    # .to() would copy strided rows into dense ones
    moved = logits if device == "cpu" else strided_like(logits, device)
    actual = native(moved, target_ids, upstream, out=out, **options)
    for name, *values in zip(NAMES, actual, truth, baseline, strict=True):
        assert_as_accurate(name, *values)
    return actual


def strided_like(x, device):
    """A copy of ``x`` on ``device`` with its strides and offset."""
    size = x.storage_offset() + (x.shape[0] - 1) * x.stride(0) + x.shape[1] if x.numel() else 0
    memory = torch.full((size,), math.nan, dtype=x.dtype, device=device)
    return memory.as_strided(x.shape, x.stride(), x.storage_offset()).copy_(x)


def make(T, V, dtype=torch.float32, scale=4.0, seed=0):
    generator = torch.Generator().manual_seed(seed + 1009 * T + V)
    logits = (scale * torch.randn(T, V, generator=generator)).to(dtype)
    target_ids = torch.randint(V, (T,), generator=generator)
    upstream = [torch.randn(T, generator=generator) for _ in range(3)]
    return logits, target_ids, upstream


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T, V", SHAPES)
def test_matches_reference(T, V, dtype, device):
    check(*make(T, V, dtype), device=device)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set_matches_reference(dtype, softcap, isa):
    _ext._C.set_cpu_isa(isa)
    assert _ext._C.cpu_isa() == isa
    for T, V in [(1, 1), (3, 37), (5, 129), (2, 4097)]:
        check(*make(T, V, dtype), softcap=softcap)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("logit_scale", [1.0, 0.3])
@pytest.mark.parametrize("softcap", [None, 2.0, 30.0])
@pytest.mark.parametrize("temperature", [0.6, 1.7, "rows"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_temperature_softcap_and_scale(dtype, temperature, softcap, logit_scale, device):
    logits, target_ids, upstream = make(7, 515, dtype, scale=9.0)
    tau = torch.linspace(0.4, 2.0, 7) if temperature == "rows" else temperature
    options = {"temperature": tau, "softcap": softcap, "logit_scale": logit_scale}
    check(logits, target_ids, upstream, device=device, **options)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_uniform_logits_give_log_v(dtype, device):
    logits = torch.full((2, 4096), 3.0, dtype=dtype, device=device)
    upstream = [torch.tensor([1.0, 0.0]), torch.zeros(2), torch.tensor([0.0, 1.0])]
    logprobs, entropy, lse, dlogits = native(logits, torch.tensor([0, 9]), upstream)
    for actual, expected in [(logprobs, -math.log(4096)), (entropy, math.log(4096)),
                             (lse, 3 + math.log(4096))]:  # fmt: skip
        torch.testing.assert_close(actual.cpu(), torch.full((2,), expected), rtol=3e-7, atol=0.0)
    # [i = y] - p with p = 2^-12, and p alone
    expected = torch.full((2, 4096), 2.0**-12)
    expected[0] = -expected[0]
    expected[0, 0] += 1.0
    torch.testing.assert_close(dlogits.cpu(), expected.to(dtype), rtol=2e-6, atol=0.0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("first, gap", [(0, 3), (1, 7), (3, 0), (8, 8)])
def test_strided_rows(first, gap, dtype, device):
    """Rows off any boundary, the gradient's rows off another; nothing beside them changes."""
    T, V = 4, 4099
    logits, target_ids, upstream = make(T, V, dtype)
    memory = torch.full((T, first + V + gap), math.nan, dtype=dtype)
    memory[:, first : first + V] = logits
    rows = memory[:, first : first + V]
    for offset in (first, first + 5):
        around = torch.full((T, V + 16), 7.0, dtype=dtype, device=device)
        out = around[:, offset : offset + V]
        check(rows, target_ids, upstream, device=device, out=out)
        assert (around[:, :offset] == 7.0).all() and (around[:, offset + V :] == 7.0).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_rows_are_never_read(dtype, device):
    logits, target_ids, upstream = make(6, 131, dtype)
    row_mask = torch.tensor([True, False, True, False, False, True])
    logits[~row_mask] = math.nan
    target_ids[1] = -100
    tau = torch.tensor([1.0, math.nan, 1.0, 0.0, 1.0, 0.7])
    upstream[0][3] = math.nan
    clean = [t.clone() for t in (target_ids, tau, upstream[0])]
    clean[0][1], clean[1][[1, 3]], clean[2][3] = 0, 1.0, 0.0
    options = {"row_mask": row_mask, "temperature": clean[1]}
    expected = check(logits, clean[0], [clean[2], *upstream[1:]], device=device, **options)
    options["temperature"] = tau
    actual = native(logits.to(device), target_ids, upstream, **options)
    for name, x, y in zip(NAMES, actual, expected, strict=True):
        assert torch.equal(x, y), name
        assert (x[~row_mask.to(device)] == 0).all(), name


@pytest.mark.parametrize("device", DEVICES)
def test_rows_without_upstream_become_zero_unread(device):
    logits, target_ids, upstream = make(4, 1001)
    scores = _ext.logprob_entropy_fwd(
        logits.to(device), target_ids.to(device), None, 1.0, None, 1.0
    )
    logits[1:3] = math.nan
    for g in upstream:
        g[1:3] = torch.tensor([0.0, -0.0])
    moved = [x.to(device) for x in (logits, target_ids, *upstream)]
    out = torch.full((4, 1001), math.nan, device=device)
    arguments = (*moved[:2], None, 1.0, None, 1.0, *scores[1:])
    _ext.logprob_entropy_bwd(*arguments, *moved[2:], out)
    assert (out[1:3] == 0).all() and out.isfinite().all() and (out[[0, 3]] != 0).any()
    _ext.logprob_entropy_bwd(*arguments, None, None, None, out)
    assert (out == 0).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_upstream_alone(dtype, which, device):
    logits, target_ids, upstream = make(5, 333, dtype)
    alone = [g if i == which else None for i, g in enumerate(upstream)]
    check(logits, target_ids, alone, device=device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_minus_infinity_has_no_mass(dtype, device):
    logits, target_ids, upstream = make(5, 3001, dtype)
    logits[:, ::3] = -INF
    logits[1, :2500] = -INF
    logits[2] = -INF
    logits[2, 17] = 1.0  # one candidate: probability 1
    target_ids[:] = torch.tensor([1, 2501, 17, 0, 3])  # the last two are impossible
    for g in upstream[1:]:
        g[3:] = 0.0
    *scores, dlogits = native(logits.to(device), target_ids, upstream)
    assert scores[0][2] == 0 and scores[1][2] == 0 and (scores[0][3:] == -INF).all()
    check(logits, target_ids, upstream, device=device)
    dead = logits.to(device) == -INF
    dead[torch.arange(5), target_ids] = False
    assert (dlogits[dead] == 0).all()


@pytest.mark.parametrize("device", DEVICES)
def test_rows_of_one_huge_negative_value_are_uniform(device):
    lowest = torch.finfo(torch.float32).min  # a common mask value, where -inf - -inf would be NaN
    logits = torch.full((1, 3000), lowest)
    _, entropy, lse, dlogits = native(
        logits.to(device), torch.tensor([5]), [torch.ones(1), None, None]
    )
    assert entropy.item() == pytest.approx(math.log(3000), rel=1e-6)
    assert lse.item() == pytest.approx(lowest)
    assert dlogits[0, 4].item() == pytest.approx(-1 / 3000, rel=1e-5)
    assert dlogits[0, 5].item() == pytest.approx(2999 / 3000, rel=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_infinite_rows(dtype, device):
    """NaN anywhere, +inf, or nothing but -inf: no score exists. Other rows do not notice."""
    logits, target_ids, upstream = make(6, 2500, dtype)
    bits = logits.view(torch.int32 if dtype == torch.float32 else torch.int16)
    bits[0, 2499] = -1  # NaN with every bit set
    logits[1] = -INF
    logits[1, 3] = math.nan
    logits[2, 2100] = INF
    logits[3] = -INF
    logprobs, entropy, lse, dlogits = native(logits.to(device), target_ids, upstream)
    for scores in (logprobs, entropy):
        assert scores.isnan().tolist() == [True] * 4 + [False] * 2
    assert lse[:3].isnan().all() and lse[3] == -INF
    assert dlogits[:4].isnan().all()
    rows = [x[4:] for x in (logits, target_ids)]
    expected = check(*rows, [g[4:] for g in upstream], device=device)
    for x, y in zip((logprobs, entropy, lse, dlogits), expected, strict=True):
        assert torch.equal(x[4:], y)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("shift", [1000.0, -1000.0])
def test_shift_by_a_constant(shift, temperature, device):
    logits, target_ids, upstream = make(5, 700)
    logits = (logits * 64).round() / 64 + shift  # exact in fp32
    actual = check(logits, target_ids, upstream, device=device, temperature=temperature)
    plain = native((logits - shift).to(device), target_ids, upstream, temperature=temperature)
    for name, i in [("logprobs", 0), ("entropy", 1), ("dlogits", 3)]:
        torch.testing.assert_close(
            actual[i], plain[i], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("data", ["random", "peaked"])
def test_real_vocabulary(data, dtype, device):
    logits, target_ids, upstream = make(3, 151_936, dtype)
    if data == "peaked":
        logits, target_ids = peaked_logits(3, 151_936, dtype)
    check(logits, target_ids, upstream, device=device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("margin", [12.0, 20.0, 40.0, 100.0])
def test_certain_target_keeps_its_digits(margin, device):
    """p_y -> 1: the target's gradient is (V - 1) e^-margin to fp32 precision, not 1 - rounded p."""
    V = 1000
    logits = torch.zeros(1, V)
    logits[0, 400] = margin
    rest = (V - 1) * math.exp(-margin) / (1 + (V - 1) * math.exp(-margin))
    upstream = [torch.ones(1), torch.zeros(1), torch.zeros(1)]
    *_, dlogits = native(logits.to(device), torch.tensor([400]), upstream)
    assert dlogits[0, 400].item() == pytest.approx(rest, rel=2e-5, abs=1e-37)
    assert dlogits.sum().item() == pytest.approx(0.0, abs=2e-5 * rest + 1e-37)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_gradients_are_the_fp32_ones_rounded_once(dtype, device):
    """Round to nearest even, with subnormals, overflow and both infinities."""
    logits, target_ids, upstream = make(40, 999, dtype, scale=6.0)
    factor = torch.logspace(-9, 9, 40)
    logits, target_ids, *upstream = (
        x.to(device) for x in (logits, target_ids, *(g * factor for g in upstream))
    )
    scores = _ext.logprob_entropy_fwd(logits, target_ids, None, 1.0, None, 1.0)
    narrow, wide = torch.empty_like(logits), torch.empty_like(logits, dtype=torch.float32)
    for x, out in ((logits, narrow), (logits.float(), wide)):
        _ext.logprob_entropy_bwd(x, target_ids, None, 1.0, None, 1.0, *scores[1:], *upstream, out)
    # a target's entry may hold a sum over its row, whose order differs on CUDA
    others = torch.ones_like(narrow, dtype=torch.bool).scatter_(1, target_ids[:, None], False)
    assert torch.equal(narrow[others], wide.to(dtype)[others])
    torch.testing.assert_close(narrow, wide.to(dtype))
    assert narrow.isinf().any() == (dtype == torch.float16)
    tiny = torch.finfo(dtype).tiny
    assert ((narrow != 0) & (narrow.abs() < tiny)).any() == (dtype == torch.float16)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_16_bit_pattern_is_read_right(dtype, device):
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    patterns = patterns[patterns.isfinite()]
    logits = patterns[:, None].to(device)  # one column: lse is the logit
    lse = _ext.logprob_entropy_fwd(
        logits, torch.zeros(len(patterns), dtype=torch.int64, device=device), None, 1.0, None, 1.0
    )[2]
    torch.testing.assert_close(lse.cpu(), patterns.float(), rtol=2e-7, atol=1e-45)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("softcap", [None, 10.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shift", [0.0, 100.0])  # 100: fp32 rows are read a second time
def test_in_place(shift, dtype, softcap, device):
    logits, target_ids, upstream = make(5, 8211, dtype)
    logits = (logits + shift).to(device)
    expected = native(logits, target_ids, upstream, softcap=softcap)[-1]
    actual = native(logits, target_ids, upstream, softcap=softcap, out=logits)[-1]
    assert actual is logits and torch.equal(actual, expected)


def test_number_of_threads_changes_no_bit():
    logits, target_ids, upstream = make(70, 5003, torch.bfloat16)
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 2, 5):
            torch.set_num_threads(threads)
            runs.append(native(logits, target_ids, upstream))
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(x, y) for x, y in zip(runs[0], run, strict=True))


@pytest.mark.gpu
def test_two_runs_give_the_same_bits_on_cuda():
    logits, target_ids, upstream = make(70, 50_003, torch.bfloat16)
    runs = [native(logits.cuda(), target_ids, upstream) for _ in range(2)]
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))


def test_instruction_sets_agree():
    logits, target_ids, upstream = make(4, 20_011)
    runs = []
    for isa in ISAS:
        _ext._C.set_cpu_isa(isa)
        runs.append(native(logits, target_ids, upstream, softcap=20.0))
    for run in runs[1:]:
        for x, y in zip(runs[0], run, strict=True):
            torch.testing.assert_close(x, y, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_target_outside_the_vocabulary_gives_nan_in_its_row(device):
    logits, target_ids, upstream = make(4, 100)
    expected = check(logits, target_ids, upstream, device=device)
    target_ids[1], target_ids[2] = -1, 100
    actual = native(logits.to(device), target_ids, upstream)
    bad = torch.tensor([False, True, True, False])
    assert torch.equal(actual[0].isnan().cpu(), bad)
    assert torch.equal(actual[3].isnan().all(1).cpu(), bad)
    for x, y in zip(actual, expected, strict=True):
        assert torch.equal(x[~bad.to(device)], y[~bad.to(device)])


@pytest.mark.parametrize("device", DEVICES)
def test_arguments_of_any_layout(device):
    """Upstream gradients arrive expanded, temperatures in fp64, targets as a strided view."""
    logits, target_ids, _ = make(6, 77)
    spread = torch.stack([target_ids, target_ids * 0], 1)[:, 0]
    tau = torch.linspace(0.5, 1.5, 6, dtype=torch.float64)
    ones = torch.ones(1)
    strided = native(logits.to(device), spread, [ones.expand(6), ones.double().expand(6), None],
                     temperature=tau)  # fmt: skip
    dense = native(logits.to(device), target_ids, [torch.ones(6), torch.ones(6), None],
                   temperature=tau.float())  # fmt: skip
    assert all(torch.equal(x, y) for x, y in zip(strided, dense, strict=True))


def test_rows_beyond_2_31_elements():
    """Row 1 starts past 2^31 elements. The pages between the rows are never touched."""
    V, stride = 1000, 2**31 + 24
    memory = torch.from_numpy(np.empty(stride + V, dtype=np.int16)).view(torch.bfloat16)
    rows = memory.as_strided((2, V), (stride, 1))
    logits, target_ids, upstream = make(2, V, torch.bfloat16)
    expected = native(logits, target_ids, upstream)
    rows.copy_(logits)
    actual = native(rows, target_ids, upstream, out=rows)
    assert all(torch.equal(x, y) for x, y in zip(actual, expected, strict=True))


@pytest.mark.gpu
@pytest.mark.large
def test_more_than_2_31_logits_on_cuda():
    T, V = 14_200, 151_936
    assert T * V > 2**31
    generator = torch.Generator("cuda").manual_seed(0)
    logits = torch.empty(T, V, dtype=torch.bfloat16, device="cuda")
    for rows in logits.split(1024):
        rows.copy_(4 * torch.randn(rows.shape, generator=generator, device="cuda"))
    target_ids = torch.randint(V, (T,), generator=generator, device="cuda")
    upstream = [torch.randn(T, generator=generator, device="cuda") for _ in range(3)]
    some = torch.tensor([0, 1, 14_133, 14_134, 14_135, 14_136, T - 1], device="cuda")
    picked = logits[some].cpu(), target_ids[some].cpu(), [g[some].cpu() for g in upstream]
    truth = reference_with_gradient(*picked, torch.float64)
    baseline = reference_with_gradient(*picked, torch.float32)
    actual = native(logits, target_ids, upstream, out=logits)
    for name, x, *others in zip(NAMES, actual, truth, baseline, strict=True):
        assert_as_accurate(name, x[some], *others)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="mmx"):
        _ext._C.set_cpu_isa("mmx")
    shape = (2, 8, 8)
    for bad, sentence in [((7, *shape, 0, 0, 0, 1.0, 0.0, 1.0), "dtype_code"),
                          ((0, *shape, 0, 0, 0, 1.0, 0.0, 0.0), "logit_scale"),
                          ((0, 2, 2**31, 8, 0, 0, 0, 1.0, 0.0, 1.0), "V must be")]:  # fmt: skip
        with pytest.raises(ValueError, match=sentence):
            _ext._C.logprob_entropy_fwd_cpu(0, *bad, 0, 0, 0, 1)


def test_a_launch_error_has_name_and_text():
    if not _ext._C.has_cuda:
        pytest.skip("built without CUDA (no nvcc)")
    if torch.cuda.is_available():
        pytest.skip("a launch works here")
    with pytest.raises(RuntimeError, match=r"cudaError\w+: \w+"):
        _ext._C.logprob_entropy_fwd_cuda(0, 2, 5, 8, 8, 0, 0, 0, 1.0, 0.0, 1.0, 0, 0, 0, 0)


def test_reasons():
    x = torch.zeros(1)
    assert _ext.why_not_cpu(x) is None
    assert "CPU tensors" in _ext.why_not_cpu(x.to("meta"))
    expected = "needs tensors on a CUDA device" if _ext._C.has_cuda else "built without CUDA"
    assert expected in _ext.why_not_cuda(x)


# --- the build ---------------------------------------------------------------

REGISTERS = 64  # four blocks of 256 threads on a multiprocessor
RING_REGISTERS = 112  # one block of 576 threads
ARCHS = {"sm_80": "compute_80", "sm_90a": "compute_90a"}


def cuda_binaries(folder):
    """Files with the machine code of every .cu: the extension, or objects compiled here."""
    if _ext._C is not None and _ext._C.has_cuda:
        return [_ext._C.__file__]
    if not shutil.which("nvcc"):
        pytest.skip("no nvcc")
    archs = [f"-gencode=arch={virtual},code={real}" for real, virtual in ARCHS.items()]
    objects = []
    for source in (ROOT / "csrc").rglob("*.cu"):
        objects.append(folder / f"{source.stem}.o")
        subprocess.run(
            ["nvcc", "-O3", "-std=c++17", *archs, "-c", source, "-o", objects[-1]], check=True
        )
    return objects


@pytest.mark.aot
def test_cuda_kernels_use_no_stack_and_few_registers(tmp_path):
    triton = pytest.importorskip("triton", reason="its wheel brings cuobjdump")
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    usages = {}
    for binary in cuda_binaries(tmp_path):
        command = [tool, "-res-usage", binary]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        for part in text.split("Fatbin elf code")[1:]:
            arch = re.search(r"arch = (\w+)", part).group(1)
            for name, line in re.findall(r"Function (\S+):\s*\n\s*(.*)", part):
                counts = re.findall(r"(REG|STACK|LOCAL):(\d+)", line)
                usages[arch, name] = {k: int(v) for k, v in counts}
    for arch in ARCHS:
        for kernel in ("logprob_entropy_fwd_kernel", "logprob_entropy_bwd_kernel"):
            found = [name for a, name in usages if a == arch and kernel in name]
            assert len(found) == 6, f"{kernel} for {arch}: {found}"  # 3 dtypes, soft-cap or not
        rings = [name for a, name in usages if a == arch and "row_ring_kernel" in name]
        assert len(rings) == 18, f"{arch}: {rings}"  # the same, and three modes
    for kernel, usage in usages.items():
        limit = RING_REGISTERS if "row_ring_kernel" in kernel[1] else REGISTERS
        assert usage["STACK"] == 0 and usage["LOCAL"] == 0, f"{kernel}: {usage}"
        assert usage["REG"] <= limit, f"{kernel}: {usage}"


@pytest.fixture
def source_tree(tmp_path):
    """A copy of what setup.py needs, without what an earlier build left."""
    for name in ("csrc", "qlkernels", "qwenlong"):
        ignored = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(ROOT / name, tmp_path / "tree" / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, tmp_path / "tree")
    return tmp_path / "tree"


def install(tree, cuda, path):
    """Install the tree beside it with QL_BUILD_CUDA and PATH as given; (exit status, output)."""
    environment = {"PATH": str(path), "QL_BUILD_CUDA": cuda, "HOME": str(tree), "CUDA_HOME": ""}
    options = ["--no-build-isolation", "--no-deps", "--target", str(tree.parent / "site")]
    command = [sys.executable, "-m", "pip", "install", "-v", *options, str(tree)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tree.parent)
    return done.returncode, done.stdout + done.stderr


def run_installed(tree, code):
    # -S: no .pth files, whose finders would add an editable install's _C to the package under test
    path = os.pathsep.join([str(tree.parent / "site"), sysconfig.get_path("purelib")])
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
        cwd=tree.parent,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.real
def test_without_a_compiler_the_package_installs_as_plain_python(source_tree):
    empty = source_tree.parent / "bin"
    empty.mkdir()
    status, output = install(source_tree, "auto", empty)
    assert status == 0, output
    assert "no C++ compiler" in output
    said = run_installed(
        source_tree,
        "import torch, qlkernels; from qlkernels import _ext; assert _ext._C is None;"
        "print(qlkernels.__file__, _ext.why_not_cpu(torch.ones(1)), _ext.why_not_cuda())",
    )
    assert str(source_tree.parent / "site") in said
    assert said.count("reinstall with a C++ compiler") == 2
    status, output = install(source_tree, "1", empty)
    assert status != 0 and "QL_BUILD_CUDA=1, but there is no C++ compiler" in output


@pytest.mark.real
def test_without_nvcc_the_cpu_kernels_are_built(source_tree):
    bin = source_tree.parent / "bin"
    bin.mkdir()
    for tool in ("g++", "c++", "as", "ld", "collect2"):
        if path := shutil.which(tool):
            (bin / tool).symlink_to(path)
    status, output = install(source_tree, "0", bin)
    assert status == 0, output
    said = run_installed(
        source_tree,
        "import torch; from qlkernels import _ext as e;"
        "y = torch.zeros(2, dtype=torch.int64);"
        "print(e.logprob_entropy_fwd(torch.zeros(2, 8), y, None, 1.0, None, 1.0)[1].tolist());"
        "print(e.why_not_cuda(torch.ones(1)))",
    )
    assert eval(said.splitlines()[0]) == pytest.approx([math.log(8)] * 2)
    assert "built without CUDA" in said
    if not Path("/usr/local/cuda/bin/nvcc").exists():
        status, output = install(source_tree, "1", bin)
        assert status != 0 and "QL_BUILD_CUDA=1, but no nvcc" in output


@pytest.mark.real
def test_objects_are_rebuilt_only_when_their_sources_change(source_tree):
    def compiled():
        status, output = install(source_tree, "0", os.environ["PATH"])
        assert status == 0, output
        return sorted(set(re.findall(r"-c \S*/csrc/(\S+)", output)))

    everything = [
        "bindings.cpp", "cpu/dispatch.cpp", "cpu/logprob_entropy.cpp", "cpu/moe_routing.cpp",
    ]  # fmt: skip
    assert compiled() == everything
    assert compiled() == []
    (source_tree / "csrc/cpu/dispatch.cpp").touch()
    assert compiled() == ["cpu/dispatch.cpp"]
    (source_tree / "csrc/row_math.h").touch()
    assert compiled() == everything
