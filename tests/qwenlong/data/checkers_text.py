"""Answers derived again by another path than the one that made them.

Graph questions: the pages are parsed by regular expressions into a SQLite table, and the query of
the sample runs there as SQL. Questions on Python source: a reader over ``tokenize``, not ``ast``.
Dialogues: the transcript is split into sessions and replayed.
"""

import ast
import io
import re
import sqlite3
import tokenize
from dataclasses import dataclass, field

from qwenlong.rewards import grade
from qwenlong.types import Sample


def is_rewarded(sample: Sample) -> bool:
    """Whether the answer, stated as the instructions ask, gets a reward of 1 and another 0."""
    frame = "The correct answer is ({})" if sample.choices else "Therefore, the answer is ({})"
    assert frame.split("(")[0] in sample.instructions
    wrong = "D" if sample.answers[0] != "D" else "A"
    if sample.answer_type == "number":
        wrong = str(float(sample.answers[0]) + 1)
    scores = [grade(sample, frame.format(a)).value for a in (sample.answers[0], wrong)]
    return scores == [1.0, 0.0]


# --- pages of the graph ------------------------------------------------------


def _items(text):
    """The names in ``A, B and C`` or ``A; B; and C``."""
    parts = text.split("; ") if "; " in text else re.split(r", | and ", text)
    return [re.sub(r"^(?:and )?(?:the )?", "", part) for part in parts]


def _all(patterns, text):
    for pattern in patterns:
        yield from re.findall(pattern, text)


_COUNTRY = {
    "region": [r" is a country or territory of (.+?): ", r" belongs to (.+?), and there to "],
    "subregion": [r" country or territory of .+?: (.+?)\. The", r", and there to (.+?)\. The"],
    "capital": [r"The (?:capital of .+?|seat of its government) is (.+?)\. (?:It covers|Its area)"],
    "area": [r"(?:It covers|Its area is) ([\d,.]+) square"],
    "population": [r"The population of .+? is ([\d,]+)\.", r"It has ([\d,]+) inhabitants"],
    "calling_code": [r"numbers of .+? begin with (\+\d+)\."],
    "domain": [r'Its internet domain is "(.+?)"'],
    "alpha2": [r"In ISO 3166 it is (..) with two"],
    "alpha3": [r"letters and (...) with three"],
    "demonym": [r"A person from .+? is described as (.+?)\.(?: Other|\n|\Z)"],
    "only_neighbour": [r"The only land neighbour of .+? is (?:the )?(.+?)\.(?:\s|\Z)"],
}
_COUNTRY_LISTS = {
    "borders": [
        r"shares land borders with (.+?)\.(?:\s|\Z)",
        r"Land neighbours of .+?: (.+?)\.(?:\s|\Z)",
        r"The only land neighbour of .+? is (?:the )?(.+?)\.(?:\s|\Z)",
    ],
    "currency": [r"Currency in use, by ISO code: (.+?)\."],
    "language": [r"Languages of .+?, by ISO 639 code: (.+?)\."],
}
_AIRPORT = {
    "airport_country": [
        r"(?:is an airport|lies) in (?:the )?(.+?)(?:, in the division |\. (?:It|The))"
    ],
    "airport_division": [r", in the division (.+?)\. (?:It serves|The place)"],
    "serves": [r"(?:It serves|The place that it serves is) (.+?)\. Its IATA"],
    "iata": [r"Its IATA code is (\w+);"],
    "icao": [r"its ICAO code is (\w+)\."],
    "elevation": [r"The field lies ([\d.,]+) feet", r"The elevation of .+ is ([\d.,]+) feet"],
    "latitude": [r"Latitude (\S+) and"],
    "longitude": [r"and longitude (\S+), in"],
    "airport_zone": [r"keep the time zone (\S+)\.", r"Its time zone is (\S+)\."],
}
_ZONE = {
    "zone_country": [r"(?:It is listed|lists it) under (?:the )?(.+?)\.(?: |\Z)"],
    "linked_to": [r"keeps the rules of (\S+)\.", r"It is linked to (\S+) and has"],
    "mean_time_until": [r"was given up in (\d+)\.", r"Until (\d+) its clocks"],
    "mean_time": [r"[Ll]ocal mean time, (UTC\S+?)[,.](?:\s|\Z)"],
    "former_offset": [r"Standard time was (UTC\S+) (?:in|from)"],
    "standard_since": [r"Since (\d+) standard"],
    "standard_offset": [
        r"standard time has been (UTC\S+?)\.(?:\s|\Z)",
        r"Standard time is (UTC\S+?)\.(?:\s|\Z)",
    ],
}
_MODULE = {
    "package": [r"It lies in the package (\S+)\."],
    "source_lines": [r"(?:Its source has|Its file counts) ([\d,]+) lines"],
}
_MODULE_LISTS = {
    "imports": [r"(?:When it is loaded, \S+ imports|the module imports) (.+?)\.(?:\n|\Z)"],
    "function": [
        r"Functions defined in \S+: (.+?)\.(?:\n|\Z)",
        r"defines the functions? (.+?)\.(?:\n|\Z)",
    ],
}
_CLASS = {
    "defined_in": [r"is a class of the module (\S+)\.\s", r"\AThe module (\S+) defines \S+\.\s"],
    "only_base": [r"It derives from (\S+) and from no other", r"Its only base is (\S+)\.(?:\s|\Z)"],
    "method_count": [
        r"in its own body, ([\d,]+) in all",
        r"The body of \S+ defines ([\d,]+) method",
    ],
}
_CLASS_LISTS = {
    "derives_from": [
        r"It derives from (\S+) and from no other",
        r"Its only base is (\S+)\.(?:\s|\Z)",
        r"It derives from ((?:\S+, )*\S+ and (?!from no)\S+)\.(?:\s|\Z)",
        r"Bases of \S+: (.+?)\.(?:\s|\Z)",
    ],
    "method": [
        r"in its own body, [\d,]+ in all: (.+?)\.(?:\s|\Z)",
        r"The body of \S+ defines [\d,]+ methods?: (.+?)\.(?:\s|\Z)",
    ],
    "attribute": [r"Names assigned in its body: (.+?)\.(?:\s|\Z)"],
}


