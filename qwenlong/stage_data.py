"""The samples of a training stage: loaded or made, of the stage's lengths, drawn by difficulty.

A task that is made by code is one function, ``@register_task(name)``; the names that
``data.tasks`` of a recipe takes.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from qwenlong import prompts
from qwenlong.config import Recipe
from qwenlong.curriculum import mean_rewards, retrospective_sample, within_lengths
from qwenlong.episodes import EPISODES, Environment, prompt_ids, seed_of, with_rewards
from qwenlong.errors import InputError
from qwenlong.sampler import stratified_by_pass_rate
from qwenlong.storage import JsonlAppender, read_jsonl, write_json
from qwenlong.types import Sample

ROLLOUTS_FOLDER = "rollouts"  # of a run: step-*.jsonl, one row a trajectory

TaskMaker = Callable[..., Iterable[Sample]]  # (count, seed, **options)
TASK_MAKERS: dict[str, TaskMaker] = {}


def register_task(name: str) -> Callable[[TaskMaker], TaskMaker]:
    """Register ``make(count, seed, **options) -> samples``, with ids that are unique."""

    def register(make: TaskMaker) -> TaskMaker:
        if name in TASK_MAKERS:
            raise ValueError(f"register_task: {name!r} is registered already")
        TASK_MAKERS[name] = make
        return make

    return register


@register_task("needle")
def _needle(count: int, seed: int, **options: Any) -> Iterable[Sample]:
    from qwenlong.data.needle import needle_samples

    return needle_samples(count, seed, **options)


def load_plugins(plugins: Sequence[str]) -> None:
    """Import modules, or Python files by path, for what they register; each once."""
    for plugin in plugins:
        try:
            if not plugin.endswith(".py"):
                importlib.import_module(plugin)
                continue
            # Two files of one name are two modules, a file and its copy are one.
            digest = hashlib.sha256(Path(plugin).read_bytes()).hexdigest()[:8]
            name = f"qwenlong_plugin_{Path(plugin).stem}_{digest}"
            if name in sys.modules:
                continue
            spec = importlib.util.spec_from_file_location(name, plugin)
            module = sys.modules[name] = importlib.util.module_from_spec(spec)
            try:
                spec.loader.exec_module(module)
            except BaseException:
                del sys.modules[name]
                raise
        except (ImportError, FileNotFoundError) as error:
            raise InputError(f"plugin {plugin} cannot be imported: {error}.") from error


class StageData(NamedTuple):
    samples: list[Sample]  # of the stage's own lengths, after selection
    earlier: list[Sample]  # shorter ones, which earlier stages trained on
    resolve: Callable[[str], str] | None  # text of a document that a sample refers to


def load_stage_data(recipe: Recipe, tokenizer: Any, out: Path) -> StageData:
    """The training samples of ``recipe``; prompt lengths are kept in ``out/prompt_tokens.json``.

    Raises:
        InputError: an unknown task, two samples with one id, or nothing left.
    """
    data, samples, resolve = recipe.data, [], None
    if data.folder is not None:
        from qwenlong.data.export import ExportedTexts, load_samples

        samples = list(load_samples(data.folder, with_text=False, split="train"))
        resolve = ExportedTexts(Path(data.folder) / "documents.jsonl")
    for source in data.tasks:
        if source.name not in TASK_MAKERS:
            raise InputError(
                f"data.tasks: task {source.name!r} is unknown; registered are "
                f"{', '.join(sorted(TASK_MAKERS)) or 'none'} (plugins register more)."
            )
        seed = seed_of("task", recipe.seed, source.name)
        samples += TASK_MAKERS[source.name](source.count, seed, **source.options)
    ids = {sample.id for sample in samples}
    if len(ids) < len(samples):
        raise InputError("data: two samples have the same id; ids must be unique over all sources.")

    key = hashlib.sha256(f"{recipe.model.path}\n{data.model_dump_json()}".encode()).hexdigest()
    cache = out / "prompt_tokens.json"
    lengths = _prompt_lengths(samples, tokenizer, resolve, cache, key)
    chosen = within_lengths(samples, lengths, data.above_tokens, data.max_prompt_tokens)
    earlier = within_lengths(samples, lengths, 0, data.above_tokens) if data.above_tokens else []
    if data.stratify is not None:
        try:
            chosen = stratified_by_pass_rate(
                chosen, data.stratify.bins, data.stratify.per_bin, recipe.seed
            ).samples
        except ValueError as error:
            raise InputError(f"data.stratify: {error}.") from error
    if not chosen:
        raise InputError(
            f"data: no prompt has more than {data.above_tokens} and at most "
            f"{data.max_prompt_tokens} tokens; the {len(samples)} samples have "
            f"{min(lengths, default=0)} to {max(lengths, default=0)}."
        )
    return StageData(chosen, earlier, resolve)


def digest_of(samples: Iterable[Sample]) -> str:
    """sha256 over all that the samples say, in their order; of documents by ``ref`` the ref."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(sample.model_dump_json().encode() + b"\n")
    return digest.hexdigest()


