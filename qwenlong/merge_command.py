"""``qwenlong merge``: SCE over whole checkpoints, a shard at a time.

The result is made in ``.NAME.partial`` beside ``--out`` and renamed when it is complete. A run that
is killed leaves that folder, and the same command goes on after its last complete shard; a run that
fails, out of disk included, removes it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from qwenlong.errors import InputError
from qwenlong.merge import VARIANTS, DeltaSlices, TensorStats, check_options, merge_slices
from qwenlong.merge_files import (
    FLOATS,
    Checkpoint,
    check_mergeable,
    check_same_layout,
    differing_side_files,
    equal_values,
    fingerprint,
    open_checkpoint,
    plan_shards,
    same_tensors,
    side_files,
    write_header,
    write_index,
)
from qwenlong.merge_plot import draw_weights
from qwenlong.storage import (
    LOCK_NAME,
    JsonlAppender,
    atomic_write,
    lock_folder,
    read_jsonl,
    write_json,
)

_SPARE_BYTES = 64_000_000  # for config, tokenizer, journal and picture, when room is checked


@dataclass(frozen=True)
class MergeSettings:
    """What a merge was asked for; goes into merge.json."""

    base: str
    experts: tuple[str, ...]
    select_topk: float = 1.0
    variant: str = "authors"
    max_shard_bytes: int = 5_000_000_000
    memory_bytes: int = 8_000_000_000  # of one tensor of all models; a larger one is read in parts

    def __post_init__(self) -> None:
        try:
            check_options(self.select_topk, self.variant)
        except ValueError as error:
            raise InputError(f"{error}.") from error
        for name in ("max_shard_bytes", "memory_bytes"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 1.")


def open_models(settings: MergeSettings) -> tuple[Checkpoint, list[Checkpoint]]:
    """The base and the experts, checked to be different models of one form.

    Raises:
        InputError: fewer than two experts, two models that are the same, other tensors.
    """
    if len(settings.experts) < 2:
        raise InputError(
            f"a merge needs at least two experts, got {len(settings.experts)}: the variance over "
            "one model is 0, so that nothing is selected and the base comes back (or, with nothing "
            "to select, the expert); the base must be a model that all experts were trained from."
        )
    base = open_checkpoint(settings.base)
    experts = [open_checkpoint(folder) for folder in settings.experts]
    check_mergeable(base)
    for expert in experts:
        check_same_layout(base, expert)
    models = [base, *experts]
    for j, later in enumerate(models):
        for earlier in models[:j]:
            if same_tensors(earlier, later):
                why = (
                    "its weight in every tensor would be 0, and the merge would be one of the "
                    "other experts; the base must be a model that all experts were trained from"
                    if earlier is base
                    else "merging a model with itself changes nothing"
                )
                raise InputError(f"{later.folder} has the same weights as {earlier.folder}: {why}.")
    return base, experts


def merge_checkpoints(
    settings: MergeSettings, out: Path, on_bytes: Callable[[str, int], None] | None = None
) -> dict[str, Any]:
    """Merge, and write the model, ``merge.json`` and ``merge.png`` to the new folder ``out``.

    Args:
        settings: models and options.
        out: must not exist, or be empty.
        on_bytes: called with a tensor's name and the bytes of it that were written.

    Returns:
        The content of merge.json.

    Raises:
        InputError: models that cannot be merged, no room, ``out`` in use.
    """
    on_bytes = on_bytes or (lambda name, count: None)
    out = out.resolve()
    _check_free(out)
    base, experts = open_models(settings)
    plan = plan_shards(base.entries, settings.max_shard_bytes)
    job = {
        "settings": asdict(settings) | {"experts": list(settings.experts)},
        "files": [fingerprint(model) for model in (base, *experts)],
    }
    with _partial_folder(out) as partial:
        try:
            stats = _write_shards(job, base, experts, plan, settings, partial, on_bytes)
            write_index(partial, base.entries, plan)
            for name in side_files(base.folder):
                (partial / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(base.folder / name, partial / name)
            report = _report(job, base, experts, plan, stats)
            write_json(partial / "merge.json", report)
            with atomic_write(partial / "merge.png", "wb") as file:
                title = f"SCE weights over {base.folder.resolve().name}"
                draw_weights(file, stats, _labels(settings.experts), title)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise InputError(
                    f"{out.parent} is full; the merged model takes {_gb(_total(base))}. "
                    "Nothing was left behind."
                ) from error
            raise
    return report


def _total(base: Checkpoint) -> int:
    return sum(entry.nbytes for entry in base.entries.values())


def _labels(experts: Sequence[str]) -> list[str]:
    """Short names of the experts, the whole paths where two folders have one name."""
    names = [Path(expert).resolve().name for expert in experts]
    return names if len(set(names)) == len(names) else list(experts)


def _gb(count: int) -> str:
    return f"{count / 1e9:.3g} GB"


@contextlib.contextmanager
def _partial_folder(out: Path) -> Iterator[Path]:
    """A folder that only this process writes; becomes ``out`` at the end.

    The lock goes with the process, so that a killed run's folder can be taken over.
    """
    partial = out.with_name(f".{out.name}.partial")
    with lock_folder(partial):
        _check_free(out)  # the process that had the lock before may have made it
        try:
            yield partial
            (partial / "journal.jsonl").unlink()
            try:
                os.replace(partial, out)
            except OSError as error:
                raise InputError(f"{out} cannot be written: {error.strerror}.") from error
        except Exception:  # not KeyboardInterrupt: an interrupted merge goes on
            shutil.rmtree(partial)
            raise
        (out / LOCK_NAME).unlink()


def _check_free(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists and is not empty; remove it or choose another --out.")


def _write_shards(
    job: dict,
    base: Checkpoint,
    experts: list[Checkpoint],
    plan: dict[str, list[str]],
    settings: MergeSettings,
    partial: Path,
    on_bytes: Callable[[str, int], None],
) -> dict[str, TensorStats]:
    """Write the shards that are not there yet; the statistics of all merged tensors."""
    stats: dict[str, TensorStats] = {}
    done = _resume(job, partial)
    for shard in [shard for shard in plan if shard in done]:
        stats |= {name: TensorStats(**values) for name, values in done[shard].items()}
        for name in plan[shard]:
            on_bytes(name, base.entries[name].nbytes)
    todo = [shard for shard in plan if shard not in done]
    need = sum(base.entries[name].nbytes for shard in todo for name in plan[shard])
    free = shutil.disk_usage(partial).free
    if free < need + _SPARE_BYTES:
        raise InputError(
            f"{partial.parent} has {_gb(free)} free; {_gb(need + _SPARE_BYTES)} are needed."
        )
    with JsonlAppender(partial / "journal.jsonl") as journal:
        if not done:
            journal.append(job)
        for shard in todo:
            with atomic_write(partial / shard, "wb") as file:
                found = {}
                for name in write_header(file, base.entries, plan[shard]):
                    written = _merge_tensor(name, base, experts, settings, file, on_bytes)
                    if written is not None:
                        found[name] = written
            journal.append({"shard": shard, "tensors": {n: s._asdict() for n, s in found.items()}})
            journal.sync()
            stats |= found
    return {name: stats[name] for names in plan.values() for name in names if name in stats}


def _resume(job: dict, partial: Path) -> dict[str, dict]:
    """The shards that an interrupted run of the same job completed; anything else is removed."""
    journal = partial / "journal.jsonl"
    rows: list[dict] = []
    if journal.exists():
        with contextlib.suppress(ValueError):  # a damaged journal: start again
            rows = list(read_jsonl(journal))
    done = {}
    if rows and rows[0] == job:
        done = {row["shard"]: row["tensors"] for row in rows[1:]}
    keep = {LOCK_NAME, *done, *(["journal.jsonl"] if done else [])}
    for path in partial.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in keep:
            path.unlink()
    return done


def _merge_tensor(
    name: str,
    base: Checkpoint,
    experts: list[Checkpoint],
    settings: MergeSettings,
    file: Any,
    on_bytes: Callable[[str, int], None],
) -> TensorStats | None:
    """Append one tensor's data to ``file``; None for a tensor that is not merged but equal."""
    models = [base, *experts]
    entry = base.entries[name]
    total = base.elements(name)
    if entry.dtype not in FLOATS:
        for expert in experts:
            if not equal_values(base, name, expert, name):
                raise InputError(
                    f"{name} ({entry.describe()}) of {expert.folder} differs from the base; values "
                    "that are no floats cannot be merged (quantised weights: convert them first)."
                )
        for start in range(0, total, settings.memory_bytes):
            part = base.read(name, start, min(total, start + settings.memory_bytes))
            file.write(memoryview(part.numpy()))
            on_bytes(name, len(part))
        return None
    dtype = FLOATS[entry.dtype]

    def write(values: torch.Tensor) -> None:
        data = values.to(dtype).view(torch.uint8)
        file.write(memoryview(data.numpy()))
        on_bytes(name, len(data))

    slices = DeltaSlices(
        lambda start, stop: [model.read(name, start, stop) for model in models],
        total,
        # Half of it: the next window is read while the arithmetic holds the last.
        settings.memory_bytes // (2 * dtype.itemsize * len(models)),
    )
    try:
        return merge_slices(
            slices,
            len(experts),
            write,
            select_topk=settings.select_topk,
            variant=settings.variant,
        )
    except ValueError as error:
        raise InputError(f"{name}: {error} (expert 1 is {experts[0].folder}).") from error


