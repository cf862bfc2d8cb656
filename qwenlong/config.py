"""Settings of a training run: YAML -> frozen, validated models.

Every number is named with its unit or documents it. A key that nobody knows is refused with the
nearest known one. A file may say ``extends: other.yaml``: its own keys then replace those of the
other file, section by section. Relative paths are relative to the file that holds them.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from qwenlong.aepo import DROPS, EMPTY_POLICIES, MODES, SOURCES
from qwenlong.errors import InputError

# of all tokens of a prompt's answers (eq. 4); of the step; mean over trajectories of their means
AGGREGATIONS = ("group-token-mean", "token-mean", "seq-mean-token-mean")
BUILTIN = "builtin:"  # model paths that need no folder: see `qwenlong.tiny`


class Settings(BaseModel):
    """Frozen; types are taken literally ("8" is no integer); unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class LoraSettings(Settings):
    """Low-rank adapters of peft in place of training all weights."""

    rank: int = Field(16, ge=1)
    alpha: float = Field(32.0, gt=0)  # the update is scaled by alpha / rank
    dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: list[str] = ["q_proj", "k_proj", "v_proj", "o_proj"]

    @model_validator(mode="after")
    def _no_head(self) -> LoraSettings:
        if not self.target_modules or "lm_head" in self.target_modules:
            raise ValueError(
                "target_modules must name layers other than lm_head: the loss reads its weight"
            )
        return self


class ModelSettings(Settings):
    """The policy. Weights are trained in fp32: at a learning rate of 2e-6 bf16 ones stand still."""

    path: str  # a transformers folder, builtin:tiny or builtin:smollm2
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    gradient_checkpointing: bool = True
    offload_activations: bool = False  # what checkpointing keeps goes to host memory
    export_dtype: Literal["float32", "bfloat16"] = "float32"  # of the model that a run leaves
    lora: LoraSettings | None = None


class TaskSource(Settings):
    """Samples that a registered function makes: ``qwenlong.stage_data.register_task``."""

    name: str
    count: int = Field(ge=1)  # samples
    options: dict[str, Any] = {}


class StratifySettings(Settings):
    """The same number of samples from every bin of the base model's pass rate."""

    bins: int = Field(ge=1)
    per_bin: int = Field(ge=1)  # samples


class RetrospectiveSettings(Settings):
    """Samples of earlier stages, drawn again by difficulty (1 / mean reward).

    ``measure_rollouts`` answers a candidate gets at this stage's lengths before the draw; 0 uses
    the rewards that the earlier stages recorded while they trained.
    """

    stages: list[str] = Field(min_length=1)
    count: int = Field(ge=1)  # samples
    measure_rollouts: int = Field(0, ge=0)


class DataSettings(Settings):
    """What is trained on: a folder of ``qwenlong synth``, registered tasks, or both."""

    folder: str | None = None
    tasks: list[TaskSource] = []
    above_tokens: int = Field(0, ge=0)  # prompts of this length and shorter are left out
    max_prompt_tokens: int = Field(ge=1)  # and longer ones than this
    task_weights: dict[str, float] | None = None  # None: every task alike
    stratify: StratifySettings | None = None
    retrospective: RetrospectiveSettings | None = None

    @model_validator(mode="after")
    def _has_samples(self) -> DataSettings:
        if self.folder is None and not self.tasks:
            raise ValueError("give folder (made by qwenlong synth run), tasks, or both")
        if self.above_tokens >= self.max_prompt_tokens:
            raise ValueError("above_tokens must be below max_prompt_tokens")
        if self.retrospective is not None and not self.above_tokens:
            raise ValueError(
                "retrospective draws prompts of at most above_tokens; set above_tokens"
            )
        return self


class BatchSettings(Settings):
    prompts: int = Field(128, ge=1)  # of one step, over all ranks
    group_size: int = Field(8, ge=1)  # answers to a prompt
    # Rows of one forward and backward pass: a prompt once, and all its answers. A group that is
    # larger is split between its answers; a single answer may still be larger.
    micro_batch_tokens: int = Field(131_072, ge=1)


class AgentSettings(Settings):
    """The memory agent: the documents in chunks, a memory that is written anew after each. The
    answer has ``max_new_tokens``. Sizes are tokens.
    """

    chunk_tokens: int = Field(32_768, ge=16)
    memory_tokens: int = Field(15_360, ge=1)
    plan_tokens: int = Field(1_024, ge=1)
    thinking_tokens: int = Field(0, ge=0)  # room for thinking, added to the limit of every turn
    # "chunk_first" lets the trajectories of a group share the chunk, the longest part of a prompt
    order: Literal["paper", "chunk_first"] = "chunk_first"


