"""Trajectories of the agent: one turn a call, the reward and advantage of the whole."""

import asyncio
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qwenlong import prompts
from qwenlong.advantages import group_advantages
from qwenlong.llm import Completion, EmbeddedClient, ScriptedClient
from qwenlong.memory_agent import AgentConfig, TextSource, chat_ids, run_agent
from qwenlong.policy import loss_totals, pack_trajectories, token_weights
from qwenlong.rewards import score_many
from qwenlong.rollout import EmbeddedRollouts
from qwenlong.rollout.agent import AgentRollouts, trajectory_of
from qwenlong.types import Sample, Turn
from tests.qwenlong.agent_models import PerfectReader, fact, filler, kind_of, update
from tests.qwenlong.tiny_models import save_tiny_model, train_tokenizer

TEMPLATE = (
    "{% for m in messages %}<s>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    made = train_tokenizer()
    made.chat_template = TEMPLATE
    return made


class ScriptedRollouts:
    """Each answer is a function of the prompt's text and the number of the call and row."""

    def __init__(self, tokenizer, reply):
        self.tokenizer, self.reply = tokenizer, reply
        self.rounds = []

    def generate(self, prompts, *, group_size, max_new_tokens, temperature, seed):
        assert group_size == 1 and temperature == 0.7
        self.rounds.append((len(prompts), max_new_tokens, seed))
        groups = []
        for row, ids in enumerate(prompts):
            text = self.reply(self.tokenizer.decode(ids), row)
            answer = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            assert len(answer) <= max_new_tokens
            groups.append(
                [
                    Turn(
                        prompt_ids=list(ids),
                        response_ids=answer,
                        logprobs=[-0.5] * len(answer),
                        finish_reason="stop",
                    )
                ]
            )
        return groups


def sample(name, text, answers):
    return Sample(
        id=name,
        task="reading_qa",
        question="What is the price of tea?",
        documents=[{"id": "d", "text": text}],
        answers=answers,
        answer_type="text",
        reward="sub_em",
    )


CONFIG = AgentConfig(chunk_tokens=800, memory_tokens=400, plan_tokens=100, repairs=3)


@pytest.fixture(scope="module")
def samples():
    long = filler(400) + " " + fact("price", "tea", "four") + " " + filler(400, seed=1)
    short = fact("price", "tea", "nine")
    return [sample("long", long, ["four"]), sample("short", short, ["nine"])]


def test_turns_rounds_and_order(tokenizer, samples):
    reader = PerfectReader()

    def reply(prompt, row):
        if row % 2:  # every second trajectory of a group reads badly
            return "no tags" if kind_of(prompt) == "read" else "unknown"
        return reader([{"content": prompt}])

    rollouts = ScriptedRollouts(tokenizer, reply)
    agent = AgentRollouts(rollouts, tokenizer, CONFIG)
    found = agent.generate(samples, group_size=2, temperature=0.7, seed=5, policy_step=3)
    assert [(t.sample_id, t.group_id, t.rollout_index, t.policy_step) for t in found] == [
        (name, name, i, 3) for name in ("long", "short") for i in (0, 1)
    ]
    K = [t.agent["chunks"] for t in found]
    assert K[0] == K[1] > 3 and K[2] == K[3] == 1
    assert [len(t.turns) for t in found] == [k + 1 for k in K]
    # reading and answering have limits of their own; the short ones are done after two rounds
    update_limit, answer_limit = CONFIG.update_tokens, CONFIG.answer_tokens
    assert [r[:2] for r in rollouts.rounds] == [
        (4, update_limit),
        (2, update_limit),
        (2, answer_limit),
        *[(2, update_limit)] * (K[0] - 2),
        (2, answer_limit),
    ]
    assert len({r[2] for r in rollouts.rounds}) == len(rollouts.rounds)
    # repairs are off: what was malformed is a turn, and the memory stayed
    assert found[1].agent["events"]["no_memory"] == K[1] == found[1].agent["events"]["kept_memory"]
    assert "no_memory" not in found[0].agent["events"]
    answers = [tokenizer.decode(t.turns[-1].response_ids) for t in found]
    assert answers == ["four", "unknown", "nine", "unknown"]


def test_prompts_are_those_of_the_agent_and_leak_no_answer(tokenizer):
    hidden = sample("s", filler(40), ["Zanzibar"])
    rollouts = ScriptedRollouts(tokenizer, lambda prompt, row: update("m", "p"))
    [found] = AgentRollouts(rollouts, tokenizer, CONFIG).generate(
        [hidden], group_size=1, temperature=0.7, seed=0
    )
    shown = [tokenizer.decode(turn.prompt_ids) for turn in found.turns]
    assert not any("Zanzibar" in text for text in shown)
    question = hidden.question
    assert shown[-1].endswith(
        prompts.agent_final(question, prompts.TEXT_INSTRUCTIONS, "m")[-1]["content"] + ">"
    )
    assert prompts.TEXT_INSTRUCTIONS not in shown[0]


def test_the_reward_of_the_answer_is_the_advantage_of_every_turn(tokenizer, samples):
    """One right and one wrong answer: std of (1, 0) is 1/sqrt(2), so the advantages are +-0.707,
    and every token of every turn of a trajectory has its trajectory's."""
    reader = PerfectReader()
    rollouts = ScriptedRollouts(
        tokenizer,
        lambda prompt, row: (
            "the answer is unknown"
            if row % 2 and kind_of(prompt) == "answer"
            else reader([{"content": prompt}])
        ),
    )
    found = AgentRollouts(rollouts, tokenizer, CONFIG).generate(
        samples, group_size=2, temperature=0.7, seed=0
    )
    by_id = {s.id: s for s in samples}
    last = [tokenizer.decode(t.turns[-1].response_ids) for t in found]
    scores = score_many([(by_id[t.sample_id], text) for t, text in zip(found, last, strict=True)])
    rewards = torch.tensor([score.value for score in scores])
    assert rewards.tolist() == [1, 0, 1, 0]
    advantages = group_advantages(rewards, [t.group_id for t in found], scale="group")
    torch.testing.assert_close(
        advantages, torch.tensor([0.5, -0.5] * 2) * 2**0.5, rtol=1e-5, atol=0
    )
    # Every turn is trained on once, as an answer of its trajectory, and a token weighs one over
    # the generated tokens of its group, all turns, and over the groups.
    batches = pack_trajectories(found, [True] * 4, max_tokens=100_000)
    packed = [turn for batch in batches for turn in batch.turns]
    assert sorted(packed) == [(i, j) for i, t in enumerate(found) for j in range(len(t.turns))]
    assert all(b.trajectory_of.tolist() == [i for i, _ in b.turns] for b in batches)
    counted = torch.ones(4, dtype=torch.bool)
    totals = loss_totals(found, counted)
    weights = token_weights(found, counted, "group-token-mean", totals)
    lengths = [sum(len(turn.response_ids) for turn in t.turns) for t in found]
    sizes = [lengths[0] + lengths[1]] * 2 + [lengths[2] + lengths[3]] * 2
    assert sizes[0] > sizes[2] > 0
    torch.testing.assert_close(weights, torch.tensor([1 / (2 * n) for n in sizes]).double())


def test_chunk_first_shares_the_section_within_a_group(tokenizer, samples):
    """With the section first, prompts of one round differ only behind it."""
    count = iter(range(10**6))
    rollouts = ScriptedRollouts(tokenizer, lambda prompt, row: update(f"memory {next(count)}"))
    for order, least in (("chunk_first", CONFIG.chunk_tokens // 2), ("paper", 0)):
        config = AgentConfig(chunk_tokens=800, memory_tokens=400, order=order)
        a, b = AgentRollouts(rollouts, tokenizer, config).generate(
            samples[:1], group_size=2, temperature=0.7, seed=0
        )
        x, y = a.turns[1].prompt_ids, b.turns[1].prompt_ids
        shared = next(i for i, (s, t) in enumerate(zip(x, y, strict=False)) if s != t)
        section_at = tokenizer.decode(x[:shared]).find("</section>")
        assert (section_at >= 0) == (order == "chunk_first") and shared > least


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"), "llama", max_position_embeddings=8192)


def test_with_a_model_in_this_process(tiny):
    """Real sampling: log-probs are those of the model, and a seed gives the same bits."""
    model = AutoModelForCausalLM.from_pretrained(tiny).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    config = AgentConfig(chunk_tokens=64, memory_tokens=16, plan_tokens=8, answer_tokens=8)
    text = filler(40)
    agent = AgentRollouts(EmbeddedRollouts(model), tokenizer, config)
    options = dict(group_size=2, temperature=1.0, seed=7)
    found = agent.generate([sample("s", text, ["x"])], **options)
    again = agent.generate([sample("s", text, ["x"])], **options)
    assert [t.to_json() for t in found] == [t.to_json() for t in again]
    assert found[0].turns[0].prompt_ids == found[1].turns[0].prompt_ids
    assert found[0].turns[0].response_ids != found[1].turns[0].response_ids
    for trajectory in found:
        assert len(trajectory.turns) == trajectory.agent["chunks"] + 1 > 2
        turn = trajectory.turns[-2]
        ids = torch.tensor([turn.prompt_ids + turn.response_ids])
        with torch.inference_mode():
            logits = model(ids).logits[0, len(turn.prompt_ids) - 1 : -1]
        expected = logits.log_softmax(-1).gather(-1, torch.tensor(turn.response_ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(turn.logprobs), expected, rtol=1e-4, atol=1e-4)


# --- from a result ---------------------------------------------------------------


def test_a_recorded_result_becomes_a_trajectory(tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.chat_template = TEMPLATE
    config = AgentConfig(
        chunk_tokens=64, memory_tokens=16, plan_tokens=8, answer_tokens=8, repairs=0
    )
    model = AutoModelForCausalLM.from_pretrained(tiny)
    source = TextSource.from_text(filler(40))
    with EmbeddedClient(model, tokenizer, name="tiny") as client:
        result = asyncio.run(
            run_agent(client, tokenizer, "Who?", source, config, record_turns=True)
        )
    found = trajectory_of(result, sample_id="s", rollout_index=1, policy_step=2)
    assert len(found.turns) == result.chunks + 1 == result.calls
    assert found.group_id == "s" and found.agent["chunks"] == result.chunks
    assert sum(len(t.prompt_ids) for t in found.turns) == result.tokens["prompt"]
    assert sum(len(t.response_ids) for t in found.turns) == result.tokens["completion"]


def test_results_that_cannot_be_a_trajectory(tokenizer):
    async def ask(client, **options):
        return await run_agent(client, tokenizer, "Who?", "text", CONFIG, **options)

    ids = lambda m: Completion(update("m"), "stop", token_ids=(1, 2))  # noqa: E731
    with ScriptedClient(ids) as client:
        whole = asyncio.run(ask(client, record_turns=True))
        assert [t.response_ids for t in trajectory_of(whole, sample_id="s").turns] == [[1, 2]] * 2
        for options in ({}, {"record_turns": True, "steps": whole.trace[:1]}):
            with pytest.raises(ValueError, match="turns of 2 calls"):
                trajectory_of(asyncio.run(ask(client, **options)), sample_id="s")
    with ScriptedClient(lambda m: update("m")) as client:
        with pytest.raises(ValueError, match="return_token_ids"):
            asyncio.run(ask(client, record_turns=True))
    with pytest.raises(ValueError, match="tokenizer, of transformers"):
        asyncio.run(run_agent(client, object(), "Who?", "text", CONFIG, record_turns=True))


def test_chat_ids(tokenizer):
    messages = prompts.user("hello")
    assert tokenizer.decode(chat_ids(tokenizer, messages, CONFIG)) == "<s>hello>"
    plain = train_tokenizer()
    assert plain.decode(chat_ids(plain, messages, CONFIG)) == "hello\n"
