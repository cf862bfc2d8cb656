"""Sources -> documents: files of many kinds, in units that can be loaded apart from each other.

``list_units`` walks a source without opening its files; a unit is a handful of files, a byte range
of a JSON lines file, or one builtin loader. ``load_unit`` yields its documents in order. A file
that cannot be read is a ``LoadFailure``, not an exception: one bad file does not stop a corpus.
"""

from __future__ import annotations

import csv
import hashlib
import importlib
import io
import json
import os
import re
import string
import sysconfig
import tokenize
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from html.parser import HTMLParser
from itertools import islice
from pathlib import Path
from typing import Any

from qwenlong.data.documents import SourceDocument
from qwenlong.data.recipe import SourceConfig
from qwenlong.errors import InputError

FILE_UNIT_BYTES = 2_000_000
FILE_UNIT_COUNT = 64
RANGE_BYTES = 4_000_000

_PATTERNS = {
    "text": ["*.txt", "*.rst", "*.text"],
    "markdown": ["*.md", "*.markdown"],
    "html": ["*.html", "*.htm", "*.xhtml"],
    "python": ["*.py"],
    "pdf": ["*.pdf"],
    "csv": ["*.csv", "*.tsv"],
    "parquet": ["*.parquet"],
    "dialogue": ["*.json", "*.jsonl"],
    "jsonl": ["*.jsonl"],
}
_NUMBER = re.compile(r"-?(?:0|[1-9]\d*)(\.\d+)?")
_SKIPPED_FOLDERS = {"__pycache__", "node_modules", "site-packages", "venv"}


@dataclass(frozen=True)
class LoadFailure:
    """A file, or a row of one, that gave no document, and why."""

    path: str
    reason: str


# --- units -------------------------------------------------------------------


def list_units(source: SourceConfig) -> Iterator[dict[str, Any]]:
    """Units of ``source`` in a fixed order, as plain types; holds one folder's names at a time.

    A unit names its files with size and modification time, so that a changed file gives another
    unit.

    Raises:
        InputError: the path does not exist, or no file below it matches.
    """
    if source.kind == "builtin":
        function = builtin_loader(source.loader)
        code = Path(importlib.import_module(function.__module__).__file__).read_bytes()
        yield {"source": source.name, "code": hashlib.sha256(code).hexdigest()[:16]}
        return
    root = source_path(source)
    if not root.exists():
        raise InputError(f"source {source.name!r}: {root} does not exist")
    found = False
    batch: list[list] = []
    for path, size, changed in _walk(root, source):
        found = True
        entry = [path, size, changed]
        if source.kind == "jsonl":
            for start in range(0, size, RANGE_BYTES):
                yield {"source": source.name, "files": [entry], "start": start}
            continue
        if batch and (
            len(batch) == FILE_UNIT_COUNT or sum(e[1] for e in batch) + size > FILE_UNIT_BYTES
        ):
            yield {"source": source.name, "files": batch}
            batch = []
        batch.append(entry)
    if batch:
        yield {"source": source.name, "files": batch}
    if not found:
        patterns = source.include or _PATTERNS[source.kind]
        raise InputError(f"source {source.name!r}: no file below {root} matches {patterns}")


def source_path(source: SourceConfig) -> Path:
    """``source.path`` with ``${stdlib}`` filled in."""
    stdlib = sysconfig.get_paths()["stdlib"]
    return Path(string.Template(source.path).safe_substitute(stdlib=stdlib))


def _walk(root: Path, source: SourceConfig) -> Iterator[tuple[str, int, int]]:
    include = source.include or _PATTERNS[source.kind]
    if root.is_file():
        status = root.stat()
        yield str(root), status.st_size, status.st_mtime_ns
        return
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(
            f
            for f in folders
            if not f.startswith(".")
            and f not in _SKIPPED_FOLDERS
            and not _matches(os.path.relpath(os.path.join(folder, f), root) + "/", source.exclude)
        )
        for name in sorted(files):
            path = os.path.join(folder, name)
            relative = os.path.relpath(path, root)
            if name.startswith(".") or not _matches(relative, include):
                continue
            if _matches(relative, source.exclude) or not os.path.isfile(path):
                continue
            if not path.isascii() and path.encode("utf-8", "replace").decode() != path:
                raise InputError(
                    f"source {source.name!r}: the name {path!r} is not UTF-8; rename the file"
                )
            status = os.stat(path)
            yield path, status.st_size, status.st_mtime_ns


