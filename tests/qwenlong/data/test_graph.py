"""Graph: rendered facts, merging, queries, paths, and multi-hop samples checked in SQLite."""

import json
import random
import re

import pytest
from checkers_text import PageTable, compute_answer, is_rewarded, read_page

from qwenlong.data.documents import SourceDocument
from qwenlong.data.graph import build_graph, multihop_samples
from qwenlong.data.graph_questions import answer_from
from qwenlong.data.graph_relations import (
    RELATIONS,
    canonical_relation,
    offset_seconds,
    relation_of,
)
from qwenlong.data.graph_sources import (
    Page,
    Triple,
    airport_documents,
    country_documents,
    document_triples,
    format_offset,
    join_names,
    structured_documents,
    with_article,
    zone_documents,
)
from qwenlong.data.knowledge_graph import (
    KnowledgeGraph,
    Query,
    merge_names,
    normalise_name,
    step_atom,
)
from qwenlong.data.python_pages import python_documents
from qwenlong.data.samples import contains_term
from qwenlong.llm import ScriptedClient
from qwenlong.types import Sample

LIBRARY = {
    "shop/__init__.py": "",
    "shop/base.py": '"""Things that are sold here."""\nimport abc\n\n\nclass Item(abc.ABC):\n'
    "    tax = 1\n\n    def price(self):\n        return 1\n\n    def label(self):\n        pass\n",
    "shop/book.py": "from .base import Item\n\n\nclass Book(Item):\n    async def read(self):\n"
    "        pass\n\n    label = None\n",
    "shop/broken.py": "def (:\n",
    "shop/tests/test_book.py": "import shop\n",
}


@pytest.fixture(scope="module")
def python_pages():
    return python_documents()


@pytest.fixture(scope="module")
def corpus(python_pages):
    return [*structured_documents(airports=800), *python_pages]


@pytest.fixture(scope="module")
def graph(corpus):
    return build_graph(corpus)


@pytest.fixture(scope="module")
def table(corpus):
    return PageTable((d.title, d.text) for d in corpus)


@pytest.fixture(scope="module")
def samples(corpus):
    return list(multihop_samples(corpus, seed=3, limit=600))


# --- sources -----------------------------------------------------------------


def test_facts_stand_where_they_say(corpus):
    assert len(corpus) > 1500
    count = 0
    for document in corpus:
        for triple in document_triples(document):
            assert triple.object in document.text[triple.start : triple.end]
            assert triple.relation in RELATIONS
            count += 1
    assert count > 20_000
    assert len({d.id for d in corpus}) == len({d.title for d in corpus}) == len(corpus)


def test_pages_read_back_to_the_same_facts(corpus, table):
    recorded = {t[:3] for d in corpus for t in document_triples(d)}
    assert table.facts() == recorded


def test_known_facts():
    pages = {d.title: d for d in [*country_documents(), *zone_documents()]}
    nepal = {t[1:3] for t in document_triples(pages["Nepal"])}
    assert {("capital", "Kathmandu"), ("alpha3", "NPL"), ("borders", "India")} <= nepal
    zone = {t[1:3] for t in document_triples(pages["Time zone Asia/Kathmandu"])}
    assert {("standard_offset", "UTC+05:45"), ("mean_time_until", "1920")} <= zone
    assert ("standard_since", "1986") in zone
    paris = {t[1:3] for t in document_triples(pages["Time zone Europe/Paris"])}
    assert ("mean_time", "UTC+00:09:21") in paris
    lesotho = {t[1:3] for t in document_triples(pages["Lesotho"])}
    assert ("only_neighbour", "South Africa") in lesotho


def test_a_larger_limit_keeps_the_airports():
    few = [d.id for d in airport_documents(20)]
    assert few == [d.id for d in airport_documents(50)][:20]


