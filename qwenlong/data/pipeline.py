"""``qwenlong synth run``: collect, extract, compose, extend, verify, decontaminate, export.

Every stage maps parts of the stage before to parts of its own, in processes, and can be killed and
run again (``qwenlong.data.workspace``). All of it lies below ``OUT/work``; ``OUT`` itself holds
what the export writes: ``samples.jsonl``, ``documents.jsonl``, ``rejected.jsonl`` and
``summary.json``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qwenlong.data import dedup
from qwenlong.data.decontaminate import Contamination, describe
from qwenlong.data.documents import load_tokenizer
from qwenlong.data.extend import DistractorPool, Extender
from qwenlong.data.graph_sources import Triple
from qwenlong.data.loaders import LoadFailure, list_units, load_unit
from qwenlong.data.quality import quality_verdicts
from qwenlong.data.recipe import Recipe, recipe_from_json
from qwenlong.data.routes import (
    ModelAsker,
    find_route,
    open_client,
    route_code,
    route_samples,
    usage,
)
from qwenlong.data.store import (
    INDEX_DTYPE,
    DocumentStore,
    Texts,
    index_row,
    part_name,
    sha256,
)
from qwenlong.data.verify import find_duplicates, verify_sample
from qwenlong.data.workspace import Stage, Workers, key_of
from qwenlong.storage import atomic_write, lock_folder, read_jsonl, write_json, write_jsonl
from qwenlong.types import Sample

FORMAT = 3  # raise it when a stage writes something else for the same recipe
STAGES = ("collect", "extract", "compose", "extend", "verify", "decontaminate")
SAMPLES_PER_JOB = 16
SPLITS = ("train", "eval")

Watch = Callable[[str, int | None], contextlib.AbstractContextManager[Callable[[], None]]]


@dataclass(frozen=True)
class Run:
    """What a worker needs to know; small, so that it travels with every job."""

    out: str
    recipe_json: str
    workers: int = 1
    key: str = ""  # of the stage: what a process has cached for another stage is not used

    @property
    def recipe(self) -> Recipe:
        return _parse(self.recipe_json)

    def folder(self, stage: str) -> Path:
        return Path(self.out) / "work" / stage


@functools.lru_cache(maxsize=4)
def _parse(recipe_json: str) -> Recipe:
    return recipe_from_json(json.loads(recipe_json))


@contextlib.contextmanager
def _silent(stage: str, total: int | None) -> Iterator[Callable[[], None]]:
    yield lambda: None


def run_pipeline(
    recipe: Recipe, out: str | Path, *, workers: int = 1, watch: Watch = _silent
) -> dict[str, Any]:
    """Run every stage that is not done, in order; return the summary that the export wrote.

    Args:
        out: folder of the run. Run the same recipe in it again to continue a run that was killed;
            a changed recipe makes anew the stages that depend on the change.
        workers: processes. The output does not depend on it.
        watch: ``watch(stage, number of parts)`` is entered for every stage and gives a function
            that is called after each part.
    """
    out = Path(out)
    run = Run(str(out), json.dumps(recipe.to_json(), sort_keys=True), workers)
    with lock_folder(out):
        load_tokenizer(recipe.tokenizer)  # what is wrong fails here, not in the middle
        describe(recipe.decontaminate)
        for route in recipe.routes:
            find_route(route, has_model=recipe.model is not None)
        for leftover in itertools.chain(out.glob(".*.tmp"), out.glob("work/.*.tmp")):
            leftover.unlink()
        write_json(out / "recipe.json", recipe.to_json())
        plan = _Plan({}, Workers(workers), watch)
        key = ""
        try:
            with plan.workers:
                for name in STAGES:
                    key = key_of(FORMAT, name, key, *_KEYS[name](run))
                    stage = plan.stages[name] = Stage(Path(run.out) / "work", name, key)
                    if not stage.is_done:
                        stage.open()
                        _RUNNERS[name](dataclasses.replace(run, key=key), plan)
                        stage.finish()
            return _export(dataclasses.replace(run, key=key), plan.stages, watch)
        finally:
            _close_clients()
            if recipe.model is not None:
                write_json(out / "usage.json", usage(recipe.model, out / "calls"))


@dataclass
class _Plan:
    """What the stages of one run share in the process that runs them."""

    stages: dict[str, Stage]
    workers: Workers
    watch: Watch

    def run(self, stage: Stage, function: Callable, jobs: Iterable[tuple], total: int) -> None:
        """Run the jobs whose part is not there yet. A job is ``(run, part, ...)``."""
        with self.watch(stage.name, total) as advance:

            def todo() -> Iterator[tuple]:
                for job in jobs:
                    if (stage.folder / f"{part_name(job[1])}.jsonl").exists():
                        advance()
                    else:
                        yield job

            self.workers.run(function, todo(), on_done=lambda _: advance())


# --- collect -----------------------------------------------------------------


def _collect_key(run: Run) -> list[Any]:
    """Write the units of all sources, one a line, and hash them with the rules."""
    recipe = run.recipe
    path = Path(run.out) / "work" / "units.jsonl"
    units = (unit for source in recipe.sources for unit in list_units(source))
    write_jsonl(path, units)
    listed = hashlib.sha256()
    with open(path, "rb") as file:
        for line in file:
            listed.update(line)
    raw = recipe.to_json()
    return [listed.hexdigest(), raw["sources"], raw["quality"], recipe.tokenizer]


def _collect(run: Run, plan: _Plan) -> None:
    units = Path(run.out) / "work" / "units.jsonl"
    with open(units, "rb") as file:
        total = sum(1 for _ in file)
    jobs = ((run, part, unit) for part, unit in enumerate(read_jsonl(units)))
    stage = plan.stages["collect"]
    plan.run(stage, _collect_part, jobs, total)
    _merge_index(stage, total, run.recipe.quality.near_duplicate_similarity)


def _collect_part(job: tuple[Run, int, dict]) -> None:
    """Load one unit: documents, rejected ones, index rows and signatures; the documents last."""
    run, part, unit = job
    recipe, folder = run.recipe, run.folder("collect")
    position = next(i for i, s in enumerate(recipe.sources) if s.name == unit["source"])
    source = recipe.sources[position]
    count = load_tokenizer(recipe.tokenizer)
    sign = dedup.signature if source.near_duplicates == "drop" else dedup.exact_signature
    rows, signatures, rejected, lines, offset = [], [], [], [], 0
    for item in load_unit(source, unit):
        if isinstance(item, LoadFailure):
            quality = {"readable": {"verdict": "fail", "reason": item.reason}}
            rejected.append({"title": item.path, "source": source.name, "quality": quality})
            continue
        n_tokens = count(item.text)
        quality = quality_verdicts(item, n_tokens, recipe.quality)
        if any(verdict["verdict"] == "fail" for verdict in quality.values()):
            rejected.append({"title": item.title, "source": source.name, "quality": quality})
            continue
        row = {**item.to_json(), "n_tokens": n_tokens, "quality": quality}
        # Metadata may hold what no UTF-8 can: a lone surrogate from a JSON escape.
        line = json.dumps(row, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
        rows.append(index_row(item, part, offset, len(line), n_tokens, position))
        signatures.append(sign(item.text))
        lines.append(line)
        offset += len(line)
    name = part_name(part)
    _save_array(folder / f"{name}.index.npy", np.array(rows, dtype=INDEX_DTYPE))
    shape = (len(signatures), dedup.PERMUTATIONS)
    _save_array(folder / f"{name}.minhash.npy", np.array(signatures, np.uint16).reshape(shape))
    write_jsonl(folder / f"{name}.rejected.jsonl", rejected)
    with atomic_write(folder / f"{name}.jsonl", "wb") as file:
        file.writelines(lines)


def _save_array(path: Path, array: np.ndarray) -> None:
    with atomic_write(path, "wb") as file:
        np.save(file, array)


def _merge_index(stage: Stage, parts: int, similarity: float) -> None:
    """One index of the documents that are no copies of earlier ones; the copies beside it."""
    files = [stage.folder / f"{part_name(part)}.index.npy" for part in range(parts)]
    index = np.concatenate([np.empty(0, INDEX_DTYPE), *map(np.load, files)])
    exact = dedup.exact_duplicates(index["key"], index["sha"])
    signatures = [stage.folder / f"{part_name(part)}.minhash.npy" for part in range(parts)]
    near = dedup.near_duplicates(signatures, similarity, stage.folder)
    numbers = np.arange(len(index))
    keep = (exact == numbers) & (near == numbers)

    def copies() -> Iterator[dict[str, Any]]:
        for number in np.flatnonzero(~keep).tolist():
            is_exact = exact[number] != number
            original = int(exact[number] if is_exact else near[number])
            yield {
                "sha256": index["sha"][number].tobytes().hex(),
                "duplicate_of": index["sha"][original].tobytes().hex(),
                "how": "exact" if is_exact else "near",
                "source": int(index["source"][number]),
            }

    write_jsonl(stage.folder / "duplicates.jsonl", copies())
    _save_array(stage.folder / "index.npy", index[keep])


@functools.lru_cache(maxsize=1)
def open_store(run: Run) -> DocumentStore:
    """The corpus; opened once a process and stage."""
    return DocumentStore(run.folder("collect"), run.folder("collect"))


# --- extract -----------------------------------------------------------------


def _extract_key(run: Run) -> list[Any]:
    raw = run.recipe.to_json()
    model = _model_key(run) if run.recipe.extract.triples else None
    return [raw["decontaminate"], describe(run.recipe.decontaminate), raw["extract"], model]


def _extract(run: Run, plan: _Plan) -> None:
    store = open_store(run)
    stage = plan.stages["extract"]
    held = np.unique(store.index["part"])
    starts = np.searchsorted(store.index["part"], held, side="left").tolist()
    stops = np.searchsorted(store.index["part"], held, side="right").tolist()
    jobs = [(run, p, a, b) for p, a, b in zip(held.tolist(), starts, stops, strict=True)]
    plan.run(stage, _extract_part, jobs, len(jobs))
    excluded = [row["number"] for row in stage.rows() if row["contamination"]["verdict"] == "fail"]
    _save_array(stage.folder / "excluded.npy", np.array(sorted(excluded), dtype=np.int64))


def _extract_part(job: tuple[Run, int, int, int]) -> None:
    """One line a document: what it offers to the routes, and whether an evaluation set has it."""
    run, part, start, stop = job
    store, contamination = open_store(run), _contamination(run)
    config = run.recipe.extract
    client = _client(run) if config.triples else None  # here: threads would open several
    losses: list[Counter[str]] = []

    def facts(number: int) -> dict[str, Any]:
        row = store.row(number)
        verdict = {"verdict": "not_run", "reason": "no evaluation sets"}
        if contamination is not None:
            verdict = contamination.document(row["text"])
        extracted = None
        if row["source"] in config.triples and verdict["verdict"] != "fail":
            from qwenlong.data.extract import Reader, model_triples

            max_tokens = run.recipe.model.max_tokens
            lost = Counter()
            losses.append(lost)  # one a thread
            reader = Reader(client, samples=config.samples, max_tokens=max_tokens, dropped=lost)
            extracted = [list(t) for t in model_triples(reader, [store.document(number)])]
        return {
            "number": number,
            **{key: row[key] for key in ("id", "title", "source", "kind", "n_tokens")},
            "split": "eval" if store.index["is_eval"][number] else "train",
            "triples": len(row["meta"].get("triples", ())),
            "table_rows": len(row["meta"].get("rows", ())),
            "extracted": extracted,
            "contamination": verdict,
        }

    with ThreadPoolExecutor(run.recipe.model.concurrency if config.triples else 1) as pool:
        rows = list(pool.map(facts, range(start, stop)))
    _write_dropped(run.folder("extract"), part, "extract", sum(losses, Counter()))
    write_jsonl(run.folder("extract") / f"{part_name(part)}.jsonl", rows)


def _extracted(run: Run, numbers: np.ndarray) -> list[Triple]:
    """What the model read out of these documents."""
    if not run.recipe.extract.triples:
        return []
    wanted = set(numbers.tolist())
    return [
        Triple(*triple)
        for path in sorted(run.folder("extract").glob("part-*.jsonl"))
        if "." not in path.stem
        for row in read_jsonl(path)
        if row["number"] in wanted
        for triple in row["extracted"] or ()
    ]


@functools.lru_cache(maxsize=1)
def _contamination(run: Run) -> Contamination | None:
    config = run.recipe.decontaminate
    return Contamination(config) if config.sets else None


# --- compose -----------------------------------------------------------------


def _compose_key(run: Run) -> list[Any]:
    raw = run.recipe.to_json()
    return [raw["routes"], raw["seed"], _model_key(run), [route_code(r) for r in run.recipe.routes]]


def _model_key(run: Run) -> list[str] | None:
    """What of the model decides the output: not the address, the price or the concurrency."""
    model = run.recipe.model
    return [model.model, model.scripted, str(model.max_tokens)] if model else None


def _usable(run: Run, store: DocumentStore, sources: list[str]) -> np.ndarray:
    """Numbers of the documents of some sources (none named: all) that no evaluation set has."""
    names = [source.name for source in run.recipe.sources]
    numbers = store.numbers([names.index(name) for name in sources] or None)
    return np.setdiff1d(numbers, np.load(run.folder("extract") / "excluded.npy"))


def _compose(run: Run, plan: _Plan) -> None:
    store, jobs = open_store(run), []
    for position, route in enumerate(run.recipe.routes):
        size = len(_usable(run, store, route.sources))
        for start in range(0, size, route.group_documents):
            stop = min(size, start + route.group_documents)
            # Shares of a whole number that add up to it.
            limit = stop * route.limit // size - start * route.limit // size
            if limit:
                jobs.append((run, len(jobs), position, start, stop, limit))
    plan.run(plan.stages["compose"], _compose_part, jobs, len(jobs))


def _compose_part(job: tuple[Run, int, int, int, int, int]) -> None:
    """One route over one group of documents, of both splits: the route keeps them apart."""
    run, part, position, start, stop, limit = job
    recipe, store, folder = run.recipe, open_store(run), run.folder("compose")
    route = recipe.routes[position]
    numbers = _usable(run, store, route.sources)[start:stop]
    documents = [store.document(number) for number in numbers]
    seed = int(key_of(recipe.seed, route.route, start)[:8], 16)
    texts: dict[str, str] = {}
    dropped: Counter[str] = Counter()
    found = route_samples(
        route,
        documents,
        seed=seed,
        limit=limit,
        client=_client(run),
        max_tokens=recipe.model.max_tokens if recipe.model else None,
        extracted=_extracted(run, numbers),
        dropped=dropped,
    )
    group = {"group": [int(numbers[0]), int(numbers[-1])]}
    samples = [
        _by_reference(sample, store, texts).model_copy(update=group)
        for sample in itertools.islice(found, limit)
    ]
    rows = ({"sha256": sha, "text": text} for sha, text in texts.items())
    write_jsonl(folder / f"{part_name(part)}.texts.jsonl", rows)
    _write_dropped(folder, part, route.route, dropped)
    write_jsonl(folder / f"{part_name(part)}.jsonl", (s.to_json() for s in samples))


def _write_dropped(folder: Path, part: int, by: str, dropped: Counter[str]) -> None:
    """What ``by`` (a route, or the extraction) lost in a part, for the summary."""
    rows = ({"by": by, "reason": reason, "count": n} for reason, n in sorted(dropped.items()))
    write_jsonl(folder / f"{part_name(part)}.dropped.jsonl", rows)


def _by_reference(sample: Sample, store: DocumentStore, texts: dict[str, str]) -> Sample:
    """``sample`` with refs for texts; texts that the corpus does not have go to ``texts``."""
    documents = []
    for document in sample.documents:
        if document.text is not None:
            sha = sha256(document.text)
            if store.find(sha) is None:
                texts[sha] = document.text
            document = document.model_copy(update={"text": None, "ref": sha})
        documents.append(document)
    return sample.model_copy(update={"documents": documents})


_clients: dict[tuple[str, str], Any] = {}  # at most one a process: it reads the call cache once


def _client(run: Run) -> Any:
    """The client of this process, or None where the recipe has no model."""
    if run.recipe.model is None:
        return None
    key = run.out, run.recipe_json
    if key not in _clients:
        _close_clients()
        cache = Path(run.out) / "calls"
        _clients[key] = open_client(run.recipe.model, cache, share=run.workers)
    return _clients[key]


def _close_clients() -> None:
    while _clients:
        _clients.popitem()[1].close()


# --- extend, verify, decontaminate -------------------------------------------


def _sample_jobs(run: Run, stage: Stage) -> list[tuple[Run, int, str, int]]:
    """``(run, part, file, offset)`` for every ``SAMPLES_PER_JOB`` rows of ``stage``."""
    jobs = []
    for path in stage.parts():
        offset = 0
        with open(path, "rb") as file:
            for row, line in enumerate(file):
                if row % SAMPLES_PER_JOB == 0:
                    jobs.append((run, len(jobs), str(path), offset))
                offset += len(line)
    return jobs


def _read_samples(path: str, offset: int) -> list[Sample]:
    with open(path, "rb") as file:
        file.seek(offset)
        lines = list(itertools.islice(file, SAMPLES_PER_JOB))
    return [Sample.model_validate_json(line) for line in lines]


def _write_samples(run: Run, stage: str, part: int, samples: Iterable[Sample]) -> None:
    rows = (sample.to_json() for sample in samples)
    write_jsonl(run.folder(stage) / f"{part_name(part)}.jsonl", rows)


@functools.lru_cache(maxsize=1)
def _corpus(run: Run) -> tuple[DocumentStore, Texts]:
    """Store and texts; opened once a process and stage."""
    store = open_store(run)
    return store, Texts(store, sorted(run.folder("compose").glob("part-*.texts.jsonl")))


def _extend_key(run: Run) -> list[Any]:
    raw = run.recipe.to_json()
    return [raw["extend"], raw["seed"], [s["topics"] for s in raw["sources"]]]


def _extend(run: Run, plan: _Plan) -> None:
    store = open_store(run)
    for split in SPLITS:
        folder = plan.stages["extend"].folder / f"pool-{split}"
        numbers = _usable(run, store, [])
        numbers = numbers[store.index["is_eval"][numbers] == (split == "eval")]
        DistractorPool.build(store, numbers, run.recipe.extend.pool_documents, folder)
    jobs = _sample_jobs(run, plan.stages["compose"])
    plan.run(plan.stages["extend"], _extend_part, jobs, len(jobs))


@functools.lru_cache(maxsize=2)
def _extender(run: Run, split: str) -> Extender:
    store, texts = _corpus(run)
    recipe = run.recipe
    return Extender(
        store,
        DistractorPool(store, run.folder("extend") / f"pool-{split}"),
        recipe.sources,
        recipe.extend,
        tokenizer=recipe.tokenizer,
        seed=recipe.seed,
        resolve=texts.resolve,
    )


def _extend_part(job: tuple[Run, int, str, int]) -> None:
    run, part, path, offset = job
    samples = [_extender(run, s.split).extend(s) for s in _read_samples(path, offset)]
    _write_samples(run, "extend", part, samples)


def _verify_key(run: Run) -> list[Any]:
    return [run.recipe.to_json()["verify"], _model_key(run)]


def _verify(run: Run, plan: _Plan) -> None:
    samples = map(Sample.model_validate, plan.stages["extend"].rows())
    found = find_duplicates(samples, run.recipe.verify.duplicate_similarity)
    write_json(
        plan.stages["verify"].folder / "duplicates.json", {str(k): v for k, v in found.items()}
    )
    jobs, position = [], 0
    for path in plan.stages["extend"].parts():
        jobs.append((run, len(jobs), str(path), position))
        position += sum(1 for _ in read_jsonl(path))
    plan.run(plan.stages["verify"], _verify_part, jobs, len(jobs))


def _verify_part(job: tuple[Run, int, str, int]) -> None:
    run, part, path, position = job
    config = run.recipe.verify
    _, texts = _corpus(run)
    duplicates = json.loads((run.folder("verify") / "duplicates.json").read_text())
    samples = _read_samples(path, 0)
    client, ask = _client(run), None
    if client is not None:
        max_tokens = run.recipe.model.max_tokens
        ask = ModelAsker(client, temperature=config.temperature, max_tokens=max_tokens)

    def check(offset: int) -> Sample:
        return verify_sample(
            samples[offset],
            config,
            resolve=texts.resolve,
            normalised=texts.normalised,
            split_of=texts.split,
            duplicate_of=duplicates.get(str(position + offset)),
            ask=ask,
        )

    with ThreadPoolExecutor(SAMPLES_PER_JOB if ask else 1) as pool:
        verified = list(pool.map(check, range(len(samples))))
    _write_samples(run, "verify", part, verified)


def _decontaminate_key(run: Run) -> list[Any]:
    return []  # the evaluation sets are in the key of `extract`


def _decontaminate(run: Run, plan: _Plan) -> None:
    jobs = [(run, i, str(path)) for i, path in enumerate(plan.stages["verify"].parts())]
    plan.run(plan.stages["decontaminate"], _decontaminate_part, jobs, len(jobs))


def _decontaminate_part(job: tuple[Run, int, str]) -> None:
    run, part, path = job
    contamination = _contamination(run)
    _, texts = _corpus(run)
    checked = []
    for sample in _read_samples(path, 0):
        if contamination is None:
            verdict = {"verdict": "not_run", "reason": "no evaluation sets"}
        else:
            verdict = contamination.sample(sample, texts.resolve)
        raw = sample.to_json()
        raw["filters"]["decontamination"] = verdict
        checked.append(Sample.model_validate(raw))
    _write_samples(run, "decontaminate", part, checked)


# --- export ------------------------------------------------------------------


def _export(run: Run, stages: dict[str, Stage], watch: Watch) -> dict[str, Any]:
    from qwenlong.data.export import export, is_exported

    out = Path(run.out)
    if is_exported(out, run.key):
        return json.loads((out / "summary.json").read_text(encoding="utf-8"))
    _, texts = _corpus(run)
    with watch("export", None):
        return export(out, run.key, run.recipe, stages, texts.resolve)


_KEYS: dict[str, Callable[[Run], list[Any]]] = {
    "collect": _collect_key,
    "extract": _extract_key,
    "compose": _compose_key,
    "extend": _extend_key,
    "verify": _verify_key,
    "decontaminate": _decontaminate_key,
}
_RUNNERS: dict[str, Callable[[Run, _Plan], None]] = {
    "collect": _collect,
    "extract": _extract,
    "compose": _compose,
    "extend": _extend,
    "verify": _verify,
    "decontaminate": _decontaminate,
}