def read_page(title, text):
    """Facts ``(subject, relation, object)`` that a page states, by regular expressions."""
    singles, lists = _AIRPORT, {}
    subject = title
    if title.startswith("Time zone "):
        subject, singles = title.removeprefix("Time zone "), _ZONE
    elif title.startswith("Module "):
        subject, singles, lists = title.removeprefix("Module "), _MODULE, _MODULE_LISTS
        for names in re.findall(r"Classes defined in \S+: (.+?)\.(?:\n|\Z)", text):
            for name in _items(names):
                yield name, "defined_in", subject
    elif title.startswith("Class "):
        subject, singles, lists = title.removeprefix("Class "), _CLASS, _CLASS_LISTS
    elif "In ISO 3166 it is" in text:
        singles, lists = _COUNTRY, _COUNTRY_LISTS
    # A quoted docstring is no statement of the page.
    text = re.sub(r' Its documentation begins: "[^"]*"', "", text)
    for relation, patterns in singles.items():
        for value in _all(patterns, text):
            yield subject, relation, value
    for relation, patterns in lists.items():
        for values in _all(patterns, text):
            for value in _items(values):
                yield subject, relation, value


class PageTable:
    """The facts of many pages in SQLite."""

    def __init__(self, pages):
        self.connection = sqlite3.connect(":memory:")
        self.connection.execute("CREATE TABLE fact (s TEXT, r TEXT, o TEXT, UNIQUE (s, r, o))")
        rows = {row for title, text in pages for row in read_page(title, text)}
        self.connection.executemany("INSERT INTO fact VALUES (?, ?, ?)", sorted(rows))
        self.connection.execute("CREATE INDEX by_object ON fact (r, o)")
        self.connection.execute("CREATE INDEX by_subject ON fact (r, s)")
        self.connection.execute("ANALYZE")

    def facts(self):
        return set(self.connection.execute("SELECT s, r, o FROM fact"))

    def rows(self, query):
        """The distinct answers of a sample's query, as SQL."""
        places, conditions, values = {}, [], []
        for i, (s, r, o) in enumerate(query["where"]):
            conditions.append(f"t{i}.r = ?")
            values.append(r)
            for term, column in ((s, f"t{i}.s"), (o, f"t{i}.o")):
                if not term.startswith("?"):
                    conditions.append(f"{column} = ?")
                    values.append(term)
                elif term in places:
                    conditions.append(f"{column} = {places[term]}")
                else:
                    places[term] = column
        for variable, low, high in query["ranges"]:
            number = f"CAST(REPLACE({places[variable]}, ',', '') AS REAL)"
            conditions.append(f"{number} BETWEEN ? AND ?")
            values += [low, high]
        for s, r, o in query["absent"]:
            parts = ["x.r = ?"]
            values.append(r)
            for term, column in ((s, "x.s"), (o, "x.o")):
                parts.append(f"{column} = " + (places[term] if term.startswith("?") else "?"))
                if not term.startswith("?"):
                    values.append(term)
            conditions.append(f"NOT EXISTS (SELECT 1 FROM fact x WHERE {' AND '.join(parts)})")
        tables = ", ".join(f"fact t{i}" for i in range(len(query["where"])))
        select = ", ".join(places[v] for v in query["select"])
        sql = f"SELECT DISTINCT {select} FROM {tables} WHERE {' AND '.join(conditions)}"
        return self.connection.execute(sql, values).fetchall()


