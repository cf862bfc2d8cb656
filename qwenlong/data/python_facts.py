"""What a Python source file says about itself, with the characters that say it.

Read by ``ast``; nothing is imported or run. Offsets are characters of the text, although ``ast``
counts UTF-8 bytes.
"""

from __future__ import annotations

import ast
import functools
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_MAX_LITERAL = 80  # characters of a default, a constant or a returned value


class Span(NamedTuple):
    start: int
    end: int


@dataclass
class FunctionFacts:
    """A function or method. ``header`` is ``def`` to the colon; defaults are source text."""

    name: str  # "f" or "Class.f"
    header: Span
    parameters: list[str]
    defaults: dict[str, str] = field(default_factory=dict)
    summary: str = ""  # the first sentence of the docstring, on one line
    summary_span: Span = Span(0, 0)
    raises: list[tuple[str, str, Span]] = field(default_factory=list)  # exception, message, where
    returned: list[tuple[str, Span]] = field(default_factory=list)  # values of its returns


@dataclass
class ClassFacts:
    name: str
    header: Span
    methods: dict[str, Span] = field(default_factory=dict)  # name -> header


@dataclass
class ModuleFacts:
    functions: list[FunctionFacts] = field(default_factory=list)
    classes: list[ClassFacts] = field(default_factory=list)
    constants: dict[str, tuple[str, Span]] = field(default_factory=dict)  # bound once, a literal
    imports: dict[str, Span] = field(default_factory=dict)  # absolute names -> statement
    import_words: frozenset[str] = frozenset()  # every word of every import statement
    defined: Counter[str] = field(default_factory=Counter)  # names after ``def``, anywhere
    assigned: frozenset[str] = frozenset()  # names bound by an indented assignment
    words: frozenset[str] = frozenset()


