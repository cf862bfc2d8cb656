"""Question paradigms over a knowledge graph: multi-fact, temporal, causal and hypothetical.

Each function fills a ``Draft`` and returns what is asked; ``compute`` names the arithmetic that
turns the selected values into the answer (``answer_from``). An independent reader can repeat both
from the documents: the query is plain data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from qwenlong.data.graph_draft import Draft, Ref, Rejected
from qwenlong.data.graph_relations import number, offset_seconds, relation_of
from qwenlong.data.knowledge_graph import KnowledgeGraph, Node, Step

_OBFUSCATED = 0.4  # of the anchors are described instead of named
_STARTS = ("country", "airport", "time zone", "module", "class", "")


@dataclass
class Asked:
    """What a paradigm asks: the words, the values that answer it and the arithmetic on them."""

    template: str
    question: str
    select: list[str]
    values: list[str]  # of ``select``, as the documents write them
    compute: dict[str, Any]
    unit: str | None = None
    is_number: bool = False
    sides: int = 1  # chains that are compared or combined


def answer_from(compute: dict[str, Any], values: dict[str, str]) -> str:
    """The answer: ``compute`` over the selected ``values`` (variable -> text)."""
    op = compute["op"]
    if op == "text":
        return values[compute["of"]]
    if op == "number":
        return _plain(number(values[compute["of"]]))
    if op in ("offset_minutes", "offset_seconds"):
        seconds = offset_seconds(values[compute["of"]])
        return _plain(seconds / 60 if op == "offset_minutes" else seconds)
    if op == "difference":
        one, other = (number(values[v]) for v in compute["of"])
        return _plain(abs(one - other))
    if op == "sum":
        return _plain(sum(number(values[v]) for v in compute["of"]))
    if op == "value_at_minimum":
        keys = [number(values[k]) for k in compute["keys"]]
        return answer_from(compute["then"][keys.index(min(keys))], values)
    if op == "clock":
        hours, minutes = (int(p) for p in compute["at"].split(":"))
        seconds = offset_seconds(values[compute["to"]]) - offset_seconds(values[compute["from"]])
        total = (hours * 60 + minutes + seconds // 60 + compute["shift"]) % 1440
        return f"{total // 60:02d}:{total % 60:02d}"
    raise ValueError(f"unknown operation {op!r}")


def _plain(value: float) -> str:
    return f"{value:.0f}" if float(value).is_integer() else f"{value:.10g}"


# --- parts -------------------------------------------------------------------


def _path(draft: Draft, start: Node, length: int) -> list[Step]:
    search = draft.rng.choice([draft.graph.random_walk, draft.graph.breadth_first_path])
    path = search(draft.rng, start, length, draft.documents)
    if path is None:
        raise Rejected
    return path


def _reversed(start: Node, path: list[Step]) -> tuple[Node, list[Step]]:
    """The same path walked from its end to ``start``."""
    nodes = [start, *(s.node for s in path)]
    steps = [
        Step(s.relation, not s.forward or s.relation == "borders", before)
        for s, before in zip(path, nodes[:-1], strict=True)
    ]
    return nodes[-1], steps[::-1]


def _chain_to(draft: Draft, end: Node, length: int, avoid: Sequence[str] = ()) -> Ref:
    """A chain of ``length`` steps that ends in ``end``: walked from there and turned round."""
    if length == 0:
        return draft.described(end, avoid)
    start, path = _reversed(end, _path(draft, end, length))
    _refuse_named_module(start, path)
    return draft.follow_all(draft.anchor(start, _OBFUSCATED, avoid), path, avoid)


def _refuse_named_module(start: Node, path: Sequence[Step]) -> None:
    """A class is named with its module: to ask from one for the other is no step."""
    if path and path[0].relation == "defined_in":
        raise Rejected


def _attribute(draft: Draft, node: Node) -> str | None:
    """A relation that can be asked for: the entity has one object of it."""
    names = [fact[1] for fact in draft.graph.facts_about(node)]
    fitting = [n for n in names if names.count(n) == 1 and relation_of(n).questions]
    return draft.rng.choice(fitting) if fitting else None


def _value_asked(draft: Draft, ref: Ref, relation: str) -> tuple[list[str], list[str], dict, bool]:
    """``(select, values, compute, is_number)`` for a literal of ``ref``."""
    term, value = draft.value(ref, relation)
    info = relation_of(relation)
    if info.object == "offset":
        op = "offset_" + str(info.unit)
    else:
        op = "number" if info.object in ("number", "year") else "text"
    return [term], [value], {"op": op, "of": term}, op != "text"


def _name_asked(ref: Ref) -> tuple[list[str], list[str], dict]:
    """``(select, values, compute)`` for the name of ``ref``."""
    return [ref.term], [ref.node[1]], {"op": "text", "of": ref.term}


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]


# --- multi-fact --------------------------------------------------------------


def multi_fact(draft: Draft, hops: int) -> Asked:
    """A chain of facts to an attribute of its last entity, or to that entity itself."""
    by_name = draft.rng.random() < 0.15
    (start,) = draft.draw(*_STARTS)
    path = _path(draft, start, hops if by_name else hops - 1)
    _refuse_named_module(start, path)
    end = path[-1].node
    relation = None if by_name else _attribute(draft, end)
    before = draft.follow_all(draft.anchor(start, _OBFUSCATED), path[:-1])
    ref = draft.follow(before, path[-1], [relation] if relation else [])
    if relation is None:
        question = draft.say(["What is the name of {}?", "Name {}."], [ref])
        return Asked("chain", question, *_name_asked(ref))
    select, values, compute, is_number = _value_asked(draft, ref, relation)
    info = relation_of(relation)
    question = draft.say(info.questions, [ref])
    return Asked("chain", question, select, values, compute, info.unit, is_number)


# --- temporal ----------------------------------------------------------------

_YEARS = ("mean_time_until", "standard_since")


def _zone(draft: Draft, *relations: str) -> Node:
    """A time zone of which each relation is stated once."""
    for _ in range(10):
        (node,) = draft.draw("time zone")
        if all(len(draft.graph.objects(node[1], r)) == 1 for r in relations):
            return node
    raise Rejected


def temporal_year(draft: Draft, hops: int) -> Asked:
    relation = draft.rng.choice(_YEARS)
    ref = _chain_to(draft, _zone(draft, relation), hops - 1, _YEARS)
    select, values, compute, _ = _value_asked(draft, ref, relation)
    question = draft.say(relation_of(relation).questions, [ref])
    return Asked("year", question, select, values, compute, None, True)


def temporal_gap(draft: Draft, hops: int) -> Asked:
    relation = draft.rng.choice(_YEARS)
    length = max(1, hops // 2 - 1)
    refs = [_chain_to(draft, _zone(draft, relation), length, _YEARS) for _ in range(2)]
    values = [draft.value(r, relation) for r in refs]
    terms = [t for t, _ in values]
    compute = {"op": "difference", "of": terms}
    if answer_from(compute, dict(values)) == "0":
        raise Rejected
    what = {
        "mean_time_until": "the year in which local mean time was given up in",
        "standard_since": "the year since which standard time has been the same in",
    }[relation]
    asks = [
        f"How many years lie between {what} {{0}} and {what} {{1}}?",
        f"Take {what} {{0}}, and {what} {{1}}. How many years apart are the two?",
    ]
    question = draft.say(asks, refs)
    return Asked("gap", question, terms, [v for _, v in values], compute, "years", True, 2)


def temporal_clock(draft: Draft, hops: int, shift: int = 0) -> Asked:
    """The time at one place from the time at another; ``shift`` moves the second, in minutes."""
    length = max(1, hops // 2 - 1)
    avoid = ("standard_offset", "former_offset", "mean_time")
    refs = [_chain_to(draft, _zone(draft, "standard_offset"), length, avoid) for _ in range(2)]
    values = [draft.value(r, "standard_offset") for r in refs]
    if values[0][1] == values[1][1]:
        raise Rejected
    at = f"{draft.rng.randrange(24):02d}:{draft.rng.randrange(0, 60, 5):02d}"
    (one, _), (other, _) = values
    compute = {"op": "clock", "at": at, "from": one, "to": other, "shift": shift}
    ending = "Use standard time, and write the answer as HH:MM."
    if shift:
        direction = "ahead" if shift > 0 else "back"
        asks = [
            f"Suppose that standard time in {{1}} were moved {abs(shift)} minutes {direction}, and "
            f"that nothing changed in {{0}}. What would clocks show in the former when they show "
            f"{at} in the latter? {ending}"
        ]
    else:
        asks = [
            f"Clocks in {{0}} show {at}. What do clocks in {{1}} show at that moment? {ending}",
            f"When it is {at} in {{0}}, what time is it in {{1}}? {ending}",
        ]
    question = draft.say(asks, refs)
    template = "shifted_clock" if shift else "clock"
    return Asked(template, question, [one, other], [v for _, v in values], compute, sides=2)


def temporal_earliest(draft: Draft, hops: int) -> Asked:
    """Of several named airports the one whose time zone changed first, and a fact about it."""
    count = max(2, min(4, hops))
    airports = draft.draw("airport", count=4 * count)
    attribute = draft.rng.choice(["elevation", "icao", "serves", "longitude"])
    names: list[str] = []
    keys: dict[str, str] = {}
    then, select, values = [], [], []
    for node in airports:
        if len(keys) == count:
            break
        zone = draft.graph.objects(node[1], "airport_zone")
        if len(zone) != 1:
            continue
        years = draft.graph.objects(zone[0], "mean_time_until")
        if len(years) != 1 or years[0] in keys.values() or zone[0] in draft.entities.values():
            continue
        ref = draft.constant(node)
        target = draft.pin(("time zone", zone[0]), (node[1], "airport_zone", "?"))
        year, value = draft.value(target, "mean_time_until")
        keys[year] = value
        one, text, compute, _ = _value_asked(draft, ref, attribute)
        then.append(compute)
        names.append(node[1])
        select += [year, *one]
        values += [value, *text]
    if len(keys) < count or len(set(values[1::2])) < count:
        raise Rejected
    compute = {"op": "value_at_minimum", "keys": list(keys), "then": then}
    listed = ", ".join(names[:-1]) + " and " + names[-1]
    info = relation_of(attribute)
    ask = _upper(draft.rng.choice(info.questions).format("that airport"))
    question = draft.rng.choice(
        [
            f"Compare the time zones that the clocks of {listed} keep. At one of these airports "
            f"local mean time was given up before it was at any of the others. {ask}",
            f"Of {listed}, take the airport whose time zone gave up local mean time first. {ask}",
        ]
    )
    is_number = info.object == "number"
    return Asked("earliest", question, select, values, compute, info.unit, is_number, count)


# --- causal ------------------------------------------------------------------


def causal_border(draft: Draft, hops: int) -> Asked:
    """A country closes its borders; the one whose only neighbour it is feels it."""
    pairs = draft.graph.pairs("only_neighbour")
    if not pairs:
        raise Rejected
    victim, country = draft.rng.choice(pairs)
    if len(draft.graph.subjects("only_neighbour", country)) != 1:
        raise Rejected
    ref = _chain_to(draft, ("country", country), max(1, hops - 2), ("only_neighbour",))
    end = draft.pin(("country", victim), ("?", "only_neighbour", ref.term))
    relation = _attribute(draft, end.node)
    if relation is None:
        raise Rejected
    select, values, compute, is_number = _value_asked(draft, end, relation)
    info = relation_of(relation)
    ask = _upper(draft.rng.choice(info.questions).format("that other country"))
    asks = [
        "{} closes all its land borders. As a result exactly one other country has no open land "
        f"border left. {ask}",
        "Because {} shuts every crossing on its land borders, another country loses its only land "
        f"connection to the outside. {ask}",
    ]
    question = draft.say(asks, [ref])
    return Asked("border", question, select, values, compute, info.unit, is_number)


def _ask_module(draft: Draft, end: Ref, hops_left: int) -> tuple[Asked, str]:
    """A fact about a module that the text before has pinned: its size, or its name."""
    if hops_left > 0 and len(draft.graph.objects(end.node[1], "source_lines")) == 1:
        select, values, compute, is_number = _value_asked(draft, end, "source_lines")
        ask = draft.rng.choice(relation_of("source_lines").questions).format("that module")
        return Asked("", "", select, values, compute, "lines", is_number), ask
    asked = Asked("", "", *_name_asked(end))
    return asked, draft.rng.choice(["What is the name of that module?", "Which module is it?"])


def causal_through(draft: Draft, hops: int) -> Asked:
    """A fails without Z, though it does not import Z: one module between them does."""
    (first,) = draft.draw("module")
    imported = set(draft.graph.objects(first[1], "imports"))
    middles: dict[str, list[str]] = {}
    for module in imported:
        for target in draft.graph.objects(module, "imports"):
            if target not in imported and target != first[1]:
                middles.setdefault(target, []).append(module)
    single = sorted((t, m[0]) for t, m in middles.items() if len(m) == 1)
    if not single:
        raise Rejected
    target, middle = draft.rng.choice(single)
    one = draft.anchor(first, _OBFUSCATED, ("imports",))
    term = draft.anchor(("module", target), 0.8, ("imports",))
    through = draft.pin(("module", middle), (one.term, "imports", "?"), ("?", "imports", term.term))
    draft.forbid(one.term, "imports", target, first[1])
    asked, ask = _ask_module(draft, through, hops - 2)
    asks = [
        "Loading {0} fails on an installation without {1}, although {0} does not import it: among "
        f"the modules that {{0}} imports, exactly one imports {{1}} itself. {ask}",
        "{0} does not import {1}, yet it cannot be loaded when {1} is missing, because of the one "
        f"module which it imports and which imports {{1}}. {ask}",
    ]
    asked.question = draft.say(asks, [one, term])
    asked.template = "through"
    return asked


def causal_common(draft: Draft, hops: int) -> Asked:
    """Several modules fail for want of the one module that they all import."""
    (first,) = draft.draw("module")
    first_imports = draft.graph.objects(first[1], "imports")
    if not first_imports:
        raise Rejected
    culprit = draft.rng.choice(first_imports)
    others = [m for m in draft.graph.subjects("imports", culprit) if m != first[1]]
    draft.rng.shuffle(others)
    common = set(first_imports)
    names = [first[1]]
    for other in others:
        shared = common & set(draft.graph.objects(other, "imports"))
        if len(shared) < len(common) or len(names) < 2:
            common = shared
            names.append(other)
        if len(common) == 1 and len(names) >= max(2, min(hops - 1, 4)) or len(names) == 5:
            break
    if len(common) != 1 or len(names) < 2:
        raise Rejected
    ref = draft.pin(("module", culprit), *((name, "imports", "?") for name in names))
    asked, ask = _ask_module(draft, ref, hops - len(names))
    draft.rng.shuffle(names)
    listed = ", ".join(names[:-1]) + " and " + names[-1]
    every = "both" if len(names) == 2 else "all"
    asked.question = draft.rng.choice(
        [
            f"The modules {listed} can no longer be loaded, {every} for the same reason: one "
            f"module that each of them imports has been removed. {ask}",
            f"After a single module was deleted, {listed} {every} stopped working, because each "
            f"of them imports it. {ask}",
        ]
    )
    asked.template = "common_cause"
    return asked


def _ancestors(graph: KnowledgeGraph, name: str, method: str) -> list[str] | None:
    """Bases from ``name`` up to the first that defines ``method``; None where this is unclear."""
    line: list[str] = []
    while True:
        bases = graph.objects(name, "only_base")
        if len(bases) != 1 or bases[0] in line:
            return None
        name = bases[0]
        line.append(name)
        if method in graph.objects(name, "method"):
            return line
        if method in graph.objects(name, "attribute"):
            return None


def _above(graph: KnowledgeGraph, name: str) -> set[str]:
    """Every class that ``name`` derives from, directly or not."""
    found: set[str] = set()
    open_names = [name]
    while open_names:
        for base in graph.objects(open_names.pop(), "derives_from"):
            if base not in found:
                found.add(base)
                open_names.append(base)
    return found


def _inherit(draft: Draft, start: Ref, method: str, line: Sequence[str]) -> Ref:
    """Climb ``line`` by only bases; no class before its end defines ``method``."""
    ref = start
    for i, name in enumerate(line):
        _forbid_method(draft, ref, method)
        atoms = [(ref.term, "only_base", "?")]
        if i == len(line) - 1:
            atoms.append(("?", "method", method))
        ref = draft.pin(("class", name), *atoms)
    return ref


def _forbid_method(draft: Draft, ref: Ref, method: str) -> None:
    for relation in ("method", "attribute"):
        draft.forbid(ref.term, relation, method, ref.node[1])


def _inherited(draft: Draft, hops: int) -> tuple[Node, str, list[str]]:
    """A class, a method that it inherits, and the bases up to the definition."""
    (start,) = draft.draw("class")
    line: list[str] = []
    name = start[1]
    while len(bases := draft.graph.objects(name, "only_base")) == 1 and len(line) < hops - 1:
        name = bases[0]
        line.append(name)
    options = []
    own = {*draft.graph.objects(start[1], "method"), *draft.graph.objects(start[1], "attribute")}
    for depth, base in enumerate(line, 1):
        options += [(m, depth) for m in draft.graph.objects(base, "method") if m not in own]
    deepest = [o for o in options if o[1] >= min(2, len(line))]
    if not deepest:
        raise Rejected
    method, _ = draft.rng.choice(deepest)
    found = _ancestors(draft.graph, start[1], method)
    if found is None:
        raise Rejected
    return start, method, found


def _ask_class(draft: Draft, end: Ref) -> tuple[Asked, str]:
    """A fact about the class that the text before has pinned, or about its module."""
    choice = draft.rng.random()
    if choice < 0.4:
        select, values, compute, is_number = _value_asked(draft, end, "method_count")
        ask = relation_of("method_count").questions[0].format("that class")
        return Asked("", "", select, values, compute, "methods", is_number), ask
    if choice < 0.8:
        (module,) = draft.graph.objects(end.node[1], "defined_in") or [None]
        if module is None:
            raise Rejected
        ref = draft.pin(("module", module), (end.term, "defined_in", "?"))
        select, values, compute, is_number = _value_asked(draft, ref, "source_lines")
        ask = "How many lines does the source of the module that defines that class have?"
        return Asked("", "", select, values, compute, "lines", is_number), ask
    ask = draft.rng.choice(["Which class is it?", "What is the full name of that class?"])
    return Asked("", "", *_name_asked(end)), ask


def causal_inherited(draft: Draft, hops: int) -> Asked:
    """Which class is the cause of what a call does: the nearest ancestor that defines it."""
    start, method, line = _inherited(draft, hops)
    one = draft.anchor(start, _OBFUSCATED, ("method", "derives_from", "only_base"))
    end = _inherit(draft, one, method, line)
    asked, ask = _ask_class(draft, end)
    asks = [
        f"The method {method} is called on an instance of {{}}. That class does not define it "
        "itself, so that the code which runs comes from the nearest class up the line of bases "
        f"that does. {ask}",
        f"A fault appears when {method} is called on an object of {{}}. The faulty code is not in "
        f"that class but in the first class up its line of bases that defines {method}. {ask}",
    ]
    asked.question = draft.say(asks, [one])
    asked.template = "inherited"
    return asked


# --- hypothetical ------------------------------------------------------------


def hypothetical_base(draft: Draft, hops: int) -> Asked:
    """A class gets another base: where would it then inherit a method from?"""
    new_base, method, line = _inherited(draft, hops)
    (changed,) = draft.draw("class")
    if changed == new_base or changed[1] in line or changed[1] in _above(draft.graph, new_base[1]):
        raise Rejected
    one = draft.constant(changed)
    other = draft.anchor(new_base, _OBFUSCATED, ("method", "derives_from", "only_base"))
    _forbid_method(draft, one, method)
    end = _inherit(draft, other, method, line)
    asked, ask = _ask_class(draft, end)
    asks = [
        "Suppose that {0} were changed to have one base only, {1}, with nothing else altered. A "
        f"call of {method} on an instance of {{0}} would then run the definition in the nearest "
        f"class up the new line of bases. {ask}",
    ]
    asked.question = draft.say(asks, [one, other])
    asked.template = "new_base"
    return asked


def hypothetical_union(draft: Draft, hops: int) -> Asked:
    """Countries unite: the sum of a number over them."""
    relation = draft.rng.choice(["area", "population"])
    count = 2 if hops < 5 else draft.rng.choice([2, 3])
    refs = []
    for _ in range(count):
        (end,) = draft.draw("country")
        refs.append(_chain_to(draft, end, max(1, hops // count - 1), (relation,)))
    values = [draft.value(r, relation) for r in refs]
    terms = [t for t, _ in values]
    slots = ", ".join(f"{{{i}}}" for i in range(count - 1)) + f" and {{{count - 1}}}"
    ask = relation_of(relation).questions[0].format("the new state")
    asks = [
        f"Suppose that {slots} united into one state, with their figures otherwise unchanged. "
        f"{ask}",
        f"If {slots} became a single state, what would its {relation} be, going by the figures for "
        "each of them" + (", in square kilometres?" if relation == "area" else "?"),
    ]
    asks[0] = asks[0].replace("What is the", "What would be the")
    question = draft.say(asks, refs)
    unit = relation_of(relation).unit
    compute = {"op": "sum", "of": terms}
    return Asked("union", question, terms, [v for _, v in values], compute, unit, True, count)


def hypothetical_clock(draft: Draft, hops: int) -> Asked:
    return temporal_clock(draft, hops, draft.rng.choice([-1, 1]) * draft.rng.choice([15, 20, 45]))


def hypothetical_imports(draft: Draft, hops: int) -> Asked:
    """A module drops every import that another module has too: which one is left?"""
    (first,) = draft.draw("module")
    imports = draft.graph.objects(first[1], "imports")
    if len(imports) < 2:
        raise Rejected
    others = [
        (other, set(imports) - set(draft.graph.objects(other, "imports")))
        for other in {o for i in imports for o in draft.graph.subjects("imports", i)}
        if other != first[1]
    ]
    single = sorted((o, next(iter(left))) for o, left in others if len(left) == 1)
    if not single:
        raise Rejected
    other, left = draft.rng.choice(single)
    one = draft.anchor(first, _OBFUSCATED, ("imports",))
    two = draft.anchor(("module", other), _OBFUSCATED, ("imports",))
    ref = draft.pin(("module", left), (one.term, "imports", "?"))
    draft.forbid(two.term, "imports", ref.term, other)
    asked, ask = _ask_module(draft, ref, hops - 2)
    asks = [
        "Suppose that {0} stopped importing every module that {1} imports as well. Exactly one of "
        f"its imports would remain. {ask}",
        "If all modules that both {0} and {1} import were struck from the imports of the former, "
        f"a single import would be left there. {ask}",
    ]
    asked.question = draft.say(asks, [one, two])
    asked.template = "imports_left"
    return asked


QuestionFunction = Callable[[Draft, int], Asked]

PARADIGMS: dict[str, tuple[QuestionFunction, ...]] = {
    "multi_fact": (multi_fact,),
    "temporal": (temporal_year, temporal_gap, temporal_clock, temporal_earliest),
    "causal": (causal_border, causal_through, causal_common, causal_inherited),
    "hypothetical": (
        hypothetical_base,
        hypothetical_union,
        hypothetical_clock,
        hypothetical_imports,
    ),
}


def draft_question(draft: Draft, make: QuestionFunction, hops: int) -> Asked | None:
    """The question of ``make``, proved unique over the whole graph; None if it did not work."""
    try:
        asked = make(draft, hops)
        draft.prove(asked.select)
    except Rejected:
        return None
    return asked
