"""Files of public benchmarks, read into samples. Nothing is downloaded.

| format | files | reward |
|---|---|---|
| ``longbench_v1`` | JSON lines of its question answering sets | ``cover`` |
| ``longbench_v2`` | ``data.json`` | ``multiple_choice`` |
| ``mrcr`` | Parquet or JSON lines of openai/mrcr | ``mrcr`` |
| ``frames`` | ``test.tsv``; JSON lines of the pages (``url``, ``title``, ``text``) | ``cover`` |
| ``docmath`` | JSON with ``ground_truth`` (the testmini sets) | ``docmath`` |
| ``corpusqa`` | JSON lines | ``cover`` |
| ``longmemeval`` | ``longmemeval_*.json`` | ``cover`` |

Rewards other than ``multiple_choice`` and ``mrcr`` take a judge, which decides where the rule fails
(arXiv 2512.12967, section 5.1: the greater of cover match and judge).
"""

from __future__ import annotations

import ast
import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from qwenlong.data.samples import NUMBER_INSTRUCTIONS
from qwenlong.errors import InputError
from qwenlong.evals.texts import TokenCounter
from qwenlong.prompts import TEXT_INSTRUCTIONS, document_block
from qwenlong.types import Document, Evidence, Sample, TokenCount

_V1_TASKS = {
    "narrativeqa": "reading_qa",
    "qasper": "reading_qa",
    "multifieldqa_en": "reading_qa",
    "multifieldqa_zh": "reading_qa",
    "hotpotqa": "multihop_qa",
    "2wikimqa": "multihop_qa",
    "musique": "multihop_qa",
}
_QUESTION_LABEL = re.compile(r"(?:question|query|问题)\s*[:：]\s*\Z", re.IGNORECASE)
_ONLY_THAT = "Write nothing but what is asked for."
_Row = dict[str, Any]
_Fields = dict[str, Any]


def load_benchmark(
    form: str, source: str | Path, *, tokenizer: str = "chars4", documents: str | Path | None = None
) -> Iterator[Sample]:
    """Samples of the file ``source`` in the public format ``form``, in its order.

    Args:
        form: a name of the table above.
        tokenizer: of ``count_tokens``, for the ``tokens`` of the samples.
        documents: pages that ``frames`` names by address.

    Raises:
        InputError: an unknown format, or a row that is not of it; the row is named.
    """
    if form not in FORMATS:
        raise InputError(f"unknown format {form!r}; choose of {', '.join(FORMATS)}")
    if (form == "frames") != (documents is not None):
        raise InputError("format 'frames', and no other, needs --documents: a file of its pages")
    source = Path(source)
    if not source.is_file():
        raise InputError(f"there is no file {source}")
    read = FORMATS[form] or _frames_reader(Path(documents))
    tokens = TokenCounter(tokenizer)
    for number, row in enumerate(_rows(source), 1):
        try:
            fields = read(row)
            sample = Sample(**_common(form, number, row), **fields)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            what = f"no field {error}" if isinstance(error, KeyError) else str(error).split("\n")[0]
            raise InputError(f"{source}, row {number}, is not of format {form}: {what}") from None
        shown = tuple((d.title, d.text, None) for d in sample.documents)
        count = TokenCount(tokenizer=tokenizer, n=tokens(document_block(shown)))
        yield sample.model_copy(update={"tokens": count})


def _common(form: str, number: int, row: _Row) -> _Fields:
    name = next((row[k] for k in ("_id", "id", "question_id") if row.get(k) is not None), number)
    return {"id": f"{form}-{name}", "split": "eval"}


def _rows(path: Path) -> Iterator[_Row]:
    """Rows of JSON lines, a JSON list, TSV, CSV or Parquet."""
    if path.suffix == ".parquet":
        try:
            import pyarrow.parquet
        except ImportError:
            raise InputError("a Parquet file needs a package: pip install pyarrow") from None
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=16):
            yield from batch.to_pylist()
    elif path.suffix in (".tsv", ".csv"):
        with open(path, encoding="utf-8-sig", newline="") as file:
            yield from csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",")
    else:
        with open(path, encoding="utf-8-sig") as file:
            first = file.read(1)
            while first.isspace():
                first = file.read(1)
            file.seek(0)
            try:
                if first == "[":
                    yield from json.load(file)
                else:
                    for line in file:
                        if line.strip():
                            yield json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(f"{path} is not JSON: {error}") from None


# --- formats -----------------------------------------------------------------


def _longbench_v1(row: _Row) -> _Fields:
    dataset = row["dataset"]
    if dataset not in _V1_TASKS:
        raise ValueError(f"{dataset!r} is no question answering set; known: {sorted(_V1_TASKS)}")
    return {
        "task": _V1_TASKS[dataset],
        "subtype": dataset,
        "question": row["input"],
        "instructions": TEXT_INSTRUCTIONS,
        "documents": [_document("context", "", row["context"])],
        "answers": [str(answer) for answer in row["answers"]],
        "answer_type": "text",
        "reward": "cover",
    }


def _longbench_v2(row: _Row) -> _Fields:
    choices = [row[f"choice_{letter}"] for letter in "ABCD"]
    if row["answer"] not in tuple("ABCD"):
        raise ValueError(f"the answer is {row['answer']!r}, not one of A to D")
    return {
        "task": "multiple_choice",
        "subtype": row.get("length") or "",
        "question": row["question"],
        "choices": choices,
        "documents": [_document("context", "", row["context"])],
        "answers": [row["answer"]],
        "answer_type": "choice",
        "reward": "multiple_choice",
        "domain": row.get("domain"),
        "level": row.get("difficulty"),
    }


