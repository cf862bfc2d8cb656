"""Models that are Python functions: they solve the generated tasks from the text they are shown.

``PerfectReader`` works over a whole context and, in the memory agent, over chunks: its state goes
into the memory as base64, so that any loss on the way breaks it. Needles, variables, counts and
repeated requests are solved from the text alone. For questions over pages and tables it knows which
sentences to look for, and answers only when it has seen all of them.
"""

from __future__ import annotations

import base64
import json
import re
from collections import Counter

from qwenlong.llm import ScriptedClient
from qwenlong.types import Sample
from tests.qwenlong.agent_models import kind_of, part, update

UNKNOWN = "Therefore, the answer is (unknown)."
_CODE = re.compile(r"The access code of the (\w+ \w+) is (\d{7})\.")
_VAR = re.compile(r"VAR (\w+) = (?:VAR )?(\w+)")
_REQUEST = re.compile(r"^User: Quote a passage of (.+?)\.\n\nAssistant: ", re.MULTILINE)
_WORD = re.compile(r"[a-z]+")


def said(answer: str) -> str:
    return f"Therefore, the answer is ({answer})."


class Solver:
    """Reads a text in pieces, keeps what its question needs, answers at the end.

    Args:
        known: sentences to look for and the answer, for questions over pages and tables.
    """

    def __init__(self, question: str, instructions: str, known=None, state: str = ""):
        self.question, self.instructions = question, instructions
        self.carry, self.found = "", {}
        self.sentences, self.answer_known = known or ((), "")
        if state:
            self.carry, self.found = json.loads(base64.b64decode(state))

    @property
    def state(self) -> str:
        return base64.b64encode(json.dumps([self.carry, self.found]).encode()).decode()

    @property
    def kind(self) -> str:
        if self.sentences:
            return "sentences"
        if "passage" in self.question:
            return "requests"
        if "list of words" in self.question:
            return "words"
        return "variables" if "VAR" in self.question else "codes"

    def feed(self, text: str) -> None:
        text = self.carry + text
        if self.kind == "requests":
            starts = [m.start() for m in re.finditer(r"^User: ", text, re.MULTILINE)]
            cut = starts[-1] if starts else 0
        else:
            cut = text.rfind("\n") + 1
        self._read(text[:cut])
        self.carry = text[cut:]

    def _read(self, text: str) -> None:
        if self.kind == "codes":
            for name, value in _CODE.findall(text):
                self.found.setdefault(name, []).append(value)
        elif self.kind == "variables":
            for name, source in _VAR.findall(text):
                self.found[name] = self.found.get(source, source)
        elif self.kind == "words":
            counts = Counter(self.found)
            for line in text.split("\n"):
                if not re.match(r"</?document", line):
                    counts.update(_WORD.findall(line))
            self.found = dict(counts)
        elif self.kind == "requests":
            for turn in re.split(r"^(?=User: )", text, flags=re.MULTILINE):
                asked = _REQUEST.match(turn)
                if asked and f"a passage of {asked.group(1)}. Return" in self.question:
                    passage = turn[asked.end() :].split("\n\n")[0]
                    passage = passage.split("\n</document>")[0]
                    self.found.setdefault("passages", []).append(passage)
        else:
            for number, sentence in enumerate(self.sentences):
                if sentence in text:
                    self.found[str(number)] = True

    def answer(self) -> str:
        self._read(self.carry)
        self.carry = ""
        if self.kind == "codes":
            names = re.findall(r"the (\w+ \w+)(?=[,.?]| and the)", self.question)
            values = [v for name in names for v in self.found.get(name, [])]
            return said(", ".join(values)) if values else UNKNOWN
        if self.kind == "variables":
            value = re.search(r"the value (\d+)\?", self.question).group(1)
            return said(", ".join(n for n, v in self.found.items() if v == value))
        if self.kind == "words":
            count = int(re.search(r"Which (\d+) words", self.question).group(1))
            return said(", ".join(w for w, _ in Counter(self.found).most_common(count)))
        if self.kind == "requests":
            number = int(re.search(r"\((\d+) of \d+ in", self.question).group(1))
            prefix = re.search(r"Begin your response with (\w+) and", self.instructions).group(1)
            passages = self.found.get("passages", [])
            return prefix + (passages[number - 1] if number <= len(passages) else "")
        is_whole = len(self.found) == len(self.sentences)
        return said(self.answer_known) if is_whole else UNKNOWN


class PerfectReader(ScriptedClient):
    """Answers everything that its prompts allow. ``samples``: those whose evidence it may know."""

    solver = Solver

    def __init__(self, samples: list[Sample], **options):
        super().__init__(count_tokens=lambda text: len(text) // 4, **options)
        self._known = {}
        for sample in samples:
            if sample.subtype in ("multihop", "tables"):
                texts = {d.id: d.text for d in sample.documents}
                spans = [texts[e.doc][e.start : e.end] for e in sample.evidence]
                lines = [line for span in spans for line in span.split("\n") if line.strip()]
                self._known[sample.question] = (lines, sample.answers[0])

    def answer(self, request):
        prompt = request.messages[-1]["content"]
        if "<documents>" in prompt:
            shown, _, rest = prompt.partition("<documents>\n")[2].rpartition("\n</documents>")
            question, _, instructions = rest.partition("Question: ")[2].rpartition("\n\n")
            solver = self._solver(question, instructions)
            solver.feed(shown)
            return solver.answer()
        problem = part(prompt, "problem")
        instructions = prompt.rpartition("</memory>")[2]
        memory = part(prompt, "memory")
        solver = self._solver(problem, instructions, "" if memory.startswith("(") else memory)
        if kind_of(prompt) == "answer":
            return solver.answer()
        solver.feed(part(prompt, "section"))
        return update(solver.state)

    def _solver(self, question, instructions, state=""):
        return self.solver(question, instructions, self._known.get(question), state)


class ForgetfulReader(PerfectReader):
    """Forgets its memory: only what the last prompt shows counts."""

    def _solver(self, question, instructions, state=""):
        return self.solver(question, instructions, self._known.get(question))


class DistractorCopier(PerfectReader):
    """Finds the things like the one asked for, and answers with those instead."""

    class solver(Solver):  # noqa: N801  (takes the place of an attribute)
        def answer(self) -> str:
            self._read(self.carry)
            if self.kind == "codes":
                others = [v for n, vs in self.found.items() if n not in self.question for v in vs]
                return said(", ".join(others))
            if self.kind == "variables":
                value = re.search(r"the value (\d+)\?", self.question).group(1)
                return said(", ".join(n for n, v in self.found.items() if v != value))
            return UNKNOWN


class Lister(PerfectReader):
    """Answers with every code and variable of the context."""

    class solver(Solver):  # noqa: N801  (takes the place of an attribute)
        def answer(self) -> str:
            self._read(self.carry)
            if self.kind == "codes":
                return said(", ".join(v for values in self.found.values() for v in values))
            return said(", ".join(self.found)) if self.kind == "variables" else UNKNOWN


class EndlessCopier(PerfectReader):
    """Answers with everything it was shown."""

    def answer(self, request):
        return request.messages[-1]["content"]
