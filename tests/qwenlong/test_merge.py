import contextlib
import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import qwenlong.merge_command as command
from qlkernels.testing import assert_as_accurate
from qwenlong import cli
from qwenlong.errors import InputError
from qwenlong.merge import ROW, VARIANTS, DeltaSlices, TensorStats, merge_slices, sce_merge
from qwenlong.merge_command import MergeSettings, merge_checkpoints
from qwenlong.merge_files import INDEX, open_checkpoint, plan_shards
from qwenlong.merge_plot import OUTSIDE, draw_weights, place
from qwenlong.storage import LOCK_NAME, lock_folder

ROOT = Path(__file__).parents[2]


def literal(base, experts, tau, variant, dtype):
    """The formulas of the paper and of its two programmes, all positions at once."""
    base = base.to(dtype)
    d = torch.stack([expert.to(dtype) - base for expert in experts])  # [n, ...]
    S = torch.ones_like(base)
    if tau < 1:
        v = ((d - d.mean(dim=0)) ** 2).mean(dim=0).flatten()
        k = int(int((v > 0).sum()) * tau)
        S = torch.zeros_like(v)
        S[v.sort(descending=True, stable=True).indices[:k]] = 1
        S = S.view(base.shape)
    w = ((d * S) ** 2).flatten(1).mean(dim=1)
    w = w / w.sum() if w.sum() != 0 else torch.full_like(w, 1 / len(w))
    if variant == "mergekit":
        d = d * S
    s = torch.where(d.sum(dim=0) >= 0, 1.0, -1.0)
    m = (d.sign() == s).to(dtype)
    w = w.view(-1, *[1] * base.dim())
    divisor = (w * m).sum(dim=0)
    return base + (w * m * d).sum(dim=0) / torch.where(divisor == 0, 1, divisor), w.flatten()


def models(*shape, n=2, dtype=torch.float32, size=0.1, seed=0):
    g = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=g)
    experts = [base + size * (j + 1) * torch.randn(shape, generator=g) for j in range(n)]
    return base.to(dtype), [expert.to(dtype) for expert in experts]


def bits(tensor):
    return tensor.contiguous().flatten().view(torch.uint8)


# --- one tensor --------------------------------------------------------------

# Deltas 4 1 0 / -2 0 1 and 2 -1 0 / -2 3 0: variances 1 1 0 / 0 9/4 1/4. Half of the four that are
# not 0: the 9/4, and the first of the two ones. Squares there: 16 and 4 + 9. Majority signs:
# + + + / - + +, so that -1 is erased, and every delta of 0.
BASE = torch.tensor([[10.0, 20, 30], [40, 50, 60]])
FIRST = BASE + torch.tensor([[4.0, 1, 0], [-2, 0, 1]])
SECOND = BASE + torch.tensor([[2.0, -1, 0], [-2, 3, 0]])


@pytest.mark.parametrize("tau, variant, weights, moves", [
    (1.0, "authors", [22 / 40, 18 / 40], [[3.1, 1, 0], [-2, 3, 1]]),  # 0.55 * 4 + 0.45 * 2 = 3.1
    (1.0, "mergekit", [22 / 40, 18 / 40], [[3.1, 1, 0], [-2, 3, 1]]),
    (0.5, "authors", [16 / 29, 13 / 29], [[90 / 29, 1, 0], [-2, 3, 1]]),
    (0.5, "mergekit", [16 / 29, 13 / 29], [[90 / 29, 0, 0], [0, 3, 0]]),
    (0.2, "authors", [0.5, 0.5], [[3, 1, 0], [-2, 3, 1]]),  # int(0.8) = 0: uniform
    (0.2, "mergekit", [0.5, 0.5], [[0, 0, 0], [0, 0, 0]]),
])  # fmt: skip
def test_by_hand(tau, variant, weights, moves):
    merged, stats = sce_merge(BASE, [FIRST, SECOND], select_topk=tau, variant=variant)
    torch.testing.assert_close(merged, BASE + torch.tensor(moves), rtol=1e-6, atol=0)
    assert stats.weights == weights
    assert stats.rms == [(22 / 6) ** 0.5, (18 / 6) ** 0.5]
    assert stats.selected == {1.0: 6, 0.5: 2, 0.2: 0}[tau]
    assert stats.uniform == (tau == 0.2)
    assert stats.unchanged == moves[0].count(0) + moves[1].count(0)
    assert stats.conflicts == (tau == 1 or variant == "authors")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("tau", [1.0, 0.37, 0.01])