def test_python_pages_of_a_folder(tmp_path):
    for name, text in LIBRARY.items():
        path = tmp_path / "code" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    pages = {d.title: d for d in python_documents(tmp_path / "code")}
    assert list(pages) == [
        "Module shop",
        "Module shop.base",
        "Class shop.base.Item",
        "Module shop.book",
        "Class shop.book.Book",
    ]
    book = [t[:3] for t in document_triples(pages["Class shop.book.Book"])]
    assert ("shop.book.Book", "only_base", "shop.base.Item") in book
    assert ("shop.book.Book", "method", "read") in book
    assert ("shop.book.Book", "attribute", "label") in book
    item = [t[:3] for t in document_triples(pages["Class shop.base.Item"])]
    assert ("shop.base.Item", "only_base", "abc.ABC") in item
    assert [o for _, r, o in item if r == "method"] == ["price", "label"]
    assert ("shop.book", "imports", "shop.base") in [
        t[:3] for t in document_triples(pages["Module shop.book"])
    ]
    with pytest.raises(ValueError, match="not a folder"):
        python_documents(tmp_path / "missing")


def test_page_refuses_a_sentence_that_does_not_state_its_fact():
    page = Page("X", "country")
    with pytest.raises(ValueError, match="is not in"):
        page.say("The capital of X is A.", ("X", "capital", "B"))


def test_names_in_text():
    assert join_names(["A"]) == "A"
    assert join_names(["A", "B", "C"]) == "A, B and C"
    assert join_names(["A and B", "C"]) == "A and B; and C"
    assert with_article("Netherlands") == "the Netherlands" and with_article("Nepal") == "Nepal"
    assert format_offset(-3 * 3600 - 1800) == "UTC-03:30" and format_offset(561) == "UTC+00:09:21"
    assert offset_seconds("UTC-03:30") == -12600
    with pytest.raises(ValueError, match="not an offset"):
        offset_seconds("+3")


def test_the_same_pages_every_time():
    assert [d.id for d in structured_documents(airports=30)] == [
        d.id for d in structured_documents(airports=30)
    ]
    with pytest.raises(ValueError, match="unknown source"):
        structured_documents(sources=["rivers"])


# --- graph -------------------------------------------------------------------

FACTS = [
    ("A", "borders", "B"),
    ("B", "borders", "A"),
    ("B", "borders", "C"),
    ("C", "borders", "B"),
    ("A", "area", "1,200"),
    ("B", "area", "900"),
    ("C", "area", "3,000"),
    ("A", "currency", "EUR"),
    ("B", "currency", "EUR"),
    ("B", "currency", "CHF"),
]


def _triples(facts):
    return [Triple(s, r, o, f"doc-{s}", 10 * i, 10 * i + 5) for i, (s, r, o) in enumerate(facts)]


def test_queries_by_hand():
    graph = KnowledgeGraph(_triples(FACTS))
    assert graph.solve(Query(["?x"], [("A", "borders", "?x")])) == [("B",)]
    both = Query(["?x"], [("?x", "currency", "EUR")], absent=[("?x", "currency", "CHF")])
    assert graph.solve(both) == [("A",)]
    ranged = Query(["?x"], [("?x", "area", "?v")], ranges=[("?v", 1000, 3000)])
    assert sorted(graph.solve(ranged)) == [("A",), ("C",)]
    assert len(graph.solve(ranged, limit=1)) == 1
    chain = Query(["?y"], [("A", "borders", "?x"), ("?x", "borders", "?y")])
    assert sorted(graph.solve(chain)) == [("A",), ("C",)]
    assert graph.solve(Query(["?x"], [("?x", "borders", "?x")])) == []
    assert graph.solve(Query(["?x"], [("nowhere", "borders", "?x")])) == []


def test_one_edge_for_a_fact_with_every_statement():
    twice = [*_triples(FACTS), Triple("A", "area", "1,200", "doc-other", 3, 8)]
    graph = KnowledgeGraph(twice + twice)
    assert graph.graph.number_of_edges() == len(FACTS)
    assert [s.doc for s in graph.statements(("A", "area", "1,200"))] == ["doc-A", "doc-other"]
    assert graph.statements(("A", "area", "7")) == []


