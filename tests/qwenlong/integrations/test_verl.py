"""Our estimator, settings, fused head and example, against the real verl's functions."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from qlkernels.testing import assert_as_accurate

pytest.importorskip("verl", reason="scripts/verl_env.sh makes an environment with verl")

import numpy as np  # noqa: E402
from hydra import compose, initialize_config_dir  # noqa: E402
from omegaconf import DictConfig, OmegaConf  # noqa: E402
from transformers import Qwen3Config, Qwen3ForCausalLM  # noqa: E402
from verl import DataProto  # noqa: E402
from verl.models.transformers import monkey_patch  # noqa: E402
from verl.trainer.ppo.core_algos import get_adv_estimator_fn  # noqa: E402
from verl.trainer.ppo.ray_trainer import compute_advantage  # noqa: E402
from verl.trainer.ppo.v1 import get_trainer_cls  # noqa: E402
from verl.utils.experimental import torch_functional  # noqa: E402

from qwenlong.advantages import group_advantages  # noqa: E402
from qwenlong.integrations import verl as ours  # noqa: E402
from qwenlong.integrations import verl_kernels  # noqa: E402
from qwenlong.integrations.verl import VerlSettings, patch_verl  # noqa: E402

EXAMPLES = Path(__file__).parents[3] / "examples"


def python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


# --- names -----------------------------------------------------------------------


def test_names_are_found_through_the_entry_point():
    """Nothing of ours is imported but the plug-in, and nothing in verl is replaced."""
    code = (
        "import sys, verl.trainer.ppo.core_algos as core\n"
        "import verl.models.transformers.monkey_patch as patch\n"
        "import verl.utils.experimental.torch_functional as head\n"
        "print('qwenlong_task' in core.ADV_ESTIMATOR_REGISTRY,\n"
        "      [m for m in sys.modules if m.startswith(('qwenlong.', 'qlkernels'))],\n"
        "      patch.patch_forward_with_backends.__module__, head.FusedLinearForPPO.__module__)"
    )
    found = python(code).splitlines()[-1]
    assert found == (
        "True ['qwenlong.integrations', 'qwenlong.integrations.verl_plugin'] "
        "verl.models.transformers.monkey_patch verl.utils.experimental.torch_functional"
    )
    assert python(code, VERL_USE_EXTERNAL_PLUGINS="none").splitlines()[-1].startswith("False []")


@pytest.mark.parametrize("mode", ["sync", "colocate_async", "separate_async"])
def test_each_trainer_of_verl_has_one_of_ours(mode):
    trainer, stock = get_trainer_cls(f"qwenlong_{mode}"), get_trainer_cls(mode)
    assert issubclass(trainer, stock) and trainer.verl_mode == mode
    made = object.__new__(trainer)
    made.trainer_mode = f"qwenlong_{mode}"  # as verl's own __init__ does
    assert made.trainer_mode == mode


# --- advantages --------------------------------------------------------------------


def test_the_estimator_equals_group_advantages():
    """verl's ``compute_advantage`` with a real ``DataProto``: two tasks, of three prompts."""
    rewards = torch.tensor([1.0, 0, 1, 1, 0.25, 0.75, 0.5, 0.5, 3, 9, 5, 5])
    uids = np.repeat(np.array(["a", "b", "c"], dtype=object), 4)
    tasks = ["sums"] * 8 + ["needle"] * 4
    lengths = torch.arange(12) % 3 + 1
    mask = (torch.arange(3) < lengths[:, None]).long()
    scores = torch.zeros(12, 3).scatter(1, lengths[:, None] - 1, rewards[:, None])
    data = DataProto.from_dict(
        {"token_level_rewards": scores, "response_mask": mask}, {"uid": uids}
    )
    token = ours._rows.set(ours._Rows(tasks, list(range(12)), 1e-6))
    try:
        found = compute_advantage(data, "qwenlong_task", config=OmegaConf.create({}))
    finally:
        ours._rows.reset(token)
    want = group_advantages(rewards, uids.tolist(), task_ids=tasks, scale="task")
    torch.testing.assert_close(found.batch["advantages"], want[:, None] * mask)
    assert torch.equal(found.batch["returns"], found.batch["advantages"])
    # by hand: the rewards of "needle" have a mean of 5.5 and a deviation of 2.516611
    by_hand = torch.tensor([-2.5, 3.5, -0.5, -0.5]) / 2.516611
    torch.testing.assert_close(want[8:], by_hand, rtol=1e-5, atol=1e-6)


