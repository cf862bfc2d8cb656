"""Readers of public benchmark formats, each on a small file of that format."""

import csv
import json

import pytest

from qwenlong.errors import InputError
from qwenlong.evals.formats import FORMATS, load_benchmark
from qwenlong.prompts import render
from qwenlong.rewards import score

V1 = {
    "input": "Which film was made first, Alpha or Beta?",
    "context": "Passage 1:\nAlpha is a film of 1931.\nPassage 2:\nBeta is a film of 1952.",
    "answers": ["Alpha", "the film Alpha"],
    "length": 17,
    "dataset": "2wikimqa",
    "language": "en",
    "all_classes": None,
    "_id": "3f1c",
}
V2 = {
    "_id": "66ebd2f5",
    "domain": "Single-Document QA",
    "sub_domain": "Legal",
    "difficulty": "easy",
    "length": "short",
    "question": "What does the contract forbid?",
    "choice_A": "Smoking",
    "choice_B": "Singing",
    "choice_C": "Sleeping",
    "choice_D": "Swimming",
    "answer": "C",
    "context": "The tenant must not sleep in the kitchen.",
}
MRCR = {
    "prompt": json.dumps(
        [
            {"role": "user", "content": "Write a poem about tea"},
            {"role": "assistant", "content": "Tea, oh tea."},
            {"role": "user", "content": "Write a poem about tea"},
            {"role": "assistant", "content": "Leaves in hot water."},
            {
                "role": "user",
                "content": "Prepend aB3dE5gH7j to the 2nd (1 indexed) poem about tea. Do not "
                "include any other text in your response.",
            },
        ]
    ),
    "answer": "aB3dE5gH7jLeaves in hot water.",
    "random_string_to_prepend": "aB3dE5gH7j",
    "n_needles": 2,
    "desired_msg_index": 3,
    "total_messages": 5,
    "n_chars": 140,
}
DOCMATH = {
    "question_id": "complong-testmini-7",
    "source": "",
    "original_question_id": "",
    "question": "By how many percent did revenue grow?",
    "paragraphs": ["Note 1. Revenue.", "| year | revenue |\n| 2020 | 80 |", "In 2021 it was 90."],
    "table_evidence": [1],
    "paragraph_evidence": [2],
    "python_solution": "def solution():\n    return (90 - 80) / 80 * 100",
    "ground_truth": 12.5,
}
CORPUSQA = {
    "id": "financial_en_1",
    "prompt": [
        {
            "role": "user",
            "content": "Read the reports.\n\n### Report 1\nAcme sold 3 trucks.\n\n### Report 2\n"
            "Bolt sold 5 trucks.\n\nQuestion: Which companies sold more than 4 trucks?\n\nEnd with "
            '"The answer is: " and a list.',
        }
    ],
    "question": "Which companies sold more than 4 trucks?",
    "answer": '["Bolt"]',
}
MEMORY = {
    "question_id": "gpt4_2655b836",
    "question_type": "single-session-user",
    "question": "What did I plant?",
    "answer": "Tomatoes",
    "question_date": "2023/05/30 (Tue) 23:40",
    "haystack_session_ids": ["s1", "s2"],
    "haystack_dates": ["2023/05/20 (Sat) 02:21", "2023/05/21 (Sun) 10:00"],
    "haystack_sessions": [
        [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello!"}],
        [
            {"role": "user", "content": "I planted tomatoes.", "has_answer": True},
            {"role": "assistant", "content": "Nice."},
        ],
    ],
    "answer_session_ids": ["s2"],
}
FRAMES = {
    "Prompt": "In which year was the tower built that stands in the capital of France?",
    "Answer": "1889",
    "wikipedia_link_1": "https://en.wikipedia.org/wiki/Eiffel_Tower",
    "reasoning_types": "Multiple constraints",
    "wiki_links": "['https://en.wikipedia.org/wiki/Eiffel_Tower', "
    "'https://en.wikipedia.org/wiki/Paris#History']",
}
PAGES = [
    {"url": "http://EN.wikipedia.org/wiki/Eiffel_Tower/", "title": "Eiffel", "text": "Built 1889."},
    {"url": "https://en.wikipedia.org/wiki/Paris", "text": "Capital of France."},
]


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def load(tmp_path, form, rows, **options):
    path = write_lines(tmp_path / f"{form}.jsonl", rows)
    return list(load_benchmark(form, path, **options))


def right(sample, response):
    return score(sample, response).value


def said(answer):
    return f"Therefore, the answer is ({answer})."


def shown(sample):
    [message] = render(sample)
    return message["content"]


def test_longbench_v1(tmp_path):
    [sample] = load(tmp_path, "longbench_v1", [V1])
    assert (sample.id, sample.task, sample.subtype) == (
        "longbench_v1-3f1c",
        "multihop_qa",
        "2wikimqa",
    )
    assert sample.answers == ["Alpha", "the film Alpha"] and sample.reward == "cover"
    assert V1["context"] in shown(sample) and V1["input"] in shown(sample)
    assert right(sample, said("the film alpha")) == 1 and right(sample, said("Beta")) == 0
    assert sample.tokens.n == -(
        -len(shown(sample).split("<documents>\n")[1].split("\n</documents>")[0]) // 4
    )


def test_longbench_v1_sets_that_are_no_questions_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"row 1, is not of format longbench_v1: 'gov_report'"):
        load(tmp_path, "longbench_v1", [V1 | {"dataset": "gov_report"}])


