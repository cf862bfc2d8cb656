"""Long-context scoring beside transformers: ``python -m bench.long_context``.

Random weights at the true shapes are made on the card in seconds. A sweep over tokens, one prompt
with several answers, and weights streamed from host memory; seconds, memory and the time of every
part go to the results file, and a picture beside it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console

from bench import machine, registry, results, timing
from bench.gate import WrongResult
from bench.long_context_plot import draw, picture_path
from bench.registry import Unavailable
from bench.results import Row
from bench.run import Report
from bench.run import _measure as measure_point
from qlkernels.attention import choose_backend
from qlkernels.prefix_group import PackedGroups, pack_groups
from qlkernels.scorer import Decoder, NotEnoughMemory, Scorer
from qlkernels.scorer.weights import host_buffer

OP, PART_OP = "scorer", "scorer_part"
PEER = f"transformers-{transformers.__version__}"
PEER_HEAD_ROWS = 1024
_SHORT = {torch.bfloat16: "bf16", torch.float32: "fp32"}
CHECK_TOKENS, CHECK_LAYERS = 1024, 2
LONG = 65_536  # from here a pass is measured once

_QWEN3 = dict(
    head_dim=128, num_attention_heads=32, vocab_size=151_936, max_position_embeddings=262_144,
    rms_norm_eps=1e-6,
)  # fmt: skip
# name: config class, sizes, tokens of the sweep, (prompt, answers, answer tokens), dtype
MODELS: dict[str, tuple[str, dict[str, Any], list[int], tuple[int, int, int], torch.dtype]] = {
    "30b": (  # Qwen3-30B-A3B-Thinking-2507
        "Qwen3MoeConfig",
        dict(
            _QWEN3, hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768,
            num_hidden_layers=48, num_key_value_heads=4, num_experts=128, num_experts_per_tok=8,
            norm_topk_prob=True, tie_word_embeddings=False,
            rope_parameters={"rope_type": "default", "rope_theta": 1e7},
        ),
        [4096, 16_384, 32_768, 65_536, 120_000, 192_000],
        (120_000, 8, 2048),
        torch.bfloat16,
    ),
    "4b": (  # Qwen3-4B-Thinking-2507
        "Qwen3Config",
        dict(
            _QWEN3, hidden_size=2560, intermediate_size=9728, num_hidden_layers=36,
            num_key_value_heads=8, tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 5e6},
        ),
        [4096, 16_384, 32_768, 65_536, 120_000, 192_000],
        (120_000, 8, 2048),
        torch.bfloat16,
    ),
    "tiny": (
        "Qwen3MoeConfig",
        dict(
            hidden_size=64, intermediate_size=96, moe_intermediate_size=32, num_hidden_layers=3,
            num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=8,
            num_experts_per_tok=2, norm_topk_prob=True, vocab_size=512, tie_word_embeddings=False,
            max_position_embeddings=4096,
        ),
        [64, 256],
        (128, 4, 16),
        torch.float32,
    ),
}  # fmt: skip
CASES = ("resident", "transformers", "group", "streamed")

# --- the model -----------------------------------------------------------------


def make_config(name: str, layers: int | None) -> Any:
    kind, sizes, *_ = MODELS[name]
    return getattr(transformers, kind)(**sizes | ({"num_hidden_layers": layers} if layers else {}))


def random_model(config: Any, device: str, dtype: torch.dtype) -> torch.nn.Module:
    """Normal weights of deviation 0.02, norms of 1, made where they stay."""
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    model = model.to_empty(device=device).eval().requires_grad_(False)
    model.tie_weights()
    # the buffers of a meta model are empty
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    generator = torch.Generator(device).manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.fill_(1.0)
        else:
            parameter.normal_(std=0.02, generator=generator)
    return model


def random_ids(T: int, V: int, device: str) -> torch.Tensor:
    generator = torch.Generator("cpu").manual_seed(T)
    return torch.randint(V, (T,), generator=generator).to(device)


# --- transformers --------------------------------------------------------------


@torch.no_grad()
def peer_scores(
    model: torch.nn.Module, ids: torch.Tensor, last: int | None = None
) -> dict[str, torch.Tensor]:
    """One sequence through transformers' own forward, the head in chunks of rows: with all logits
    at once 4,096 tokens would be the end. Scores of the ``last`` tokens, of all where it is None.
    """
    x = model.model(input_ids=ids[None], use_cache=False).last_hidden_state[0]
    count = len(ids) - 1 if last is None else last
    x, targets = x[len(ids) - 1 - count : -1], ids[len(ids) - count :]
    logprobs, entropy = (torch.empty(count, device=ids.device) for _ in range(2))
    for start in range(0, count, PEER_HEAD_ROWS):
        rows = slice(start, min(count, start + PEER_HEAD_ROWS))
        logp = model.lm_head(x[rows]).float().log_softmax(dim=-1)
        logprobs[rows] = logp.gather(1, targets[rows, None]).squeeze(1)
        entropy[rows] = -(logp.exp() * logp).sum(dim=-1)
    return {"logprobs": logprobs, "entropy": entropy}


# --- correctness before speed --------------------------------------------------


def check(
    config: Any, device: str, dtype: torch.dtype, attention: Sequence[str]
) -> tuple[float, float]:
    """Scores of a model of two layers at the full width against transformers in fp32.

    Returns:
        The worst error in relation to the largest score, of ours and of transformers in ``dtype``.

    Raises:
        WrongResult: ours errs more than twice as much as transformers does in ``dtype``.
    """
    small = type(config)(**config.to_dict() | {"num_hidden_layers": CHECK_LAYERS})
    model = random_model(small, device, dtype)
    ids = random_ids(min(CHECK_TOKENS, small.max_position_embeddings), small.vocab_size, device)
    prompt, answer = ids[: len(ids) // 2], ids[len(ids) // 2 :]
    layout = pack_groups([prompt], [[answer, answer[:3]]])
    ours = {}
    for backend in attention:
        scorer = Scorer(model, attention=backend, chunk_tokens=len(ids) // 3)
        whole, shared = scorer.score(ids), scorer.score(layout)
        for name in ("logprobs", "entropy"):
            ours[f"{name}, {backend}"] = name, getattr(whole, name)[:-1]
            rows = getattr(shared, name)
            spread = torch.cat([rows[: len(prompt) - 1], layout.gather_answers(rows)[0]])
            ours[f"{name} of a group, {backend}"] = name, spread
    baseline = peer_scores(model, ids)
    model.set_experts_implementation("eager")  # grouped products want 16 bits
    truth = peer_scores(model.float(), ids)

    def relative(name: str, found: torch.Tensor) -> float:
        return float((found - truth[name]).abs().max() / truth[name].abs().max())

    worst = 0.0
    for label, (name, found) in ours.items():
        error = (found.double() - truth[name].double()).square().mean().sqrt()
        allowed = 2 * (baseline[name].double() - truth[name].double()).square().mean().sqrt() + 1e-5
        if not error <= allowed:
            raise WrongResult(f"{label}: rms error {error:.2e}, transformers allows {allowed:.2e}")
        worst = max(worst, relative(name, found))
    return worst, max(relative(name, found) for name, found in baseline.items())


# --- measuring -----------------------------------------------------------------


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True)


class Parts:
    """Time between the marks of a pass, by part."""

    def __init__(self, device: str):
        self._on_gpu = device == "cuda"
        self._marks: list[tuple[str, Any]] = []

    def __call__(self, part: str) -> None:
        if self._on_gpu:
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = time.perf_counter()
        self._marks.append((part, now))

    def milliseconds(self) -> dict[str, float]:
        """After the last mark, which ends the part before it."""
        found: dict[str, float] = {}
        for (part, start), (_, stop) in zip(self._marks[:-1], self._marks[1:], strict=True):
            ms = start.elapsed_time(stop) if self._on_gpu else 1e3 * (stop - start)
            found[part] = found.get(part, 0.0) + ms
        return found


@dataclasses.dataclass
class Measured:
    ms: list[float]
    peak_mb: float | None
    parts: dict[str, float]


def measure(
    call: Callable[[], object],
    scorer: Scorer | None,
    device: str,
    repeats: int = 1,
    *,
    whole_memory: bool = False,
) -> Measured:
    """Time ``call``, without a warm-up. The parts are of its last run; the memory is beyond what
    was there before, or all of it.
    """
    samples, parts = [], {}
    before = 0
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.synchronize()
        before = 0 if whole_memory else torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    for _ in range(repeats):
        marks = Parts(device)
        if scorer is not None:
            scorer.on_part = marks
        watch = Parts(device)
        watch("all")
        call()
        watch("")
        marks("")
        if device == "cuda":
            torch.cuda.synchronize()
        samples.append(watch.milliseconds()["all"])
        parts = marks.milliseconds()
    if scorer is not None:
        scorer.on_part = lambda _part: None
    peak = (torch.cuda.max_memory_allocated() - before) / 1e6 if device == "cuda" else None
    return Measured(samples, peak, parts)


@dataclasses.dataclass
class Session:
    """One invocation: what every row shares, and where rows go."""

    report: Report
    model: str
    layers: int
    device: str
    dtype: str
    out: Path
    rel_err: tuple[float, float]  # of ours, of transformers
    console: Console

    def add(
        self,
        case: str,
        impl: str,
        measured: Measured,
        shape: str,
        flops: dict[str, int],
        moved: int,
    ) -> None:
        """Append the row of a pass and those of its parts."""
        timed = timing.Timing(tuple(measured.ms))
        p20, p50, p80 = (timed.percentile(q) for q in (20, 50, 80))
        is_ours = impl.startswith("ours-")
        whole = Row(
            run=self.report.run, op=OP, case=case, impl=impl,
            peer_scope="" if is_ours else "same",
            shape=f"model={self.model};layers={self.layers};{shape}", dtype=self.dtype,
            ms_p20=p20, ms_p50=p50, ms_p80=p80, useful_flops=sum(flops.values()), bytes=moved,
            peak_mb=measured.peak_mb, rel_err=self.rel_err[0 if is_ours else 1],
            gpu=machine.device_name(self.device), torch=torch.__version__,
            triton=machine.package_version("triton"), commit=self.report.commit,
            date=machine.utc_now(),
        )  # fmt: skip
        rows = [whole]
        for part, ms in measured.parts.items():
            rows.append(
                dataclasses.replace(
                    whole, op=PART_OP, case=f"{case}/{part}", ms_p20=ms, ms_p50=ms, ms_p80=ms,
                    useful_flops=flops.get(part, 0), bytes=0, peak_mb=None,
                )
            )  # fmt: skip
        results.append_rows(self.out, rows)
        self.report.rows += rows
        self._print(whole, rows[1:])

    def _print(self, row: Row, parts: list[Row]) -> None:
        tokens, seconds = int(row.size("T")), row.ms_p50 / 1e3
        memory = "" if row.peak_mb is None else f", {row.peak_mb / 1e3:.2f} GB beside the weights"
        _say(
            self.console,
            f"{row.case:9} {row.impl:24} T={tokens:,}: {seconds:.4g} s, {tokens / seconds:,.0f} "
            f"tokens/s, {row.useful_flops / row.ms_p50 * 1e-9:.4g} TFLOP/s{memory}",
        )
        for part in sorted(parts, key=lambda r: -r.ms_p50):
            rate = f", {part.useful_flops / part.ms_p50 * 1e-9:.4g} TFLOP/s"
            name = part.case.partition("/")[2]
            _say(
                self.console,
                f"          {name:12} {part.ms_p50:10.2f} ms{rate if part.useful_flops else ''}",
            )


def weight_bytes(decoder: Decoder, dtype: torch.dtype) -> int:
    return decoder.num_weights() * dtype.itemsize


def sweep(
    session: Session,
    model: torch.nn.Module,
    tokens: Sequence[int],
    attention: Sequence[str],
    cases: Sequence[str],
    repeats: int,
) -> None:
    """Every length, ours with every attention backend and transformers."""
    scorers = {name: Scorer(model, attention=name) for name in attention}
    decoder = Decoder.of_config(model.config)
    moved = weight_bytes(decoder, model.dtype)
    for T in tokens:
        ids = random_ids(T, decoder.V, session.device)
        flops = decoder.flops([T], T - 1)
        shape = f"T={T};weights_mb={moved / 1e6:.0f}"
        times = repeats if T < LONG else 1
        for name, scorer in scorers.items() if "resident" in cases else ():
            with _fits(session, f"ours-{name} at T={T}"):
                _warm(scorer, ids)
                measured = measure(
                    lambda s=scorer, x=ids: s.score(x), scorer, session.device, times
                )
                session.add("resident", f"ours-{name}", measured, shape, flops, moved)
        if "transformers" in cases:
            with _fits(session, f"{PEER} at T={T}"):
                _warm_peer(model, ids)
                measured = measure(lambda x=ids: peer_scores(model, x), None, session.device, times)
                session.add("resident", PEER, measured, shape, flops, moved)


class _Enough(Exception):
    """Stops a pass that only makes kernels and plans."""


def _stop(_done: int, _layers: int) -> None:
    raise _Enough


def _warm(scorer: Scorer, inputs: torch.Tensor | PackedGroups) -> None:
    """The first layers of a pass, so that kernels and plans of its shapes are not timed."""
    with contextlib.suppress(_Enough):
        scorer.score(inputs, on_layer=_stop)
    scorer.score(random_ids(64, scorer.decoder.V, str(scorer.device)))  # the head


def _warm_peer(model: torch.nn.Module, ids: torch.Tensor) -> None:
    """One layer of transformers' own forward."""
    layers = model.config.num_hidden_layers
    model.config.num_hidden_layers = 1
    try:
        peer_scores(model, ids)
    finally:
        model.config.num_hidden_layers = layers


