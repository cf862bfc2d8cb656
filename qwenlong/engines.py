"""How the policy's weights are held, updated and shared between processes.

    torch      one process; fp32 weights, and a bf16 copy that computes where asked for
    fsdp2      torch's fully_shard: fp32 shards, gathered a layer at a time in the compute dtype
    deepspeed  ZeRO 1, 2 or 3

Every engine takes the same calls; losses are sums over micro-batches and over ranks, so that the
number of processes changes nothing but rounding. Sharded engines run collectives in forward and
backward, so that all ranks must make the same number of passes (``lockstep``).
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from qlkernels import LinearPolicyLoss, TokenScores
from qlkernels.prefix_group import PackedGroups, pack_groups
from qwenlong.config import LoraSettings, Recipe
from qwenlong.errors import InputError
from qwenlong.models import DTYPES, load_causal_lm, pick_device
from qwenlong.policy import LossInputs, PackedPolicy

OPTIMIZER_FILE = "optimizer.pt"


class Engine:
    """One process that holds everything, and the interface of the others.

    Args:
        policy: in fp32, on the device it trains on.
        recipe: optimizer and compute dtype are read.

    ``replica`` is the policy, or an unsharded copy of it whose weights may be older.
    """

    lockstep = False
    rank, world_size = 0, 1
    process_group: dist.ProcessGroup | None = None

    def __init__(self, policy: PackedPolicy, recipe: Recipe):
        self.policy = self.replica = policy
        self.recipe = recipe
        self.device = next(policy.parameters()).device
        self._working = [p for p in policy.parameters() if p.requires_grad]
        self._masters = self._working
        dtype = DTYPES[recipe.model.compute_dtype]
        if dtype != torch.float32:
            self._masters = [nn.Parameter(p.detach().clone()) for p in self._working]
            _cast(policy, dtype)
            for working, master in zip(self._working, self._masters, strict=True):
                # Micro-batches add up in fp32; a bf16 sum would lose the small ones.
                working.register_post_accumulate_grad_hook(
                    lambda p, master=master: _move_gradient(p, master)
                )
        self._optimizer = _adamw(self._masters, recipe)

    # --- a step ---------------------------------------------------------------

    def forward(
        self, layout: PackedGroups, inputs: LossInputs | None = None
    ) -> TokenScores | LinearPolicyLoss:
        return self.policy(layout, inputs)

    def backward(self, loss: torch.Tensor, *, is_last: bool) -> None:
        """Add the gradient of one micro-batch; ``is_last`` ends the step's sum."""
        loss.backward()

    def step(self, learning_rate: float) -> float:
        """Clip, update, clear; returns the norm before clipping.

        Raises:
            FloatingPointError: the norm is not finite; nothing was updated.
        """
        limit = self.recipe.optimizer.max_grad_norm
        norm = torch.nn.utils.clip_grad_norm_(self._masters, limit)
        norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        if norm == norm and norm != float("inf"):
            for group in self._optimizer.param_groups:
                group["lr"] = learning_rate
            self._optimizer.step()
            if self._masters is not self._working:
                with torch.no_grad():
                    torch._foreach_copy_(self._working, self._masters)
        self._optimizer.zero_grad(set_to_none=True)
        if not norm < float("inf"):
            raise FloatingPointError(f"the gradient's norm is {norm}")
        return norm

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over ranks of a small CPU tensor."""
        if self.world_size > 1:
            values = values.to(self.device)
            dist.all_reduce(values, group=self.process_group)
        return values.cpu()

    def largest(self, value: int) -> int:
        """The largest of one number a rank."""
        if self.world_size > 1:
            found = torch.tensor(value, device=self.device)
            dist.all_reduce(found, op=dist.ReduceOp.MAX, group=self.process_group)
            value = int(found)
        return value

    def gather(self, value: Any) -> list[Any]:
        """One value a rank, in order, on every rank."""
        if self.world_size == 1:
            return [value]
        found: list[Any] = [None] * self.world_size
        dist.all_gather_object(found, value, group=self.process_group)
        return found

    # --- weights --------------------------------------------------------------

    def rollout_model(self) -> nn.Module:
        """An unsharded transformers model with the current weights. A collective call."""
        return self._for_rollouts(self.policy)

    def _for_rollouts(self, policy: PackedPolicy) -> nn.Module:
        """A server knows no adapters: it gets them merged into a copy."""
        is_merged = self.recipe.model.lora is not None and self.recipe.rollout.backend == "vllm"
        return merged_copy(policy.model) if is_merged else policy.causal_lm

    def weights(self) -> dict[str, torch.Tensor]:
        """The weights that are trained, fp32 on the CPU, by the names of ``policy.model``; empty on
        ranks other than 0. A collective call.
        """
        masters = {
            id(p): m.detach().cpu() for p, m in zip(self._working, self._masters, strict=True)
        }
        named = self.policy.model.state_dict(keep_vars=True)  # tied weights under both names
        return {name: masters[id(p)] for name, p in named.items() if id(p) in masters}

    def save_optimizer(self, folder: Path) -> None:
        """Write what the optimizer remembers. A collective call."""
        torch.save(self._optimizer.state_dict(), folder / OPTIMIZER_FILE)

    def load_optimizer(self, folder: Path) -> None:
        state = torch.load(folder / OPTIMIZER_FILE, map_location="cpu", weights_only=True)
        self._optimizer.load_state_dict(state)


def _cast(module: nn.Module, dtype: torch.dtype) -> None:
    """Parameters alone: buffers, rotary frequencies among them, stay in fp32."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)