def test_longbench_v2(tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps([V2, V2 | {"_id": "x", "answer": "A"}]), encoding="utf-8")
    first, second = load_benchmark("longbench_v2", path)
    assert (first.id, first.subtype, first.answers) == ("longbench_v2-66ebd2f5", "short", ["C"])
    assert "(C) Sleeping" in shown(first) and "The correct answer is (X)" in shown(first)
    assert right(first, "The correct answer is (C)") == 1
    assert right(second, "The correct answer is (C)") == 0
    assert second.answers == ["A"]


def test_mrcr(tmp_path):
    [sample] = load(tmp_path, "mrcr", [MRCR])
    assert sample.subtype == "2 needles" and sample.answer_prefix == "aB3dE5gH7j"
    assert sample.documents[0].text.count("User: Write a poem about tea") == 2
    assert sample.documents[0].text.endswith("Assistant: Leaves in hot water.")
    assert shown(sample).count("Prepend aB3dE5gH7j to the 2nd") == 1
    assert "Therefore, the answer is" not in shown(sample)
    assert right(sample, "aB3dE5gH7jLeaves in hot water.") == 1
    assert right(sample, "Leaves in hot water.") == 0
    assert 0 < right(sample, "aB3dE5gH7jTea, oh tea.") < 0.6


def test_mrcr_as_parquet(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="Parquet files need pyarrow")
    from pyarrow import Table

    path = tmp_path / "2needle.parquet"
    parquet.write_table(Table.from_pylist([MRCR, MRCR | {"n_needles": 4}]), path)
    first, second = load_benchmark("mrcr", path)
    [as_lines] = load(tmp_path, "mrcr", [MRCR])
    assert first == as_lines and (second.id, second.subtype) == ("mrcr-2", "4 needles")


def test_frames(tmp_path):
    pages = write_lines(tmp_path / "pages.jsonl", PAGES)
    path = tmp_path / "test.tsv"
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(FRAMES), delimiter="\t")
        writer.writeheader()
        writer.writerow(FRAMES)
    [sample] = load_benchmark("frames", path, documents=pages)
    assert [d.title for d in sample.documents] == ["Eiffel", "https://en.wikipedia.org/wiki/Paris"]
    assert "Built 1889." in shown(sample) and "Capital of France." in shown(sample)
    assert right(sample, said("It was built in 1889")) == 1
    write_lines(pages, PAGES[:1])
    with pytest.raises(InputError, match=r"has no page https://en.wikipedia.org/wiki/Paris#His"):
        list(load_benchmark("frames", path, documents=pages))
    with pytest.raises(InputError, match="needs --documents"):
        list(load_benchmark("frames", path))
    write_lines(pages, [{"title": "x"}])
    with pytest.raises(InputError, match="every line needs 'url' and 'text'"):
        list(load_benchmark("frames", path, documents=pages))


def test_docmath(tmp_path):
    [sample] = load(tmp_path, "docmath", [DOCMATH])
    assert (sample.task, sample.subtype, sample.answers) == (
        "corpus_numeric",
        "complong",
        ["12.5"],
    )
    text = sample.documents[0].text
    spans = [text[e.start : e.end] for e in sample.evidence]
    assert spans == DOCMATH["paragraphs"][1:]
    assert "python_solution" not in shown(sample) and "80 * 100" not in shown(sample)
    assert right(sample, said("12.5%")) == 1 and right(sample, said("20")) == 0
    with pytest.raises(InputError, match="ground_truth is hidden"):
        load(tmp_path, "docmath", [DOCMATH | {"ground_truth": None}])