def _minutes(offset):
    sign, rest = offset[3], offset[4:].split(":")
    total = int(rest[0]) * 60 + int(rest[1]) + (int(rest[2]) / 60 if len(rest) > 2 else 0)
    return -total if sign == "-" else total


def _figure(text):
    return float(text.replace(",", ""))


def _written(value):
    return str(int(value)) if value == int(value) else repr(round(value, 6))


def compute_answer(compute, row):
    """The answer of a graph question from one row (variable -> text)."""
    op = compute["op"]
    if op == "text":
        return row[compute["of"]]
    if op == "number":
        return _written(_figure(row[compute["of"]]))
    if op == "offset_minutes":
        return _written(_minutes(row[compute["of"]]))
    if op == "offset_seconds":
        return _written(round(_minutes(row[compute["of"]]) * 60))
    if op == "difference":
        first, second = sorted(_figure(row[v]) for v in compute["of"])
        return _written(second - first)
    if op == "sum":
        total = 0.0
        for variable in compute["of"]:
            total += _figure(row[variable])
        return _written(total)
    if op == "value_at_minimum":
        years = sorted((_figure(row[k]), i) for i, k in enumerate(compute["keys"]))
        assert years[0][0] < years[1][0], "the earliest year is shared"
        return compute_answer(compute["then"][years[0][1]], row)
    assert op == "clock", op
    hour, minute = map(int, compute["at"].split(":"))
    utc = hour * 60 + minute - _minutes(row[compute["from"]])
    local = int(utc + _minutes(row[compute["to"]]) + compute["shift"]) % (24 * 60)
    return f"{local // 60:02d}:{local % 60:02d}"


# --- Python source -----------------------------------------------------------


@dataclass
class _Block:
    kind: str  # "class", "def" or "block"
    name: str = ""


@dataclass
class SourceReading:
    """What a pass over the tokens of a source text finds."""

    parameters: dict = field(default_factory=dict)  # qualified name -> [(name, default or None)]
    methods: dict = field(default_factory=dict)  # class -> names, directly in the body
    raises: list = field(default_factory=list)  # (function, exception, message)
    returns: dict = field(default_factory=dict)  # function -> [source of the value]
    docstrings: dict = field(default_factory=dict)  # function -> text
    constants: dict = field(default_factory=dict)  # name -> [source of the value]
    imports: set = field(default_factory=set)


_SKIP = {tokenize.COMMENT, tokenize.NL}


_OPENERS = set("class def if elif else for while try except finally with".split())


