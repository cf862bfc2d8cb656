"""Filters of samples. Rules run always; a filter that needs a model is ``not_run`` without one.

- ``evidence``: every span lies in its document and holds text; every evidence document has a span.
- ``choices``: two options say the same but for quotes and punctuation, or the answer names none.
- ``answer_leak``: the answer stands in the question, the instructions or the title of the only
  evidence document.
- ``distractor_leak``: a distractor states the answer.
- ``split``: a document belongs to the other split.
- ``length``: the context reached 80 % of its target, and the target holds it.
- ``duplicate_question``: the question was asked before (``find_duplicates``).
- ``grounding``: right without the documents, in ``k`` answers, more often than guessing explains.
- ``robustness``: pass@k with the distractors is 0.
- ``difficulty``: the pass rate of the same k answers lies outside the recipe's bounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from rapidfuzz import fuzz

from qwenlong.data.leaks import AnswerFinder, asks_the_same, entity_terms, normalise
from qwenlong.data.recipe import VerifyConfig
from qwenlong.llm import RequestRefused
from qwenlong.prompts import Message, render
from qwenlong.types import Difficulty, Sample

MODEL_FILTERS = ("grounding", "robustness", "difficulty")


class Asker(Protocol):
    """``k`` answers of a model to one prompt."""

    name: str

    def __call__(self, messages: list[Message], k: int) -> list[str]: ...


def verdict(passed: bool, **details: Any) -> dict[str, Any]:
    return {"verdict": "pass" if passed else "fail", **details}


def verify_sample(
    sample: Sample,
    config: VerifyConfig,
    *,
    resolve: Callable[[str], str],
    normalised: Callable[[str], str] | None = None,
    split_of: Callable[[str], str | None] = lambda ref: None,
    duplicate_of: str | None = None,
    ask: Asker | None = None,
) -> Sample:
    """``sample`` with the verdict of every filter, and ``difficulty`` where a model was asked.

    Args:
        resolve: sha256 of a document -> its text.
        normalised: sha256 of a document -> its text by ``leaks.normalise``; None computes it.
        split_of: sha256 of a document -> its split, None where the corpus does not have it.
        duplicate_of: id of the earlier sample that asks the same, from ``find_duplicates``.
        ask: the model; None leaves the filters of ``MODEL_FILTERS`` ``not_run``.
    """
    normalised = normalised or (lambda ref: normalise(resolve(ref)))
    filters: dict[str, dict[str, Any]] = {
        "evidence": check_evidence(sample, resolve),
        "choices": check_choices(sample),
        "answer_leak": check_answer_leak(sample),
        "distractor_leak": check_distractors(sample, normalised),
        "split": check_split(sample, split_of),
        "length": check_length(sample),
        "duplicate_question": (
            verdict(False, duplicate_of=duplicate_of) if duplicate_of else verdict(True)
        ),
    }
    judged, difficulty, reason = {}, sample.difficulty, "no model"
    if ask is not None and any(v["verdict"] == "fail" for v in filters.values()):
        reason = "failed a rule"  # nothing is paid for a sample that a rule has thrown out
    elif ask is not None:
        judged, difficulty = _ask_model(sample, config, ask, resolve)
        reason = "failed grounding"
    for name in MODEL_FILTERS:
        filters[name] = judged.get(name, {"verdict": "not_run", "reason": reason})
    raw = sample.to_json()
    raw["filters"] = {**raw["filters"], **filters}
    raw["difficulty"] = difficulty.to_json() if difficulty else None
    return Sample.model_validate(raw)


# --- rules -------------------------------------------------------------------


def check_evidence(sample: Sample, resolve: Callable[[str], str]) -> dict[str, Any]:
    texts = {
        d.id: d.text if d.text is not None else resolve(d.ref)
        for d in sample.documents
        if d.role == "evidence"
    }
    if not texts:
        return verdict(False, reason="no evidence document")
    spans: set[str] = set()
    for span in sample.evidence:
        text = texts.get(span.doc)
        if text is None:
            return verdict(False, reason=f"span in distractor {span.doc}")
        if span.end > len(text) or not text[span.start : span.end].strip():
            return verdict(False, reason=f"span [{span.start}, {span.end}) of {span.doc} is empty")
        spans.add(span.doc)
    missing = sorted(set(texts) - spans)
    return verdict(not missing, **({"reason": f"no span in {missing[0]}"} if missing else {}))


def check_choices(sample: Sample) -> dict[str, Any]:
    options = [normalise(choice).strip(" \"'`“”().,;:") for choice in sample.choices or ()]
    if len(set(options)) < len(options):
        return verdict(False, reason="two options say the same")
    if sample.answer_type == "choice":
        letters = {chr(ord("A") + i) for i in range(len(options))}
        if not set(sample.answers) <= letters | set(sample.choices):
            return verdict(False, reason="the answer is no option")
    return verdict(True)


def check_answer_leak(sample: Sample) -> dict[str, Any]:
    finder = AnswerFinder(sample)
    for name, text in (("question", sample.question), ("instructions", sample.instructions)):
        if finder.is_in(normalise(text)):
            return verdict(False, place=name)
    # Where several documents lead to the answer, the last is often a page about it.
    titles = [d.title for d in sample.documents if d.role == "evidence"]
    if len(titles) == 1 and finder.is_in(normalise(titles[0])):
        return verdict(False, place="title")
    return verdict(True)


def check_distractors(sample: Sample, normalised: Callable[[str], str]) -> dict[str, Any]:
    finder = AnswerFinder(sample)
    for document in sample.documents:
        if document.role != "distractor":
            continue
        text = normalise(document.text) if document.text is not None else normalised(document.ref)
        if finder.is_in(text):
            return verdict(False, document=document.id)
    return verdict(True)


def check_split(sample: Sample, split_of: Callable[[str], str | None]) -> dict[str, Any]:
    for document in sample.documents:
        if document.ref and split_of(document.ref) not in (None, sample.split):
            return verdict(False, document=document.id)
    return verdict(True)


def check_length(sample: Sample) -> dict[str, Any]:
    placement = getattr(sample, "placement", None)
    if sample.tokens is None or placement is None:
        return {"verdict": "not_run", "reason": "not extended"}
    target = placement["target_tokens"]
    return verdict(0.8 * target <= sample.tokens.n <= target, tokens=sample.tokens.n, target=target)


# --- duplicates --------------------------------------------------------------


def find_duplicates(
    samples: Iterable[Sample], similarity: float, *, window: int = 64
) -> dict[int, str]:
    """Position of every sample that asks what an earlier one asks -> id of the earlier one.

    Two samples ask the same if their questions are equal but for case, spacing and punctuation and
    they share an answer or an evidence document; or if they share an answer and every name and
    number of the question, no word of content tells them apart (``leaks.asks_the_same``), and the
    wording is at least ``similarity`` alike (0 to 100, the better of rapidfuzz's token sort and
    token set ratio). At most ``window`` earlier questions with the same answer and names are
    compared.
    """
    exact: dict[str, str] = {}
    by_content: dict[tuple, list[tuple[str, str]]] = {}
    duplicates: dict[int, str] = {}
    for position, sample in enumerate(samples):
        question = "".join(c if c.isalnum() else " " for c in normalise(sample.question))
        question = " ".join(question.split())
        answer = tuple(sorted(map(normalise, sample.answers)))
        choices = tuple(sorted(map(normalise, sample.choices or ())))
        evidence = sorted(d.ref or d.id for d in sample.documents if d.role == "evidence")
        keys = [f"{question}|a|{answer}|{choices}"]
        keys += [f"{question}|e|{choices}|{ref}" for ref in evidence]
        earlier = next((exact[key] for key in keys if key in exact), None)
        entities = frozenset(entity_terms(sample.question))
        bucket = by_content.setdefault((answer, choices, entities), [])
        if earlier is None:
            for other_id, other in bucket[-window:]:
                alike = max(fuzz.token_sort_ratio(question, other), _set_ratio(question, other))
                if alike >= similarity and asks_the_same(question.split(), other.split()):
                    earlier = other_id
                    break
        if earlier is not None:
            duplicates[position] = earlier
            continue
        for key in keys:
            exact.setdefault(key, sample.id)
        bucket.append((sample.id, question))
    return duplicates


def _set_ratio(a: str, b: str) -> float:
    """Token set ratio, of questions of similar length: a short one is not in every long one."""
    shorter, longer = sorted((len(a.split()), len(b.split())))
    return fuzz.token_set_ratio(a, b) if shorter >= 0.6 * longer else 0.0


# --- model -------------------------------------------------------------------


def is_correct(sample: Sample, response: str) -> bool:
    from qwenlong.rewards import score

    return score(sample, response).value >= 1.0


def guesses_allowed(k: int, chance: float, alpha: float) -> int:
    """The most right answers in ``k`` that guessing reaches with probability above ``alpha``.

    With one right answer more, the documents were not needed. 0 where chance is 0; never ``k``.
    """
    tail = 1.0  # P(at least c right)
    for c in range(k):
        tail -= math.comb(k, c) * chance**c * (1 - chance) ** (k - c)
        if tail <= alpha:
            return min(c, k - 1)
    return k - 1


def _ask_model(
    sample: Sample, config: VerifyConfig, ask: Asker, resolve: Callable[[str], str]
) -> tuple[dict[str, dict[str, Any]], Difficulty | None]:
    """Verdicts of the filters that could be run, and the difficulty.

    A request that the server refuses, such as one that is too long for it, ends this sample's
    checks. An unavailable server raises: the run is to be continued when it is back.
    """
    judged: dict[str, dict[str, Any]] = {}
    try:
        judged["grounding"] = check_grounding(sample, ask, config)
        if judged["grounding"]["verdict"] == "fail":
            return judged, None
        rate = pass_rate(sample, ask, config.k, resolve)
    except RequestRefused as error:
        refused = {"verdict": "not_run", "reason": f"refused: {error}"}
        return {name: judged.get(name, refused) for name in MODEL_FILTERS}, None
    judged["robustness"] = verdict(rate > 0, k=config.k, pass_rate=rate)
    in_bounds = config.min_pass_rate <= rate <= config.max_pass_rate
    judged["difficulty"] = verdict(in_bounds, k=config.k, pass_rate=rate)
    return judged, Difficulty(model=ask.name, k=config.k, pass_rate=rate)


def check_grounding(sample: Sample, ask: Asker, config: VerifyConfig) -> dict[str, Any]:
    """Closed book: fails if right more often than ``guesses_allowed``."""
    responses = ask(render(sample, "closed_book"), config.k)
    right = sum(is_correct(sample, response) for response in responses)
    chance = 1 / len(sample.choices) if sample.choices else 0.0
    allowed = guesses_allowed(config.k, chance, config.alpha)
    return verdict(right <= allowed, k=config.k, right=right, allowed=allowed)


def pass_rate(sample: Sample, ask: Asker, k: int, resolve: Callable[[str], str]) -> float:
    """Share of ``k`` answers with the whole context that are right."""
    responses = ask(render(sample, "full", resolve=resolve), k)
    return sum(is_correct(sample, response) for response in responses) / k
