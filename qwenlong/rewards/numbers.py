"""Numbers in answers: exact arithmetic, no ``eval``, bounded work on any input.

``parse_number`` reads one number: sign, thousands separators, decimals, scientific notation,
fractions, simple expressions, LaTeX, currency, scale words, percent, units. It refuses what has no
single reading ("3,14", "5 or 6", "between 3 and 5"): a judge may then look at it.
``numbers_match`` compares by relative tolerance; ``docmath_match`` does what DocMath's grader does.
"""

from __future__ import annotations

import ast
import math
import operator
import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction

MAX_CHARS = 200  # of a text that is searched for a number
MAX_BITS = 4_000  # of a numerator or denominator: about 1,200 digits
MAX_EXPONENT = 400  # of ten: an answer beyond 1e400 is none
DEFAULT_TOLERANCE = Fraction(15, 10_000)  # 0.15 % of the gold, as in DocMath

_PERCENT = Fraction(1, 100)
_SCALE_WORDS = (  # longer phrases before their own beginnings
    (r"percentage points?\b|percent\b|per cent\b|percentage\b|pct\b|%", _PERCENT),
    (r"basis points?\b|bps\b", Fraction(1, 10_000)),
    (r"‰", Fraction(1, 1_000)),
    (r"hundreds?\b", Fraction(100)),
    (r"thousands?\b", Fraction(10**3)),
    (r"millions?\b|mn\b|mio\b", Fraction(10**6)),
    (r"billions?\b|bn\b", Fraction(10**9)),
    (r"trillions?\b|tn\b", Fraction(10**12)),
)
# Only when written against the digits. A small m is a metre unless a currency is named.
_SCALE_LETTERS = {"k": 10**3, "K": 10**3, "M": 10**6, "m": 10**6, "B": 10**9}

_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-")
_SUPERSCRIPT_RUN = re.compile("[⁺⁻]?[⁰¹²³⁴⁵⁶⁷⁸⁹]+")
_VULGAR_FRACTION = re.compile("[¼-¾⅐-⅞]")
_THOUSANDS_MARK = re.compile("(?<=\\d)(?:['’_\u00a0\u2009\u202f]|\\{,\\})(?=\\d{3}(?!\\d))")
_OPERATORS = str.maketrans({"−": "-", "–": "-", "—": "-", "×": "*", "·": "*", "÷": "/", "⁄": "/"})
_LATEX = (
    (re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}"), r"((\1)/(\2))"),
    (re.compile(r"\\(?:text|mathrm|mathbf)\s*\{([^{}]*)\}"), r" \1 "),
    (re.compile(r"\\(?:times|cdot)\b"), "*"),
    (re.compile(r"\\(?:approx|simeq)\b"), "="),
    (re.compile(r"\\(?:left|right)\b|\\[,;!: ()\[\]]"), ""),
    (re.compile(r"\\([$%#&])"), r"\1"),
    (re.compile(r"\^\s*\{([^{}]*)\}"), r"**(\1)"),
    (re.compile(r"\^"), "**"),
    (re.compile(r"(?<=\d)\s*[xX]\s*(?=10\s*\*\*)"), "*"),
)
_CURRENCY = re.compile(
    r"(?:\bUS|\bU\.S\.|\b[CAHN][A-Z]?|\bR)?[$€£¥₹₩₽]"
    r"|\b(?:USD|EUR|GBP|RMB|CNY|JPY|CHF|INR)\b\s*|\b(?:US )?dollars?\b|\beuros?\b",
    re.IGNORECASE,
)
_DIGITS = r"(?:\d+(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d+)?"
_TOKEN = re.compile(_DIGITS)
_START = re.compile(r"(?<![\w.*/])[-+(\s]*(?=\.?\d)")
_EXPRESSION = re.compile(rf"[-+(\s]*{_DIGITS}(?:[\s()+\-*/]*{_DIGITS})*[\s)]*")
_MIXED = re.compile(r"([-+]?)\s*(\d+)\s+(\d+)\s*/\s*(\d+)\s*")
_NO_SINGLE_VALUE = re.compile(
    r"\b(?:not|between|either|neither|less|more|fewer|over|under|least|most|up to|below|above)\b"
    r"|[<>≤≥]",
    re.IGNORECASE,
)
# What may stand before a further number that does not compete with the first: "12 km in 2021".
_CONTEXT = re.compile(
    r"(?:\b(?:in|of|for|during|since|by|from|at|per|on|than|year|fiscal|fy)\s*(?:[A-Z][a-z]+\s*)?"
    r"|[A-Za-z]|\*\*|(?<!\w)\()$"
)
_BINARY = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