def _logical_lines(text):
    """Statements as lists of tokens; a block opener ends at its colon. Also INDENT and DEDENT."""
    line, depth, lambdas = [], 0, 0
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in _SKIP:
            continue
        if token.type in (tokenize.INDENT, tokenize.DEDENT):
            yield token.type, []
            continue
        if token.type in (tokenize.NEWLINE, tokenize.ENDMARKER):
            if line:
                yield tokenize.NEWLINE, line
            line, depth, lambdas = [], 0, 0
            continue
        if token.string == ";" and depth == 0:
            yield tokenize.NEWLINE, line
            line = []
            continue
        line.append(token)
        if token.type == tokenize.OP:
            depth += (token.string in "([{") - (token.string in ")]}")
        lambdas += token.string == "lambda" and depth == 0
        word = line[1].string if line[0].string == "async" and len(line) > 1 else line[0].string
        if word in _OPENERS and token.string == ":" and depth == 0:
            if lambdas:
                lambdas -= 1
                continue
            yield tokenize.OP, line
            line = []


def _is_string(token):
    prefix = re.match(r"\w*", token.string).group().lower()
    return token.type == tokenize.STRING and "f" not in prefix


class _Reader:
    def __init__(self, text):
        self.lines = text.split("\n")
        self.reading = SourceReading()
        self.stack = []
        pending, opened, first = None, False, False
        for kind, tokens in _logical_lines(text):
            if kind == tokenize.INDENT:
                self.stack.append(pending or _Block("block"))  # None: "match" and "case"
                opened, first = False, True
            elif kind == tokenize.DEDENT:
                self.stack.pop()
                first = False
            else:
                if opened:  # the body stands on the opener's line
                    self.stack.append(pending)
                if kind == tokenize.OP:
                    block = self.opener(tokens)
                else:
                    self.statement(tokens, first or opened)
                if opened:
                    self.stack.pop()
                opened, first = kind == tokenize.OP, False
                pending = block if kind == tokenize.OP else None

    def source(self, tokens):
        (row, start), (end_row, end) = tokens[0].start, tokens[-1].end
        if row == end_row:
            return self.lines[row - 1][start:end]
        middle = self.lines[row : end_row - 1]
        return "\n".join([self.lines[row - 1][start:], *middle, self.lines[end_row - 1][:end]])

    def owner(self):
        """Name of the innermost function, if it stands in a module or directly in a class."""
        scopes = [b for b in self.stack if b.kind != "block"]
        if [b.kind for b in scopes] in (["def"], ["class", "def"]):
            return ".".join(b.name for b in scopes)
        return None

    def opener(self, tokens):
        words = [t.string for t in tokens]
        at = 1 if words[0] == "async" else 0
        if words[at] not in ("class", "def"):
            return _Block("block")
        name, kinds = words[at + 1], [b.kind for b in self.stack]
        if words[at] == "class":
            if kinds == []:
                self.reading.methods.setdefault(name, [])
        elif kinds in ([], ["class"]):
            qualified = ".".join([*(b.name for b in self.stack), name])
            self.reading.parameters[qualified] = _parameters(tokens[at + 2 :], self.source)
            if self.stack:
                self.reading.methods[self.stack[0].name].append(name)
        return _Block(words[at], name)

    def statement(self, tokens, is_first):
        words, where, reading = [t.string for t in tokens], self.owner(), self.reading
        if is_first and where and tokens[0].type == tokenize.STRING:
            if self.stack[-1].kind == "def":
                reading.docstrings[where] = ast.literal_eval(" ".join(words))
        elif words[0] == "import":
            names = self.source(tokens).removeprefix("import")
            reading.imports.update(n.split()[0] for n in names.split(","))
        elif words[0] == "from" and not words[1].startswith("."):
            reading.imports.add("".join(words[1 : words.index("import")]))
        elif words[0] == "raise" and where and len(words) > 4 and words[2] == "(":
            parts = [t.string for t in tokens[3:]]
            count = next((i for i, t in enumerate(tokens[3:]) if not _is_string(t)), 0)
            if count and parts[count] in ("),"):
                message = ast.literal_eval(" ".join(parts[:count]))
                reading.raises.append((where, words[1], message))
        elif words[0] == "return" and where:
            value = self.source(tokens[1:]) if len(tokens) > 1 else "None"
            reading.returns.setdefault(where, []).append(value)
        elif len(words) > 2 and words[1] == "=" and not self.stack:
            reading.constants.setdefault(words[0], []).append(self.source(tokens[2:]))