@pytest.mark.parametrize("n, shape, dtype", [
    (2, (1,), torch.float32),
    (2, (3, 2, 5), torch.float32),
    (2, (61, 67), torch.bfloat16),
    (3, (4099,), torch.float32),
    (5, (7, 301), torch.float16),
])  # fmt: skip
def test_equals_the_formulas(n, shape, dtype, tau, variant):
    base, experts = models(*shape, n=n, dtype=dtype)
    merged, stats = sce_merge(base, experts, select_topk=tau, variant=variant)
    assert merged.dtype == dtype and merged.shape == base.shape
    truth, weights = literal(base, experts, tau, variant, torch.float64)
    baseline, _ = literal(base, experts, tau, variant, torch.float32)
    torch.testing.assert_close(torch.tensor(stats.weights).double(), weights, rtol=1e-6, atol=0)
    if dtype == torch.float32:
        assert_as_accurate("merged", merged, truth, baseline)
    else:  # rounded once: at most half a unit in the last place, and a little for fp32
        unit = torch.finfo(dtype).eps * truth.abs()
        assert ((merged.double() - truth).abs() <= 0.501 * unit).all()


@pytest.mark.parametrize("tau", [0.1, 0.5, 0.9])
def test_the_selection_is_the_exact_top_k_with_ties_by_position(tau):
    # d_2 = 0, so that v = (d_1 / 2)^2: the order is that of |d_1|, here with many ties and with
    # values of every size, over many windows
    g = torch.Generator().manual_seed(1)
    n = 5 * ROW + 17
    whole = torch.randint(-6, 7, (n,), generator=g).float()
    spread = torch.randn(n, generator=g) * 10.0 ** torch.randint(-15, 15, (n,), generator=g)
    base = torch.zeros(n)
    for d in (whole, spread, torch.ones(n)):
        found = []
        slices = DeltaSlices(lambda a, b, d=d: [base[a:b], d[a:b], base[a:b]], n, ROW)
        merge_slices(slices, 2, found.append, select_topk=tau, variant="mergekit")
        order = d.abs().sort(descending=True, stable=True).indices
        want = torch.zeros(n)
        kept = order[: int(int((d != 0).sum()) * tau)]
        want[kept] = d[kept]
        assert torch.equal(torch.cat(found), want)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("tau", [1.0, 0.3])
def test_windows_and_threads_do_not_change_a_bit(tau, variant, monkeypatch):
    n = 3 * ROW + 1234
    base, experts = models(n, n=3)
    flat = [base, *experts]
    want, stats = sce_merge(base, experts, select_topk=tau, variant=variant)
    threads = torch.get_num_threads()
    try:
        for window, block, count in ((1, ROW, 1), (2 * ROW, 1 << 18, 3), (10 * ROW, 2 * ROW, 2)):
            monkeypatch.setattr("qwenlong.merge.BLOCK", block)
            torch.set_num_threads(count)
            found = []
            slices = DeltaSlices(lambda a, b: [x[a:b] for x in flat], n, window)
            again = merge_slices(slices, 3, found.append, select_topk=tau, variant=variant)
            assert torch.equal(bits(torch.cat(found)), bits(want)) and again == stats
    finally:
        torch.set_num_threads(threads)


def test_small_differences_are_weighed_too():
    # Mean squares of 9e-20 and 1e-20; a threshold of 1e-6 on their sum would give 1/2 and 1/2.
    base = torch.zeros(8)
    merged, stats = sce_merge(base, [base + 3e-10, base + 1e-10])
    assert stats.weights == pytest.approx([0.9, 0.1]) and not stats.uniform
    torch.testing.assert_close(merged, base + 2.8e-10)