def test_filled_up_rows_belong_to_no_task():
    """verl copies the first row's task for rows of reward 0; the advantages are as without them."""
    rewards = torch.tensor([4.0, 6.0, 0.0, 0.0])
    keys = ["a_0_0", "a_1_0", "pad7_0_0", "pad7_1_0"]
    ends = ours._session_ends(keys, [False, False, True, True])
    assert ends == [0, 1, None, None]
    token = ours._rows.set(ours._Rows(["t"] * 4, ends, 0.0))
    try:
        found, _ = ours.task_advantages(rewards[:, None], torch.ones(4, 1), ["a", "a", "p", "p"])
    finally:
        ours._rows.reset(token)
    torch.testing.assert_close(found[:, 0], torch.tensor([-(0.5**0.5), 0.5**0.5, 0.0, 0.0]))


def test_every_output_of_a_session_ends_with_its_last():
    keys = ["u_0_0", "u_0_2", "u_0_1", "v_0_0", "u_1_0", "u_0_10"]
    assert ours._session_ends(keys, [False] * 6) == [5, 5, 5, 3, 4, 5]


def test_verls_own_trainers_are_told_what_is_missing():
    with pytest.raises(RuntimeError, match="trainer.v1.trainer_mode=qwenlong_sync"):
        get_adv_estimator_fn("qwenlong_task")(torch.ones(1, 1), torch.ones(1, 1), index=["a"])


# --- settings ----------------------------------------------------------------------


def config(**section) -> DictConfig:
    return OmegaConf.create({"trainer": {"v1": {"qwenlong": section}}})


def test_settings_come_from_the_section():
    without = OmegaConf.create({"trainer": {"v1": {}}}, flags={"struct": True})
    assert VerlSettings.from_config(without) == VerlSettings()
    found = VerlSettings.from_config(config(aepo_low=0.1, aepo_high=0.2, aepo_mode="band"))
    controller = found.controller()
    assert (controller.low, controller.high, controller.mode) == (0.1, 0.2, "band")
    assert controller.entropy_source == "scoring_pass" and VerlSettings().controller() is None


@pytest.mark.parametrize(
    "section, words",
    [
        (dict(aepo_low=0.1), "both aepo_low and aepo_high"),
        (dict(aepo_low=0.3, aepo_high=0.1), "0 <= low <= high"),
        (dict(aepo_low=0.1, aepo_high=0.3, aepo_mode="latched"), "mode must be one of"),
        (dict(aepo_entropy="mean"), "kind must be one of"),
        (dict(task="data_source"), "unknown keys task; known are task_field"),
    ],
)
def test_settings_that_do_not_fit(section, words):
    with pytest.raises(ValueError, match=words):
        VerlSettings.from_config(config(**section))


def test_aepo_without_entropies_is_refused():
    settings = example(
        "algorithm.rollout_correction.bypass_mode=true", "actor_rollout_ref.model.path=x"
    )
    with pytest.raises(ValueError, match="bypass_mode=False"):
        get_trainer_cls("qwenlong_sync")(settings)


# --- the example -------------------------------------------------------------------


def example(*overrides: str) -> DictConfig:
    search = "hydra.searchpath=[pkg://verl.trainer.config]"
    with initialize_config_dir(str(EXAMPLES), version_base=None):
        return compose("verl_aepo", overrides=[search, *overrides])


def keys(node, path: str = "") -> list[str]:
    if not isinstance(node, dict) or not node:
        return [path]
    return [name for k, v in node.items() for name in keys(v, f"{path}.{k}" if path else k)]


