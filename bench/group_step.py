"""A GRPO update of one long prompt with G answers: ``python -m bench.group_step``.

The group through the trainer's policy, which reads the prompt once, beside transformers with TRL's
chunked head on G full sequences, one at a time or all at once. Layers of the true width with random
weights. Timed is a whole update: forward, loss, backward, clipping, AdamW; every variant has bf16
weights, gradients that stay allocated, fused AdamW and gradient checkpointing. The memory is what
an update needs beside weights, gradients and optimizer.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console

from bench import machine, peers, results, timing
from bench.gate import WrongResult
from bench.long_context import make_config, random_ids, random_model
from bench.results import Row
from bench.trl_step import measure
from qlkernels import hf
from qlkernels.prefix_group import pack_groups
from qwenlong.policy import LossInputs, PackedPolicy

OP = "group_step"
LEARNING_RATE = 1e-6
EPS = {"eps_low": 0.2, "eps_high": 0.28}
# model, layers, (prompt, answers, answer tokens) and whether activations go to the host
CASES: dict[str, tuple[str, int, tuple[int, int, int], bool]] = {
    "32k": ("30b", 6, (32_768, 8, 1024), False),
    "120k": ("30b", 6, (120_000, 8, 1024), False),
    "120k-offload": ("30b", 6, (120_000, 8, 1024), True),
    "tiny": ("tiny", 2, (48, 4, 8), False),
}
CHECK = (384, 4, 32)  # of the model's first two layers, at the full width
CHECK_LAYERS = 2

Update = Callable[[], dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Group:
    prompt: torch.Tensor  # [P]
    answers: list[torch.Tensor]  # G of [R]
    advantages: torch.Tensor  # [G]

    @property
    def weight(self) -> float:
        """Of a token in the mean over the group (arXiv 2512.12967, eq. 4)."""
        return 1.0 / sum(len(answer) for answer in self.answers)


def make_group(shape: tuple[int, int, int], vocab: int, device: str) -> Group:
    P, G, R = shape
    ids = random_ids(P + G * R, vocab, device)
    advantages = torch.linspace(-1.0, 1.0, G, device=device)
    return Group(ids[:P], list(ids[P:].split(R)), advantages)


# --- the two ways to a gradient --------------------------------------------------


def shared_prefix(model: torch.nn.Module, group: Group, *, offload: bool = False) -> Update:
    """P + G R rows in one pass, with the trainer's policy and our ops in the layers."""
    hf.apply(model, lm_head=False)
    policy = PackedPolicy(model, 1.0, offload_activations=offload)
    layout = pack_groups([group.prompt], [group.answers]).to(group.prompt.device)
    weights = torch.full_like(group.advantages, group.weight)
    keep = torch.ones_like(group.advantages, dtype=torch.bool)
    inputs = LossInputs(group.advantages, keep, weights, None, *EPS.values())

    def call() -> dict[str, torch.Tensor]:
        result = policy(layout, inputs)
        result.loss.backward()
        rows = layout.answer_rows
        return {"logprobs": result.scores.logprobs[rows], "entropy": result.scores.entropy[rows]}

    return call


def full_sequences(model: torch.nn.Module, group: Group, *, together: bool) -> Update:
    """G (P + R) rows through transformers' own layers; the head of TRL on the answers' rows."""
    found, _, absent = peers.find("linear_logprob", group.prompt.device.type, backward=True)
    name = next((name for name in found if name.startswith("trl")), None)
    if name is None:
        reason = next(reason for name, reason in absent.items() if name.startswith("trl"))
        raise WrongResult(f"the head of TRL cannot run: {reason}")
    head = found[name]
    sequences = torch.stack([torch.cat([group.prompt, answer]) for answer in group.answers])
    G, P = len(group.answers), len(group.prompt)
    targets = sequences[:, P:]

    def call() -> dict[str, torch.Tensor]:
        parts = []
        for first in range(0, G, G if together else 1):
            rows = slice(first, G if together else first + 1)
            out = model.model(input_ids=sequences[rows], use_cache=False).last_hidden_state
            hidden = out[:, P - 1 : -1].reshape(-1, out.shape[-1])
            scores = head(hidden, model.lm_head.weight, targets[rows].reshape(-1), None)
            logprobs = scores["logprobs"]
            advantages = group.advantages[rows].repeat_interleave(targets.shape[1])
            ratio = torch.exp(logprobs - logprobs.detach())
            (-(ratio * advantages).sum() * group.weight).backward()
            parts.append({name: x.detach() for name, x in scores.items()})
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    return call


def variants(offload: bool) -> dict[str, Callable[[torch.nn.Module, Group], Update]]:
    """By name, without what only the names of installed packages add; ours first."""
    if offload:
        return {"ours-group": lambda m, g: shared_prefix(m, g, offload=True)}
    peer = f"transformers-{transformers.__version__}+trl-head"
    return {
        "ours-group": shared_prefix,
        f"{peer}, micro-batch 1": lambda m, g: full_sequences(m, g, together=False),
        f"{peer}, micro-batch G": lambda m, g: full_sequences(m, g, together=True),
    }


def training_model(config: Any, device: str, dtype: torch.dtype) -> torch.nn.Module:
    model = random_model(config, device, dtype).train().requires_grad_(True)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


# --- correctness before speed ------------------------------------------------------


