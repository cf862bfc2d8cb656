"""The recipe of a synthesis run: YAML -> frozen dataclasses, every key checked.

A key that no dataclass knows is an error that names the nearest known one. ``Recipe.to_json`` gives
plain types back, so that a recipe can be hashed, stored beside its output and sent to a worker.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rapidfuzz import fuzz, process

from qwenlong.errors import InputError

SOURCE_KINDS = (
    "text",
    "markdown",
    "html",
    "python",
    "pdf",
    "csv",
    "parquet",
    "dialogue",
    "jsonl",
    "builtin",
)


@dataclass(frozen=True)
class SourceConfig:
    """One source of documents.

    ``path`` is a file or folder, ``${stdlib}`` in it is the folder of Python's standard library;
    ``include`` and ``exclude`` are globs on the path below it. ``kind: builtin`` takes ``loader``,
    a name of ``qwenlong.data.loaders.BUILTIN`` or ``module:function``. ``near_duplicates: keep`` is
    for generated pages that differ in their facts alone. Two sources that could state one fact in
    two ways share one of their ``topics``: neither serves the other's questions as a distractor.
    """

    name: str
    kind: str
    path: str = ""
    loader: str = ""
    include: list[str] = field(default_factory=list)
    exclude: list[str] = field(default_factory=list)
    rows_per_document: int = 100
    near_duplicates: str = "drop"
    topics: list[str] = field(default_factory=list)

    def __post_init__(self):
        if self.kind not in SOURCE_KINDS:
            raise InputError(
                f"source {self.name!r}: kind is {self.kind!r}, not one of {SOURCE_KINDS}"
            )
        if self.kind == "builtin" and not self.loader:
            raise InputError(f"source {self.name!r}: kind 'builtin' needs 'loader'")
        if self.kind != "builtin" and not self.path:
            raise InputError(f"source {self.name!r}: kind {self.kind!r} needs 'path'")
        if self.near_duplicates not in ("drop", "keep"):
            raise InputError(f"source {self.name!r}: near_duplicates is 'drop' or 'keep'")
        if self.rows_per_document < 1:
            raise InputError(f"source {self.name!r}: rows_per_document must be at least 1")


@dataclass(frozen=True)
class QualityConfig:
    """Bounds of the document filters; tokens are of the recipe's tokenizer."""

    min_tokens: int = 32
    max_tokens: int = 120_000
    min_text_share: float = 0.6  # letters, digits and white space
    max_repeated_share: float = 0.5  # characters in lines that occur earlier in the document
    languages: list[str] = field(default_factory=list)  # empty: any
    near_duplicate_similarity: float = 0.8  # Jaccard of word 5-grams


@dataclass(frozen=True)
class RouteConfig:
    """One way to make samples: a name of ``qwenlong.data.routes.ROUTES``.

    ``limit`` is how many samples to compose; ``sources`` names the sources it reads (empty: all);
    ``options`` are keyword arguments of the route function, which sees ``group_documents``
    documents at a time.
    """

    route: str
    limit: int
    sources: list[str] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    group_documents: int = 4000

    def __post_init__(self):
        if self.limit < 0 or self.group_documents < 1:
            raise InputError(f"route {self.route!r}: limit and group_documents must be positive")


@dataclass(frozen=True)
class ExtractConfig:
    """What the model reads out of documents: ``triples`` names sources; ``samples`` readings each,
    of which more than half must agree."""

    triples: list[str] = field(default_factory=list)
    samples: int = 3


