"""Multiple choice and reading questions by rule, from real prose and Python source.

Each rule looks at one document and yields items: a question, its answer, the characters that prove
it and, for multiple choice, wrong options of the same kind from the same document. A rule yields
only what the document settles: a name that occurs once, a literal bound once, a sentence that can
be told from all others. ``dialogue_samples`` (``dialogue_questions``) is the third route by rule.
"""

from __future__ import annotations

import ast
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from qwenlong.data.dialogue_questions import dialogue_samples
from qwenlong.data.documents import SourceDocument, split_sentences
from qwenlong.data.python_facts import FunctionFacts, ModuleFacts, Span, module_facts
from qwenlong.data.samples import NUMBER_INSTRUCTIONS, PROSE_KINDS, contains_term, sample_id
from qwenlong.prompts import CHOICE_INSTRUCTIONS, TEXT_INSTRUCTIONS, choice_letter
from qwenlong.rewards.text import normalize_answer
from qwenlong.types import Document, Evidence, Sample

__all__ = ["choice_samples", "dialogue_samples", "reading_samples"]

OPTIONS = 4
_MAX_DOCUMENT_CHARS = 400_000  # about 100K tokens: more leaves no room for anything else
_MIN_COUNT = 5  # of things to count: a smaller answer is soon guessed
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
_BUILTIN_ERRORS = (
    "ValueError TypeError RuntimeError KeyError IndexError AttributeError OSError LookupError "
    "NotImplementedError ImportError OverflowError AssertionError EOFError SyntaxError"
).split()


@dataclass
class Item:
    """A question about one document. ``wrong`` holds candidates for the other options."""

    subtype: str
    question: str
    answer: str
    spans: list[Span]
    parameters: dict[str, Any] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    is_number: bool = False


Rule = Callable[[SourceDocument, Any, random.Random], Iterator[Item]]


def choice_samples(
    documents: Iterable[SourceDocument], *, seed: int, limit: int
) -> Iterator[Sample]:
    """Questions with four options, one right, its place uniform; task ``multiple_choice``.

    Deterministic in ``documents`` and ``seed``; at most ``limit`` samples, subtypes in turn.
    """
    yield from _samples(documents, seed, limit, "choice", _CHOICE_CODE, _CHOICE_PROSE)


def reading_samples(
    documents: Iterable[SourceDocument], *, seed: int, limit: int
) -> Iterator[Sample]:
    """Questions whose answer stands in the document; task ``reading_qa``.

    Deterministic in ``documents`` and ``seed``; at most ``limit`` samples, subtypes in turn.
    """
    yield from _samples(documents, seed, limit, "reading", _READING_CODE, _READING_PROSE)