def test_what_every_expert_moved_alike_has_no_variance():
    # the mean of three equal fp32 numbers, as sum / 3, is not always that number
    _, experts = models(1000, n=1)
    base = torch.zeros(1000)
    moved = [experts[0].clone() for _ in range(3)]
    for j, expert in enumerate(moved):
        expert[:10] += j
    merged, stats = sce_merge(base, moved, select_topk=0.5, variant="mergekit")
    assert stats.selected == 5 and not merged[10:].any()


def test_uniform_weights_only_where_nothing_differs():
    base = torch.tensor([1.0, -0.0, torch.inf, -torch.inf])
    merged, stats = sce_merge(base, [base.clone(), base.clone()])
    assert torch.equal(bits(merged), bits(base))
    assert stats.uniform and stats.weights == [0.5, 0.5] and stats.unchanged == 4


def test_equal_infinities_are_no_difference():
    base = torch.tensor([torch.inf, 1.0])
    merged, _ = sce_merge(base, [base, base + torch.tensor([0.0, 2.0])])
    assert merged.tolist() == [torch.inf, 3.0]


@pytest.mark.parametrize("tau", [1.0, 0.5])
@pytest.mark.parametrize("value", [torch.nan, -torch.nan, torch.inf])
def test_a_difference_that_is_no_number_is_refused(value, tau):
    base = torch.zeros(4)
    with pytest.raises(ValueError, match="expert 2 differs from the base by NaN"):
        sce_merge(base, [base, torch.tensor([0.0, value, 0.0, 1.0])], select_topk=tau)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0)])
def test_no_axes_and_no_elements(shape):
    base = torch.ones(shape)
    merged, _ = sce_merge(base, [base + 1, base + 3], select_topk=0.5)
    assert merged.shape == shape
    assert torch.equal(merged, torch.full(shape, 3.0))  # uniform: int(1 * 0.5) = 0 are selected


@pytest.mark.parametrize("change, words", [
    ({"experts": [BASE]}, "at least two"),
    ({"experts": [BASE, BASE[0]]}, r"expert 2 is \(3,\)"),
    ({"experts": [BASE.half(), BASE]}, "expert 1 is .*float16"),
    ({"base": BASE.double()}, "float64"),
    ({"select_topk": 0.0}, "select_topk is 0"),
    ({"select_topk": 1.5}, "select_topk is 1.5"),
    ({"select_topk": float("nan")}, "select_topk is nan"),
    ({"variant": "other"}, "one of authors, mergekit"),
])  # fmt: skip
def test_wrong_arguments(change, words):
    arguments = {"base": BASE, "experts": [FIRST, SECOND], **change}
    with pytest.raises(ValueError, match=words):
        sce_merge(**arguments)


@pytest.mark.parametrize("tau", [1.0, 0.2])
def test_equals_mergekit(tau):
    api = pytest.importorskip("mergekit.merge_methods.api", reason="mergekit is not installed")
    base, experts = models(40, 50, n=3)  # differences far above its thresholds of 1e-6
    want = api.merge_tensors([base, *experts], "sce", parameters={"select_topk": tau}, base_index=0)
    merged, _ = sce_merge(base, experts, select_topk=tau, variant="mergekit")
    torch.testing.assert_close(merged, want, rtol=0, atol=2e-6)


# --- checkpoints -------------------------------------------------------------