def _report(
    job: dict,
    base: Checkpoint,
    experts: list[Checkpoint],
    plan: dict[str, list[str]],
    stats: dict[str, TensorStats],
) -> dict[str, Any]:
    sizes = {name: base.entries[name].numel for name in stats}
    moved = [name for name, found in stats.items() if not found.uniform]
    weighed = sum(sizes[name] for name in moved)
    return {
        **job,
        "versions": {
            "qlkernels": version("qlkernels"),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "side_files_from": str(base.folder),
        "side_files_that_differ": {
            str(expert.folder): differing_side_files(base.folder, expert.folder)
            for expert in experts
        },
        "shards": list(plan),
        "parameters": sum(entry.numel for entry in base.entries.values()),
        "summary": {
            "tensors": len(stats),
            "uniform_tensors": len(stats) - len(moved),
            # over the tensors that differ, each counted by its size
            "mean_weights": [
                sum(stats[name].weights[j] * sizes[name] for name in moved) / max(1, weighed)
                for j in range(len(experts))
            ],
            "conflicts": sum(found.conflicts for found in stats.values()),
            "unchanged": sum(found.unchanged for found in stats.values()),
        },
        "tensors": {name: found._asdict() for name, found in stats.items()},
    }


def _print_summary(console: Console, report: dict, out: Path) -> None:
    summary, parameters = report["summary"], report["parameters"]
    labels = _labels(report["settings"]["experts"])
    shares = ", ".join(
        f"{label} {weight:.3f}"
        for label, weight in zip(labels, summary["mean_weights"], strict=True)
    )
    rows = {
        "parameters": f"{parameters:,} in {summary['tensors']:,} tensors",
        "mean weights": shares,
        "conflicts": f"{summary['conflicts'] / parameters:.2%} of the elements",
        "as in the base": f"{summary['unchanged'] / parameters:.2%} of the elements",
        "model": str(out),
        "report": str(out / "merge.json"),
        "picture": str(out / "merge.png"),
    }
    for name, value in rows.items():
        console.print(f"{name:>16}  {value}", markup=False, highlight=False, soft_wrap=True)
    for expert, names in report["side_files_that_differ"].items():
        if names:
            console.print(
                f"note: {', '.join(names)} of {expert} differ from the base's, which were copied.",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )


def merge(
    base: Annotated[
        Path, typer.Option(help="Folder of the model that all experts were trained from.")
    ],
    experts: Annotated[list[Path], typer.Option(help="Folders of the models to merge.")],
    out: Annotated[Path, typer.Option(help="New folder for the merged model.")],
    more_experts: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[EXPERT]...",
            help="More experts: --experts A B is --experts A --experts B.",
            show_default=False,
        ),
    ] = None,
    select_topk: Annotated[
        float, typer.Option(help="Fraction of each tensor's elements that decide, in (0, 1].")
    ] = 1.0,
    variant: Annotated[
        str, typer.Option(help=f"{' or '.join(VARIANTS)}; they differ if --select-topk is below 1.")
    ] = "authors",
    max_shard_gb: Annotated[float, typer.Option(help="Size of one file, 1e9 bytes.")] = 5.0,
    memory_gb: Annotated[
        float, typer.Option(help="For one tensor of all models, 1e9 bytes; larger ones in parts.")
    ] = 8.0,
) -> None:
    """Merge models that were trained from one base (SCE, arXiv 2408.07990)."""
    settings = MergeSettings(
        base=str(base),
        experts=tuple(str(expert) for expert in (*experts, *(more_experts or []))),
        select_topk=select_topk,
        variant=variant,
        max_shard_bytes=int(max_shard_gb * 1e9),
        memory_bytes=int(memory_gb * 1e9),
    )
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        total = sum(entry.nbytes for entry in open_checkpoint(base).entries.values())
        task = progress.add_task("merging", total=total)

        def on_bytes(name: str, count: int) -> None:
            progress.update(task, advance=count, description=name[-48:])

        try:
            report = merge_checkpoints(settings, out, on_bytes)
        except KeyboardInterrupt:
            console.print("stopped; the same command goes on after the last whole shard.")
            raise typer.Exit(130) from None
    _print_summary(Console(), report, out)
