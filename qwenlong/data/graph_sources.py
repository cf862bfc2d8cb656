"""Real structured data as prose documents, one entity a document, each fact with its characters.

Countries come from the package countryinfo (MIT), airports from airportsdata (MIT), time zones from
tzdata (the IANA database, public domain). ``python_pages.python_documents`` does the same for
Python source. The facts of a document lie in ``meta["triples"]``, so that they survive a JSON round
trip; ``document_triples`` reads them back.
"""

from __future__ import annotations

import csv
import hashlib
import importlib.resources
import json
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from qwenlong.data.documents import SourceDocument, text_id

# Withdrawn from ISO 3166: their territory has pages of its own.
_FORMER_COUNTRIES = frozenset({"ANT", "SCG"})


class Triple(NamedTuple):
    """One fact: ``subject`` has ``relation`` to ``object``; ``[start, end)`` of ``doc`` says so.

    Subject and object are strings as the text writes them (numbers with their thousands
    separators), so that the span contains the object.
    """

    subject: str
    relation: str
    object: str
    doc: str
    start: int
    end: int


def document_triples(document: SourceDocument) -> Iterator[Triple]:
    """The facts that a rendered document recorded about itself; none for any other document."""
    for subject, relation, obj, start, end in document.meta.get("triples", ()):
        yield Triple(subject, relation, obj, document.id, start, end)


def join_names(names: Sequence[str]) -> str:
    """``A, B and C``; with semicolons where a name has a comma or an "and" of its own."""
    if len(names) < 2:
        return "".join(names)
    if any("," in name or ";" in name or " and " in name for name in names):
        return "; ".join(names[:-1]) + "; and " + names[-1]
    return ", ".join(names[:-1]) + " and " + names[-1]


_TAKES_ARTICLE = re.compile(
    r"United |Republic |Democratic |Federated |.* (Republic|Islands|Territory|Lands)\Z"
    r"|(Netherlands|Philippines|Maldives|Comoros|Seychelles|Isle of Man|Ivory Coast)\Z"
)


def with_article(country: str) -> str:
    """``the Netherlands``, ``Nepal``: the name as it stands in running text."""
    return f"the {country}" if _TAKES_ARTICLE.match(country) else country


def capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]


class Page:
    """Prose about one entity. ``say`` adds a sentence and records the facts that it states.

    The wording is drawn from a generator seeded by the name: a page never depends on other pages.
    """

    def __init__(self, entity: str, entity_type: str):
        self.entity, self.entity_type = entity, entity_type
        self._rng = random.Random(hashlib.sha256(entity.encode()).digest())
        self._pieces: list[str] = []
        self._length = 0
        self._triples: list[tuple[str, str, str, int, int]] = []

    def say(self, sentences: str | Sequence[str], *facts: tuple[str, str, str]) -> None:
        """Add one of ``sentences``, which states ``facts``: ``(subject, relation, object)`` each.

        Raises:
            ValueError: a sentence does not contain an object that it is said to state.
        """
        sentence = sentences if isinstance(sentences, str) else self._rng.choice(sentences)
        separator = "" if not self._pieces or self._pieces[-1].endswith("\n") else " "
        start = self._length + len(separator)
        end = start + len(sentence)
        for subject, relation, obj in facts:
            if obj not in sentence:
                raise ValueError(f"page {self.entity!r}: {obj!r} is not in {sentence!r}")
            self._triples.append((subject, relation, obj, start, end))
        self._append(separator + sentence)

    def new_paragraph(self) -> None:
        self._append("\n\n")

    def _append(self, piece: str) -> None:
        self._pieces.append(piece)
        self._length += len(piece)

    def document(self, title: str, source: str, aliases: Sequence[str] = ()) -> SourceDocument:
        text = "".join(self._pieces)
        meta = {
            "entity": self.entity,
            "entity_type": self.entity_type,
            "aliases": list(aliases),
            "triples": [list(t) for t in self._triples],
        }
        return SourceDocument(id=text_id(text), title=title, text=text, source=source, meta=meta)


