"""What users import: a change of this list is a change of the API."""

import inspect

import pytest

import qlkernels

OPS = [
    "attention", "build_expert_index", "linear_logprob", "linear_policy_loss",
    "load_balancing_loss", "logprob_entropy", "logprob_entropy_with_grad", "moe_mlp",
    "moe_route", "pack_groups", "policy_loss", "prefix_attention", "targets_from_labels",
    "token_entropy",
]  # fmt: skip
RESULTS = ["ExpertIndex", "LinearPolicyLoss", "PolicyLoss", "Routing", "TokenScores"]
LAYOUTS = ["PackedGroups"]


def test_names():
    public = {
        name
        for name, value in vars(qlkernels).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert public == {*OPS, *RESULTS, *LAYOUTS}


@pytest.mark.parametrize("name", OPS)
def test_an_op_says_what_it_takes_and_returns(name):
    op = getattr(qlkernels, name)
    text = inspect.getdoc(op)
    assert "Args:" in text and "Returns:" in text
    signature = inspect.signature(op)
    assert signature.return_annotation is not inspect.Signature.empty
    for parameter in signature.parameters.values():
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD:
            assert parameter.annotation is not inspect.Parameter.empty, parameter
        assert parameter.name in text, parameter


@pytest.mark.parametrize("name", RESULTS)
def test_a_result_is_a_named_tuple(name):
    assert issubclass(getattr(qlkernels, name), tuple) and getattr(qlkernels, name)._fields
