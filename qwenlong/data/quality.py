"""Rules that decide whether a document enters the corpus. Each gives a verdict with its measure."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from qwenlong.data.documents import SourceDocument
from qwenlong.data.recipe import QualityConfig

# Frequent short words that few other languages of the list share.
_STOP_WORDS = {
    "en": "the of and to in is that for it with as was on are be this by from or not which have",
    "de": "der die und das ist nicht ein eine von mit den dem sich auf für als auch werden wird",
    "fr": "le la les des est une dans pour qui que pas sur avec sont plus par ce cette aux du",
    "es": "el los las del una por con para que se es como más pero sus al fue son este está",
    "it": "il di che gli della per una con non sono alla dei nel più anche delle questo come",
    "pt": "o os das uma para com não que se por mais dos como ao na foi são pela ele",
    "nl": "de het een van en niet zijn op voor met dat te wordt aan ook bij naar door",
}
_STOP_SETS = {language: frozenset(words.split()) for language, words in _STOP_WORDS.items()}
_SCRIPTS = (
    ("ja", re.compile(r"[\u3040-\u30ff]")),  # before zh: Japanese text holds Han characters too
    ("ko", re.compile(r"[\uac00-\ud7af]")),
    ("zh", re.compile(r"[\u4e00-\u9fff]")),
    ("ru", re.compile(r"[\u0400-\u04ff]")),
    ("ar", re.compile(r"[\u0600-\u06ff]")),
    ("el", re.compile(r"[\u0370-\u03ff]")),
    ("he", re.compile(r"[\u0590-\u05ff]")),
    ("hi", re.compile(r"[\u0900-\u097f]")),
    ("th", re.compile(r"[\u0e00-\u0e7f]")),
)
_LETTER = re.compile(r"[^\W\d_]")
_OTHER = re.compile(r"(?:[^\w\s]|_)+")
_BAD = re.compile("[\ufffd\x00-\x08\x0b\x0e-\x1a\x1c-\x1f\x7f]")
_LATIN_WORD = re.compile(r"[a-zà-ÿ]+")


def detect_language(text: str) -> str:
    """Language code by script and frequent words, ``"und"`` where neither decides.

    Reads the first 20,000 characters.
    """
    sample = text[:20_000].lower()
    letters = len(_LETTER.findall(sample))
    for language, pattern in _SCRIPTS:
        share = 0.1 if language == "ja" else 0.4
        if letters and len(pattern.findall(sample)) >= share * letters:
            return language
    words = Counter(_LATIN_WORD.findall(sample))
    total = sum(words.values())
    hits = {
        language: sum(words[word] for word in stop_words)
        for language, stop_words in _STOP_SETS.items()
    }
    best = max(hits, key=hits.__getitem__)
    return best if total and hits[best] >= 0.08 * total else "und"


def text_share(text: str) -> float:
    """Share of letters, digits and white space; U+FFFD and control characters weigh double."""
    other = sum(map(len, _OTHER.findall(text)))
    return max(0.0, 1 - (other + len(_BAD.findall(text))) / max(1, len(text)))


def repeated_share(text: str) -> float:
    """Share of characters in lines of at least 10 that stand earlier in the text too."""
    seen: set[str] = set()
    repeated = total = 0
    for line in text.splitlines():
        line = line.strip()
        if len(line) >= 10:
            total += len(line)
            repeated += len(line) if line in seen else 0
            seen.add(line)
    return repeated / total if total else 0.0


def quality_verdicts(
    document: SourceDocument, n_tokens: int, config: QualityConfig
) -> dict[str, dict[str, Any]]:
    """``{filter: {"verdict": "pass" | "fail", measure}}`` for a document of ``n_tokens`` tokens."""
    text = document.text
    share = round(text_share(text), 4)
    repeated = round(repeated_share(text), 4)
    language = detect_language(text) if config.languages else "und"
    # Code and tables have no prose to judge a language by.
    language_ok = (
        not config.languages or document.kind in ("python", "table") or language in config.languages
    )

    def verdict(passed: bool, **measures: Any) -> dict[str, Any]:
        return {"verdict": "pass" if passed else "fail", **measures}

    return {
        "length": verdict(config.min_tokens <= n_tokens <= config.max_tokens, tokens=n_tokens),
        "characters": verdict(share >= config.min_text_share, share=share),
        "repetition": verdict(repeated <= config.max_repeated_share, share=repeated),
        "language": verdict(language_ok, language=language),
    }
