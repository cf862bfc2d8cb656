"""Reading by quotes: what a reply repeats of a section is the memory, and nothing else is."""

import asyncio
import re

import pytest

from qwenlong import prompts
from qwenlong.llm import ScriptedClient
from qwenlong.memory_agent import AgentConfig, Chunk, MemoryAgent, run_agent
from qwenlong.memory_agent.quotes import keep_best, quotes_of
from tests.qwenlong.agent_models import WordTokenizer, filler, said

WORDS = WordTokenizer()
CODE = "The access code of the rapid cliff is 1157792."
SECTION = f"""Some first words stand here. {CODE} More words follow, and the access
code of the calm lake is not
given at all.

    def work(x):  # a line of code
        return the_access_code(x)
"""


@pytest.mark.parametrize(
    "reply, quotes",
    [
        (CODE, [CODE]),
        (f'The sentence is: "{CODE}"', [CODE]),
        ("the ACCESS code of the rapid cliff: is 11", [CODE]),  # garbled at its end
        ("The access code of the misty goose is 1157792.", []),  # made up
        ("access code of the rapid", []),  # five words
        ("access code of the rapid cliff", [CODE]),  # six
        ("NONE", []),
        ("", []),
        (
            "access code of the calm lake is not given at all",
            ["More words follow, and the access code of the calm lake is not given at all."],
        ),
        # in the section's order, each once
        (
            f"code of the calm lake is not given. {CODE} {CODE}",
            [CODE, "More words follow, and the access code of the calm lake is not given at all."],
        ),
    ],
)
def test_quotes_of(reply, quotes):
    assert quotes_of(reply, SECTION) == quotes


def test_a_phrase_is_no_quote_and_of_a_long_sentence_the_line_is():
    phrase = "this is what they all say here"
    assert quotes_of(phrase, f"{phrase}. " * 4) == []
    assert quotes_of(phrase, f"{phrase}. " * 3) == [f"{phrase}."]
    table = "\n".join(f"row {i} holds the value number {i * i} and ends" for i in range(100))
    assert quotes_of("row 7 holds the value number 49 and", table) == [
        "row 7 holds the value number 49 and ends"
    ]


def test_a_run_over_two_sentences_belongs_to_one():
    text = "Red is the colour of tea. Green is the colour of coffee."
    assert quotes_of("Red is the colour of tea", text) == ["Red is the colour of tea."]
    assert quotes_of("the colour of tea. Green is", text) == ["Red is the colour of tea."]


def test_what_fits_least_goes_first():
    quotes = ["tea costs 4", "the moon is far", "tea is from China", "the sun is near"]

    def at_most(n):
        return lambda kept: len(kept) <= n

    assert keep_best(quotes, "What does tea cost?", at_most(4)) == quotes
    assert keep_best(quotes, "What does tea cost?", at_most(3)) == quotes[:3]
    assert keep_best(quotes, "What does tea cost?", at_most(2)) == [quotes[0], quotes[2]]
    assert keep_best(quotes, "What does tea cost?", at_most(0)) == []


def hear(reply, *, memory="", words=40, text=SECTION):
    config = AgentConfig(reading="quotes", memory_tokens=words, repairs=3)
    agent = MemoryAgent(config, WORDS, "What is the access code of the rapid cliff?")
    agent.memory = memory
    asked = agent.messages(Chunk(0, text, len(text.split()), 0, len(text)))[-1]["content"]
    assert asked == prompts.agent_quote(agent.problem, text)[-1]["content"]
    step = agent.receive(said(reply))
    assert (agent.memory, agent.plan, step.calls) == (step.memory, "", 1)
    assert step.memory_tokens == len(step.memory.split())
    return step.memory, step.events


def test_one_step():
    old = "An old quote."
    assert hear(f"<think>hm</think>{CODE}", memory=old) == (f"{old}\n{CODE}", ("thinking",))
    assert hear(CODE, memory=CODE) == (CODE, ())  # known
    assert hear("I made this up from what I know.", memory=old) == (old, ("no_quote",))
    assert hear("<think> access code of the rapid cliff") == (
        "", ("thinking", "only_thinking", "no_quote"),
    )  # fmt: skip
    assert hear(CODE, memory=f"{old} The moon is far.", words=9) == (CODE, ("dropped_quotes",))
    assert hear(CODE, memory="", words=8) == ("", ("dropped_quotes",))


def test_limits():
    config = AgentConfig(
        reading="quotes", chunk_tokens=1000, memory_tokens=50, quote_tokens=30, thinking_tokens=5,
        answer_tokens=20,
    )  # fmt: skip
    assert config.update_tokens == 35
    assert config.context_tokens(11) == 11 + 1000 + 35 + 700
    assert MemoryAgent(config, WORDS, "Who?").max_tokens == 35
    with pytest.raises(ValueError, match="reading is 'x'"):
        AgentConfig(reading="x")
    with pytest.raises(ValueError, match="quote_tokens is 0"):
        AgentConfig(quote_tokens=0)


def test_a_reader_that_makes_codes_up_still_finds_the_one_that_stands_there():
    """In each of 40 chunks it claims a code; only the sentence of the text reaches the answer."""

    def reader(messages):
        content = messages[-1]["content"]
        if "<memory>" in content:
            found = re.search(r"cliff is (\d+)", content)
            return f"It is {found.group(1)}."
        return "The access code of the rapid cliff is 123."

    parts = [filler(80, seed=i) for i in range(40)]
    parts[17] += f" {CODE}"
    config = AgentConfig(chunk_tokens=160, memory_tokens=40, reading="quotes")
    with ScriptedClient(reader) as client:
        question = "What is the access code of the rapid cliff?"
        result = asyncio.run(run_agent(client, WORDS, question, " ".join(parts), config))
    assert result.answer == "It is 1157792."
    assert result.calls == config.calls(result.chunks) and result.chunks > 20
    assert result.final_memory == CODE and result.events["no_quote"] == result.chunks - 1
