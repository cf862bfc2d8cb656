"""Rules that ask about one Python source file: defaults, constants, messages, counts, descriptions.

A rule yields only what the file settles: a name that occurs once, a literal bound once.
"""

from __future__ import annotations

import ast
import random
import re
from collections import Counter
from collections.abc import Iterator

from qwenlong.data.documents import SourceDocument
from qwenlong.data.leaks import tells_name
from qwenlong.data.python_facts import FunctionFacts, ModuleFacts, Span
from qwenlong.data.samples import OPTIONS, Item, contains_term
from qwenlong.rewards.text import normalize_answer

_MIN_COUNT = 5  # of things to count: a smaller answer is soon guessed
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
_ERROR_NAME = re.compile(r"\b[A-Z]\w*(?:Error|Exception|Warning)\b")
_BUILTIN_ERRORS = (
    "ValueError TypeError RuntimeError KeyError IndexError AttributeError OSError LookupError "
    "NotImplementedError ImportError OverflowError AssertionError EOFError SyntaxError"
).split()


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
    by_kind: dict[str, dict[str, str]] = {"number": {}, "string": {}, "name": {}}
    sources = [s for f in facts.functions for s in f.defaults.values()]
    # What no answer is would tell the answer.
    for source in (s for s in sources if s not in _GUESSED and normalize_answer(s)):
        by_kind[_literal_kind(source)].setdefault(_meaning(source), source)
    for function, parameter, source in triples:
        found = by_kind[_literal_kind(source)]
        if len(found) < OPTIONS:
            found = {m: s for kind in by_kind.values() for m, s in kind.items()}
        wrong = [s for meaning, s in found.items() if meaning != _meaning(source)]
        yield Item(
            "default_value",
            _default_question(document, function.name, parameter, rng),
            source,
            [function.header],
            {"function": function.name, "parameter": parameter},
            wrong,
        )


def _meaning(source: str) -> str:
    """The same for two ways to write a literal: ``'0'`` and ``"0"``."""
    try:
        return repr(ast.literal_eval(source))
    except (ValueError, SyntaxError):
        return source


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
            and not tells_name(function.summary, last)
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
    """Wrong options are modules that no import names, many of which the source speaks of."""
    is_dynamic = {"import_module", "__import__", "find_spec"} & facts.words
    wrong = [m for m in _MODULES if m not in (facts.words if is_dynamic else facts.import_words)]
    # A dotted name would be told from the wrong options, which have no dot.
    names = [n for n in facts.imports if "." not in n and n not in (document.title, "__future__")]
    for name in rng.sample(names, min(len(names), _IMPORTS_ASKED)):
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
            wrong,
        )


_IMPORTS_ASKED = 8  # of one document: its questions have the same words, one or two are taken
_MODULES = (
    "abc argparse array ast base64 binascii bisect calendar cmath cmd code codecs collections "
    "colorsys concurrent configparser contextlib copy csv ctypes dataclasses datetime decimal "
    "difflib dis email enum errno fcntl fnmatch fractions ftplib functools getopt getpass gettext "
    "glob gzip hashlib heapq hmac html http imaplib inspect io ipaddress itertools json keyword "
    "linecache locale logging lzma mailbox marshal math mimetypes netrc numbers operator optparse "
    "os pathlib pickle platform plistlib poplib pprint profile queue random re resource sched "
    "secrets select selectors shelve shlex shutil signal site smtplib socket socketserver sqlite3 "
    "ssl stat statistics string stringprep struct subprocess sys tarfile tempfile test textwrap "
    "threading time timeit token tokenize trace traceback types typing urllib uuid warnings wave "
    "weakref xml zipfile zlib zoneinfo"
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
    # All that the source speaks of, so that the answer is not the only one that it names.
    used = {error for f in facts.functions for error, _, _ in f.raises}
    names = sorted(used.union(_ERROR_NAME.findall(document.text), _BUILTIN_ERRORS))
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
            # Of its own kind: the library's exceptions have the longer names.
            [e for e in names if (e in _BUILTIN_ERRORS) == (error in _BUILTIN_ERRORS)],
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


CHOICE_RULES = (_choice_default, _choice_method, _choice_described, _choice_import, _error_items)
READING_RULES = (
    _reading_default,
    _reading_constant,
    _reading_returned,
    _reading_parameters,
    _reading_methods,
    _reading_described,
    _reading_error,
    _reading_message,
)
