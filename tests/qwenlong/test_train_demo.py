"""The demonstration of training, with a model of twenty thousand weights in place of SmolLM2."""

import json

import pytest
from rich.console import Console

from qwenlong import prompts
from qwenlong.config import load_recipe
from qwenlong.episodes import prompt_ids
from qwenlong.errors import InputError
from qwenlong.models import load_tokenizer
from qwenlong.tiny import model_folder
from qwenlong.train_demo import RECIPE, describe, held_out, run_demo, seeds_table
from tests.qwenlong.train_runs import tiny_needle_recipe


def test_ask_train_ask_again(tmp_path):
    quiet, recipe = Console(quiet=True), tiny_needle_recipe()
    result = run_demo(recipe, tmp_path, 3, greedy=True, console=quiet)
    assert result == json.loads((tmp_path / "result.json").read_text())
    assert (tmp_path / "train-demo.png").stat().st_size > 10_000
    asked = [(row["task"], row["temperature"], row["prompts"]) for row in result["rewards"]]
    tasks = [("all", 12), ("needle", 6), ("reading_qa", 6)]
    assert asked == [(task, t, n) for t in (1.0, 0.0) for task, n in tasks]
    for row in result["rewards"]:
        for when in ("before", "after"):
            assert row[when]["low"] <= row[when]["mean"] <= row[when]["high"]
        gain = row["after"]["mean"] - row["before"]["mean"]
        assert row["gain"]["mean"] == pytest.approx(gain)
    assert "12 held-out prompts over 3 passages" in describe(result)
    head, _, *rows = seeds_table([{**result, "seed": 4}, result]).splitlines()
    assert head.count("|") == 10 and all(row.count("|") == 10 for row in rows)
    assert [row.split(" | ")[0] for row in rows] == ["| 0"] * 6 + ["| 4"] * 6
    assert "| all | 1 | 12 |" in rows[0]

    # What is there is not made again: a row that is changed stays.
    path = tmp_path / "held-out" / "after-2-t1.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({**row, "reward": 1.0}) + "\n" for row in rows))
    again = run_demo(recipe, tmp_path, 3, greedy=False, console=quiet)
    assert again["rewards"][0]["after"]["mean"] == 1.0

    # But a model of more steps is asked for itself, and only it.
    before = path.with_name("before-t1.jsonl").stat().st_mtime_ns
    longer = recipe.model_copy(update={"steps": 3})
    more = run_demo(longer, tmp_path, 3, greedy=False, console=quiet)
    assert more["steps"] == 3 and more["rewards"][0]["after"]["mean"] < 1.0
    assert path.with_name("before-t1.jsonl").stat().st_mtime_ns == before


def test_held_out_questions_fit_and_are_not_trained_on():
    tokenizer = load_tokenizer(model_folder("builtin:tiny"))
    samples = held_out(tiny_needle_recipe(), tokenizer, 3)
    assert len(samples) == 12 and {s.split for s in samples} == {"eval"}
    lengths = [len(prompt_ids(tokenizer, prompts.render(s))) for s in samples]
    assert max(lengths) <= 1500
    narrow = tiny_needle_recipe(data={"max_prompt_tokens": min(lengths)})
    with pytest.raises(InputError, match="held-out passages fit"):
        held_out(narrow, tokenizer, 1_000)
    with pytest.raises(InputError, match="must have the task needle"):
        held_out(tiny_needle_recipe(data={"folder": "x", "tasks": []}), tokenizer, 3)
    with pytest.raises(InputError, match="--passages is 0; it must be at least 1"):
        held_out(tiny_needle_recipe(), tokenizer, 0)


def test_the_recipe_of_the_demo():
    """At least 200 prompts of at least 1,024 tokens are held out, as the README says."""
    recipe = load_recipe(RECIPE)
    assert recipe.data.above_tokens == 1023
    assert 20 * recipe.data.tasks[0].options["questions"] >= 200
