"""Proposer, solver and verifier, played by scripts: good, lying, lazy and malformed."""

from __future__ import annotations

import json
import re
from collections import Counter

import pytest

from qwenlong.data.documents import SourceDocument
from qwenlong.data.evolve import EvolveConfig, document_sets, evolve_samples
from qwenlong.data.recipe import RouteConfig
from qwenlong.data.routes import route_samples
from qwenlong.llm import RequestRefused, ScriptedClient, ServerUnavailable
from qwenlong.prompts_synth import TASK_TYPES
from qwenlong.types import Sample

SECRETS = ("amber", "birch", "cobalt", "damson", "ebony", "fuchsia")


def _documents(count=3):
    """Documents that each hold one password; all of one split."""
    documents = []
    number = 0
    while len(documents) < count:
        secret = SECRETS[len(documents)]
        text = f"Archive {number}.\nThe keeper of vault {number} chose the password {secret}."
        document = SourceDocument(title=f"Vault {number}", text=text, source="vaults")
        if document.split == "train":
            documents.append(document)
        number += 1
    return documents


class Agents(ScriptedClient):
    """All three agents. Subclasses misbehave in one place.

    The proposer asks for the passwords of as many vaults as its level wants; the solver reads them
    from the documents that it is shown; the verifier compares sets of words.
    """

    def answer(self, request):
        prompt = request.messages[0]["content"]
        if prompt.startswith("You set a question"):
            return self.propose(prompt, request)
        if prompt.startswith("You compare two answers"):
            return self.verify(prompt, request)
        if prompt.startswith("Answer the question from what you know"):
            return self.solve_blind(prompt, request)
        return self.solve(prompt, request)

    def propose(self, prompt, request):
        found = re.findall(r'number="(\d+)">\nArchive (\d+)\.\nThe (.+? (\w+))\.', prompt)
        needed = (
            int(m.group(1)) if (m := re.search(r"passages from (\d+) documents", prompt)) else 1
        )
        chosen = found[:needed]
        return json.dumps(
            {
                "question": f"Which passwords guard the vaults {', '.join(c[1] for c in chosen)}?",
                "answer": " and ".join(c[3] for c in chosen),
                "quotes": [{"document": int(c[0]), "text": c[2]} for c in chosen],
            }
        )

    def solve(self, prompt, request):
        asked = re.findall(r"\d+", prompt.split("Question: ")[1].split("\n")[0])
        words = [re.search(rf"vault {n} chose the password (\w+)", prompt).group(1) for n in asked]
        return f"Reading. Therefore, the answer is ({', '.join(reversed(words))})."

    def solve_blind(self, prompt, request):
        return "Therefore, the answer is (I do not know)."

    def verify(self, prompt, request):
        said = prompt.split("<candidate_answer>\n")[1].split("\n</candidate")[0]
        gold = prompt.split("<reference_answer>\n")[1].split("\n</reference")[0]
        names = [set(re.findall(r"\w+", text)) - {"and"} for text in (said, gold)]
        return "Compared. " + ("[[YES]]" if names[0] == names[1] else "[[NO]]")


def evolved(client, *, documents=None, limit=10, **options):
    dropped = Counter()
    options.setdefault("task_type", "causal")
    made = list(
        evolve_samples(
            documents or _documents(), client=client, seed=0, limit=limit, dropped=dropped,
            **options,
        )
    )  # fmt: skip
    return made, dropped


# --- a good model ------------------------------------------------------------