def _data_file(package: str, *parts: str) -> importlib.resources.abc.Traversable:
    try:
        path = importlib.resources.files(package)
    except ModuleNotFoundError:
        raise RuntimeError(
            f"the structured sources need a package: pip install {package}"
        ) from None
    return path.joinpath(*parts)


# --- countries ---------------------------------------------------------------


def _countries() -> dict[str, dict]:
    """alpha-3 code -> record, for each country with a capital, an area and a population."""
    found: dict[str, dict] = {}
    folder = _data_file("countryinfo", "data")
    for file in sorted(folder.iterdir(), key=lambda f: f.name):
        if not file.name.endswith(".json"):
            continue
        record = json.loads(file.read_text(encoding="utf-8"))
        code = record.get("ISO", {}).get("alpha3")
        complete = (
            code
            and code not in _FORMER_COUNTRIES
            and isinstance(record.get("capital"), str)
            and record["capital"]
            and record.get("population")
            and record.get("area")
            and record.get("subregion")
        )
        if complete and code not in found:
            found[code] = record
    return found


def country_documents() -> list[SourceDocument]:
    """One page for each country: place, capital, size, currency, codes and land neighbours.

    A land border is stated only where both countries list it.
    """
    countries = _countries()
    return [_country_page(code, countries) for code in sorted(countries)]


def _country_page(code: str, countries: dict[str, dict]) -> SourceDocument:
    record = countries[code]
    name = record["name"]
    the_name = with_article(name)
    page = Page(name, "country")
    region, subregion, capital = record["region"], record["subregion"], record["capital"]
    page.say(
        [
            f"{capitalised(the_name)} is a country or territory of {region}: {subregion}.",
            f"{capitalised(the_name)} belongs to {region}, and there to {subregion}.",
        ],
        (name, "region", region),
        (name, "subregion", subregion),
    )
    page.say(
        [f"The capital of {the_name} is {capital}.", f"The seat of its government is {capital}."],
        (name, "capital", capital),
    )
    area, population = f"{record['area']:,}", f"{record['population']:,}"
    page.say(
        [f"It covers {area} square kilometres.", f"Its area is {area} square kilometres."],
        (name, "area", area),
    )
    page.say(
        [f"The population of {the_name} is {population}.", f"It has {population} inhabitants."],
        (name, "population", population),
    )
    page.new_paragraph()
    _say_borders(page, code, countries)
    currencies = record.get("currencies") or []
    if currencies:
        page.say(
            f"Currency in use, by ISO code: {join_names(currencies)}.",
            *((name, "currency", c) for c in currencies),
        )
    languages = record.get("languages") or []
    if languages:
        page.say(
            f"Languages of {the_name}, by ISO 639 code: {join_names(languages)}.",
            *((name, "language", x) for x in languages),
        )
    page.new_paragraph()
    calling = [f"+{c}" for c in record.get("callingCodes") or [] if c]
    if len(calling) == 1:
        page.say(
            f"Telephone numbers of {the_name} begin with {calling[0]}.",
            (name, "calling_code", calling[0]),
        )
    domains = record.get("tld") or []
    if len(domains) == 1:
        page.say(f'Its internet domain is "{domains[0]}".', (name, "domain", domains[0]))
    alpha2 = record["ISO"]["alpha2"]
    page.say(
        f"In ISO 3166 it is {alpha2} with two letters and {code} with three.",
        (name, "alpha2", alpha2),
        (name, "alpha3", code),
    )
    if record.get("demonym"):
        page.say(
            f"A person from {the_name} is described as {record['demonym']}.",
            (name, "demonym", record["demonym"]),
        )
    aliases = [a for a in record.get("altSpellings") or [] if len(a) > 3 and a != name]
    if aliases:
        page.say(f"Other names of {the_name}: {'; '.join(aliases)}.")
    return page.document(name, "countryinfo", aliases)


