"""Real tables inside small data packages: countryinfo, airportsdata, vega-datasets (all MIT).

Each function reads the files of the installed package and returns a ``Table``. Units and the
meaning of columns are those that the packages document. Rows keep the order of the files; a row
without a partition value is left out.
"""

from __future__ import annotations

import csv
import importlib.resources
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import TYPE_CHECKING, Any

from qwenlong.data.table_schema import Column, Schema, Table, Value, clean_value

if TYPE_CHECKING:
    from importlib.abc import Traversable

_MIN_AIRPORTS = 5  # of a country or state: a smaller list makes a poor document
_TWICE = frozenset({"Curaçao"})  # two files of countryinfo describe it


def _files(package: str) -> Traversable:
    try:
        return importlib.resources.files(package)
    except ModuleNotFoundError:
        raise RuntimeError(
            f"this table needs a package: pip install {package.replace('_', '-')}"
        ) from None


def _read(package: str, *path: str) -> str:
    return _files(package).joinpath(*path).read_text(encoding="utf-8")


def _vega(name: str) -> list[dict[str, Any]]:
    text = _read("vega_datasets", "_data", name)
    return json.loads(text) if name.endswith("json") else list(csv.DictReader(io.StringIO(text)))


def _number(value: Any) -> Value:
    value = clean_value(value)
    return None if value is None else float(value)


def _integer(value: Any) -> Value:
    value = clean_value(value)
    return None if value is None else int(float(value))


def _measure(
    name: str, label: str, unit: str | None = None, *, real: bool = True, additive: bool = False
) -> Column:
    return Column(name, label, "real" if real else "integer", unit, "measure", additive)


def _text(name: str, label: str, role: str = "other") -> Column:
    return Column(name, label, "text", None, role)


def _countries_json() -> Iterator[dict[str, Any]]:
    folder = _files("countryinfo").joinpath("data")
    for file in sorted(folder.iterdir(), key=lambda f: f.name):
        if file.name.endswith(".json"):
            yield json.loads(file.read_text(encoding="utf-8"))


def countries() -> Table:
    """Countries and territories by subregion: population, area, neighbours, capital."""
    schema = Schema(
        "countries",
        "Countries and territories of",
        "country or territory",
        "countries and territories",
        (
            _text("country", "country", "key"),
            _text("capital", "capital"),
            _measure("population", "population", "people", real=False, additive=True),
            _measure("area", "area", "km²", additive=True),
            _measure("borders", "number of land borders", real=False, additive=True),
            _measure("capital_latitude", "latitude of the capital", "degrees"),
            _text("currency", "currency code", "category"),
        ),
        _text("subregion", "subregion", "category"),
        ratios=(("population", "area"),),
    )
    rows: list[tuple[Value, ...]] = []
    for entry in _countries_json():
        if entry["name"] in _TWICE or not entry.get("population"):
            continue
        subregion = entry.get("intermediateregion") or entry.get("subregion")
        borders = entry.get("borders")
        currencies = entry.get("currencies") or [None]
        latitude = (entry.get("capital_latlng") or [None])[0]
        rows.append(
            (
                clean_value(subregion),
                clean_value(entry["name"]),
                clean_value(entry.get("capital")),
                _integer(entry["population"]),
                _number(entry.get("area")),
                None if borders is None else len(borders),
                _number(latitude),
                clean_value(currencies[0]),
            )
        )
    return Table(schema, _with_partition(rows), "countryinfo")


def _airport_rows() -> Iterator[dict[str, str]]:
    for row in csv.DictReader(io.StringIO(_read("airportsdata", "airports.csv"))):
        if row["iata"]:
            yield row


_AIRPORT_COLUMNS = (
    _text("code", "IATA code", "key"),
    _text("airport", "airport"),
    _text("city", "city"),
    _measure("elevation", "elevation", "feet"),
    _measure("latitude", "latitude", "degrees"),
    _measure("longitude", "longitude", "degrees"),
    _text("time_zone", "time zone", "category"),
)


def _airports(name: str, title: str, partition: Column, pick: Callable) -> Table:
    schema = Schema(
        name,
        title,
        "airport",
        "airports with an IATA code",
        _AIRPORT_COLUMNS,
        partition,
        preposition="in",
    )
    rows = [
        (
            clean_value(pick(row)),
            row["iata"],
            clean_value(row["name"]),
            clean_value(row["city"]),
            _number(row["elevation"]),
            _number(row["lat"]),
            _number(row["lon"]),
            clean_value(row["tz"]),
        )
        for row in _airport_rows()
    ]
    sizes = Counter(row[0] for row in rows)
    kept = [row for row in _with_partition(rows) if sizes[row[0]] >= _MIN_AIRPORTS]
    return Table(schema, kept, "airportsdata")


