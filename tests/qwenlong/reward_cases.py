"""Hand-written cases for the scorers, with the reason for each.

``published`` is what the published grader gives (SQuAD's normalisation and F1, QwenLong-L1's rules,
DocMath's comparison, LongBench v2's letter patterns, OpenAI's MRCR grader), ``None`` where none
covers the case. Where ours differs, the reason says why.
"""

from __future__ import annotations

from typing import Any, NamedTuple

SAID = "Therefore, the answer is ({}).".format
FOUR = ("Paris", "Lyon", "Nice", "A town")
PREFIX = "qK7xYw2Tfa"


class Case(NamedTuple):
    reward: str
    golds: tuple[str, ...]
    response: str
    expected: float
    published: float | None
    why: str
    fields: dict[str, Any] = {}  # noqa: RUF012  (a constant: nothing writes to it)


def _text(reward, gold, response, expected, published, why, **fields):
    golds = (gold,) if isinstance(gold, str) else gold
    return Case(reward, golds, response, expected, published, why, fields)


def _choice(gold, response, expected, published, why, choices=FOUR):
    fields = {"choices": list(choices), "answer_type": "choice"}
    return Case("multiple_choice", (gold,), response, expected, published, why, fields)


def _number(gold, response, expected, published, why, *, reward="numeric", **fields):
    return Case(reward, (gold,), response, expected, published, why, fields)


TEXT = [
    _text("exact_match", "Paris", SAID("Paris"), 1, 1, "the sentence that the prompt asks for"),
    _text("exact_match", "The Beatles", SAID("beatles!"), 1, 1, "case, article, punctuation"),
    _text("exact_match", "Paris", SAID("Paris, France"), 0, 0, "more words are not equal"),
    _text("exact_match", "well-known", SAID("wellknown"), 1, 1, "punctuation is deleted"),
    _text("exact_match", "well-known", SAID("well known"), 0, 0, "deleted, not a space"),
    _text("exact_match", "it’s", SAID("it's"), 1, 0, "ours: Unicode quotes are punctuation too"),
    _text("exact_match", "ＡＢＣ", SAID("abc"), 1, 0, "ours: NFKC, full-width letters"),
    _text("exact_match", "Straße", SAID("STRASSE"), 1, 0, "ours: case folding, not lower case"),
    _text("exact_match", ("UK", "United Kingdom"), SAID("the UK"), 1, 1, "best of several golds"),
    _text("exact_match", "the", SAID("the"), 0, 0, "empty normal form: matches nothing"),
    _text("exact_match", "Paris", "Paris", 1, None, "no sentence: the whole short reply"),
    _text("sub_em", "Paris", SAID("Paris, France"), 1, 1, "gold in prediction"),
    _text("sub_em", "Paris, France", SAID("Paris"), 0, 0, "strict: not prediction in gold"),
    _text("sub_em_loose", "Paris, France", SAID("Paris"), 1, 1, "loose: either direction"),
    _text("sub_em", "art", SAID("party"), 1, 1, "a substring, not a word"),
    _text("cover", "art", SAID("party"), 0, None, "cover match: whole words (as DPR has it)"),
    _text("cover", "New York", SAID("in New York City"), 1, None, "whole words in a row"),
    _text("cover", "New York", SAID("York, New"), 0, None, "order counts"),
    _text("sub_em", "35", SAID("3.5"), 1, 1, "deleted points join digits: use 'numeric'"),
    _text("sub_em", "", SAID("anything"), 0, 0, "empty gold"),
    _text("sub_em_loose", "Paris", SAID("?!"), 0, 0, "empty prediction"),
    _text("sub_em", "Paris", "<think>Paris?</think>" + SAID("Lyon"), 0, 0, "thinking is cut"),
    _text("sub_em", "Paris", "a</think>b</think>" + SAID("Paris"), 1, 1, "at the last mark"),
    _text("sub_em", "Paris", "<think>the answer is Paris", 0, 0, "thinking that never ended"),
    _text("sub_em", "Paris", SAID("Paris"), 1, 0, "no mark: L1 gives 0; require_think_end does"),
    _text("sub_em", "b", SAID("a") + "\n" + SAID("b"), 1, None, "the last statement counts"),
    _text("sub_em", "a", SAID("a") + "\n" + SAID("b"), 0, None, "and only the last"),
    _text("sub_em", "Oslo", "The answer is:\n\n**Oslo**", 1, None, "answer on the next line"),
    _text("sub_em", "x y", r"so \boxed{\text{x y}}", 1, None, "a box, LaTeX text command"),
    _text("sub_em", "f(x)", SAID("f(x)"), 1, None, "brackets inside the brackets"),
    _text("token_f1", "the cat sat", SAID("cat sat down"), 0.8, 0.8, "2 shared of 2 and 3"),
    _text("token_f1", "a x y", SAID("x x"), 0.5, 0.5, "no articles; 1 shared of 2 and 2"),
    _text("token_f1", "x", SAID("y"), 0, 0, "nothing shared"),
]

