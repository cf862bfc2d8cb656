"""qwenlong score against a plain transformers forward and against answers worked out by hand."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from qwenlong import score as scoring
from qwenlong.cli import main
from qwenlong.errors import InputError
from qwenlong.models import load_causal_lm, load_tokenizer
from qwenlong.score import ScoreSettings, score_tokens
from qwenlong.score_model import ScorerReader, TransformersReader, load_reader
from qwenlong.score_plot import uncertain_passages
from qwenlong.score_windows import Window, plan_windows
from qwenlong.tokens import tokenize
from tests.qwenlong.tiny_models import TEXT, save_tiny_model

KINDS = ("llama", "qwen3", "gemma2", "cohere")
FIELDS = ("logprobs", "entropy", "lse")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Model folders by kind, made when first asked for."""
    made = {}

    def get(kind="llama", **options):
        key = (kind, *sorted(options.items()))
        if key not in made:
            made[key] = save_tiny_model(tmp_path_factory.mktemp(kind), kind, **options)
        return made[key]

    return get


@pytest.fixture
def document(tmp_path):
    file = tmp_path / "doc.txt"
    file.write_bytes(TEXT.encode())
    return file


def straightforward(folder, ids, temperature=1.0):
    """Scores of tokens 1, 2, ... of one sequence, from all its logits."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.as_tensor(ids)
    with torch.inference_mode():
        logits = model(ids[None]).logits[0, :-1] / temperature
    logp = logits.log_softmax(-1)
    return {
        "logprobs": logp.gather(-1, ids[1:, None])[:, 0].numpy(),
        "entropy": -(logp.exp() * logp).sum(-1).numpy(),
        "lse": logits.logsumexp(-1).numpy(),
    }


def reader_of(folder, **options):
    """As ``load_reader`` does, with shorter ways to say so."""
    given = dict(
        dtype="auto", device="cpu", impl="auto", attention="auto", stream_weights=False,
        chunk_tokens=None, needs_scorer=None,
    )  # fmt: skip
    return load_reader(folder, **given | options)


def score_text(folder, text, *, window=None, overlap=1, temperature=1.0, reader=None, **options):
    reader = reader or reader_of(folder, **options)
    tokens = tokenize(load_tokenizer(folder), text)
    T = len(tokens.ids)
    windows = plan_windows(T, window or T, overlap, tokens.n_prefix)
    return tokens, score_tokens(reader, tokens, windows, temperature=temperature)


def run(model, source, out, **options):
    settings = ScoreSettings(model=str(model), input=str(source), **options)
    return scoring.run(settings, out, Console(quiet=True))


def read_scores(out):
    with safe_open(out / "scores.safetensors", "numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}


# --- agreement ---------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_agrees_with_a_plain_forward_at_two_chunk_sizes(folders, kind, temperature):
    text = TEXT[:500]
    results = []
    for chunk_tokens in (5, 64):
        tokens, scores = score_text(
            folders(kind), text, chunk_tokens=chunk_tokens, temperature=temperature
        )
        expected = straightforward(folders(kind), tokens.ids, temperature)
        for name in FIELDS:
            assert np.isnan(getattr(scores, name)[0])
            np.testing.assert_allclose(getattr(scores, name)[1:], expected[name], atol=1e-4, rtol=0)
        results.append(scores)
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=0)
    assert expected["logprobs"].std() > 0.5  # far from uniform, so that the test can fail


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prefill_tokens", [1, 7, 33])
def test_prefill_in_chunks_changes_nothing(folders, kind, prefill_tokens):
    # gemma2 attends 8 tokens back in one of its layers, less than a chunk of 33
    _, whole = score_text(folders(kind), TEXT[:300])
    reader = TransformersReader(load_causal_lm(folders(kind)), prefill_tokens=prefill_tokens)
    _, parts = score_text(folders(kind), TEXT[:300], reader=reader)
    for a, b in zip(whole, parts, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4, rtol=0)


def test_equal_logits_give_log_v(folders, tmp_path, document):
    folder = save_tiny_model(tmp_path / "uniform", "qwen3")
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.nn.init.zeros_(model.lm_head.weight)
    model.save_pretrained(folder)
    V = model.config.vocab_size

    summary = run(folder, document, tmp_path / "out", max_tokens=101)
    assert summary["scored_tokens"] == 100
    assert summary["perplexity"] == pytest.approx(V)
    assert summary["mean_entropy"] == pytest.approx(math.log(V))
    offsets = read_scores(tmp_path / "out")["offsets"]
    characters = offsets[-1, 1] - offsets[1, 0]
    assert summary["bits_per_character"] == pytest.approx(100 * math.log2(V) / characters)


def test_same_input_same_bits(folders):
    _, first = score_text(folders("qwen3"), TEXT[:300], window=40, overlap=9)
    _, again = score_text(folders("qwen3"), TEXT[:300], window=40, overlap=9)
    for a, b in zip(first, again, strict=True):
        assert a.tobytes() == b.tobytes()


# --- windows -----------------------------------------------------------------


def test_windows_by_hand():
    assert plan_windows(10, 10, 3) == [Window(0, 1, 10)]
    assert plan_windows(11, 10, 3) == [Window(0, 1, 10), Window(7, 10, 11)]
    # 8192, then three times 7680 new tokens
    assert [w.end - w.first_scored for w in plan_windows(31_232, 8192, 512)] == [
        8191, 7680, 7680, 7680,
    ]  # fmt: skip
    # a prefix of 1 takes a place in every window: 9 tokens of text at most
    assert plan_windows(20, 10, 3, 1) == [
        Window(0, 1, 10), Window(7, 10, 16), Window(13, 16, 20),
    ]  # fmt: skip


@pytest.mark.parametrize("tokens, window, overlap, n_prefix", [
    (2, 2, 1, 0), (100, 2, 1, 0), (100, 7, 6, 0), (100, 7, 1, 0), (101, 10, 4, 2), (3, 9, 4, 2),
])  # fmt: skip
def test_windows_score_each_token_once_with_enough_context(tokens, window, overlap, n_prefix):
    windows = plan_windows(tokens, window, overlap, n_prefix)
    scored = [t for w in windows for t in range(w.first_scored, w.end)]
    assert scored == list(range(max(1, n_prefix), tokens))
    for w in windows[1:]:
        assert w.first_scored - w.start == overlap
        assert w.end - w.start + n_prefix <= window
    assert windows[0].end <= window


READERS = {
    "scorer": lambda folder: reader_of(folder),
    "one window a pass": lambda folder: ScorerReader(reader_of(folder).scorer, pass_tokens=1),
    "streamed": lambda folder: reader_of(folder, stream_weights=True),
    "transformers": lambda folder: TransformersReader(load_causal_lm(folder)),
    "in chunks": lambda folder: TransformersReader(load_causal_lm(folder), prefill_tokens=5),
}


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
def test_windows_score_what_the_model_sees(folders, bos, reader):
    folder = folders("qwen3", bos=bos)
    tokens, scores = score_text(folder, TEXT[:400], window=50, overlap=20, reader=reader(folder))
    ids, n = tokens.ids, int(bos)
    assert tokens.n_prefix == n and (not bos or ids[0] == 0)
    expected = np.full(len(ids), np.nan, dtype=np.float32)
    expected[1:50] = straightforward(folder, ids[:50])["logprobs"]
    end = 50
    while end < len(ids):
        start, stop = end - 20, min(len(ids), end - 20 + 50 - n)
        window = np.concatenate([ids[:n], ids[start:stop]])
        expected[end:stop] = straightforward(folder, window)["logprobs"][end - start + n - 1 :]
        end = stop
    np.testing.assert_allclose(scores.logprobs, expected, atol=1e-4, rtol=0)


def test_offsets_give_the_text_back(folders, tmp_path, document):
    run(folders(bos=True), document, tmp_path / "out", window_tokens=100)
    scores = read_scores(tmp_path / "out")
    text = document.read_bytes().decode()
    assert scores["offsets"][0].tolist() == [0, 0]  # <s>
    pieces = [text[a:b] for a, b in scores["offsets"][1:]]
    # a character of several tokens is the piece of each of them
    starts = [a for a, _ in scores["offsets"][1:]]
    joined = "".join(p for i, p in enumerate(pieces) if i == 0 or starts[i] != starts[i - 1])
    assert joined == text
    assert load_tokenizer(folders()).decode(scores["ids"][1:]) == text


# --- files -------------------------------------------------------------------


def test_files(folders, tmp_path, document):
    out = tmp_path / "out"
    summary = run(folders(), document, out, window_tokens=100, overlap_tokens=10)
    assert sorted(p.name for p in out.iterdir()) == [
        "scores.json", "scores.png", "scores.safetensors",
    ]  # fmt: skip
    scores = read_scores(out)
    T = len(scores["ids"])
    assert {name: (str(a.dtype), a.shape) for name, a in scores.items()} == {
        "ids": ("int64", (T,)),
        "offsets": ("int64", (T, 2)),
        "logprobs": ("float32", (T,)),
        "entropy": ("float32", (T,)),
        "lse": ("float32", (T,)),
    }
    for name in FIELDS:
        assert np.isnan(scores[name][0]) and np.isfinite(scores[name][1:]).all()

    saved = json.loads((out / "scores.json").read_text())
    assert saved == summary
    assert saved["tokens"] == T and saved["scored_tokens"] == T - 1
    nats = -scores["logprobs"][1:].astype(np.float64)
    assert saved["nats_per_token"] == pytest.approx(nats.mean())
    assert saved["perplexity"] == pytest.approx(math.exp(nats.mean()))
    assert saved["mean_entropy"] == pytest.approx(scores["entropy"][1:].mean(), rel=1e-6)
    assert saved["windows"][1] == {"start": 90, "first_scored": 100, "end": 190}
    assert saved["settings"]["overlap_tokens"] == 10 and saved["versions"]["torch"]
    assert saved["peak_memory_bytes"]["host"] > 10**8
    assert saved["tokens_per_second"] == pytest.approx((T - 1) / saved["seconds"])
    assert 3 <= len(saved["most_uncertain"]) <= 5
    assert (out / "scores.png").read_bytes().startswith(b"\x89PNG")


def test_out_defaults_to_a_folder_beside_the_input(folders, document, capsys):
    main_ok("score", "--model", folders(), "--input", document, "--max-tokens", 20)
    out = document.parent / "doc.scores"
    assert json.loads((out / "scores.json").read_text())["tokens"] == 20
    assert str(out / "scores.png") in capsys.readouterr().out


def test_scores_are_replaced_only_with_force(folders, document, capsys):
    arguments = ("score", "--model", folders(), "--input", document, "--max-tokens")
    main_ok(*arguments, 20)
    assert "--force" in main_fails(capsys, *arguments, 30)
    main_ok(*arguments, 30, "--force")
    saved = json.loads((document.parent / "doc.scores" / "scores.json").read_text())
    assert saved["tokens"] == 30


@pytest.mark.parametrize("text", ["two words", "$x$ _{ \\frac", "🙂 東京 " * 3000], ids=len)
def test_the_picture_takes_any_text(folders, tmp_path, text):
    (tmp_path / "a.txt").write_text(text)
    summary = run(folders(), tmp_path / "a.txt", tmp_path / "out", window_tokens=200)
    assert summary["most_uncertain"]
    assert (tmp_path / "out" / "scores.png").stat().st_size > 10_000


def test_uncertain_passages_by_hand():
    entropy = np.ones(100, dtype=np.float32)
    entropy[0] = np.nan
    entropy[40:44], entropy[42], entropy[90:94] = 5.0, 9.0, 3.0
    offsets = np.stack([np.arange(100), np.arange(1, 101)], axis=1)
    text = "".join(chr(0x4E00 + i) for i in range(100))
    first, second = uncertain_passages(entropy, offsets, text, count=2, span=4)
    assert first == (40, 44, 6.0, text[40:44])
    assert second == (90, 94, 3.0, text[90:94])
    assert uncertain_passages(entropy[:1], offsets, text) == []
    [only] = uncertain_passages(entropy[:3], offsets, text)
    assert only == (1, 3, 1.0, text[1:3])


# --- refusals ----------------------------------------------------------------


def main_ok(*arguments):
    with pytest.raises(SystemExit) as exit:
        main([str(a) for a in arguments])
    assert exit.value.code == 0


def main_fails(capsys, *arguments):
    """Run a command that must exit with 2 and one line; return that line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        main([str(a) for a in arguments])
    assert exit.value.code == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1 and error.startswith("qwenlong: "), error
    return error