@pytest.mark.parametrize("search", ["random_walk", "breadth_first_path"])
@pytest.mark.parametrize("length", [1, 3, 5])
def test_paths_are_edges_and_visit_nothing_twice(corpus, graph, search, length):
    allowed = {d.id for d in corpus if d.split == "train"}
    rng = random.Random(length)
    starts = rng.sample([("country", n) for n in graph.names("country")], 40)
    found = 0
    for start in starts:
        path = getattr(graph, search)(rng, start, length, allowed)
        if path is None:
            continue
        found += 1
        nodes = [start, *(step.node for step in path)]
        assert len(path) == length and len(set(nodes)) == length + 1
        for node, step in zip(nodes, path, strict=False):
            stated = graph.statements(step_atom(node, step))
            assert any(s.doc in allowed for s in stated)
    assert found > 10


# --- merging -----------------------------------------------------------------


@pytest.mark.parametrize(
    "one, other",
    [
        ("The University of Padova", "university of padova"),
        ("Curaçao", "Curacao"),
        ("Washington, D.C.", "Washington D.C."),
        ("email.message", "Email.Message."),
    ],
)
def test_normal_forms_agree(one, other):
    assert normalise_name(one) == normalise_name(other)


def test_normal_forms_differ():
    assert normalise_name("email.message") != normalise_name("email message")
    assert normalise_name("++") == "++" and normalise_name("…") == "…"


def test_merging_by_alias_form_and_likeness():
    known = {normalise_name(n): n for n in ("Nepal", "Niger", "Nigeria")}
    known[normalise_name("Federal Democratic Republic of Nepal")] = "Nepal"
    names = [
        "federal democratic republic of Nepal",
        "Nigeria",
        "Acme Robotics Incorporated",
        "Acme Robotics Incorporatd",
        "Boeing 737-800",
        "Boeing 737-900",
    ]
    merged = merge_names(names, known)
    assert merged["federal democratic republic of Nepal"] == "Nepal"
    assert merged["Nigeria"] == "Nigeria"
    assert merged["Acme Robotics Incorporatd"] == "Acme Robotics Incorporated"
    assert merged["Boeing 737-900"] == "Boeing 737-900"  # other digits, another thing


def test_objects_of_one_fact_stay_apart():
    pair = ["Johannes Sebastian Back", "Johannes Sebastian Bach"]
    assert len(set(merge_names(pair, {}).values())) == 1
    assert len(set(merge_names(pair, {}, distinct=[frozenset(pair)]).values())) == 2


@pytest.mark.parametrize(
    "name, expected",
    [
        ("capital city", ("capital", False)),
        ("Has_Capital", ("capital", False)),
        ("is capital of", ("capital", True)),
        ("is imported by", ("imports", True)),
        ("founded by", ("founded_by", False)),
    ],
)
def test_relation_names(name, expected):
    assert canonical_relation(name) == expected


def test_extracted_facts_join_the_graph():
    extracted = [
        Triple("Kathmandu", "is capital of", "Nepál", "note", 0, 9),
        Triple("Acme", "capital", "2 million", "note", 10, 19),
        Triple("Acme", "based in", "the Nepal", "note", 20, 29),
    ]
    pages = country_documents()
    graph = build_graph(pages, extracted)
    assert "note" in [s.doc for s in graph.statements(("Nepal", "capital", "Kathmandu"))]
    assert graph.objects("Acme", "~capital") == ["2 million"]  # no country: another relation
    assert graph.objects("Acme", "capital") == []
    assert graph.objects("Acme", "~based_in") == ["Nepal"]
    assert graph.merged == {"Nepál": "Nepal", "the Nepal": "Nepal"}
    assert any(s.node == ("", "Acme") for s in graph.steps(("country", "Nepal")))


def test_questions_from_extracted_facts_alone():
    texts = {
        "one": "Acme Robotics was founded by Lena Ortiz.",
        "two": "Lena Ortiz studied at the University of Padova.",
        "three": "The Univ. of Padova was led by Marco Zen.",
    }
    documents = [SourceDocument(title=k, text=t, source="notes") for k, t in texts.items()]
    names = [
        ("Acme Robotics", "founded by", "Lena Ortiz"),
        ("Lena Ortiz", "studied at", "University of Padova"),
        ("the university of Padova", "led by", "Marco Zen"),
    ]
    triples = [Triple(*n, d.id, 0, len(d.text)) for n, d in zip(names, documents, strict=True)]
    found = list(multihop_samples(documents, seed=0, limit=30, extracted=triples, hops=(3, 3)))
    assert [s.answers for s in found] == [["Marco Zen"]]  # once, not once for each wording
    assert all(len(s.documents) == 3 and len(s.derivation["path"]) == 3 for s in found)
    assert all("founded by" in s.question for s in found)
    wrong = [triples[0]._replace(end=10_000)]
    with pytest.raises(ValueError, match="do not have"):
        list(multihop_samples(documents, seed=0, limit=1, extracted=wrong))