CHOICE = [
    _choice("B", "The correct answer is (B)", 1, 1, "the format that LongBench v2 asks for"),
    _choice("B", "**The correct answer is (B)**.", 1, 1, "emphasis is removed"),
    _choice("B", "The correct answer is B", 1, 1, "second pattern: no brackets"),
    _choice("B", "The correct answer is B which is Lyon", 1, 1, "words after the letter"),
    _choice("B", "The correct answer is (C)", 0, 0, "wrong letter"),
    _choice("A", "The correct answer is A town", 0, 1, "ours: full text of D, not the letter A"),
    _choice("D", "The correct answer is A town", 1, 0, "ours: full text of an option"),
    _choice("B", "The correct answer is (B) or (C)", 0, 1, "ours: a choice between is none"),
    _choice(
        "C",
        "The correct answer is (B). Wait. The correct answer is (C).",
        1,
        0,
        "ours: the last statement counts, the published patterns take the first",
    ),
    _choice("B", "B", 1, 0, "ours: a bare letter"),
    _choice("B", "(b)", 1, 0, "ours: lower case in brackets"),
    _choice("B", r"\boxed{B}", 1, 0, "ours: a box"),
    _choice("B", "The answer is Lyon.", 1, 0, "ours: full text of an option"),
    _choice("B", "Answer: B) Lyon", 1, 0, "ours: 'Answer:' and a letter with a bracket"),
    _choice("Lyon", "The correct answer is (B)", 1, None, "gold given as the option's text"),
    _choice("(b)", "The correct answer is (B)", 1, None, "gold letter in brackets"),
    _choice("A", "The answer is a matter of taste", 0, 0, "an article is no letter"),
    _choice("A", "The correct answer is (E)", 0, 0, "a letter beyond the options"),
    _choice("C", "I cannot tell from the text.", 0, 0, "no answer"),
    _choice("A", "B</think>The correct answer is (A)", 1, 1, "after the thinking"),
]

NUMBER = [
    _number("1234.5", SAID("$1,234.50"), 1, 1, "currency, separators, trailing zero"),
    _number("1234567", SAID("12,34,567"), 1, 1, "Indian grouping"),
    _number("1234.5", SAID("1.234,5"), 1, 0, "ours: European form, unambiguous"),
    _number("3.14", SAID("3,14"), 0, 0, "decimal comma or a list: no single reading"),
    _number("1000", SAID("1001.5"), 1, 1, "0.15 % away: the bound is included"),
    _number("1000", SAID("1001.6"), 0, 0, "0.16 % away"),
    _number("1000", SAID("1001"), 0, None, "tolerance 0 is exact", tolerance=0.0),
    _number("0.1", SAID("0.3 - 0.2"), 1, None, "exact, not binary, arithmetic", tolerance=0.0),
    _number("-5", SAID("−5"), 1, None, "Unicode minus"),
    _number("5", SAID("-5"), 0, 1, "ours: the sign counts, DocMath ignores it"),
    _number("0.125", SAID("12.5%"), 1, 1, "percent is a hundredth"),
    _number("12.5", SAID("12.5%"), 1, 1, "a percent sign that the gold lacks"),
    _number("12.5", SAID("12.5"), 1, 1, "the gold's unit may be left out", unit="%"),
    _number("12.5", SAID("0.125"), 1, 1, "or be converted", unit="%"),
    _number("0.125", SAID("12.5"), 0, 1, "ours: a factor of 100 with no sign is wrong"),
    _number("3", SAID("$3 million"), 1, 1, "scale word in the unit", unit="million USD"),
    _number("3", SAID("3,000,000"), 1, 1, "written out", unit="million USD"),
    _number("3", SAID("0.003 billion"), 1, 1, "another scale word", unit="million USD"),
    _number("3", SAID("3 billion"), 0, 1, "ours: scale words count", unit="million USD"),
    _number("1200000", SAID("1.2e6"), 1, 1, "scientific notation"),
    _number("5000", SAID(r"$5 \times 10^{3}$"), 1, None, "LaTeX power of ten"),
    _number("0.5", SAID(r"\frac{1}{2}"), 1, None, "LaTeX fraction"),
    _number("2.5", SAID("2 1/2"), 1, None, "mixed number"),
    _number("7", SAID("3 + 4"), 1, 1, "an expression is worked out"),
    _number("7", SAID("3 + 4 = 7"), 1, 1, "what follows the equals sign"),
    _number("42", SAID("approximately 42 km in 2021"), 1, 1, "hedge, unit and year"),
    _number("5", SAID("5 or 6"), 0, None, "two candidates are no answer"),
    _number("5", SAID("at least 5"), 0, None, "a bound is no value"),
    _number("2019", SAID("2019-2020"), 0, None, "a range is no difference"),
    _number("5", "The total comes to 5.", 1, None, "no sentence: the last line"),
    _number("none", SAID("None"), 1, None, "a gold that is no number: exact match"),
    _number("1", SAID("nan"), 0, 0, "not a number"),
    _number("1", SAID("inf"), 0, 0, "not a number"),
    _number("10", SAID("1000"), 1, 1, "DocMath: any power of ten", reward="docmath"),
    _number("0.125", SAID("12.5"), 1, 1, "DocMath: a factor of 100", reward="docmath"),
    _number("1234", SAID("12.35"), 1, 1, "DocMath: 100 and 0.15 % together", reward="docmath"),
    _number("5", SAID("-5"), 1, 1, "DocMath: equal sizes, sign ignored", reward="docmath"),
    _number("5", SAID("-5.005"), 0, 0, "DocMath: the last step has a sign", reward="docmath"),
    _number("0.0012", SAID("0.0019"), 1, 1, "DocMath: rounded up to 0.002", reward="docmath"),
    _number("7", SAID("7 million"), 1, 1, "DocMath: scale words dropped", reward="docmath"),
    _number("100", SAID("150"), 0, 0, "DocMath has limits", reward="docmath"),
]

