"""Recipes: what is read, what is refused and in which words, and how files build on each other."""

from pathlib import Path

import pytest

from qwenlong.config import MergeRecipe, Recipe, load_recipe, recipe_from
from qwenlong.errors import InputError

RAW = {
    "name": "a",
    "steps": 3,
    "model": {"path": "builtin:tiny"},
    "data": {"folder": "data", "max_prompt_tokens": 100},
    "rollout": {"max_new_tokens": 8},
}


def test_defaults_are_those_of_the_paper():
    recipe = recipe_from(Recipe, RAW)
    assert (recipe.batch.prompts, recipe.batch.group_size) == (128, 8)
    assert recipe.optimizer.learning_rate == 2e-6
    assert recipe.rollout.temperature == 0.7
    assert recipe.loss.updates_per_batch == 1
    assert (recipe.loss.advantage, recipe.loss.aggregation) == ("task", "group-token-mean")
    assert recipe.aepo is None


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"stepz": 3}, "key 'stepz' is unknown; did you mean 'steps'?"),
        ({"rollout": {"max_new_token": 8}}, "key 'rollout.max_new_token' is unknown; did you mean "
         "'max_new_tokens'?"),
        ({"model": {"path": "x", "lora": {"rnk": 4}}}, "did you mean 'rank'?"),
        ({"zzz": 1}, "key 'zzz' is unknown; known keys: name, steps, seed"),
        ({"data": {"folder": "d"}}, "key 'data.max_prompt_tokens' is missing"),
        ({"data": {"max_prompt_tokens": 5}}, "data: give folder"),
        ({"data": {"folder": "d", "above_tokens": 5, "max_prompt_tokens": 5}}, "above_tokens must "
         "be below max_prompt_tokens"),
        ({"data": {"folder": "d", "max_prompt_tokens": 5, "retrospective": {"stages": ["a"],
         "count": 1}}}, "retrospective draws prompts of at most above_tokens"),
        ({"data": {"max_prompt_tokens": 5, "tasks": [{"name": "a", "count": 0}]}},
         "data.tasks.0.count: input should be greater than or equal to 1, got 0"),
        ({"steps": "3"}, "steps: input should be a valid integer, got '3'"),
        ({"steps": True}, "steps: input should be a valid integer, got True"),
        ({"name": "a/b"}, "name: string should match pattern"),
        ({"rollout": {"max_new_tokens": 8, "temperature": 0}}, "rollout.temperature: input should "
         "be greater than 0, got 0"),
        ({"rollout": {"max_new_tokens": 8, "episodes": "memory_agent"}}, "section agent belong"),
        ({"rollout": {"max_new_tokens": 8, "backend": "vllm"}}, "section vllm belong"),
        ({"aepo": {"low": 0.3, "high": 0.2}}, "aepo: low (0.3) must not be above high (0.2)"),
        ({"aepo": {"low": 0.1, "high": 0.2, "mode": "lach"}}, "aepo.mode: input should be 'latch'"),
        ({"engine": {"kind": "deepspeed"}}, "zero_stage (1, 2 or 3) belong together"),
        ({"model": {"path": "x", "lora": {"target_modules": ["lm_head"]}}}, "other than lm_head"),
        ({"model": 3}, "model: input should be a valid dictionary"),
    ],
)  # fmt: skip
def test_refused_in_one_sentence(changes, sentence):
    with pytest.raises(InputError) as error:
        recipe_from(Recipe, {**RAW, **changes})
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def write(folder: Path, name: str, text: str) -> Path:
    file = folder / name
    file.write_text(text, encoding="utf-8")
    return file


BASE = """
name: base
steps: 3
plugins: [mine.py, some.module]
model: {path: models/x}
data: {folder: data, max_prompt_tokens: 100}
rollout: {max_new_tokens: 8}
optimizer: {learning_rate: 2e-6}
"""


def test_a_file_builds_on_another_section_by_section(tmp_path):
    write(tmp_path, "base.yaml", BASE)
    (tmp_path / "sub").mkdir()
    child = (
        "extends: ../base.yaml\nname: child\noptimizer: {weight_decay: 0.5}\nplugins: [own.py]\n"
    )
    recipe = load_recipe(write(tmp_path / "sub", "child.yaml", child))
    assert recipe.name == "child" and recipe.steps == 3
    assert recipe.optimizer.learning_rate == 2e-6  # YAML 1.1 would read text
    assert recipe.optimizer.weight_decay == 0.5
    # paths are relative to the file that says them
    assert recipe.model.path == str(tmp_path / "models" / "x")
    assert recipe.data.folder == str(tmp_path / "data")
    assert recipe.plugins == [str(tmp_path / "sub" / "own.py")]
    assert load_recipe(tmp_path / "base.yaml").plugins == [str(tmp_path / "mine.py"), "some.module"]


def test_builtin_models_are_no_paths(tmp_path):
    file = write(tmp_path, "a.yaml", BASE.replace("models/x", '"builtin:tiny"'))
    assert load_recipe(file).model.path == "builtin:tiny"


def test_a_merge_is_known_by_its_section(tmp_path):
    text = "name: m\nmodel: {path: 'builtin:tiny'}\nmerge: {experts: [a, b], select_topk: 0.5}\n"
    recipe = load_recipe(write(tmp_path, "m.yaml", text))
    assert isinstance(recipe, MergeRecipe) and recipe.merge.experts == ["a", "b"]
    one = text.replace("[a, b]", "[a]")
    with pytest.raises(InputError, match="m.yaml: merge.experts: list should have at least 2"):
        load_recipe(write(tmp_path, "m.yaml", one))


@pytest.mark.parametrize(
    "content, sentence",
    [
        (b"a: [", "is not YAML"),
        (b"- a", "must be a mapping"),
        (b"\xff\xfe", "is not UTF-8"),
        (b"extends: bad.yaml", "extends itself"),
        (b"extends: sub/../bad.yaml", "extends itself"),
        (b"extends: nowhere.yaml", "does not exist"),
        (b"extends: [a]", "extends must name one file"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, content, sentence):
    file = tmp_path / "bad.yaml"
    file.write_bytes(content)
    with pytest.raises(InputError, match=sentence):
        load_recipe(file)


def test_every_recipe_of_the_repository_is_valid():
    folder = Path(__file__).parents[2] / "recipes"
    files = [folder / "train-demo.yaml"]
    for ladder in ("tiny-ladder", "qwenlong-l1.5"):
        files += (folder / ladder).glob("*.yaml")
    assert len(files) >= 15
    for file in files:
        load_recipe(file)
