"""How often Triton compiles a kernel while the number of tokens changes, seen without a GPU.

Each launch is taken by a recorder, which asks Triton for the key under which it would look for a
compiled kernel. A new key in the middle of a run costs about a second.
"""

import pytest
import torch

pytestmark = pytest.mark.aot

import triton  # noqa: E402  (only these tests need it to compile)

from qlkernels.attention import merge  # noqa: E402
from qlkernels.moe_routing import triton as routing  # noqa: E402
from qlkernels.policy_loss import PolicyOptions  # noqa: E402
from qlkernels.scorer import elementwise  # noqa: E402
from tests import aot  # noqa: E402

OPS = torch.ops.qlkernels
LENGTHS = (1, 2, 3, 15, 16, 17, 31, 32, 100, 127, 128, 129, 1000, 1024, 4097)
H, V, E, TOP_K = 32, 64, 8, 2  # rows of all matrices start on 16 bytes


@pytest.fixture
def compiled(monkeypatch):
    """{kernel: {((argument, (type, divisibility or constant)), ..., (option, value), ...)}}."""
    aot.driver.set_active(aot.StubDriver(90))
    found: dict[str, set] = {}

    def run(kernel, *args, grid, warmup, **options):
        _, key, options = kernel.create_binder()[-1](*args, **options)
        key = zip(kernel.arg_names, key, strict=True)
        found.setdefault(kernel.__name__, set()).add((*key, *sorted(options.items())))

    monkeypatch.setattr(triton.JITFunction, "run", run)
    for module in (merge, elementwise):
        monkeypatch.setattr(module, "why_not_triton", lambda *_: None)
    return found


def rows(*shape, dtype=torch.float32):
    """Rows out of a longer batch: a vector of them starts at any multiple of its itemsize."""
    first = shape[0] % 5
    return torch.zeros(shape[0] + first, *shape[1:], dtype=dtype)[first:]


def targets(T):
    return rows(T, dtype=torch.int64)


def score_from_logits(T, mask, temperatures):
    logits = rows(T, V, dtype=torch.bfloat16)
    arguments = (targets(T), mask, temperatures, 1.0, None, 1.0)
    scores = OPS.logprob_entropy(logits, *arguments, False, "triton")
    OPS.logprob_entropy_bwd(logits, *arguments, *scores, rows(T), rows(T), None, "triton")


def score_from_hidden_states(T, temperatures):
    x, w, y = rows(T, H, dtype=torch.bfloat16), torch.zeros(V, H, dtype=torch.bfloat16), targets(T)
    options = (1.0, 1.0, None, 16, False, "triton")
    scores = OPS.linear_logprob(x, w, y, None, temperatures, None, *options, None)
    grads = (rows(T) + 1.0, None, None)
    needs = (True, True, False)
    OPS.linear_logprob_bwd(x, w, y, None, temperatures, None, scores, *grads, *options, *needs)