@contextlib.contextmanager
def _fits(session: Session, what: str) -> Iterator[None]:
    try:
        yield
    except (torch.OutOfMemoryError, NotEnoughMemory):
        _say(session.console, f"{what}: out of memory")
    if session.device == "cuda":
        torch.cuda.empty_cache()


def group_layout(sizes: tuple[int, int, int], V: int, device: str) -> PackedGroups:
    P, G, R = sizes
    ids = random_ids(P + G * R, V, device)
    return pack_groups([ids[:P]], [list(ids[P:].split(R))])


def group_flops(decoder: Decoder, P: int, G: int, R: int) -> dict[str, int]:
    """Of the shared layout: its rows, the pairs that they see, the answers in the head."""
    rows = P - 1 + G * R
    flops = decoder.flops([rows], G * R)
    pairs = (P - 1) * P // 2 + G * (R * (P - 1) + R * (R + 1) // 2)
    return flops | {"attention": decoder.layers * 4 * decoder.heads * decoder.head_dim * pairs}


def group(
    session: Session,
    model: torch.nn.Module,
    sizes: tuple[int, int, int],
    attention: Sequence[str],
    cases: Sequence[str],
) -> None:
    """One prompt with G answers, all answers scored; transformers reads G full sequences, of which
    one is measured.
    """
    P, G, R = sizes
    decoder = Decoder.of_config(model.config)
    moved = weight_bytes(decoder, model.dtype)
    shape = f"P={P};G={G};R={R};weights_mb={moved / 1e6:.0f}"
    layout = group_layout(sizes, decoder.V, session.device)
    T = len(layout.input_ids)
    for name in attention:
        scorer = Scorer(model, attention=name)
        with _fits(session, f"ours-{name}, a group"):
            _warm(scorer, layout)
            measured = measure(
                lambda s=scorer: s.score(layout, positions="answers"), scorer, session.device
            )
            flops = group_flops(decoder, *sizes)
            session.add("group", f"ours-{name}", measured, f"T={T};{shape}", flops, moved)
    if "transformers" in cases:
        T = P + R
        ids = random_ids(T, decoder.V, session.device)
        with _fits(session, f"{PEER} at T={T}"):
            _warm_peer(model, ids)
            measured = measure(lambda: peer_scores(model, ids, R), None, session.device)
            measured.ms = [G * ms for ms in measured.ms]
            flops = decoder.flops([T] * G, G * R)
            shape = f"T={G * T};{shape};measured=1ofG"
            session.add("group", PEER, measured, shape, flops, moved)


