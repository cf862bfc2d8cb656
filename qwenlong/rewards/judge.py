"""A model that decides whether two answers say the same, with a cache, a budget and a policy."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qwenlong import prompts
from qwenlong.llm import CallCache, Client, LLMError, Request
from qwenlong.rewards.extract import final_text

OnFailure = Literal["zero", "raise", "skip"]

_VERDICT = re.compile(r"\[\[\s*(YES|NO)\s*\]\]", re.IGNORECASE)


class JudgeError(RuntimeError):
    """A verdict is missing and the policy is ``"raise"``."""


@dataclass(frozen=True)
class Verdict:
    """``is_same`` is None where there is no verdict; ``reason`` says why."""

    is_same: bool | None
    reason: str = ""


def parse_verdict(reply: str) -> bool | None:
    """The last ``[[YES]]`` or ``[[NO]]`` after the thinking; None where there is none.

    The last, because a judge may repeat the instructions or quote the answer before it decides.
    """
    found = _VERDICT.findall(final_text(reply))
    return found[-1].upper() == "YES" if found else None


class Judge:
    """Asks ``client`` whether an answer agrees with a gold (prompt: ``prompts.JUDGE``).

    Args:
        client: any client of ``qwenlong.llm``; called at temperature 0.
        cache: verdicts by content, a ``CallCache`` or its directory. Without one they are kept in
            memory. Only verdicts are kept: a failure is asked again.
        max_calls: model calls that may be made in all; cached verdicts are free.
        on_failure: what a missing verdict (server, no verdict in the reply, budget) does: the
            reward stays the rule's (``"zero"``), ``JudgeError``, or the reward is marked
            ``skipped`` (``"skip"``). Its source is ``"error"``.
        max_tokens: of the judge's reply.
        max_answer_chars: of an answer that is shown; of a longer one the end is.

    ``counts`` has the keys ``calls``, ``cached``, ``yes``, ``no`` and ``failed:REASON``.
    """

    def __init__(
        self,
        client: Client,
        *,
        cache: CallCache | str | Path | None = None,
        max_calls: int | None = None,
        on_failure: OnFailure = "zero",
        max_tokens: int = 1024,
        max_answer_chars: int = 4_000,
    ):
        if on_failure not in ("zero", "raise", "skip"):
            raise ValueError(f"Judge: on_failure is {on_failure!r}; choose zero, raise or skip")
        self.client = client
        self.on_failure = on_failure
        self.counts: Counter[str] = Counter()
        self._cache = CallCache(cache) if isinstance(cache, (str, Path)) else cache
        self._memory: dict[str, bool] = {}
        self._max_calls = max_calls
        self._max_tokens = max_tokens
        self._max_answer_chars = max_answer_chars

    def verdict(self, question: str, answer: str, golds: Sequence[str]) -> Verdict:
        """Whether ``answer`` to ``question`` agrees with one of ``golds``."""
        return self.verdicts([(question, answer, golds)])[0]

    def verdicts(self, items: Sequence[tuple[str, str, Sequence[str]]]) -> list[Verdict]:
        """A verdict for each ``(question, answer, golds)``, in order. Equal ones are asked once."""
        requests = [self._request(*item) for item in items]
        keys = [self._key(request) for request in requests]
        verdicts: dict[str, Verdict] = {}
        to_ask: dict[str, Request] = {}
        for key, request in zip(keys, requests, strict=True):
            known = self._known(key)
            if known is not None:
                self.counts["cached"] += 1
                verdicts[key] = Verdict(known)
            elif key in to_ask:
                self.counts["cached"] += 1
            elif self._max_calls is not None and self._calls + len(to_ask) >= self._max_calls:
                verdicts[key] = self._failed("budget", f"{self._max_calls} calls are used up")
            else:
                to_ask[key] = request
        verdicts.update(self._ask(to_ask))
        results = [verdicts[key] for key in keys]
        self.counts["yes"] += sum(v.is_same is True for v in results)
        self.counts["no"] += sum(v.is_same is False for v in results)
        missing = [v for v in results if v.is_same is None]
        if missing and self.on_failure == "raise":
            raise JudgeError(
                f"no verdict for {len(missing)} of {len(results)} answers: {missing[0].reason}"
            )
        return results

    def _ask(self, to_ask: dict[str, Request]) -> dict[str, Verdict]:
        keys = list(to_ask)
        verdicts: dict[str, Verdict] = {}
        stopped = "not asked"
        try:
            for i, reply in self.client.iter_many(to_ask.values(), on_error="yield"):
                self.counts["calls"] += 1
                if isinstance(reply, LLMError):
                    verdicts[keys[i]] = self._failed("refused", str(reply))
                    continue
                is_same = parse_verdict(reply.text)
                if is_same is None:
                    said = " ".join(reply.text.split())[-80:]
                    verdicts[keys[i]] = self._failed("no verdict", f"the judge said {said!r}")
                else:
                    self._keep(keys[i], is_same)
                    verdicts[keys[i]] = Verdict(is_same)
        except LLMError as error:
            stopped = str(error)
        for key in keys:
            if key not in verdicts:
                verdicts[key] = self._failed("unavailable", stopped)
        return verdicts

    @property
    def _calls(self) -> int:
        return self.counts["calls"]

    def _request(self, question: str, answer: str, golds: Sequence[str]) -> Request:
        shown = answer[-self._max_answer_chars :]
        # A verdict that a policy writes into its own answer must not be taken for the judge's.
        question, shown = (_VERDICT.sub(r"(\1)", text) for text in (question, shown))
        return Request.chat(
            prompts.judge(question, shown, list(golds)),
            temperature=0.0,
            max_tokens=self._max_tokens,
        )

    def _key(self, request: Request) -> str:
        content: Any = ["judge", request.key(self.client.model, self.client.namespace)]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def _known(self, key: str) -> bool | None:
        if key in self._memory:
            return self._memory[key]
        row = self._cache.get(key) if self._cache is not None else None
        return None if row is None else bool(row["is_same"])

    def _keep(self, key: str, is_same: bool) -> None:
        self._memory[key] = is_same
        if self._cache is not None:
            self._cache.put(key, {"is_same": is_same})

    def _failed(self, kind: str, reason: str) -> Verdict:
        self.counts[f"failed:{kind}"] += 1
        return Verdict(None, reason)