def save(folder, tensors, shards=1, **config):
    """A model folder; the tensors spread over ``shards`` files in turn."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "toy", **config}))
    names = list(tensors)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    where = {name: f"part-{i % shards}.safetensors" for i, name in enumerate(names)}
    for file in set(where.values()):
        save_file({n: tensors[n] for n in names if where[n] == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def toy(seed, size=0.05):
    """Ten tensors: an embedding, two layers, odd sizes, bf16 beside fp32, a buffer of integers."""
    shapes = {"model.embed_tokens.weight": (33, 16), "model.norm.weight": (16,)}
    for i in (2, 10):
        shapes[f"model.layers.{i}.self_attn.q_proj.weight"] = (16, 16)
        shapes[f"model.layers.{i}.mlp.experts.0.up_proj.weight"] = (48, 300)
        shapes[f"model.layers.{i}.mlp.experts.1.up_proj.weight"] = (48, 300)
    common = torch.Generator().manual_seed(0)
    own = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        value = torch.randn(shape, generator=common)
        if seed:
            value = value + size * torch.randn(shape, generator=own)
        tensors[name] = value.bfloat16() if "experts" in name else value
    tensors["model.scale"] = torch.tensor(2.0)
    tensors["model.positions"] = torch.arange(7)
    tensors["model.flag"] = torch.tensor([True])
    return tensors


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    root = tmp_path_factory.mktemp("toys")
    folders = [save(root / name, toy(seed)) for seed, name in enumerate(("base", "a", "b"))]
    (folders[0] / "tokenizer.json").write_text("{}")
    (folders[1] / "tokenizer.json").write_text('{"other": 1}')
    (folders[0] / "optimizer.pt").write_bytes(b"x")
    (folders[0] / "trainer_state.json").write_text("{}")
    return [str(folder) for folder in folders]


@pytest.fixture
def no_picture(monkeypatch):
    """Drawing takes most of the time of a small merge."""
    monkeypatch.setattr(command, "draw_weights", lambda file, *rest: file.write(b"picture"))


def settings(toys, **changes):
    return MergeSettings(**{"base": toys[0], "experts": tuple(toys[1:]), **changes})


def weights_of(folder):
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def listing(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_merged_folder(toys, tmp_path):
    out = tmp_path / "new" / "merged"
    seen = []
    report = merge_checkpoints(settings(toys), out, lambda name, count: seen.append(count))
    merged = load_file(out / "model.safetensors")
    base, a, b = (toy(seed) for seed in range(3))
    assert set(merged) == set(base)
    for name, value in base.items():
        if value.is_floating_point():
            want, stats = sce_merge(value, [a[name], b[name]])
            assert torch.equal(bits(merged[name]), bits(want))
            assert report["tensors"][name] == stats._asdict()
        else:
            assert torch.equal(merged[name], value) and name not in report["tensors"]
    assert sum(seen) == sum(v.nbytes for v in base.values())
    assert listing(out) == [
        "config.json", "merge.json", "merge.png", "model.safetensors", "tokenizer.json"
    ]  # fmt: skip
    assert listing(out.parent) == ["merged"]
    assert (out / "tokenizer.json").read_text() == "{}"
    assert json.loads((out / "merge.json").read_text()) == report
    assert report["side_files_that_differ"] == {toys[1]: ["tokenizer.json"], toys[2]: [
        "tokenizer.json"]}  # fmt: skip
    assert report["settings"]["select_topk"] == 1.0 and report["settings"]["variant"] == "authors"
    assert sum(report["summary"]["mean_weights"]) == pytest.approx(1)
    assert (out / "merge.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("tau, variant", [(1.0, "authors"), (0.3, "authors"), (0.3, "mergekit")])
def test_shards_and_memory_do_not_change_a_bit(tau, variant, tmp_path, no_picture):
    whole = [save(tmp_path / f"whole-{i}", toy(i)) for i in range(3)]
    parts = [save(tmp_path / f"parts-{i}", toy(i), shards=i + 2) for i in range(3)]
    options = {"select_topk": tau, "variant": variant}
    straight = merge_checkpoints(settings(list(map(str, whole)), **options), tmp_path / "1")
    pieces = merge_checkpoints(
        settings(list(map(str, parts)), max_shard_bytes=40_000, memory_bytes=1, **options),
        tmp_path / "2",
    )
    want, found = weights_of(tmp_path / "1"), weights_of(tmp_path / "2")
    assert set(want) == set(found)
    assert all(torch.equal(bits(want[name]), bits(found[name])) for name in want)
    assert straight["tensors"] == pieces["tensors"]
    index = json.loads((tmp_path / "2" / INDEX).read_text())
    assert len(pieces["shards"]) == 4 and set(index["weight_map"]) == set(want)
    assert index["metadata"]["total_size"] == sum(v.nbytes for v in want.values())
    for name, shard in index["weight_map"].items():
        assert name in load_file(tmp_path / "2" / shard)
    assert set(open_checkpoint(tmp_path / "2").entries) == set(want)


def test_shards_hold_natural_order_up_to_their_size(toys):
    entries = open_checkpoint(toys[0]).entries
    plan = plan_shards(entries, 30_000)
    order = [name for names in plan.values() for name in names]
    layers = [int(name.split(".")[2]) for name in order if ".layers." in name]
    assert sorted(order) == sorted(entries) and layers == sorted(layers)
    for names in plan.values():
        assert sum(entries[n].nbytes for n in names) <= 30_000 or len(names) == 1
    assert list(plan)[0] == f"model-00001-of-{len(plan):05d}.safetensors"


def test_tied_embeddings_are_stored_once(tmp_path, no_picture):
    folders = []
    for i in range(3):
        tensors = toy(i)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        if i == 1:  # one of them was saved without it
            del tensors["lm_head.weight"]
        folders.append(str(save(tmp_path / str(i), tensors, tie_word_embeddings=True)))
    merge_checkpoints(settings(folders), tmp_path / "out")
    assert set(weights_of(tmp_path / "out")) == set(toy(0))


def test_tied_embeddings_that_differ_are_refused(tmp_path):
    tensors = toy(0)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    with pytest.raises(InputError, match="lm_head.weight is tied to .*but their values differ"):
        open_checkpoint(save(tmp_path / "m", tensors, tie_word_embeddings=True))
    untied = open_checkpoint(save(tmp_path / "n", tensors, tie_word_embeddings=False))
    assert "lm_head.weight" in untied.entries


def test_memory_is_bounded(tmp_path):
    """Three models of one 16 MB tensor through a budget of 3 MB, the selection included."""
    code = f"""
