"""Sharded engines on two CPU processes against one process with everything."""

import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from qwenlong.errors import InputError
from qwenlong.metrics import METRICS_FILE, read_metrics
from qwenlong.run_setup import ENGINES, ROLLOUTS, build_run
from qwenlong.tiny import tiny_tokenizer
from qwenlong.train_command import run_stage
from tests.qwenlong.optimizer_worker import LATE, NEVER, whole_state
from tests.qwenlong.train_runs import NoPicture, make_model, tiny_recipe
from tests.qwenlong.vllm_server import FakeVllm, serving

ROOT = Path(__file__).parents[2]
# Answers differ in length, and so do the ranks in the number of their micro-batches.
BATCH = {"prompts": 6, "group_size": 3, "micro_batch_tokens": 40}

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="the package deepspeed is not installed"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("tiny"))


def save_moe(folder: Path, **sizes) -> Path:
    """A random Qwen3-MoE of four experts with untied embeddings, and its tokenizer."""
    tokenizer = tiny_tokenizer()
    config = Qwen3MoeConfig(
        **{
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "moe_intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "tie_word_embeddings": False,
            "max_position_embeddings": 8192,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            **sizes,
        }
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    return save_moe(tmp_path_factory.mktemp("moe") / "model")


def launch(module, *arguments, processes=0, **variables):
    launcher = [sys.executable, "-m"]
    if processes:
        launcher += ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    done = subprocess.run(
        [*launcher, f"tests.qwenlong.{module}", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **variables},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-9000:]


def run_ranks(recipe, folder, processes, *, resume=False):
    """Weights, rollout weights and metrics of a run of ``engine_worker``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.json").write_text(recipe.model_dump_json())
    arguments = [folder / "recipe.json", folder / "run", folder / "result.pt"]
    arguments += ["resume"] if resume else []
    launch("engine_worker", *arguments, processes=processes)
    return torch.load(folder / "result.pt", weights_only=True)


def recipe_of(model, **changes):
    return tiny_recipe(
        model,
        batch=BATCH,
        steps=changes.pop("steps", 3),
        aepo={"low": 4.0, "high": 4.2, "entropy_source": "scoring_pass"},
        optimizer={"learning_rate": 1e-3},
        **changes,
    )


@pytest.fixture(scope="module")
def one(model, tmp_path_factory):
    return run_ranks(recipe_of(model), tmp_path_factory.mktemp("one"), 0)


def assert_equal_runs(found, one):
    for step, expected in one["rows"].items():
        for name in ("loss", "entropy", "grad_norm", "reward", "aepo/kept_fraction"):
            assert found["rows"][step][name] == pytest.approx(expected[name], abs=1e-5), (
                step,
                name,
            )
    for kind in ("weights", "rollout"):
        for name, expected in one[kind].items():
            if name in found[kind]:  # a tied weight may have one name
                torch.testing.assert_close(found[kind][name], expected, rtol=0, atol=1e-5)
    missing = set(one["weights"]) - set(found["weights"])
    assert missing <= {"lm_head.weight"}


def run_halves(recipe, folder):
    """One step, and the rest in new processes."""
    run_ranks(recipe.model_copy(update={"steps": 1}), folder, 2)
    return run_ranks(recipe, folder, 2, resume=True)


def test_fsdp2_equals_one_process(model, one, tmp_path):
    assert_equal_runs(run_ranks(recipe_of(model, engine={"kind": "fsdp2"}), tmp_path, 2), one)


@pytest.fixture
def one_rank(monkeypatch):
    monkeypatch.setattr("qwenlong.train_command.Dashboard", NoPicture)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("kind, lora", [("tied", None), ("tied", {"rank": 2}), ("moe", None)])
def test_fsdp2_saves_and_exports_what_one_process_does(kind, lora, request, tmp_path, one_rank):
    """With the tied model nothing is learnt in the first step: its checkpoint holds an optimizer
    without a state.
    """
    if lora:
        pytest.importorskip("peft")
    model = request.getfixturevalue({"tied": "model", "moe": "moe"}[kind])
    changes = {"model": {"lora": lora}, "optimizer": {"learning_rate": 1e-3}}
    console, halves = Console(file=io.StringIO()), tmp_path / "halves"
    sharded = tiny_recipe(model, steps=3, engine={"kind": "fsdp2"}, **changes)
    one = tiny_recipe(model, steps=3, **changes)
    run_stage(sharded.model_copy(update={"steps": 1}), halves, resume=False, console=console)
    exported = [
        run_stage(recipe, out, resume=out == halves, console=console)
        for recipe, out in ((one, tmp_path / "one"), (sharded, tmp_path / "whole"),
                            (sharded, halves))
    ]  # fmt: skip
    learnt = [row["grad_norm"] > 0 for row in read_metrics(tmp_path / "one" / METRICS_FILE)]
    assert learnt == [kind == "moe", True, True]
    expected, *found = (load_file(folder / "model.safetensors") for folder in exported)
    for weights in found:
        assert weights.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(weights[name], value, rtol=0, atol=1e-5)
    assert ("model.layers.1.mlp.experts.3.up_proj.weight" in expected) == (kind == "moe")


@pytest.mark.parametrize("kind, lora", [("tied", None), ("tied", {"rank": 2}), ("moe", None)])
def test_a_server_gets_the_same_weights_from_shards(kind, lora, request, tmp_path, one_rank):
    if lora:
        pytest.importorskip("peft")
    model = request.getfixturevalue({"tied": "model", "moe": "moe"}[kind])
    sent = []
    for engine in ("torch", "fsdp2"):
        server = FakeVllm()
        with serving(server) as url:
            vllm = {"base_url": url, "weights_folder": str(tmp_path / engine)}
            rollout = {"backend": "vllm", "vllm": vllm}
            changes = {"engine": {"kind": engine}, "model": {"lora": lora}}
            recipe = tiny_recipe(model, rollout=rollout, **changes)
            made = ENGINES[engine].load(recipe, model)
            for name, parameter in made.policy.model.named_parameters():
                if ".lora_B." in name:
                    values = torch.linspace(-1, 1, parameter.numel()).view(parameter.shape)
                    (parameter.to_local() if engine == "fsdp2" else parameter).data.copy_(values)
            rollouts = ROLLOUTS["vllm"](recipe, made)
            rollouts.sync_weights(made.rollout_model(), 0)
            rollouts.close()
            sent.append(server.loaded)
    whole, sharded = sent
    stored = load_file(model / "model.safetensors")
    assert whole.keys() == sharded.keys() == stored.keys()
    for name, value in whole.items():
        torch.testing.assert_close(sharded[name], value, rtol=0, atol=1e-6)
    query = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(whole[query], stored[query].float()) == (lora is None)


def test_the_optimizer_of_two_ranks_is_loaded_by_one(model, tmp_path, one_rank):
    """The worker loads it on two. A parameter without a gradient has no state, one that had fewer
    updates has counted fewer.
    """
    recipe = recipe_of(model, engine={"kind": "fsdp2"})
    (tmp_path / "recipe.json").write_text(recipe.model_dump_json())
    launch("optimizer_worker", tmp_path / "recipe.json", tmp_path, processes=2)
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    assert {name: float(saved[f"step.{name}"]) for name in (LATE, "model.norm.weight")} == {
        LATE: 1.0,
        "model.norm.weight": 2.0,
    }
    assert not [name for name in saved if NEVER in name]
    engine = ENGINES["fsdp2"].load(recipe, model)
    engine.load_optimizer(tmp_path)
    loaded = whole_state(engine)
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded[name], value) for name, value in saved.items())

    # What only one of the two ranks has is no optimizer; nor is a part of the ranks.
    file = tmp_path / "optimizer-1.safetensors"
    rows = load_file(file)
    for lost in ("step", "exp_avg_sq"):
        save_file({k: v for k, v in rows.items() if k != f"{lost}.{LATE}"}, file)
        with pytest.raises(InputError, match=f"{LATE} is not that of the model, or not whole"):
            ENGINES["fsdp2"].load(recipe, model).load_optimizer(tmp_path)
    file.unlink()
    with pytest.raises(InputError, match="is not that of the model, or not whole"):
        ENGINES["fsdp2"].load(recipe, model).load_optimizer(tmp_path)


def test_a_checkpoint_without_a_tensor_is_refused_by_name(moe, tmp_path, one_rank):
    folder = shutil.copytree(moe, tmp_path / "torn")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.experts.3.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="lacks model.layers.1.mlp.experts.3.up_proj.weight"):
        build_run(tiny_recipe(folder, engine={"kind": "fsdp2"}), tmp_path / "run")


@pytest.mark.real
@pytest.mark.parametrize(
    "engine",
    [
        {"kind": "fsdp2"},
        pytest.param({"kind": "deepspeed", "zero_stage": 3}, marks=needs_deepspeed),
    ],
)
def test_a_mixture_of_experts_equals_one_process(moe, tmp_path, engine):
    one = run_ranks(recipe_of(moe), tmp_path / "one", 0)
    assert_equal_runs(run_ranks(recipe_of(moe, engine=engine), tmp_path / "two", 2), one)


@pytest.mark.real
@pytest.mark.parametrize(
    "engine",
    [
        {"kind": "fsdp2"},
        pytest.param({"kind": "deepspeed", "zero_stage": 3}, marks=needs_deepspeed),
    ],
)
def test_no_process_holds_a_model_as_a_whole(moe, tmp_path, engine):
    """On two: the peak of loading is a shard and the layers of a forward pass, that of writing a
    tensor or two. The weights that come out are those that went in, in the layout of the files.
    """
    big = save_moe(
        tmp_path / "big",
        num_hidden_layers=24,
        hidden_size=256,
        moe_intermediate_size=256,
        num_experts=8,
        head_dim=64,
    )
    stored = load_file(big / "model.safetensors")
    whole = sum(4 * t.numel() for t in stored.values()) / 2**20  # MiB in fp32
    assert whole > 150
    (tmp_path / "recipe.json").write_text(tiny_recipe(big, engine=engine).model_dump_json())
    # glibc keeps freed memory of up to 32 MB a piece, which is no memory that is in use.
    keeps_nothing = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    arguments = [tmp_path / "recipe.json", moe, big, tmp_path]
    launch("load_worker", *arguments, processes=2, **keeps_nothing)
    for rank in json.loads((tmp_path / "memory.json").read_text()):
        assert 0.4 * whole < rank["load"] < 0.75 * whole
        assert rank["stream"] < 0.2 * whole and rank["save"] < 0.2 * whole
    for file in ("policy.safetensors", "saved/model.safetensors"):
        found = load_file(tmp_path / file)
        assert found.keys() == stored.keys()
        assert all(torch.equal(found[name], value) for name, value in stored.items())


@pytest.mark.real
def test_fsdp2_resumes_with_the_same_bits(model, tmp_path):
    recipe = recipe_of(model, engine={"kind": "fsdp2"})
    whole = run_ranks(recipe, tmp_path / "whole", 2)
    resumed = run_halves(recipe, tmp_path / "halves")
    assert all(torch.equal(v, whole["weights"][n]) for n, v in resumed["weights"].items())


@pytest.mark.real
def test_fsdp2_goes_on_with_another_number_of_ranks(model, one, tmp_path):
    recipe = recipe_of(model, engine={"kind": "fsdp2"})
    run_ranks(recipe.model_copy(update={"steps": 2}), tmp_path, 2)
    found = run_ranks(recipe, tmp_path, 1, resume=True)
    assert list(found["rows"]) == [3]
    assert_equal_runs({**one, "weights": found["weights"], "rollout": found["rollout"]}, one)


@pytest.mark.real
@needs_deepspeed
def test_deepspeed_on_another_number_of_ranks_is_refused(model, tmp_path):
    recipe = recipe_of(model, engine={"kind": "deepspeed", "zero_stage": 2})
    run_ranks(recipe.model_copy(update={"steps": 1}), tmp_path, 2)
    with pytest.raises(AssertionError, match="saved by 2 processes, .*--nproc-per-node 2"):
        run_ranks(recipe, tmp_path, 1, resume=True)


@pytest.mark.real
@needs_deepspeed
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_equals_one_process_and_resumes(model, one, tmp_path, stage):
    recipe = recipe_of(model, engine={"kind": "deepspeed", "zero_stage": stage})
    whole = run_ranks(recipe, tmp_path / "whole", 2)
    assert_equal_runs(whole, one)
    resumed = run_halves(recipe, tmp_path / "halves")
    for name, value in resumed["weights"].items():
        torch.testing.assert_close(value, whole["weights"][name], rtol=0, atol=1e-6)


def test_an_engine_without_its_processes_is_refused(model, tmp_path):
    with pytest.raises(InputError, match="runs under torchrun"):
        build_run(tiny_recipe(model, engine={"kind": "fsdp2"}), tmp_path / "run")