def _matches(relative: str, patterns: Iterable[str]) -> bool:
    relative = relative.replace(os.sep, "/")
    return any(fnmatch(relative, p) or fnmatch(relative.rsplit("/", 1)[-1], p) for p in patterns)


def load_unit(source: SourceConfig, unit: dict[str, Any]) -> Iterator[SourceDocument | LoadFailure]:
    """Documents of one unit, in order."""
    if source.kind == "builtin":
        for document in builtin_loader(source.loader)():
            yield document.model_copy(update={"source": source.name})
        return
    root = source_path(source)
    for path, _, _ in unit["files"]:
        relative = os.path.relpath(path, root if root.is_dir() else root.parent)
        try:
            if source.kind == "jsonl":
                loaded = _jsonl_rows(path, unit["start"], source)
            else:
                loaded = _FILE_LOADERS[source.kind](Path(path), source)
            for item in loaded:
                if isinstance(item, LoadFailure):
                    yield item
                    continue
                title, text, meta = item
                text = clean_text(text)
                if not text.strip():
                    yield LoadFailure(relative, "empty")
                    continue
                yield SourceDocument(
                    title=clean_text(title or relative),
                    text=text,
                    source=source.name,
                    kind="text" if source.kind == "jsonl" else _DOCUMENT_KIND[source.kind],
                    meta={"path": relative, **meta},
                )
        except InputError:
            raise
        except (OSError, ValueError, SyntaxError, RecursionError, csv.Error) as error:
            yield LoadFailure(relative, f"{type(error).__name__}: {error}")


_DOCUMENT_KIND = {
    **{kind: kind for kind in ("text", "markdown", "html", "python", "pdf", "dialogue")},
    "csv": "table",
    "parquet": "table",
}