INPUTS = {
    "empty": (b"", "empty"),
    "binary": (b"\x7fELF\0\0text", "not text"),
    "latin 1": ("café".encode("latin-1"), "not UTF-8 at byte 3"),
    "one token": (b"a", "at least two"),
    "too long": (TEXT.encode(), "--window-tokens 256"),
}


@pytest.mark.parametrize("data, says", INPUTS.values(), ids=INPUTS)
def test_bad_documents(folders, tmp_path, capsys, data, says):
    file = tmp_path / "bad.txt"
    file.write_bytes(data)
    assert says in main_fails(capsys, "score", "--model", folders(), "--input", file)
    assert [p.name for p in tmp_path.iterdir()] == ["bad.txt"]


@pytest.mark.parametrize("source", ["nowhere.txt", ".", "", "/"])
def test_documents_that_cannot_be_read(folders, tmp_path, monkeypatch, capsys, source):
    monkeypatch.chdir(tmp_path)
    error = main_fails(capsys, "score", "--model", folders(), "--input", source)
    assert "cannot be read" in error


OPTIONS = {
    "window beyond the context": (["--window-tokens", "300"], "at most 256"),
    "overlap fills the window": (["--window-tokens", "50", "--overlap-tokens", "50"], "less than"),
    "overlap of nothing": (["--overlap-tokens", "5"], "needs --window-tokens"),
    "no overlap": (["--window-tokens", "50", "--overlap-tokens", "0"], "at least 1"),
    "one token": (["--max-tokens", "1"], "at least 2"),
    "no rows": (["--chunk-tokens", "0"], "at least 1"),
    "cold": (["--temperature", "0"], "above 0"),
    "not a number": (["--temperature", "nan"], "above 0"),
    "dtype": (["--dtype", "int8"], "choose auto"),
    "device": (["--device", "tpu"], "choose auto"),
    "unknown impl": (["--impl", "magic"], "unknown impl"),
}


