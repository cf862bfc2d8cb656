"""Every Triton kernel compiles for sm_80, sm_90 and sm_100 without a GPU, within its budget.

The budget is what the Triton of the table was seen to use; a change that needs more registers or
shared memory must say so by changing the table (``python -m tests.aot``).
"""

import json
import re

import pytest

pytestmark = pytest.mark.aot

from tests import aot  # noqa: E402  (imports triton, which only these tests need to compile)

TABLE = json.loads(aot.BUDGET.read_text())
VARIANTS = list(aot.variants())


@pytest.mark.parametrize(
    "name, capability, arguments", VARIANTS, ids=[f"{n}-sm{c}" for n, c, _ in VARIANTS]
)
def test_kernel_compiles_within_its_budget(name, capability, arguments):
    compiled = aot.compile_for(*arguments)
    used, report = aot.resources(compiled), aot.ptxas_report(compiled, capability)
    assert used["STACK"] == 0 and used["LOCAL"] == 0, f"{used}\n{report}"
    spilled = [int(n) for n in re.findall(r"(\d+) bytes spill", report)]
    assert spilled and not any(spilled), report
    assert not re.search(r"C751\d", report), f"a wgmma is serialised:\n{report}"
    assert compiled.metadata.shared <= aot.SHARED_LIMIT[capability]
    budget = TABLE["kernels"][name][f"sm{capability}"]
    assert used["REG"] <= budget["registers"], f"{used['REG']} registers, budget {budget}"
    assert compiled.metadata.shared <= budget["shared"], f"{compiled.metadata.shared}, {budget}"
    assert ("wgmma.mma_async" in compiled.asm["ptx"]) == budget.get("wgmma", False)


def test_the_table_is_of_this_triton_and_of_these_kernels():
    assert aot.triton.__version__ == TABLE["triton"]
    assert set(TABLE["kernels"]) == {name for name, _, _ in VARIANTS}


def test_the_page_shows_the_table():
    page = aot.PAGE.read_text()
    assert aot.with_resources(page, TABLE) == page, "run python -m tests.aot"
    assert "| `linear_fold-tma-sm90-bf16` |" in page


def test_the_target_is_read_before_the_row_is_overwritten():
    """In place, a warp may be done with a column that another has yet to read as its target."""
    for name, _, arguments in VARIANTS:
        if name == "logprob_entropy_bwd":
            ptx = aot.compile_for(*arguments).asm["ptx"]
            assert 0 <= ptx.index("bar.sync") < ptx.index("st.global")


def test_a_spilling_kernel_would_be_caught():
    """The same kernel with four warps for a 256 x 128 tile has no room for its accumulators."""
    name, capability, arguments = next(v for v in VARIANTS if v[0] == "linear_fold-tma-sm90-bf16")
    *rest, options = arguments
    compiled = aot.compile_for(*rest, options | dict(num_warps=4))
    assert aot.resources(compiled)["STACK"] > 0
    assert any(int(n) for n in re.findall(r"(\d+) bytes spill", aot.ptxas_report(compiled, 90)))
