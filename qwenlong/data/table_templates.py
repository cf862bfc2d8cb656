"""Question templates over corpus tables: the SQL that answers each, and what must hold.

A template is a function of a ``Scope`` that returns a ``Draft``, or None where the table does not
fit. Its wordings are those of ``table_wordings`` under its name.
"""

from __future__ import annotations

from collections.abc import Callable

from qwenlong.data.table_schema import Column, Value, format_value, period_key, sql_literal
from qwenlong.data.table_scope import Draft, Scope

SUBTYPES = ("aggregation", "calculation", "temporal", "ranking", "multi_step")
_ORDINALS = ("", "", "second ", "third ", "fourth ", "fifth ")
_NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six")

Template = Callable[[Scope], "Draft | None"]
TEMPLATES: dict[str, list[Template]] = {subtype: [] for subtype in SUBTYPES}


def _template(subtype: str) -> Callable[[Template], Template]:
    def register(function: Template) -> Template:
        TEMPLATES[subtype].append(function)
        return function

    return register


def _quoted(value: Value) -> str:
    return f'"{value}"'


def _per_part(scope: Scope, column: Column, function: str) -> str:
    """A query for ``part, v``: the function's value of each document in scope."""
    return (
        f"SELECT {scope.partition.name} AS part, {scope.order()} AS turn, "
        f"{function}({column.name}) AS v {scope.where(column)} GROUP BY {scope.partition.name}"
    )


# --- aggregation -------------------------------------------------------------


@_template("aggregation")
def total(scope: Scope) -> Draft | None:
    column = scope.measure(additive=True)
    if column is None:
        return None
    label = column.label
    question = scope.say("total", label=label)
    sql = f"SELECT SUM({column.name}) {scope.where(column)}"
    return Draft(question, sql, column.unit)


@_template("aggregation")
def mean(scope: Scope) -> Draft | None:
    column = scope.measure()
    if column is None:
        return None
    label = column.label
    question = scope.say("mean", label=label)
    return Draft(question, f"SELECT AVG({column.name}) {scope.where(column)}", column.unit)


@_template("aggregation")
def mean_of_category(scope: Scope) -> Draft | None:
    column, found = scope.measure(), scope.category(least=3)
    if column is None or found is None:
        return None
    category, values = found
    value = scope.rng.choice(values)
    filters = ((category.name, value),)
    kind = f"{category.label} is {_quoted(value)}"
    question = scope.say("mean_of_category", label=column.label, kind=kind)
    sql = f"SELECT AVG({column.name}) {scope.where(column, filters=filters)}"
    return Draft(question, sql, column.unit, filters=filters)


@_template("aggregation")
def count_above(scope: Scope) -> Draft | None:
    column = scope.measure()
    if column is None:
        return None
    bound, is_above = scope.threshold(column), scope.rng.random() < 0.5
    sign, word = (">", "above") if is_above else ("<", "below")
    amount = scope.amount(bound, column)
    question = scope.say("count_above", label=column.label, word=word, amount=amount)
    test = f"{column.name} {sign} {sql_literal(bound)}"
    return Draft(question, f"SELECT COUNT(*) {scope.where(column)} AND {test}", exact=True)


@_template("aggregation")
def count_category(scope: Scope) -> Draft | None:
    found = scope.category()
    if found is None:
        return None
    category, values = found
    value = scope.rng.choice(values)
    kind = f"{category.label} {_quoted(value)}"
    question = scope.say("count_category", kind=kind)
    filters = ((category.name, value),)
    sql = f"SELECT COUNT(*) {scope.where(filters=filters)}"
    return Draft(question, sql, exact=True, filters=filters)


@_template("aggregation")
def extreme(scope: Scope) -> Draft | None:
    column = scope.measure()
    if column is None:
        return None
    function, word = scope.rng.choice((("MAX", "highest"), ("MIN", "lowest")))
    label = column.label
    question = scope.say("extreme", word=word, label=label)
    sql = f"SELECT {function}({column.name}) {scope.where(column)}"
    return Draft(question, sql, column.unit, exact=True)


