"""Prompts: every template filled once, and nothing of a sample's gold in what a model reads."""

import pytest

from qwenlong import prompts
from qwenlong.rewards import extract_answer, extract_choice, parse_verdict
from qwenlong.types import Sample

SECRET = "zanzibar-7731"


def make(**changes):
    row = {
        "id": "s1",
        "task": "reading_qa",
        "question": "Where does the train stop?",
        "documents": [
            {"id": "doc-a", "title": 'The "fast" train', "text": "It stops in Ulm."},
            {"id": "doc-b", "role": "distractor", "text": "Braces {question} stay {0}."},
        ],
        "answers": ["Ulm"],
        "answer_type": "text",
        "reward": "sub_em",
    }
    return Sample.model_validate(row | changes)


def content(messages):
    (message,) = messages
    assert message["role"] == "user"
    return message["content"]


def test_full_context_has_documents_then_question_then_format():
    text = content(prompts.render(make()))
    parts = [
        '<document index="1" title="The \'fast\' train">\nIt stops in Ulm.\n</document>',
        '<document index="2" title="Document 2">\nBraces {question} stay {0}.\n</document>',
        "Question: Where does the train stop?",
        prompts.TEXT_INSTRUCTIONS,
    ]
    positions = [text.index(part) for part in parts]
    assert positions == sorted(positions)
    assert text.count("Where does the train stop?") == 1


def test_closed_book_has_no_documents():
    text = content(prompts.render(make(), "closed_book"))
    assert "Where does the train stop?" in text and prompts.TEXT_INSTRUCTIONS in text
    assert "Ulm" not in text and "fast" not in text and "<document" not in text


def test_choices_are_lettered_and_asked_for_by_letter():
    choices = ["Ulm", "Bonn"]
    sample = make(choices=choices, answer_type="choice", answers=["A"], reward="multiple_choice")
    text = content(prompts.render(sample))
    assert "Where does the train stop?\n(A) Ulm\n(B) Bonn\n" in text
    assert text.endswith(prompts.CHOICE_INSTRUCTIONS)


def test_own_instructions_replace_the_default():
    text = content(prompts.render(make(instructions="Answer in one word.")))
    assert text.endswith("Answer in one word.") and prompts.TEXT_INSTRUCTIONS not in text


def test_references_are_resolved_or_refused():
    ref = "ab" * 32
    sample = make(documents=[{"id": "d", "title": "T", "ref": ref}])
    assert "from afar" in content(prompts.render(sample, resolve={ref: "from afar"}.get))
    with pytest.raises(ValueError, match="is a reference to abababababab.*resolve="):
        prompts.render(sample)
    assert "<document" not in content(prompts.render(sample, "closed_book"))


def test_sample_without_documents_renders():
    assert "<documents>\n\n</documents>" in content(prompts.render(make(documents=[])))


GOLD_CHANGES = {
    "answers": {"answers": [SECRET, "other"]},
    "evidence": {"evidence": [{"doc": "doc-b", "start": 1, "end": 4}]},
    "derivation": {"derivation": {"kind": "graph", "path": [SECRET]}},
    "filters": {"filters": {SECRET: {"verdict": "pass", "why": SECRET}}},
    "difficulty": {"difficulty": {"model": SECRET, "k": 2, "pass_rate": 0.5}},
    "ids": {"id": SECRET},
    "unit": {"unit": SECRET, "tolerance": 0.5},
    "reward": {"reward": SECRET},
    "task": {"task": SECRET, "subtype": SECRET, "split": "eval"},
    "unknown": {"solution": SECRET, "answer_prefix": SECRET},
    "roles": {
        "documents": [
            {"id": SECRET, "role": "distractor", "title": 'The "fast" train', "note": SECRET}
            | {"text": "It stops in Ulm."},
            {"id": "z", "role": "evidence", "text": "Braces {question} stay {0}."},
        ],
    },
}


@pytest.mark.parametrize("mode", ["full", "closed_book"])
@pytest.mark.parametrize("changes", GOLD_CHANGES.values(), ids=GOLD_CHANGES.keys())
def test_nothing_but_question_documents_and_format_reaches_a_prompt(changes, mode):
    changed = content(prompts.render(make(**changes), mode))
    assert changed == content(prompts.render(make(), mode))
    assert SECRET not in changed


