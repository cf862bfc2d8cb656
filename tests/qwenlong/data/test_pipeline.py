"""The pipeline: the same bytes from any number of processes and after any kill."""

import dataclasses
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import toy_route
import yaml
from llm_server import serve

from qwenlong.data.export import ExportedTexts, load_samples
from qwenlong.data.pipeline import STAGES, run_pipeline
from qwenlong.data.recipe import (
    DecontaminateConfig,
    ExtendConfig,
    ExtractConfig,
    ModelConfig,
    Recipe,
    RouteConfig,
    SourceConfig,
    VerifyConfig,
    load_recipe,
    recipe_from_json,
)
from qwenlong.errors import InputError
from qwenlong.llm import ServerUnavailable
from qwenlong.prompts import document_block, render, view
from qwenlong.storage import lock_folder
from qwenlong.types import split_of

HERE = Path(__file__).parent
ROOT = HERE.parents[2]


def toy_recipe(folder, **changes):
    recipe = Recipe(
        name="toy",
        sources=[SourceConfig(name="pages", kind="text", path=str(folder))],
        routes=[RouteConfig(route="toy_route:toy_samples", limit=40)],
        extend=ExtendConfig(lengths={1024: 1, 2048: 2}),
    )
    return dataclasses.replace(recipe, **changes)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return toy_route.write_corpus(tmp_path_factory.mktemp("corpus"), 150)


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished")
    return out, run_pipeline(toy_recipe(corpus), out)


def digest(out):
    """Hash of every file of a run but the lock, the cache of calls and its cost."""
    left_out = {".lock", "calls", "usage.json"}
    return {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(out.rglob("*"))
        if path.is_file() and not left_out & set(path.relative_to(out).parts)
    }


# --- a whole run -----------------------------------------------------------------


