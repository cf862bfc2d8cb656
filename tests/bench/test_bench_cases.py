"""The registered ops on shapes small enough for a test: every provider passes its gate."""

import math

import pytest
import torch

import bench.cases  # noqa: F401  (fills the registry)
from bench.cases.providers import graphed
from bench.gate import WrongResult
from bench.inputs import hidden_weight_targets, logits_and_targets, upstream
from bench.registry import OPS, Point, Unavailable, build, register, select
from bench.run import gate
from bench.truth import LinearTruth, LogitsTruth, token_scores

SMALL = {
    "attention": {"T": 33, "Hq": 4, "Hkv": 2, "D": 16},
    "prefix_attention": {"P": 20, "G": 3, "R": 5, "Hq": 4, "Hkv": 2, "D": 16},
    "logprob_entropy": {"T": 9, "V": 301, "data": "peaked"},
    "logprob_entropy_with_grad": {"T": 9, "V": 301, "data": "peaked"},
    "token_entropy": {"T": 9, "V": 301, "data": "random"},
    "linear_logprob": {"T": 16, "H": 32, "V": 301, "data": "peaked"},
    "linear_policy_loss": {"T": 32, "H": 32, "V": 301, "B": 8, "data": "peaked"},
    "policy_loss": {"T": 8192, "B": 2, "loss": "dapo"},
    "moe_layer": {"T": 24, "H": 16, "I": 8, "E": 4, "top_k": 2, "routing": "zipf1"},
    "moe_routing": {"T": 24, "E": 12, "top_k": 3, "routing": "zipf1"},
}
SMALL_CEILINGS = {
    "copy": {"bytes": 4096},
    "gemm": {"M": 5, "N": 7, "K": 3},
    "lm_head": {"T": 5, "H": 3, "V": 7},
}


def test_every_op_of_the_foundation_is_registered():
    assert set(OPS) >= {"ceiling", *SMALL}
    for op in OPS.values():
        assert op.points["cuda"] and op.points["cpu"], op.name


def test_shapes_are_pairs_in_their_order():
    point = Point("op", "fwd", "bf16", {"T": 32_768, "H": 2048, "V": 151_936, "data": "peaked"})
    assert point.shape_text == "T=32768;H=2048;V=151936;data=peaked"


def test_a_point_or_an_op_is_registered_once():
    same = [{"case": "fwd", "dtype": "fp32", "T": 1}] * 2
    with pytest.raises(ValueError, match="same point twice"):
        register("twice", cuda=same, cpu=[])(print)
    with pytest.raises(ValueError, match="'ceiling' is registered twice"):
        register("ceiling", cuda=[], cpu=[])(print)


def test_selection():
    assert select([], "cpu") == select(["all"], "cpu")
    assert {p.op for p in select(["policy_loss", "policy_loss"], "cpu")} == {"policy_loss"}
    assert {p.case for p in select(["linear_logprob"], "cuda", ["*live50"])} == {
        "fwd_bwd_live50",
        "fwd_bwd_prompt75_live50",
    }
    only = select(["moe_layer"], "cuda", ["fwd"], ["T=256;*", "T=1;*"])
    assert [p.shape["T"] for p in only] == [1, 256]
    with pytest.raises(ValueError, match="no case on cuda that matches fwd, T=7"):
        select(["moe_layer"], "cuda", ["fwd"], ["T=7;*"])
    quick = select(["logprob_entropy"], "cuda", quick=True)
    assert [(p.case, p.shape["T"]) for p in quick][:2] == [("fwd", 2048), ("fwd_bwd", 2048)]
    with pytest.raises(ValueError, match="unknown op 'moo'; choose from ceiling"):
        select(["moo"], "cpu")
    with pytest.raises(ValueError, match="policy_loss has no case on cpu that matches nothing"):
        select(["policy_loss"], "cpu", ["nothing"])


def small_points():
    for name, shape in SMALL.items():
        for case in dict.fromkeys(p.case for d in ("cuda", "cpu") for p in OPS[name].points[d]):
            yield pytest.param(Point(name, case, "fp32", shape), id=f"{name}-{case}")
    for case, shape in SMALL_CEILINGS.items():
        for gemm in ("logits", "dX", "dW") if case == "lm_head" else (None,):
            full = shape | ({"gemm": gemm} if gemm else {})
            yield pytest.param(Point("ceiling", case, "fp32", full), id=f"{case}-{gemm}")


@pytest.mark.parametrize("point", list(small_points()))
def test_providers_pass_their_gate(point):
    try:
        problem = build(point, "cpu")
    except Unavailable as error:
        pytest.skip(str(error))
    ran = 0
    for name, call in problem.impls.items():
        if name.startswith("torch.compile"):  # seconds of compilation; `pytest bench` runs it
            continue
        try:
            rel_err = gate(problem, name, call)
        except Unavailable as error:
            assert "cannot run here" in str(error)
            continue
        assert 0.0 <= rel_err < 1e-4, name
        ran += 1
    assert ran >= 2 or point.op == "ceiling"
    assert problem.bytes > 0
    assert set(problem.peer_scope.values()) <= {"same", "less"}
    assert not any(name.startswith("ours-") for name in problem.peer_scope)