@_template("aggregation")
def count_distinct(scope: Scope) -> Draft | None:
    found = scope.category(least=1)
    if found is None:
        return None
    category = found[0]
    question = scope.say("count_distinct", category=category.label)
    sql = f"SELECT COUNT(DISTINCT {category.name}) {scope.where(category)}"
    return Draft(question, sql, exact=True)


# --- calculation -------------------------------------------------------------


def _group_values(scope: Scope, column: Column, function: str) -> tuple[str, str, str, str] | None:
    """Names and SQL of two groups, the one with the larger value first."""
    groups = scope.two_groups()
    if groups is None:
        return None
    sides = []
    for parts in groups:
        chosen = {part.value for part in parts}
        values = [
            row[column.name]
            for row in scope.rows
            if row[scope.partition.name] in chosen and row[column.name] is not None
        ]
        if not values:
            return None
        size = sum(values) / (len(values) if function == "AVG" else 1)
        sql = f"(SELECT {function}({column.name}) {scope.where(column, parts=parts)})"
        sides.append((size, scope.place(parts), sql))
    sides.sort(key=lambda side: -side[0])
    return sides[0][1], sides[0][2], sides[1][1], sides[1][2]


@_template("calculation")
def group_difference(scope: Scope) -> Draft | None:
    column = scope.measure()
    if column is None:
        return None
    function, word = scope.mean_or_total(column)
    sides = _group_values(scope, column, function)
    if sides is None:
        return None
    more, more_sql, less, less_sql = sides
    label = column.label
    question = scope.say("group_difference", word=word, label=label, more=more, less=less)
    return Draft(question, f"SELECT {more_sql} - {less_sql}", column.unit)


@_template("calculation")
def group_ratio(scope: Scope) -> Draft | None:
    column = scope.measure(positive=True)
    if column is None:
        return None
    function, word = scope.mean_or_total(column)
    sides = _group_values(scope, column, function)
    if sides is None:
        return None
    more, more_sql, less, less_sql = sides
    label = column.label
    question = scope.say("group_ratio", word=word, label=label, less=less, more=more)
    return Draft(question, f"SELECT {more_sql} * 1.0 / {less_sql}")


@_template("calculation")
def share_of_part(scope: Scope) -> Draft | None:
    column = scope.measure(additive=True)
    if column is None or len(scope.parts) < 2 or min(scope.values(column)) < 0:
        return None
    part = [scope.rng.choice(scope.parts)]
    place, label = scope.place(part), column.label
    question = scope.say("share_of_part", label=label, place=place)
    inner = f"(SELECT SUM({column.name}) {scope.where(column, parts=part)})"
    whole = f"(SELECT SUM({column.name}) {scope.where(column)})"
    return Draft(question, f"SELECT 100.0 * {inner} / {whole}", "%")


@_template("calculation")
def quotient_of_totals(scope: Scope) -> Draft | None:
    if not scope.table.schema.ratios:
        return None
    above, below = map(scope.table.schema.column, scope.rng.choice(scope.table.schema.ratios))
    question = scope.say("quotient_of_totals", above=above.label, below=below.label)
    question += f" Leave out rows without a value of {above.label} or of {below.label}."
    sql = f"SELECT SUM({above.name}) * 1.0 / SUM({below.name}) {scope.where(above, below)}"
    return Draft(question, sql, f"{above.unit} per {below.unit}")


@_template("calculation")
def value_range(scope: Scope) -> Draft | None:
    column = scope.measure()
    if column is None:
        return None
    label = column.label
    question = scope.say("value_range", label=label)
    sql = f"SELECT MAX({column.name}) - MIN({column.name}) {scope.where(column)}"
    return Draft(question, sql, column.unit)


@_template("calculation")
def share_above(scope: Scope) -> Draft | None:
    column = scope.measure()
    if column is None:
        return None
    bound = scope.threshold(column)
    amount = scope.amount(bound, column)
    question = scope.say("share_above", label=column.label, amount=amount)
    test = f"CASE WHEN {column.name} > {sql_literal(bound)} THEN 1 ELSE 0 END"
    sql = f"SELECT 100.0 * SUM({test}) / COUNT(*) {scope.where(column)}"
    return Draft(question, sql, "%")


