"""From a recipe to a ``Run``: data, model, engine, rollouts, and where it was left off."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from qwenlong.advantage_rules import ADVANTAGES
from qwenlong.aepo import EntropyController
from qwenlong.checkpoint import (
    ADAPTER_FILE,
    RECIPE_FILE,
    check_recipe,
    latest_checkpoint,
    load_random_states,
    read_state,
    remove_partial,
    seed_everything,
)
from qwenlong.config import JudgeSettings, Recipe
from qwenlong.engines import Engine
from qwenlong.episodes import EPISODES, Environment, seed_of
from qwenlong.errors import InputError
from qwenlong.llm import ChatClient, RetryPolicy
from qwenlong.models import DTYPES, load_tokenizer
from qwenlong.rewards import Judge, reward_names
from qwenlong.rollout import EmbeddedRollouts, Rollouts
from qwenlong.sampler import TaskBalancedSampler
from qwenlong.sharded_engines import DeepSpeedEngine, FSDP2Engine
from qwenlong.stage_data import (
    StageData,
    draw_earlier,
    load_plugins,
    load_stage_data,
    measured_rewards,
    recorded_rewards,
)
from qwenlong.storage import write_json
from qwenlong.tiny import model_folder
from qwenlong.train import Run
from qwenlong.types import Sample

ENGINES: dict[str, type[Engine]] = {
    "torch": Engine,
    "fsdp2": FSDP2Engine,
    "deepspeed": DeepSpeedEngine,
}
RolloutMaker = Callable[[Recipe, Engine], Rollouts]


def _embedded(recipe: Recipe, engine: Engine) -> Rollouts:
    return EmbeddedRollouts(engine.rollout_model())


def _vllm(recipe: Recipe, engine: Engine) -> Rollouts:
    from qwenlong.rollout.vllm import VllmRollouts

    settings = recipe.rollout.vllm
    return VllmRollouts(
        settings.base_url,
        model=settings.model,
        weights_folder=settings.weights_folder,
        weights_dtype=DTYPES[recipe.model.compute_dtype],
        timeout_s=settings.timeout_s,
        max_concurrency=settings.max_concurrency,
    )


ROLLOUTS: dict[str, RolloutMaker] = {"embedded": _embedded, "vllm": _vllm}


def build_run(
    recipe: Recipe,
    out: Path,
    *,
    resume: bool = False,
    stages: dict[str, Path] | None = None,
    report: Callable[[str], None] = print,
) -> Run:
    """A run at its first step, or with ``resume`` where its newest checkpoint left it.

    Args:
        recipe: its ``model.path`` is where a new run starts from.
        out: folder of the run.
        stages: folders of earlier stages by name, for ``data.retrospective``.
        report: takes one line of text at a time.

    Raises:
        InputError: ``out`` holds a run and ``resume`` is not set, or one of another recipe; a
            setting, a sample or a model that does not fit.
    """
    load_plugins(recipe.plugins)
    _check_names(recipe)
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if world_size > 1 and recipe.engine.kind == "torch":
        raise InputError("engine.kind torch is for one process; choose fsdp2 or deepspeed.")
    problem = [_prepare_folder(recipe, out, resume) if rank == 0 else None]
    if world_size > 1:  # the others look only when the first is done
        dist.broadcast_object_list(problem, src=0)
    if problem[0]:
        raise InputError(problem[0])

    checkpoint = latest_checkpoint(out)
    source = model_folder(recipe.model.path)
    if checkpoint is not None and (checkpoint / "model").is_dir():
        source = checkpoint / "model"
    tokenizer = load_tokenizer(source)
    seed_everything(seed_of("global", recipe.seed, rank))
    adapter = checkpoint / ADAPTER_FILE if checkpoint is not None else None
    if adapter is not None and not adapter.is_file():
        adapter = None
    engine = ENGINES[recipe.engine.kind].load(recipe, source, adapter)
    if checkpoint is not None:
        engine.load_optimizer(checkpoint)

    data = load_stage_data(recipe, tokenizer, out)
    environment = Environment(
        rollouts=ROLLOUTS[recipe.rollout.backend](recipe, engine),
        tokenizer=tokenizer,
        settings=recipe.rollout,
        group_size=recipe.batch.group_size,
        resolve=data.resolve,
        judge=_judge(recipe.reward.judge, out),
        require_think_end=recipe.reward.require_think_end,
    )
    samples = data.samples + _earlier_samples(recipe, out, environment, engine, data, stages or {})
    _check_samples(samples)
    run = Run(
        recipe=recipe,
        out=out,
        engine=engine,
        environment=environment,
        samples=samples,
        sampler=_sampler(recipe, samples, engine),
        controller=EntropyController(**recipe.aepo.model_dump()) if recipe.aepo else None,
        report=report,
    )
    if checkpoint is not None:
        run.load_state(read_state(checkpoint))
        load_random_states(checkpoint, engine.rank)
    if rank == 0 and not (out / RECIPE_FILE).exists():  # all that can be refused was accepted
        write_json(out / RECIPE_FILE, recipe.model_dump(mode="json"))
    return run


def _prepare_folder(recipe: Recipe, out: Path, resume: bool) -> str | None:
    """Compare with the recipe of the run, remove what a kill left; says what is wrong."""
    if (out / RECIPE_FILE).exists() and not resume:
        return f"{out} holds a run; add --resume to go on with it, or choose another."
    out.mkdir(parents=True, exist_ok=True)
    try:
        check_recipe(out, recipe)
    except InputError as error:
        return str(error)
    remove_partial(out)
    return None


def _check_names(recipe: Recipe) -> None:
    for key, value, known in (
        ("rollout.backend", recipe.rollout.backend, ROLLOUTS),
        ("rollout.episodes", recipe.rollout.episodes, EPISODES),
        ("loss.advantage", recipe.loss.advantage, ADVANTAGES),
    ):
        if value not in known:
            raise InputError(f"{key} is {value!r}; choose one of {', '.join(sorted(known))}.")


def _check_samples(samples: list[Sample]) -> None:
    for sample in samples:
        if sample.reward not in reward_names():
            raise InputError(
                f"sample {sample.id!r}: reward {sample.reward!r} is unknown; registered are "
                f"{', '.join(reward_names())} (plugins register more)."
            )


def _sampler(recipe: Recipe, samples: list[Sample], engine: Engine) -> TaskBalancedSampler:
    try:
        return TaskBalancedSampler(
            [sample.task for sample in samples],
            recipe.batch.prompts,
            seed=seed_of("sampler", recipe.seed),
            weights=recipe.data.task_weights,
            rank=engine.rank,
            world_size=engine.world_size,
        )
    except ValueError as error:
        raise InputError(f"batch.prompts: {error}.") from error


def _judge(settings: JudgeSettings | None, out: Path) -> Judge | None:
    if settings is None:
        return None
    client = ChatClient(
        settings.base_url,
        model=settings.model,
        api_key=os.environ.get(settings.api_key_env),
        timeout=settings.timeout_s,
        retry=RetryPolicy(max_retries=settings.attempts - 1),
    )
    return Judge(
        client,
        cache=out / "judge-cache",
        max_calls=settings.max_calls,
        on_failure=settings.on_failure,
        max_tokens=settings.max_tokens,
    )


def _earlier_samples(
    recipe: Recipe,
    out: Path,
    environment: Environment,
    engine: Engine,
    data: StageData,
    stages: dict[str, Path],
) -> list[Sample]:
    """Samples of earlier stages by difficulty; measured first if the recipe says so."""
    wanted = recipe.data.retrospective
    if wanted is None:
        return []
    for name in wanted.stages:
        if name not in stages:
            raise InputError(
                f"data.retrospective: there is no earlier stage {name!r}; "
                f"known are {', '.join(stages) or 'none'}."
            )
    rewards = recorded_rewards([stages[name] for name in wanted.stages])
    if wanted.measure_rollouts:
        measured = dataclasses.replace(environment, group_size=wanted.measure_rollouts)
        mine = data.earlier[engine.rank :: engine.world_size]
        path = out / f"difficulty-{engine.rank}.jsonl"
        environment.rollouts.sync_weights(engine.rollout_model(), 0)
        seed = seed_of("difficulty", recipe.seed)
        found = measured_rewards(
            measured, recipe.rollout.episodes, mine, seed, path, block=recipe.batch.prompts
        )
        rewards = {k: v for part in engine.gather(found) for k, v in part.items()}
    return draw_earlier(data.earlier, rewards, wanted.count, recipe.seed)