def us_airports() -> Table:
    """Airports of the United States with an IATA code, by state."""
    return _airports(
        "us_airports",
        "Airports with an IATA code in the U.S. state or territory of",
        _text("state", "state", "category"),
        lambda row: row["subd"] if row["country"] == "US" else None,
    )


def world_airports() -> Table:
    """Airports with an IATA code outside the United States, by country."""
    names = {
        entry["ISO"]["alpha2"]: entry["name"]
        for entry in _countries_json()
        if entry.get("ISO", {}).get("alpha2")
    }
    return _airports(
        "airports",
        "Airports with an IATA code in",
        _text("country", "country", "category"),
        lambda row: names.get(row["country"]) if row["country"] != "US" else None,
    )


def cars() -> Table:
    """Cars of the model years 1970 to 1982 (Donoho and Ramos 1982)."""
    schema = Schema(
        "cars",
        "Car models of the model year",
        "car model",
        "car models",
        (
            _text("model", "model"),
            _text("origin", "origin", "category"),
            _measure("fuel_economy", "fuel economy", "miles per gallon"),
            _measure("cylinders", "number of cylinders", real=False),
            _measure("displacement", "engine displacement", "cubic inches"),
            _measure("power", "engine power", "horsepower", real=False),
            _measure("weight", "weight", "pounds", real=False),
            _measure("acceleration", "time from 0 to 60 mph", "seconds"),
        ),
        Column("model_year", "model year", "integer", None, "period"),
        preposition="of the model year",
    )
    rows = [
        (
            int(row["Year"][:4]),
            clean_value(row["Name"]),
            row["Origin"],
            _number(row["Miles_per_Gallon"]),
            _integer(row["Cylinders"]),
            _number(row["Displacement"]),
            _integer(row["Horsepower"]),
            _integer(row["Weight_in_lbs"]),
            _number(row["Acceleration"]),
        )
        for row in _vega("cars.json")
    ]
    return Table(schema, rows, "vega-datasets")


def seattle_weather() -> Table:
    """Daily weather of Seattle, 2012 to 2015, by month (NOAA)."""
    schema = Schema(
        "seattle_weather",
        "Daily weather of Seattle in",
        "day",
        "days of the Seattle weather record",
        (
            _text("calendar_date", "date", "key"),
            _measure("precipitation", "precipitation", "mm", additive=True),
            _measure("high", "maximum temperature", "°C"),
            _measure("low", "minimum temperature", "°C"),
            _measure("wind", "wind speed", "m/s"),
            _text("weather", "weather", "category"),
        ),
        Column("calendar_month", "month", "text", None, "period"),
    )
    rows = []
    for row in _vega("seattle-weather.csv"):
        date = datetime.strptime(row["date"], "%Y/%m/%d")
        numbers = [_number(row[k]) for k in ("precipitation", "temp_max", "temp_min", "wind")]
        rows.append((f"{date:%B %Y}", f"{date:%Y-%m-%d}", *numbers, row["weather"]))
    return Table(schema, rows, "vega-datasets")


def us_employment() -> Table:
    """Monthly employment of the United States by sector, 2006 to 2015 (BLS)."""
    raw = _vega("us-employment.csv")
    labels = {"nonfarm": "total nonfarm", "private": "total private", "government": "government"}
    sectors = [name for name in raw[0] if name not in ("month", "nonfarm_change")]
    columns = [_text("calendar_month", "month", "key")]
    for sector in sectors:
        # The file misspells "utilities" in one column.
        name = sector.replace("utilties", "utilities")
        label = labels.get(name, name.replace("_", " ").replace("trade trans", "trade, trans"))
        columns.append(_measure(name, f"{label} employment", "thousand persons"))
    schema = Schema(
        "us_employment",
        "Employment in the United States by sector, months of",
        "month",
        "months of the United States employment record",
        tuple(columns),
        Column("calendar_year", "year", "integer", None, "period"),
    )
    rows = []
    for row in raw:
        date = datetime.strptime(row["month"], "%Y-%m-%d")
        rows.append((date.year, f"{date:%B %Y}", *(_number(row[name]) for name in sectors)))
    return Table(schema, rows, "vega-datasets")


def stocks() -> Table:
    """Prices of five stocks at the start of each month, 2000 to 2010, by year."""
    schema = Schema(
        "stocks",
        "Monthly stock prices in",
        "monthly price",
        "monthly stock prices",
        (
            _text("quote", "quote", "key"),
            _text("symbol", "ticker symbol", "category"),
            _measure("price", "price", "US dollars"),
        ),
        Column("calendar_year", "year", "integer", None, "period"),
    )
    rows = []
    for row in _vega("stocks.csv"):
        date = datetime.strptime(row["date"], "%b %d %Y")
        quote = f"{row['symbol']} in {date:%B %Y}"
        rows.append((date.year, quote, row["symbol"], _number(row["price"])))
    return Table(schema, rows, "vega-datasets")


