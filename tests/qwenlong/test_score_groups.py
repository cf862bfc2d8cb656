"""qwenlong score --answers: prompts read once, runs that go on where they were stopped."""

import json

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from qlkernels.scorer import Scorer
from qwenlong import score_groups
from qwenlong.cli import main
from qwenlong.errors import InputError
from qwenlong.models import load_tokenizer
from qwenlong.score import ScoreSettings
from qwenlong.score_groups import run_groups
from qwenlong.score_model import ScorerReader
from tests.qwenlong.test_score import main_fails
from tests.qwenlong.tiny_models import TEXT, save_tiny_model

GROUPS = [
    {"id": "times", "prompt": TEXT[:200], "answers": ["It was the age", "the worst", ""]},
    {"prompt_ids": [5, 6, 7], "answer_ids": [[8, 9], [10, 11, 12, 13], []]},
    {"id": "東京", "prompt": "dog", "answers": []},
    {"id": 4, "prompt_ids": [3], "answers": ["a fox"]},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"), "qwen3", bos=True)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "groups.jsonl"
    path.write_text("\n".join(json.dumps(group, ensure_ascii=False) for group in GROUPS) + "\n\n")
    return path


def run(folder, file, *, force=False, **options):
    settings = ScoreSettings(model=str(folder), input=str(file), **options)
    return run_groups(settings, file.parent / "out", Console(quiet=True), force=force)


def as_ids(folder):
    tokenizer = load_tokenizer(folder)
    for group in GROUPS:
        prompt = group.get("prompt_ids") or tokenizer(group["prompt"]).input_ids
        answers = group.get("answer_ids")
        if answers is None:
            answers = [
                tokenizer(a, add_special_tokens=False).input_ids if a else []
                for a in group["answers"]
            ]
        yield prompt, answers


@pytest.mark.parametrize("stream", [False, True])
def test_answers_score_as_after_their_whole_prompt(folder, file, stream):
    summary = run(folder, file, temperature=0.8, stream_weights=stream)
    out = file.parent / "out"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    lines = [json.loads(line) for line in (out / "groups.jsonl").read_text().splitlines()]
    tokens = nats = 0
    for number, (prompt, answers) in enumerate(as_ids(folder)):
        scores = load_file(out / "groups" / f"{number:06d}.safetensors")
        assert scores["answer_offsets"].tolist() == [0, *np.cumsum([len(a) for a in answers])]
        assert scores["answer_ids"].tolist() == [i for answer in answers for i in answer]
        assert [a["tokens"] for a in lines[number]["answers"]] == [len(a) for a in answers]
        for k, answer in enumerate(answers):
            if not answer:
                assert lines[number]["answers"][k]["mean_entropy"] is None
                continue
            ids = torch.tensor([*prompt, *answer])
            with torch.no_grad():
                logits = model(ids[None]).logits[0, len(prompt) - 1 : -1] / 0.8
            logp = logits.log_softmax(-1)
            want = logp.gather(-1, ids[len(prompt) :, None])[:, 0].numpy()
            a, b = scores["answer_offsets"][k : k + 2]
            np.testing.assert_allclose(scores["logprobs"][a:b], want, atol=1e-4, rtol=0)
            np.testing.assert_allclose(
                scores["entropy"][a:b], -(logp.exp() * logp).sum(-1).numpy(), atol=1e-4, rtol=0
            )
            assert lines[number]["answers"][k]["logprob"] == pytest.approx(want.sum(), abs=1e-3)
            tokens, nats = tokens + len(answer), nats - want.sum()
    assert summary["scored_tokens"] == tokens and summary["groups"] == 4
    assert summary["nats_per_token"] == pytest.approx(nats / tokens, rel=1e-5)
    assert summary["weights"] == ("streamed" if stream else "resident")
    assert [line["id"] for line in lines] == ["times", None, "東京", "4"]
    assert json.loads((out / "scores.json").read_text()) == summary
    assert (out / "scores.png").read_bytes().startswith(b"\x89PNG")


def test_rows_are_counted_by_hand(folder, file):
    file.write_text('{"prompt_ids": [1, 2, 3, 4], "answer_ids": [[5, 6], [7], []]}\n')
    summary = run(folder, file)
    assert summary["rows_read"] == 3 + 2 + 1
    assert summary["rows_without_sharing"] == (3 + 2) + (3 + 1)
    assert (summary["answers"], summary["scored_tokens"]) == (3, 3)


def one_at_a_time(monkeypatch):
    """Every group is a pass of its own."""
    monkeypatch.setitem(score_groups.packed.__globals__["PASS_TOKENS"], "cpu", 1)


def test_a_run_that_was_stopped_goes_on(folder, file, monkeypatch):
    one_at_a_time(monkeypatch)
    whole = run(folder, file)
    out = file.parent / "out"
    kept = {p.name: p.read_bytes() for p in (out / "groups").iterdir()}
    lines = (out / "groups.jsonl").read_bytes()

    read = ScorerReader.read_groups
    calls = []

    def stops_at_the_third(self, layout, *rest):
        calls.append(layout)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return read(self, layout, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(ScorerReader, "read_groups", stops_at_the_third)
        with pytest.raises(KeyboardInterrupt):
            run(folder, file, force=True)
    assert len((out / "groups.jsonl").read_text().splitlines()) == 2
    assert not (out / "scores.json").exists()
    with open(out / "groups.jsonl", "ab") as torn:
        torn.write(b'{"line": 2, "torn')
    calls.clear()
    with monkeypatch.context() as patch:
        patch.setattr(ScorerReader, "read_groups", lambda *a: calls.append(a[1]) or read(*a))
        again = run(folder, file, chunk_tokens=3)  # speed may change
    assert len(calls) == 2 and again["scored_now"] == 2
    assert (out / "groups.jsonl").read_bytes() == lines
    assert {p.name: p.read_bytes() for p in (out / "groups").iterdir()} == kept
    same = ("groups", "answers", "scored_tokens", "nats_per_token", "mean_entropy", "rows_read")
    assert {k: again[k] for k in same} == {k: whole[k] for k in same}


def test_scores_of_something_else_are_not_mixed_in(folder, file):
    run(folder, file)
    out = file.parent / "out"
    with pytest.raises(InputError, match="holds scores already"):
        run(folder, file)
    (out / "scores.json").unlink()
    with pytest.raises(InputError, match="of another file or of other settings"):
        run(folder, file, temperature=2.0)
    lines = file.read_text().splitlines()
    file.write_text("\n".join([lines[1], lines[0], *lines[2:]]) + "\n")
    with pytest.raises(InputError, match="of another file or of other settings"):
        run(folder, file)
    file.write_text("\n".join([*lines, '{"prompt": "the fox", "answers": ["jumps"]}']) + "\n")
    assert run(folder, file)["scored_now"] == 1  # a longer file is the same file, continued
    (out / "scores.json").unlink()
    (out / "groups" / "000001.safetensors").unlink()
    assert run(folder, file)["scored_now"] == 1
    assert run(folder, file, temperature=2.0, force=True)["scored_now"] == 5


BAD = {
    "no json": ("{", "line 2 is not JSON"),
    "no object": ("[1]", "line 2 is no JSON object"),
    "no prompt": ('{"answers": ["a"]}', "line 2 has no prompt"),
    "empty prompt": ('{"prompt_ids": [], "answers": ["a"]}', "line 2 has no prompt"),
    "no answers": ('{"prompt": "a"}', "line 2 needs a list, answers"),
    "answer": ('{"prompt": "a", "answers": "b"}', "line 2 needs a list, answers"),
    "both": ('{"prompt": "a", "prompt_ids": [1], "answers": []}', "both prompt and prompt_ids"),
    "both answers": ('{"prompt": "a", "answers": [], "answer_ids": []}', "and not both"),
    "no text": ('{"prompt": "a", "answers": [3]}', "line 2: answer must be a text"),
    "no ids": ('{"prompt_ids": [1, true], "answers": []}', "prompt_ids must be a list of token"),
    "vocabulary": ('{"prompt_ids": [1, 9999], "answers": []}', "group 2 has token id 9999"),
    "negative": ('{"prompt_ids": [1], "answer_ids": [[-1]]}', "group 2 has token id -1"),
    "long": (json.dumps({"prompt_ids": [1] * 250, "answer_ids": [[2] * 8]}), "reads 257 tokens"),
}


@pytest.mark.parametrize("line, says", BAD.values(), ids=BAD)
def test_bad_lines_are_refused_before_anything_is_written(folder, tmp_path, capsys, line, says):
    file = tmp_path / "groups.jsonl"
    file.write_text('{"prompt": "a", "answers": ["b"]}\n' + line + "\n")
    error = main_fails(capsys, "score", "--model", folder, "--answers", file)
    assert says in error
    assert list(tmp_path.iterdir()) == [file]


def test_the_longest_group_that_fits(folder, file):
    file.write_text(json.dumps({"prompt_ids": [1] * 250, "answer_ids": [[2] * 7]}) + "\n")
    assert run(folder, file)["scored_tokens"] == 7


def test_a_file_without_a_group(folder, file, capsys):
    file.write_text("\n\n")
    error = main_fails(capsys, "score", "--model", folder, "--answers", file)
    assert "holds no group" in error and list(file.parent.iterdir()) == [file]


def test_groups_without_a_token_to_score(folder, file):
    file.write_text('{"prompt_ids": [1], "answers": []}\n{"prompt": "a b c", "answers": [""]}\n')
    summary = run(folder, file)
    assert summary["groups"] == 2 and summary["scored_tokens"] == 0
    assert summary["perplexity"] is None and summary["mean_entropy"] is None
    assert (file.parent / "out" / "scores.png").stat().st_size > 5000


def test_options(folder, file, capsys, tmp_path):
    both = ("score", "--model", folder, "--answers", file)
    assert "either --input or --answers" in main_fails(capsys, *both, "--input", file)
    assert "either --input or --answers" in main_fails(capsys, "score", "--model", folder)
    assert "leave the window" in main_fails(capsys, *both, "--window-tokens", 50)
    assert "cannot be read" in main_fails(
        capsys, "score", "--model", folder, "--answers", tmp_path / "nowhere"
    )
    other = save_tiny_model(tmp_path / "gemma", "gemma2")
    for options in (("--answers", file), ("--input", file, "--stream-weights")):
        error = main_fails(capsys, "score", "--model", other, *options)
        assert (
            "'gemma2' is not supported" in error and options[-1 if len(options) > 2 else 0] in error
        )


def test_from_the_command_line(folder, file, capsys):
    with pytest.raises(SystemExit) as exit:
        main(["score", "--model", str(folder), "--answers", str(file), "--stream-weights"])
    assert exit.value.code == 0
    said = capsys.readouterr().out
    assert "4, 4 of them in this run" in said and "weights streamed" in said
    assert (file.parent / "groups.scores" / "scores.json").is_file()


def test_too_little_memory_names_the_option(folder, file, capsys, monkeypatch):
    monkeypatch.setattr("qlkernels.scorer.loading.available_bytes", lambda _device: 10_000)
    error = main_fails(capsys, "score", "--model", folder, "--answers", file)
    assert "--stream-weights" in error and "True" not in error

    def small(self, *arguments, **options):
        made(self, *arguments, **options)
        self.memory_bytes = 100_000

    made = Scorer._finish
    monkeypatch.undo()
    monkeypatch.setattr(Scorer, "_finish", small)
    error = main_fails(capsys, "score", "--model", folder, "--answers", file)
    assert "tokens needs" in error and not (file.parent / "groups.scores").exists()