def _say_borders(page: Page, code: str, countries: dict[str, dict]) -> None:
    listed = countries[code].get("borders") or []
    mutual = sorted(
        countries[b]["name"]
        for b in set(listed)
        if b in countries and code in (countries[b].get("borders") or [])
    )
    name, the_name = page.entity, with_article(page.entity)
    neighbours = join_names([with_article(n) for n in mutual])
    if len(mutual) == 1 == len(listed):
        page.say(
            f"The only land neighbour of {the_name} is {neighbours}.",
            (name, "borders", mutual[0]),
            (name, "only_neighbour", mutual[0]),
        )
    elif mutual:
        page.say(
            [
                f"{capitalised(the_name)} shares land borders with {neighbours}.",
                f"Land neighbours of {the_name}: {neighbours}.",
            ],
            *((name, "borders", n) for n in mutual),
        )


# --- airports ----------------------------------------------------------------


def airport_documents(limit: int | None = 1500) -> list[SourceDocument]:
    """One page for each of ``limit`` airports that have an IATA code and a name of their own.

    The choice is by the hash of the ICAO code: a larger limit adds airports and drops none.
    """
    countries = {r["ISO"]["alpha2"]: r["name"] for r in _countries().values()}
    zones = {zone.name for zone in _zones()}
    with _data_file("airportsdata", "airports.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    seen: dict[str, int] = {}
    for row in rows:
        seen[row["name"]] = seen.get(row["name"], 0) + 1
    usable = [
        row
        for row in rows
        if row["iata"]
        and row["city"]
        and seen[row["name"]] == 1
        and row["country"] in countries
        and row["tz"] in zones
        and float(row["elevation"] or 0) > 0
    ]
    usable.sort(key=lambda row: hashlib.sha256(row["icao"].encode()).digest())
    return [_airport_page(row, countries[row["country"]]) for row in usable[:limit]]


def _airport_page(row: dict[str, str], country: str) -> SourceDocument:
    name = " ".join(row["name"].split())
    page = Page(name, "airport")
    city, division = " ".join(row["city"].split()), " ".join(row["subd"].split())
    zone = row["tz"]
    the_country = with_article(country)
    if division:
        page.say(
            [
                f"{name} is an airport in {the_country}, in the division {division}.",
                f"{name} lies in {the_country}, in the division {division}.",
            ],
            (name, "airport_country", country),
            (name, "airport_division", division),
        )
    else:
        page.say(f"{name} is an airport in {the_country}.", (name, "airport_country", country))
    page.say(
        [f"It serves {city}.", f"The place that it serves is {city}."],
        (name, "serves", city),
    )
    page.say(
        f"Its IATA code is {row['iata']}; its ICAO code is {row['icao']}.",
        (name, "iata", row["iata"]),
        (name, "icao", row["icao"]),
    )
    elevation = float(row["elevation"])
    feet = f"{elevation:,.0f}" if elevation.is_integer() else f"{elevation:,}"
    page.say(
        [
            f"The field lies {feet} feet above sea level.",
            f"The elevation of {name} is {feet} feet.",
        ],
        (name, "elevation", feet),
    )
    page.say(
        f"Latitude {row['lat']} and longitude {row['lon']}, in degrees, give its position.",
        (name, "latitude", row["lat"]),
        (name, "longitude", row["lon"]),
    )
    page.say(
        [f"Clocks at {name} keep the time zone {zone}.", f"Its time zone is {zone}."],
        (name, "airport_zone", zone),
    )
    return page.document(name, "airportsdata")


# --- time zones --------------------------------------------------------------


class _Zone(NamedTuple):
    name: str
    link: str | None  # the zone whose rules it shares
    eras: list[tuple[int, int | None]]  # standard offset in seconds, until the year


def _zones() -> list[_Zone]:
    """Zones and links of ``tzdata.zi``; an era has its standard offset, without daylight saving."""
    zones: dict[str, _Zone] = {}
    eras: list[tuple[int, int | None]] = []
    for line in _data_file("tzdata", "zoneinfo", "tzdata.zi").read_text("utf-8").splitlines():
        fields = line.split()
        if not fields or fields[0] in ("#", "R"):
            continue
        if fields[0] == "L":
            zones[fields[2]] = _Zone(fields[2], fields[1], [])
            continue
        if fields[0] == "Z":
            eras = []
            zones[fields[1]] = _Zone(fields[1], None, eras)
            fields = fields[2:]
        eras.append((_seconds(fields[0]), int(fields[3]) if len(fields) > 3 else None))
    return [zones[name] for name in sorted(zones) if "/" in name and not name.startswith("Etc/")]


def _seconds(text: str) -> int:
    sign = -1 if text.startswith("-") else 1
    parts = [int(p) for p in text.lstrip("-").split(":")] + [0, 0]
    return sign * (parts[0] * 3600 + parts[1] * 60 + parts[2])


def format_offset(seconds: int) -> str:
    """``UTC+05:45``; seconds are shown where they are not zero."""
    sign = "-" if seconds < 0 else "+"
    hours, rest = divmod(abs(seconds), 3600)
    minutes, rest = divmod(rest, 60)
    return f"UTC{sign}{hours:02d}:{minutes:02d}" + (f":{rest:02d}" if rest else "")


def _zone_countries() -> dict[str, str]:
    names = {r["ISO"]["alpha2"]: r["name"] for r in _countries().values()}
    table = _data_file("tzdata", "zoneinfo", "zone.tab").read_text("utf-8")
    rows = [line.split("\t") for line in table.splitlines() if not line.startswith("#")]
    return {row[2]: names[row[0]] for row in rows if row[0] in names}


def zone_documents() -> list[SourceDocument]:
    """One page for each time zone: country, standard offset, and the years in which it changed.

    A link gets a short page that names the zone whose rules it shares.
    """
    countries = _zone_countries()
    return [_zone_page(zone, countries.get(zone.name)) for zone in _zones()]


def _zone_page(zone: _Zone, country: str | None) -> SourceDocument:
    name = zone.name
    page = Page(name, "time zone")
    page.say(f"{name} is a time zone of the IANA database.")
    if country:
        the_country = with_article(country)
        page.say(
            [f"It is listed under {the_country}.", f"The database lists it under {the_country}."],
            (name, "zone_country", country),
        )
    if zone.link:
        page.say(
            [
                f"{name} is a link: it keeps the rules of {zone.link}.",
                f"It is linked to {zone.link} and has no rules of its own.",
            ],
            (name, "linked_to", zone.link),
        )
        return page.document(f"Time zone {name}", "tzdata")
    runs: list[list] = []  # [offset, first year or None, last year or None]
    start = None
    for offset, until in zone.eras:
        if runs and runs[-1][0] == offset:
            runs[-1][2] = until
        else:
            runs.append([offset, start, until])
        start = until
    if len(runs) > 1:
        year = str(runs[0][2])
        page.say(
            [
                f"Local mean time, {format_offset(runs[0][0])}, was given up in {year}.",
                f"Until {year} its clocks kept local mean time, {format_offset(runs[0][0])}.",
            ],
            (name, "mean_time_until", year),
            (name, "mean_time", format_offset(runs[0][0])),
        )
    for offset, first, last in runs[1:-1]:
        span = f"in {first} only" if first == last else f"from {first} to {last}"
        page.say(
            f"Standard time was {format_offset(offset)} {span}.",
            (name, "former_offset", format_offset(offset)),
        )
    offset, first, _ = runs[-1]
    if first is None:
        page.say(
            f"Standard time is {format_offset(offset)}.",
            (name, "standard_offset", format_offset(offset)),
        )
    else:
        page.say(
            f"Since {first} standard time has been {format_offset(offset)}.",
            (name, "standard_since", str(first)),
            (name, "standard_offset", format_offset(offset)),
        )
    return page.document(f"Time zone {name}", "tzdata")


# --- all ---------------------------------------------------------------------


def structured_documents(
    *, airports: int | None = 1500, sources: Iterable[str] = ("countries", "airports", "zones")
) -> list[SourceDocument]:
    """The pages of the named ``sources``, in that order."""
    loaders = {
        "countries": country_documents,
        "airports": lambda: airport_documents(airports),
        "zones": zone_documents,
    }
    documents: list[SourceDocument] = []
    for source in sources:
        if source not in loaders:
            raise ValueError(f"unknown source {source!r}: choose from {list(loaders)}")
        documents += loaders[source]()
    return documents