def barley() -> Table:
    """Barley yields of ten varieties in two years, by site in Minnesota (Immer 1934)."""
    schema = Schema(
        "barley",
        "Barley trials at",
        "barley trial",
        "barley trials",
        (
            _text("trial", "trial", "key"),
            _text("variety", "variety", "category"),
            Column("harvest_year", "year", "integer", None, "period"),
            _measure("harvest", "yield", "bushels per acre"),
        ),
        _text("site", "site", "category"),
        preposition="at",
    )
    rows = [
        (
            row["site"],
            f"{row['variety']} in {row['year']}",
            row["variety"],
            int(row["year"]),
            _number(row["yield"]),
        )
        for row in _vega("barley.json")
    ]
    return Table(schema, rows, "vega-datasets")


def iowa_electricity() -> Table:
    """Net generation of electricity in Iowa by source, 2001 to 2017 (EIA)."""
    schema = Schema(
        "iowa_electricity",
        "Electricity generated in Iowa in",
        "energy source",
        "energy sources of the Iowa electricity record",
        (
            _text("energy_source", "energy source", "key"),
            Column(
                "generation",
                "net generation",
                "integer",
                "thousand megawatt-hours",
                "measure",
                additive=True,
            ),
        ),
        Column("calendar_year", "year", "integer", None, "period"),
    )
    rows = [
        (int(row["year"][:4]), row["source"], _integer(row["net_generation"]))
        for row in _vega("iowa-electricity.csv")
    ]
    return Table(schema, rows, "vega-datasets")


def us_driving() -> Table:
    """Miles driven a person and the price of petrol in the United States, 1956 to 2010."""
    schema = Schema(
        "us_driving",
        "Driving in the United States in the",
        "year",
        "years of the United States driving record",
        (
            _text("driving_year", "year", "key"),
            _measure("miles", "distance driven per person", "miles", real=False),
            _measure("gas_price", "price of petrol", "US dollars per gallon"),
        ),
        Column("decade", "decade", "text", None, "period"),
        preposition="in the",
    )
    rows = [
        (f"{row['year'] // 10}0s", str(row["year"]), int(row["miles"]), _number(row["gas"]))
        for row in _vega("driving.json")
    ]
    return Table(schema, rows, "vega-datasets")


def wheat() -> Table:
    """Price of wheat and weekly wages in England, 1565 to 1821, by century (Playfair 1822)."""
    names = {15: "16th", 16: "17th", 17: "18th", 18: "19th"}
    schema = Schema(
        "wheat",
        "Wheat prices and wages in England in the",
        "year",
        "years of the English wheat price record",
        (
            _text("price_year", "year", "key"),
            _measure("wheat_price", "price of a quarter of wheat", "shillings"),
            _measure("wages", "weekly wage", "shillings"),
        ),
        _text("century", "century", "category"),
        preposition="in the",
    )
    rows = [
        (
            f"{names[int(row['year']) // 100]} century",
            str(row["year"]),
            _number(row["wheat"]),
            _number(row.get("wages")),
        )
        for row in _vega("wheat.json")
    ]
    return Table(schema, rows, "vega-datasets")


def crimea() -> Table:
    """Deaths in the British army in the Crimean War by month and cause (Nightingale 1858)."""
    schema = Schema(
        "crimean_war",
        "Deaths in the British army in the Crimean War in",
        "month",
        "months of the Crimean War record",
        (
            _text("calendar_month", "month", "key"),
            _measure("wounds", "deaths from wounds", "deaths", real=False, additive=True),
            _measure("disease", "deaths from disease", "deaths", real=False, additive=True),
            _measure("other", "deaths from other causes", "deaths", real=False, additive=True),
        ),
        Column("calendar_year", "year", "integer", None, "period"),
    )
    rows = []
    for row in _vega("crimea.json"):
        date = datetime.strptime(row["date"], "%Y-%m-%d")
        counts = (int(row[name]) for name in ("wounds", "disease", "other"))
        rows.append((date.year, f"{date:%B %Y}", *counts))
    return Table(schema, rows, "vega-datasets")


def _with_partition(rows: list[tuple[Value, ...]]) -> list[tuple[Value, ...]]:
    return [row for row in rows if row[0] is not None]


PACKAGE_TABLES: dict[str, Callable[[], Table]] = {
    "countries": countries,
    "us_airports": us_airports,
    "airports": world_airports,
    "cars": cars,
    "seattle_weather": seattle_weather,
    "us_employment": us_employment,
    "stocks": stocks,
    "barley": barley,
    "iowa_electricity": iowa_electricity,
    "us_driving": us_driving,
    "wheat": wheat,
    "crimean_war": crimea,
}