def _samples(
    documents: Iterable[SourceDocument],
    seed: int,
    limit: int,
    route: str,
    code: tuple[Rule, ...],
    prose: tuple[Rule, ...],
) -> Iterator[Sample]:
    rng = random.Random(f"{route} {seed}")
    titles = Counter()
    usable = []
    for document in documents:
        titles[document.title] += 1
        if document.title and len(document.text) <= _MAX_DOCUMENT_CHARS:
            usable.append(document)
    # A question names its document by the title.
    usable = [d for d in usable if titles[d.title] == 1]
    rng.shuffle(usable)
    per_document = max(8, 8 * limit // max(1, len(usable)))
    by_subtype: dict[str, list[tuple[SourceDocument, Item]]] = {}
    found = 0
    for document in usable:
        items = _document_items(
            document, random.Random(f"{route} {seed} {document.id}"), code, prose
        )
        for item in items[:per_document]:
            by_subtype.setdefault(item.subtype, []).append((document, item))
            found += 1
        if found >= 6 * limit + 200:
            break
    queues = [by_subtype[name] for name in sorted(by_subtype)]
    for queue in queues:
        rng.shuffle(queue)
    seen: set[str] = set()
    made = 0
    while queues and made < limit:
        for queue in list(queues):
            sample = None
            while queue and sample is None:
                document, item = queue.pop()
                if item.question not in seen:
                    sample = _sample(route, document, item, rng)
            if sample is None:
                queues.remove(queue)
                continue
            seen.add(item.question)
            yield sample
            made += 1
            if made >= limit:
                return


def _document_items(
    document: SourceDocument,
    rng: random.Random,
    code: tuple[Rule, ...],
    prose: tuple[Rule, ...],
) -> list[Item]:
    """Items of every rule that fits the kind of document, subtypes mixed."""
    if document.kind == "python":
        content: Any = module_facts(document.text)
        rules = code
    elif document.kind in PROSE_KINDS:
        content = split_sentences(document.text)
        rules = prose
    else:
        return []
    if not content:
        return []
    lists = []
    for rule in rules:
        items = list(rule(document, content, rng))
        rng.shuffle(items)
        lists.append(items)
    mixed = []
    for i in range(max(map(len, lists), default=0)):
        mixed += [items[i] for items in lists if i < len(items)]
    return mixed


def _sample(route: str, document: SourceDocument, item: Item, rng: random.Random) -> Sample | None:
    if not normalize_answer(item.answer) or contains_term(item.question, item.answer):
        return None
    choices = None
    answer = item.answer
    kind = "number" if item.is_number else "text"
    instructions = NUMBER_INSTRUCTIONS if item.is_number else TEXT_INSTRUCTIONS
    if route == "choice":
        wrong = _distinct(item.wrong, item.answer)
        if len(wrong) < OPTIONS - 1:
            return None
        choices = rng.sample(wrong, OPTIONS - 1)
        place = rng.randrange(OPTIONS)
        choices.insert(place, item.answer)
        answer, kind, instructions = choice_letter(place), "choice", CHOICE_INSTRUCTIONS
    return Sample(
        id=sample_id(route, [item.question, choices, answer, document.id]),
        task="multiple_choice" if route == "choice" else "reading_qa",
        subtype=item.subtype,
        split=document.split,
        question=item.question,
        instructions=instructions,
        choices=choices,
        documents=[Document(id=document.id, title=document.title, text=document.text)],
        answers=[answer],
        answer_type=kind,
        tolerance=0.0 if kind == "number" else None,
        reward=kind,
        evidence=[Evidence(doc=document.id, start=s.start, end=s.end) for s in item.spans],
        derivation={
            "kind": "template",
            "template": item.subtype,
            "document": document.id,
            "answer": item.answer,
            **item.parameters,
        },
    )


def _distinct(texts: Iterable[str], answer: str) -> list[str]:
    """``texts`` that differ from ``answer`` and from each other in what a reader compares."""
    seen = {_folded(answer)}
    kept = []
    for text in texts:
        if _folded(text) not in seen:
            seen.add(_folded(text))
            kept.append(text)
    return kept


def _folded(text: str) -> str:
    return " ".join(text.casefold().split())


# --- Python source -----------------------------------------------------------


def _unique_functions(facts: ModuleFacts) -> list[FunctionFacts]:
    """Functions that their name tells apart; a plain name also from functions nested elsewhere."""
    names = Counter(f.name for f in facts.functions)
    classes = Counter(c.name for c in facts.classes)
    return [
        f
        for f in facts.functions
        if names[f.name] == 1
        and (
            classes[f.name.partition(".")[0]] == 1 if "." in f.name else facts.defined[f.name] == 1
        )
    ]


def _called(name: str) -> str:
    if "." not in name:
        return f"the function {name}"
    owner, _, method = name.partition(".")
    return f"the method {method} of the class {owner}"


def _defaults(facts: ModuleFacts) -> Iterator[tuple[FunctionFacts, str, str]]:
    """Defaults that say more than None, a flag, an empty value, or minus one to one."""
    for function in _unique_functions(facts):
        for parameter, source in function.defaults.items():
            if source not in _GUESSED and normalize_answer(source):
                yield function, parameter, source


_GUESSED = frozenset({"None", "True", "False", "-1", "0", "1"})


def _default_question(document: SourceDocument, name: str, parameter: str, rng: random.Random):
    return rng.choice(
        [
            f"In the module {document.title}, what is the default value of the parameter "
            f"{parameter} of {_called(name)}?",
            f"Which value does the parameter {parameter} of {_called(name)} in the module "
            f"{document.title} have when a call leaves it out?",
        ]
    )


def _choice_default(
    document: SourceDocument, facts: ModuleFacts, rng: random.Random
) -> Iterator[Item]:
    triples = list(_defaults(facts))
    by_kind: dict[str, list[str]] = {"number": [], "string": [], "name": []}
    for source in dict.fromkeys(s for f in facts.functions for s in f.defaults.values()):
        by_kind[_literal_kind(source)].append(source)
    for function, parameter, source in triples:
        wrong = by_kind[_literal_kind(source)]
        if len(wrong) < OPTIONS:
            wrong = [s for sources in by_kind.values() for s in sources]
        yield Item(
            "default_value",
            _default_question(document, function.name, parameter, rng),
            source,
            [function.header],
            {"function": function.name, "parameter": parameter},
            wrong,
        )


def _literal_kind(source: str) -> str:
    if _NUMBER.fullmatch(source):
        return "number"
    return "string" if source.endswith(("'", '"')) else "name"


def _choice_method(
    document: SourceDocument, facts: ModuleFacts, rng: random.Random
) -> Iterator[Item]:
    names = [c.name for c in facts.classes]
    if len(set(names)) < OPTIONS:
        return
    for entry in facts.classes:
        for method, header in entry.methods.items():
            if facts.defined[method] != 1 or method in facts.assigned:
                continue
            yield Item(
                "class_of_method",
                rng.choice(
                    [
                        f"Which class of the module {document.title} defines the method {method}?",
                        f"In the body of which class of {document.title} is the method {method} "
                        "defined?",
                    ]
                ),
                entry.name,
                [entry.header, header],
                {"method": method},
                names,
            )


def _described(facts: ModuleFacts) -> Iterator[tuple[FunctionFacts, list[str]]]:
    """Functions whose docstring opens with a sentence of their own, and the others' names."""
    unique = _unique_functions(facts)
    counts = Counter(f.summary for f in facts.functions)
    for function in unique:
        last = function.name.rpartition(".")[2]
        if (
            30 <= len(function.summary) <= 220
            and counts[function.summary] == 1
            and not contains_term(function.summary, last)
            and '"""' not in function.summary
            and ">>>" not in function.summary
        ):
            yield function, [f.name for f in facts.functions]


def _choice_described(
    document: SourceDocument, facts: ModuleFacts, rng: random.Random
) -> Iterator[Item]:
    for function, names in _described(facts):
        yield Item(
            "described_function",
            rng.choice(
                [
                    f"Which function or method of the module {document.title} has documentation "
                    f'that begins: "{function.summary}"?',
                    f"In {document.title}, to which function or method does this description "
                    f'belong: "{function.summary}"?',
                ]
            ),
            function.name,
            [function.header, function.summary_span],
            {"summary": function.summary},
            names,
        )


def _choice_import(
    document: SourceDocument, facts: ModuleFacts, rng: random.Random
) -> Iterator[Item]:
    absent = [m for m in _COMMON_MODULES if m not in facts.words]
    if len(absent) < OPTIONS - 1:
        return
    names = [n for n in facts.imports if n not in (document.title, "__future__")]
    if names:
        name = rng.choice(names)
        yield Item(
            "imported_module",
            rng.choice(
                [
                    f"Which of these modules does the source of {document.title} import?",
                    f"One of these modules is imported somewhere in {document.title}. Which?",
                ]
            ),
            name,
            [facts.imports[name]],
            {"module": name},
            absent,
        )


_COMMON_MODULES = (
    "argparse array bisect calendar cmath colorsys configparser copy csv dataclasses datetime "
    "decimal difflib enum fnmatch fractions ftplib getpass gettext glob gzip hashlib heapq hmac "
    "imaplib inspect ipaddress json linecache locale lzma mailbox mimetypes netrc numbers operator "
    "pathlib pickle platform plistlib poplib pprint profile queue random sched secrets selectors "
    "shelve shlex shutil signal smtplib socketserver sqlite3 statistics string stringprep struct "
    "tarfile tempfile textwrap timeit tokenize trace uuid wave zipfile zlib zoneinfo"
).split()


def _messages(
    document: SourceDocument, facts: ModuleFacts
) -> Iterator[tuple[FunctionFacts, str, str, Span]]:
    """Raise statements with a message that the source holds once."""
    for function in _unique_functions(facts):
        for error, message, span in function.raises:
            if (
                12 <= len(message) <= 160
                and len(message.split()) >= 3
                and not re.search(r"[\n{}]|%[sdr]", message)
                and document.text.count(message) == 1
            ):
                yield function, error, message, span


def _error_items(
    document: SourceDocument, facts: ModuleFacts, rng: random.Random
) -> Iterator[Item]:
    used = {error for f in facts.functions for error, _, _ in f.raises}
    for _, error, message, span in _messages(document, facts):
        yield Item(
            "exception_of_message",
            rng.choice(
                [
                    f'In the module {document.title}, which exception is raised with the message "'
                    f'{message}"?',
                    f'The source of {document.title} raises an exception with the text "{message}"'
                    ". Of which class is it?",
                ]
            ),
            error,
            [span],
            {"message": message},
            sorted(used) + _BUILTIN_ERRORS,
        )


def _reading_error(
    document: SourceDocument, facts: ModuleFacts, rng: random.Random
) -> Iterator[Item]:
    """Exceptions of the library's own: ValueError and its like are guessed too often."""
    for item in _error_items(document, facts, rng):
        if item.answer not in _BUILTIN_ERRORS:
            yield item


def _reading_message(
    document: SourceDocument, facts: ModuleFacts, rng: random.Random
) -> Iterator[Item]:
    for function, error, message, span in _messages(document, facts):
        if sum(e == error for e, _, _ in function.raises) == 1 and _names_once(
            document.text[function.header.start : span.end], error
        ):
            yield Item(
                "message_of_exception",
                f"With which message does {_called(function.name)} in the module {document.title} "
                f"raise {error}?",
                message,
                [function.header, span],
                {"function": function.name, "exception": error},
            )


def _names_once(text: str, error: str) -> bool:
    return len(re.findall(rf"\braise[ \t]+{re.escape(error)}\b", text)) == 1


def _reading_default(
    document: SourceDocument, facts: ModuleFacts, rng: random.Random
) -> Iterator[Item]:
    for function, parameter, source in _defaults(facts):
        answer, is_number = _read_literal(source)
        yield Item(
            "default_value",
            _default_question(document, function.name, parameter, rng),
            answer,
            [function.header],
            {"function": function.name, "parameter": parameter},
            is_number=is_number,
        )


def _read_literal(source: str) -> tuple[str, bool]:
    """``(answer, is_number)``: a string without its quotes, a decimal number as it stands.

    No answer (empty) for an expression, and for a string with an escape, where what is read and
    what is meant differ.
    """
    if "\\" in source:
        return "", False
    if _NUMBER.fullmatch(source):
        return source, True
    try:
        value = ast.literal_eval(source)
    except (ValueError, SyntaxError):
        return (source, False) if re.fullmatch(r"[\w.]+", source) else ("", False)
    return (value, False) if isinstance(value, str) and value.isprintable() else (source, False)


def _reading_constant(
    document: SourceDocument, facts: ModuleFacts, rng: random.Random
) -> Iterator[Item]:
    for name, (source, span) in facts.constants.items():
        answer, is_number = _read_literal(source)
        if source in _GUESSED or (not is_number and len(normalize_answer(answer)) < 3):
            continue
        yield Item(
            "constant_value",
            rng.choice(
                [
                    f"Which value does the module {document.title} assign to the name {name}?",
                    f"At the top level of {document.title}, to what is {name} set?",
                ]
            ),
            answer,
            [span],
            {"name": name},
            is_number=is_number,
        )


def _reading_returned(
    document: SourceDocument, facts: ModuleFacts, rng: random.Random
) -> Iterator[Item]:
    for function in _unique_functions(facts):
        if len(function.returned) != 1 or not function.returned[0][0]:
            continue
        source, span = function.returned[0]
        answer, is_number = _read_literal(source)
        if source in _GUESSED or (not is_number and len(normalize_answer(answer)) < 3):
            continue
        yield Item(
            "returned_value",
            f"{_called(function.name)[0].upper()}{_called(function.name)[1:]} in the module "
            f"{document.title} has a single return statement, with a literal. Which value does it "
            "return?",
            answer,
            [function.header, span],
            {"function": function.name},
            is_number=is_number,
        )


def _reading_parameters(
    document: SourceDocument, facts: ModuleFacts, rng: random.Random
) -> Iterator[Item]:
    for function in _unique_functions(facts):
        if len(function.parameters) >= _MIN_COUNT:
            yield Item(
                "parameter_count",
                f"How many parameters does the signature of {_called(function.name)} in the module "
                f"{document.title} list, counting self or cls, and counting *args and **kwargs as "
                "one each?",
                str(len(function.parameters)),
                [function.header],
                {"function": function.name},
                is_number=True,
            )


def _reading_methods(
    document: SourceDocument, facts: ModuleFacts, rng: random.Random
) -> Iterator[Item]:
    counts = Counter(c.name for c in facts.classes)
    for entry in facts.classes:
        if len(entry.methods) >= _MIN_COUNT and counts[entry.name] == 1:
            yield Item(
                "method_count",
                f"How many different method names does the body of the class {entry.name} in the "
                f"module {document.title} define with def, directly in the body?",
                str(len(entry.methods)),
                [entry.header, *entry.methods.values()],
                {"class": entry.name},
                is_number=True,
            )


def _reading_described(
    document: SourceDocument, facts: ModuleFacts, rng: random.Random
) -> Iterator[Item]:
    for item in _choice_described(document, facts, rng):
        if "." not in item.answer:
            yield item


# --- prose -------------------------------------------------------------------

_ENTRY = re.compile(
    r"(?:\A|\n\n)(?P<indent> *)(?P<name>(?:[a-z]\w*\.)?[A-Za-z_]\w{3,})\([^\n]*\)\n"
    r"\n(?P=indent)   (?=[A-Z])(?P<text>[^\n]+(?:\n(?P=indent)   \S[^\n]*)*)"
)


def _clean(text: str) -> str:
    return " ".join(text.split())


def _is_prose(sentence: str) -> bool:
    words = sentence.split()
    return (
        40 <= len(sentence) <= 320
        and len(words) >= 7
        and sentence[0].isupper()
        and sentence[-1] in ".?!"
        and not re.search(r">>>|::=|[|]{2}|\\|={3}|-{3}|\*{3}|_{3}", sentence)
    )


def _choice_next(
    document: SourceDocument, spans: list[tuple[int, int]], rng: random.Random
) -> Iterator[Item]:
    text = document.text
    sentences = [_clean(text[a:b]) for a, b in spans]
    counts = Counter(sentences)
    prose = [i for i, s in enumerate(sentences) if _is_prose(s) and counts[s] == 1]
    fits = set(prose)
    if len(prose) < 8:
        return
    for i in prose:
        if i + 1 not in fits or "\n\n" in text[spans[i][1] : spans[i + 1][0]]:
            continue
        wrong = [sentences[j] for j in prose if abs(j - i - 1) > 2]
        yield Item(
            "next_sentence",
            rng.choice(
                [
                    f'In "{document.title}", which sentence comes directly after this one? "'
                    f'{sentences[i]}"',
                    f'The following sentence stands in "{document.title}": "{sentences[i]}" Which '
                    "sentence follows it?",
                ]
            ),
            sentences[i + 1],
            [Span(*spans[i]), Span(*spans[i + 1])],
            {"before": sentences[i]},
            wrong if len(wrong) <= 60 else rng.sample(wrong, 60),
        )


def _entries(document: SourceDocument) -> Iterator[tuple[str, str, Span]]:
    """Definitions: a signature on a line of its own, and the first sentence of the text below."""
    matches = list(_ENTRY.finditer(document.text))
    names = Counter(m["name"] for m in matches)
    texts = Counter()
    found = []
    for match in matches:
        start, end = match.span("text")
        (first, *_) = split_sentences(document.text[start:end])
        sentence = _clean(document.text[start + first[0] : start + first[1]])
        texts[sentence] += 1
        found.append((match["name"], sentence, Span(match.start("name"), start + first[1])))
    for name, sentence, span in found:
        is_clear = names[name] == 1 and texts[sentence] == 1 and 30 <= len(sentence) <= 320
        if is_clear and not contains_term(sentence, name.rpartition(".")[2]):
            yield name, sentence, span


def _entry_items(
    document: SourceDocument, spans: list[tuple[int, int]], rng: random.Random
) -> Iterator[Item]:
    entries = list(_entries(document))
    names = [name for name, _, _ in entries]
    for name, sentence, span in entries:
        yield Item(
            "defined_term",
            rng.choice(
                [
                    f'Which name does "{document.title}" define with these words? "{sentence}"',
                    f'To which entry of "{document.title}" does this description belong? "'
                    f'{sentence}"',
                ]
            ),
            name,
            [span],
            {"description": sentence},
            names,
        )


_STANDING_NUMBER = re.compile(
    r"(?<![\w.,\-+/:(\[*\"'])\d[\d,]*(?:\.\d+)?(?![\w\-+/:*\"'\]]|[.,]\d)"
)


def _reading_blank(
    document: SourceDocument, spans: list[tuple[int, int]], rng: random.Random
) -> Iterator[Item]:
    sentences = [_clean(document.text[a:b]) for a, b in spans]
    masked = Counter(_STANDING_NUMBER.sub("____", s) for s in sentences)
    for (start, end), sentence in zip(spans, sentences, strict=True):
        numbers = _STANDING_NUMBER.findall(sentence)
        if len(numbers) != 1 or numbers[0] in ("0", "1", "2") or not _is_prose(sentence):
            continue
        with_blank = _STANDING_NUMBER.sub("____", sentence)
        if masked[with_blank] != 1:
            continue
        yield Item(
            "number_in_text",
            rng.choice(
                [
                    f'Which number belongs in the blank of this sentence of "{document.title}"? "'
                    f'{with_blank}"',
                    f'"{document.title}" says: "{with_blank}" Which number stands there?',
                ]
            ),
            numbers[0].replace(",", ""),
            [Span(start, end)],
            {"sentence": with_blank},
            is_number=True,
        )


_CHOICE_CODE = (_choice_default, _choice_method, _choice_described, _choice_import, _error_items)
_CHOICE_PROSE = (_choice_next, _entry_items)
_READING_CODE = (
    _reading_default,
    _reading_constant,
    _reading_returned,
    _reading_parameters,
    _reading_methods,
    _reading_described,
    _reading_error,
    _reading_message,
)
_READING_PROSE = (_entry_items, _reading_blank)
