"""The data that crosses the parts of qwenlong, one JSON object a line.

Three records: ``Sample`` (synthesis -> training, evaluation, agent), ``Trajectory`` (rollout ->
training) and ``EvalResult`` (evaluation -> report). Each is validated when it is read, frozen
afterwards, and keeps fields that it does not know, so that a file written by a later version
survives a round trip.
"""

from __future__ import annotations

import hashlib
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

SCHEMA = 1

# The sampler balances over the first five; `needle` has a dense reward (arXiv 2512.12967, section
# 4.2).
TASKS = (
    "multiple_choice",
    "multihop_qa",
    "reading_qa",
    "dialogue_memory",
    "corpus_numeric",
    "needle",
)
AnswerType = Literal["choice", "number", "text", "needle"]
Split = Literal["train", "eval"]


class Record(BaseModel):
    """Frozen, validated, unknown fields kept."""

    model_config = ConfigDict(extra="allow", frozen=True, populate_by_name=True)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types, unknown fields included; what ``model_validate`` reads back."""
        return self.model_dump(mode="json")


class Document(Record):
    """A document of a sample: its text, or the sha256 of a text in ``documents.jsonl`` beside the
    sample file.
    """

    id: str
    title: str = ""
    role: Literal["evidence", "distractor"] = "evidence"
    text: str | None = None
    ref: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")

    @model_validator(mode="after")
    def _text_or_ref(self) -> Document:
        if (self.text is None) == (self.ref is None):
            raise ValueError(f"document {self.id!r} needs exactly one of 'text' and 'ref'")
        return self


class Evidence(Record):
    """Characters ``[start, end)`` of the text of document ``doc`` (its ``id``)."""

    doc: str
    start: int = Field(ge=0)
    end: int = Field(ge=0)

    @model_validator(mode="after")
    def _ordered(self) -> Evidence:
        if self.end < self.start:
            raise ValueError(f"evidence in {self.doc!r} ends at {self.end}, before {self.start}")
        return self


class FilterVerdict(Record):
    """What one filter said. ``not_run`` is not ``pass``: nobody looked."""

    verdict: Literal["pass", "fail", "not_run"]


class Difficulty(Record):
    """``pass_rate`` of ``model`` over ``k`` attempts."""

    model: str
    k: int = Field(ge=1)
    pass_rate: float = Field(ge=0.0, le=1.0)


class TokenCount(Record):
    """Tokens of the rendered documents under the named tokenizer."""

    tokenizer: str
    n: int = Field(ge=0)


class Sample(Record):
    """One question over documents, with its answers and how they were made.

    ``task`` is extensible: a name outside ``TASKS`` is kept as it is. ``split`` follows the hash of
    the documents (``split_of``), so that no document is trained and evaluated on. ``instructions``
    is the answer format, which the memory agent holds back until its last call. ``derivation`` is
    the programme that made the answer.
    """

    schema_version: int = Field(default=SCHEMA, alias="schema")
    id: str
    task: str = Field(min_length=1)
    subtype: str = ""
    split: Split = "train"
    question: str = Field(min_length=1)
    instructions: str = ""
    choices: list[str] | None = None
    documents: list[Document]
    answers: list[str] = Field(min_length=1)
    answer_type: AnswerType
    unit: str | None = None
    tolerance: float | None = Field(default=None, ge=0.0)
    reward: str
    evidence: list[Evidence] = Field(default_factory=list)
    derivation: dict[str, Any] = Field(default_factory=dict)
    filters: dict[str, FilterVerdict] = Field(default_factory=dict)
    difficulty: Difficulty | None = None
    tokens: TokenCount | None = None

    @field_validator("schema_version")
    @classmethod
    def _known_schema(cls, value: int) -> int:
        if value != SCHEMA:
            raise ValueError(f"sample schema is {value}, this version reads {SCHEMA}")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Sample:
        ids = [d.id for d in self.documents]
        if len(set(ids)) != len(ids):
            raise ValueError(f"sample {self.id!r}: document ids are not unique")
        for span in self.evidence:
            if span.doc not in set(ids):
                raise ValueError(
                    f"sample {self.id!r}: evidence names unknown document {span.doc!r}"
                )
        if self.answer_type == "choice" and not self.choices:
            raise ValueError(f"sample {self.id!r}: answer_type 'choice' needs choices")
        kind = self.derivation.get("kind")
        if self.derivation and kind not in ("graph", "sql", "transcript", "template"):
            raise ValueError(f"sample {self.id!r}: derivation.kind is {kind!r}")
        return self

    def to_json(self) -> dict[str, Any]:
        return self.model_dump(mode="json", by_alias=True)


class Turn(Record):
    """One model call. ``logprobs`` are of the temperature-scaled, untruncated distribution, else
    null.
    """

    prompt_ids: list[int]
    response_ids: list[int]
    logprobs: list[float] | None = None
    finish_reason: str
    routed_experts: Any | None = None

    @model_validator(mode="after")
    def _aligned(self) -> Turn:
        if self.logprobs is not None and len(self.logprobs) != len(self.response_ids):
            raise ValueError(
                f"turn has {len(self.response_ids)} response ids and {len(self.logprobs)} logprobs"
            )
        return self


class Reward(Record):
    value: float
    source: Literal["rule", "judge", "error"]


class Trajectory(Record):
    """One rollout: full context is one turn, the memory agent K + 1."""

    sample_id: str
    group_id: str
    rollout_index: int = Field(ge=0)
    policy_step: int = Field(ge=0)
    turns: list[Turn] = Field(min_length=1)
    reward: Reward | None = None
    advantage: float | None = None


class EvalResult(Record):
    sample_id: str
    mode: str
    seed: int
    response: str
    extracted: str | None = None
    score: float
    scorer: str
    tokens: dict[str, int] = Field(default_factory=dict)
    truncated: bool = False
    trace: Any | None = None


def split_of(text: str, *, eval_fraction: float = 0.05) -> Split:
    """Split of a document by its content: the same text is always on the same side."""
    bucket = int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) / 0x1_0000_0000
    return "eval" if bucket < eval_fraction else "train"
