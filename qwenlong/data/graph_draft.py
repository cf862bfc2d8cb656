"""A question in the making: variables, the query that pins them, the facts behind it, the words.

Every variable is pinned as it is added: if its place in the chain fits several entities, facts
about the meant one are added as clauses until one entity is left. So every "the country that ..."
denotes exactly one country of the graph.
"""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from qwenlong.data.graph_relations import noun, number, phrase, relation_of
from qwenlong.data.knowledge_graph import (
    Atom,
    KnowledgeGraph,
    Node,
    Query,
    Statement,
    Step,
    step_atom,
)

_MAX_CLAUSES = 4  # about one entity, beside its place in the chain


class Rejected(Exception):
    """This draft cannot become a question; try another."""


@dataclass(eq=False)
class Ref:
    """An entity in a question: a constant, or a variable with the clauses that describe it.

    A clause is a format and what fills its ``{}``: another ``Ref`` or words. ``link`` is the index
    of the clause that joins the variable to the chain, None for a described one.
    """

    node: Node
    term: str  # a name, or a variable
    clauses: list[tuple[str, Ref | str]] = field(default_factory=list)
    link: int | None = None

    @property
    def is_variable(self) -> bool:
        return bool(self.clauses)


class Draft:
    """Builds one question over ``graph`` from facts stated in ``documents`` (ids).

    ``pages`` has the document of an entity and its length, ``pool`` the entities of each type that
    a chain may begin or end with.
    """

    def __init__(
        self,
        graph: KnowledgeGraph,
        rng: random.Random,
        documents: set[str],
        pages: Mapping[str, tuple[str, int]],
        pool: Mapping[str, Sequence[Node]],
    ):
        self.graph, self.rng, self.documents = graph, rng, documents
        self._pages, self._pool = pages, pool
        self.query = Query([])
        self.facts: list[tuple[Atom, Statement]] = []  # one for each atom of ``query.where``
        self.checked: list[Statement] = []  # where an absent fact would be
        self.chain: list[Atom] = []  # facts that lead to the answer, without the clauses
        self.variables: list[Ref] = []  # those that the question introduces by their clauses
        self.entities: dict[str, str] = {}  # variable -> entity, of every variable
        self.obfuscation: str | None = None
        self._next = 0

    def draw(self, *entity_types: str, count: int = 1) -> list[Node]:
        """``count`` entities of one of the types, each with a page among the documents."""
        usable = [t for t in entity_types if len(self._pool.get(t, ())) >= count]
        if not usable:
            raise Rejected
        return self.rng.sample(self._pool[self.rng.choice(usable)], count)

    # facts and terms

    def new_term(self) -> str:
        self._next += 1
        return f"?{chr(96 + self._next)}" if self._next <= 26 else f"?v{self._next}"

    def _require(self, atom: Atom, fact: Atom) -> None:
        """Add ``atom`` to the query, with ``fact``, its instance, as evidence."""
        stated = [s for s in self.graph.statements(fact) if s.doc in self.documents]
        if not stated:
            raise Rejected
        used = {s.doc for _, s in self.facts}
        best = next((s for s in stated if s.doc not in used), stated[0])
        self.query.where.append(atom)
        self.facts.append((fact, best))

    def forbid(self, subject: str, relation: str, obj: str, page: str) -> None:
        """Add an absent atom; the evidence is what the page of ``page`` says of ``relation``."""
        if page not in self._pages or self._pages[page][0] not in self.documents:
            raise Rejected
        doc, length = self._pages[page]
        stated = [
            s
            for other in self.graph.objects(page, relation)
            for s in self.graph.statements((page, relation, other))
            if s.doc == doc
        ]
        self.query.absent.append((subject, relation, obj))
        self.checked.extend(dict.fromkeys(stated or [Statement(doc, 0, length)]))

    # entities

    def constant(self, node: Node) -> Ref:
        return Ref(node, node[1])

    def described(self, node: Node, avoid: Iterable[str] = ()) -> Ref:
        """The entity by a description that fits it alone, without its name.

        A described entity is obfuscated: by a vague period where a year is among the clauses
        ("temporal"), else by what it is and does ("institutional").
        """
        ref = Ref(node, self.new_term())
        self._narrow(ref, self.graph.names(node[0]), set(avoid))
        if not ref.clauses:
            raise Rejected
        self.obfuscation = self.obfuscation or "institutional"
        self._introduce(ref)
        return ref

    def anchor(self, node: Node, probability: float, avoid: Iterable[str] = ()) -> Ref:
        """``described`` with that probability, else ``constant``."""
        if self.rng.random() < probability:
            return self.described(node, avoid)
        return self.constant(node)

    def follow(self, source: Ref, step: Step, avoid: Iterable[str] = ()) -> Ref:
        """The entity one step on, pinned. ``avoid``: relations that its clauses must not use."""
        relation = relation_of(step.relation)
        ref = Ref(step.node, self.new_term())
        fact = step_atom(source.node, step)
        if step.forward:
            self._require((source.term, step.relation, ref.term), fact)
            clause = relation.about_object
            candidates = self.graph.objects(source.node[1], step.relation)
        else:
            self._require((ref.term, step.relation, source.term), fact)
            clause = relation.about_subject
            candidates = self.graph.subjects(step.relation, source.node[1])
        self.chain.append(fact)
        self._narrow(ref, candidates, {*avoid, step.relation})
        ref.link = len(ref.clauses)
        ref.clauses.append((clause, source))
        self._introduce(ref)
        return ref

    def follow_all(self, source: Ref, path: Sequence[Step], avoid: Iterable[str] = ()) -> Ref:
        for step in path:
            source = self.follow(source, step, avoid)
        return source

    def pin(self, node: Node, *atoms: Atom) -> Ref:
        """An entity that the question's words pin down, by ``atoms`` with ``"?"`` in its place.

        The other end of an atom is a name or a variable.
        """
        ref = Ref(node, self.new_term())
        self._register(ref)
        for subject, relation, obj in atoms:
            atom = tuple(ref.term if t == "?" else t for t in (subject, relation, obj))
            fact = tuple(self.entities.get(t, t) for t in atom)
            self._require(atom, fact)
            self.chain.append(fact)
        return ref

    def value(self, ref: Ref, relation: str) -> tuple[str, str]:
        """``(variable, value)`` of a literal that the entity has exactly one of."""
        objects = self.graph.objects(ref.node[1], relation)
        if len(objects) != 1 or objects[0] in self.entities.values():
            raise Rejected
        term = self.new_term()
        fact = (ref.node[1], relation, objects[0])
        self._require((ref.term, relation, term), fact)
        self.chain.append(fact)
        return term, objects[0]

    def _introduce(self, ref: Ref) -> None:
        self._register(ref)
        self.variables.append(ref)

    def _register(self, ref: Ref) -> None:
        if ref.node[1] in self.entities.values():
            raise Rejected  # the same entity twice: the path closed on itself
        self.entities[ref.term] = ref.node[1]

    # clauses

    def _narrow(self, ref: Ref, candidates: Collection[str], avoid: set[str]) -> None:
        """Add clauses until ``candidates`` is the entity alone."""
        facts = [
            fact
            for fact in self.graph.facts_about(ref.node)
            if relation_of(fact[1]).vague and fact[1] not in avoid
        ]
        self.rng.shuffle(facts)
        if self.rng.random() < 0.5:
            facts.sort(key=lambda fact: relation_of(fact[1]).object != "year")
        used: set[str] = set()
        for fact in facts:
            if len(candidates) == 1 or len(ref.clauses) >= _MAX_CLAUSES:
                break
            if fact[1] in used or fact[2] in self.entities.values():
                continue
            relation = relation_of(fact[1])
            if relation.object in ("number", "year"):
                low, high, words = _vague_range(self.rng, relation.object, number(fact[2]))
                fitting = {
                    c
                    for c in candidates
                    if any(low <= number(o) <= high for o in self.graph.objects(c, fact[1]))
                }
            else:
                low = high = None
                words = phrase(relation.object, fact[2])
                fitting = set(self.graph.subjects(fact[1], fact[2])).intersection(candidates)
            if len(fitting) == len(candidates):
                continue
            if low is None:
                self._require((ref.term, fact[1], fact[2]), fact)
            else:
                term = self.new_term()
                self._require((ref.term, fact[1], term), fact)
                self.query.ranges.append((term, low, high))
                if relation.object == "year":
                    self.obfuscation = "temporal"
            ref.clauses.append((relation.about_subject, words))
            used.add(fact[1])
            candidates = fitting
        if len(candidates) != 1:
            raise Rejected

    # proof

    def prove(self, select: list[str]) -> None:
        """Check over the whole graph that every entity and every selected value is the only one."""
        self.query.select = select
        everything = Query(
            [*self.entities, *(t for t in select if t not in self.entities)],
            self.query.where,
            self.query.absent,
            self.query.ranges,
        )
        answers = self.graph.solve(everything, limit=2)
        if len(answers) != 1:
            raise Rejected
        found = dict(zip(everything.select, answers[0], strict=True))
        if any(found[term] != name for term, name in self.entities.items()):
            raise Rejected

    # words

    def say(self, asks: Sequence[str], slots: Sequence[Ref]) -> str:
        """The question: one of ``asks`` with ``slots`` in its ``{}``, in one of three styles.

        Nested ("... of the country that ..."), with letters ("Let A be ... . What is ... of A?"),
        or step by step ("Start from ... . Then take ..."). A style is used only where it is clear.
        """
        ask = self.rng.choice(list(asks))
        styles = []
        repeated = any(s.is_variable and ask.count(f"{{{i}}}") > 1 for i, s in enumerate(slots))
        clear = all(_is_nestable(s, len(slots) == 1) for s in slots)
        if clear and not repeated and len(self.variables) <= 3:
            styles += ["nested"]
        if self.variables and (len(self.variables) > 1 or not styles):
            styles += ["letters"]
        if len(slots) == 1 and self._is_single_chain(slots[0]):
            styles += ["steps"]
        style = self.rng.choice(styles)
        if style == "nested":
            return _sentence(ask.format(*(noun_phrase(s) for s in slots)))
        if style == "steps":
            return self._say_steps(ask)
        frame = self.rng.choice(["Let {1} be {0}.", "{1} is {0}.", "By {1} we mean {0}."])
        letters: dict[Ref, str] = {}
        sentences = []
        for ref in self.variables:
            words = noun_phrase(ref, letters)
            letters[ref] = chr(65 + len(letters))
            sentences.append(frame.format(words, letters[ref]))
        sentences.append(_sentence(ask.format(*(noun_phrase(s, letters) for s in slots))))
        return " ".join(sentences)

    def _is_single_chain(self, end: Ref) -> bool:
        return (
            len(self.variables) > 1
            and self.variables[-1] is end
            and all(
                ref.link is not None and ref.clauses[ref.link][1] is before
                for before, ref in zip(self.variables[:-1], self.variables[1:], strict=True)
            )
        )

    def _say_steps(self, ask: str) -> str:
        first, rest = self.variables[0], self.variables[1:]
        sentences = [self.rng.choice(["Start from {}.", "Begin with {}."])]
        sentences[0] = sentences[0].format(noun_phrase(first))
        before = first
        verbs = self.rng.sample(["Then take {}.", "From there go to {}.", "Next find {}."], 3)
        for i, ref in enumerate(rest):
            words = noun_phrase(ref, {before: f"that {noun(before.node[0])}"})
            sentences.append(verbs[i % 3].format(words))
            before = ref
        sentences.append(_sentence(ask.format(f"that {noun(before.node[0])}")))
        return " ".join(sentences)