def _replica(policy: PackedPolicy, recipe: Recipe) -> PackedPolicy:
    """A copy that answers, in the dtype that computes."""
    replica = copy.deepcopy(policy)
    _cast(replica, DTYPES[recipe.model.compute_dtype])
    return replica


def _move_gradient(working: nn.Parameter, master: nn.Parameter) -> None:
    if master.grad is None:
        master.grad = working.grad.float()
    else:
        master.grad += working.grad
    working.grad = None


def _adamw(parameters: list[nn.Parameter], recipe: Recipe) -> torch.optim.Optimizer:
    options = recipe.optimizer
    return torch.optim.AdamW(
        parameters,
        lr=options.learning_rate,
        betas=(options.beta1, options.beta2),
        eps=options.eps,
        weight_decay=options.weight_decay,
    )


# --- FSDP2 -------------------------------------------------------------------


class FSDP2Engine(Engine):
    """Weights, gradients and optimizer in shards; whole layers exist while they compute."""

    lockstep = True

    def __init__(self, policy: PackedPolicy, recipe: Recipe):
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        _need_processes("fsdp2")
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.process_group = dist.group.WORLD
        self.replica = _replica(policy, recipe)
        self.policy = policy
        self.recipe = recipe
        self.device = next(policy.parameters()).device
        mesh = dist.init_device_mesh(self.device.type, (self.world_size,))
        precision = MixedPrecisionPolicy(
            param_dtype=DTYPES[recipe.model.compute_dtype],
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,  # advantages and loss weights stay in fp32
        )
        for layer in policy.causal_lm.base_model.layers:
            fully_shard(layer, mesh=mesh, mp_policy=precision)
        fully_shard(policy, mesh=mesh, mp_policy=precision)
        self._masters = self._working = [p for p in policy.parameters() if p.requires_grad]
        self._trained = {
            name.removeprefix("model.")
            for name, p in policy.named_parameters(remove_duplicate=False)
            if p.requires_grad
        }
        self._optimizer = _adamw(self._masters, recipe)

    def backward(self, loss: torch.Tensor, *, is_last: bool) -> None:
        # FSDP2 averages gradients over ranks, but the loss is a sum over them.
        (loss * self.world_size).backward()

    def _full(self, *, on_cpu: bool) -> dict[str, torch.Tensor]:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=on_cpu)
        found = get_model_state_dict(self.policy, options=options)
        return {name.removeprefix("model."): value for name, value in found.items()}

    def rollout_model(self) -> nn.Module:
        self.replica.model.load_state_dict(self._full(on_cpu=False), strict=False)
        return self._for_rollouts(self.replica)

    def weights(self) -> dict[str, torch.Tensor]:
        found = self._full(on_cpu=True)
        return {name: value for name, value in found.items() if name in self._trained}

    def save_optimizer(self, folder: Path) -> None:
        from torch.distributed.checkpoint.state_dict import (
            StateDictOptions,
            get_optimizer_state_dict,
        )

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = {}
        # Before the first update torch would make a state by a step of its own, which Adam counts.
        if self._optimizer.state:
            state = get_optimizer_state_dict(self.policy, self._optimizer, options=options)
        if self.rank == 0:
            torch.save(state, folder / OPTIMIZER_FILE)

    def load_optimizer(self, folder: Path) -> None:
        from torch.distributed.checkpoint.state_dict import (
            StateDictOptions,
            set_optimizer_state_dict,
        )

        state = torch.load(folder / OPTIMIZER_FILE, map_location="cpu", weights_only=True)
        options = StateDictOptions(full_state_dict=True)
        if state:
            set_optimizer_state_dict(self.policy, self._optimizer, state, options=options)


# --- DeepSpeed ---------------------------------------------------------------