@dataclass(frozen=True)
class ExtendConfig:
    """How a context grows. ``lengths`` maps target tokens to weights."""

    lengths: dict[int, float] = field(
        default_factory=lambda: {4096: 5, 8192: 5, 16384: 4, 32768: 3, 65536: 2, 131072: 1}
    )
    hard_share: float = 0.5  # of the distractor tokens, chosen by BM25
    spread_share: float = 0.8  # of the samples, placed for spread evidence; the rest at random
    pool_documents: int = 10_000  # distractors of one split are drawn from at most this many

    def __post_init__(self):
        lengths = {int(n): float(weight) for n, weight in self.lengths.items()}
        weights = lengths.values()
        if not lengths or min(lengths) < 1 or min(weights) < 0 or not any(weights):
            raise InputError("extend.lengths maps positive token counts to weights, not all 0")
        object.__setattr__(self, "lengths", lengths)
        for name in ("hard_share", "spread_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"extend.{name} must lie in [0, 1]")


@dataclass(frozen=True)
class ModelConfig:
    """A model behind an OpenAI-compatible server, or ``scripted: module:function`` in its place."""

    base_url: str = ""
    model: str = ""
    api_key_env: str = "OPENAI_API_KEY"
    scripted: str = ""
    max_tokens: int = 1024
    concurrency: int = 8
    usd_per_million_prompt_tokens: float = 0.0
    usd_per_million_completion_tokens: float = 0.0

    def __post_init__(self):
        if not self.scripted and not (self.base_url and self.model):
            raise InputError("model: give 'base_url' and 'model', or 'scripted'")


@dataclass(frozen=True)
class VerifyConfig:
    """Samples of the model per check (``k``), and what is judged by them."""

    k: int = 4
    temperature: float = 0.7
    alpha: float = 0.05  # a closed-book score that guessing reaches with less than this fails
    duplicate_similarity: float = 90.0  # of two questions, 0 to 100
    min_pass_rate: float = 0.0  # difficulty: a pass rate outside the two bounds fails
    max_pass_rate: float = 1.0

    def __post_init__(self):
        if self.k < 1:
            raise InputError("verify.k must be at least 1")


@dataclass(frozen=True)
class DecontaminateConfig:
    """Evaluation sets (JSONL or text files) that no sample may overlap with."""

    sets: list[str] = field(default_factory=list)
    ngram: int = 13
    min_document_ngrams: int = 3
    question_similarity: float = 90.0  # 0 to 100


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the output of a run, except the content of the sources."""

    name: str
    sources: list[SourceConfig]
    routes: list[RouteConfig]
    seed: int = 0
    tokenizer: str = "chars4"
    quality: QualityConfig = field(default_factory=QualityConfig)
    extract: ExtractConfig = field(default_factory=ExtractConfig)
    extend: ExtendConfig = field(default_factory=ExtendConfig)
    verify: VerifyConfig = field(default_factory=VerifyConfig)
    decontaminate: DecontaminateConfig = field(default_factory=DecontaminateConfig)
    model: ModelConfig | None = None

    def __post_init__(self):
        names = [source.name for source in self.sources]
        if len(set(names)) != len(names):
            raise InputError(f"recipe: source names are not unique: {names}")
        if not names:
            raise InputError("recipe: 'sources' is empty")
        named = [(f"route {route.route!r}", route.sources) for route in self.routes]
        for where, sources in [*named, ("extract.triples", self.extract.triples)]:
            for name in sources:
                if name not in names:
                    raise InputError(_unknown(f"{where}: source", name, names))
        if self.extract.triples and self.model is None:
            raise InputError("extract.triples asks a model; give the recipe a 'model'")

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def with_limit(self, limit: int) -> Recipe:
        """The recipe with its route limits scaled down to ``limit`` samples in all."""
        total = sum(route.limit for route in self.routes)
        if limit >= total:
            return self
        routes, done = [], 0
        for route in self.routes:
            share = (done + route.limit) * limit // total - done * limit // total
            done += route.limit
            routes.append(dataclasses.replace(route, limit=share))
        return dataclasses.replace(self, routes=routes)


def load_recipe(path: str | Path) -> Recipe:
    """Read a recipe. Relative paths in it are relative to its folder."""
    import yaml

    path = Path(path)
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
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
    try:
        recipe = recipe_from_json(raw)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return resolve_paths(recipe, path.parent)


def recipe_from_json(raw: dict[str, Any]) -> Recipe:
    """A recipe from plain types; unknown keys and wrong types are errors."""
    return _build(Recipe, raw, "recipe")


def resolve_paths(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with its relative paths made absolute below ``folder``."""

    def absolute(path: str) -> str:
        return path if not path or path.startswith("${") else str((folder / path).resolve())

    sources = [dataclasses.replace(s, path=absolute(s.path)) for s in recipe.sources]
    sets = dataclasses.replace(
        recipe.decontaminate, sets=[absolute(s) for s in recipe.decontaminate.sets]
    )
    return dataclasses.replace(recipe, sources=sources, decontaminate=sets)


def _unknown(what: str, name: str, known: list[str]) -> str:
    nearest = process.extractOne(name, known, scorer=fuzz.ratio)
    hint = f"did you mean {nearest[0]!r}?" if nearest and nearest[1] >= 50 else f"known: {known}"
    return f"{what} {name!r} is unknown; {hint}"


def _build(cls: type, raw: Any, where: str) -> Any:
    if not isinstance(raw, dict):
        raise InputError(f"{where} must be a mapping, got {type(raw).__name__}")
    hints = typing.get_type_hints(cls)
    known = [f.name for f in dataclasses.fields(cls)]
    for key in raw:
        if key not in known:
            raise InputError(_unknown(f"{where}: key", str(key), known))
    required = [
        f.name
        for f in dataclasses.fields(cls)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    for name in required:
        if name not in raw:
            raise InputError(f"{where}: key {name!r} is missing")
    values = {key: _convert(hints[key], value, f"{where}.{key}") for key, value in raw.items()}
    return cls(**values)


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _convert(next(a for a in args if a is not type(None)), value, where)
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, where)
    if origin is list:
        if not isinstance(value, list):
            raise InputError(f"{where} must be a list, got {type(value).__name__}")
        return [_convert(args[0], item, f"{where}[{i}]") for i, item in enumerate(value)]
    if origin is dict:
        if not isinstance(value, dict):
            raise InputError(f"{where} must be a mapping, got {type(value).__name__}")
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is not Any and (
        not isinstance(value, hint) or isinstance(value, bool) != (hint is bool)
    ):
        raise InputError(f"{where} must be {hint.__name__}, got {value!r}")
    return value
