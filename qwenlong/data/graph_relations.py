"""What the graph knows about its relations: the types they join and how English says them.

A relation is said in three ways: as a clause about its subject ("whose capital is Bern"), as a
clause about its object ("that defines the class abc.ABC"), and as a question ("What is the capital
of ...?"). ``{}`` stands for the other end. A relation that is not listed, as a model may name one,
gets a plain form of each.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

from qwenlong.data.graph_sources import with_article

ENTITY_TYPES = ("country", "airport", "time zone", "module", "class")


@dataclass(frozen=True)
class Relation:
    """``subject`` and ``object`` are types: one of ``ENTITY_TYPES``, or ``text``, ``code``,
    ``number``, ``year``, ``offset`` for a literal; empty for a relation that a model named.

    ``vague`` marks facts that may describe an entity without naming it; ``unit`` ends a question
    for a number; ``aliases`` and ``inverses`` are other names, the latter with the ends swapped.
    """

    name: str
    subject: str
    object: str
    about_subject: str
    about_object: str = ""
    questions: tuple[str, ...] = ()
    unit: str | None = None
    vague: bool = False
    aliases: tuple[str, ...] = ()
    inverses: tuple[str, ...] = ()

    @property
    def joins_entities(self) -> bool:
        return self.object in ENTITY_TYPES or not self.subject


_TABLE = (
    Relation("region", "country", "text", "that lies in {}", vague=True),
    Relation("subregion", "country", "text", "that belongs to {}", vague=True),
    Relation(
        "capital",
        "country",
        "text",
        "whose capital is {}",
        questions=("What is the capital of {}?", "Which city is the capital of {}?"),
        aliases=("capital city", "has capital", "seat of government"),
        inverses=("capital of", "is the capital of", "is capital of"),
    ),
    Relation(
        "area",
        "country",
        "number",
        "whose area is {} square kilometres",
        questions=(
            "What is the area of {}, in square kilometres?",
            "How many square kilometres does {} cover?",
        ),
        unit="square kilometres",
        vague=True,
    ),
    Relation(
        "population",
        "country",
        "number",
        "that has {} inhabitants",
        questions=("What is the population of {}?", "How many inhabitants does {} have?"),
        unit="inhabitants",
        vague=True,
    ),
    Relation(
        "currency",
        "country",
        "code",
        "where the currency {} is in use",
        questions=("What is the ISO code of the currency in use in {}?",),
        vague=True,
        aliases=("currency code", "uses currency"),
    ),
    Relation(
        "language",
        "country",
        "code",
        "for which the language code {} is listed",
        vague=True,
        aliases=("official language", "languages"),
    ),
    Relation(
        "calling_code",
        "country",
        "code",
        "whose telephone numbers begin with {}",
        questions=("With which calling code do telephone numbers of {} begin?",),
    ),
    Relation(
        "domain",
        "country",
        "code",
        "whose internet domain is {}",
        questions=("What is the internet domain of {}?",),
    ),
    Relation("alpha2", "country", "code", "whose two-letter ISO code is {}"),
    Relation(
        "alpha3",
        "country",
        "code",
        "whose three-letter ISO code is {}",
        questions=("What is the three-letter ISO 3166 code of {}?",),
    ),
    Relation(
        "demonym",
        "country",
        "text",
        "whose people are described as {}",
        questions=("By which adjective is a person from {} described?",),
    ),
    Relation(
        "borders",
        "country",
        "country",
        "that borders {}",
        "that borders {}",
        aliases=("shares a border with", "has a land border with", "neighbours", "land neighbour"),
    ),
    Relation(
        "only_neighbour",
        "country",
        "country",
        "whose only land neighbour is {}",
        "that is the only land neighbour of {}",
    ),
    Relation(
        "airport_country",
        "airport",
        "country",
        "that lies in {}",
        "in which {} lies",
        vague=True,
        aliases=("located in country",),
    ),
    Relation("airport_division", "airport", "text", "that lies in the division {}", vague=True),
    Relation(
        "serves",
        "airport",
        "text",
        "that serves {}",
        questions=("Which place does {} serve?", "What is the name of the place that {} serves?"),
        vague=True,
        inverses=("served by", "is served by"),
    ),
    Relation(
        "iata",
        "airport",
        "code",
        "whose IATA code is {}",
        questions=("What is the IATA code of {}?",),
    ),
    Relation(
        "icao",
        "airport",
        "code",
        "whose ICAO code is {}",
        questions=("What is the ICAO code of {}?",),
    ),
    Relation(
        "elevation",
        "airport",
        "number",
        "that lies {} feet above sea level",
        questions=(
            "How many feet above sea level does {} lie?",
            "What is the elevation of {}, in feet?",
        ),
        unit="feet",
        vague=True,
    ),
    Relation(
        "latitude",
        "airport",
        "number",
        "whose latitude is {}",
        questions=("What is the latitude of {}, in degrees?",),
        unit="degrees",
    ),
    Relation(
        "longitude",
        "airport",
        "number",
        "whose longitude is {}",
        questions=("What is the longitude of {}, in degrees?",),
        unit="degrees",
    ),
    Relation(
        "airport_zone",
        "airport",
        "time zone",
        "whose clocks keep {}",
        "that the clocks of {} keep",
        vague=True,
        aliases=("time zone of airport",),
    ),
    Relation(
        "zone_country",
        "time zone",
        "country",
        "that is listed under {}",
        "under which {} is listed",
        vague=True,
    ),
    Relation(
        "linked_to", "time zone", "time zone", "that is linked to {}", "to which {} is linked"
    ),
    Relation(
        "mean_time_until",
        "time zone",
        "year",
        "where local mean time was given up in {}",
        questions=(
            "In which year was local mean time given up in {}?",
            "In which year did {} give up local mean time?",
        ),
        vague=True,
    ),
    Relation(
        "mean_time",
        "time zone",
        "offset",
        "whose local mean time was {}",
        questions=(
            "By how many seconds was the local mean time of {} ahead of UTC (a negative number if "
            "it was behind)?",
        ),
        unit="seconds",
    ),
    Relation(
        "former_offset", "time zone", "code", "where standard time was {} in the past", vague=True
    ),
    Relation(
        "standard_since",
        "time zone",
        "year",
        "that has kept its standard time since {}",
        questions=("Since which year has {} kept its standard time?",),
        vague=True,
    ),
    Relation(
        "standard_offset",
        "time zone",
        "offset",
        "whose standard time is {}",
        questions=(
            "By how many minutes is the standard time of {} ahead of UTC (a negative number if it "
            "is behind)?",
        ),
        unit="minutes",
        vague=True,
    ),
    Relation("package", "module", "text", "that lies in the package {}", vague=True),
    Relation(
        "source_lines",
        "module",
        "number",
        "whose source has {} lines",
        questions=(
            "How many lines does the source of {} have?",
            "What is the number of lines in the source of {}?",
        ),
        unit="lines",
        vague=True,
    ),
    Relation(
        "imports",
        "module",
        "module",
        "that imports {}",
        "that {} imports",
        inverses=("imported by", "is imported by"),
    ),
    Relation("function", "module", "text", "that defines the function {}", vague=True),
    Relation(
        "defined_in", "class", "module", "that is defined in {}", "that defines {}", vague=True
    ),
    Relation(
        "derives_from",
        "class",
        "class",
        "that derives from {}",
        "from which {} derives",
        aliases=("inherits from", "subclass of", "extends"),
        inverses=("base class of", "superclass of"),
    ),
    Relation("only_base", "class", "class", "whose only base is {}", "that is the only base of {}"),
    Relation("method", "class", "text", "whose body defines the method {}", vague=True),
    Relation(
        "method_count",
        "class",
        "number",
        "whose body defines {} methods",
        questions=("How many methods does the body of {} define?",),
        unit="methods",
        vague=True,
    ),
    Relation("attribute", "class", "text", "whose body assigns the name {}", vague=True),
)
RELATIONS = {relation.name: relation for relation in _TABLE}

# A page states both; a walk that took the wider one would add nothing.
IMPLIED = {"only_neighbour": "borders", "only_base": "derives_from"}


@functools.cache
def relation_of(name: str) -> Relation:
    """The relation ``name``; a plain one for a name that is not in the table (``~name``)."""
    if name in RELATIONS:
        return RELATIONS[name]
    said = name.removeprefix("~").replace("_", " ")
    return Relation(
        name,
        "",
        "",
        f'which "{said}" links to {{}}',
        f'to which "{said}" links {{}}',
        (f'To what does "{said}" link {{}}?',),
        vague=True,
    )


def canonical_relation(name: str) -> tuple[str, bool]:
    """``(relation, swapped)`` for a name as a model or a table wrote it.

    Case, underscores and a leading "has" or "the" do not matter; ``swapped`` says that subject and
    object change places. An unknown name comes back in its plain form.
    """
    plain = _plain(name)
    if plain in _NAMES:
        return _NAMES[plain]
    return plain.replace(" ", "_"), False


def _plain(name: str) -> str:
    words = re.sub(r"[\s_\-]+", " ", name.casefold()).strip()
    return re.sub(r"^(?:has|the) (?=.)", "", words)


_NAMES = {
    _plain(name): (relation.name, swapped)
    for relation in _TABLE
    for swapped, names in (
        (True, relation.inverses),
        (False, (*relation.aliases, relation.name)),
    )
    for name in names
}


def phrase(entity_type: str, name: str) -> str:
    """The entity by its name, as a noun phrase."""
    if entity_type == "country":
        return with_article(name)
    if entity_type in ("time zone", "module", "class"):
        return f"the {entity_type} {name}"
    return name


def noun(entity_type: str) -> str:
    return entity_type if entity_type in ENTITY_TYPES else "entity"


# --- values ------------------------------------------------------------------


def number(text: str) -> float:
    """``147,181`` -> 147181.0; a year too."""
    return float(text.replace(",", ""))


def offset_seconds(text: str) -> int:
    """``UTC+05:45`` -> 20700."""
    match = re.fullmatch(r"UTC([+-])(\d\d):(\d\d)(?::(\d\d))?", text)
    if match is None:
        raise ValueError(f"{text!r} is not an offset such as UTC+05:45")
    sign, hours, minutes, seconds = match.groups()
    total = int(hours) * 3600 + int(minutes) * 60 + int(seconds or 0)
    return -total if sign == "-" else total