class DeepSpeedEngine(Engine):
    """ZeRO: the optimizer (1), gradients (2) and weights (3) in shards."""

    lockstep = True

    def __init__(self, policy: PackedPolicy, recipe: Recipe):
        try:
            import deepspeed
        except ImportError:
            raise InputError(
                "engine.kind deepspeed needs the package deepspeed: pip install "
                "'qlkernels[deepspeed]'."
            ) from None

        _need_processes("deepspeed")
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.process_group = dist.group.WORLD
        self.recipe = recipe
        self.device = next(policy.parameters()).device
        self.replica = _replica(policy, recipe)
        self._stage = recipe.engine.zero_stage
        self._names = {
            id(p): name for name, p in policy.model.named_parameters() if p.requires_grad
        }
        trained = [p for p in policy.parameters() if p.requires_grad]
        if self._stage == 3:
            head = policy.causal_lm.get_output_embeddings()
            for parameter in head.parameters():  # read by PackedPolicy, not by a call of the head
                deepspeed.zero.register_external_parameter(policy, parameter)
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=policy,
            optimizer=_adamw(trained, recipe),
            dist_init_required=False,
            config={
                "train_micro_batch_size_per_gpu": 1,
                "gradient_accumulation_steps": 1,
                "gradient_clipping": recipe.optimizer.max_grad_norm,
                "bf16": {"enabled": recipe.model.compute_dtype == "bfloat16"},
                "zero_optimization": {"stage": self._stage},
                "zero_allow_untested_optimizer": True,
                "zero_force_ds_cpu_optimizer": False,
            },
        )
        self.policy = policy
        self._parameters = {name: p for p in trained if (name := self._names[id(p)])}

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

    def _full(self) -> dict[str, torch.Tensor]:
        from deepspeed.utils import safe_get_full_fp32_param

        found = {}
        for name, parameter in self._parameters.items():
            value = safe_get_full_fp32_param(parameter)
            found[name] = (parameter if value is None else value).detach().float().cpu()
        return found

    def rollout_model(self) -> nn.Module:
        # tied weights have one name here and two in the replica
        self.replica.model.load_state_dict(self._full(), strict=False)
        return self._for_rollouts(self.replica)

    def weights(self) -> dict[str, torch.Tensor]:
        found = self._full()
        return found if self.rank == 0 else {}

    def save_optimizer(self, folder: Path) -> None:
        self._engine.save_checkpoint(str(folder), tag="deepspeed", save_latest=False)

    def load_optimizer(self, folder: Path) -> None:
        path, _ = self._engine.load_checkpoint(str(folder), tag="deepspeed")
        if path is None:
            raise InputError(f"{folder} holds no checkpoint of DeepSpeed.")


# --- building ----------------------------------------------------------------

ENGINES = {"torch": Engine, "fsdp2": FSDP2Engine, "deepspeed": DeepSpeedEngine}


def _need_processes(kind: str) -> None:
    if not dist.is_initialized():
        raise InputError(
            f"engine.kind {kind} runs under torchrun: torchrun --nproc-per-node N -m qwenlong.cli "
            "train ..."
        )


def build_policy(recipe: Recipe, folder: str | Path) -> PackedPolicy:
    """The fp32 model of ``folder`` with what the recipe asks for around it, in training mode.

    Raises:
        InputError: no such model, one whose logits are not those of its head, or whose attention
            is not plain.
    """
    settings = recipe.model
    device = pick_device(settings.device)
    lm = load_causal_lm(folder, dtype="float32", device=device.type)
    model = lm.model
    if settings.lora is not None:
        model = _with_lora(model, settings.lora)
    if settings.gradient_checkpointing:
        # gradient_checkpointing_enable in older transformers; deprecated in 5.23
        enable = getattr(model, "activation_checkpointing_enable", None)
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    policy = PackedPolicy(
        model,
        recipe.rollout.temperature,
        logit_scale=lm.logit_scale,
        softcap=lm.softcap,
        offload_activations=settings.offload_activations,
    )
    try:  # an attention that groups cannot share a prompt in is known before the first step
        with torch.no_grad():
            policy(pack_groups([[0, 1]], [[[2], [3]]]).to(device))
    except ValueError as error:
        raise InputError(f"the model in {folder} cannot be trained: {error}.") from error
    return policy.train()


def merged_copy(model: nn.Module) -> nn.Module:
    """The transformers model of a peft model, adapters added to its weights; a copy."""
    return copy.deepcopy(model).merge_and_unload()


def _with_lora(model: nn.Module, lora: LoraSettings) -> nn.Module:
    try:
        import peft
    except ImportError:
        raise InputError(
            "model.lora needs the package peft: pip install 'qlkernels[lora]'."
        ) from None
    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.target_modules),
        task_type="CAUSAL_LM",
    )
    return peft.get_peft_model(model, config)