NOTES = {
    "Note one": ("Acme Robotics", "founded by", "Lena Ortiz", "was founded by"),
    "Note two": ("Lena Ortiz", "studied at", "the University of Padova", "studied at"),
    "Note three": ("The University of Padova", "led by", "Marco Zen", "is led by"),
}


@pytest.mark.parametrize("character, expected", [("good", 1), ("lying", 0), ("malformed", 0)])
def test_a_model_reads_the_facts(character, expected):
    documents = [
        SourceDocument(title=title, text=f"{s} {words} {o}.", source="notes")
        for title, (s, _, o, words) in NOTES.items()
    ]

    def reply(messages):
        for s, relation, o, words in NOTES.values():
            if f"{s} {words} {o}." not in messages[0]["content"]:
                continue
            if character == "malformed":
                return "I found { several facts"
            quote = f"{s} {words} {o}." if character == "good" else f"{o} {words} {s}."
            fact = {"subject": s, "relation": relation, "object": o, "quote": quote}
            return json.dumps({"triples": [fact]})
        raise AssertionError(messages)

    client = ScriptedClient(reply)
    found = list(multihop_samples(documents, seed=0, limit=5, hops=(3, 3), client=client))
    assert [s.answers for s in found] == [["Marco Zen"]] * expected
    assert len(client.calls) == 9  # three documents, three readings each
    pages = country_documents()[:3]
    list(multihop_samples(pages, seed=0, limit=1, client=client))
    assert len(client.calls) == 9  # pages with facts of their own are not read


# --- samples -----------------------------------------------------------------


def test_every_answer_is_derived_again_in_sql(samples, table):
    assert len(samples) == 600
    for sample in samples:
        query = sample.derivation["query"]
        rows = table.rows(query)
        assert len(rows) == 1, sample.question
        row = dict(zip(query["select"], rows[0], strict=True))
        assert compute_answer(sample.derivation["compute"], row) == sample.answers[0]


def test_the_documents_of_a_sample_are_enough(samples):
    for sample in samples[:200]:
        table = PageTable((d.title, d.text) for d in sample.documents)
        rows = table.rows(sample.derivation["query"])
        assert len(rows) == 1, sample.question
        row = dict(zip(sample.derivation["query"]["select"], rows[0], strict=True))
        assert compute_answer(sample.derivation["compute"], row) == sample.answers[0]


def test_evidence_holds_each_fact(samples):
    for sample in samples:
        texts = {d.id: d.text for d in sample.documents}
        spans = {(e.doc, e.start, e.end) for e in sample.evidence}
        assert {e.doc for e in sample.evidence} == set(texts)
        for subject, relation, obj, doc, start, end in sample.derivation["triples"]:
            assert obj in texts[doc][start:end]
            assert (doc, start, end) in spans
            assert relation_of(relation).name == relation and subject
        for subject, relation, obj in sample.derivation["query"]["absent"]:
            if not subject.startswith("?") and not obj.startswith("?"):
                pages = [d for d in sample.documents if d.title.split(" ", 1)[-1] == subject]
                facts = {f for d in pages for f in read_page(d.title, d.text)}
                assert pages and (subject, relation, obj) not in facts


