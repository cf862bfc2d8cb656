"""The demonstration at full size: five tasks, 4K to 128K tokens, every answer worked out again."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import checkers_tables
import pytest
from checkers_text import PageTable, compute_answer
from test_text_tasks import Checker, replay

from qwenlong.data.documents import count_tokens
from qwenlong.data.export import load_samples
from qwenlong.data.verify import MODEL_FILTERS
from qwenlong.prompts import document_block, view
from qwenlong.storage import read_jsonl
from qwenlong.types import TASKS, split_of

ROOT = Path(__file__).parents[3]
PAGES = ("countries", "airports", "time-zones", "python-pages")

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """``(folder, seconds, summary)`` of a run of the recipe as it is."""
    out = tmp_path_factory.mktemp("demo")
    code = "import sys; from qwenlong.data.commands import app; app(sys.argv[1:])"
    arguments = ["run", str(ROOT / "recipes" / "synth-demo.yaml"), "--out", str(out)]
    started = time.monotonic()
    subprocess.run(
        [sys.executable, "-c", code, *arguments, "--workers", "2"],
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    seconds = time.monotonic() - started
    return out, seconds, json.loads((out / "summary.json").read_text())


@pytest.fixture(scope="module")
def samples(demo):
    return list(load_samples(demo[0]))


def evidence_only(sample):
    kept = [d for d in sample.documents if d.role == "evidence"]
    return sample.model_copy(update={"documents": kept})


def test_size_and_time(demo):
    out, seconds, summary = demo
    assert summary["samples"]["exported"] >= 1000
    assert set(summary["tasks"]) == set(TASKS) - {"needle"}
    assert min(summary["tasks"].values()) >= 150
    assert summary["tokens"]["least"] < 4_500 and summary["tokens"]["most"] > 120_000
    assert summary["splits"]["eval"] >= 20
    assert seconds < 600
    assert (out / "report.png").exists()


def test_multihop_evidence_is_spread(demo, samples):
    assert demo[2]["multihop"]["share"] >= 0.5
    spread = [s for s in samples if s.task == "multihop_qa"]
    far = 0
    for sample in spread:
        positions = sorted(p for _, p in sample.placement["positions"])
        count, last = 0, -1.0
        for position in positions:
            if position - last > 0.25:
                count, last = count + 1, position
        far += count >= 3
    assert far / len(spread) >= 0.5


def test_samples_are_whole(samples):
    assert len({s.id for s in samples}) == len(samples)
    assert len({s.question for s in samples}) > 0.98 * len(samples)
    for sample in samples:
        texts = {d.id: d.text for d in sample.documents if d.role == "evidence"}
        assert {e.doc for e in sample.evidence} == set(texts)
        assert all(texts[e.doc][e.start : e.end].strip() for e in sample.evidence)
        assert all(v.verdict != "fail" for v in sample.filters.values())
        assert all(sample.filters[name].verdict == "not_run" for name in MODEL_FILTERS)
        assert sample.derivation["kind"] in ("graph", "sql", "transcript", "template")
        if sample.task != "dialogue_memory":  # a dialogue is written around its sources
            assert {split_of(text) for text in texts.values()} == {sample.split}


def test_token_counts_are_real(samples):
    for sample in samples[::25]:
        block = document_block(view(sample).documents)
        assert sample.tokens.n == count_tokens(block, "qwen")


def test_graph_answers_are_unique_in_the_corpus_and_in_the_context(demo, samples):
    parts = sorted((demo[0] / "work" / "collect").glob("part-??????.jsonl"))
    rows = [row for part in parts for row in read_jsonl(part) if row["source"] in PAGES]
    pages = {row["id"] for row in rows}
    corpus = PageTable((row["title"], row["text"]) for row in rows)
    multihop = [s for s in samples if s.task == "multihop_qa"]
    for sample in multihop:
        query = sample.derivation["query"]
        shown = PageTable((d.title, d.text) for d in sample.documents if d.id in pages)
        for table in (corpus, shown):
            found = table.rows(query)
            assert len(found) == 1, sample.question
            row = dict(zip(query["select"], found[0], strict=True))
            assert compute_answer(sample.derivation["compute"], row) == sample.answers[0]


def test_table_answers_agree_with_a_second_engine(samples):
    numeric = [s for s in samples if s.task == "corpus_numeric"]
    for sample in numeric:
        bare = evidence_only(sample)
        assert checkers_tables.rederive(bare) == sample.answers[0], sample.question


def test_reading_and_choice_answers_agree_with_the_documents(samples):
    checker = Checker()
    for sample in samples:
        if sample.task == "reading_qa":
            assert checker.fits(evidence_only(sample))(sample.answers[0]), sample.question
        elif sample.task == "multiple_choice":
            fits = checker.fits(evidence_only(sample))
            right = [chr(ord("A") + i) for i, option in enumerate(sample.choices) if fits(option)]
            assert right == sample.answers, sample.question


def test_dialogue_answers_agree_with_a_replay(samples):
    for sample in samples:
        if sample.task == "dialogue_memory":
            answer = replay(evidence_only(sample)).removesuffix(" euros")
            assert answer == sample.answers[0], sample.question


def test_rule_filters_reject_few_of_the_rule_made_samples(demo):
    samples = demo[2]["samples"]
    assert samples["exported"] / samples["composed"] >= 0.97