def _prompt_lengths(samples, tokenizer, resolve, cache: Path, key: str) -> list[int]:
    """Tokens of each prompt; counted once, and again where ``key`` is another."""
    kept = json.loads(cache.read_text()) if cache.exists() else {}
    known = kept.get("tokens", {}) if kept.get("key") == key else {}
    if not all(sample.id in known for sample in samples):
        known = {
            sample.id: len(prompt_ids(tokenizer, prompts.render(sample, resolve=resolve)))
            for sample in samples
        }
        write_json(cache, {"key": key, "tokens": known})
    return [known[sample.id] for sample in samples]


# --- samples of earlier stages -----------------------------------------------


def recorded_rewards(stages: Sequence[Path]) -> dict[str, float]:
    """Mean reward by sample over what the stages rolled out; of two stages the later counts."""
    found: dict[str, float] = {}
    for stage in stages:
        files = sorted((stage / ROLLOUTS_FOLDER).glob("step-*.jsonl"))
        values = defaultdict(list)
        for row in (row for file in files for row in read_jsonl(file)):
            if row["reward"]["source"] != "error":
                values[row["sample_id"]].append(row["reward"]["value"])
        found |= {sample_id: math.fsum(v) / len(v) for sample_id, v in values.items()}
    return found


def measured_rewards(
    environment: Environment,
    episodes: str,
    samples: Sequence[Sample],
    seed: int,
    path: Path,
    *,
    block: int,
) -> dict[str, float]:
    """Mean reward of ``environment.group_size`` new answers to each sample, ``block`` samples at a
    time; ``path`` keeps them, so that an interrupted measurement goes on. A sample of which the
    judge left all answers open has no entry: nobody knows how hard it is.
    """
    with JsonlAppender(path) as kept:
        found = {row["id"]: row["reward"] for row in read_jsonl(path)}
        for start in range(0, len(samples), block):
            part = samples[start : start + block]
            if all(sample.id in found for sample in part):
                continue
            rolled = EPISODES[episodes](environment, part, seed_of(seed, part[0].id), 0)
            means = mean_rewards(with_rewards(environment, part, rolled))
            for sample in part:
                found[sample.id] = means.get(sample.id)
                kept.append({"id": sample.id, "reward": found[sample.id]})
    return {name: reward for name, reward in found.items() if reward is not None}


def draw_earlier(
    earlier: Sequence[Sample], rewards: dict[str, float], count: int, seed: int
) -> list[Sample]:
    """``count`` of the samples that have a reward, or all, by difficulty."""
    known = [sample for sample in earlier if sample.id in rewards]
    values = [rewards[sample.id] for sample in known]
    return retrospective_sample(known, values, min(count, len(known)), seed)