def test_every_key_of_the_example_is_one_of_verls():
    import verl.trainer.config

    with initialize_config_dir(os.path.dirname(verl.trainer.config.__file__), version_base=None):
        known = compose("ppo_trainer")
    text = OmegaConf.to_container(OmegaConf.load(EXAMPLES / "verl_aepo.yaml"))
    del text["defaults"]
    section = text["trainer"]["v1"].pop("qwenlong")
    assert len(keys(text)) > 25
    for name in keys(text):
        parent, key = name.rsplit(".", 1)
        assert key in OmegaConf.select(known, parent).keys(), name
    assert set(section) <= set(VerlSettings.__dataclass_fields__)


def test_the_page_names_every_option():
    page = (EXAMPLES.parent / "docs" / "integrations.md").read_text()
    table = page.split("\n## verl\n")[1]
    for name, field in VerlSettings.__dataclass_fields__.items():
        assert f"`{name}`" in table and str(field.default) in table, name


def test_the_examples_values_are_accepted_by_verl(tmp_path):
    from verl.utils.config import omega_conf_to_dataclass, validate_config

    from qwenlong.tiny import tiny_model

    found = example(f"actor_rollout_ref.model.path={tiny_model(tmp_path / 'model')}")
    validate_config(found, use_reference_policy=False, use_critic=False)
    actor = omega_conf_to_dataclass(found.actor_rollout_ref.actor)
    assert actor.strategy == "fsdp2" and actor.use_dynamic_bsz
    assert omega_conf_to_dataclass(found.actor_rollout_ref.rollout).n == 8
    assert omega_conf_to_dataclass(found.algorithm).adv_estimator == "qwenlong_task"
    assert VerlSettings.from_config(found).controller().high == 0.248
    # the model's configuration imports external_lib, which is the switch
    try:
        model = omega_conf_to_dataclass(found.actor_rollout_ref.model)
        assert model.fused_kernel_options["impl_backend"] == "qwenlong"
        assert torch_functional.FusedLinearForPPO(impl_backend="qwenlong")
    finally:
        sys.modules.pop("qwenlong.integrations.verl_external").PATCH.undo()


def test_the_examples_command_finds_it():
    """What the file's first lines say, up to the composed configuration."""
    command = (EXAMPLES / "verl_aepo.yaml").read_text().split("#   python ")[1].split("# The")[0]
    words = command.replace("#", "").replace("\\\n", "").split()
    done = subprocess.run(
        [sys.executable, *words, "--cfg", "job"],
        cwd=EXAMPLES.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = OmegaConf.create(done.stdout[done.stdout.index("actor_rollout_ref:") :])
    assert found.trainer.v1.trainer_mode == "qwenlong_sync" and found.data.train_batch_size == 128
    assert found.actor_rollout_ref.model.path == "Qwen/Qwen3-4B-Thinking-2507"


# --- the fused head ------------------------------------------------------------------


def head_grads(backend: str, hidden, weight, ids, temperature, upstream) -> dict:
    head = torch_functional.FusedLinearForPPO(impl_backend=backend)
    leaves = [x.detach().clone().requires_grad_() for x in (hidden, weight)]
    logprobs, entropy = head(*leaves, ids, temperature=temperature)
    parts = [(v, g) for v, g in zip((logprobs, entropy), upstream, strict=True) if g is not None]
    sum((v * g.to(v.dtype)).sum() for v, g in parts).backward()
    return dict(logprobs=logprobs, entropy=entropy, dhidden=leaves[0].grad, dweight=leaves[1].grad)


@pytest.mark.parametrize("which", ["both", "logprobs", "entropy"])
@pytest.mark.parametrize(
    "shape, V, temperature",
    [((1,), 2, 1.0), ((1, 37), 101, 0.7), ((3, 5), 1003, 1.3), ((513,), 257, 1.0)],
    ids=str,
)
def test_the_head_equals_verls(shape, V, temperature, which):
    """Forward and backward in fp32; verl's own takes 512 rows at a time."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(*shape, 24), torch.randn(V, 24)
    ids, upstream = torch.randint(V, shape), [torch.randn(shape), torch.randn(shape)]
    if which != "both":
        upstream[which == "logprobs"] = None
    run = partial(
        head_grads, hidden=hidden, weight=weight, ids=ids, temperature=temperature,
        upstream=upstream,
    )  # fmt: skip
    want = run("torch")
    with patch_verl():
        found = run("qwenlong")
        assert all(torch.equal(v, want[k]) for k, v in run("torch").items())  # verl's own is intact
    assert found["logprobs"].shape == shape and found["dhidden"].shape == hidden.shape
    for name, value in found.items():
        torch.testing.assert_close(value, want[name], rtol=1e-4, atol=1e-4)


def test_the_head_is_as_accurate_as_verls_in_bf16():
    """Against fp64, no worse than verl's, which rounds its logits."""
    torch.manual_seed(1)
    hidden, weight = torch.randn(65, 32), torch.randn(509, 32) * 0.3
    ids, upstream = torch.randint(509, (65,)), [torch.randn(65), torch.randn(65)]
    low = [x.bfloat16() for x in (hidden, weight)]
    with patch_verl():
        found = head_grads("qwenlong", *low, ids, 0.9, upstream)
    baseline = head_grads("torch", *low, ids, 0.9, upstream)
    leaves = [x.double().requires_grad_() for x in low]
    logp = (leaves[0] @ leaves[1].T / 0.9).log_softmax(-1)
    truth = dict(logprobs=logp.gather(1, ids[:, None])[:, 0], entropy=-(logp.exp() * logp).sum(-1))
    sum((truth[k] * g).sum() for k, g in zip(truth, upstream, strict=True)).backward()
    truth |= dict(dhidden=leaves[0].grad, dweight=leaves[1].grad)
    for name, value in found.items():
        assert_as_accurate(name, value, truth[name], baseline[name], slack=1.0)


def tiny() -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=101, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=8, tie_word_embeddings=True,
        )
    )  # fmt: skip