@pytest.mark.parametrize("options, says", OPTIONS.values(), ids=OPTIONS)
def test_bad_options(folders, document, capsys, options, says):
    arguments = ("score", "--model", folders(), "--input", document, *options)
    assert says in main_fails(capsys, *arguments)
    assert list(document.parent.iterdir()) == [document]


def broken_model(folder, how):
    """A model folder with one fault."""
    if how == "no folder":
        return folder / "nowhere"
    if how == "no config":
        folder.mkdir()
        return folder
    save_tiny_model(folder, "granite" if how == "other head" else "qwen3")
    config = json.loads((folder / "config.json").read_text())
    if how == "no tokenizer":
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name).unlink()
    elif how == "torn weights":
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:1000])
    elif how == "no weights":
        (folder / "model.safetensors").unlink()
    elif how == "missing weights":
        config["num_hidden_layers"] = 3
        config["layer_types"] = ["full_attention"] * 3
    elif how == "encoder":
        config = {"model_type": "bert", "architectures": ["BertForMaskedLM"]}
    elif how == "unknown type":
        config["model_type"] = "unheard_of"
    elif how == "bad json":
        (folder / "config.json").write_text("{")
        return folder
    (folder / "config.json").write_text(json.dumps(config))
    return folder


MODELS = {
    "no folder": "there is no folder",
    "no config": "no config.json",
    "bad json": "not a valid JSON file",
    "unknown type": "config.json cannot be used",
    "encoder": "not a causal language model",
    "no tokenizer": "has no tokenizer",
    "no weights": "cannot be loaded",
    "torn weights": "cannot be loaded",
    "missing weights": "has no tensor 'model.layers.2.",
    "other head": "does not support this head",
}


