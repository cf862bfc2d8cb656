"""Extension: target lengths, evidence spread as measured, no distractor that spoils a question."""

import hashlib
import json
import random
from collections import Counter

import numpy as np
import pytest
from toy_route import WORDS, filler

from qwenlong.data.documents import SourceDocument, count_tokens
from qwenlong.data.extend import DistractorPool, Extender, documents_apart, evidence_positions
from qwenlong.data.leaks import AnswerFinder, normalise
from qwenlong.data.recipe import ExtendConfig, SourceConfig
from qwenlong.data.store import INDEX_DTYPE, DocumentStore, Texts, index_row, sha256
from qwenlong.prompts import document_block, view
from qwenlong.types import Document, Evidence, Sample

SOURCES = [
    SourceConfig(name="pages", kind="text", path="x"),
    SourceConfig(name="facts", kind="text", path="x", topics=["cities"]),
    SourceConfig(name="tables", kind="csv", path="x", topics=["cities", "rivers"]),
]


def make_store(folder, documents):
    """A store of ``(document, source position)`` pairs, as the pipeline writes it."""
    folder.mkdir(parents=True)
    rows, lines, offset = [], [], 0
    for document, source in documents:
        n_tokens = count_tokens(document.text)
        line = json.dumps({**document.to_json(), "n_tokens": n_tokens}).encode() + b"\n"
        rows.append(index_row(document, 0, offset, len(line), n_tokens, source))
        lines.append(line)
        offset += len(line)
    np.save(folder / "index.npy", np.array(rows, dtype=INDEX_DTYPE))
    (folder / "part-000000.jsonl").write_bytes(b"".join(lines))
    return DocumentStore(folder, folder)


def page(number, *, sentences=10, source=0, extra="", **fields):
    text = f"{filler(random.Random(number), sentences)} {extra}".strip()
    base = {"title": f"page {number}", "source": SOURCES[source].name}
    return SourceDocument(text=text, **{**base, **fields}), source


def make_extender(tmp_path, documents, seed=0, **config):
    store = make_store(tmp_path / "store", documents)
    numbers = np.arange(len(store))
    DistractorPool.build(store, numbers, config.pop("pool_documents", 10_000), tmp_path / "pool")
    texts = Texts(store, [])
    return Extender(
        store,
        DistractorPool(store, tmp_path / "pool"),
        SOURCES,
        ExtendConfig(**{"lengths": {4096: 1}, **config}),
        tokenizer="chars4",
        seed=seed,
        resolve=texts.resolve,
    )


def ask(about, *, name="s", question="Which page is it?", answer="zebra", **fields):
    base = {
        "task": "multihop_qa",
        "answer_type": "text",
        "reward": "cover",
        "documents": [Document(id=d.id, title=d.title, ref=sha256(d.text)) for d in about],
        "evidence": [Evidence(doc=d.id, start=0, end=10) for d in about],
    }
    return Sample(id=name, question=question, answers=[answer], **{**base, **fields})


def test_contexts_reach_their_target_and_count_real_tokens(tmp_path):
    documents = [page(n, sentences=3 + n % 30) for n in range(600)]
    lengths = {2048: 3, 8192: 2, 16384: 1}
    extender = make_extender(tmp_path, documents, lengths=lengths)
    targets = Counter()
    for i in range(60):
        evidence = [documents[j][0] for j in (3 * i, 3 * i + 1, 3 * i + 2)]
        sample = extender.extend(ask(evidence, name=f"s{i}"))
        target = sample.placement["target_tokens"]
        targets[target] += 1
        assert 0.9 * target <= sample.tokens.n <= target
        block = document_block(view(sample).documents, extender.resolve)
        assert sample.tokens.n == count_tokens(block)
        assert {d.id for d in sample.documents if d.role == "evidence"} == {d.id for d in evidence}
        ids = [d.id for d in sample.documents]
        assert len(ids) == len(set(ids))
        assert sample.placement["hard"] + sample.placement["random"] == len(ids) - 3
    assert targets[2048] > targets[8192] > targets[16384] > 0