def test_questions_do_not_tell_the_answer_or_the_way(samples):
    for sample in samples:
        assert not contains_term(sample.question, sample.answers[0])
        bound = sample.derivation["query"]["where"]
        variables = {t for atom in bound for t in (atom[0], atom[2]) if t.startswith("?")}
        facts = sample.derivation["triples"]
        for (s, _, o), fact in zip(bound, facts, strict=True):
            for term, name in ((s, fact[0]), (o, fact[2])):
                if term in variables and relation_of(fact[1]).joins_entities:
                    assert not re.search(rf"(?<![\w.]){re.escape(name)}(?!\w)", sample.question)
        # Every constant of the query is said, unless it is a label of a vague period or a name.
        for s, relation, o in bound:
            for term in (s, o):
                if not term.startswith("?"):
                    assert term in sample.question, (relation, term, sample.question)


def test_shape_of_samples(samples):
    ids = {s.id for s in samples}
    assert len(ids) == len({s.question for s in samples}) == len(samples)
    for sample in samples:
        assert Sample.model_validate(sample.to_json()) == sample
        assert sample.task == "multihop_qa" and is_rewarded(sample)
        assert 2 <= sample.derivation["hops"] <= 6 and len(sample.documents) >= 2
        assert sample.question[-1] in "?." and "  " not in sample.question
        assert "{" not in sample.question and sample.question[0].isupper()
        if sample.derivation["template"] == "common_cause":
            are_two = re.search(r"(?:modules|deleted,) [^\s,]+ and ", sample.question)
            assert ("both" in sample.question) is (are_two is not None), sample.question
        splits = {SourceDocument(text=d.text, source="x").split for d in sample.documents}
        assert splits == {sample.split}
    subtypes = [s.subtype for s in samples]
    assert {t: subtypes.count(t) >= 60 for t in set(subtypes)} == dict.fromkeys(
        ("multi_fact", "temporal", "causal", "hypothetical"), True
    )
    assert {s.split for s in samples} == {"train", "eval"}
    assert sum(len(s.documents) >= 3 for s in samples) >= 0.8 * len(samples)
    assert {s.derivation["obfuscation"] for s in samples} == {None, "temporal", "institutional"}
    assert {s.derivation["hops"] for s in samples} == {2, 3, 4, 5, 6}


def test_deterministic_in_the_seed(corpus):
    pages = [d for d in corpus if d.meta["entity_type"] in ("country", "time zone")]
    one, again = (list(multihop_samples(pages, seed=3, limit=50)) for _ in range(2))
    assert one == again
    other = list(multihop_samples(pages, seed=4, limit=50))
    assert len({s.question for s in other} & {s.question for s in one}) < 10


def test_small_and_empty_corpora_end():
    assert list(multihop_samples([], seed=0, limit=5)) == []
    plain = SourceDocument(text="No facts here.", source="x")
    assert list(multihop_samples([plain], seed=0, limit=5)) == []
    pages = country_documents()[:60]
    few = list(multihop_samples(pages, seed=0, limit=10_000))
    assert 0 < len(few) < 10_000
    assert list(multihop_samples(pages, seed=0, limit=0)) == []
    with pytest.raises(ValueError, match="hops is"):
        list(multihop_samples(pages, seed=0, limit=1, hops=(1, 3)))


@pytest.mark.parametrize(
    "compute, values, expected",
    [
        ({"op": "number", "of": "?a"}, {"?a": "1,433.2"}, "1433.2"),
        ({"op": "difference", "of": ["?a", "?b"]}, {"?a": "1890", "?b": "1912"}, "22"),
        ({"op": "sum", "of": ["?a", "?b"]}, {"?a": "2.02", "?b": "10"}, "12.02"),
        ({"op": "offset_minutes", "of": "?a"}, {"?a": "UTC-03:30"}, "-210"),
        ({"op": "offset_seconds", "of": "?a"}, {"?a": "UTC+00:09:21"}, "561"),
        (
            {"op": "clock", "at": "23:30", "from": "?a", "to": "?b", "shift": 0},
            {"?a": "UTC+01:00", "?b": "UTC+05:45"},
            "04:15",
        ),
        (
            {"op": "clock", "at": "00:10", "from": "?a", "to": "?b", "shift": -15},
            {"?a": "UTC+00:00", "?b": "UTC-03:30"},
            "20:25",
        ),
    ],
)
def test_arithmetic_by_hand(compute, values, expected):
    assert answer_from(compute, values) == compute_answer(compute, values) == expected