def read_source(text):
    """Read a module by its tokens."""
    return _Reader(text).reading


def _parameters(tokens, source):
    """``(name, source of the default or None)`` from the tokens after a function's name."""
    found, part, depth = [], [], 0
    for token in tokens:
        if token.string in ")]}" and token.type == tokenize.OP:
            depth -= 1
            if depth == 0:
                break
        if token.type == tokenize.OP and token.string == "," and depth == 1:
            found.append(part)
            part = []
        elif depth >= 1:
            part.append(token)
        if token.string in "([{" and token.type == tokenize.OP:
            depth += 1
    found.append(part)
    parameters = []
    for part in found:
        names = [t for t in part if t.type == tokenize.NAME]
        if not names:
            continue  # a bare star or slash
        default, level = None, 0
        for i, token in enumerate(part):
            level += (
                (token.string in "([{") - (token.string in ")]}")
                if token.type == tokenize.OP
                else 0
            )
            if token.string == "=" and level == 0:
                default = source(part[i + 1 :])
                break
        parameters.append((names[0].string, default))
    return parameters


def plain(source):
    """A string literal without its quotes; anything else as it is."""
    try:
        value = ast.literal_eval(source)
    except (ValueError, SyntaxError):
        return source
    return value if isinstance(value, str) and value.isprintable() else source


def squeezed(text):
    return re.sub(r"\s+", " ", text).strip()


def first_sentence(docstring):
    """The docstring up to its first full stop that a space follows, or its first paragraph."""
    paragraph = squeezed(re.split(r"\n\s*\n", docstring.strip())[0])
    return re.split(r"(?<=\.) ", paragraph)[0]


# --- dialogues ---------------------------------------------------------------


@dataclass
class Session:
    number: int
    date: str
    turns: list  # (speaker, text)


def read_transcript(text):
    """Full names of the people, and the sessions with their turns."""
    head, *rest = re.split(r"\n\n(?=Session \d+: )", text)
    names = re.match(
        r"Conversations between (.+), in \d+ sessions\. Transcript \d{6}\.", head
    ).group(1)
    people = re.split(r", | and ", names)
    sessions = []
    for part in rest:
        first, *lines = part.strip().split("\n")
        number, date = re.fullmatch(r"Session (\d+): \w+, (\d+ \w+ \d+), \d\d:\d\d", first).groups()
        sessions.append(Session(int(number), date, [tuple(x.split(": ", 1)) for x in lines]))
    return people, sessions


_GIVEN = re.compile(r"\bmy ([^.:,]+?) is (?:at |on )?(.+?)( now| from now on)?\.(?: |$)")
_TAKEN_BACK = re.compile(
    r"I said my (.+?) is (?:at |on )?(.+?), but in truth it is (?:at |on )?(.+?)\.(?: |$)"
)


def statements(people, sessions, person, topic):
    """``(session, kind, value)`` of what ``person`` said about "my ``topic``", in order."""
    first = person.split()[0]
    assert person in people
    found = []
    for session in sessions:
        for speaker, text in session.turns:
            if speaker != first:
                continue
            corrected = _TAKEN_BACK.search(text)
            if corrected:
                if corrected.group(1) == topic:
                    assert found and found[-1][2] == corrected.group(2)
                    found.append((session, "correct", corrected.group(3)))
                continue
            for given, value, mark in _GIVEN.findall(text):
                if given == topic:
                    found.append((session, "change" if mark else "set", value))
    return found


def reports(sessions, person, pattern, dates):
    """Reports of an activity: ``{session number: [first amount, last amount]}``."""
    first = person.split()[0]
    found = {}
    for session in sessions:
        for speaker, text in session.turns:
            amounts = re.findall(pattern, text) if speaker == first else []
            if not amounts:
                continue
            amended = re.search(r"(?:About|what I told you on) (\d+ \w+ \d+)", text)
            if amended and re.search(r"I counted again|I have to correct", text):
                found[dates[amended.group(1)]][1] = int(amounts[-1])
            else:
                found[session.number] = [int(amounts[-1])] * 2
    return found