def noun_phrase(ref: Ref, names: Mapping[Ref, str] | None = None) -> str:
    """``ref`` in words: its name in ``names``, a constant, or a noun with its clauses."""
    if names and ref in names:
        return names[ref]
    if not ref.is_variable:
        return phrase(*ref.node)
    clauses = [
        form.format(noun_phrase(arg, names) if isinstance(arg, Ref) else arg)
        for form, arg in ref.clauses
    ]
    if len(clauses) > 1:
        clauses = [", ".join(clauses[:-1]) + " and " + clauses[-1]]
    return f"the {noun(ref.node[0])} {clauses[0]}"


def _is_nestable(ref: Ref, outermost: bool = True) -> bool:
    """Whether the clauses cannot be read as belonging to another noun."""
    if not ref.is_variable:
        return True
    if not outermost and len(ref.clauses) > 1:
        return False
    return all(_is_nestable(arg, False) for _, arg in ref.clauses if isinstance(arg, Ref))


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _vague_range(rng: random.Random, kind: str, value: float) -> tuple[float, float, str]:
    """A round interval around ``value``, both ends included, and its words."""
    if kind == "year":
        decade = int(value) // 10 * 10
        if rng.random() < 0.5:
            return decade, decade + 9, f"the {decade}s"
        half, low = ("first", decade) if value < decade + 5 else ("second", decade + 5)
        return low, low + 4, f"the {half} half of the {decade}s"
    step = max(1.0, 10 ** math.floor(math.log10(max(value, 1.0))) / 2)
    low = math.floor(value / step) * step
    return low, low + step, f"between {low:,.0f} and {low + step:,.0f}"
