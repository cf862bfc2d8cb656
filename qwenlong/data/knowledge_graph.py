"""A knowledge graph over many documents: facts with provenance, merging, queries and paths.

Nodes are ``(type, name)``; each edge is one statement of a fact, with the document and the
characters that state it. A query is a conjunction of atoms over variables (names that begin with
``?``), with ranges and absent atoms; ``KnowledgeGraph.solve`` enumerates its answers over the whole
graph, so that "exactly one answer" is a proof and not a hope. Without absent atoms the answers can
only grow with the graph: an answer unique here is unique in any part of the documents as well.
"""

from __future__ import annotations

import random
import re
import unicodedata
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, NamedTuple

import networkx as nx
from rapidfuzz import fuzz

from qwenlong.data.graph_relations import (
    IMPLIED,
    canonical_relation,
    number,
    relation_of,
)
from qwenlong.data.graph_sources import Triple

Node = tuple[str, str]  # (type, name)
Atom = tuple[str, str, str]  # (subject, relation, object), a name or a variable each

MERGE_RATIO = 92.0  # of rapidfuzz, in [0, 100], between normalised names
_MERGE_CHARS = 6  # shorter names are never merged by likeness
_MAX_FRONTIER = 64  # nodes that a breadth-first search keeps of one layer


class Statement(NamedTuple):
    """Where a fact is stated."""

    doc: str
    start: int
    end: int


class Step(NamedTuple):
    """An edge taken by a path. ``forward``: from subject to object."""

    relation: str
    forward: bool
    node: Node