@dataclass(frozen=True)
class Number:
    """``value`` as written, before its scale word; ``value * scale`` is what it means."""

    value: Fraction
    scale: Fraction = Fraction(1)

    @property
    def total(self) -> Fraction:
        return self.value * self.scale


def parse_number(text: str, *, unit: str = "") -> Number | None:
    """The one number that ``text`` gives, or None.

    After an equals sign only the last part counts. A scale word after the number (million, bn, %,
    basis points; k, M, B against the digits) becomes ``scale``, unless it is ``unit`` itself. Other
    words before and after are ignored, except those that make the number one of several or a bound
    ("5 or 6", "5 to 6", "at least 5", "6 feet 2").
    """
    is_cut = len(text) > MAX_CHARS
    text = _plain_text(text[:MAX_CHARS])
    if text is None:
        return None
    text = re.split("[=≈]", text)[-1]
    without_currency = _CURRENCY.sub("", text)
    has_currency, text = without_currency != text, without_currency
    start = _START.search(text)
    if start is None or _NO_SINGLE_VALUE.search(text[: start.start()]):
        return None
    match = _EXPRESSION.match(text, start.start())
    if match is None or (is_cut and not text[match.end() :].strip(" ()+-*/.,")):
        return None
    expression = match.group()
    while expression.count("(") > expression.count(")") and expression.lstrip().startswith("("):
        expression = expression.lstrip()[1:]  # "(5 million)": the bracket closes after the scale
    value = _evaluate(expression.strip())
    if value is None:
        return None
    rest = text[match.end() :]
    is_touching = not expression[-1:].isspace()
    letter = re.match(r"[kKMmB]\b", rest) if is_touching else None
    if letter and letter.group() != unit and (letter.group() != "m" or has_currency):
        scale, rest = Fraction(_SCALE_LETTERS[letter.group()]), rest[1:]
    else:
        scale, rest = _take_scale(rest)
    return Number(value, scale) if _is_context(rest) else None


def _plain_text(text: str) -> str | None:
    """ASCII digits and operators: separators, LaTeX and Unicode forms resolved; None if unclear."""
    text = _SUPERSCRIPT_RUN.sub(lambda m: "**" + m.group().translate(_SUPERSCRIPTS), text)
    text = _VULGAR_FRACTION.sub(lambda m: " " + unicodedata.normalize("NFKC", m.group()), text)
    text = _THOUSANDS_MARK.sub("", text)
    text = unicodedata.normalize("NFKC", text)
    text = "".join(str(unicodedata.decimal(c)) if c.isdecimal() else c for c in text)
    text = text.translate(_OPERATORS)
    for pattern, plain in _LATEX:
        text = pattern.sub(plain, text)
    for run in re.findall(r"\d[\d.,]*,[\d.,]*\d", text):
        if re.fullmatch(r"\d{1,3}(?:,\d{2,3})*,\d{3}(?:\.\d+)?", run):  # 1,234,567 or 12,34,567
            plain = run.replace(",", "")
        elif re.fullmatch(r"\d{1,3}(?:\.\d{3})+,\d+", run):  # 1.234,5
            plain = run.replace(".", "").replace(",", ".")
        else:
            return None  # "3,14" may be a decimal or a list
        text = text.replace(run, plain, 1)
    return text


def _evaluate(expression: str) -> Fraction | None:
    """Value of an expression of numbers, ``+ - * / **`` and brackets; None if it has none."""
    mixed = _MIXED.fullmatch(expression)
    if mixed:
        sign, whole, numerator, denominator = mixed.groups()
        expression = f"{sign}({whole}+{numerator}/{denominator})"
    elif re.search(r"\d-\.?\d", expression):
        return None  # 2019-2020 is a range
    elif re.search(r"\d\s*/\s*\d+\s*/\s*\d", expression):
        return None  # 12/05/2021 is a date
    values: dict[str, Fraction] = {}

    def name(match: re.Match[str]) -> str:
        exponent = re.search(r"[eE]([+-]?\d+)$", match.group())
        if exponent and (len(exponent.group(1)) > 5 or abs(int(exponent.group(1))) > MAX_EXPONENT):
            raise OverflowError
        values[f"n{len(values)}"] = Fraction(match.group())
        return f" n{len(values) - 1} "

    try:
        # Numbers become names, so that Python's parser sees operators only and rounds nothing.
        tree = ast.parse(_TOKEN.sub(name, expression).strip(), mode="eval")
        return _value(tree.body, values)
    except (SyntaxError, ValueError, ArithmeticError, MemoryError, RecursionError):
        return None