def test_good_agents_make_harder_questions_round_by_round():
    client = Agents()
    documents = _documents(3)
    made, dropped = evolved(client, documents=documents, rounds=3)
    assert not dropped and len(made) == 3
    assert [len(sample.documents) for sample in made] == [1, 2, 3]  # level by level
    texts = {document.id: document.text for document in documents}
    for level, sample in enumerate(made, 1):
        assert Sample.model_validate(json.loads(json.dumps(sample.to_json()))) == sample
        assert (sample.task, sample.subtype, sample.split) == ("reading_qa", "causal", "train")
        assert sample.id.startswith("evolve-") and len(sample.id) == 24
        assert sample.difficulty.model_dump() == {"model": "scripted", "k": 4, "pass_rate": 1.0}
        assert {span.doc for span in sample.evidence} == {d.id for d in sample.documents}
        for span in sample.evidence:
            assert "chose the password" in texts[span.doc][span.start : span.end]
        story = sample.derivation
        assert (story["kind"], story["task_type"], story["level"]) == (
            "transcript",
            "causal",
            level,
        )
        assert len(story["history"]) == level - 1
        assert json.loads(story["proposal"])["answer"] == sample.answers[0]
        assert [note["right"] for note in story["solver"]] == [True] * 4
        assert [note["right"] for note in story["closed_book"]] == [False] * 2
    assert made[1].derivation["solver"][0]["votes"] == [True] * 5


def test_the_proposer_sees_the_history():
    client = Agents()
    made, _ = evolved(client, rounds=3)
    prompts = [call.messages[0]["content"] for call in client.calls]
    proposals = [prompt for prompt in prompts if prompt.startswith("You set a question")]
    assert "have been asked" not in proposals[0]
    assert made[0].question in proposals[1] and "(100% right)" in proposals[1]
    assert "level 3 of 3" in proposals[2] and TASK_TYPES["causal"] in proposals[2]
    blind = [prompt for prompt in prompts if prompt.startswith("Answer the question from what")]
    assert blind and not any("chose the password" in prompt for prompt in blind)


def test_the_history_shown_is_bounded():
    client = Agents()
    evolved(client, documents=_documents(4), rounds=4, config=EvolveConfig(history=1))
    last = [c.messages[0]["content"] for c in client.calls if "level 4 of 4" in str(c.messages)]
    assert last and all(prompt.count("right)") == 1 for prompt in last)


def test_the_limit_holds_and_splits_stay_apart():
    made, _ = evolved(Agents(), limit=1)
    assert len(made) == 1
    assert evolved(Agents(), limit=0)[0] == []
    mixed = [SourceDocument(text=f"text {i}", source="s") for i in range(120)]
    sets = list(document_sets(mixed, 5, seed=1))
    assert sorted(d.id for members in sets for d in members) == sorted(d.id for d in mixed)
    assert all(len({d.split for d in members}) == 1 for members in sets)
    assert (
        sets == list(document_sets(mixed[::-1], 5, seed=1)) != list(document_sets(mixed, 5, seed=2))
    )


def test_a_dead_server_loses_nothing_that_was_answered(tmp_path):
    class Dies(Agents):
        def answer(self, request):
            if len(self.calls) > 25:
                raise ServerUnavailable("the machine is gone")
            return super().answer(request)

    undisturbed = Agents(cache=tmp_path / "whole")
    whole, _ = evolved(undisturbed, rounds=3)
    undisturbed.close()
    assert whole == evolved(Agents(), rounds=3)[0]
    first = Dies(cache=tmp_path / "calls")
    with pytest.raises(ServerUnavailable):
        evolved(first, rounds=3)
    first.close()
    second = Agents(cache=tmp_path / "calls")
    assert evolved(second, rounds=3)[0] == whole
    second.close()
    assert first.totals.answers > 10
    assert second.totals.answers == undisturbed.totals.answers - first.totals.answers


# --- models that are not -----------------------------------------------------


def _proposal(**changes):
    class Changed(Agents):
        def propose(self, prompt, request):
            value = json.loads(super().propose(prompt, request)) | changes
            return json.dumps({k: v for k, v in value.items() if v is not None})

    return Changed()


def _saying(**methods):
    """Agents with some replies fixed."""
    replies = {
        name: (lambda reply: lambda self, p, r: reply)(text) for name, text in methods.items()
    }
    return type("Saying", (Agents,), replies)()


