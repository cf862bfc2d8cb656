"""Questions that a model sets, solves and judges against itself (route C).

For a set of documents, round after round: a *proposer* writes a question with its answer and the
passages it rests on; a *solver* answers it several times, first without the documents, then with
them; a *verifier* votes on each answer. A proposal that is solved without the documents, or never
with them, is dropped. What is solved becomes a sample and enters the history that the proposer sees
in the next round, where it is asked for something harder (arXiv 2512.12967, section 3; the number
of documents, votes and the closed-book bound follow SPELL).

Every model call goes through the client, so its cache makes an interrupted run continue where it
stopped. The transcript of a sample is its derivation.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from qwenlong.data.documents import SourceDocument
from qwenlong.data.extract import locate
from qwenlong.data.json_replies import parse_json, text_field
from qwenlong.data.leaks import AnswerFinder, normalise
from qwenlong.llm import Request, RequestRefused
from qwenlong.prompts import TEXT_INSTRUCTIONS, fill, judge, render, user
from qwenlong.prompts_synth import PROPOSE, PROPOSE_HISTORY, TASK_TYPES
from qwenlong.rewards.extract import extract_answer, final_text
from qwenlong.rewards.judge import parse_verdict
from qwenlong.rewards.numbers import numbers_match, parse_number
from qwenlong.rewards.text import exact_match
from qwenlong.types import Sample

if TYPE_CHECKING:
    from qwenlong.llm import Client, Completion

NUMBER_TOLERANCE = 0.0015  # relative; two numbers this close need no vote


@dataclass(frozen=True)
class EvolveConfig:
    """Sizes and bounds.

    ``closed_book_bound``: a proposal whose closed-book answers are right at this rate or more is
    dropped. ``votes`` of the verifier decide on one answer; more than half must say yes.
    """

    rounds: int = 4
    documents: int = 5
    history: int = 3
    attempts: int = 4
    closed_book_attempts: int = 2
    closed_book_bound: float = 0.1
    votes: int = 5
    answer_words: int = 30
    temperature: float = 0.7
    max_tokens: int = 2048

    def __post_init__(self) -> None:
        for name in ("rounds", "documents", "attempts", "closed_book_attempts", "votes"):
            if getattr(self, name) < 1:
                raise ValueError(f"evolve: {name} is {getattr(self, name)}; it must be at least 1")


@dataclass(frozen=True)
class Solved:
    """An entry of the history."""

    question: str
    answer: str
    pass_rate: float


@dataclass
class _Proposal:
    sample: Sample
    raw: str
    answers: dict[str, list[dict[str, Any]]] = field(default_factory=dict)


class _Dropped(Exception):
    """The proposal is no use; the message is the reason that is counted."""


def evolve_samples(
    documents: Sequence[SourceDocument],
    *,
    client: Client,
    seed: int,
    limit: int,
    task_type: str = "viewpoint",
    rounds: int = 4,
    max_tokens: int | None = None,
    config: EvolveConfig | None = None,
    dropped: Counter[str] | None = None,
) -> Iterator[Sample]:
    """Samples of task ``reading_qa``, subtype ``task_type``; ends after ``limit``.

    Every document is in one set of ``config.documents`` (of one split), and every set has
    ``rounds`` proposals. Deterministic in (documents, seed, the model's replies).

    Args:
        task_type: of ``prompts_synth.TASK_TYPES``.
        max_tokens: of a reply; None leaves it to ``config``. A recipe gives its model's.
        config: its ``rounds`` is replaced by ``rounds``.
        dropped: counts proposals that gave no sample, by reason.
    """
    if task_type not in TASK_TYPES:
        raise ValueError(f"evolve: unknown task type {task_type!r}; choose of {list(TASK_TYPES)}")
    config = replace(config or EvolveConfig(), rounds=rounds)
    if max_tokens is not None:
        config = replace(config, max_tokens=max_tokens)
    agents = Agents(client, config, dropped if dropped is not None else Counter())
    made = 0
    for members in document_sets(documents, config.documents, seed):
        history: list[Solved] = []
        for level in range(1, rounds + 1):
            if made >= limit:
                return
            try:
                sample = agents.turn(members, task_type, history, level)
            except _Dropped as reason:
                agents.dropped[str(reason)] += 1
                continue
            history.append(Solved(sample.question, sample.answers[0], sample.difficulty.pass_rate))
            made += 1
            yield sample


def document_sets(
    documents: Sequence[SourceDocument], size: int, seed: int
) -> Iterator[list[SourceDocument]]:
    """All documents in sets of ``size`` of one split, shuffled; a last set may be smaller."""
    by_split: dict[str, list[SourceDocument]] = defaultdict(list)
    for document in {document.id: document for document in documents}.values():
        by_split[document.split].append(document)
    for split in sorted(by_split):
        members = sorted(by_split[split], key=lambda document: document.id)
        random.Random(f"{seed}/evolve/{split}").shuffle(members)
        for start in range(0, len(members), size):
            yield members[start : start + size]


class Agents:
    """Proposer, solver and verifier over one client."""

    def __init__(self, client: Client, config: EvolveConfig, dropped: Counter[str]):
        self._client, self._config, self.dropped = client, config, dropped

    def turn(
        self,
        documents: list[SourceDocument],
        task_type: str,
        history: list[Solved],
        level: int,
    ) -> Sample:
        """One proposal, screened, solved and judged. Raises ``_Dropped``."""
        config = self._config
        shown = history[-config.history :]
        proposal = self._propose(documents, task_type, shown, level)
        for old in history:
            if normalise(old.question) == normalise(proposal.sample.question):
                raise _Dropped("the question was asked before")
        blind = self._rate(proposal, "closed_book", config.closed_book_attempts)
        if blind >= config.closed_book_bound:
            raise _Dropped("solved without the documents")
        rate = self._rate(proposal, "full", config.attempts)
        if rate == 0:
            raise _Dropped("never solved with the documents")
        derivation = {
            "kind": "transcript",
            "task_type": task_type,
            "level": level,
            "history": [vars(entry) for entry in shown],
            "proposal": proposal.raw,
            "closed_book": proposal.answers["closed_book"],
            "solver": proposal.answers["full"],
        }
        difficulty = {"model": self._client.model, "k": config.attempts, "pass_rate": rate}
        raw = proposal.sample.to_json() | {"derivation": derivation, "difficulty": difficulty}
        content = json.dumps([raw["question"], raw["answers"], sorted(d.id for d in documents)])
        raw["id"] = f"evolve-{hashlib.sha256(content.encode()).hexdigest()}"[:24]
        return Sample.model_validate(raw)

    # --- proposer ------------------------------------------------------------

    def _propose(
        self,
        documents: list[SourceDocument],
        task_type: str,
        history: list[Solved],
        level: int,
    ) -> _Proposal:
        config = self._config
        shown = "\n\n".join(
            f'<document number="{i}">\n{document.text}\n</document>'
            for i, document in enumerate(documents, 1)
        )
        needed = min(level, len(documents))
        prompt = fill(
            PROPOSE,
            kind=TASK_TYPES[task_type],
            documents=shown,
            history=_history_text(history, level, config.rounds),
            needed="at least one document" if needed == 1 else f"{needed} documents or more",
            words=str(config.answer_words),
        )
        reply = self._ask(user(prompt), 1)[0].text
        try:
            value = parse_json(reply)
            question = text_field(value, "question", most=2_000)
            answer = text_field(value, "answer", most=1_000)
        except ValueError as error:
            raise _Dropped(f"proposal: {error}") from None
        if len(answer.split()) > config.answer_words:
            raise _Dropped("proposal: the answer is too long")
        evidence = _evidence(value.get("quotes"), documents)
        if not evidence:
            raise _Dropped("proposal: no quote is in the documents")
        if len({span["doc"] for span in evidence}) < needed:
            raise _Dropped("proposal: it rests on fewer documents than its level asks for")
        number = parse_number(answer)
        used = {span["doc"] for span in evidence}
        sample = Sample(
            id="evolve-",
            task="reading_qa",
            subtype=task_type,
            split=documents[0].split,
            question=question,
            instructions=TEXT_INSTRUCTIONS,
            documents=[
                {"id": d.id, "title": d.title, "text": d.text} for d in documents if d.id in used
            ],
            answers=[answer],
            answer_type="text" if number is None else "number",
            tolerance=None if number is None else NUMBER_TOLERANCE,
            reward="exact_match" if number is None else "numeric",
            evidence=evidence,
        )
        if AnswerFinder(sample).is_in(normalise(question)):
            raise _Dropped("proposal: the question gives the answer away")
        return _Proposal(sample, reply)

    # --- solver and verifier -------------------------------------------------

    def _rate(self, proposal: _Proposal, mode: str, attempts: int) -> float:
        """Share of right answers; what was said is noted in the proposal."""
        notes = proposal.answers.setdefault(mode, [])
        for reply in self._ask(render(proposal.sample, mode), attempts):
            answer = extract_answer(final_text(reply.text))
            right, votes = (False, []) if answer is None else self._judge(proposal.sample, answer)
            notes.append({"answer": answer, "right": right, "votes": votes})
        return sum(note["right"] for note in notes) / attempts

    def _judge(self, sample: Sample, answer: str) -> tuple[bool, list[bool | None]]:
        """Rule first: equal texts and equal numbers are right. Then the majority of the votes.

        A reply without a verdict, or with both, is a vote for nothing.
        """
        gold = sample.answers[0]
        if exact_match(answer, gold):
            return True, []
        number, wanted = parse_number(answer), parse_number(gold)
        if number is not None and wanted is not None:
            return numbers_match(number, wanted, Fraction(str(NUMBER_TOLERANCE))), []
        replies = self._ask(judge(sample.question, answer, sample.answers), self._config.votes)
        votes = [_vote(reply.text) for reply in replies]
        return 2 * votes.count(True) > self._config.votes, votes

    def _ask(self, messages: list[dict[str, str]], n: int) -> list[Completion]:
        config = self._config
        request = Request.chat(
            messages, temperature=config.temperature, max_tokens=config.max_tokens
        )
        try:
            return self._client.sample(request, n)
        except RequestRefused as refused:
            raise _Dropped(f"the server refused: {str(refused)[:100]}") from None


def _vote(reply: str) -> bool | None:
    verdicts = {mark for mark in ("[[YES]]", "[[NO]]") if mark in final_text(reply).upper()}
    return parse_verdict(reply) if len(verdicts) == 1 else None


def _history_text(history: list[Solved], level: int, levels: int) -> str:
    if not history:
        return ""
    pairs = "\n".join(
        f"- {entry.question} Answer: {entry.answer} ({entry.pass_rate:.0%} right)"
        for entry in history
    )
    return fill(PROPOSE_HISTORY, pairs=pairs, level=str(level), levels=str(levels))


def _evidence(quotes: Any, documents: list[SourceDocument]) -> list[dict[str, Any]]:
    """Spans of the quotes that stand in the document that they name, else in any other."""
    spans = []
    for quote in quotes if isinstance(quotes, list) else []:
        text = quote.get("text") if isinstance(quote, dict) else None
        if not isinstance(text, str) or len(text.split()) < 3:
            continue
        number = quote.get("document")
        is_named = isinstance(number, int) and 1 <= number <= len(documents)
        first = [documents[number - 1]] if is_named else []
        for document in [*first, *documents]:
            found = locate(text.strip(), document.text)
            if found is not None:
                span = {"doc": document.id, "start": found[0], "end": found[1]}
                if span not in spans:
                    spans.append(span)
                break
    return spans
