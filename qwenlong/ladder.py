"""A ladder of stages: each goes on from the model of an earlier one (arXiv 2512.12967, figure 6).

A ladder is a folder of recipes whose names begin with a digit, run in the order of their names.
``start_from`` names the stage whose model a stage takes; a file with the section ``merge`` joins
the models of several (SCE). Everything is checked before the first stage runs.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

import torch.distributed as dist
from rich.console import Console

from qwenlong.config import MergeRecipe, Recipe, load_recipe
from qwenlong.errors import InputError
from qwenlong.merge_command import MergeSettings, merge_checkpoints
from qwenlong.models import load_causal_lm, load_tokenizer
from qwenlong.storage import lock_folder
from qwenlong.tiny import model_folder
from qwenlong.train_command import EXPORTED, run_stage

Stage = Recipe | MergeRecipe


def load_ladder(folder: Path) -> list[Stage]:
    """The stages in order.

    Raises:
        InputError: there are none, two have one name, or one refers to a stage that does not come
            before it.
    """
    files = sorted(p for p in folder.glob("*.yaml") if p.name[0].isdigit())
    if not files:
        raise InputError(f"{folder} holds no stage; a stage is a file such as 1-short.yaml.")
    stages: list[Stage] = []
    for file in files:
        stage = load_recipe(file)
        earlier = [s.name for s in stages]
        if stage.name in earlier:
            raise InputError(f"{file}: there are two stages named {stage.name!r}")
        for name in _needed(stage):
            if name not in earlier:
                raise InputError(
                    f"{file}: stage {name!r} does not come before it; "
                    f"earlier ones are {', '.join(earlier) or 'none'}"
                )
        stages.append(stage)
    return stages


def _needed(stage: Stage) -> list[str]:
    if isinstance(stage, MergeRecipe):
        return [*stage.merge.experts, *([stage.merge.base] if stage.merge.base else [])]
    retrospective = stage.data.retrospective
    start = [stage.start_from] if stage.start_from else []
    return start + (list(retrospective.stages) if retrospective else [])


def run_ladder(folder: Path, out: Path, *, resume: bool, console: Console | None = None) -> Path:
    """Run all stages into ``out/STAGE``; returns the folder of the last model.

    With ``resume`` finished stages are left as they are and the one that was begun goes on.
    """
    stages = load_ladder(folder)
    is_main = not dist.is_initialized() or dist.get_rank() == 0
    with lock_folder(out) if is_main else contextlib.nullcontext():
        return _run_stages(stages, out, resume=resume, console=console or Console(stderr=True))


def _run_stages(stages: list[Stage], out: Path, *, resume: bool, console: Console) -> Path:
    is_begun = [any((out / stage.name).exists() for stage in stages)]
    if dist.is_initialized():  # the first rank's word: it may have made a folder by now
        dist.broadcast_object_list(is_begun, src=0)
    if is_begun[0] and not resume:
        raise InputError(f"{out} holds a ladder; add --resume to go on with it, or choose another.")
    folders = {stage.name: out / stage.name for stage in stages}
    final = out
    for number, stage in enumerate(stages, 1):
        console.print(f"stage {number}/{len(stages)}: {stage.name}")
        if isinstance(stage, MergeRecipe):
            final = _merge(stage, folders)
        else:
            earlier = {s.name: folders[s.name] for s in stages[: number - 1]}
            recipe = _started_from(stage, folders)
            final = run_stage(
                recipe, folders[stage.name], resume=True, stages=earlier, console=console
            )
    return final


def _started_from(recipe: Recipe, folders: dict[str, Path]) -> Recipe:
    if recipe.start_from is None:
        return recipe
    model = recipe.model.model_copy(
        update={"path": str((folders[recipe.start_from] / EXPORTED).resolve())}
    )
    return recipe.model_copy(update={"model": model})


def _merge(stage: MergeRecipe, folders: dict[str, Path]) -> Path:
    """SCE over the stage's base. The base is first written as the stages write their models, so
    that names and dtypes agree.
    """
    out = folders[stage.name]
    final = out / EXPORTED
    is_main = not dist.is_initialized() or dist.get_rank() == 0
    if is_main and not final.is_dir():
        if stage.merge.base is None:
            base = _same_form(stage, out / "base")
        else:
            base = folders[stage.merge.base] / EXPORTED
        settings = MergeSettings(
            base=str(base),
            experts=tuple(str(folders[name] / EXPORTED) for name in stage.merge.experts),
            select_topk=stage.merge.select_topk,
            variant=stage.merge.variant,
        )
        merge_checkpoints(settings, final)
        shutil.rmtree(out / "base", ignore_errors=True)
    if dist.is_initialized():
        dist.barrier()
    return final


def _same_form(stage: MergeRecipe, folder: Path) -> Path:
    if not folder.is_dir():
        source = model_folder(stage.model.path)
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        model = load_causal_lm(source, dtype=stage.model.export_dtype, device="cpu").model
        model.save_pretrained(partial)
        load_tokenizer(source).save_pretrained(partial)
        os.rename(partial, folder)
    return folder