def test_corpusqa(tmp_path):
    [sample] = load(tmp_path, "corpusqa", [CORPUSQA])
    assert sample.documents[0].text.endswith("Bolt sold 5 trucks.")
    assert sample.instructions == 'End with "The answer is: " and a list.'
    assert shown(sample).count(CORPUSQA["question"]) == 1
    assert right(sample, 'So.\nThe answer is: ["Bolt"]') == 1
    assert right(sample, 'The answer is: ["Acme"]') == 0


def test_corpusqa_with_the_question_first(tmp_path):
    content = f"{CORPUSQA['question']}\n\n### Report 1\n" + "Acme sold 3 trucks. " * 20
    [sample] = load(
        tmp_path, "corpusqa", [CORPUSQA | {"prompt": [{"role": "user", "content": content}]}]
    )
    assert sample.documents[0].text.startswith("### Report 1")
    assert shown(sample).count(CORPUSQA["question"]) == 1


def test_longmemeval(tmp_path):
    rows = [MEMORY, MEMORY | {"question_id": "x_abs", "answer": 3}]
    sample, absent = load(tmp_path, "longmemeval", rows)
    assert [d.title for d in sample.documents] == [
        "Conversation of 2023/05/20 (Sat) 02:21",
        "Conversation of 2023/05/21 (Sun) 10:00",
    ]
    [span] = sample.evidence
    assert sample.documents[1].text[span.start : span.end] == "User: I planted tomatoes."
    assert [d.role for d in sample.documents] == ["distractor", "evidence"]
    assert "Today is 2023/05/30 (Tue) 23:40. What did I plant?" in shown(sample)
    assert "has_answer" not in shown(sample)
    assert right(sample, said("tomatoes, in May")) == 1
    assert (absent.subtype, absent.answers) == ("abstention", ["3"])


GOOD = {
    "longbench_v1": V1,
    "longbench_v2": V2,
    "mrcr": MRCR,
    "docmath": DOCMATH,
    "corpusqa": CORPUSQA,
    "longmemeval": MEMORY,
}
NEEDED = {
    "longbench_v1": ["input", "context", "answers", "dataset"],
    "longbench_v2": ["question", "choice_B", "answer", "context"],
    "mrcr": ["prompt", "answer", "random_string_to_prepend", "n_needles"],
    "docmath": ["question", "paragraphs", "ground_truth"],
    "corpusqa": ["prompt", "question", "answer"],
    "longmemeval": ["question", "answer", "haystack_sessions", "haystack_dates"],
}


@pytest.mark.parametrize("form, field", [(f, k) for f, keys in NEEDED.items() for k in keys])
def test_a_missing_field_names_the_row_and_the_field(tmp_path, form, field):
    broken = {k: v for k, v in GOOD[form].items() if k != field}
    with pytest.raises(InputError, match=rf"row 2, is not of format {form}: no field '{field}'"):
        load(tmp_path, form, [GOOD[form], broken])


@pytest.mark.parametrize("form", GOOD)
def test_rows_of_another_kind_are_one_sentence(tmp_path, form):
    for row in ({}, [1], "text", None, {k: None for k in GOOD[form]}):
        with pytest.raises(InputError, match=f"row 1, is not of format {form}"):
            load(tmp_path, form, [row])


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(InputError, match="there is no file"):
        list(load_benchmark("mrcr", tmp_path / "none.jsonl"))
    with pytest.raises(InputError, match="unknown format 'squad'; choose of longbench_v1"):
        list(load_benchmark("squad", tmp_path))
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": 1\n', encoding="utf-8")
    with pytest.raises(InputError, match="is not JSON"):
        list(load_benchmark("mrcr", path))
    path.write_text("  \n", encoding="utf-8")
    assert list(load_benchmark("mrcr", path)) == []
    assert set(FORMATS) == {*GOOD, "frames"}


def test_a_mark_of_byte_order_and_blank_lines_are_no_rows(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text("\ufeff\n" + json.dumps(V1) + "\n\n", encoding="utf-8")
    [sample] = load_benchmark("longbench_v1", path)
    assert sample.question == V1["input"]