@_template("calculation")
def category_difference(scope: Scope) -> Draft | None:
    column, found = scope.measure(), scope.category(least=2)
    if column is None or found is None:
        return None
    category, values = found
    sides = []
    for value in scope.rng.sample(values, 2):
        numbers = [
            row[column.name]
            for row in scope.rows
            if row[category.name] == value and row[column.name] is not None
        ]
        if not numbers:
            return None
        where = scope.where(column, filters=((category.name, value),))
        sides.append((sum(numbers) / len(numbers), value, f"(SELECT AVG({column.name}) {where})"))
    (_, more, more_sql), (_, less, less_sql) = sorted(sides, key=lambda side: -side[0])
    kind = f"{category.label} is"
    question = scope.say(
        "category_difference", label=column.label, kind=kind, more=_quoted(more), less=_quoted(less)
    )
    return Draft(question, f"SELECT {more_sql} - {less_sql}", column.unit)


# --- temporal ----------------------------------------------------------------


def _follows(first: Value, second: Value) -> bool:
    """Whether no year, month or decade lies between two periods."""
    a, b = period_key(first), period_key(second)
    if isinstance(first, str) and first.endswith("s"):
        return b[0] - a[0] == 10
    if len(a) == 1:
        return b[0] - a[0] == 1
    return len(a) == 2 and 12 * (b[0] - a[0]) + b[1] - a[1] == 1


def _span(scope: Scope) -> str | None:
    """``from 2003 to 2007`` where the scope is that whole span, of four periods or more."""
    if not scope.is_temporal or len(scope.parts) < 4:
        return None
    pairs = zip(scope.parts, scope.parts[1:], strict=False)
    if not all(_follows(a.value, b.value) for a, b in pairs):
        return None
    first, last = (format_value(scope.parts[i].value, scope.partition) for i in (0, -1))
    article = "the " if scope.table.schema.preposition.endswith(" the") else ""
    return f"from {article}{first} to {article}{last}"


@_template("temporal")
def change_between_periods(scope: Scope) -> Draft | None:
    column, groups = scope.measure(positive=True), scope.two_groups()
    if column is None or groups is None or not scope.is_temporal:
        return None
    filters: tuple[tuple[str, Value], ...] = ()
    kind = ""
    found = scope.category(least=3)
    if found is not None and scope.rng.random() < 0.5:
        value = scope.rng.choice(found[1])
        filters, kind = ((found[0].name, value),), f" whose {found[0].label} is {_quoted(value)}"
    early, late = groups
    old, new = (
        f"(SELECT AVG({column.name}) {scope.where(column, parts=parts, filters=filters)})"
        for parts in groups
    )
    label = column.label
    question = scope.say(
        "change_between_periods",
        label=label,
        kind=kind,
        early=scope.place(early),
        late=scope.place(late),
    )
    question += " A decrease is negative."
    return Draft(question, f"SELECT 100.0 * ({new} - {old}) / {old}", "%", filters=filters)


@_template("temporal")
def difference_between_periods(scope: Scope) -> Draft | None:
    column, groups = scope.measure(), scope.two_groups()
    if column is None or groups is None or not scope.is_temporal:
        return None
    early, late = groups
    old, new = (
        f"(SELECT AVG({column.name}) {scope.where(column, parts=parts)})" for parts in groups
    )
    label = column.label
    question = scope.say(
        "difference_between_periods", label=label, early=scope.place(early), late=scope.place(late)
    )
    question += " A decrease is negative."
    return Draft(question, f"SELECT {new} - {old}", column.unit)


@_template("temporal")
def peak_period(scope: Scope) -> Draft | None:
    column, span = scope.measure(), _span(scope)
    if column is None or span is None:
        return None
    function, word = scope.mean_or_total(column)
    direction, extreme_word = scope.rng.choice((("DESC", "highest"), ("ASC", "lowest")))
    label, unit = column.label, scope.partition.label
    question = scope.say(
        "peak_period", span=span, unit=unit, word=word, label=label, extreme_word=extreme_word
    )
    ranking = f"SELECT part, v FROM ({_per_part(scope, column, function)}) AS parts ORDER BY v "
    sql = f"{ranking.replace('part, v', 'part', 1)}{direction} LIMIT 1"
    return Draft(
        question,
        sql,
        is_text=True,
        ranking=ranking + direction,
        answer_column=scope.partition,
    )