@pytest.mark.parametrize(
    "client, reason",
    [
        (_saying(propose="I would rather not."), "proposal: the reply holds no JSON dict"),
        (_saying(propose=""), "proposal: the reply holds no JSON dict"),
        (_saying(propose='{"question": "Why'), "proposal: the reply has no 'answer'"),
        (_saying(propose="[]"), "proposal: the reply holds no JSON dict"),
        (_proposal(question=None), "proposal: the reply has no 'question'"),
        (_proposal(answer=""), "proposal: the reply has no 'answer'"),
        (_proposal(answer=["a"]), "proposal: the reply has no 'answer'"),
        (_proposal(answer="word " * 31), "proposal: the answer is too long"),
        (_proposal(quotes=None), "proposal: no quote is in the documents"),
        (_proposal(quotes="all of it"), "proposal: no quote is in the documents"),
        (_proposal(quotes=[{"document": 1, "text": "The keeper forgot the password of it"}]),
         "proposal: no quote is in the documents"),
        (_proposal(quotes=[{"document": 1, "text": "The keeper"}]),
         "proposal: no quote is in the documents"),
        (_proposal(question="Is it amber, birch or cobalt?"),
         "proposal: the question gives the answer away"),
    ],
)  # fmt: skip
def test_useless_proposals_are_dropped(client, reason):
    made, dropped = evolved(client, rounds=1)
    assert made == [] and dropped == {reason: 1}


def test_a_proposal_must_use_the_documents_of_its_level():
    class Narrow(Agents):
        def propose(self, prompt, request):
            value = json.loads(super().propose(prompt, request))
            return json.dumps(value | {"quotes": value["quotes"][:1]})

    made, dropped = evolved(Narrow(), rounds=3)
    assert len(made) == 1
    assert dropped == {"proposal: it rests on fewer documents than its level asks for": 2}


def test_a_question_asked_twice_is_dropped():
    class Forgetful(Agents):
        def propose(self, prompt, request):
            value = json.loads(super().propose(prompt, request))
            return json.dumps(value | {"question": "Which passwords guard the vaults 0?"})

    documents = _documents(1)
    number = re.search(r"vault (\d+)", documents[0].text).group(1)
    assert number == "0"
    made, dropped = evolved(Forgetful(), documents=documents, rounds=3)
    assert len(made) == 1 and dropped == {"the question was asked before": 2}


class Knows(Agents):
    """Knows the passwords by heart, so the documents are not needed."""

    def solve_blind(self, prompt, request):
        return "Therefore, the answer is (amber or birch or cobalt)."

    def verify(self, prompt, request):
        return "[[YES]]"


def test_what_is_solved_without_documents_is_too_easy():
    made, dropped = evolved(Knows(), rounds=2)
    assert made == [] and dropped == {"solved without the documents": 2}

    # One right closed-book answer of two is over the bound, and under one of 0.6.
    class Half(Knows):
        def solve_blind(self, prompt, request):
            known = super().solve_blind(prompt, request)
            return known if request.sample_index == 0 else "Who knows."

    assert evolved(Half(), rounds=1)[1] == {"solved without the documents": 1}
    config = EvolveConfig(closed_book_bound=0.6)
    assert len(evolved(Half(), rounds=1, config=config)[0]) == 1


@pytest.mark.parametrize(
    "client",
    [
        _saying(solve="Therefore, the answer is (granite)."),
        _saying(solve=""),
        _saying(solve="<think>the answer is amber, no, birch"),
        _saying(solve="No idea what is meant."),
    ],
)
def test_what_is_never_solved_is_dropped(client):
    made, dropped = evolved(client, rounds=2)
    assert made == [] and dropped == {"never solved with the documents": 2}