class VllmSettings(Settings):
    """A vLLM server, started as ``qwenlong.rollout.vllm`` says."""

    base_url: str  # such as http://127.0.0.1:8000
    model: str = "policy"  # its name there
    weights_folder: str  # that trainer and server both see; /dev/shm on one machine
    timeout_s: float = Field(3600.0, gt=0)  # without a byte from the server
    max_concurrency: int = Field(256, ge=1)  # answers asked for at the same time, of a rank


class RolloutSettings(Settings):
    """How answers are sampled. No top-p: the distribution that is trained is the one sampled."""

    backend: str = "embedded"  # a name of `qwenlong.run_setup.ROLLOUTS`
    episodes: str = "full"  # a name of `qwenlong.episodes.EPISODES`
    temperature: float = Field(0.7, gt=0)
    max_new_tokens: int = Field(ge=1)  # of an answer
    agent: AgentSettings | None = None
    vllm: VllmSettings | None = None
    saved_per_step: int = Field(8, ge=0)  # trajectories written as text, for reading

    @model_validator(mode="after")
    def _complete(self) -> RolloutSettings:
        if (self.episodes == "memory_agent") != (self.agent is not None):
            raise ValueError("episodes: memory_agent and the section agent belong together")
        if (self.backend == "vllm") != (self.vllm is not None):
            raise ValueError("backend: vllm and the section vllm belong together")
        return self


class JudgeSettings(Settings):
    """A model that is asked where the rule fails. ``raise`` stops the run, with all completed steps
    saved, rather than train on wrong rewards.
    """

    base_url: str
    model: str
    api_key_env: str = "OPENAI_API_KEY"
    max_calls: int | None = Field(None, ge=0)  # of one process
    on_failure: Literal["raise", "zero", "skip"] = "raise"
    max_tokens: int = Field(1024, ge=1)
    timeout_s: float = Field(600.0, gt=0)
    attempts: int = Field(6, ge=1)  # of one call, with growing pauses between them


class RewardSettings(Settings):
    require_think_end: bool = False  # an answer without </think> scores 0
    judge: JudgeSettings | None = None


class AepoSettings(Settings):
    """Bounds of the batch entropy in nats; the paper publishes none."""

    low: float = Field(ge=0)
    high: float = Field(ge=0)
    mode: Literal[MODES] = "latch"
    drop: Literal[DROPS] = "negative"
    if_empty: Literal[EMPTY_POLICIES] = "skip"
    entropy_source: Literal[SOURCES] = "previous_step"

    @model_validator(mode="after")
    def _ordered(self) -> AepoSettings:
        if self.low > self.high:
            raise ValueError(f"low ({self.low}) must not be above high ({self.high})")
        return self


class LossSettings(Settings):
    """Defaults: on-policy, token mean over the group, no clip, no KL (arXiv 2512.12967, eq. 4)."""

    advantage: str = "task"  # a name of `qwenlong.advantage_rules`
    aggregation: Literal[AGGREGATIONS] = "group-token-mean"
    denominator: Literal["all", "kept"] = "all"  # whether tokens that AEPO drops count
    entropy: Literal["sequence_mean", "token_mean"] = "sequence_mean"  # of a batch, for AEPO
    # Optimizer steps over one batch of rollouts. With more than 1 the old log-probs are scored
    # before the first, and the ratio is clipped to [1 - eps_low, 1 + eps_high].
    updates_per_batch: int = Field(1, ge=1)
    eps_low: float = Field(0.2, ge=0, le=1)
    eps_high: float = Field(0.2, ge=0)


class OptimizerSettings(Settings):
    """AdamW. The paper gives the learning rate alone; the rest is verl's default."""

    learning_rate: float = Field(2e-6, gt=0)
    warmup_steps: int = Field(0, ge=0)  # linear, then constant
    weight_decay: float = Field(0.01, ge=0)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.999, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0)
    max_grad_norm: float = Field(1.0, gt=0)


class EngineSettings(Settings):
    kind: Literal["torch", "fsdp2", "deepspeed"] = "torch"
    zero_stage: Literal[1, 2, 3] | None = None

    @model_validator(mode="after")
    def _stage(self) -> EngineSettings:
        if (self.kind == "deepspeed") != (self.zero_stage is not None):
            raise ValueError("kind: deepspeed and zero_stage (1, 2 or 3) belong together")
        return self


class CheckpointSettings(Settings):
    every_steps: int = Field(1, ge=1)
    keep: int = Field(2, ge=1)  # complete ones
    disk_wait_s: float = Field(600.0, ge=0)  # for room on a full disk, before the run stops


class MergeSettings(Settings):
    """The stage is no training but an SCE merge of earlier stages over ``base``, which is the
    model that the ladder starts from if None.
    """

    experts: list[str] = Field(min_length=2)  # names of stages
    base: str | None = None
    select_topk: float = Field(1.0, gt=0, le=1)
    variant: Literal["authors", "mergekit"] = "authors"