@dataclass
class Query:
    """``select`` of the bindings that satisfy ``where`` and no ``absent``, within the ranges.

    ``ranges`` are ``(variable, low, high)``, both ends included, over numbers and years.
    """

    select: list[str]
    where: list[Atom] = field(default_factory=list)
    absent: list[Atom] = field(default_factory=list)
    ranges: list[tuple[str, float, float]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {
            "select": self.select,
            "where": [list(a) for a in self.where],
            "absent": [list(a) for a in self.absent],
            "ranges": [list(r) for r in self.ranges],
        }


def is_variable(term: str) -> bool:
    return term.startswith("?")


# --- merging -----------------------------------------------------------------


def normalise_name(name: str) -> str:
    """Case, accents, punctuation and a leading article do not matter; dots in code names do."""
    text = unicodedata.normalize("NFKD", name.casefold())
    text = "".join(c for c in text if not unicodedata.combining(c))
    text = " ".join(re.sub(r"[^\w.+]+", " ", text).split())
    return re.sub(r"^(?:the|an?) (?=.)", "", text).strip(".") or name.casefold()


def merge_names(
    names: Iterable[str],
    known: Mapping[str, str],
    *,
    distinct: Iterable[frozenset[str]] = (),
) -> dict[str, str]:
    """Name -> the name that stands for it.

    Args:
        names: names to place, in the order of their first use.
        known: normalised name or alias -> name of an entity that keeps its name.
        distinct: pairs of names that must not become one, such as two objects of one fact.

    A name goes to the known entity with its normal form, else to the earlier name with its normal
    form, else to the one most like it by rapidfuzz (``MERGE_RATIO`` or more, same digits, same
    first letter, not forbidden by ``distinct``), else to itself.
    """
    forbidden: dict[str, set[str]] = defaultdict(set)
    for pair in distinct:
        if len(pair) == 2:
            one, other = pair
            forbidden[one].add(other)
            forbidden[other].add(one)
    canonical = dict(known)
    by_letter: dict[str, list[str]] = defaultdict(list)
    for form in canonical:
        by_letter[form[:1]].append(form)
    members: dict[str, set[str]] = defaultdict(set)
    merged: dict[str, str] = {}
    for name in names:
        form = normalise_name(name)
        if form not in canonical:
            target = None
            if len(form) >= _MERGE_CHARS:
                barred = forbidden[name]
                best = MERGE_RATIO
                for other in by_letter[form[:1]]:
                    ratio = fuzz.ratio(form, other, score_cutoff=best)
                    if not ratio or _digits(form) != _digits(other):
                        continue
                    candidate = canonical[other]
                    if candidate in barred or members[candidate] & barred:
                        continue
                    if target is None or ratio > best:
                        best, target = ratio, candidate
            canonical[form] = target or name
            by_letter[form[:1]].append(form)
        merged[name] = canonical[form]
        members[merged[name]].add(name)
    return merged


def _digits(text: str) -> str:
    return re.sub(r"\D+", " ", text).strip()


# --- graph -------------------------------------------------------------------


class KnowledgeGraph:
    """Facts of many documents in one ``networkx.MultiDiGraph``: an edge for each fact.

    The key of an edge is its relation; its attribute ``statements`` lists where it is stated.

    Args:
        triples: facts whose names are exact (structured sources) and whose relations are in
            ``RELATIONS``, in a fixed order.
        aliases: other name -> name of an entity of ``triples``.
        extracted: facts as a model wrote them. Relations go by their canonical names, entities are
            merged by name into those of ``triples`` and into each other (``merge_names``). A fact
            whose relation does not fit the type of its subject keeps a relation of its own,
            marked by ``~``.
    """

    def __init__(
        self,
        triples: Iterable[Triple],
        aliases: Mapping[str, str] | None = None,
        extracted: Iterable[Triple] = (),
    ):
        self.graph = nx.MultiDiGraph()
        self.merged: dict[str, str] = {}  # extracted names that gave way to another
        self._types: dict[str, str] = {}  # name -> type; "" where two types share the name
        self._objects: dict[tuple[str, str], dict[str, None]] = defaultdict(dict)
        self._subjects: dict[tuple[str, str], dict[str, None]] = defaultdict(dict)
        self._pairs: dict[str, dict[tuple[str, str], None]] = defaultdict(dict)
        self._steps: dict[Node, list[Step]] = {}
        self._names: dict[str, list[str]] = {}
        for triple in triples:
            self._add(triple)
        for triple in self._merge(list(extracted), aliases or {}):
            self._add(triple)

    def _merge(self, triples: list[Triple], aliases: Mapping[str, str]) -> Iterator[Triple]:
        known: dict[str, str] = {}
        for name in self._types:
            known.setdefault(normalise_name(name), name)
        for alias, name in aliases.items():
            if name in self._types:
                known.setdefault(normalise_name(alias), name)
        names: dict[str, None] = {}
        groups: dict[tuple[str, str], dict[str, None]] = defaultdict(dict)
        for triple in triples:
            names.setdefault(triple.subject)
            names.setdefault(triple.object)
            groups[triple.subject, triple.relation].setdefault(triple.object)
        distinct = {frozenset(p) for group in groups.values() for p in combinations(group, 2)}
        placed = merge_names(names, known, distinct=distinct)
        self.merged = {name: to for name, to in placed.items() if name != to}
        for triple in triples:
            name, swapped = canonical_relation(triple.relation)
            subject, obj = placed[triple.subject], placed[triple.object]
            if swapped:
                subject, obj = obj, subject
            relation = relation_of(name)
            fits = relation.subject and self._types.get(subject) == relation.subject
            if fits and relation.joins_entities:
                fits = self._types.get(obj) == relation.object
            yield Triple(subject, name if fits else f"~{name}", obj, *triple[3:])

    def _node(self, entity_type: str, name: str) -> Node:
        return entity_type or self._types.get(name, ""), name

    def _ends(self, atom: Atom) -> tuple[Node, Node]:
        relation = relation_of(atom[1])
        return self._node(relation.subject, atom[0]), self._node(relation.object, atom[2])

    def _add(self, triple: Triple) -> None:
        relation = relation_of(triple.relation)
        atom = (triple.subject, triple.relation, triple.object)
        for entity_type, name in (
            (relation.subject, triple.subject),
            (relation.object if relation.joins_entities else "", triple.object),
        ):
            if entity_type and self._types.setdefault(name, entity_type) != entity_type:
                self._types[name] = ""
        subject, obj = self._ends(atom)
        statement = Statement(triple.doc, triple.start, triple.end)
        if self.graph.has_edge(subject, obj, triple.relation):
            statements = self.graph[subject][obj][triple.relation]["statements"]
            if statement not in statements:
                statements.append(statement)
            return
        self.graph.add_edge(subject, obj, key=triple.relation, statements=[statement])
        self._objects[triple.relation, triple.subject][triple.object] = None
        self._subjects[triple.relation, triple.object][triple.subject] = None
        self._pairs[triple.relation][triple.subject, triple.object] = None

    # facts

    def objects(self, subject: str, relation: str) -> list[str]:
        return list(self._objects.get((relation, subject), ()))

    def subjects(self, relation: str, obj: str) -> list[str]:
        return list(self._subjects.get((relation, obj), ()))

    def pairs(self, relation: str) -> list[tuple[str, str]]:
        """``(subject, object)`` of every fact with ``relation``."""
        return list(self._pairs.get(relation, ()))

    def statements(self, atom: Atom) -> list[Statement]:
        """Where ``atom`` is stated; empty if it is not a fact."""
        subject, obj = self._ends(atom)
        if not self.graph.has_edge(subject, obj, atom[1]):
            return []
        return list(self.graph[subject][obj][atom[1]]["statements"])

    def facts_about(self, node: Node) -> list[Atom]:
        """Facts that have the entity as subject."""
        return [(node[1], name, obj[1]) for _, obj, name in self.graph.out_edges(node, keys=True)]

    def names(self, entity_type: str) -> list[str]:
        """Entities of a type that are the subject of a fact, in the order of the documents."""
        if not self._names:
            for node in self.graph.nodes:
                if self.graph.out_degree(node):
                    self._names.setdefault(node[0], []).append(node[1])
        return self._names.get(entity_type, [])

    def steps(self, node: Node) -> list[Step]:
        """Edges between entities at ``node``, both directions; an implied wider one is left out."""
        if node not in self._steps:
            self._steps[node] = list(self._find_steps(node))
        return self._steps[node]

    def _find_steps(self, node: Node) -> Iterator[Step]:
        found = [
            Step(name, forward, other)
            for forward, edges in (
                (True, [(o, k) for _, o, k in self.graph.out_edges(node, keys=True)]),
                (False, [(s, k) for s, _, k in self.graph.in_edges(node, keys=True)]),
            )
            for other, name in edges
            if other != node and relation_of(name).joins_entities
        ]
        narrow = {(IMPLIED[s.relation], s.forward, s.node) for s in found if s.relation in IMPLIED}
        for step in found:
            # Both countries state a border, and it is said alike in both directions.
            if step not in narrow and not (step.relation == "borders" and not step.forward):
                yield step

    # queries

    def solve(self, query: Query, *, limit: int | None = None) -> list[tuple[str, ...]]:
        """Distinct bindings of ``query.select``, at most ``limit``, by backtracking."""
        ranges = {name: (low, high) for name, low, high in query.ranges}
        answers: dict[tuple[str, ...], None] = {}
        for binding in self._search(list(query.where), {}, ranges):
            if any(self._holds(atom, binding) for atom in query.absent):
                continue
            answers[tuple(binding[v] for v in query.select)] = None
            if limit is not None and len(answers) >= limit:
                break
        return list(answers)

    def _search(
        self,
        atoms: list[Atom],
        binding: dict[str, str],
        ranges: Mapping[str, tuple[float, float]],
    ) -> Iterator[dict[str, str]]:
        if not atoms:
            yield binding
            return
        best = min(range(len(atoms)), key=lambda i: self._cost(atoms[i], binding))
        rest = atoms[:best] + atoms[best + 1 :]
        subject, relation, obj = atoms[best]
        for s, o in self._matches(relation, _bound(subject, binding), _bound(obj, binding)):
            extended = dict(binding)
            fits = True
            for term, value in ((subject, s), (obj, o)):
                if is_variable(term):
                    if extended.setdefault(term, value) != value:
                        fits = False
                    elif term in ranges:
                        low, high = ranges[term]
                        fits = fits and low <= number(value) <= high
            if fits:
                yield from self._search(rest, extended, ranges)

    def _cost(self, atom: Atom, binding: Mapping[str, str]) -> int:
        subject, relation, obj = atom
        s, o = _bound(subject, binding), _bound(obj, binding)
        if s is not None and o is not None:
            return 0
        if s is not None:
            return len(self._objects.get((relation, s), ()))
        if o is not None:
            return len(self._subjects.get((relation, o), ()))
        return 1_000_000 + len(self._pairs.get(relation, ()))

    def _matches(
        self, relation: str, subject: str | None, obj: str | None
    ) -> Iterator[tuple[str, str]]:
        if subject is not None and obj is not None:
            if obj in self._objects.get((relation, subject), ()):
                yield subject, obj
        elif subject is not None:
            for o in self._objects.get((relation, subject), ()):
                yield subject, o
        elif obj is not None:
            for s in self._subjects.get((relation, obj), ()):
                yield s, obj
        else:
            yield from self._pairs.get(relation, ())

    def _holds(self, atom: Atom, binding: Mapping[str, str]) -> bool:
        subject, relation, obj = atom
        found = self._matches(relation, _bound(subject, binding), _bound(obj, binding))
        return next(found, None) is not None

    # paths

    def random_walk(
        self, rng: random.Random, start: Node, length: int, documents: set[str] | None = None
    ) -> list[Step] | None:
        """``length`` steps from ``start`` that visit no entity twice, or None from a dead end.

        Args:
            documents: only facts stated in one of these are taken; None takes all.

        The kind of step is drawn first, so that a country with 400 airports does not always lead
        to an airport; among its edges one stated in a document not used before is preferred.
        """
        seen, used = {start}, set()
        path: list[Step] = []
        node = start
        while len(path) < length:
            kinds: dict[tuple[str, bool], list[Step]] = defaultdict(list)
            for step in self.steps(node):
                if step.node not in seen:
                    kinds[step.relation, step.forward].append(step)
            keys = list(kinds)
            rng.shuffle(keys)
            for key in keys:
                chosen = self._pick(rng, node, kinds[key], used, documents)
                if chosen is not None:
                    break
            else:
                return None
            step, doc = chosen
            used.add(doc)
            seen.add(step.node)
            path.append(step)
            node = step.node
        return path

    def _pick(
        self,
        rng: random.Random,
        node: Node,
        steps: list[Step],
        used: set[str],
        documents: set[str] | None,
    ) -> tuple[Step, str] | None:
        second = None
        for step in rng.sample(steps, min(len(steps), 8)):
            docs = [
                s.doc
                for s in self.statements(step_atom(node, step))
                if documents is None or s.doc in documents
            ]
            fresh = [d for d in docs if d not in used]
            if fresh:
                return step, fresh[0]
            if docs and second is None:
                second = step, docs[0]
        return second

    def breadth_first_path(
        self, rng: random.Random, start: Node, length: int, documents: set[str] | None = None
    ) -> list[Step] | None:
        """A shortest path of ``length`` steps from ``start``, or None if nothing lies that far.

        Of four ends at that distance, drawn at random, the one is taken whose path is stated in
        most documents.
        """
        came: dict[Node, tuple[Node, Step] | None] = {start: None}
        layer = deque([start])
        for _ in range(length):
            following: deque[Node] = deque()
            for node in layer:
                for step in self.steps(node):
                    if step.node in came or len(following) >= _MAX_FRONTIER:
                        continue
                    stated = self.statements(step_atom(node, step))
                    if documents is None or any(s.doc in documents for s in stated):
                        came[step.node] = (node, step)
                        following.append(step.node)
            layer = following
            if not layer:
                return None
            shuffled = list(layer)
            rng.shuffle(shuffled)
            layer = deque(shuffled)
        best: list[Step] | None = None
        most = -1
        for end in list(layer)[:4]:
            path: list[Step] = []
            docs = set()
            node = end
            while (link := came[node]) is not None:
                path.append(link[1])
                docs.add(self.statements(step_atom(*link))[0].doc)
                node = link[0]
            if len(docs) > most:
                best, most = path[::-1], len(docs)
        return best


def step_atom(node: Node, step: Step) -> Atom:
    """The fact that ``step`` uses, taken from ``node``."""
    if step.forward:
        return node[1], step.relation, step.node[1]
    return step.node[1], step.relation, node[1]


def _bound(term: str, binding: Mapping[str, str]) -> str | None:
    return binding.get(term) if is_variable(term) else term