@_template("temporal")
def count_rises(scope: Scope) -> Draft | None:
    column = scope.measure()
    if column is None or not scope.is_temporal or len(scope.parts) < 4:
        return None
    function, word = scope.mean_or_total(column)
    label, unit = column.label, scope.partition.label
    names = scope.names(scope.parts)
    question = scope.say("count_rises", word=word, label=label, unit=unit, names=names)
    steps = (
        f"SELECT v - LAG(v) OVER (ORDER BY turn) AS step FROM "
        f"({_per_part(scope, column, function)}) AS parts"
    )
    sql = f"SELECT COUNT(*) FROM ({steps}) AS steps WHERE step > 0"
    distances = f"SELECT step FROM ({steps}) AS steps WHERE step IS NOT NULL"
    return Draft(question, sql, exact=True, distances=distances)


@_template("temporal")
def largest_step(scope: Scope) -> Draft | None:
    column = scope.measure()
    if column is None or not scope.is_temporal or len(scope.parts) < 3:
        return None
    function, word = scope.mean_or_total(column)
    label, unit = column.label, scope.partition.label
    names = scope.names(scope.parts)
    question = scope.say("largest_step", word=word, label=label, unit=unit, names=names)
    sql = (
        f"SELECT MAX(step) FROM (SELECT v - LAG(v) OVER (ORDER BY turn) AS step FROM "
        f"({_per_part(scope, column, function)}) AS parts) AS steps WHERE step > 0"
    )
    return Draft(question, sql, column.unit)


@_template("temporal")
def change_of_period_column(scope: Scope) -> Draft | None:
    """For tables whose rows carry the period: the same places in two years."""
    column, periods = scope.measure(positive=True), scope.table.schema.of_role("period")
    if column is None or not periods:
        return None
    period = periods[0]
    values = sorted({row[period.name] for row in scope.rows} - {None})
    if len(values) < 2:
        return None
    old, new = sorted(scope.rng.sample(values, 2), key=period_key)
    means = [
        f"(SELECT AVG({column.name}) {scope.where(column, filters=((period.name, value),))})"
        for value in (old, new)
    ]
    label = column.label
    question = scope.say("change_of_period_column", label=label, old=old, new=new)
    question += " A decrease is negative."
    return Draft(question, f"SELECT 100.0 * ({means[1]} - {means[0]}) / {means[0]}", "%")


# --- ranking -----------------------------------------------------------------


def _direction(scope: Scope, most: int = 5) -> tuple[str, str, int]:
    """SQL direction, the words for it, and the position counted from 0."""
    position = scope.rng.randint(1, most)
    direction, word = scope.rng.choice((("DESC", "highest"), ("ASC", "lowest")))
    return direction, f"{_ORDINALS[position]}{word}", position - 1


@_template("ranking")
def kth_name(scope: Scope) -> Draft | None:
    column, name = scope.measure(), scope.name_column()
    if column is None or name is None:
        return None
    direction, word, position = _direction(scope)
    question = scope.say("kth_name", word=word, label=column.label, name=name.label)
    tail = f"{scope.where(column)} ORDER BY {column.name} {direction}"
    sql = f"SELECT {name.name} {tail} LIMIT 1 OFFSET {position}"
    return Draft(
        question,
        sql,
        is_text=True,
        ranking=f"SELECT {name.name}, {column.name} {tail}",
        position=position,
        answer_column=name,
    )


@_template("ranking")
def kth_name_of_category(scope: Scope) -> Draft | None:
    column, name, found = scope.measure(), scope.name_column(), scope.category(least=4)
    if column is None or name is None or found is None:
        return None
    category, values = found
    value = scope.rng.choice(values)
    direction, word, position = _direction(scope, 3)
    filters = ((category.name, value),)
    kind = f"{category.label} is {_quoted(value)}"
    question = scope.say(
        "kth_name_of_category", kind=kind, word=word, label=column.label, name=name.label
    )
    tail = f"{scope.where(column, filters=filters)} ORDER BY {column.name} {direction}"
    return Draft(
        question,
        f"SELECT {name.name} {tail} LIMIT 1 OFFSET {position}",
        is_text=True,
        ranking=f"SELECT {name.name}, {column.name} {tail}",
        position=position,
        filters=filters,
        answer_column=name,
    )


