"""Python source as prose documents: a page for each module and each class, read by ``ast``.

Nothing is imported or run. A base class is written with the module that its name is imported
from.
"""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from qwenlong.data.documents import SourceDocument
from qwenlong.data.graph_sources import Page, join_names

# Tests, generated tables and installed packages: not what a reader calls the library.
_SKIPPED = frozenset(
    "test tests idle_test idlelib lib2to3 encodings pydoc_data site-packages dist-packages "
    "turtledemo ensurepip __pycache__".split()
)
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass
class _Class:
    name: str  # dotted: module and class
    bases: list[str]
    methods: list[str]
    assigned: list[str]  # names bound by assignment in the body
    summary: str


@dataclass
class _Module:
    name: str
    package: str
    lines: int
    summary: str
    imports: list[str] = field(default_factory=list)
    functions: list[str] = field(default_factory=list)
    classes: dict[str, _Class] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)  # local name -> dotted name it is bound to


def python_documents(root: str | Path | None = None) -> list[SourceDocument]:
    """Pages of the modules and classes below ``root``, by default Python's standard library.

    A module page tells its package, size, imports, functions and classes; a class page its module,
    base classes and methods. Modules that begin with an underscore, tests and files that this
    Python cannot parse are left out.
    """
    library = root is None
    root = Path(sysconfig.get_paths()["stdlib"] if root is None else root)
    if not root.is_dir():
        raise ValueError(f"python_documents: {root} is not a folder")
    where = "the Python standard library" if library else f"the code base {root.name}"
    source = "python-library" if library else root.name
    documents = []
    for module in _read_modules(root):
        documents.append(_module_page(module, where, source))
        for entry in module.classes.values():
            documents.append(_class_page(entry, module, source))
    return documents


def _read_modules(root: Path) -> list[_Module]:
    modules = []
    for path in sorted(root.rglob("*.py")):
        parts = list(path.relative_to(root).with_suffix("").parts)
        is_package = parts[-1] == "__init__"
        if is_package:
            parts.pop()
        if not parts or any(p in _SKIPPED or p.startswith(("_", ".", "config-")) for p in parts):
            continue
        text = path.read_bytes()
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError, RecursionError):
            continue
        modules.append(_read_module(".".join(parts), is_package, text.count(b"\n"), tree))
    return modules


def _read_module(name: str, is_package: bool, lines: int, tree: ast.Module) -> _Module:
    package = name if is_package else name.rpartition(".")[0]
    module = _Module(name, name.rpartition(".")[0], lines, _summary(tree))
    imports: dict[str, None] = {}
    functions: dict[str, None] = {}
    for node in _executed(tree.body):
        if isinstance(node, ast.Import):
            for alias in node.names:
                imports[alias.name] = None
                module.names[alias.asname or alias.name.partition(".")[0]] = (
                    alias.name if alias.asname else alias.name.partition(".")[0]
                )
        elif isinstance(node, ast.ImportFrom):
            origin = node.module or ""
            if node.level:
                parts = package.split(".")
                origin = ".".join(
                    [*parts[: len(parts) - node.level + 1], *([origin] if origin else [])]
                )
            imports[origin] = None
            for alias in node.names:
                module.names[alias.asname or alias.name] = f"{origin}.{alias.name}"
        elif isinstance(node, _FUNCTIONS):
            functions[node.name] = None
        elif isinstance(node, ast.ClassDef) and node.name not in module.classes:
            module.classes[node.name] = _Class(
                f"{name}.{node.name}",
                [ast.unparse(b) for b in node.bases if isinstance(b, (ast.Name, ast.Attribute))],
                *_class_names(node),
                _summary(node),
            )
    module.imports = [i for i in imports if i and i != name]
    module.functions = list(functions)
    for entry in module.classes.values():
        entry.bases = list(dict.fromkeys(_resolve(base, module) for base in entry.bases))
    return module


def _class_names(node: ast.ClassDef) -> tuple[list[str], list[str]]:
    """Names that the body defines with ``def``, and those that it binds only by assignment."""
    methods: dict[str, None] = {}
    assigned: dict[str, None] = {}
    for statement in _executed(node.body):
        if isinstance(statement, _FUNCTIONS):
            methods[statement.name] = None
        elif isinstance(statement, (ast.Assign, ast.AnnAssign)):
            targets = getattr(statement, "targets", None) or [statement.target]
            names = (n for target in targets for n in ast.walk(target))
            assigned.update((n.id, None) for n in names if isinstance(n, ast.Name))
    return list(methods), [name for name in assigned if name not in methods]