def streamed(session: Session, model: torch.nn.Module, T: int, attention: Sequence[str]) -> None:
    """The model moves to host memory; then the same pass with two layers on the card."""
    started = time.perf_counter()
    scorer = Scorer(model, stream_weights=True, device=session.device)
    seconds = time.perf_counter() - started
    rate = copy_rate() if session.device == "cuda" else 0.0
    _say(
        session.console,
        f"moved to host memory in {seconds:.1f} s; {rate:.1f} GB/s to the card",
    )
    ids = random_ids(T, scorer.decoder.V, session.device)
    flops, moved = scorer.decoder.flops([T], T - 1), weight_bytes(scorer.decoder, model.dtype)
    for name in attention:
        scorer.use_attention(name)
        _warm(scorer, ids)
        measured = measure(lambda: scorer.score(ids), scorer, session.device, whole_memory=True)
        shape = f"T={T};weights_mb=0;h2d_gbs={rate:.1f}"
        session.add("streamed", f"ours-{name}", measured, shape, flops, moved)


def copy_rate() -> float:
    """GB/s of page-locked memory to the card, the median of five copies of 1 GB."""
    device = torch.device("cuda")
    host = host_buffer(1 << 30, device)
    there, rates = torch.empty_like(host, device=device), []
    for _ in range(5):
        watch = Parts("cuda")
        watch("copy")
        there.copy_(host, non_blocking=True)
        watch("")
        torch.cuda.synchronize()
        rates.append(host.numel() / watch.milliseconds()["copy"] / 1e6)
    return sorted(rates)[2]