@pytest.mark.parametrize("how, says", MODELS.items(), ids=MODELS)
def test_bad_models(tmp_path, document, capsys, how, says):
    folder = broken_model(tmp_path / "model", how)
    assert says in main_fails(capsys, "score", "--model", folder, "--input", document)
    assert not (tmp_path / "doc.scores").exists()


def test_a_model_that_reads_both_ways_is_refused(tmp_path):
    from transformers import BertGenerationConfig, BertGenerationDecoder

    for is_decoder in (False, True):
        config = BertGenerationConfig(
            vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=16, initializer_range=0.5, is_decoder=is_decoder,
        )  # fmt: skip
        BertGenerationDecoder(config).save_pretrained(tmp_path)
        if is_decoder:
            load_causal_lm(tmp_path)
        else:
            with pytest.raises(InputError, match="reads later tokens"):
                load_causal_lm(tmp_path)


def test_weights_that_give_nan_are_reported(folders, tmp_path, document, capsys):
    folder = save_tiny_model(tmp_path / "nan", "qwen3")
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        token = AutoTokenizer.from_pretrained(folder)("东", add_special_tokens=False).input_ids[0]
        model.model.embed_tokens.weight[token] = float("nan")
    model.save_pretrained(folder)
    (tmp_path / "x.txt").write_text("dog 东 dog")
    error = main_fails(capsys, "score", "--model", folder, "--input", tmp_path / "x.txt")
    assert "no finite score" in error and not (tmp_path / "x.scores").exists()


def test_folders_that_cannot_be_written_are_refused_first(folders, document, capsys):
    file = document.parent / "taken"
    file.write_text("x")
    for out in (file, file / "below"):
        error = main_fails(capsys, "score", "--model", folders(), "--input", document, "--out", out)
        assert str(out) in error


# --- interruption and standard input -----------------------------------------