@_template("ranking")
def position_of_name(scope: Scope) -> Draft | None:
    column, name = scope.measure(), scope.name_column()
    if column is None or name is None:
        return None
    chosen = scope.rng.choice([row for row in scope.rows if row[column.name] is not None])
    value, shown = chosen[column.name], chosen[name.name]
    question = scope.say("position_of_name", label=column.label, shown=_quoted(shown))
    own = f"(SELECT {column.name} {scope.where(column)} AND {name.name} = {sql_literal(shown)})"
    sql = f"SELECT 1 + COUNT(*) {scope.where(column)} AND {column.name} > {own}"
    distances = (
        f"SELECT {column.name} - {sql_literal(value)} {scope.where(column)} "
        f"AND {name.name} <> {sql_literal(shown)}"
    )
    return Draft(question, sql, exact=True, distances=distances)


@_template("ranking")
def best_category(scope: Scope) -> Draft | None:
    column, found = scope.measure(), scope.category(least=1)
    if column is None or found is None:
        return None
    category = found[0]
    direction, word, position = _direction(scope, 2)
    kind = category.label
    question = scope.say("best_category", kind=kind, word=word, label=column.label)
    tail = (
        f"{scope.where(column, category)} GROUP BY {category.name} "
        f"ORDER BY AVG({column.name}) {direction}"
    )
    return Draft(
        question,
        f"SELECT {category.name} {tail} LIMIT 1 OFFSET {position}",
        is_text=True,
        ranking=f"SELECT {category.name}, AVG({column.name}) {tail}",
        position=position,
        answer_column=category,
    )


@_template("ranking")
def kth_value(scope: Scope) -> Draft | None:
    column = scope.measure()
    if column is None:
        return None
    direction, word, position = _direction(scope)
    label = column.label
    if position == 0:
        return None
    question = scope.say("kth_value", word=word, label=label)
    sql = (
        f"SELECT {column.name} {scope.where(column)} ORDER BY {column.name} {direction} "
        f"LIMIT 1 OFFSET {position}"
    )
    return Draft(question, sql, column.unit, exact=True)


@_template("ranking")
def mean_of_top(scope: Scope) -> Draft | None:
    column = scope.measure()
    if column is None or len(scope.values(column)) < 8:
        return None
    count = scope.rng.randint(2, 5)
    direction, word = scope.rng.choice((("DESC", "highest"), ("ASC", "lowest")))
    label, n = column.label, _NUMBER_WORDS[count]
    question = scope.say("mean_of_top", n=n, word=word, label=label)
    sql = (
        f"SELECT AVG(v) FROM (SELECT {column.name} AS v {scope.where(column)} "
        f"ORDER BY {column.name} {direction} LIMIT {count}) AS ends"
    )
    return Draft(question, sql, column.unit)


# --- several steps -----------------------------------------------------------


def _best_part(scope: Scope, column: Column, direction: str) -> tuple[str, str]:
    """SQL for the document with the extreme mean, and for the ranking that it comes from."""
    ranking = (
        f"SELECT part, v FROM ({_per_part(scope, column, 'AVG')}) AS parts ORDER BY v {direction}"
    )
    return f"({ranking.replace('part, v', 'part', 1)} LIMIT 1)", ranking


@_template("multi_step")
def mean_in_best_part(scope: Scope) -> Draft | None:
    columns = scope.two_measures()
    if columns is None or len(scope.parts) < 2:
        return None
    first, second = columns
    direction, word = scope.rng.choice((("DESC", "highest"), ("ASC", "lowest")))
    best, ranking = _best_part(scope, first, direction)
    unit, names = scope.partition.label, scope.names(scope.parts)
    question = scope.say(
        "mean_in_best_part",
        unit=unit,
        names=names,
        word=word,
        first=first.label,
        second=second.label,
    )
    sql = f"SELECT AVG({second.name}) {scope.where(second)} AND {scope.partition.name} = {best}"
    return Draft(question, sql, second.unit, ranking=ranking)


