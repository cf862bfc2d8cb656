"""Weights from shards and from host memory, what a pass may take, and what it does take."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from qlkernels.prefix_group import pack_groups
from qlkernels.scorer import Scorer
from qlkernels.scorer.checkpoint import Checkpoint
from tests.qlkernels.test_scorer import KINDS, expect_close, packed, tiny_model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of tiny models, in several shards."""
    made = {}

    def get(kind):
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            tiny_model(kind).save_pretrained(made[kind], max_shard_size="20KB")
        return made[kind]

    return get


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stream", [False, True], ids=["resident", "streamed"])
def test_a_folder_scores_as_its_model(folders, kind, stream):
    ids, cu_seqlens = packed()
    layout = pack_groups([[5, 6, 7, 8]], [[[1, 2, 3], [4]]])
    model = Scorer(tiny_model(kind))
    folder = Scorer.from_folder(folders(kind), stream_weights=stream, device="cpu")
    assert folder.dtype == torch.float32 and folder.is_streaming == stream
    for inputs in (dict(inputs=ids, cu_seqlens=cu_seqlens), dict(inputs=layout)):
        for a, b in zip(folder.score(**inputs), model.score(**inputs), strict=True):
            assert torch.equal(a, b)


def test_experts_stored_in_one_tensor(folders, tmp_path):
    """As the modules of transformers 5 have them, beside the single experts of the hub."""
    from safetensors.torch import save_file

    model = tiny_model("qwen3-moe")
    names = Checkpoint(folders("qwen3-moe"))
    assert "model.layers.0.mlp.experts.3.gate_proj.weight" in names
    model.config.save_pretrained(tmp_path)
    save_file(
        {k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / "model.safetensors"
    )
    assert "model.layers.0.mlp.experts.gate_up_proj" in Checkpoint(tmp_path)
    ids, _ = packed()
    fused = Scorer.from_folder(tmp_path, stream_weights=True, device="cpu").score(ids[:20])
    apart = Scorer.from_folder(folders("qwen3-moe"), device="cpu").score(ids[:20])
    assert all(torch.equal(a, b) for a, b in zip(fused, apart, strict=True))


def test_weights_of_another_dtype_are_converted(folders):
    ids, _ = packed()
    for stream in (False, True):
        scorer = Scorer.from_folder(
            folders("qwen3"), stream_weights=stream, device="cpu", dtype=torch.bfloat16
        )
        assert scorer.dtype == torch.bfloat16
        got = scorer.score(ids[:20])
        # not tiny_model.to(bfloat16), which rounds the frequencies of the rotation too
        model = AutoModelForCausalLM.from_pretrained(folders("qwen3"), dtype=torch.bfloat16)
        want = Scorer(model).score(ids[:20])
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_streamed_model_has_one_copy_of_its_weights():
    model = tiny_model("llama")
    before = {name: p.clone() for name, p in model.named_parameters()}
    scorer = Scorer(model, stream_weights=True, device="cpu")
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])
    with torch.no_grad():  # the model's parameters are what the scorer reads
        model.model.layers[1].mlp.down_proj.weight.zero_()
        model.lm_head.weight.mul_(2.0)
    ids, _ = packed()
    expect_close(scorer.score(ids[:20]), Scorer(model).score(ids[:20])._asdict())
    assert model.lm_head.weight is model.model.embed_tokens.weight  # still tied


def test_the_same_pass_twice(folders):
    """Buffers of an interrupted pass are not mixed up with those of the next."""
    scorer = Scorer.from_folder(folders("qwen3"), stream_weights=True, device="cpu")
    ids, _ = packed()
    first = scorer.score(ids[:30])

    def stop(done, _total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scorer.score(ids[:30], on_layer=stop)
    again = scorer.score(ids[:30])
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_loading_reports_each_layer(folders):
    said = []
    Scorer.from_folder(folders("llama"), device="cpu", on_layer_loaded=lambda *a: said.append(a))
    assert said == [(1, 3), (2, 3), (3, 3)]


# --- damaged folders ---------------------------------------------------------


def test_a_missing_shard_is_named(folders, tmp_path):
    names = sorted(p.name for p in folders("qwen3").iterdir())
    for name in names:
        (tmp_path / name).write_bytes((folders("qwen3") / name).read_bytes())
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    shards[1].unlink()
    with pytest.raises(FileNotFoundError, match=f"1 of {len(shards)} shards.*{shards[1].name}"):
        Scorer.from_folder(tmp_path, stream_weights=True, device="cpu")
    shards[1].write_bytes(b"torn")
    with pytest.raises(ValueError, match=f"{shards[1].name} is damaged"):
        Scorer.from_folder(tmp_path, device="cpu")
    for file in tmp_path.glob("*.safetensors*"):
        file.unlink()
    with pytest.raises(FileNotFoundError, match="neither model.safetensors nor"):
        Scorer.from_folder(tmp_path, device="cpu")


@pytest.mark.parametrize("stream", [False, True])
def test_a_missing_or_misshaped_tensor_is_named(folders, tmp_path, stream):
    for file in folders("qwen3").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())

    def loaded(**changes):
        layers = changes.get("num_hidden_layers", 3)
        changes["layer_types"] = ["full_attention"] * layers
        (tmp_path / "config.json").write_text(json.dumps(config | changes))
        scorer = Scorer.from_folder(tmp_path, stream_weights=stream, device="cpu")
        return scorer.score(torch.arange(4))

    with pytest.raises(ValueError, match="no tensor 'model.layers.3.input_layernorm.weight'"):
        loaded(num_hidden_layers=4)
    with pytest.raises(ValueError, match=r"mlp.gate_proj.weight.* is \(48, 32\).*\(50, 32\)"):
        loaded(intermediate_size=50)