def test_evidence_is_spread_and_not_only_at_the_ends(tmp_path):
    documents = [page(n) for n in range(400)]
    extender = make_extender(tmp_path, documents, spread_share=1.0)
    apart, positions = Counter(), []
    for i in range(80):
        evidence = [documents[j][0] for j in range(4 * i, 4 * i + 3 + i % 2)]
        sample = extender.extend(ask(evidence, name=f"s{i}"))
        apart[sample.placement["documents_apart"]] += 1
        positions += [p for _, p in sample.placement["positions"]]
    assert sum(n for k, n in apart.items() if k >= 3) >= 0.95 * 80
    histogram, _ = np.histogram(positions, bins=10, range=(0, 1))
    assert histogram.min() > 0 and histogram.max() < 0.3 * len(positions)


def test_measured_positions_are_those_of_the_text(tmp_path):
    documents = [page(n) for n in range(200)]
    extender = make_extender(tmp_path, documents)
    evidence = [documents[j][0] for j in (5, 50, 150)]
    spans = [
        Evidence(doc=d.id, start=len(d.text) // 2, end=len(d.text) // 2 + 20) for d in evidence
    ]
    sample = extender.extend(ask(evidence, evidence=spans))
    block = document_block(view(sample).documents, extender.resolve)
    for document, span in zip(evidence, spans, strict=True):
        at = block.index(document.text) + span.start + 10
        measured = dict(sample.placement["positions"])[document.id]
        assert measured == pytest.approx(at / len(block), abs=0.02)


@pytest.mark.parametrize(
    "positions, count",
    [
        ([], 0),
        ([0.5], 1),
        ([0.0, 0.25], 1),  # not more than 25 %
        ([0.0, 0.26, 0.5], 2),
        ([0.0, 0.26, 0.52], 3),
        ([0.9, 0.1, 0.5, 0.6], 3),
        ([0.0, 0.2, 0.3, 0.6, 0.7, 0.9], 4),  # 0, 0.3, 0.6, 0.9
    ],
)
def test_documents_apart(positions, count):
    assert documents_apart(positions) == count


def test_positions_by_hand():
    sample = Sample(
        id="x",
        task="t",
        question="q",
        answers=["a"],
        answer_type="text",
        reward="cover",
        documents=[
            Document(id="a", text="x" * 100),
            Document(id="b", text="y" * 100, role="distractor"),
            Document(id="c", text="z" * 100),
        ],
        evidence=[Evidence(doc="a", start=0, end=20), Evidence(doc="a", start=40, end=60)],
    )
    # a: spans around 10 and 50 of 100 characters: 30 % of its 20 tokens; c: no span, its middle.
    found = evidence_positions(sample, [20, 60, 20], lambda ref: "")
    assert found == {"a": pytest.approx(0.06), "c": pytest.approx(0.9)}


def test_no_distractor_spoils_the_question(tmp_path):
    answer = "zebra crossing"
    evidence = [
        page(0, source=1, extra=f"The answer is {answer}.", title="Town"),
        page(1, source=1, title="Lake", meta={"table": "t1"}),
    ]
    allowed = [page(n, source=n % 2) for n in range(2, 40)]
    spoiled = [
        page(100, extra="It says Zebra  crossing."),  # the answer
        page(101, title=" TOWN"),  # the title of an evidence document
        page(102, meta={"table": "t1"}),  # rows of an evidence table
        page(103, source=2),  # a source that could contradict the evidence
    ]
    extender = make_extender(
        tmp_path, [*evidence, *allowed, *spoiled], lengths={65536: 1}, hard_share=0.5
    )
    sample = extender.extend(ask([d for d, _ in evidence], answer=answer))
    distractors = {d.title for d in sample.documents if d.role == "distractor"}
    assert distractors == {d.title for d, _ in allowed}
    finder = AnswerFinder(sample)
    for document in sample.documents:
        if document.role == "distractor":
            assert not finder.is_in(normalise(extender.resolve(document.ref)))


def test_documents_with_facts_that_a_graph_did_not_see_stay_out(tmp_path):
    facts = {"triples": [["a", "is", "b", 0, 5]]}
    documents = [page(n, source=1, meta=facts) for n in range(30)]
    documents += [page(n, meta=facts if n % 2 else {}) for n in range(30, 60)]
    extender = make_extender(tmp_path, documents, lengths={65536: 1})
    sample = ask([documents[3][0]], derivation={"kind": "graph"}, group=[0, 19])
    extended = extender.extend(sample)
    numbers = {int(d.title.split()[1]) for d in extended.documents if d.role == "distractor"}
    assert numbers == set(range(20)) - {3} | set(range(30, 60, 2))
    template = sample.model_copy(update={"derivation": {"kind": "template"}})
    assert len(extender.extend(template).documents) == 60


def test_hard_distractors_are_about_the_question(tmp_path):
    about = [page(n, extra="Quokkas of Rottnest eat leaves at dusk.") for n in range(20)]
    others = [page(n) for n in range(100, 400)]
    extender = make_extender(tmp_path, [*about, *others], lengths={4096: 1}, hard_share=0.5)
    evidence, _ = page(1000)
    own = Document(id=evidence.id, text=evidence.text)  # not of the corpus
    sample = extender.extend(
        ask([evidence], question="What do quokkas of Rottnest eat?", documents=[own])
    )
    titles = {d.title for d, _ in about}
    hard = [d for d in sample.documents if d.title in titles]
    assert len(hard) >= sample.placement["hard"] > 0


def test_the_target_fits_evidence_and_pool(tmp_path):
    documents = [page(n, sentences=8) for n in range(30)]
    extender = make_extender(tmp_path, documents, lengths={512: 1, 2048: 1, 1_000_000: 1})
    assert {
        extender.extend(ask([documents[n][0]], name=f"n{n}")).placement["target_tokens"]
        for n in range(20)
    } == {512, 2048}  # the pool cannot fill a million
    long, _ = page(99, sentences=120)
    sample = extender.extend(ask([], documents=[Document(id="long", text=long.text)]))
    assert sample.placement["target_tokens"] == 2048  # 512 does not hold the evidence
    assert sample.documents[[d.id for d in sample.documents].index("long")].text == long.text


def test_an_empty_pool_leaves_the_evidence_alone(tmp_path):
    documents = [page(0)]
    extender = make_extender(tmp_path, documents)
    sample = extender.extend(ask([documents[0][0]]))
    assert len(sample.documents) == 1
    assert sample.placement["positions"][0][0] == documents[0][0].id


def test_order_of_work_and_pool_size_do_not_matter(tmp_path):
    documents = [page(n) for n in range(300)]
    samples = [ask([documents[i][0], documents[i + 1][0]], name=f"s{i}") for i in range(12)]
    extender = make_extender(tmp_path / "a", documents)
    forward = {s.id: extender.extend(s).to_json() for s in samples}
    backward = {s.id: extender.extend(s).to_json() for s in reversed(samples)}
    assert forward == backward
    other = make_extender(tmp_path / "b", documents, seed=1)
    assert other.extend(samples[0]).to_json() != forward["s0"]
    small = make_extender(tmp_path / "c", documents, pool_documents=40)
    assert len(small.pool.numbers) == 40
    assert (np.diff(small.pool.numbers) > 0).all()


def test_store_finds_texts_by_hash(tmp_path):
    documents = [page(n) for n in range(50)]
    store = make_store(tmp_path / "store", documents)
    for number, (document, _) in enumerate(documents):
        assert store.find(hashlib.sha256(document.text.encode()).hexdigest()) == number
        assert store.document(number).text == document.text
        assert store.normalised(number) == normalise(document.text)
        assert store.document(number).to_json() == document.to_json() | {
            "n_tokens": count_tokens(document.text)
        }
    assert store.find("0" * 64) is None
    (tmp_path / "own.jsonl").write_text(
        json.dumps({"sha256": sha256(WORDS[0]), "text": WORDS[0]}) + "\n"
    )
    texts = Texts(store, [tmp_path / "own.jsonl"])
    assert texts.resolve(sha256(WORDS[0])) == WORDS[0]
    assert texts.split(sha256(WORDS[0])) is None
    assert texts.split(sha256(documents[0][0].text)) == documents[0][0].split
    with pytest.raises(KeyError):
        texts.resolve("f" * 64)