def work(op: str, case: str, **changes) -> tuple[int, int]:
    try:
        problem = build(Point(op, case, "fp32", SMALL[op] | changes), "cpu")
    except Unavailable as error:
        pytest.skip(str(error))
    return problem.useful_flops, problem.bytes


def test_useful_flops_by_hand():
    expert_row = 16 * 8
    assert work("moe_layer", "fwd")[0] == 6 * 24 * 2 * expert_row
    assert work("moe_layer", "fwd_bwd")[0] == 18 * 24 * 2 * expert_row
    weights, tokens = 3 * 4 * expert_row, 2 * 24 * 16
    assert work("moe_layer", "fwd")[1] == 4 * (weights + tokens)
    assert work("moe_layer", "fwd", T=1)[1] == 4 * (weights // 2 + 2 * 16)
    thv = 16 * 32 * 301
    assert work("linear_logprob", "fwd")[0] == 2 * thv
    assert work("linear_logprob", "fwd_bwd")[0] == 6 * thv
    assert work("linear_logprob", "fwd_bwd_live50")[0] == 4 * thv  # 2 + 4 / 2
    assert work("linear_logprob", "fwd_bwd_prompt75_live50")[0] == thv  # a quarter of 2 + 4 / 2
    assert work("logprob_entropy", "fwd")[0] == 0
    thv = 32 * 32 * 301
    assert work("linear_policy_loss", "fwd_bwd_known")[0] == 6 * thv
    assert work("linear_policy_loss", "fwd_bwd_known_live50")[0] == 4 * thv
    assert work("linear_policy_loss", "fwd_bwd_known_prompt75_live50")[0] == thv
    assert 2 * thv < work("linear_policy_loss", "fwd_bwd")[0] < 6 * thv  # some are clipped


def test_least_bytes_by_hand():
    # logits, target ids, three results
    assert work("logprob_entropy", "fwd")[1] == 9 * 301 * 4 + 9 * 8 + 9 * 12
    # read, read again, write the gradient
    assert work("logprob_entropy", "fwd_bwd")[1] == 3 * 9 * 301 * 4 + 9 * 20
    # logits, ids and weights; ids twice, order and inverse, offsets
    assert work("moe_routing", "router")[1] == 4 * 24 * 12 + 8 * 72 + 16 * 72 + 4 * 13
    # read, read again, write the gradient; ids and weights written, ids and upstream read
    assert work("moe_routing", "fwd_bwd")[1] == 3 * 4 * 24 * 12 + 16 * 72
    # seven values a token of 4 or 1 bytes: 4 fp32 and 2 masks; the gradient
    assert work("policy_loss", "fwd_bwd")[1] == 8192 * (4 * 4 + 2 + 4) + 16


# --- truth -----------------------------------------------------------------------


def test_uniform_and_certain_logits():
    scores = token_scores(torch.zeros(1, 8).double(), torch.tensor([3]))
    assert scores["entropy"].item() == pytest.approx(math.log(8))
    assert scores["logprobs"].item() == pytest.approx(-math.log(8))
    assert scores["lse"].item() == pytest.approx(math.log(8))
    # two candidates: p = 1 / (1 + e^-1)
    scores = token_scores(torch.tensor([[1.0, 0.0]]).double(), torch.tensor([0]))
    p = 1 / (1 + math.exp(-1))
    assert scores["logprobs"].item() == pytest.approx(math.log(p))
    assert scores["entropy"].item() == pytest.approx(-p * math.log(p) - (1 - p) * math.log(1 - p))


def logits_problem():
    torch.manual_seed(0)
    logits, ids = torch.randn(6, 11), torch.randint(11, (6,))
    g = {"logprobs": torch.randn(6), "entropy": torch.randn(6)}
    leaf = logits.clone().requires_grad_()
    scores = token_scores(leaf, ids)
    (dlogits,) = torch.autograd.grad([scores[k] for k in g], leaf, list(g.values()))
    outputs = {k: x.detach() for k, x in scores.items()} | {"dlogits": dlogits}
    return LogitsTruth(logits, ids, ("logprobs", "entropy"), g), outputs, leaf, g


def test_logits_truth_accepts_right_and_refuses_wrong():
    truth, outputs, _leaf, _g = logits_problem()
    assert truth.check(outputs, True, True) < 1e-6
    for name in ("logprobs", "entropy", "dlogits"):
        wrong = outputs | {name: outputs[name].clone()}
        wrong[name][-1] += 1e-3
        with pytest.raises(WrongResult, match=f"{name} is off"):
            truth.check(wrong, True, True)
    with pytest.raises(WrongResult, match="shape"):
        truth.check(outputs | {"logprobs": outputs["logprobs"][:-1]}, True, True)
    with pytest.raises(WrongResult, match="does not return dlogits"):
        truth.check({k: outputs[k] for k in ("logprobs", "entropy")}, True, True)


def test_a_peer_without_entropy_is_compared_with_the_gradient_of_the_rest():
    truth, outputs, leaf, g = logits_problem()
    logprobs = leaf.log_softmax(1).gather(1, truth.target_ids[:, None]).squeeze(1)
    (dlogits,) = torch.autograd.grad(logprobs, leaf, g["logprobs"])
    less = {"logprobs": logprobs.detach(), "dlogits": dlogits}
    assert truth.check(less, False, False) < 1e-6
    assert truth.check(less | {"dlogits": outputs["dlogits"]}, False, False) > 1e-2


def test_linear_truth_leaves_masked_rows_out():
    torch.manual_seed(0)
    hidden, weight, ids = torch.randn(6, 4), torch.randn(11, 4), torch.randint(11, (6,))
    hidden[0] = torch.nan
    mask = torch.tensor([False, True, True, False, True, True])
    g = {"logprobs": torch.randn(6), "entropy": torch.randn(6)}
    truth = LinearTruth(hidden, weight, ids, mask, g)
    x, w = hidden[mask].clone().requires_grad_(), weight.clone().requires_grad_()
    scores = token_scores(x @ w.T, ids[mask])
    grads = torch.autograd.grad([scores[k] for k in g], [x, w], [v[mask] for v in g.values()])

    def spread(values):
        return torch.zeros(6, *values.shape[1:]).index_copy(0, mask.nonzero()[:, 0], values)

    outputs = {k: spread(scores[k].detach()) for k in ("logprobs", "entropy")}
    outputs |= {"dhidden": spread(grads[0]), "dweight": grads[1]}
    assert truth.check(outputs, True, True) < 1e-5
    with pytest.raises(WrongResult, match="dweight is off"):
        truth.check(outputs | {"dweight": grads[1] + 1e-3}, True, True)
    outputs["logprobs"][0] = -1.0
    with pytest.raises(WrongResult, match="logprobs is off"):
        truth.check(outputs, True, True)


# --- inputs ----------------------------------------------------------------------


def test_peaked_hidden_states_are_as_peaked_as_asked():
    hidden, weight, ids = hidden_weight_targets(512, 64, 2003, torch.float32, "cpu", "peaked")
    scores = token_scores(hidden @ weight.T, ids)
    assert scores["entropy"][:256].mean().item() == pytest.approx(0.2, abs=0.01)
    assert scores["entropy"].mean().item() == pytest.approx(0.2, abs=0.08)
    # targets are drawn from the policy: most are likely, some are not
    assert scores["logprobs"].exp().mean() > 0.7
    assert scores["logprobs"].min() < -1.0


def test_random_inputs_are_far_from_certain():
    hidden, weight, ids = hidden_weight_targets(64, 64, 2003, torch.float32, "cpu", "random")
    entropy = token_scores(hidden @ weight.T, ids)["entropy"]
    assert (entropy > 5.0).all() and (entropy < math.log(2003)).all()


def test_rows_past_the_first_1024_are_rotated_copies():
    logits, ids = logits_and_targets(1030, 37, torch.float32, "cpu", "peaked")
    assert logits.shape == (1031, 37) and ids.shape == (1030,)
    assert torch.equal(logits[1024:1030], logits[:6].roll(7919 % 37, dims=1))
    first, copied = token_scores(logits[:6], ids[:6]), token_scores(logits[1024:1030], ids[1024:])
    torch.testing.assert_close(first, copied)


@pytest.mark.parametrize("make", [logits_and_targets, hidden_weight_targets])
def test_inputs_are_seeded_and_named(make):
    sizes = (5, 8, 16)[: 2 if make is logits_and_targets else 3]
    for data in ("peaked", "random"):
        first = make(*sizes, torch.float32, "cpu", data)
        again = make(*sizes, torch.float32, "cpu", data)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    with pytest.raises(ValueError, match="'peaked' or 'random', got 'zipf'"):
        make(*sizes, torch.float32, "cpu", "zipf")


@pytest.mark.parametrize("live, count", [(1.0, 10), (0.5, 5), (0.25, 3), (0.0, 0)])
def test_upstream_is_zero_on_the_rows_that_do_not_matter(live, count):
    assert int((upstream(10, "cpu", live=live) != 0).sum()) == count


@pytest.mark.gpu
def test_gpu_a_graph_replays_what_the_eager_call_gave():
    x = torch.randn(1000, device="cuda")
    calls = graphed({"double": lambda: {"y": 2 * x}})
    assert all(torch.equal(calls["double"]()["y"], 2 * x) for _ in range(4))
    numbers = iter(range(9))
    wrong = graphed({"moving": lambda: {"y": x + next(numbers)}})["moving"]
    wrong()
    with pytest.raises(WrongResult, match="moving: y of the graph differs"):
        wrong()
