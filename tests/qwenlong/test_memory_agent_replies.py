"""What a model or a user wrote, in every form: memory, plan, stop, thinking, split queries."""

import pytest

from qwenlong import prompts
from qwenlong.memory_agent import (
    EVENTS,
    parse_split,
    parse_update,
    says_stop,
    split_by_rule,
    without_thinking,
)

# --- replies ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "reply, memory, plan, events",
    [
        ("<memory>a</memory><plan>p</plan>", "a", "p", []),
        ("Updated memory:\n<memory>\na\n</memory>\n<plan>\np\n</plan>", "a", "p", []),
        ("<MEMORY>a</Memory> < plan >p</ plan >", "a", "p", []),
        ("<plan>p</plan><memory>a</memory>", "a", "p", []),
        ("<memory>a</memory>", "a", "", ["no_plan"]),
        ("<memory>a</memory><plan> </plan>", "a", "", ["no_plan"]),
        ("<memory>draft</memory> no: <memory>a</memory><plan>p</plan>", "a", "p", []),
        ("<memory></memory><plan>p</plan>", "", "p", []),
        (f"<memory>{prompts.AGENT_NO_MEMORY}</memory><plan>p</plan>", "", "p", []),
        # quoted tags: the outermost pair counts, and the tags go
        (
            "<memory>a <memory>b</memory> c</memory><plan>p</plan>",
            "a b c",
            "p",
            ["tags_in_memory"],
        ),
        ("<memory>a <memory> b</memory><plan>p</plan>", "a  b", "p", ["tags_in_memory"]),
        ("<memory>a</section> b</memory><plan>p</plan>", "a b", "p", ["tags_in_memory"]),
        # the end is missing
        ("<memory>a, b", "a, b", "", ["no_plan", "unclosed_memory"]),
        ("<memory>a<plan>p</plan>", "a", "p", ["unclosed_memory"]),
        ("<memory>a</memory><plan>p", "a", "p", []),
        ("<memory>a</memory><plan>p</plan><memory>", "a", "p", []),
        # nothing to use
        ("", None, "", ["no_plan", "no_memory"]),
        ("The price is 4.", None, "", ["no_plan", "no_memory"]),
        ("</memory><plan>p</plan>", None, "p", ["no_memory"]),
        # thinking
        ("<think>x</think><memory>a</memory><plan>p</plan>", "a", "p", ["thinking"]),
        ("x <memory>t</memory></think><memory>a</memory><plan>p</plan>", "a", "p", ["thinking"]),
        ("<think>hm <memory>a</memory><plan>p</plan>", None, "", ["thinking", "only_thinking"]),
    ],
)
def test_parse_update(reply, memory, plan, events):
    found = parse_update(reply)
    assert (found.memory, found.plan, found.events) == (memory, plan, events)
    assert set(events) <= set(EVENTS)


def test_a_long_reply_is_read_in_linear_time():
    reply = "<memory>" * 20_000 + "a" + "</memory>" * 20_000 + "<plan>p</plan>"
    assert parse_update(reply).memory == "a"
    assert parse_update("<memory>" * 50_000).memory == ""


@pytest.mark.parametrize(
    "plan, stops",
    [
        ("STOP", True),
        ("Stop. Everything is known.", True),
        ("**STOP**", True),
        ("STOP: the memory holds it", True),
        ("Stop at the chapter on tea", False),
        ("Do not stop", False),
        ("Stopping rules", False),
        ("", False),
    ],
)
def test_says_stop(plan, stops):
    assert says_stop(plan) == stops


def test_without_thinking():
    assert without_thinking("a </think> b </think> c") == ("c", True, False)
    assert without_thinking(" <think> a") == ("", True, True)
    assert without_thinking("I <think> so") == ("I <think> so", False, False)


# --- the split of a query --------------------------------------------------------


@pytest.mark.parametrize(
    "query, problem, instructions",
    [
        ("Who built the bridge?", "Who built the bridge?", ""),
        ("Who built it? Answer in one word.", "Who built it?", "Answer in one word."),
        (
            'Who built it? Respond with JSON:\n```json\n{"name": "..."}\n```',
            "Who built it?",
            'Respond with JSON:\n```json\n{"name": "..."}\n```',
        ),
        (
            "Answer only with the year. When was it built? Do not explain.",
            "When was it built?",
            "Answer only with the year.\nDo not explain.",
        ),
        (
            "What does this do?\n```python\nprint(1)\n```\nYour answer should be a number.",
            "What does this do?\n```python\nprint(1)\n```",
            "Your answer should be a number.",
        ),
        (f"How much? {prompts.TEXT_INSTRUCTIONS}", "How much?", prompts.TEXT_INSTRUCTIONS),
        # nothing would be left: not split
        ("Answer in one word.", "Answer in one word.", ""),
        # these are questions, though they begin with a verb of form
        ("Give the names of both kings.", "Give the names of both kings.", ""),
        ("List every city of the league.", "List every city of the league.", ""),
        ("Write down who met whom.", "Write down who met whom.", ""),
        ("谁修建了这座桥？", "谁修建了这座桥？", ""),
    ],
)
def test_split_by_rule(query, problem, instructions):
    assert split_by_rule(query) == (problem, instructions)


def test_a_choice_question_keeps_its_options():
    choices = prompts.question_with_choices("Which is right?", ["up", "down"])
    assert split_by_rule(f"{choices}\n{prompts.CHOICE_INSTRUCTIONS}").problem == choices


def test_parse_split():
    reply = "<think>a</think><problem>\nWho?\n</problem>\n<format>One word.</format>"
    assert parse_split(reply) == ("Who?", "One word.")
    assert parse_split("<problem>Who?</problem>") == ("Who?", "")
    assert parse_split("<problem> </problem><format>x</format>") is None
    assert parse_split("no tags") is None
