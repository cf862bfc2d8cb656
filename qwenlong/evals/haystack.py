"""Contexts of an exact length, made of real texts with something hidden in them.

A ``Haystack`` is a list of pages of real text that any Python machine has: the language reference
behind ``help()`` and the source of the standard library. ``compose`` draws pages until a length is
full, cuts the last one, and puts sentences and whole documents at chosen depths.

The length of a context is the number of tokens of its documents as ``prompts.document_block``
renders them, taken as the sum over the documents: at most the target, and at most ``SLACK_TOKENS``
or 0.1 % below it. Tokens that reach over the border of two documents make the count of the whole
text differ from that sum by about a token a document, less than 0.5 %.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from qwenlong.data.documents import SourceDocument
from qwenlong.data.leaks import normalise
from qwenlong.data.loaders import list_units, load_unit, python_topics
from qwenlong.data.recipe import SourceConfig
from qwenlong.errors import InputError
from qwenlong.evals.texts import TokenCounter
from qwenlong.prompts import DOCUMENT_GAP, document_blocks
from qwenlong.types import Document, Evidence

PAGE_CHARACTERS = 12_000
SLACK_TOKENS = 128
_MIN_PAGE_CHARACTERS = 400
_LEAST_CUT = 8  # tokens of text: a shorter remainder of a page is not worth a header
_LIBRARY = SourceConfig(
    name="python-library",
    kind="python",
    path="${stdlib}",
    # Tables of code points, and files that are not meant to be read.
    exclude=["encodings/*", "config-*/*", "pydoc_data/*", "ensurepip/*", "lib2to3/*"],
)


@dataclass(frozen=True)
class Page:
    """A piece of a real document; ``topic`` is the title of the whole."""

    id: str
    title: str
    topic: str
    text: str


@dataclass(frozen=True)
class Insertion:
    """``text``, a line of its own, at ``depth`` (fraction of the context)."""

    text: str
    depth: float


@dataclass(frozen=True)
class Context:
    """What ``compose`` made.

    ``evidence`` has a span for each insertion, in the order given, then those of the placed
    documents. ``laps`` is how often the pages were gone through (above 1 pages repeat).
    """

    documents: list[Document]
    evidence: list[Evidence]
    n_tokens: int
    laps: int


class Haystack:
    """Pages of real text under one tokenizer; their tokens are counted once, when first used."""

    def __init__(self, pages: Sequence[Page], tokens: TokenCounter, *, name: str):
        if not pages:
            raise InputError("the haystack has no text; name a folder with text files")
        self.pages, self.tokens, self.name = list(pages), tokens, name
        self._counts: dict[str, int] = {}
        self._normalised: dict[str, str] = {}

    @classmethod
    def load(cls, tokens: TokenCounter, folder: str | Path | None = None) -> Haystack:
        """The texts of this Python, or those below ``folder`` (text, Markdown, HTML, Python)."""
        documents = _python_documents() if folder is None else _folder_documents(Path(folder))
        pages = {page.id: page for document in documents for page in _pages(document)}
        return cls(list(pages.values()), tokens, name="python" if folder is None else str(folder))

    def count(self, page: Page) -> int:
        """Tokens of the text of ``page``."""
        if page.id not in self._counts:
            self._counts[page.id] = self.tokens(page.text)
        return self._counts[page.id]

    def normalised(self, page: Page) -> str:
        """The text of ``page`` as ``leaks.AnswerFinder`` reads it."""
        if page.id not in self._normalised:
            self._normalised[page.id] = normalise(page.text)
        return self._normalised[page.id]

    def draw(self, rng: random.Random) -> Iterator[tuple[int, Page]]:
        """``(lap, page)`` without end: all pages in a new order, again and again."""
        lap = 0
        while True:
            lap += 1
            order = list(range(len(self.pages)))
            rng.shuffle(order)
            for number in order:
                yield lap, self.pages[number]


def _python_documents() -> Iterator[SourceDocument]:
    yield from python_topics()
    for unit in list_units(_LIBRARY):
        for item in load_unit(_LIBRARY, unit):
            if isinstance(item, SourceDocument):
                yield item


def _folder_documents(folder: Path) -> Iterator[SourceDocument]:
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; name one with text files")
    found = False
    for kind in ("text", "markdown", "html", "python"):
        source = SourceConfig(name=folder.name, kind=kind, path=str(folder))
        try:
            for unit in list_units(source):
                for item in load_unit(source, unit):
                    if isinstance(item, SourceDocument):
                        found = True
                        yield item
        except InputError:  # no file of this kind
            continue
    if not found:
        raise InputError(f"{folder} holds no text, Markdown, HTML or Python file")


def _pages(document: SourceDocument) -> Iterator[Page]:
    """Pieces of at most ``PAGE_CHARACTERS``, cut at line ends where there are any."""
    text = document.text.strip()
    if "<document" in text or "</document" in text:  # would end a document of the prompt
        return
    starts = [0]
    while len(text) - starts[-1] > PAGE_CHARACTERS:
        cut = text.rfind("\n", starts[-1] + PAGE_CHARACTERS // 2, starts[-1] + PAGE_CHARACTERS)
        starts.append(cut + 1 if cut >= 0 else starts[-1] + PAGE_CHARACTERS)
    for number, (start, end) in enumerate(zip(starts, [*starts[1:], len(text)], strict=True), 1):
        piece = text[start:end].strip()
        if len(piece) >= _MIN_PAGE_CHARACTERS:
            title = document.title if len(starts) == 1 else f"{document.title}, page {number}"
            yield Page(f"{document.id}-{number}", title, document.title, piece)


# --- composing ---------------------------------------------------------------


@dataclass(frozen=True)
class Placed:
    """A whole document at ``depth``, with the spans of its evidence."""

    document: Document
    depth: float
    evidence: tuple[Evidence, ...] = ()


@dataclass
class _Piece:
    document: Document
    text_tokens: int
    is_page: bool


def compose(
    haystack: Haystack,
    rng: random.Random,
    target: int,
    *,
    insertions: Sequence[Insertion] = (),
    placed: Sequence[Placed] = (),
    refuses: Callable[[Page], bool] = lambda page: False,
    kin: Sequence[Page] = (),
    kin_share: float = 0.0,
) -> Context:
    """Pages of ``haystack`` around ``placed``, ``insertions`` in them, up to ``target`` tokens.

    Args:
        refuses: pages for which it is true stay out (they would give the answer away).
        kin: pages alike to ``placed``, which take ``kin_share`` of the room before the haystack
            does, each once; they are mixed with its pages.

    Raises:
        InputError: ``target`` is too short for what must be in it, or every page is refused.
    """
    tokens = haystack.tokens
    for_lines = sum(tokens(f"\n{i.text}\n") + 2 for i in insertions)
    pieces = [_Piece(p.document, tokens(p.document.text), False) for p in placed]
    least = for_lines + sum(
        p.text_tokens + header_tokens(tokens, 1, p.document.title) for p in pieces
    )
    if insertions:
        least += _LEAST_CUT
    if least > target:
        raise InputError(
            f"a context of {target:,} tokens is too short: what is hidden in it takes {least:,}"
        )
    room = target - least
    kin_room = int(kin_share * room)
    alike, _ = _fill(haystack, ((1, page) for page in kin), kin_room, refuses, skip_long=True)
    rest = room - _cost(haystack.tokens, alike)
    fillers, laps = _fill(haystack, haystack.draw(rng), rest, refuses)
    last = fillers[-1] if fillers else None  # the one that is cut
    if alike:
        fillers += alike
        rng.shuffle(fillers)
    order = _order(fillers, list(zip(pieces, (p.depth for p in placed), strict=True)))
    spent = for_lines + _cost(tokens, order)
    if last is not None:
        room = last.text_tokens + target - spent
        if room >= last.text_tokens:
            text = last.document.text
        else:
            text = tokens.head(last.document.text, room)
        if room >= _LEAST_CUT and text.strip():
            last.document = last.document.model_copy(update={"text": text})
            last.text_tokens = tokens(text)
        elif len(fillers) > 1 or not insertions:
            order.remove(last)
        else:
            raise InputError(f"a context of {target:,} tokens has no room for a line of text")
    evidence = _insert(tokens, order, insertions)
    return Context(
        [piece.document for piece in order],
        [*evidence, *(span for p in placed for span in p.evidence)],
        _cost(tokens, order),
        laps,
    )


def header_tokens(tokens: TokenCounter, number: int, title: str) -> int:
    """Tokens that a document costs beyond its text."""
    text = "x."  # most texts end with a mark, which many tokenizers join with the line end
    [block] = document_blocks([(title, text, None)], first=number)
    return tokens(block + DOCUMENT_GAP) - tokens(text)


def _cost(tokens: TokenCounter, order: Sequence[_Piece]) -> int:
    """Tokens of the documents as they are rendered, in this order."""
    return sum(
        piece.text_tokens + header_tokens(tokens, number, piece.document.title)
        for number, piece in enumerate(order, 1)
    )


def _fill(
    haystack: Haystack,
    pages: Iterator[tuple[int, Page]],
    room: int,
    refuses: Callable[[Page], bool],
    *,
    skip_long: bool = False,
) -> tuple[list[_Piece], int]:
    """Pages in order until they need at least ``room`` tokens, and the laps that they took.

    With ``skip_long`` those that do not fit are left out, so that the room is not exceeded.
    """
    fillers: list[_Piece] = []
    refused, laps = 0, 1
    for lap, page in pages:
        if room <= 0:
            break
        laps = lap
        if refuses(page):
            refused += 1
            if not skip_long and refused >= 2 * len(haystack.pages):  # a whole lap at least
                raise InputError(
                    "every page of the haystack gives the answer away; name other texts"
                )
            continue
        refused = 0
        number = len(fillers) + 1
        cost = haystack.count(page) + header_tokens(haystack.tokens, number, page.title)
        if skip_long and cost > room:
            continue
        page_id = page.id if lap == 1 else f"{page.id}-lap{lap}"
        document = Document(id=page_id, title=page.title, role="distractor", text=page.text)
        fillers.append(_Piece(document, haystack.count(page), True))
        room -= cost
    return fillers, laps


def _order(fillers: list[_Piece], placed: list[tuple[_Piece, float]]) -> list[_Piece]:
    """Placed pieces among the fillers, each after the share of the fillers that its depth says."""
    room = sum(piece.text_tokens for piece in fillers)
    order: list[_Piece] = []
    queue = list(fillers)
    filled, at = 0, 0
    for piece, depth in sorted(placed, key=lambda item: item[1]):
        while at < len(queue) and filled + queue[at].text_tokens / 2 < depth * room:
            filled += queue[at].text_tokens
            order.append(queue[at])
            at += 1
        order.append(piece)
    return order + queue[at:]


def _insert(
    tokens: TokenCounter, order: list[_Piece], insertions: Sequence[Insertion]
) -> list[Evidence]:
    """Put the insertions into the pages of ``order``; their spans, in the order given."""
    pages = [piece for piece in order if piece.is_page]
    total = sum(piece.text_tokens for piece in pages)
    places: dict[int, list[tuple[int, int]]] = {}  # page -> (position, insertion)
    for number, insertion in enumerate(insertions):
        wanted = insertion.depth * total
        page = 0
        while page < len(pages) - 1 and wanted >= pages[page].text_tokens:
            wanted -= pages[page].text_tokens
            page += 1
        text = pages[page].document.text
        share = min(1.0, wanted / max(1, pages[page].text_tokens))
        line_end = text.find("\n", int(share * len(text)))
        places.setdefault(page, []).append((line_end if line_end >= 0 else len(text), number))
    spans: dict[int, Evidence] = {}
    for page, wanted_places in places.items():
        document = pages[page].document
        parts, at, length = [], 0, 0
        for position, number in sorted(wanted_places):
            line = insertions[number].text
            before = document.text[at:position] + "\n"
            parts += [before, line]
            start = length + len(before)
            length = start + len(line)
            spans[number] = Evidence(doc=document.id, start=start, end=length)
            at = position
        text = "".join(parts) + document.text[at:]
        pages[page].document = document.model_copy(update={"text": text, "role": "evidence"})
        pages[page].text_tokens = tokens(text)
    return [spans[number] for number in range(len(insertions))]
