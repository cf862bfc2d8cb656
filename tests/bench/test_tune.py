import pytest
import torch

from bench import tune


@pytest.mark.parametrize("name", tune.NAMES)
def test_every_kernel_can_be_swept(name):
    """In the interpreter, with candidates of its size; the present configuration is put back."""
    table, key, _, call = tune.target(name, 5, 16, 37, "cpu", torch.float32)
    present = table[key] if isinstance(table, dict) else getattr(table, key)
    other = (32, 1) if len(present) == 2 else (32, 16, 16, 1, 1, 1)
    rows = tune.sweep(table, key, [other, ("nonsense",)], call, repeats=1)
    results = dict(rows)
    assert isinstance(results[present], float) and isinstance(results[other], float)
    assert isinstance(results["nonsense",], str) and rows[-1][0] == ("nonsense",)
    assert (table[key] if isinstance(table, dict) else getattr(table, key)) == present


def test_a_wrong_result_is_refused():
    table, calls = {"k": 1}, []

    def call():
        calls.append(table["k"])
        return [torch.full((2,), float(table["k"] == 2))]

    assert dict(tune.sweep(table, "k", [2], call, repeats=1))[2] == "wrong"
