"""TRL's GRPO update with and without our ops: ``python -m bench.trl_step``.

The real ``GRPOTrainer`` holds a model of random weights and one group of random completions, which
are handed over and not sampled. Timed are the update (forward, loss, backward, clipping, AdamW)
and its loss part (head, log-probabilities, entropy, loss, and back to the hidden states and the
head). Rows go to the results file of the device.
"""

from __future__ import annotations

import gc
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # TRL warns that rollout_func may change

import torch
import typer
from datasets import Dataset
from rich.console import Console
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.modeling_outputs import BaseModelOutputWithPast
from trl import GRPOConfig, GRPOTrainer

from bench import machine, results, timing
from bench.gate import WrongResult
from bench.results import Row
from qlkernels import hf
from qwenlong.integrations.trl import AEPOGRPOConfig, AEPOGRPOTrainer
from qwenlong.tiny import tiny_tokenizer

OP = "trl_grpo"
CASES = ("loss", "update", "prefix")
WARM_UP = 2
LEARNING_RATE = 1e-6
# the model; prompt tokens, completions, completion tokens of "loss" and "update", and of "prefix"
MODELS: dict[str, tuple[dict[str, Any], tuple[int, int, int], tuple[int, int, int]]] = {
    "0.6b": (  # Qwen3-0.6B
        dict(
            vocab_size=151_936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28,
            num_attention_heads=16, num_key_value_heads=8, head_dim=128,
            max_position_embeddings=40_960, tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        ),
        (512, 8, 4096),
        (16_384, 8, 1024),
    ),
    "tiny": (
        dict(
            vocab_size=512, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=512,
            tie_word_embeddings=True,
        ),
        (8, 4, 32),
        (64, 4, 8),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """One way to compute the same update."""

    name: str
    trainer: type[GRPOTrainer]
    config: type[GRPOConfig]
    cases: tuple[str, ...] = CASES
    options: dict[str, Any] = field(default_factory=dict)
    prepare: Callable[[torch.nn.Module], object] = lambda model: None


def variants() -> list[Variant]:
    """TRL alone is the first, and what the others are compared with. Liger changes functions of
    transformers for good, so it comes last.
    """
    trl = f"trl-{machine.package_version('trl')}"
    ours = (AEPOGRPOTrainer, AEPOGRPOConfig)
    found = [
        Variant(trl, GRPOTrainer, GRPOConfig),
        Variant("ours-scores", *ours, cases=("loss", "update")),
        Variant(
            "ours-scores+apply", *ours, cases=("update",),
            prepare=lambda model: hf.apply(model, lm_head=False),
        ),
        Variant(
            "ours-one_pass", *ours, cases=("loss", "update"), options={"one_pass_loss": True}
        ),
        Variant("ours-shared_prefix", *ours, cases=("prefix",), options={"shared_prefix": True}),
        Variant(
            "ours-shared_prefix+one_pass", *ours, cases=("prefix",),
            options={"shared_prefix": True, "one_pass_loss": True},
        ),
    ]  # fmt: skip
    liger = machine.package_version("liger-kernel")
    if liger and torch.cuda.is_available():
        one_pass = {"one_pass_loss": True}
        found += [
            Variant(f"{trl}+liger-{liger}", GRPOTrainer, GRPOConfig, prepare=apply_liger),
            Variant(
                f"ours-one_pass+liger-{liger}", *ours, cases=("update",), options=one_pass,
                prepare=apply_liger,
            ),
            Variant(
                f"ours-shared_prefix+one_pass+liger-{liger}", *ours, cases=("prefix",),
                options=one_pass | {"shared_prefix": True}, prepare=apply_liger,
            ),
        ]  # fmt: skip
    return found


def apply_liger(model: torch.nn.Module) -> None:
    """As ``use_liger_kernel=True`` does, which GRPOTrainer asks for without Liger's loss."""
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    _apply_liger_kernel_to_instance(model=model, fused_linear_cross_entropy=False)


# --- one trainer -----------------------------------------------------------------


def random_ids(seed: int, n: int, vocab: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocab, (n,), generator=generator).tolist()


def make_trainer(
    variant: Variant, sizes: dict[str, Any], shape: tuple[int, int, int], device: str, folder: str
) -> tuple[GRPOTrainer, dict[str, Any]]:
    """The trainer and one scored group; every variant gets the same weights and tokens."""
    P, G, R = shape
    config = Qwen3Config(**sizes, bos_token_id=None, eos_token_id=1, pad_token_id=0)
    torch.manual_seed(0)
    with torch.device(device):
        model = Qwen3ForCausalLM(config)
    model.to(torch.bfloat16 if device == "cuda" else torch.float32)
    variant.prepare(model)
    vocab = sizes["vocab_size"]

    def rollout(prompts: list, trainer: GRPOTrainer) -> dict[str, Any]:
        answers = [random_ids(2 + i, R, vocab) for i in range(len(prompts))]
        same = [random_ids(1, P, vocab)] * len(prompts)
        return {"prompt_ids": same, "completion_ids": answers, "logprobs": None}

    args = variant.config(
        output_dir=folder, per_device_train_batch_size=G, num_generations=G,
        max_completion_length=R, use_cpu=device == "cpu", bf16=device == "cuda",
        report_to="none", save_strategy="no", disable_tqdm=True, log_level="error",
        **variant.options,
    )  # fmt: skip
    trainer = variant.trainer(
        model,
        lambda completions, **_: [i / G for i in range(len(completions))],
        args,
        Dataset.from_dict({"prompt": ["p"]}),
        processing_class=tiny_tokenizer(),
        rollout_func=rollout,
    )
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
    with torch.no_grad():
        inputs = trainer._generate_and_score_completions([{"prompt": "p"}] * G)
    return trainer, inputs


def logprobs_of(trainer: GRPOTrainer, inputs: dict[str, Any]) -> torch.Tensor:
    """``(G, R)`` of the untrained model."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    with torch.no_grad():
        found, _, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, torch.ones_like(ids), inputs["completion_ids"].shape[1]
        )
    return found


def update_of(trainer: GRPOTrainer, inputs: dict[str, Any]) -> Callable[[], torch.Tensor]:
    """A call is one update, and returns the norm of the gradient."""
    model = trainer.model
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, fused=next(model.parameters()).is_cuda
    )

    def call() -> torch.Tensor:
        trainer.compute_loss(model, inputs).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm

    return call


def loss_part_of(trainer: GRPOTrainer, inputs: dict[str, Any]) -> Callable[[], torch.Tensor]:
    """TRL's loss on hidden states that are there: the decoder is not run. A call returns their
    gradient.
    """
    model = trainer.model
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    with torch.no_grad():
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    hidden.requires_grad_()
    model.model.forward = lambda *_, **__: BaseModelOutputWithPast(last_hidden_state=hidden)

    def call() -> torch.Tensor:
        trainer.compute_loss(model, inputs).backward()
        gradient, hidden.grad = hidden.grad, None
        model.zero_grad(set_to_none=True)
        return gradient

    return call


# --- measuring -------------------------------------------------------------------


def measure(
    call: Callable[[], Any],
    repeats: int,
    device: str,
    check: Callable[[Any], None] = lambda found: None,
) -> tuple[list[float], float | None]:
    """Milliseconds of each call after a warm-up, and the peak in MB above what was held before.
    ``check`` gets what the first call returns.
    """
    on_gpu = device == "cuda"
    check(call())
    for _ in range(WARM_UP - 1):
        call()
    before = 0
    if on_gpu:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        if on_gpu:
            torch.cuda.synchronize()
        found.append(1e3 * (time.perf_counter() - start))
    peak = (torch.cuda.max_memory_allocated() - before) / 1e6 if on_gpu else None
    return found, peak


def distance(found: torch.Tensor, want: torch.Tensor) -> float:
    """Norm of the difference, in norms of ``want``."""
    return float((found.float() - want.float()).norm() / want.float().norm())


def useful_flops(sizes: dict[str, Any], shape: tuple[int, int, int], case: str) -> int:
    """Of the head alone for "loss", else of the head and the products with weights; attention and
    recomputation are not counted, and a shared prompt counts once.
    """
    P, G, R = shape
    H, V, L = sizes["hidden_size"], sizes["vocab_size"], sizes["num_hidden_layers"]
    head = 6 * G * R * H * V
    if case == "loss":
        return head
    heads = sizes["num_attention_heads"] + sizes["num_key_value_heads"]
    weights = L * H * (2 * heads * sizes["head_dim"] + 3 * sizes["intermediate_size"])
    return head + 6 * (P + G * R) * weights


def run(
    model: str,
    *,
    device: str,
    out: Path,
    cases: tuple[str, ...] = CASES,
    repeats: int = 5,
    commit: str | None = None,
    console: Console | None = None,
) -> list[Row]:
    """Measure every variant of every case and append the rows to ``out``.

    Raises:
        WrongResult: log-probabilities or gradients differ from those of TRL.
    """
    console = console or Console()
    sizes, whole, prefix = MODELS[model]
    run_id, commit = machine.new_run_id(), machine.git_commit() if commit is None else commit
    dtype, allowed = ("bf16", 2e-2) if device == "cuda" else ("fp32", 1e-4)
    # advantages cancel in a gradient, so that bf16 leaves several per cent of its norm
    gradient_allowed = 0.15 if device == "cuda" else 1e-4
    rows: list[Row] = []
    expected: dict[str, torch.Tensor] = {}
    gradients: dict[str, torch.Tensor] = {}
    for variant in variants():
        for case in (c for c in variant.cases if c in cases):
            shape = prefix if case == "prefix" else whole
            with tempfile.TemporaryDirectory() as folder:
                trainer, inputs = make_trainer(variant, sizes, shape, device, folder)
                found = logprobs_of(trainer, inputs)
                want = expected.setdefault(case, found.cpu())
                error = float((found.cpu() - want).abs().max() / want.abs().max())
                if not error <= allowed:
                    raise WrongResult(f"{case}, {variant.name}: relative error {error:.1e}")

                def check(gradient, case=case, name=variant.name):
                    gradient = gradient.cpu()
                    off = distance(gradient, gradients.setdefault(case, gradient))
                    console.print(f"{case:7} {name:28} gradient off by {off:.1e}", highlight=False)
                    if not off <= gradient_allowed:
                        raise WrongResult(f"{case}, {name}: gradients differ by {off:.1e}")

                make = loss_part_of if case == "loss" else update_of
                samples, peak = measure(make(trainer, inputs), repeats, device, check)
            del trainer, inputs, found
            gc.collect()
            if device == "cuda":
                torch.cuda.empty_cache()
            timed = timing.Timing(tuple(samples))
            p20, p50, p80 = (timed.percentile(q) for q in (20, 50, 80))
            P, G, R = shape
            row = Row(
                run=run_id, op=OP, case=case, impl=variant.name,
                peer_scope="" if variant.name.startswith("ours-") else "same",
                shape=f"T={G * (P + R)};model={model};P={P};G={G};R={R}", dtype=dtype,
                ms_p20=p20, ms_p50=p50, ms_p80=p80, useful_flops=useful_flops(sizes, shape, case),
                bytes=0, peak_mb=peak, rel_err=error, gpu=machine.device_name(device),
                torch=torch.__version__, triton=machine.package_version("triton"), commit=commit,
                date=machine.utc_now(),
            )  # fmt: skip
            results.append_rows(out, [row])
            rows.append(row)
            memory = "" if peak is None else f", {peak / 1e3:.2f} GB"
            console.print(
                f"{case:7} {variant.name:28} {p50:9.1f} ms{memory}, error {error:.1e}",
                highlight=False, soft_wrap=True,
            )  # fmt: skip
    return rows


app = typer.Typer(add_completion=False)


@app.command()
def main(
    model: Annotated[str, typer.Option(help=f"One of {', '.join(MODELS)}.")] = "0.6b",
    case: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(CASES)}; all.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Updates that are timed.")] = 5,
    device: Annotated[str, typer.Option(help="cuda or cpu; cuda where there is one.")] = "auto",
    out: Annotated[Path | None, typer.Option(help="CSV file [bench/results/<device>.csv].")] = None,
    commit: Annotated[
        str | None, typer.Option(help="Commit to record where this is not a git checkout.")
    ] = None,
) -> None:
    """Compare log-probabilities and gradients, and time TRL, TRL with our ops, and TRL with Liger's
    layers.
    """
    unknown = [x for x in case or () if x not in CASES] + ([model] if model not in MODELS else [])
    device = machine.device_or_exit(device, unknown)
    try:
        run(
            model,
            device=device,
            out=out or results.RESULTS / f"{machine.slug(device)}.csv",
            cases=tuple(case or CASES),
            repeats=repeats,
            commit=commit,
        )
    except WrongResult as error:
        print(f"wrong result, so nothing more was timed: {error}", file=sys.stderr)
        raise typer.Exit(1) from None


if __name__ == "__main__":
    app()
