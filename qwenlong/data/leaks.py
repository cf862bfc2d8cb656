"""Does a text give an answer away, and do two questions ask the same? One rule for all filters."""

from __future__ import annotations

import re
import unicodedata

from qwenlong.types import Sample

_THOUSANDS = re.compile(r"(?<=\d)[,\u00a0\u202f'](?=\d{3}(?!\d))")
_SPACE = re.compile(r"\s+")
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
_CJK = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")
_ENTITY = re.compile(
    r"`([^`\n]+)`|\"([^\"\n]+)\"|“([^”\n]+)”"  # quoted
    # Names. Letters beyond ASCII count as capitals: `re` cannot tell.
    r"|\b((?:[A-Z]|[^\W\d_a-z])[\w'’-]*"
    r"(?:\s+(?:(?:of|the|and|de|du)\s+)?(?:[A-Z]|[^\W\d_a-z])[\w'’-]*)*)"
    r"|\b(\d[\d.,]*\d|\d)\b"
)
_NAME = 3  # the group of names in _ENTITY
_NAME_WORD = re.compile(r"[A-Z]+(?![a-z])\d*|[^\W_A-Z]+|[A-Z][^\W_A-Z]*")  # HTTPServer: two words
_TEXT_WORD = re.compile(r"[^\W_]+")
OPENERS = frozenset(
    "a according after among an and answer as at before both by compared consider did do "
    "does during find for from give given had has have how i if in is it list name of on please "
    "suppose tell the this to under was were what when where which who whom whose why with".split()
)
# Answers that every text contains by chance: their presence says nothing.
_GENERIC = frozenset("yes no true false none null both neither".split())


def normalise(text: str) -> str:
    """Case, width, spacing and thousands separators removed: what two spellings of a fact share."""
    text = unicodedata.normalize("NFKC", text).casefold()
    return _SPACE.sub(" ", _THOUSANDS.sub("", text)).strip()


def entity_terms(question: str) -> list[str]:
    """Quoted terms, names and numbers of a question, normalised, in order, each once.

    A capital letter makes a name, except of the words that begin questions.
    """
    found: dict[str, None] = {}
    for groups in _ENTITY.findall(question):
        words = normalise("".join(groups)).split()
        while groups[_NAME] and words and words[0] in OPENERS:
            del words[0]
        if words:
            found[" ".join(words)] = None
    return list(found)


def asks_the_same(a: list[str], b: list[str]) -> bool:
    """False where each of two alike questions has a word of content that the other lacks.

    Questions of one template about other things differ like that; a reworded one does not. An
    ending ("guard", "guards") makes no other word.

    Args:
        a, b: words of the two questions, normalised.
    """

    def lacks(words: list[str], other: list[str]) -> bool:
        known = set(other)
        return any(
            word not in OPENERS and not any(_is_inflected(word, o) for o in known)
            for word in set(words) - known
        )

    return not (lacks(a, b) and lacks(b, a))


def _is_inflected(a: str, b: str) -> bool:
    shorter, longer = sorted((a, b), key=len)
    return longer.startswith(shorter) and longer[len(shorter) :] in ("s", "es", "d", "ed", "ing")


def tells_name(text: str, name: str) -> bool:
    """Whether every word of an identifier stands in ``text``, so that the name can be guessed.

    Of a dotted name the last part counts. ``follow_symlinks`` has the words follow and symlinks;
    an ending makes no other word.
    """
    words = [w.casefold() for w in _NAME_WORD.findall(name.rpartition(".")[2])]
    told = set(_TEXT_WORD.findall(normalise(text)))
    return bool(words) and all(
        any(word == other or _is_inflected(word, other) for other in told) for word in words
    )


def answer_texts(sample: Sample) -> list[str]:
    """The answers as a reader would write them: for a choice the option's text, not its letter."""
    if sample.answer_type != "choice":
        return list(sample.answers)
    texts = []
    for answer in sample.answers:
        index = ord(answer.strip().upper()) - ord("A") if len(answer.strip()) == 1 else -1
        texts.append(sample.choices[index] if 0 <= index < len(sample.choices) else answer)
    return texts


class AnswerFinder:
    """Finds the answers of one sample in texts.

    A text answer counts where it stands as whole words. A number counts where it stands as a whole
    number, if three of its digits are significant; a shorter one is everywhere, so it counts only
    next to the sample's unit, or in a text that also names every entity of the question. Answers
    like "yes" are never found.
    """

    def __init__(self, sample: Sample):
        self._patterns: list[tuple[str, re.Pattern[str]]] = []
        self._with_entities: list[tuple[str, re.Pattern[str]]] = []
        self._entities = entity_terms(sample.question)
        unit = normalise(sample.unit or "")
        for answer in map(normalise, answer_texts(sample)):
            if not answer or answer in _GENERIC:
                continue
            match = _NUMBER.search(answer)
            if match and (sample.answer_type == "number" or match.group() == answer):
                self._add_number(match.group(), unit)
            elif _CJK.search(answer):
                self._patterns.append((answer, re.compile(re.escape(answer))))
            else:
                self._patterns.append((answer, re.compile(rf"(?<!\w){re.escape(answer)}(?!\w)")))

    def _add_number(self, number: str, unit: str) -> None:
        number = number.lstrip("-")
        whole, _, fraction = number.partition(".")
        fraction = fraction.rstrip("0")
        core = f"{whole}.{fraction}" if fraction else whole
        tail = "0*" if fraction else r"(?:\.0+)?"
        pattern = rf"(?<![\d.]){re.escape(core)}{tail}(?!\d|\.\d)"
        if len((whole + fraction).strip("0")) >= 3 or len(whole) >= 4:
            self._patterns.append((core, re.compile(pattern)))
        else:
            if unit:
                with_unit = re.compile(rf"{pattern} ?{re.escape(unit)}(?!\w)")
                self._patterns.append((core, with_unit))
            if self._entities:
                self._with_entities.append((core, re.compile(pattern)))

    def is_in(self, text: str) -> bool:
        """True where ``text`` states an answer. ``text`` must be normalised."""
        if any(core in text and pattern.search(text) for core, pattern in self._patterns):
            return True
        if not self._with_entities or not all(entity in text for entity in self._entities):
            return False
        return any(core in text and pattern.search(text) for core, pattern in self._with_entities)