def model_grads(backend: str) -> list[torch.Tensor]:
    """As verl's FSDP engine calls a model: one packed row, labels already shifted."""
    model = tiny()
    monkey_patch.apply_monkey_patch(
        model, use_remove_padding=False, use_fused_kernels=True, fused_kernels_backend=backend
    )
    torch.manual_seed(1)
    ids, weights = torch.randint(101, (1, 23)), torch.randn(2, 1, 23)
    out = model(
        input_ids=ids, temperature=0.8, return_dict=True, shift_labels=ids.roll(-1, 1),
        use_cache=False,
    )  # fmt: skip
    ((out.log_probs * weights[0]).sum() + (out.entropy * weights[1]).sum()).backward()
    return [out.log_probs, out.entropy, *(p.grad for p in model.parameters())]


def test_a_model_with_our_backend_equals_verls(monkeypatch):
    monkeypatch.setattr(Qwen3ForCausalLM, "forward", Qwen3ForCausalLM.forward)  # verl replaces it
    want = model_grads("torch")
    used, op = [], verl_kernels.linear_logprob
    with patch_verl():
        monkeypatch.setattr(
            verl_kernels, "linear_logprob", lambda *a, **k: used.append(1) or op(*a, **k)
        )
        found = model_grads("qwenlong")
    assert used == [1] and len(found) > 10
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_patch_verl_is_undone():
    def names():
        return monkey_patch.patch_forward_with_backends, torch_functional.FusedLinearForPPO

    before = names()
    outer = patch_verl()
    patched = names()
    assert all(a is not b for a, b in zip(before, patched, strict=True))
    with patch_verl() as inner:
        assert names() == patched
    inner.undo()  # twice does no harm
    assert names() == patched
    outer.undo()
    assert names() == before
    with pytest.raises(ValueError, match="Unsupported FusedLinearForPPO backend"):
        torch_functional.FusedLinearForPPO(impl_backend="qwenlong")


def test_unknown_backends_are_still_verls_to_refuse():
    with patch_verl(), pytest.raises(ValueError, match="Unsupported FusedLinearForPPO backend"):
        torch_functional.FusedLinearForPPO(impl_backend="qwen")
