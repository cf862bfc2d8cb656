"""Engines whose processes hold a part each of the weights, the gradients and the optimizer.

    fsdp2      torch's fully_shard: fp32 shards, gathered a layer at a time in the compute dtype
    deepspeed  ZeRO 1 or 2, where every process has all weights, or 3

fsdp2 and ZeRO 3 load sharded: the model is built without memory for parameters, and each gets its
values from the files one at a time. All engines write models, and weights for a server, as a stream
of single tensors. Only the model for embedded rollouts is whole, on every process.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from qwenlong.config import Recipe
from qwenlong.engines import (
    Engine,
    adamw,
    build_policy,
    check_attention,
    read_adapter,
    start_adapter,
    wrap_model,
)
from qwenlong.errors import InputError
from qwenlong.merge_files import Checkpoint, open_checkpoint, read_header
from qwenlong.models import (
    DTYPES,
    check_head,
    empty_causal_lm,
    parameters_on_meta,
    pick_device,
    split_head,
)
from qwenlong.policy import PackedPolicy
from qwenlong.weight_stream import (
    SPLIT_EXPERTS,
    Weight,
    WeightStream,
    find_weight,
    in_file_order,
    read_elements,
    split_experts,
)


def empty_policy(recipe: Recipe, folder: str | Path) -> PackedPolicy:
    """``build_policy`` without its weights: parameters are on the meta device."""
    with parameters_on_meta():
        return wrap_model(recipe, empty_causal_lm(folder))


def stored_name(name: str) -> str | None:
    """A parameter of ``policy.model`` as transformers names it; None for one of an adapter."""
    if ".lora_" in name:
        return None
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


class Source:
    """The first values of a policy's parameters: a transformers folder, and adapters.

    Raises:
        InputError: a parameter is missing, or in a layout that is not known here.
    """

    def __init__(
        self, recipe: Recipe, policy: PackedPolicy, folder: str | Path, adapter: Path | None
    ):
        self._seed = recipe.seed
        self._checkpoint: Checkpoint = open_checkpoint(folder)
        self._adapter = read_adapter(adapter) if adapter is not None else {}
        self.weights: dict[str, Weight] = {}  # by the names of `policy.model`, without adapters
        for name, parameter in policy.model.named_parameters():
            stored = stored_name(name)
            if stored is not None:
                self.weights[name] = find_weight(self._checkpoint, stored, tuple(parameter.shape))

    def fill(self, name: str, shape: torch.Size, first_row: int, out: torch.Tensor) -> None:
        """Rows of the parameter ``name``, which has ``shape``, from ``first_row`` on."""
        if name in self.weights:
            start = first_row * (self.weights[name].numel // shape[0])
            read_elements(self._checkpoint, self.weights[name], start, out)
            return
        whole = self._adapter.get(name)
        if whole is None:
            whole = torch.empty(shape)
            start_adapter(name, self._seed, whole)
        out.copy_(whole[first_row : first_row + len(out)])


def materialise(
    module: nn.Module,
    make: Callable[[nn.Parameter], torch.Tensor],
    done: Callable[[nn.Module], None] = lambda module: None,
) -> None:
    """Replace every parameter on the meta device, once where it is tied, innermost modules first.

    ``done`` takes a module as soon as all its own parameters have memory.
    """
    made: dict[int, nn.Parameter] = {}
    for owner in reversed(list(module.modules())):
        own = list(owner.named_parameters(recurse=False))
        for name, parameter in own:
            if id(parameter) not in made:
                made[id(parameter)] = nn.Parameter(make(parameter), parameter.requires_grad)
            owner._parameters[name] = made[id(parameter)]
        if own:
            done(owner)


class ShardedEngine(Engine):
    """What FSDP2 and DeepSpeed have in common.

    Each has ``_named``, all parameters by the names of ``policy.model``, tied ones once;
    ``_weights``, how files store those that belong to no adapter; and ``_whole``, which gives one
    parameter, fp32 on the engine's device, in a collective call.
    """

    lockstep = True
    _named: dict[str, nn.Parameter]
    _weights: dict[str, Weight]
    _whole: Callable[[nn.Parameter], torch.Tensor]

    def __init__(self, recipe: Recipe, folder: str | Path):
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.process_group = dist.group.WORLD
        self.recipe, self._folder = recipe, folder
        self._replica: PackedPolicy | None = None

    @classmethod
    def load(cls, recipe: Recipe, folder: str | Path, adapter: Path | None = None) -> ShardedEngine:
        if not dist.is_initialized():
            raise InputError(
                f"engine.kind {recipe.engine.kind} runs under torchrun: torchrun --nproc-per-node "
                "N -m qwenlong.cli train ..."
            )
        return cls(recipe, folder, adapter)

    @torch.no_grad()
    def _merged(self, name: str) -> torch.Tensor:
        """A weight with its adapter added, if it has one. A collective call."""
        value = self._whole(self._named[name])
        layer = name.removesuffix(".base_layer.weight")
        if layer != name:
            scaling = self.policy.model.get_submodule(layer).scaling["default"]
            first, second = (
                self._whole(self._named[f"{layer}.lora_{part}.default.weight"]) for part in "AB"
            )
            value = value + scaling * (second @ first)
        return value

    def stream(self) -> WeightStream:
        """The current weights by the names of transformers, adapters merged."""
        names = {stored_name(name): name for name in self._named if stored_name(name)}
        return WeightStream(
            {stored: self._weights[names[stored]] for stored in in_file_order(list(names))},
            lambda stored: self._merged(names[stored]),
            is_main=self.rank == 0,
        )

    def rollout_model(self) -> nn.Module | WeightStream:
        if self.recipe.rollout.backend == "vllm":
            return self.stream()
        changed = [name for name, p in self._named.items() if p.requires_grad]
        if self._replica is None:  # frozen weights are copied once
            self._replica, changed = self._empty_replica(), list(self._named)
        targets = dict(self._replica.model.named_parameters())
        with torch.no_grad():
            for name in changed:
                targets[name].copy_(self._whole(self._named[name]))
        return self._replica.causal_lm

    def _empty_replica(self) -> PackedPolicy:
        """A model that answers, in the dtype that computes."""
        replica = empty_policy(self.recipe, self._folder)
        dtype = DTYPES[self.recipe.model.compute_dtype]
        materialise(replica, lambda p: torch.empty(p.shape, dtype=dtype, device=self.device))
        return replica.to(self.device).train()

    def weights(self) -> dict[str, torch.Tensor]:
        found = {}
        for name, parameter in self._named.items():
            if parameter.requires_grad:
                value = self._whole(parameter)
                if self.rank == 0:
                    found[name] = value.cpu()
        return found

    def save_model(self, folder: Path, dtype: torch.dtype) -> None:
        self.stream().save(folder, dtype)
        if self.rank == 0:
            model = self.policy.causal_lm
            config = copy.deepcopy(model.config)
            config.dtype, config.architectures = dtype, [type(model).__name__]
            config.save_pretrained(folder)
            if model.can_generate():
                model.generation_config.save_pretrained(folder)

    def _check(self, work: Callable[[Callable[[], None]], None], model: nn.Module) -> None:
        """What ``build_policy`` checks of a model that is whole; ``work`` runs a call with the head
        gathered.
        """
        self.policy.eval()
        with torch.no_grad():
            work(lambda: check_head(split_head(self.policy.causal_lm), "auto"))
        check_attention(model, self._folder, self.device)
        self.policy.train()


# --- FSDP2 -------------------------------------------------------------------


class FSDP2Engine(ShardedEngine):
    """Weights, gradients and optimizer in shards; whole layers exist while they compute."""

    def __init__(self, recipe: Recipe, folder: str | Path, adapter: Path | None):
        from torch.distributed.fsdp import (
            MixedPrecisionPolicy,
            fully_shard,
            register_fsdp_forward_method,
        )

        super().__init__(recipe, folder)
        self.device = pick_device(recipe.model.device)
        self.policy = policy = empty_policy(recipe, folder)
        source = Source(recipe, policy, folder, adapter)
        mesh = dist.init_device_mesh(self.device.type, (self.world_size,))
        precision = MixedPrecisionPolicy(
            param_dtype=DTYPES[recipe.model.compute_dtype],
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,  # advantages and loss weights stay in fp32
        )
        for layer in policy.causal_lm.base_model.layers:
            fully_shard(layer, mesh=mesh, mp_policy=precision)
        fully_shard(policy, mesh=mesh, mp_policy=precision)
        register_fsdp_forward_method(policy, "call")
        buffers = {name: buffer.clone() for name, buffer in policy.named_buffers()}
        policy.to_empty(device=self.device)
        for name, buffer in policy.named_buffers():
            buffer.copy_(buffers[name])

        self._named = dict(policy.model.named_parameters())
        self._weights = source.weights
        for name, parameter in self._named.items():
            local = parameter.to_local()
            if local.numel():
                source.fill(name, parameter.shape, self._first_row(parameter), local.detach())
        self._masters = self._working = [p for p in self._named.values() if p.requires_grad]
        self._optimizer = adamw(self._masters, recipe)
        self._check(policy.call, policy)
        policy.reshard()

    def _first_row(self, parameter: nn.Parameter) -> int:
        """Of this rank's shard: rows are divided as ``torch.chunk`` does."""
        rows = -(-parameter.shape[0] // self.world_size)
        return min(self.rank * rows, parameter.shape[0])

    def _whole(self, parameter: nn.Parameter) -> torch.Tensor:
        return parameter.detach().full_tensor()

    def backward(self, loss: torch.Tensor, *, is_last: bool) -> None:
        # FSDP2 averages gradients over ranks, but the loss is a sum over them.
        (loss * self.world_size).backward()

    def save_optimizer(self, folder: Path) -> None:
        """A file a rank: its rows of Adam's averages, and how many updates each has seen.

        A parameter that never had a gradient is in none of them.
        """
        tensors = {}
        for name, parameter in self._named.items():
            if state := self._optimizer.state.get(parameter):
                tensors[f"step.{name}"] = state["step"].reshape(1)
                for key in _AVERAGES:
                    tensors[f"{key}.{name}"] = state[key].to_local()
        weights = {name: Weight(tuple(t.shape), (name,)) for name, t in tensors.items()}
        WeightStream(weights, tensors.__getitem__).save(
            folder, torch.float32, file=_optimizer_file(self.rank)
        )

    def load_optimizer(self, folder: Path) -> None:
        """Of any number of ranks: a shard takes its rows from the files that have them.

        Raises:
            InputError: no files, or they are not those of this model's optimizer.
        """
        files = []
        while (file := folder / _optimizer_file(len(files))).is_file():
            files.append(Checkpoint(folder, read_header(file), tied=False))
        if not files:
            raise InputError(f"{folder} holds no optimizer of engine.kind fsdp2.")
        for name, parameter in self._named.items():
            keys = [f"{key}.{name}" for key in ("step", *_AVERAGES)]
            known = sum(key in file.entries for file in files for key in keys)
            if not known:  # no gradient before it was saved
                continue
            if known < len(files) * len(keys) or not parameter.requires_grad:
                raise _foreign_optimizer(folder, name)
            state = self._optimizer.state[parameter]
            state["step"] = files[0].read(keys[0], 0, 1).reshape(())
            for key, stored in zip(_AVERAGES, keys[1:], strict=True):
                state[key] = torch.zeros_like(parameter)
                self._read_rows(files, stored, parameter, state[key].to_local())

    def _read_rows(
        self, files: list[Checkpoint], name: str, parameter: nn.Parameter, out: torch.Tensor
    ) -> None:
        flat, row = out.detach().view(-1), parameter.numel() // parameter.shape[0]
        wanted, start = self._first_row(parameter) * row, 0
        for file in files:
            shape = file.entries[name].shape
            size = file.entries[name].numel
            first, last = max(wanted, start), min(wanted + flat.numel(), start + size)
            if first < last:
                target = flat[first - wanted : last - wanted]
                read_elements(file, Weight(shape, (name,)), first - start, target)
            start += size
        if start != parameter.numel():
            raise _foreign_optimizer(files[0].folder, name)


_AVERAGES = ("exp_avg", "exp_avg_sq")


def _optimizer_file(rank: int) -> str:
    return f"optimizer-{rank}.safetensors"


def _foreign_optimizer(folder: Path, name: str) -> InputError:
    return InputError(
        f"{folder}: the optimizer's {name} is not that of the model, or not whole; go on from "
        "another checkpoint."
    )


# --- DeepSpeed ---------------------------------------------------------------


class DeepSpeedEngine(ShardedEngine):
    """ZeRO: the optimizer (1), gradients (2) and weights (3) in shards."""

    def __init__(self, recipe: Recipe, folder: str | Path, adapter: Path | None):
        try:
            import deepspeed
        except ImportError:
            raise InputError(
                "engine.kind deepspeed needs the package deepspeed: pip install "
                "'qlkernels[deepspeed]'."
            ) from None

        super().__init__(recipe, folder)
        stage = recipe.engine.zero_stage
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": recipe.optimizer.max_grad_norm,
            "bf16": {"enabled": recipe.model.compute_dtype == "bfloat16"},
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        if stage == 3:
            self.policy = policy = self._load_sharded(deepspeed, config, adapter)
            head = policy.causal_lm.get_output_embeddings()
            for parameter in head.parameters():  # read by PackedPolicy, not by a call of the head
                deepspeed.zero.register_external_parameter(policy, parameter)
        else:
            self.policy = policy = build_policy(recipe, folder)
            if adapter is not None:
                policy.model.load_state_dict(read_adapter(adapter), strict=False)
            self.device = next(policy.parameters()).device
            self._weights = _usual_layout(policy)
        self._named = dict(policy.model.named_parameters())
        trained = [p for p in self._named.values() if p.requires_grad]
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=policy,
            optimizer=adamw(trained, recipe),
            dist_init_required=False,
            config=config,
        )
        if stage == 3:
            gathered = deepspeed.zero.GatheredParameters

            def with_head(work: Callable[[], None]) -> None:
                with gathered(list(head.parameters())):
                    work()

            self._check(with_head, self._engine)

    def _load_sharded(self, deepspeed, config: dict, adapter: Path | None) -> PackedPolicy:
        """Rank 0 reads a module's parameters; DeepSpeed gives every rank its part of them."""
        self.device = pick_device(self.recipe.model.device)
        policy = empty_policy(self.recipe, self._folder)
        source = Source(self.recipe, policy, self._folder, adapter)
        self._weights = source.weights
        names = {id(p): name for name, p in policy.model.named_parameters()}
        dtype = DTYPES[self.recipe.model.compute_dtype]

        def read(parameter: nn.Parameter) -> torch.Tensor:
            value = torch.empty(parameter.shape, dtype=dtype, device=self.device)
            if self.rank == 0:
                source.fill(names[id(parameter)], parameter.shape, 0, value)
            return value

        materialise(
            policy,
            read,
            lambda module: deepspeed.zero.Init(module=module, config_dict_or_path=config),
        )
        return policy.to(self.device).train()

    def forward(self, layout, inputs=None):
        return self._engine(layout, inputs)

    def backward(self, loss: torch.Tensor, *, is_last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(is_last)
        self._engine.backward(loss * self.world_size)  # it averages over ranks

    def step(self, learning_rate: float) -> float:
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self._engine.step()
        norm = self._engine.get_global_grad_norm()
        norm = float(norm) if norm is not None else 0.0
        if not norm < float("inf"):  # known only after ZeRO has updated
            raise RuntimeError(f"the gradient's norm is {norm}; resume from the last checkpoint")
        return norm

    def _whole(self, parameter: nn.Parameter) -> torch.Tensor:
        import deepspeed
        from deepspeed.utils import safe_get_full_fp32_param

        value = safe_get_full_fp32_param(parameter) if parameter.requires_grad else None
        if value is None:  # frozen, or in fp32 itself
            with deepspeed.zero.GatheredParameters([parameter]):
                value = parameter.detach().float().clone()
        return value.detach()

    def save_optimizer(self, folder: Path) -> None:
        self._engine.save_checkpoint(str(folder), tag="deepspeed", save_latest=False)

    def load_optimizer(self, folder: Path) -> None:
        count = len(list(folder.glob("deepspeed/*zero_pp_rank_*_optim_states.pt")))
        if count not in (0, self.world_size):
            raise InputError(
                f"{folder} was saved by {count} processes, and DeepSpeed goes on with as many, not "
                f"{self.world_size}: torchrun --nproc-per-node {count}."
            )
        path, _ = self._engine.load_checkpoint(str(folder), tag="deepspeed")
        if path is None:
            raise InputError(f"{folder} holds no checkpoint of DeepSpeed.")


def _usual_layout(policy: PackedPolicy) -> dict[str, Weight]:
    """How checkpoints of this type of model store its parameters."""
    are_split = policy.causal_lm.config.model_type in SPLIT_EXPERTS
    found = {}
    for name, parameter in policy.model.named_parameters():
        stored, shape = stored_name(name), tuple(parameter.shape)
        if stored is not None:
            split = split_experts(stored, shape) if are_split else None
            found[name] = split or Weight(shape, (stored,))
    return found
