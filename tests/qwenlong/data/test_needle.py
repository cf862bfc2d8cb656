"""Planted facts: where they stand, that they are the only answer, and who shares what."""

import random
import re

import pytest

from qwenlong import prompts
from qwenlong.data.documents import SourceDocument, count_tokens
from qwenlong.data.loaders import python_topics
from qwenlong.data.needle import NAMES, THINGS, _insert, cut_passages, needle_samples
from qwenlong.errors import InputError
from qwenlong.rewards import score
from qwenlong.types import Sample, split_of


@pytest.fixture(scope="module")
def samples():
    return needle_samples(
        60, seed=3, forms=("value", "sentence"), questions=12, document_tokens=400
    )


def test_every_question_has_one_answer_in_its_text(samples):
    assert len(samples) == 60 and len({s.id for s in samples}) == 60
    for sample in samples:
        assert Sample.model_validate_json(sample.model_dump_json(by_alias=True)) == sample
        (document,), (span,) = sample.documents, sample.evidence
        made = sample.derivation
        fact = document.text[span.start : span.end]
        assert fact == (
            f"The {made['attribute']} of the {made['name']} {made['thing']} is {made['value']}."
        )
        assert document.text.count(made["value"]) == 1
        assert len(re.findall(rf"of the {made['name']} \w+ is \d{{5}}\.", document.text)) == 1
        assert made["name"] in sample.question and made["value"] not in sample.question


def test_rewards_of_right_and_wrong_answers(samples):
    first = {s.subtype: s for s in reversed(samples)}
    value, sentence = first["planted_value"], first["planted_sentence"]
    number = value.derivation["value"]
    wrong = str((int(number) + 1) % 100_000).zfill(5)
    for reply, reward in (
        (number, 1.0),
        (f"The number is {number}, as it says.", 1.0),
        (wrong, 0.0),
        (number[:4], 0.0),
        (f"{number}0", 0.0),
        ("no idea", 0.0),
    ):
        assert score(value, reply).value == reward
    (gold,) = sentence.answers
    assert gold in sentence.documents[0].text
    assert score(sentence, gold).value == 1.0
    # Without the five digits n - 5 characters of n and n - 5 are equal.
    n, bare = len(gold), gold.replace(sentence.derivation["value"], "")
    assert score(sentence, bare).value == pytest.approx(2 * (n - 5) / (2 * n - 5))
    assert score(sentence, "").value == 0.0


def test_questions_of_a_passage_share_their_prompt(samples):
    group = [s for s in samples if s.documents == samples[0].documents]
    assert [s.task for s in group] == ["reading_qa", "needle"] * 6
    texts = [prompts.render(s)[0]["content"] for s in group]
    shared = texts[0].index("Question: ")
    assert all(text[:shared] == texts[0][:shared] for text in texts)
    assert shared > 0.9 * len(texts[0]) - 400
    assert count_tokens(texts[0]) >= 400


def test_without_its_facts_a_passage_is_the_document(samples):
    whole = {f"Python help: {d.meta['topic']}": d.text for d in python_topics()}
    for document in {s.documents[0].id: s.documents[0] for s in samples}.values():
        pattern = r" The [a-z ]+ of the [a-z]+ [a-z]+ is \d{5}\."
        plain, count = re.subn(pattern, "", document.text)
        assert count == 12
        assert plain in whole[document.title]


def test_no_document_is_on_both_sides():
    sides = {
        split: needle_samples(200, seed=0, split=split, document_tokens=300, eval_fraction=0.3)
        for split in ("train", "eval")
    }
    titles = {split: {s.documents[0].title for s in made} for split, made in sides.items()}
    assert not titles["train"] & titles["eval"]
    by_title = {d.title: d for d in python_topics()}
    for split, made in sides.items():
        assert {s.split for s in made} == {split}
        for title in titles[split]:
            assert split_of(by_title[title].text, eval_fraction=0.3) == split


def test_repeats_and_the_seed_matters():
    first, again, other = (needle_samples(20, seed, document_tokens=300) for seed in (1, 1, 2))
    assert first == again
    assert {s.id for s in first}.isdisjoint(s.id for s in other)
    # A smaller number is the beginning of a larger one.
    assert needle_samples(13, 1, document_tokens=300) == first[:13]


def test_passages_come_again_with_other_facts():
    """Two sentences a passage, two passages, 4 questions each: 20 samples are 5 plantings."""
    made = needle_samples(20, 0, questions=4, document_tokens=6, eval_fraction=0.5, source=TOY)
    assert len({s.documents[0].text for s in made}) == 5
    assert len({s.id for s in made}) == 20
    once = needle_samples(None, 0, questions=4, document_tokens=6, eval_fraction=0.5, source=TOY)
    assert once == made[:8]


TOY = "tests.qwenlong.data.test_needle:toy_documents"


def toy_documents():
    texts = [f"Number {i} is here. It stays where it is." for i in range(8)]
    sides = [text for text in texts if split_of(text, eval_fraction=0.5) == "train"][:2]
    return [SourceDocument(title="toy", text=text, source="toy") for text in sides]


def test_cut_passages():
    document = SourceDocument(
        title="t", text="One two. Three four five. Six. Seven eight nine. Ten.", source="s"
    )
    # 25, 26 and 4 characters; a token is four characters.
    assert list(cut_passages([document], 6)) == [
        ("t", "One two. Three four five."),
        ("t", "Six. Seven eight nine."),
    ]
    assert list(cut_passages([document], 100)) == []


@pytest.mark.parametrize("count", [1, 3, 5])
def test_insert(count):
    """Three sentences take three facts apart, and five with neighbours."""
    passage, facts = "A b. C d. E f.", [f"Fact {i}." for i in range(count)]
    text, spans = _insert(passage, facts, random.Random(0))
    assert [text[a:b] for a, b in spans] == facts
    assert re.sub(r" Fact \d\.", "", text) == passage


def test_words():
    assert len(set(NAMES)) == len(NAMES) >= 90
    assert all(re.fullmatch("[a-z]+", name) for name in NAMES)
    assert not {thing for thing, _ in THINGS} & set(NAMES)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"count": 0}, "count is 0"),
        ({"questions": 0}, "takes 1 to"),
        ({"questions": 1_000}, "questions is 1000"),
        ({"forms": ("value", "essay")}, "essay"),
        ({"forms": ()}, "forms is"),
        ({"eval_fraction": 1.0}, "eval_fraction is 1.0"),
        ({"document_tokens": 10**7}, "no train document of python-topics has 10000000 tokens"),
        ({"source": "nowhere"}, "nowhere"),
    ],
)
def test_wrong_settings_are_refused(changes, words):
    with pytest.raises(InputError, match=words):
        needle_samples(**{"count": 5, "seed": 0, **changes})