@pytest.mark.parametrize(
    "votes, is_right",
    [
        (["[[YES]]"] * 5, True),
        (["[[YES]]", "[[YES]]", "[[YES]]", "[[NO]]", "[[NO]]"], True),
        (["[[YES]]", "[[YES]]", "[[NO]]", "[[NO]]", "[[NO]]"], False),
        (["[[YES]]", "[[YES]]", "", "hm", "I abstain"], False),  # 2 of 5 are no majority
        (["[[YES]] or [[NO]]"] * 5, False),  # contradictory votes are votes for nothing
        (["[[YES]]", "[[YES]]", "[[YES]]", "[[YES]] [[NO]]", ""], True),
        (["<think>[[YES]]"] * 5, False),
        (["yes"] * 5, False),
    ],
)
def test_the_majority_of_the_votes_decides(votes, is_right):
    class Voters(Agents):
        def solve(self, prompt, request):
            return "Therefore, the answer is (a stone of that name)."

        def verify(self, prompt, request):
            said = prompt.split("<candidate_answer>\n")[1]
            return votes[request.sample_index] if said.startswith("a stone") else "[[NO]]"

    made, dropped = evolved(Voters(), rounds=1)
    assert len(made) == int(is_right), dropped
    if is_right:
        wanted = [{"[[YES]]": True, "[[NO]]": False}.get(vote) for vote in votes]
        assert made[0].derivation["solver"][0]["votes"] == wanted


@pytest.mark.parametrize(
    "gold, said, is_right",
    [
        ("12,500", "12500", True),
        ("12500", "12,510", True),  # 0.08 % apart
        ("12500", "12,600", False),
        ("12.5 %", "0.125", True),
        ("about 40 people", "40", True),
    ],
)
def test_numbers_are_compared_by_rule_with_a_tolerance(gold, said, is_right):
    class Counts(Agents):
        def propose(self, prompt, request):
            return json.dumps(json.loads(super().propose(prompt, request)) | {"answer": gold})

        def solve(self, prompt, request):
            return f"Therefore, the answer is ({said})."

        def verify(self, prompt, request):
            said_here = prompt.split("<candidate_answer>\n")[1]
            assert not said_here.startswith(said), "a number must not be put to the vote"
            return "[[NO]]"

    made, _ = evolved(Counts(), rounds=1)
    assert len(made) == int(is_right)
    if made:
        assert made[0].answer_type == "number" and made[0].reward == "numeric"
        assert made[0].derivation["solver"][0]["votes"] == []


def test_partly_solved_questions_keep_their_pass_rate():
    class Tired(Agents):
        def solve(self, prompt, request):
            good = super().solve(prompt, request)
            return good if request.sample_index < 1 else "Therefore, the answer is (unclear)."

    made, _ = evolved(Tired(), rounds=1)
    assert made[0].difficulty.pass_rate == 0.25


def test_a_refusing_server_costs_the_round_only():
    class Refuses(Agents):
        def propose(self, prompt, request):
            if "level 2" in prompt:
                raise RequestRefused("content filter")
            return super().propose(prompt, request)

    made, dropped = evolved(Refuses(), rounds=3)
    assert len(made) == 2 and dropped == {"the server refused: content filter": 1}


def test_wrong_arguments():
    with pytest.raises(ValueError, match="unknown task type 'poetry'"):
        evolved(Agents(), task_type="poetry")
    with pytest.raises(ValueError, match="votes is 0"):
        EvolveConfig(votes=0)
    assert list(evolve_samples([], client=Agents(), seed=0, limit=3)) == []


def test_replies_are_as_long_as_the_recipe_says():
    def longest(options, max_tokens):
        client = Agents()
        route = RouteConfig(route="evolve", limit=1, options=options)
        made = list(
            route_samples(
                route, _documents(), seed=0, limit=1, client=client, max_tokens=max_tokens
            )
        )
        assert len(made) == 1
        (bound,) = {request.sampling.max_tokens for request in client.calls}
        return bound

    assert longest({}, 321) == 321
    assert longest({"max_tokens": 123}, 321) == 123
    assert longest({}, None) == EvolveConfig().max_tokens


@pytest.mark.parametrize("name, options", [("multihop", {}), ("tables", {"read_tables": True})])
def test_routes_that_read_with_a_model_keep_the_recipe_s_bound(name, options):
    client = ScriptedClient(lambda messages: "no JSON")
    route = RouteConfig(route=name, limit=1, options=options)
    documents = _documents()
    assert not list(route_samples(route, documents, seed=0, limit=1, client=client, max_tokens=321))
    assert {request.sampling.max_tokens for request in client.calls} == {321}