def test_output_is_the_sample_format(finished):
    out, summary = finished
    assert summary["samples"] == {"composed": 40, "exported": 40}
    assert summary["multihop"]["share"] >= 0.5
    resolve = ExportedTexts(out / "documents.jsonl")
    with_refs = list(load_samples(out, with_text=False))
    with_text = list(load_samples(out))
    assert len(with_refs) == len(with_text) == 40
    for bare, full in zip(with_refs, with_text, strict=True):
        codes = {}
        for span in full.evidence:
            document = next(d for d in full.documents if d.id == span.doc)
            fact = document.text[span.start : span.end]  # "The keeper named X guards the code Y."
            codes[fact.split()[3]] = fact.rstrip(".").split()[-1]
        assert full.answers == ["-".join(codes[name] for name in full.derivation["keepers"])]
        block = document_block(view(full).documents)
        assert full.tokens.n == -(-len(block) // 4)  # chars4
        assert 0.8 * full.placement["target_tokens"] <= full.tokens.n
        assert full.tokens.n <= full.placement["target_tokens"]
        for document in full.documents:
            assert split_of(document.text) == full.split
            if document.role == "distractor":
                assert not any(name in document.text for name in codes)
        for document in bare.documents:
            assert hashlib.sha256(resolve(document.ref).encode()).hexdigest() == document.ref
        assert render(bare, resolve=resolve) == render(full)
    evaluation = list(load_samples(out, split="eval"))
    assert all(s.split == "eval" for s in evaluation)
    with pytest.raises(InputError, match="holds no samples.jsonl"):
        next(load_samples(out / "work"))


def test_nothing_is_done_twice(finished, corpus):
    out, summary = finished
    before = {p: p.stat().st_mtime_ns for p in (out / "work").rglob("part-*")}
    assert run_pipeline(toy_recipe(corpus), out) == summary
    assert {p: p.stat().st_mtime_ns for p in (out / "work").rglob("part-*")} == before


def test_any_number_of_processes_gives_the_same_bytes(finished, corpus, tmp_path):
    run_pipeline(toy_recipe(corpus), tmp_path, workers=3)
    assert digest(tmp_path) == digest(finished[0])


def test_a_changed_recipe_makes_anew_what_depends_on_it(corpus, tmp_path):
    started = []

    class Watch:
        def __init__(self, stage, total):
            started.append(stage)

        def __enter__(self):
            return lambda: None

        def __exit__(self, *exc):
            pass

    run_pipeline(toy_recipe(corpus), tmp_path, watch=Watch)
    assert started == [*STAGES, "export"]
    started.clear()
    shorter = toy_recipe(corpus, extend=ExtendConfig(lengths={1024: 1}))
    summary = run_pipeline(shorter, tmp_path, watch=Watch)
    assert started == ["extend", "verify", "decontaminate", "export"]
    assert summary["tokens"]["most"] <= 1024
    started.clear()
    run_pipeline(dataclasses.replace(shorter, seed=1), tmp_path, watch=Watch)
    assert started[0] == "compose"


def test_a_changed_source_is_loaded_again(tmp_path):
    pages = toy_route.write_corpus(tmp_path / "pages", 20)
    recipe = toy_recipe(pages, routes=[])
    assert run_pipeline(recipe, tmp_path / "out")["documents"]["kept"] == 20
    toy_route.write_corpus(tmp_path / "pages", 5, start=20)
    assert run_pipeline(recipe, tmp_path / "out")["documents"]["kept"] == 25


def test_rejected_duplicate_and_contaminated_documents_are_counted(tmp_path):
    pages = toy_route.write_corpus(tmp_path / "pages", 30)
    (pages / "tiny.txt").write_text("too short")
    (pages / "binary.txt").write_bytes(b"\x00\x01")
    (pages / "zz-copy.txt").write_text(toy_route.toy_text(3))
    near = toy_route.toy_text(4, sentences=60)
    (pages / "zy-long.txt").write_text(near)
    (pages / "zz-near.txt").write_text(near.replace("lamp", "torch", 1))
    (tmp_path / "set.jsonl").write_text(json.dumps({"context": toy_route.toy_text(7)}) + "\n")
    recipe = toy_recipe(
        pages,
        routes=[RouteConfig(route="toy_route:toy_samples", limit=30)],
        decontaminate=DecontaminateConfig(sets=[str(tmp_path / "set.jsonl")]),
    )
    summary = run_pipeline(recipe, tmp_path / "out")
    assert summary["documents"]["kept"] == 31
    assert summary["documents"]["rejected"] == {"length": 1, "readable": 1}
    assert summary["documents"]["duplicates"] == {"exact": 1, "near": 1}
    assert summary["documents"]["contaminated"] == 1
    assert summary["filters"]["decontamination"] == {"pass": 30}
    used = {d.title for s in load_samples(tmp_path / "out") for d in s.documents}
    assert "page-00007" not in used and "page-00008" in used


def test_metadata_that_is_no_utf8(tmp_path):
    rows = [
        json.dumps({"text": toy_route.toy_text(n), "title": f"{n}\ud800", "meta": {"k": "\udfff"}})
        for n in range(60)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n")
    source = SourceConfig(name="pages", kind="jsonl", path=str(tmp_path / "rows.jsonl"))
    recipe = toy_recipe(tmp_path, sources=[source])
    summary = run_pipeline(recipe, tmp_path / "out")
    assert summary["documents"]["kept"] == 60
    assert summary["samples"]["exported"] > 30
    titles = {d.title for s in load_samples(tmp_path / "out") for d in s.documents}
    assert titles <= {f"{n}?" for n in range(60)}


def test_an_empty_outcome_is_still_an_outcome(tmp_path):
    pages = toy_route.write_corpus(tmp_path / "pages", 2)  # too few for any question
    summary = run_pipeline(toy_recipe(pages), tmp_path / "out")
    assert summary["samples"] == {"composed": 0, "exported": 0}
    assert list(load_samples(tmp_path / "out")) == []


def test_a_second_run_in_the_same_folder_is_refused(corpus, tmp_path):
    with lock_folder(tmp_path), pytest.raises(InputError, match="is in use by process"):
        run_pipeline(toy_recipe(corpus), tmp_path)


def test_wrong_routes_are_named(corpus, tmp_path):
    for route, message in (
        (RouteConfig(route="toy", limit=1), "route 'toy' is unknown"),
        (RouteConfig(route="toy_route:none", limit=1), "cannot be imported"),
        (RouteConfig(route="toy_route:toy_samples", limit=1, options={"k": 1}), "no option 'k'"),
        (RouteConfig(route="toy_route:asks_a_model", limit=1), "asks a model"),
    ):
        with pytest.raises(InputError, match=message):
            run_pipeline(toy_recipe(corpus, routes=[route]), tmp_path / route.route)
        assert not (tmp_path / route.route / "work").exists()  # before anything is loaded
    gone = DecontaminateConfig(sets=[str(tmp_path / "gone.jsonl")])
    with pytest.raises(InputError, match="evaluation set .* does not exist"):
        run_pipeline(toy_recipe(corpus, decontaminate=gone), tmp_path / "out")
    assert not (tmp_path / "out" / "work").exists()


# --- recipes ---------------------------------------------------------------------


def test_recipe_errors_name_the_nearest_key(tmp_path):
    path = tmp_path / "recipe.yaml"
    good = {"name": "x", "sources": [{"name": "a", "kind": "text", "path": "docs"}], "routes": []}

    def error(changes):
        path.write_text(yaml.safe_dump({**good, **changes}))
        with pytest.raises(InputError) as caught:
            load_recipe(path)
        return str(caught.value)

    assert "key 'sead' is unknown; did you mean 'seed'?" in error({"sead": 1})
    assert "did you mean 'lengths'?" in error({"extend": {"length": {4096: 1}}})
    assert "recipe.seed must be int, got 'one'" in error({"seed": "one"})
    assert "recipe.seed must be int, got True" in error({"seed": True})
    assert "kind is 'docx'" in error({"sources": [{"name": "a", "kind": "docx", "path": "d"}]})
    assert "source names are not unique" in error({"sources": good["sources"] * 2})
    route = {"route": "multihop", "limit": 1, "sources": ["aa"]}
    assert "source 'aa' is unknown; did you mean 'a'?" in error({"routes": [route]})
    assert "recipe.routes[0]: key 'limit' is missing" in error({"routes": [{"route": "choice"}]})
    assert "give 'base_url' and 'model'" in error({"model": {"model": "m"}})
    path.write_text("a: [")
    with pytest.raises(InputError, match="is not YAML"):
        load_recipe(path)
    with pytest.raises(InputError, match="does not exist"):
        load_recipe(tmp_path / "none.yaml")
    path.write_text(yaml.safe_dump(good))
    recipe = load_recipe(path)
    assert recipe.sources[0].path == str(tmp_path / "docs")
    assert recipe_from_json(json.loads(json.dumps(recipe.to_json()))) == recipe


def test_limits_scale_down_and_add_up():
    source = SourceConfig(name="a", kind="text", path="x")
    routes = [RouteConfig(route=f"r{i}", limit=n) for i, n in enumerate((10, 30, 60))]
    recipe = Recipe(name="x", sources=[source], routes=routes)
    assert [r.limit for r in recipe.with_limit(10).routes] == [1, 3, 6]
    assert sum(r.limit for r in recipe.with_limit(7).routes) == 7
    assert recipe.with_limit(1000) == recipe


@pytest.mark.parametrize(
    "path", sorted((ROOT / "recipes").glob("synth-*.yaml")), ids=lambda p: p.stem
)
def test_recipes_of_the_repository_load(path):
    assert load_recipe(path).routes


# --- models ----------------------------------------------------------------------


def with_model(corpus, scripted, **changes):
    return toy_recipe(
        corpus,
        model=ModelConfig(
            scripted=scripted,
            usd_per_million_prompt_tokens=1.0,
            usd_per_million_completion_tokens=10.0,
        ),
        routes=[RouteConfig(route="toy_route:toy_samples", limit=12)],
        verify=VerifyConfig(k=2),
        **changes,
    )


def test_model_filters_run_and_cost_is_reported(corpus, tmp_path):
    summary = run_pipeline(with_model(corpus, "toy_route:reader"), tmp_path)
    assert summary["filters"]["grounding"] == {"pass": 12}
    assert summary["filters"]["robustness"] == {"pass": 12}
    assert summary["samples"]["exported"] == 12
    usage = json.loads((tmp_path / "usage.json").read_text())
    assert usage["answers"] == 12 * 2 * 2  # samples, k, closed book and full context
    cost = usage["prompt_tokens"] * 1e-6 + usage["completion_tokens"] * 1e-5
    assert usage["cost_usd"] == pytest.approx(cost, abs=1e-6)
    for sample in load_samples(tmp_path, with_text=False):
        assert sample.difficulty.pass_rate == 1.0
    # A run without the folder's stages asks nothing again.
    for stage in ("extend", "verify", "decontaminate"):
        (tmp_path / "work" / stage / "done.json").unlink()
    run_pipeline(with_model(corpus, "toy_route:dead_server"), tmp_path)
    again = json.loads((tmp_path / "usage.json").read_text())
    assert again == {**usage, "model": "toy_route:dead_server"}


def test_triples_that_a_model_extracts_reach_the_route(corpus, tmp_path):
    recipe = toy_recipe(
        corpus,
        model=ModelConfig(scripted="toy_route:extractor", concurrency=4),
        extract=ExtractConfig(triples=["pages"]),
        routes=[RouteConfig(route="toy_route:extracted_samples", limit=5)],
    )
    summary = run_pipeline(recipe, tmp_path / "read")
    assert summary["samples"]["composed"] == 5
    for sample in load_samples(tmp_path / "read"):
        (span,) = sample.evidence
        document = next(d for d in sample.documents if d.id == span.doc)
        fact = document.text[span.start : span.end]
        assert sample.answers[0] in fact and sample.derivation["subject"] in fact
    without = dataclasses.replace(recipe.model, scripted="toy_route:babbler")
    summary = run_pipeline(dataclasses.replace(recipe, model=without), tmp_path / "babble")
    assert summary["samples"]["composed"] == 0
    ((by, reasons),) = summary["dropped"].items()
    assert by == "extract" and list(reasons) == ["the reply holds no JSON dict"]
    # of three readings of each page; a lone brace is repaired and says nothing
    assert summary["documents"]["kept"] < reasons["the reply holds no JSON dict"] < 3 * 150
    with pytest.raises(InputError, match="extract.triples asks a model"):
        dataclasses.replace(recipe, model=None)


def test_what_a_route_drops_is_in_the_summary_by_reason(corpus, tmp_path):
    routes = [
        RouteConfig(route="toy_route:choosy_samples", limit=6, group_documents=50),
        RouteConfig(route="toy_route:toy_samples", limit=3),
    ]
    recipe = toy_recipe(corpus, routes=routes)
    summary = run_pipeline(recipe, tmp_path / "one")
    # Three groups of 50 pages: a reason of its own for each, and one for every second of a group.
    reasons = summary["dropped"]["toy_route:choosy_samples"]
    assert list(reasons)[0] == "the page is odd" and len(reasons) == 51
    assert reasons["the page is odd"] == 75 and sum(reasons.values()) == 75 + 150
    assert reasons["other reasons"] == 150 - 49
    assert list(summary["dropped"]) == ["toy_route:choosy_samples"]
    assert run_pipeline(recipe, tmp_path / "two", workers=2) == summary
    assert digest(tmp_path / "one") == digest(tmp_path / "two")


def test_a_model_that_talks_nonsense_fails_samples_but_not_the_run(corpus, tmp_path):
    summary = run_pipeline(with_model(corpus, "toy_route:babbler"), tmp_path)
    assert summary["filters"]["grounding"] == {"pass": 12}
    assert summary["filters"]["robustness"] == {"fail": 12}
    assert summary["samples"] == {"composed": 12, "exported": 0}


def test_a_dead_server_loses_nothing_already_paid_for(corpus, tmp_path, monkeypatch):
    whole = tmp_path / "whole"
    run_pipeline(with_model(corpus, "toy_route:reader"), whole)
    out = tmp_path / "out"
    monkeypatch.setattr(toy_route, "DIES_AFTER", 17)
    for deaths in range(48 // 17):
        with pytest.raises(ServerUnavailable):
            run_pipeline(with_model(corpus, "toy_route:dying_server"), out)
        usage = json.loads((out / "usage.json").read_text())
        assert usage["answers"] == 17 * (deaths + 1)  # it died again, with that much more kept
    run_pipeline(with_model(corpus, "toy_route:dying_server"), out)
    usage = json.loads((out / "usage.json").read_text())
    assert usage["answers"] == 48 == json.loads((whole / "usage.json").read_text())["answers"]
    assert (out / "samples.jsonl").read_bytes() == (whole / "samples.jsonl").read_bytes()


HOSTILE = ["not json", ("status", 503, {}), "no choices", "hang up", "half", "text"]


def test_over_http_a_hostile_server_then_a_dead_one(corpus, tmp_path):
    def recipe(url):
        model = ModelConfig(base_url=url, model="m", concurrency=2)
        routes = [RouteConfig(route="toy_route:toy_samples", limit=4)]
        return toy_recipe(corpus, model=model, routes=routes, verify=VerifyConfig(k=1))

    with serve(HOSTILE) as (server, url):
        summary = run_pipeline(recipe(url), tmp_path)
        # Four samples, two prompts each, and one more attempt for every fault.
        assert len(server.bodies) == 8 + len(HOSTILE)
    # The server shouts the prompt back: nothing known without it, everything in it.
    assert sum(summary["filters"]["grounding"].values()) == 4
    assert json.loads((tmp_path / "usage.json").read_text())["answers"] == 8
    before = (tmp_path / "samples.jsonl").read_bytes()
    for stage in ("verify", "decontaminate"):
        (tmp_path / "work" / stage / "done.json").unlink()
        for part in (tmp_path / "work" / stage).glob("part-*"):
            part.unlink()
    (tmp_path / "samples.jsonl").unlink()
    (tmp_path / "summary.json").unlink()
    run_pipeline(recipe("http://127.0.0.1:9/v1"), tmp_path)  # nobody listens there
    assert (tmp_path / "samples.jsonl").read_bytes() == before


# --- kills -----------------------------------------------------------------------


def command(recipe, out):
    arguments = ["synth", "run", str(recipe), "--out", str(out), "--workers", "2"]
    code = "import sys; from qwenlong.data.commands import app; app(sys.argv[2:])"
    return [sys.executable, "-c", code, *arguments]


def kill_until_done(recipe, out, kills, rng, longest):
    """Start the command and kill it at random moments, ``kills`` times; then let it finish.

    Every third time it is interrupted as by Ctrl-C.
    """
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{HERE}"}
    killed = 0
    while True:
        process = subprocess.Popen(
            command(recipe, out),
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        deadline = time.monotonic() + (rng.uniform(0.1, longest) if killed < kills else 300)
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        if process.poll() is None:
            how = signal.SIGKILL if killed % 3 else signal.SIGINT
            os.killpg(process.pid, how)
            assert process.wait(60) != 0
            process.stderr.close()
            killed += 1
            assert killed <= kills, "the last run did not finish in 300 s"
            continue
        error = process.stderr.read().decode()
        process.stderr.close()
        assert process.returncode == 0, error
        if killed >= kills:
            return
        # It finished before its time: take a stage away, so that there is something to kill.
        stage = rng.choice(STAGES)
        (out / "work" / stage / "done.json").unlink()
        longest *= 0.8


def check_kills(tmp_path, pages, limit, kills, seed, longest):
    corpus = toy_route.write_corpus(tmp_path / "pages", pages)
    recipe = toy_recipe(
        corpus, routes=[RouteConfig(route="toy_route:toy_samples", limit=limit, group_documents=50)]
    )
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe.to_json()))
    run_pipeline(load_recipe(path), tmp_path / "whole")
    kill_until_done(path, tmp_path / "killed", kills, random.Random(seed), longest)
    whole, killed = digest(tmp_path / "whole"), digest(tmp_path / "killed")
    del killed["report.png"]
    assert killed == whole


def test_killed_three_times_the_output_is_the_same(tmp_path):
    check_kills(tmp_path, pages=300, limit=60, kills=3, seed=0, longest=5.0)


@pytest.mark.real
def test_killed_twenty_times_the_output_is_the_same(tmp_path):
    check_kills(tmp_path, pages=4000, limit=1500, kills=20, seed=1, longest=12.0)


def test_workers_end_with_their_parent(tmp_path):
    corpus = toy_route.write_corpus(tmp_path / "pages", 60)
    path = tmp_path / "recipe.yaml"
    slow = RouteConfig(route="toy_route:slow_samples", limit=10)
    path.write_text(yaml.safe_dump(toy_recipe(corpus, routes=[slow]).to_json()))
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{HERE}"}
    pids = tmp_path / "pids"
    environment["TOY_PIDS"] = str(pids)
    process = subprocess.Popen(
        command(path, tmp_path / "out"), env=environment, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while not pids.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    worker = int(pids.read_text())
    process.kill()  # the parent alone
    process.wait()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and Path(f"/proc/{worker}").exists():
        time.sleep(0.05)
    assert not Path(f"/proc/{worker}").exists()