import torch
from pathlib import Path
from safetensors.torch import save_file
from qwenlong import merge_command
from qwenlong.merge_command import MergeSettings, merge_checkpoints
merge_command.draw_weights = lambda *args: None  # its memory would hide that of the merge
root = Path({str(tmp_path)!r})
def run(name, numel):
    folders = []
    for i in range(3):
        folder = root / name / str(i)
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{{}}")
        with open(folder / "model.safetensors", "wb") as file:
            header = b'{{"w":{{"dtype":"BF16","shape":[%d],"data_offsets":[0,%d]}}}}' % (
                numel, 2 * numel)
            file.write(len(header).to_bytes(8, "little") + header)
            torch.manual_seed(i)
            for _ in range(numel >> 18):
                file.write(memoryview(torch.randn(1 << 18).bfloat16().view(torch.uint8).numpy()))
        folders.append(str(folder))
    merge_checkpoints(MergeSettings(folders[0], tuple(folders[1:]), 0.1, memory_bytes=3_000_000),
                      root / name / "out")
    # of this process alone; ru_maxrss begins with the peak of the process that started it
    [line] = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024
small = run("small", 1 << 18)
print(run("large", 1 << 23) - small)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 32e6  # 68e6 where the tensor is read whole


# --- refusals ----------------------------------------------------------------


def refuse(tmp_path, toys, words, **changes):
    out = tmp_path / "refused"
    with pytest.raises(InputError, match=words):
        merge_checkpoints(settings(toys, **changes), out)
    assert not out.exists() and not (tmp_path / ".refused.partial").exists()


def test_one_expert_and_the_base_as_an_expert_are_refused(toys, tmp_path):
    refuse(tmp_path, toys, "at least two experts, got 1: the variance", experts=(toys[1],))
    shutil.copytree(toys[0], tmp_path / "copy")
    experts = (toys[1], str(tmp_path / "copy"))
    refuse(tmp_path, toys, "copy has the same weights as .*base: its weight", experts=experts)
    refuse(tmp_path, toys, "merging a model with itself", experts=(toys[1], toys[1]))