def clean_text(text: str) -> str:
    """``text`` that is valid UTF-8: ``\\n`` line ends, no NUL, no lone surrogate."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\x00", "")
    return text.encode("utf-8", "replace").decode()


# --- kinds -------------------------------------------------------------------

_Loaded = Iterator[tuple[str, str, dict[str, Any]] | LoadFailure]


def read_text(path: Path) -> str:
    """The text of a file: UTF-8, or what its byte order mark says; wrong bytes become U+FFFD.

    Raises:
        ValueError: the file is binary (it holds NUL bytes).
    """
    data = path.read_bytes()
    for mark, encoding in (
        (b"\xef\xbb\xbf", "utf-8-sig"),
        (b"\xff\xfe", "utf-16"),
        (b"\xfe\xff", "utf-16"),
    ):
        if data.startswith(mark):
            return data.decode(encoding, "replace")
    if b"\x00" in data[:65_536]:
        raise ValueError("binary file")
    return data.decode("utf-8", "replace")


def _load_text(path: Path, source: SourceConfig) -> _Loaded:
    yield path.stem, read_text(path), {}


def _load_markdown(path: Path, source: SourceConfig) -> _Loaded:
    text = read_text(path)
    if text.startswith("---\n") and "\n---\n" in text[4:]:
        text = text[4:].split("\n---\n", 1)[1]
    heading = next((line for line in text.splitlines() if line.startswith("#")), "")
    yield heading.strip("# \t") or path.stem, text, {}


def _load_html(path: Path, source: SourceConfig) -> _Loaded:
    title, text = html_text(read_text(path))
    yield title or path.stem, text, {}


def _load_python(path: Path, source: SourceConfig) -> _Loaded:
    with open(path, "rb") as file:
        encoding, _ = tokenize.detect_encoding(file.readline)
    root = source_path(source)
    relative = path.relative_to(root if root.is_dir() else root.parent).with_suffix("")
    parts = [p for p in relative.parts if p != "__init__"]
    yield ".".join(parts) or path.stem, path.read_bytes().decode(encoding, "replace"), {}


def _load_pdf(path: Path, source: SourceConfig) -> _Loaded:
    try:
        import pypdf
        import pypdf.errors
    except ImportError:
        raise InputError("source kind 'pdf' needs a package: pip install pypdf") from None
    try:
        reader = pypdf.PdfReader(path)
        pages = [page.extract_text() for page in reader.pages]
        title = (reader.metadata.title if reader.metadata else None) or path.stem
    except (pypdf.errors.PyPdfError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not a readable PDF ({error})") from None
    yield title, "\n\n".join(pages), {"pages": len(pages)}


def _load_csv(path: Path, source: SourceConfig) -> _Loaded:
    text = read_text(path)
    delimiter = "\t" if path.suffix == ".tsv" else ","
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    columns = [name.strip() for name in next(rows, [])]
    yield from _table_documents(path.stem, columns, rows, source)


def _load_parquet(path: Path, source: SourceConfig) -> _Loaded:
    try:
        import pyarrow.parquet
    except ImportError:
        raise InputError("source kind 'parquet' needs a package: pip install pyarrow") from None
    file = pyarrow.parquet.ParquetFile(path)
    rows = (
        ["" if value is None else str(value) for value in row.values()]
        for batch in file.iter_batches(batch_size=1024)
        for row in batch.to_pylist()
    )
    yield from _table_documents(path.stem, list(file.schema_arrow.names), rows, source)


def _table_documents(
    name: str, columns: list[str], rows: Iterable[list[str]], source: SourceConfig
) -> _Loaded:
    """One document for every ``rows_per_document`` rows: a grid, with the values in ``meta``."""
    if not columns or len(set(columns)) != len(columns):
        yield LoadFailure(name, f"column names are missing or not unique: {columns[:20]}")
        return
    rows = iter(rows)
    start = 0
    while chunk := list(islice(rows, source.rows_per_document)):
        kept = [row for row in chunk if len(row) == len(columns)]
        if len(kept) < len(chunk):
            bad = len(chunk) - len(kept)
            yield LoadFailure(name, f"{bad} rows from row {start} have another number of cells")
        if kept:
            lines = ["| " + " | ".join(columns) + " |"]
            lines += ["| " + " | ".join(cell.strip() for cell in row) + " |" for row in kept]
            last = start + len(chunk)
            values = [[_value(cell) for cell in row] for row in kept]
            meta = {"table": name, "columns": columns, "rows": values, "units": {}}
            yield f"{name}, rows {start + 1} to {last}", "\n".join(lines) + "\n", meta
        start += len(chunk)


def _value(cell: str) -> str | int | float | None:
    """A number where the cell is written as one (``007`` stays text), None where empty."""
    cell = cell.strip()
    if not cell:
        return None
    match = _NUMBER.fullmatch(cell)
    if match is None:
        return cell
    return float(cell) if match.group(1) else int(cell)


def _load_dialogue(path: Path, source: SourceConfig) -> _Loaded:
    """Conversations: a list of turns, an object with turns, a list of either, or one a line."""
    text = read_text(path)
    if path.suffix == ".jsonl":
        conversations = [json.loads(line) for line in text.splitlines() if line.strip()]
    else:
        loaded = json.loads(text)
        is_one = isinstance(loaded, dict) or (loaded and not _turns(loaded[0])[0])
        conversations = [loaded] if is_one else loaded
    for number, conversation in enumerate(conversations):
        turns, title = _turns(conversation)
        if not turns:
            yield LoadFailure(path.name, f"conversation {number} has no turns")
            continue
        lines = [f"{turn['role'].capitalize()}: {turn['content']}" for turn in turns]
        yield title or f"{path.stem}, {number + 1}", "\n\n".join(lines), {"turns": turns}


def _turns(conversation: Any) -> tuple[list[dict[str, str]], str]:
    title = ""
    if isinstance(conversation, dict):
        title = str(conversation.get("title") or "")
        keys = ("turns", "messages", "conversations", "dialogue")
        conversation = next((conversation[k] for k in keys if k in conversation), [])
    turns = []
    for turn in conversation if isinstance(conversation, list) else []:
        if not isinstance(turn, dict):
            return [], title
        role = str(turn.get("role") or turn.get("from") or turn.get("speaker") or "")
        content = turn.get("content", turn.get("value", turn.get("text")))
        if not role or not isinstance(content, str):
            return [], title
        turns.append({"role": role, "content": content})
    return turns, title


def _jsonl_rows(path: str, start: int, source: SourceConfig) -> _Loaded:
    """Rows whose first byte lies in ``[start, start + RANGE_BYTES)``: text, title, meta."""
    end = start + RANGE_BYTES
    with open(path, "rb") as file:
        if start:
            file.seek(start - 1)
            file.readline()  # the row that begins in the range before
        while (position := file.tell()) < end and (line := file.readline()):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                text = row["text"]
                if not isinstance(text, str):
                    raise TypeError
            except (ValueError, KeyError, TypeError):
                yield LoadFailure(f"{path}@{position}", "not a JSON object with a 'text' string")
                continue
            meta = row.get("meta")
            yield str(row.get("title") or ""), text, meta if isinstance(meta, dict) else {}


_FILE_LOADERS: dict[str, Callable[[Path, SourceConfig], _Loaded]] = {
    "text": _load_text,
    "markdown": _load_markdown,
    "html": _load_html,
    "python": _load_python,
    "pdf": _load_pdf,
    "csv": _load_csv,
    "parquet": _load_parquet,
    "dialogue": _load_dialogue,
}


class _TextExtractor(HTMLParser):
    _BLOCKS = {
        *("p", "div", "section", "article", "li", "ul", "ol", "tr", "table", "pre", "br", "hr"),
        *("h1", "h2", "h3", "h4", "h5", "h6", "dt", "dd", "dl", "blockquote", "figure", "main"),
    }
    _SILENT = {"script", "style", "noscript", "template", "svg", "nav", "footer", "head"}

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.title = ""
        self.pieces: list[str] = []
        self._silent: list[str] = []
        self._in_title = self._in_pre = False

    def handle_starttag(self, tag: str, attrs: list) -> None:
        if tag == "title":
            self._in_title = True
        elif tag == "body":
            self._silent.clear()  # an unclosed <head> hides nothing of the body
        elif tag in self._SILENT:
            self._silent.append(tag)
        elif tag in self._BLOCKS:
            self.pieces.append("\n" if tag in ("br", "tr", "li") else "\n\n")
            self._in_pre |= tag == "pre"
        elif tag in ("td", "th"):
            self.pieces.append("\t")

    def handle_endtag(self, tag: str) -> None:
        if tag == "title":
            self._in_title = False
        elif tag in self._silent:
            while self._silent.pop() != tag:
                pass
        elif tag in self._BLOCKS:
            self.pieces.append("\n\n" if tag not in ("li", "tr") else "")
            self._in_pre &= tag != "pre"

    def handle_data(self, data: str) -> None:
        if self._in_title:
            self.title += data
        elif not self._silent:
            if not self._in_pre:
                data = (
                    (" " if data[:1].isspace() else "")
                    + " ".join(data.split())
                    + (" " if data[-1:].isspace() and data.strip() else "")
                )
            self.pieces.append(data)


def html_text(html: str) -> tuple[str, str]:
    """Title and readable text of a page, without scripts, styles, navigation and footers."""
    parser = _TextExtractor()
    parser.feed(html)
    parser.close()
    lines = [line.rstrip() for line in "".join(parser.pieces).splitlines()]
    text, blank = [], True
    for line in lines:
        if line.strip() or not blank:
            text.append(line)
        blank = not line.strip()
    return " ".join(parser.title.split()), "\n".join(text).strip()


# --- builtin -----------------------------------------------------------------


def python_topics() -> Iterator[SourceDocument]:
    """The language reference that ships inside Python: one document per help topic."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield SourceDocument(
            title=f"Python help: {name}",
            text=clean_text(topics[name]).strip() + "\n",
            source="python-topics",
            meta={"topic": name},
        )


BUILTIN = {
    "python-topics": "qwenlong.data.loaders:python_topics",
    "python-pages": "qwenlong.data.python_pages:python_documents",
    "countries": "qwenlong.data.graph_sources:country_documents",
    "airports": "qwenlong.data.graph_sources:airport_documents",
    "time-zones": "qwenlong.data.graph_sources:zone_documents",
    "tables": "qwenlong.data.tables:table_documents",
}


def builtin_loader(name: str) -> Callable[[], Iterator[SourceDocument]]:
    """The loader of a builtin source: a name of ``BUILTIN`` or ``module:function``."""
    return import_function(BUILTIN.get(name, name), "builtin loader")


def import_function(path: str, what: str) -> Callable:
    """The function at ``module:function``; an error says what it was for."""
    module, _, function = path.partition(":")
    if not function:
        raise InputError(f"{what} {path!r} is unknown; name one that exists or 'module:function'")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise InputError(f"{what} {path!r} cannot be imported: {error}") from None