def test_a_fault_while_scoring_leaves_nothing(folders, document, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("qlkernels.scorer.scorer.linear_logprob", stop)
    with pytest.raises(KeyboardInterrupt):
        run(folders(), document, document.parent / "out", max_tokens=100)
    assert list(document.parent.iterdir()) == [document]


def test_a_fault_while_writing_leaves_no_half_file(folders, document, monkeypatch):
    def stop(file, *_):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(scoring, "draw_scores", stop)
    out = document.parent / "out"
    with pytest.raises(KeyboardInterrupt):
        run(folders(), document, out, max_tokens=100)
    assert [p.name for p in out.iterdir()] == ["scores.safetensors"]
    assert len(read_scores(out)["ids"]) == 100


def test_a_log_gets_lines(folders, document, monkeypatch, capsys):
    monkeypatch.setattr(scoring, "_LOG_SECONDS", 0.0)
    main_ok("score", "--model", folders(), "--input", document, "--window-tokens", 100)
    lines = [x for x in capsys.readouterr().err.splitlines() if "tokens/s" in x]
    assert len(lines) == 2 and lines[-1].endswith("0 s left")  # one pass of two layers
    assert "(layer 1 of 2)" in lines[0] and "(layer 2 of 2)" in lines[1]
    read, total = (int(lines[-1].split()[i].replace(",", "")) for i in (1, 3))
    saved = json.loads((document.parent / "doc.scores" / "scores.json").read_text())
    assert read == total == sum(w["end"] - w["start"] - 1 for w in saved["windows"])


def command(*arguments):
    return [sys.executable, "-m", "qwenlong.cli", *(str(a) for a in arguments)]


def environment(**more):
    return os.environ | {"PYTHONPATH": str(Path(scoring.__file__).parents[1])} | more


def test_standard_input_in_a_process_of_its_own(folders, tmp_path):
    done = subprocess.run(
        command("score", "--model", folders(), "--input", "-", "--window-tokens", 99),
        input=TEXT.encode(),
        cwd=tmp_path,
        capture_output=True,
        env=environment(),
        timeout=120,
    )
    assert done.returncode == 0, done.stderr.decode()
    assert b"perplexity" in done.stdout and b"Traceback" not in done.stderr
    saved = json.loads((tmp_path / "stdin.scores" / "scores.json").read_text())
    assert saved["settings"]["input"] == "-" and saved["scored_tokens"] > 300


def test_ctrl_c_leaves_nothing(folders, tmp_path):
    (tmp_path / "doc.txt").write_bytes(TEXT.encode() * 400)
    process = subprocess.Popen(
        command("score", "--model", folders(), "--input", "doc.txt", "--window-tokens", 20),
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        env=environment(TTY_COMPATIBLE="1"),  # rich draws as on a terminal
    )
    text = b""
    while b"tokens/s" not in text:  # the progress bar moves: scoring has begun
        block = process.stderr.read1()
        assert block, text.decode()
        text += block
    process.send_signal(signal.SIGINT)
    text += process.stderr.read()
    assert process.wait(timeout=60) != 0
    assert b"Traceback" not in text
    assert [p.name for p in tmp_path.iterdir()] == ["doc.txt"]


# --- the demo's model --------------------------------------------------------


@pytest.mark.real
def test_smollm2_agrees_with_a_plain_forward(tmp_path):
    from qwenlong.models import demo_document, demo_model

    folder = demo_model()
    assert demo_model() == folder
    document = tmp_path / "topics.txt"
    document.write_text(demo_document())
    results = []
    for chunk_tokens in (64, 700):
        out = tmp_path / str(chunk_tokens)
        run(folder, document, out, max_tokens=2048, chunk_tokens=chunk_tokens, dtype="float32")
        results.append(read_scores(out))
    expected = straightforward(folder, results[0]["ids"])
    for name in ("logprobs", "entropy"):
        for result in results:
            np.testing.assert_allclose(result[name][1:], expected[name], atol=1e-4, rtol=0)
        np.testing.assert_allclose(*(r[name] for r in results), atol=1e-5, rtol=0)


@pytest.mark.real
def test_peak_memory_does_not_grow_with_the_document(tmp_path):
    from qwenlong.models import demo_document, demo_model

    document = tmp_path / "topics.txt"
    document.write_text(demo_document())
    peaks = []
    for max_tokens in (8192, 32_768):
        arguments = command(
            "score", "--model", demo_model(), "--input", document, "--max-tokens", max_tokens,
            "--window-tokens", 4096, "--out", tmp_path / str(max_tokens),
        )  # fmt: skip
        subprocess.run(arguments, check=True)
        saved = json.loads((tmp_path / str(max_tokens) / "scores.json").read_text())
        peaks.append(saved["peak_memory_bytes"]["host"])
    # the scores of 24,576 more tokens are 1 MB; the rest is the allocator's noise
    assert peaks[1] - peaks[0] < 100e6, peaks