@pytest.mark.parametrize("change, words", [
    (lambda t: t.pop("model.norm.weight"), "lacks model.norm.weight"),
    (lambda t: t.update(extra=torch.ones(1)), "the base lacks extra"),
    (lambda t: t.update({"model.norm.weight": torch.ones(17)}),
     r"model.norm.weight is \[17\] F32, in the base \[16\] F32"),
    (lambda t: t.update({"model.norm.weight": torch.ones(16).half()}), r"\[16\] F16, in the base"),
    (lambda t: t.update({"model.positions": torch.arange(7) + 1}), "model.positions .*no floats"),
    (lambda t: t["model.norm.weight"].fill_(torch.nan), "model.norm.weight: expert 2 differs"),
])  # fmt: skip
def test_models_that_do_not_fit_are_refused(change, words, toys, tmp_path):
    tensors = toy(2)
    change(tensors)
    expert = save(tmp_path / "expert", tensors)
    refuse(tmp_path, toys, words, experts=(toys[1], str(expert)))


def test_float_types_without_fp32_arithmetic_are_refused(tmp_path):
    folders = []
    for i in range(3):
        value = torch.full((4,), float(i)).to(torch.float8_e4m3fn)
        folders.append(str(save(tmp_path / str(i), {"w": value})))
    refuse(tmp_path, folders, "w of .* is F8_E4M3; SCE merges")


def test_damaged_folders_are_named(toys, tmp_path):
    parts = save(tmp_path / "parts", toy(2), shards=3)
    experts = (toys[1], str(parts))
    shard = parts / "part-1.safetensors"
    data = shard.read_bytes()
    shard.write_bytes(data[:-1])
    refuse(tmp_path, toys, "part-1.safetensors is cut short", experts=experts)
    shard.write_bytes(data[:5])
    refuse(tmp_path, toys, "part-1.safetensors is not a safetensors file", experts=experts)
    shard.write_bytes(b"\2\0\0\0\0\0\0\0[]")
    refuse(tmp_path, toys, "its header is not JSON", experts=experts)
    shard.write_bytes((14).to_bytes(8, "little") + b'{"w":{"a":  1}}'[:14])
    refuse(tmp_path, toys, "part-1.safetensors", experts=experts)
    save_file({"other": torch.ones(1)}, shard)
    refuse(tmp_path, toys, "tensors that its shards lack", experts=experts)
    shard.unlink()
    refuse(tmp_path, toys, "lacks part-1.safetensors, which its index names", experts=experts)
    for text in ("{}", "[]", '{"weight_map": []}', "{"):
        (parts / INDEX).write_text(text)
        refuse(tmp_path, toys, "not an index", experts=experts)
    (parts / INDEX).unlink()
    refuse(tmp_path, toys, "neither model.safetensors nor", experts=experts)
    (parts / "adapter_model.safetensors").write_bytes(b"")
    refuse(tmp_path, toys, "adapter; merge that into its base", experts=experts)
    refuse(tmp_path, toys, "nowhere is not a folder", base="nowhere")
    shutil.copy(Path(toys[2]) / "model.safetensors", parts)
    (parts / "config.json").write_text("[1]")
    refuse(tmp_path, toys, "config.json is not a JSON object", experts=experts)
    (parts / "config.json").unlink()
    refuse(tmp_path, toys, "no config.json", experts=experts)


def test_options_are_checked(toys):
    for change in ({"select_topk": 0}, {"variant": "x"}, {"memory_bytes": 0}):
        with pytest.raises(InputError):
            settings(toys, **change)


def test_an_output_that_holds_something_is_left_alone(toys, tmp_path):
    (tmp_path / "mine").write_text("x")
    with pytest.raises(InputError, match="exists and is not empty"):
        merge_checkpoints(settings(toys), tmp_path)
    assert listing(tmp_path) == ["mine"]


# --- interruptions -----------------------------------------------------------


def stop_after(tensors, error):
    """A callback that raises once ``tensors`` tensors are written."""
    seen = set()

    def on_bytes(name, count):
        seen.add(name)
        if len(seen) > tensors:
            raise error

    return on_bytes