class Recipe(Settings):
    """One training stage, complete."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    steps: int = Field(ge=1)
    seed: int = Field(0, ge=0)
    start_from: str | None = None  # a stage of the ladder whose model this one goes on from
    plugins: list[str] = []  # Python files or modules to import: rewards, tasks, advantages
    model: ModelSettings
    data: DataSettings
    batch: BatchSettings = BatchSettings()
    rollout: RolloutSettings
    reward: RewardSettings = RewardSettings()
    aepo: AepoSettings | None = None
    loss: LossSettings = LossSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    engine: EngineSettings = EngineSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()


class MergeRecipe(Settings):
    """A merge between training stages."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    model: ModelSettings
    merge: MergeSettings


# --- reading -----------------------------------------------------------------


class RecipeLoader(yaml.SafeLoader):
    """YAML 1.1 reads 2e-6 as text; here it is a number."""


RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9_]+)[eE][-+]?[0-9]+$"),
    list("-+0123456789."),
)


def load_recipe(path: str | Path) -> Recipe | MergeRecipe:
    """Read one recipe; a file with the section ``merge`` is a ``MergeRecipe``.

    Raises:
        InputError: one sentence that names the file and the key.
    """
    path = Path(path)
    raw = _read(path)
    kind: type[Settings] = MergeRecipe if "merge" in raw else Recipe
    try:
        return recipe_from(kind, raw)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def recipe_from(kind: type[Settings], raw: dict[str, Any]) -> Any:
    """A settings model from plain types.

    Raises:
        InputError: the first thing that is wrong, and the nearest known name for an unknown key.
    """
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        raise InputError(_sentence(kind, error)) from None


def _read(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The mapping of a file over that of the file it extends, paths made absolute."""
    if path.resolve() in seen:
        raise InputError(f"{path} extends itself")
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=RecipeLoader)
    except FileNotFoundError:
        raise InputError(f"recipe {path} does not exist") from None
    except OSError as error:
        raise InputError(f"recipe {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"recipe {path} is not UTF-8 text") from None
    except yaml.YAMLError as error:
        raise InputError(f"recipe {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise InputError(f"recipe {path} must be a mapping of keys")
    below = raw.pop("extends", None)
    _resolve_paths(raw, path.parent)
    if below is None:
        return raw
    if not isinstance(below, str):
        raise InputError(f"{path}: extends must name one file, got {below!r}")
    return _over(_read(path.parent / below, (*seen, path.resolve())), raw)


def _over(below: Any, above: Any) -> Any:
    if isinstance(below, dict) and isinstance(above, dict):
        joined = {key: _over(below[key], v) if key in below else v for key, v in above.items()}
        return {**below, **joined}
    return above


def _resolve_paths(raw: dict[str, Any], folder: Path) -> None:
    def absolute(path: str) -> str:
        return str((folder / path).resolve())

    for section, key in (("model", "path"), ("data", "folder")):
        value = raw[section].get(key) if isinstance(raw.get(section), dict) else None
        if isinstance(value, str) and not value.startswith(BUILTIN):
            raw[section][key] = absolute(value)
    if isinstance(raw.get("plugins"), list):
        raw["plugins"] = [
            absolute(p) if isinstance(p, str) and p.endswith(".py") else p for p in raw["plugins"]
        ]


def _sentence(kind: type[Settings], error: ValidationError) -> str:
    # A misspelt key is often missing under its right name too: what is unknown comes first.
    first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    where = ".".join(str(part) for part in first["loc"]) or "recipe"
    if first["type"] == "missing":
        return f"key {where!r} is missing"
    if first["type"] != "extra_forbidden":
        got = "" if first["type"] == "value_error" else f", got {first['input']!r}"
        message = first["msg"].removeprefix("Value error, ")
        return f"{where}: {message[0].lower()}{message[1:]}{got}"
    known = list(_model_at(kind, first["loc"][:-1]).model_fields)
    nearest = difflib.get_close_matches(str(first["loc"][-1]), known, n=1, cutoff=0.5)
    hint = f"did you mean {nearest[0]!r}?" if nearest else f"known keys: {', '.join(known)}"
    return f"key {where!r} is unknown; {hint}"


def _model_at(kind: type[Settings], loc: tuple) -> type[Settings]:
    """The settings class of the section at ``loc``; list positions are passed over."""
    for part in loc:
        if isinstance(part, str) and part in kind.model_fields:
            kind = _settings_in(kind.model_fields[part].annotation) or kind
    return kind


def _settings_in(annotation: Any) -> type[Settings] | None:
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return annotation
    found = (_settings_in(part) for part in getattr(annotation, "__args__", ()))
    return next((kind for kind in found if kind is not None), None)
