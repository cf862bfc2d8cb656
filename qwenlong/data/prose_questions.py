"""Rules that ask about one prose document: next sentences, defined terms, numbers in a blank."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterator

from qwenlong.data.documents import SourceDocument, split_sentences
from qwenlong.data.leaks import tells_name
from qwenlong.data.python_facts import Span
from qwenlong.data.samples import Item, contains_term

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
        is_told = contains_term(sentence, name.rpartition(".")[2]) or tells_name(sentence, name)
        if is_clear and not is_told:
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


CHOICE_RULES = (_choice_next, _entry_items)
READING_RULES = (_entry_items, _reading_blank)