@_template("multi_step")
def name_in_best_part(scope: Scope) -> Draft | None:
    columns, name = scope.two_measures(), scope.name_column()
    if columns is None or name is None or len(scope.parts) < 2:
        return None
    first, second = columns
    direction, word = scope.rng.choice((("DESC", "highest"), ("ASC", "lowest")))
    best, ranking = _best_part(scope, first, direction)
    unit, names = scope.partition.label, scope.names(scope.parts)
    question = scope.say(
        "name_in_best_part",
        unit=unit,
        names=names,
        word=word,
        first=first.label,
        second=second.label,
        name=name.label,
    )
    where = f"{scope.where(second)} AND {scope.partition.name} = {best}"
    sql = f"SELECT {name.name} {where} ORDER BY {second.name} DESC LIMIT 1"
    top = f"(SELECT MAX({second.name}) {where})"
    distances = f"SELECT 2 - COUNT(*) {where} AND {second.name} = {top}"
    return Draft(
        question, sql, is_text=True, ranking=ranking, distances=distances, answer_column=name
    )


@_template("multi_step")
def count_above_mean(scope: Scope) -> Draft | None:
    column = scope.measure()
    if column is None:
        return None
    label = column.label
    sign, word = scope.rng.choice(((">", "above"), ("<", "below")))
    question = scope.say("count_above_mean", word=word, label=label)
    mean_sql = f"(SELECT AVG({column.name}) {scope.where(column)})"
    sql = f"SELECT COUNT(*) {scope.where(column)} AND {column.name} {sign} {mean_sql}"
    distances = f"SELECT {column.name} - {mean_sql} {scope.where(column)}"
    return Draft(question, sql, exact=True, distances=distances)


@_template("multi_step")
def mean_above_mean(scope: Scope) -> Draft | None:
    columns = scope.two_measures()
    if columns is None:
        return None
    first, second = columns
    question = scope.say("mean_above_mean", first=first.label, second=second.label)
    mean_sql = f"(SELECT AVG({first.name}) {scope.where(first)})"
    sql = f"SELECT AVG({second.name}) {scope.where(first, second)} AND {first.name} > {mean_sql}"
    distances = f"SELECT {first.name} - {mean_sql} {scope.where(first)}"
    return Draft(question, sql, second.unit, distances=distances)


@_template("multi_step")
def value_of_kth(scope: Scope) -> Draft | None:
    columns, name = scope.two_measures(), scope.name_column()
    if columns is None or name is None:
        return None
    first, second = columns
    direction, word, position = _direction(scope)
    question = scope.say("value_of_kth", word=word, first=first.label, second=second.label)
    tail = f"{scope.where(first)} ORDER BY {first.name} {direction}"
    return Draft(
        question,
        f"SELECT {second.name} {tail} LIMIT 1 OFFSET {position}",
        second.unit,
        exact=True,
        ranking=f"SELECT {name.name}, {first.name} {tail}",
        position=position,
    )


@_template("multi_step")
def mean_without_top(scope: Scope) -> Draft | None:
    column = scope.measure()
    if column is None or len(scope.values(column)) < 8:
        return None
    count = scope.rng.randint(2, 5)
    label, n = column.label, _NUMBER_WORDS[count]
    question = scope.say("mean_without_top", n=n, label=label)
    where = scope.where(column)
    tops = f"SELECT {column.name} AS v {where} ORDER BY {column.name} DESC LIMIT {count}"
    dropped = f"(SELECT SUM(v) FROM ({tops}) AS tops)"
    sql = f"SELECT (SUM({column.name}) - {dropped}) * 1.0 / (COUNT(*) - {count}) {where}"
    return Draft(question, sql, column.unit)


@_template("multi_step")
def mean_of_largest_category(scope: Scope) -> Draft | None:
    column, found = scope.measure(), scope.category(least=2)
    if column is None or found is None:
        return None
    category = found[0]
    kind = category.label
    question = scope.say("mean_of_largest_category", kind=kind, label=column.label)
    ranking = (
        f"SELECT {category.name}, COUNT(*) {scope.where(category)} GROUP BY {category.name} "
        "ORDER BY COUNT(*) DESC"
    )
    largest = f"({ranking.replace(', COUNT(*)', '', 1)} LIMIT 1)"
    sql = f"SELECT AVG({column.name}) {scope.where(column)} AND {category.name} = {largest}"
    return Draft(question, sql, column.unit, ranking=ranking)