def check(name: str, device: str, dtype: torch.dtype) -> dict[str, float]:
    """The gradient of all weights of a small group against transformers in fp32, eager experts.

    Returns:
        Each variant's relative error: norm of the difference over the norm of the gradient.

    Raises:
        WrongResult: ours errs more than twice as much as transformers does in ``dtype``.
    """
    config = make_config(name, CHECK_LAYERS)
    group = make_group(CHECK, config.vocab_size, device)

    def gradient(make: Callable, *, truth: bool) -> dict[str, torch.Tensor]:
        model = training_model(config, device, dtype)
        if truth:
            model.set_experts_implementation("eager")
            model.float()
        make(model, group)()
        return {name: p.grad.float() for name, p in model.named_parameters()}

    peer = f"transformers-{transformers.__version__}+trl-head, micro-batch 1"
    made = variants(offload=False)
    exact = gradient(made[peer], truth=True)
    size = sum(g.square().sum() for g in exact.values()).sqrt()
    errors = {}
    for label, make in made.items():
        found = gradient(make, truth=False)
        off = sum((found[name] - g).square().sum() for name, g in exact.items()).sqrt()
        errors[label] = float(off / size)
        del found
        _free(device)
    if not errors["ours-group"] <= 2 * errors[peer] + 1e-5:
        raise WrongResult(
            f"the gradient is off by {errors['ours-group']:.2e}, that of transformers by "
            f"{errors[peer]:.2e}"
        )
    return errors


def useful_flops(config: Any, shape: tuple[int, int, int]) -> int:
    """Of one update without recomputation, every shared row once: 6 a weight and row, the head on
    answer rows, 12 a pair of attention and head dimension.
    """
    P, G, R = shape
    H, D = config.hidden_size, config.head_dim
    heads = config.num_attention_heads + config.num_key_value_heads
    experts = 3 * config.num_experts_per_tok * config.moe_intermediate_size + config.num_experts
    weights = H * (2 * heads * D + experts)
    pairs = P * (P + 1) // 2 + G * (R * P + R * (R + 1) // 2)
    attention = 12 * config.num_attention_heads * D * pairs
    layers = config.num_hidden_layers * (6 * (P + G * R) * weights + attention)
    return layers + 6 * G * R * H * config.vocab_size


def _free(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def run(
    case: str,
    *,
    device: str,
    out: Path,
    layers: int | None = None,
    repeats: int = 3,
    only_ours: bool = False,
    commit: str | None = None,
    console: Console | None = None,
) -> list[Row]:
    """Check the gradients, then time the updates of ``case`` and append the rows to ``out``.

    Raises:
        WrongResult: a gradient or the scores of a variant are wrong.
    """
    console = console or Console()
    name, default_layers, shape, offload = CASES[case]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    run_id, commit = machine.new_run_id(), machine.git_commit() if commit is None else commit
    errors = check(name, device, dtype)
    config = make_config(name, layers or default_layers)
    group = make_group(shape, config.vocab_size, device)
    (P, G, R), n_layers = shape, config.num_hidden_layers
    rows: list[Row] = []
    for label, make in variants(offload).items():
        if only_ours and not label.startswith("ours-"):
            continue
        model = training_model(config, device, dtype)
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=device == "cuda")
        update = make(model, group)

        def call(update=update, model=model, optimizer=optimizer) -> None:
            update()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)

        try:
            samples, peak = measure(call, repeats, device)
        except torch.OutOfMemoryError:
            _say(console, f"{case:12} {label}: does not fit")
            samples = None
        del call, update, optimizer, model
        _free(device)
        if samples is None:
            continue
        timed = timing.Timing(tuple(samples))
        p20, p50, p80 = (timed.percentile(q) for q in (20, 50, 80))
        is_ours = label.startswith("ours-")
        row = Row(
            run=run_id, op=OP, case=case, impl=label, peer_scope="" if is_ours else "same",
            shape=f"T={G * (P + R)};model={name};layers={n_layers};P={P};G={G};R={R}",
            dtype="bf16" if dtype == torch.bfloat16 else "fp32", ms_p20=p20, ms_p50=p50,
            ms_p80=p80, useful_flops=useful_flops(config, shape), bytes=0, peak_mb=peak,
            rel_err=errors[label], gpu=machine.device_name(device), torch=torch.__version__,
            triton=machine.package_version("triton"), commit=commit, date=machine.utc_now(),
        )  # fmt: skip
        results.append_rows(out, [row])
        rows.append(row)
        memory = "" if peak is None else f", {peak / 1e3:.2f} GB"
        _say(
            console,
            f"{case:12} {label}: {p50 / 1e3:.3f} s, {G * (P + R) / p50 * 1e3:,.0f} tokens/s"
            f"{memory}, gradient off by {errors[label]:.1e}",
        )
    return rows


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True)


app = typer.Typer(add_completion=False)


@app.command()
def main(
    case: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(CASES)}.")] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="In place of the case's.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Updates that are timed.")] = 3,
    only_ours: Annotated[bool, typer.Option("--only-ours", help="No peers.")] = False,
    device: Annotated[str, typer.Option(help="cuda or cpu; cuda where there is one.")] = "auto",
    out: Annotated[Path | None, typer.Option(help="CSV file [bench/results/<device>.csv].")] = None,
    commit: Annotated[
        str | None, typer.Option(help="Commit to record where this is not a git checkout.")
    ] = None,
) -> None:
    """Check gradients, then time an update of one group with and without its prompt shared."""
    device = machine.device_or_exit(device, [x for x in case or () if x not in CASES])
    try:
        for name in case or [x for x in CASES if x != "tiny"]:
            run(
                name, device=device, out=out or results.RESULTS / f"{machine.slug(device)}.csv",
                layers=layers, repeats=repeats, only_ours=only_ours, commit=commit,
            )  # fmt: skip
    except WrongResult as error:
        print(f"wrong result, so nothing more was timed: {error}", file=sys.stderr)
        raise typer.Exit(1) from None


if __name__ == "__main__":
    app()