def test_an_interrupted_merge_goes_on(toys, tmp_path, no_picture):
    options = settings(toys, max_shard_bytes=30_000)
    want = merge_checkpoints(options, tmp_path / "want")
    out, partial = tmp_path / "out", tmp_path / ".out.partial"
    with pytest.raises(KeyboardInterrupt):
        merge_checkpoints(options, out, stop_after(6, KeyboardInterrupt()))
    first = partial / want["shards"][0]
    stamp = first.stat().st_mtime_ns, first.stat().st_ino
    assert not out.exists() and not (partial / want["shards"][-1]).exists()
    (partial / f".{want['shards'][-1]}.1.tmp").write_bytes(b"torn")  # what kill -9 leaves
    found = merge_checkpoints(options, out)
    assert (out / first.name).stat().st_mtime_ns == stamp[0]
    assert (out / first.name).stat().st_ino == stamp[1]
    assert found == want and listing(out) == listing(tmp_path / "want")
    for shard in want["shards"]:
        assert (out / shard).read_bytes() == (tmp_path / "want" / shard).read_bytes()


@pytest.mark.parametrize("spoil", ["settings", "input", "journal"])
def test_what_another_merge_left_is_not_used(spoil, toys, tmp_path, no_picture):
    folders = [str(shutil.copytree(folder, tmp_path / Path(folder).name)) for folder in toys]
    options = settings(folders, max_shard_bytes=30_000)
    out, partial = tmp_path / "out", tmp_path / ".out.partial"
    with pytest.raises(KeyboardInterrupt):
        merge_checkpoints(options, out, stop_after(6, KeyboardInterrupt()))
    if spoil == "settings":
        options = settings(folders, max_shard_bytes=30_000, select_topk=0.5)
    elif spoil == "input":
        save_file(toy(3), Path(folders[2]) / "model.safetensors")
    else:
        (partial / "journal.jsonl").write_text("damaged\n")
    first = (partial / "model-00001-of-00005.safetensors").stat().st_mtime_ns
    merge_checkpoints(options, out)
    want = merge_checkpoints(options, tmp_path / "want")
    for shard in want["shards"]:
        assert (out / shard).read_bytes() == (tmp_path / "want" / shard).read_bytes()
    assert (out / "model-00001-of-00005.safetensors").stat().st_mtime_ns != first


@pytest.mark.parametrize("error, expected", [
    (OSError(errno.ENOSPC, "No space left on device"), InputError),
    (OSError(errno.EIO, "Input/output error"), OSError),
])  # fmt: skip
def test_a_failed_merge_leaves_nothing(error, expected, toys, tmp_path):
    options = settings(toys, max_shard_bytes=30_000)
    with pytest.raises(expected, match="is full" if expected is InputError else "Input/output"):
        merge_checkpoints(options, tmp_path / "out", stop_after(6, error))
    assert listing(tmp_path) == []


def test_too_little_room_is_said_before_anything_is_written(toys, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=64_050_000)
    monkeypatch.setattr(command.shutil, "disk_usage", lambda path: usage)
    refuse(tmp_path, toys, r"has 0\.064 GB free; 0\.064\d* GB are needed")


def test_two_merges_into_one_folder(toys, tmp_path, no_picture):
    partial = tmp_path / ".out.partial"
    with lock_folder(partial):
        with pytest.raises(InputError, match=r"\.out\.partial is in use by process"):
            merge_checkpoints(settings(toys), tmp_path / "out")
        assert partial.exists()
    merge_checkpoints(settings(toys), tmp_path / "out")
    assert not (tmp_path / "out" / LOCK_NAME).exists() and not partial.exists()


def test_a_merge_that_was_made_while_its_twin_waited_is_left_alone(toys, tmp_path, monkeypatch):
    @contextlib.contextmanager
    def lock_after_the_other(folder):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "model.safetensors").write_bytes(b"the other's")
        with lock_folder(folder):
            yield

    monkeypatch.setattr(command, "lock_folder", lock_after_the_other)
    with pytest.raises(InputError, match="exists and is not empty"):
        merge_checkpoints(settings(toys), tmp_path / "out")
    assert listing(tmp_path) == ["out"]
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == b"the other's"