# --- command line ----------------------------------------------------------------


def run(
    model: str,
    *,
    device: str,
    out: Path,
    tokens: Sequence[int] | None = None,
    group_sizes: tuple[int, int, int] | None = None,
    layers: int | None = None,
    cases: Sequence[str] = CASES,
    attention: Sequence[str] = ("auto",),
    repeats: int = 3,
    commit: str | None = None,
    console: Console | None = None,
) -> Report:
    """Measure and append to ``out``; the picture is drawn beside it."""
    console = console or Console()
    *_, swept, one_group, dtype = MODELS[model]
    tokens, sizes = tokens or swept, group_sizes or one_group
    config = make_config(model, layers)
    report = Report(machine.new_run_id(), machine.git_commit() if commit is None else commit)
    results.append_rows(out, [])
    attention = [choose_backend(device, dtype, config.head_dim, backend=name) for name in attention]
    rel_err = check(config, device, dtype, attention)
    _say(
        console, f"checked: worst relative error {rel_err[0]:.1e}, of transformers {rel_err[1]:.1e}"
    )
    _free(device)
    _ceilings(report, device, out, console)
    started = time.perf_counter()
    held = random_model(config, device, dtype)
    session = Session(
        report, model, config.num_hidden_layers, device, _SHORT[dtype], out, rel_err, console,
    )  # fmt: skip
    if device == "cuda":
        torch.cuda.synchronize()
    _say(console, f"model made in {time.perf_counter() - started:.1f} s")
    sweep(session, held, tokens, attention, cases, repeats)
    if "group" in cases:
        group(session, held, sizes, attention, cases)
    if "streamed" in cases:
        streamed(session, held, sizes[0], attention)
    picture = draw(report.rows, picture_path(out, model))
    _say(console, f"run {report.run}: {len(report.rows)} rows -> {out}, {picture}")
    return report


