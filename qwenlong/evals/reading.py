"""What a model sees of a sample: the whole context, or what of it fits a window."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

from qwenlong import prompts
from qwenlong.errors import InputError
from qwenlong.evals.texts import TokenCounter
from qwenlong.types import Document, Sample

Keep = Literal["ends", "last"]
CHAT_TOKENS = 64  # of a window, for what a chat template adds
_LEAST_CUT = 8  # tokens of a document's text: a shorter piece is left out


def fit(
    sample: Sample,
    room: int,
    tokens: TokenCounter,
    *,
    keep: Keep = "ends",
    resolve: Callable[[str], str] | None = None,
) -> tuple[Sample, bool]:
    """``sample`` with as much of its documents as makes its prompt at most ``room`` tokens.

    The question and the answer format are always whole. Documents are read only as far as they are
    shown, however long the rest.

    Args:
        keep: ``"ends"`` takes the text out of the middle (arXiv 2512.12967, section 5.1),
            ``"last"`` keeps the end alone.
        resolve: text of a document whose ``ref`` is given.

    Returns:
        The sample and whether text was left out. A document in which the cut falls is shown in
        part; one that loses its middle comes as two documents of the same title.

    Raises:
        InputError: the prompt without documents does not fit.
    """
    if keep not in ("ends", "last"):
        raise ValueError(f"fit: unknown keep {keep!r}; choose 'ends' or 'last'")
    counted = sample.tokens is not None and sample.tokens.tokenizer == tokens.name
    question = tokens(_prompt(sample.model_copy(update={"documents": []})))
    if question > room:
        raise InputError(
            f"sample {sample.id!r}: its question alone is {question - room:,} tokens longer than "
            "the window"
        )
    spare = room - question
    if counted and sample.tokens.n + len(sample.documents) <= spare:  # a token a border
        return sample, False

    def load(document: Document) -> Document:
        if document.text is not None or resolve is None:
            return document
        return document.model_copy(update={"text": resolve(document.ref), "ref": None})

    is_cut = False
    while True:
        documents, cut_again = _documents(sample, load, spare, tokens, keep)
        is_cut |= cut_again
        fitted = sample.model_copy(update={"documents": documents})
        # Tokens that reach over a border may make the whole longer than its parts.
        excess = tokens(_prompt(fitted)) - room
        if excess <= 0:
            return fitted, is_cut
        spare -= excess


def _prompt(sample: Sample) -> str:
    return prompts.render(sample)[0]["content"]


def _documents(
    sample: Sample,
    load: Callable[[Document], Document],
    room: int,
    tokens: TokenCounter,
    keep: Keep,
) -> tuple[list[Document], bool]:
    """What of the documents takes ``room`` tokens, and whether any text is missing."""
    whole, is_cut = _take(map(load, sample.documents), room, tokens, tokens.head)
    if not is_cut:
        return whole, False
    front: list[Document] = []
    if keep == "ends":
        front, _ = _take(map(load, sample.documents), room // 2, tokens, tokens.head)
        room -= room // 2
    back, _ = _take(map(load, reversed(sample.documents)), room, tokens, tokens.tail)
    return front + back[::-1], True


def _take(
    documents: Iterable[Document],
    room: int,
    tokens: TokenCounter,
    cut: Callable[[str, int], str],
) -> tuple[list[Document], bool]:
    """Documents in order until ``room`` is full, the last one cut; whether any text is missing."""
    taken: list[Document] = []
    for number, document in enumerate(documents, 1):
        block = _shown(document, document.text, number)
        cost = tokens(block)
        if cost <= room:
            taken.append(document)
            room -= cost
            continue
        left = room - (tokens(_shown(document, "x.", number)) - tokens("x."))
        text = cut(document.text, left) if left >= _LEAST_CUT else ""
        if text.strip():
            taken.append(document.model_copy(update={"text": text}))
        return taken, True
    return taken, False


def _shown(document: Document, text: str, number: int) -> str:
    [block] = prompts.document_blocks([(document.title, text, None)], first=number)
    return block + prompts.DOCUMENT_GAP
