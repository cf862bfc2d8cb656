"""Compile Triton kernels for a card that is not there, and read what the compiler says of them."""

from __future__ import annotations

import functools
import importlib
import json
import re
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.driver import driver

BIN = Path(triton.__file__).parent / "backends/nvidia/bin"
SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}  # opt-in bytes a block


class StubDriver:
    """Answers ``cuda_capability_geq`` and the like for the card compiled for; without it they are
    False.
    """

    def __init__(self, capability: int):
        self.capability = capability

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self):
        return self.capability

    def get_current_stream(self, _device=None):
        return 0

    def is_active(self):
        return True


def compile_for(kernel, capability, signature, constexprs, aligned=(), options=None):
    """The compiled kernel. ``aligned`` names arguments divisible by 16; ``options`` are warps and
    stages.
    """
    driver.set_active(StubDriver(capability))
    while not isinstance(kernel, triton.JITFunction):
        kernel = kernel.fn
    missing = set(kernel.arg_names) - set(signature) - set(constexprs)
    assert not missing, f"{kernel.__name__}: no type for {sorted(missing)}"
    unknown = {p.name for p in kernel.params if p.do_not_specialize} & set(aligned)
    assert not unknown, f"{kernel.__name__}: launched without knowing what divides {unknown}"
    types = {n: "constexpr" if n in constexprs else signature[n] for n in kernel.arg_names}
    attrs = {
        (kernel.arg_names.index(n),): [["tt.divisibility", 16]]
        for n in aligned
        if n in kernel.arg_names
    }
    source = ASTSource(kernel, types, constexprs, attrs)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options or {})


def resources(compiled) -> dict[str, int]:
    """REG, STACK, SHARED and LOCAL of the cubin. Spills show as STACK."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [BIN / "cuobjdump", "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {k: int(v) for k, v in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}


@functools.cache
def _architecture(capability: int) -> str:
    return f"sm_{capability}a" if capability >= 90 else f"sm_{capability}"


def ptxas_report(compiled, capability: int) -> str:
    """What ``ptxas -v`` prints: exact spill bytes, and C751x lines where a wgmma is serialised."""
    tool = "ptxas-blackwell" if capability >= 100 else "ptxas"
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder) / "kernel.ptx"
        ptx.write_text(compiled.asm["ptx"])
        command = [
            BIN / tool, "-v", "-lineinfo", "--regAllocOptLevel=2",
            f"--gpu-name={_architecture(capability)}", str(ptx), "-o", "/dev/null",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr


OPS = [
    "attention",
    "logprob_entropy",
    "linear_logprob",
    "policy_loss",
    "linear_policy_loss",
    "moe_routing",
    "grouped_gemm",
    "scorer.elementwise",
]
CAPABILITIES = [80, 90, 100]
BUDGET = Path(__file__).parent / "qlkernels" / "aot_budget.json"


def variants():
    """Every kernel as it is launched, once per card: (name, capability, compile_for arguments)."""
    for op in OPS:
        module = importlib.import_module(f"qlkernels.{op}")
        for name, kernel, signature, constexprs, aligned, options in module.aot_variants():
            capabilities = options.get("capabilities", CAPABILITIES)
            options = {k: v for k, v in options.items() if k != "capabilities"}
            for capability in capabilities:
                yield (
                    name,
                    capability,
                    (kernel, capability, signature, constexprs, aligned, options),
                )


def write_budget() -> None:
    """Measure the table again: ``python -m tests.aot``, after a change that was looked at."""
    table: dict[str, dict] = {}
    for name, capability, arguments in variants():
        compiled = compile_for(*arguments)
        row = dict(registers=resources(compiled)["REG"], shared=compiled.metadata.shared)
        if "wgmma.mma_async" in compiled.asm["ptx"]:
            row["wgmma"] = True
        table.setdefault(name, {})[f"sm{capability}"] = row
    BUDGET.write_text(json.dumps({"triton": triton.__version__, "kernels": table}, indent=1) + "\n")


PAGE = Path(__file__).parents[1] / "docs" / "kernels.md"
_BLOCK = re.compile(r"(<!-- resources -->\n).*?(<!-- /resources -->)", re.S)


def resource_table(budget: dict) -> str:
    """Markdown: registers and shared memory of every 16-bit kernel on the three architectures."""
    lines = ["| kernel | sm_80 | sm_90 | sm_100 |", "| --- | --- | --- | --- |"]
    for name, cards in budget["kernels"].items():
        if "fp32" in name:
            continue
        cells = (cards.get(f"sm{capability}") for capability in CAPABILITIES)
        texts = (f"{c['registers']} / {c['shared'] / 1024:.0f} KB" if c else "" for c in cells)
        lines.append(f"| `{name}` | {' | '.join(texts)} |")
    return "\n".join(lines)


def with_resources(page: str, budget: dict) -> str:
    """The page with its block of resources filled from the budget."""
    return _BLOCK.sub(lambda m: f"{m[1]}\n{resource_table(budget)}\n\n{m[2]}", page)


if __name__ == "__main__":
    write_budget()
    PAGE.write_text(with_resources(PAGE.read_text(), json.loads(BUDGET.read_text())))