def _mrcr(row: _Row) -> _Fields:
    prompt = row["prompt"]
    messages = json.loads(prompt) if isinstance(prompt, str) else prompt
    if messages[-1]["role"] != "user":
        raise ValueError("the last message is not the user's")
    return {
        "task": "needle",
        "subtype": f"{row['n_needles']} needles",
        "question": messages[-1]["content"],
        "instructions": _ONLY_THAT,
        "documents": [_document("conversation", "Conversation", _transcript(messages[:-1]))],
        "answers": [row["answer"]],
        "answer_type": "text",
        "reward": "mrcr",
        "answer_prefix": row["random_string_to_prepend"],
    }


def _docmath(row: _Row) -> _Fields:
    if row["ground_truth"] is None:
        raise ValueError("ground_truth is hidden; take a testmini set")
    paragraphs = [str(text) for text in row["paragraphs"]]
    starts, at = [], 0
    for text in paragraphs:
        starts.append(at)
        at += len(text) + 2
    used = sorted({*(row.get("table_evidence") or ()), *(row.get("paragraph_evidence") or ())})
    spans = [(starts[i], starts[i] + len(paragraphs[i])) for i in used]
    return {
        "task": "corpus_numeric",
        "subtype": str(row["question_id"]).split("-")[0],
        "question": row["question"],
        "instructions": NUMBER_INSTRUCTIONS,
        "documents": [_document("report", "", "\n\n".join(paragraphs))],
        "answers": [str(row["ground_truth"])],
        "answer_type": "number",
        "reward": "docmath",
        "evidence": [Evidence(doc="report", start=start, end=end) for start, end in spans],
    }


def _corpusqa(row: _Row) -> _Fields:
    """The prompt holds the documents, the question, and the answer format after it."""
    content = "\n\n".join(message["content"] for message in row["prompt"])
    question = row["question"]
    at = content.rfind(question)
    text, rest = content, ""
    if at >= 0:
        text, rest = content[:at], content[at + len(question) :].strip()
        if len(rest) > len(text):  # the question comes first
            text, rest = rest, ""
    answer = row["answer"]
    return {
        "task": "corpus_numeric",
        "question": question,
        "instructions": rest or TEXT_INSTRUCTIONS,
        "documents": [_document("corpus", "", _QUESTION_LABEL.sub("", text).strip())],
        "answers": [answer if isinstance(answer, str) else json.dumps(answer, ensure_ascii=False)],
        "answer_type": "text",
        "reward": "cover",
    }


def _longmemeval(row: _Row) -> _Fields:
    documents, evidence = [], []
    dated = zip(row["haystack_dates"], row["haystack_sessions"], strict=True)
    for number, (date, turns) in enumerate(dated, 1):
        name = f"session-{number}"
        text = ""
        for turn in turns:
            start = len(text)
            text += f"{turn['role'].capitalize()}: {turn['content']}"
            if turn.get("has_answer"):
                evidence.append(Evidence(doc=name, start=start, end=len(text)))
            text += "\n\n"
        documents.append(_document(name, f"Conversation of {date}", text.strip()))
    marked = {span.doc for span in evidence}
    return {
        "task": "dialogue_memory",
        "subtype": "abstention"
        if str(row["question_id"]).endswith("_abs")
        else row["question_type"],
        "question": f"Today is {row['question_date']}. {row['question']}",
        "instructions": TEXT_INSTRUCTIONS,
        "documents": [
            d.model_copy(update={"role": "evidence" if d.id in marked else "distractor"})
            for d in documents
        ],
        "answers": [str(row["answer"])],
        "answer_type": "text",
        "reward": "cover",
        "evidence": evidence,
    }


def _frames_reader(path: Path) -> Callable[[_Row], _Fields]:
    if not path.is_file():
        raise InputError(f"there is no file {path}")
    pages = {}
    for row in _rows(path):
        if not {"url", "text"} <= row.keys():
            raise InputError(f"{path}: every line needs 'url' and 'text'")
        pages[_address(row["url"])] = row

    def read(row: _Row) -> _Fields:
        links = ast.literal_eval(row["wiki_links"])
        missing = [link for link in links if _address(link) not in pages]
        if missing:
            raise ValueError(f"{path} has no page {missing[0]}")
        found = [pages[_address(link)] for link in dict.fromkeys(links)]
        return {
            "task": "multihop_qa",
            "subtype": row.get("reasoning_types") or "",
            "question": row["Prompt"],
            "instructions": TEXT_INSTRUCTIONS,
            "documents": [
                _document(f"page-{i}", page.get("title") or page["url"], page["text"])
                for i, page in enumerate(found, 1)
            ],
            "answers": [row["Answer"]],
            "answer_type": "text",
            "reward": "cover",
        }

    return read


def _address(url: str) -> str:
    """An address without scheme, case of the host, fragment and final slash."""
    bare = re.sub(r"^https?://", "", url.strip()).split("#")[0].rstrip("/")
    host, _, rest = bare.partition("/")
    return f"{host.lower()}/{rest}"


def _document(name: str, title: str, text: str) -> Document:
    if not text.strip():
        raise ValueError("the context is empty")
    return Document(id=name, title=title, text=text)


def _transcript(messages: Iterable[dict[str, str]]) -> str:
    return "\n\n".join(f"{m['role'].capitalize()}: {m['content']}" for m in messages)


FORMATS: dict[str, Callable[[_Row], _Fields] | None] = {
    "longbench_v1": _longbench_v1,
    "longbench_v2": _longbench_v2,
    "mrcr": _mrcr,
    "frames": None,  # its reader is made for a file of pages
    "docmath": _docmath,
    "corpusqa": _corpusqa,
    "longmemeval": _longmemeval,
}