_MRCR = {"answer_prefix": PREFIX}
DENSE = [
    _text("mrcr", PREFIX + "ab", PREFIX + "ab", 1, 1, "prefix and text", **_MRCR),
    _text("mrcr", PREFIX + "ab", "ab", 0, 0, "no prefix: 0, however good", **_MRCR),
    _text("mrcr", PREFIX + "ab", " " + PREFIX + "ab", 0, 0, "a space comes first", **_MRCR),
    _text("mrcr", PREFIX + "abcd", PREFIX + "abcx", 0.75, 0.75, "2 * 3 / 8", **_MRCR),
    _text("mrcr", "abcd", PREFIX + "abcx", 0.75, 0.75, "gold without prefix", **_MRCR),
    _text("mrcr", PREFIX + "a", "x</think>\n" + PREFIX + "a", 1, None, "after thinking", **_MRCR),
    _text("needle", "12345", SAID("12345"), 1, None, "dense: equal"),
    _text("needle", "12345", SAID("12346"), 0.8, None, "dense: 2 * 4 / 10"),
    _text("needle", ("7", "12345"), SAID("12346"), 0.8, None, "dense: best gold"),
    _text("needle", "12345", SAID("x"), 0, None, "dense: nothing in common"),
    _text("needle_recall", ("17", "23"), SAID("17, 99"), 0.5, 0.5, "one of two needles"),
    _text("needle_recall", ("17", "23"), SAID("117, 23"), 0.5, 1, "ours: whole words"),
    _text("needle_recall", ("17", "17"), SAID("17"), 1, 1, "a needle counts once"),
    _text("needle_recall", ("ABCDE", "FGHIJ"), SAID("fghij, abcde"), 1, 1, "any order and case"),
    _text("needle_recall", ("17",), SAID("17, 18, 19"), 1, 1, "recall alone: more is not punished"),
    _text("needle_recall", ("8092885",), SAID("8,092,885"), 1, 0, "ours: separators are no text"),
    _text("needle_recall", ("17", "23"), "17\n" + "x " * 600 + "23", 0.5, 1, "ours: the end alone"),
    _text("needle_recall", ("17",), "<think>17</think>" + SAID("18"), 0, None, "thinking is cut"),
    _text("mrcr", PREFIX + "ab", PREFIX + "\nab", 0.8, 0.8, "2 * 2 / 5: line ends count", **_MRCR),
    _text("mrcr", PREFIX + "ab", PREFIX.lower() + "ab", 0, 0, "the case of the prefix", **_MRCR),
    _text("mrcr", PREFIX + "ab", PREFIX, 0, 0, "the prefix alone", **_MRCR),
    _text("cover", '["Bolt"]', 'The answer is: ["Bolt"]', 1, None, "a list in CorpusQA's form"),
    _text("cover", "45 minutes", SAID("about 45 minutes"), 1, None, "more words around the gold"),
]

CASES = TEXT + CHOICE + NUMBER + DENSE


def as_markdown() -> str:
    """The table of ``docs/rewards.md``."""

    def cell(text: str) -> str:
        return "`` " + text.replace("\n", "⏎").replace("|", "¦") + " ``"

    def number(value: float | None) -> str:
        return "" if value is None else f"{value:g}"

    lines = [
        "| reward | gold | response | ours | published | reason |",
        "|---|---|---|---|---|---|",
    ]
    for case in CASES:
        golds = ", ".join(cell(gold) for gold in case.golds)
        shown = {k: v for k, v in case.fields.items() if k in ("unit", "tolerance")}
        extra = "".join(f", {name} {value}" for name, value in shown.items())
        lines.append(
            f"| {case.reward} | {golds}{extra} | {cell(case.response)} | {number(case.expected)} "
            f"| {number(case.published)} | {case.why} |"
        )
    return "\n".join(lines)