def train_from_logprobs(T, mask):
    options = dict(
        dual_clip=None, ratio_cap=None, eps_low=0.2, eps_high=0.2, kl_coef=0.0, entropy_coef=0.0,
        kl_importance=False, kept_only=False, loss_type="gspo", kl_estimator="k3",
        rule="token-mean",
    )  # fmt: skip
    packed = PolicyOptions.of(**options).packed()
    cu_seqlens = torch.tensor([0, T // 2, T], dtype=torch.int32)
    some = [rows(T) for _ in range(5)]
    _, _, g, coef = OPS.policy_loss(
        some[0], some[1], some[2], mask, mask, some[3], None, some[4], None, cu_seqlens, None,
        *packed, "triton",
    )  # fmt: skip
    masks = (mask, mask, None)
    OPS.policy_loss_bwd(torch.ones(()), coef, g, *masks, cu_seqlens, *packed, False, "triton")


def train_from_hidden_states(T, mask, temperatures):
    x, w = rows(T, H, dtype=torch.bfloat16), torch.zeros(V, H, dtype=torch.bfloat16)
    options = dict(
        dual_clip=None, ratio_cap=None, eps_low=0.2, eps_high=0.2, kl_coef=0.0, entropy_coef=0.0,
        kl_importance=False, kept_only=False, loss_type="gspo", kl_estimator="k3", rule="weights",
    )  # fmt: skip
    OPS.linear_policy_loss(
        x, w, targets(T), None, temperatures, None, rows(T) + 1.0, mask, None, None, None,
        rows(T) + 1.0, torch.tensor([0, T]), 1.0, 1.0, None, None,
        *PolicyOptions.of(**options).packed(), True, True, False, "triton",
    )  # fmt: skip


def route(T):
    logits = rows(T, E, dtype=torch.bfloat16)
    weights, sums, ids, counts = (
        torch.zeros(shape, dtype=dtype)
        for shape, dtype in (
            ((T, TOP_K), torch.float32), (E, torch.float32), ((T, TOP_K), torch.int32),
            (E, torch.int32),
        )
    )  # fmt: skip
    routing.route(logits, rows(T, TOP_K, dtype=torch.int32), True, None, weights, sums, ids, counts)
    routing.route_backward(logits, ids, True, rows(T, TOP_K), sums, torch.zeros(T, E))
    order = torch.zeros(2, T * TOP_K, dtype=torch.int32)
    routing.build_index(ids, E, order[0], order[1].clone(), torch.zeros(E + 1, dtype=torch.int32))


def experts(T):
    x = rows(T, H, dtype=torch.bfloat16)
    w_gate_up, w_down = (torch.zeros(E, *s, dtype=torch.bfloat16) for s in ((2 * 64, H), (H, 64)))
    ids = torch.arange(T * TOP_K, dtype=torch.int32).view(T, TOP_K) % E
    weights, nothing = rows(T, TOP_K), (None, None, None)
    out, *saved = OPS.moe_mlp(
        x, ids, weights, w_gate_up, w_down, *nothing, None, True, "triton"
    )  # fmt: skip
    OPS.moe_mlp_bwd(
        out, x, ids, weights, w_gate_up, w_down, saved, None, "triton", [True, True, True]
    )


def attend(T):
    out, lse = rows(T, 2, 64, dtype=torch.bfloat16), torch.zeros(2, T + 3)[:, 3:]
    merge.merge_into(out, lse, out.clone(), lse.clone())


def norms(T):
    x = rows(T, H, dtype=torch.bfloat16)
    elementwise.rms_norm(x, x[0], 1e-6, impl="triton")
    heads, angles = x.view(T, 2, 16), torch.zeros(T, 8, dtype=torch.bfloat16)
    elementwise.norm_and_rotate_(heads, heads[0, 0], angles, angles, 1e-6, impl="triton")


def run_everything(T):
    mask = ~rows(T, dtype=torch.bool)
    temperatures = rows(T) + 1.0
    score_from_logits(T, mask, temperatures)
    score_from_hidden_states(T, temperatures)
    train_from_logprobs(T, mask)
    train_from_hidden_states(T, mask, temperatures)
    route(T)
    experts(T)
    attend(T)
    norms(T)


def test_another_number_of_tokens_compiles_nothing(compiled):
    for T in (17, 4097):  # the products over experts have a tile for few rows and one for many
        run_everything(T)
    launched = {kernel.fn.__name__ for _, _, (kernel, *_) in aot.variants()}
    assert launched - set(compiled) == {"gather_kernel"}  # off on every path
    before = {name: set(keys) for name, keys in compiled.items()}
    for T in LENGTHS:
        run_everything(T)
        for name, keys in compiled.items():
            for key in keys - before[name]:
                other = min((set(key) - set(known) for known in before[name]), key=len)
                raise AssertionError(f"T = {T}: {name} is compiled again for {other}")


def test_a_specialised_size_would_be_seen(compiled):
    @triton.jit
    def kernel(x_ptr, T):
        pass

    for T in LENGTHS:
        kernel[(1,)](None, T)
    assert len(compiled["kernel"]) == 3  # 1, a multiple of 16, and the rest