def _value(node: ast.expr, values: dict[str, Fraction]) -> Fraction:
    if isinstance(node, ast.Name):
        result = values[node.id]
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
        operand = _value(node.operand, values)
        result = -operand if isinstance(node.op, ast.USub) else operand
    elif isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        result = _BINARY[type(node.op)](_value(node.left, values), _value(node.right, values))
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
        base, exponent = _value(node.left, values), _value(node.right, values)
        if exponent.denominator != 1 or abs(exponent) * _bits(base) > MAX_BITS:
            raise OverflowError
        result = Fraction(base ** int(exponent))
    else:
        raise ValueError
    if _bits(result) > MAX_BITS:
        raise OverflowError
    return result


def _bits(value: Fraction) -> int:
    return max(value.numerator.bit_length(), value.denominator.bit_length())


def _take_scale(text: str) -> tuple[Fraction, str]:
    """Product of the scale words that ``text`` starts with, and what follows them."""
    scale, text = Fraction(1), text.lstrip()
    while True:
        for pattern, factor in _SCALE_WORDS:
            match = re.match(pattern, text, re.IGNORECASE)
            if match:
                scale, text = scale * factor, text[match.end() :].lstrip()
                break
        else:
            return scale, text


def _is_context(rest: str) -> bool:
    """Whether ``rest`` leaves the number before it the only one: words, or "in 2021"."""
    rest = re.split(r"[.;!?](?:\s|$)", rest, maxsplit=1)[0]
    # A "5-year average of 3" is not 5, and neither is "5 or more".
    if re.match(r"-[A-Za-z]|\W*(?:or|to|and)\b", rest, re.IGNORECASE):
        return False
    digit = re.search(r"\d", rest)
    return digit is None or bool(_CONTEXT.search(rest[: digit.start()]))


def parse_gold(gold: str, unit: str | None) -> Number | None:
    """A gold number and the scale in its ``unit``: "12.5" with "%", "3" with "million USD"."""
    number = parse_number(gold, unit=unit or "")
    if number is None or number.scale != 1 or not unit:
        return number
    unit = re.sub(r"^[\s(]*(?:in\s+)?", "", _CURRENCY.sub("", unit))  # "(in millions)"
    return Number(number.value, _take_scale(unit)[0])


def is_close(value: Fraction, gold: Fraction, tolerance: Fraction) -> bool:
    """Within ``tolerance * |gold|``, bounds included."""
    return abs(value - gold) <= tolerance * abs(gold)


def numbers_match(
    prediction: Number, gold: Number, tolerance: Fraction | float = DEFAULT_TOLERANCE
) -> bool:
    """Same value within the relative ``tolerance``; the sign and scale words count.

    A prediction without a scale word may be in the gold's unit ("12.5" for 12.5 %, "3" for 3
    million); with a percent sign it may repeat a gold that was written without one.
    """
    tolerance = Fraction(tolerance)
    if is_close(prediction.total, gold.total, tolerance):
        return True
    is_bare = prediction.scale == 1 or (prediction.scale == _PERCENT and gold.scale == 1)
    return is_bare and is_close(prediction.value, gold.value, tolerance)


def docmath_match(prediction: Number, gold: Number) -> bool:
    """DocMath's comparison, with or without the scale words: far more lenient than it looks.

    Equal in size (the sign is ignored) up to a power of ten; or within 0.15 % of the gold after a
    factor of 100, 1,000 or 100,000 (sign ignored); or equal after rounding sizes up to three
    decimals; or within 0.15 % of the gold.
    """
    return any(
        _docmath_values_match(p, g)
        for p in {prediction.value, prediction.total}
        for g in {gold.value, gold.total}
    )


def _docmath_values_match(value: Fraction, gold: Fraction) -> bool:
    large, small = max(abs(value), abs(gold)), min(abs(value), abs(gold))
    if small and _is_power_of_ten(large / small):
        return True
    for factor in (100, 1_000, 100_000):
        if small <= large / (factor // 2) and is_close(small * factor, large, DEFAULT_TOLERANCE):
            return True
    if math.ceil(large * 1_000) == math.ceil(small * 1_000):
        return True
    return is_close(value, gold, DEFAULT_TOLERANCE)


def _is_power_of_ten(ratio: Fraction) -> bool:
    digits = str(ratio.numerator)
    return ratio.denominator == 1 and digits == "1" + "0" * (len(digits) - 1)