def _executed(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements that run with ``body``, those under ``if``, ``try`` and ``with`` included."""
    for node in body:
        yield node
        if isinstance(node, (ast.If, ast.Try, ast.With)):
            for block in ("body", "orelse", "finalbody"):
                yield from _executed(getattr(node, block, []))
            for handler in getattr(node, "handlers", []):
                yield from _executed(handler.body)


def _resolve(base: str, module: _Module) -> str:
    head, _, rest = base.partition(".")
    if not rest and head in module.classes:
        return f"{module.name}.{head}"
    if head in module.names:
        return module.names[head] + (f".{rest}" if rest else "")
    return base


def _summary(node: ast.Module | ast.ClassDef) -> str:
    """First line of the docstring, where it is a sentence that can be quoted."""
    first = (ast.get_docstring(node) or "").strip().partition("\n")[0].strip()
    return first if 15 <= len(first) <= 160 and first.endswith(".") and '"' not in first else ""


def _module_page(module: _Module, where: str, source: str) -> SourceDocument:
    name = module.name
    page = Page(name, "module")
    page.say([f"{name} is a module of {where}.", f"The module {name} is part of {where}."])
    if module.package:
        page.say(f"It lies in the package {module.package}.", (name, "package", module.package))
    page.say(
        [f"Its source has {module.lines:,} lines.", f"Its file counts {module.lines:,} lines."],
        (name, "source_lines", f"{module.lines:,}"),
    )
    if module.summary:
        page.say(f'Its documentation begins: "{module.summary}"')
    if module.imports:
        page.new_paragraph()
        page.say(
            [
                f"When it is loaded, {name} imports {join_names(module.imports)}.",
                f"On loading, the module imports {join_names(module.imports)}.",
            ],
            *((name, "imports", i) for i in module.imports),
        )
    if module.functions:
        page.new_paragraph()
        page.say(
            [
                f"Functions defined in {name}: {join_names(module.functions)}.",
                f"At its top level {name} defines the functions {join_names(module.functions)}."
                if len(module.functions) > 1
                else f"At its top level {name} defines the function {module.functions[0]}.",
            ],
            *((name, "function", f) for f in module.functions),
        )
    if module.classes:
        names = [entry.name for entry in module.classes.values()]
        page.new_paragraph()
        page.say(
            f"Classes defined in {name}: {join_names(names)}.",
            *((n, "defined_in", name) for n in names),
        )
    return page.document(f"Module {name}", source)


def _class_page(entry: _Class, module: _Module, source: str) -> SourceDocument:
    name = entry.name
    page = Page(name, "class")
    page.say(
        [
            f"{name} is a class of the module {module.name}.",
            f"The module {module.name} defines {name}.",
        ],
        (name, "defined_in", module.name),
    )
    if len(entry.bases) == 1:
        base = entry.bases[0]
        page.say(
            [f"It derives from {base} and from no other class.", f"Its only base is {base}."],
            (name, "derives_from", base),
            (name, "only_base", base),
        )
    elif entry.bases:
        page.say(
            [
                f"It derives from {join_names(entry.bases)}.",
                f"Bases of {name}: {join_names(entry.bases)}.",
            ],
            *((name, "derives_from", base) for base in entry.bases),
        )
    else:
        page.say("It names no base class.")
    if entry.summary:
        page.say(f'Its documentation begins: "{entry.summary}"')
    if entry.methods:
        page.new_paragraph()
        count = f"{len(entry.methods):,}"
        page.say(
            [
                f"Methods in its own body, {count} in all: {join_names(entry.methods)}.",
                f"The body of {name} defines {count} methods: {join_names(entry.methods)}."
                if len(entry.methods) > 1
                else f"The body of {name} defines {count} method: {entry.methods[0]}.",
            ],
            (name, "method_count", count),
            *((name, "method", m) for m in entry.methods),
        )
    else:
        page.say("Its body defines no method.")
    if entry.assigned:
        page.say(
            f"Names assigned in its body: {join_names(entry.assigned)}.",
            *((name, "attribute", a) for a in entry.assigned),
        )
    return page.document(f"Class {name}", source)