# --- picture and command -----------------------------------------------------


@pytest.mark.parametrize("name, want", [
    ("model.layers.11.self_attn.q_norm.weight", ("norms", 11)),
    ("model.layers.0.self_attn.q_proj.weight", ("attention", 0)),
    ("model.layers.3.mlp.gate.weight", ("router", 3)),
    ("model.layers.3.mlp.experts.17.gate_proj.weight", ("experts", 3)),
    ("model.layers.3.mlp.gate_proj.weight", ("mlp", 3)),
    ("model.layers.3.strange", ("other", 3)),
    ("lm_head.weight", (OUTSIDE, -1)),
])  # fmt: skip
def test_where_a_tensor_is_drawn(name, want):
    assert place(name) == want


def test_experts_are_told_apart(tmp_path):
    assert command._labels(["x/a", "x/b/"]) == ["a", "b"]
    assert command._labels(["x/actor", "y/actor"]) == ["x/actor", "y/actor"]


def test_a_picture_of_anything(toys, tmp_path):
    same = TensorStats([0.5, 0.5], [0.0, 0.0], True, 1, 0, 1)
    moved = TensorStats([0.9, 0.1], [0.3, 0.1], False, 1, 0, 0)
    for tensors in ({}, {"a": same}, {"a": moved, "layers.3.mlp.x": moved, "layers.3.z": same}):
        with open(tmp_path / "x.png", "wb") as file:
            draw_weights(file, tensors, ["$a$", "b_1"], "of $x_$ and more")
        assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_on_mixtures_of_experts(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen3MoeConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, moe_intermediate_size=8,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        num_experts=4, num_experts_per_tok=2, max_position_embeddings=64,
        tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Qwen3MoeForCausalLM(config).to(torch.bfloat16)
    for name in ("base", "agent", "reader"):
        if name != "base":
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.02 * torch.randn_like(parameter))
        model.save_pretrained(tmp_path / name, max_shard_size="8KB")
    done = subprocess.run(
        [sys.executable, "-m", "qwenlong.cli", "merge", "--base", tmp_path / "base",
         "--experts", tmp_path / "agent", tmp_path / "reader", "--select-topk", "0.5",
         "--max-shard-gb", "0.00001", "--out", tmp_path / "merged"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "mean weights  agent 0." in done.stdout and "reader 0." in done.stdout
    base, agent, reader, merged = (
        weights_of(tmp_path / name) for name in ("base", "agent", "reader", "merged")
    )
    assert set(merged) == set(base)
    assert any("experts" in name for name in merged)
    for name, value in base.items():
        want, _ = sce_merge(value, [agent[name], reader[name]], select_topk=0.5)
        assert torch.equal(merged[name], want), name
    loaded, info = transformers.Qwen3MoeForCausalLM.from_pretrained(
        tmp_path / "merged", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert loaded(torch.arange(5)[None]).logits.isfinite().all()


def test_a_refusal_is_one_sentence(toys, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(["merge", "--base", toys[0], "--experts", toys[1], "--out", str(tmp_path / "x")])
    assert exit.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("qwenlong: a merge needs at least two experts, got 1")


def test_an_interrupted_command_says_how_to_go_on(toys, tmp_path, capsys, monkeypatch):
    def stop(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "merge_slices", stop)
    with pytest.raises(SystemExit) as exit:
        cli.main(["merge", "--base", toys[0], "--experts", *toys[1:], "--out", str(tmp_path / "x")])
    assert exit.value.code == 130
    assert "the same command goes on" in capsys.readouterr().err


def test_the_example_of_the_documentation():
    page = (ROOT / "docs" / "merge.md").read_text(encoding="utf-8")
    code = page.split("```python\n")[1].split("```")[0]
    exec(compile(code, "docs/merge.md", "exec"), {})