def test_view_has_no_field_for_gold():
    changes = {k: v for part in GOLD_CHANGES.values() for k, v in part.items()}
    sample = make(**changes | {"evidence": []})
    assert SECRET not in repr(prompts.view(sample))
    assert set(vars(prompts.view(sample))) == {"question", "instructions", "choices", "documents"}


def test_unknown_mode_is_named():
    with pytest.raises(ValueError, match="unknown mode 'agent'"):
        prompts.render(make(), "agent")


def test_fill_is_one_pass_and_complete():
    assert prompts.fill("{a}-{b}", a="{b}", b="{a}\\1") == "{b}-{a}\\1"
    for fields in ({"a": "x"}, {"a": "x", "b": "y", "c": "z"}):
        with pytest.raises(ValueError, match="slots"):
            prompts.fill("{a}-{b}", **fields)


def test_every_template_has_known_slots():
    slots = {"index", "title", "text", "documents", "question", "instructions"}
    slots |= {"answer", "gold", "query", "memory", "plan", "chunk"}
    templates = {
        name: value
        for name, value in vars(prompts).items()
        if isinstance(value, str) and name.isupper()
    }
    assert len(templates) >= 10
    for name, template in templates.items():
        filled = prompts.fill(template, **{s: "~" for s in slots if f"{{{s}}}" in template})
        assert "{" not in filled and "}" not in filled, name


def test_agent_update_orders():
    fields = ("Who built it?", "It is a tower.", "look for names", "The tower was built by Ann.")
    paper = content(prompts.agent_update(*fields))
    chunk_first = content(prompts.agent_update(*fields, order="chunk_first"))
    assert sorted(paper.split()) == sorted(chunk_first.split())  # the same words
    order = [paper.index(text) for text in (fields[0], fields[1], fields[2], fields[3])]
    assert order == sorted(order)
    assert chunk_first.startswith("<section>\nThe tower was built by Ann.\n</section>")
    for text in (paper, chunk_first):
        assert "<previous_memory>\n<memory>\nIt is a tower.\n</memory>" in text
    with pytest.raises(ValueError, match="unknown order 'x'"):
        prompts.agent_update(*fields, order="x")


def test_chunk_first_prompts_of_one_chunk_share_all_but_their_fields():
    def common(order):
        texts = [
            content(prompts.agent_update(q, m, "p", "chunk " * 500, order=order))
            for q, m in [("first question", "m1"), ("other question", "m2")]
        ]
        return next(i for i, pair in enumerate(zip(*texts, strict=False)) if len(set(pair)) > 1)

    assert common("chunk_first") > 3000 > common("paper")


def test_agent_without_memory_and_final_prompt():
    text = content(prompts.agent_update("q", "", "", "c"))
    assert prompts.AGENT_NO_MEMORY in text and prompts.AGENT_NO_PLAN in text
    final = content(prompts.agent_final("q?", "One word.", "m"))
    assert final.index("q?") < final.index("<memory>\nm\n") < final.index("One word.")
    assert "plan" not in final.lower()
    assert prompts.AGENT_NO_MEMORY in content(prompts.agent_final("q?", "", ""))
    assert "<request>\nall of it\n</request>" in content(prompts.agent_decompose("all of it"))


def test_judge_shows_one_or_several_golds():
    one = content(prompts.judge("q", "x", ["gold"]))
    assert "<reference_answer>\ngold\n</reference_answer>" in one
    assert "1. gold\n2. oro" in content(prompts.judge("q", "x", ["gold", "oro"]))
    assert parse_verdict(one) is False  # a judge that repeats its prompt has not said yes


def test_default_formats_are_what_the_rewards_look_for():
    said = prompts.TEXT_INSTRUCTIONS.split('"')[1].replace("your answer here", "Ulm")
    assert extract_answer(said) == "Ulm"
    said = prompts.CHOICE_INSTRUCTIONS.split('"')[1].replace("X", "B")
    assert extract_choice(said, ["a", "b"]) == "B"


def test_letters_end_at_z():
    assert [prompts.choice_letter(i) for i in (0, 25)] == ["A", "Z"]
    for index in (-1, 26):
        with pytest.raises(ValueError, match="at most 26"):
            prompts.choice_letter(index)