class _Offsets:
    def __init__(self, text: str):
        self.text = text
        self._lines = text.split("\n")
        self._starts = [0]
        for line in self._lines:
            self._starts.append(self._starts[-1] + len(line) + 1)

    def at(self, line: int, column: int) -> int:
        content = self._lines[line - 1]
        if not content.isascii():
            column = len(content.encode()[:column].decode())
        return self._starts[line - 1] + column

    def span(self, node: ast.AST) -> Span:
        return Span(
            self.at(node.lineno, node.col_offset), self.at(node.end_lineno, node.end_col_offset)
        )

    def header(self, node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> Span:
        """From ``def`` or ``class`` to the line before the body's first statement."""
        start = self.at(node.lineno, node.col_offset)
        body = self.at(node.body[0].lineno, node.body[0].col_offset)
        return Span(start, start + len(self.text[start:body].rstrip()))


@functools.lru_cache(maxsize=2048)
def module_facts(text: str) -> ModuleFacts | None:
    """Facts of a source text; None if this Python cannot parse it."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError):
        return None
    offsets = _Offsets(text)
    facts = ModuleFacts(
        defined=Counter(re.findall(r"\bdef[ \t]+(\w+)", text)),
        assigned=frozenset(re.findall(r"^[ \t]+(\w+)[ \t]*=", text, re.MULTILINE)),
        words=frozenset(re.findall(r"\w+", text)),
    )
    bound = Counter(_bound_names(tree, text))
    for node in tree.body:
        if isinstance(node, _FUNCTIONS):
            facts.functions.append(_function(node, node.name, offsets))
        elif isinstance(node, ast.ClassDef):
            entry = ClassFacts(node.name, offsets.header(node))
            for child in node.body:
                if isinstance(child, _FUNCTIONS):
                    entry.methods[child.name] = offsets.header(child)
                    facts.functions.append(_function(child, f"{node.name}.{child.name}", offsets))
            facts.classes.append(entry)
        elif isinstance(node, ast.Assign) and len(node.targets) == 1:
            target = node.targets[0]
            value = _literal(node.value, offsets)
            if isinstance(target, ast.Name) and value and bound[target.id] == 1:
                facts.constants[target.id] = (value, offsets.span(node))
    words: set[str] = set()
    for node in _statements(tree.body, into_functions=True):
        if not isinstance(node, (ast.Import, ast.ImportFrom)):
            continue
        span = offsets.span(node)
        words.update(re.findall(r"\w+", text[span.start : span.end]))
        if isinstance(node, ast.Import):
            for alias in node.names:
                facts.imports.setdefault(alias.name, span)
        elif not node.level and node.module:
            facts.imports.setdefault(node.module, span)
    facts.import_words = frozenset(words)
    return facts


def _bound_names(tree: ast.Module, text: str) -> Iterator[str]:
    """Every binding of a module-level name; one that occurs once is never bound again."""
    for node in _statements(tree.body, into_functions=False):
        if isinstance(node, (*_FUNCTIONS, ast.ClassDef)):
            yield node.name
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            for alias in node.names:
                yield (alias.asname or alias.name).partition(".")[0]
        elif isinstance(node, ast.With):
            yield from _stored(*(i.optional_vars for i in node.items if i.optional_vars))
        elif isinstance(node, (ast.Assign, ast.Delete)):
            yield from _stored(*node.targets)
        elif isinstance(node, (ast.AugAssign, ast.AnnAssign, ast.For)):
            yield from _stored(node.target)
    for names in re.findall(r"^[ \t]*global[ \t]+([\w, \t]+)|(\w+)[ \t]*:=", text, re.MULTILINE):
        yield from re.findall(r"\w+", " ".join(names))


def _stored(*targets: ast.expr) -> Iterator[str]:
    for target in targets:
        for node in ast.walk(target):
            if isinstance(node, ast.Name):
                yield node.id


def _statements(body: list[ast.stmt], *, into_functions: bool) -> Iterator[ast.stmt]:
    """Statements of ``body`` and of the blocks in it; functions and classes are opened or not."""
    for node in body:
        yield node
        if isinstance(node, (*_FUNCTIONS, ast.ClassDef)) and not into_functions:
            continue
        for block in ("body", "orelse", "finalbody"):
            yield from _statements(getattr(node, block, []), into_functions=into_functions)
        for part in (*getattr(node, "handlers", ()), *getattr(node, "cases", ())):
            yield from _statements(part.body, into_functions=into_functions)


def _function(
    node: ast.FunctionDef | ast.AsyncFunctionDef, name: str, offsets: _Offsets
) -> FunctionFacts:
    args = node.args
    positional = [*args.posonlyargs, *args.args]
    every = [
        *positional,
        *([args.vararg] if args.vararg else []),
        *args.kwonlyargs,
        *([args.kwarg] if args.kwarg else []),
    ]
    facts = FunctionFacts(name, offsets.header(node), [a.arg for a in every])
    with_default = positional[len(positional) - len(args.defaults) :]
    pairs = [*zip(with_default, args.defaults, strict=True)]
    pairs += [(a, d) for a, d in zip(args.kwonlyargs, args.kw_defaults, strict=True) if d]
    for argument, default in pairs:
        span = offsets.span(default)
        source = offsets.text[span.start : span.end]
        if len(source) <= _MAX_LITERAL and "\n" not in source:
            facts.defaults[argument.arg] = source
    first = node.body[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
        if isinstance(first.value.value, str):
            facts.summary = _first_sentence(first.value.value)
            facts.summary_span = offsets.span(first)
    for child in _statements(node.body, into_functions=False):
        if isinstance(child, ast.Raise) and isinstance(child.exc, ast.Call):
            message = child.exc.args[0] if child.exc.args else None
            if (
                isinstance(child.exc.func, ast.Name)
                and isinstance(message, ast.Constant)
                and isinstance(message.value, str)
            ):
                entry = (child.exc.func.id, message.value, offsets.span(child))
                facts.raises.append(entry)
        elif isinstance(child, ast.Return):
            value = _literal(child.value, offsets) if child.value else "None"
            facts.returned.append((value, offsets.span(child)))
    return facts


def _literal(node: ast.expr, offsets: _Offsets) -> str:
    """Source of a number or a string on one line; empty for anything else."""
    inner = node.operand if isinstance(node, ast.UnaryOp) else node
    if not isinstance(inner, ast.Constant) or not isinstance(inner.value, (int, float, str)):
        return ""
    if isinstance(inner.value, bool):
        return ""
    span = offsets.span(node)
    source = offsets.text[span.start : span.end]
    return source if len(source) <= _MAX_LITERAL and "\n" not in source else ""


def _first_sentence(docstring: str) -> str:
    paragraph = " ".join(docstring.strip().split("\n\n")[0].split())
    end = paragraph.find(". ")
    return paragraph[: end + 1] if end >= 0 else paragraph