def _free(device: str) -> None:
    if device == "cuda":
        torch.cuda.empty_cache()


def _ceilings(report: Report, device: str, out: Path, console: Console) -> None:
    """Copy and matrix product of this machine, in the same run."""
    clock = timing.clock_for(device)
    for point in registry.select(["ceiling"], device, quick=True):
        try:
            rows = measure_point(point, device, (), 1.0, clock, report, console)
        except Unavailable:
            continue
        results.append_rows(out, rows)
        report.rows += rows
    _free(device)


app = typer.Typer(add_completion=False)


@app.command()
def main(
    model: Annotated[str, typer.Option(help=f"One of {', '.join(MODELS)}.")] = "30b",
    tokens: Annotated[
        list[int] | None, typer.Option(help="Lengths of the sweep; may be given several times.")
    ] = None,
    group_sizes: Annotated[
        tuple[int, int, int] | None,
        typer.Option("--group", help="Prompt tokens, answers, tokens of an answer."),
    ] = None,
    layers: Annotated[int | None, typer.Option(help="Fewer layers than the model has.")] = None,
    case: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(CASES)}; all.")] = None,
    attention: Annotated[
        list[str] | None, typer.Option(help="Backends to measure; the fastest that runs.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Passes below 65,536 tokens.")] = 3,
    device: Annotated[str, typer.Option(help="cuda or cpu; cuda where there is one.")] = "auto",
    out: Annotated[Path | None, typer.Option(help="CSV file [bench/results/<device>.csv].")] = None,
    commit: Annotated[
        str | None, typer.Option(help="Commit to record where this is not a git checkout.")
    ] = None,
) -> None:
    """Check, measure, append to the results file of this device, draw."""
    unknown = [x for x in case or () if x not in CASES] + ([model] if model not in MODELS else [])
    device = machine.device_or_exit(device, unknown)
    try:
        run(
            model,
            device=device,
            out=out or results.RESULTS / f"{machine.slug(device)}.csv",
            tokens=tokens,
            group_sizes=group_sizes,
            layers=layers,
            cases=case or CASES,
            attention=attention or ["auto"],
            repeats=repeats,
            commit=commit,
        )
    except WrongResult as error:
        print(f"wrong result, so nothing was timed: {error}", file=sys.stderr)
        raise typer.Exit(1) from None


if __name__ == "__main__":
    app()
