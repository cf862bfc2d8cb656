"""How the policy's weights are held and updated in one process, and how a policy is built.

Every engine takes the calls of ``Engine``; losses are sums over micro-batches and over ranks, so
that the number of processes changes nothing but rounding. Those of several processes are in
``qwenlong.sharded_engines``: they run collectives in forward and backward, so that all ranks must
make the same number of passes (``lockstep``).
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from qlkernels import LinearPolicyLoss, TokenScores
from qlkernels.prefix_group import PackedGroups, pack_groups
from qwenlong.config import LoraSettings, Recipe
from qwenlong.episodes import seed_of
from qwenlong.errors import InputError
from qwenlong.models import DTYPES, load_causal_lm, pick_device, split_head
from qwenlong.policy import LossInputs, PackedPolicy
from qwenlong.weight_stream import WeightStream

OPTIMIZER_FILE = "optimizer.pt"


class Engine:
    """One process that holds everything, and the interface of the others: fp32 weights, and a copy
    in the compute dtype that computes where that is another.

    Args:
        policy: in fp32, on the device it trains on.
        recipe: optimizer and compute dtype are read.
    """

    lockstep = False
    rank, world_size = 0, 1
    process_group: dist.ProcessGroup | None = None

    def __init__(self, policy: PackedPolicy, recipe: Recipe):
        self.policy = policy
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
        self._optimizer = adamw(self._masters, recipe)

    @classmethod
    def load(cls, recipe: Recipe, folder: str | Path, adapter: Path | None = None) -> Engine:
        """The engine of ``recipe`` with the weights of a transformers folder, and with those of a
        checkpoint's ``adapter`` where LoRA is trained. A collective call.

        Raises:
            InputError: no such model, one whose logits are not those of its head, or whose
                attention is not plain.
        """
        policy = build_policy(recipe, folder)
        if adapter is not None:
            policy.model.load_state_dict(read_adapter(adapter), strict=False)
        return cls(policy, recipe)

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

    def rollout_model(self) -> nn.Module | WeightStream:
        """The current weights as ``rollout.backend`` takes them: a transformers model that is
        whole, or a stream of its weights. A collective call.
        """
        if self.recipe.rollout.backend != "vllm" or self.recipe.model.lora is None:
            return self.policy.causal_lm
        # A server knows no adapters: it gets them merged into a copy.
        return copy.deepcopy(self.policy.model).merge_and_unload()

    def weights(self) -> dict[str, torch.Tensor]:
        """The weights that are trained, fp32 on the CPU, by the names of ``policy.model``; empty on
        ranks other than 0. A collective call.
        """
        masters = {
            id(p): m.detach().cpu() for p, m in zip(self._working, self._masters, strict=True)
        }
        named = self.policy.model.state_dict(keep_vars=True)  # tied weights under both names
        return {name: masters[id(p)] for name, p in named.items() if id(p) in masters}

    def save_model(self, folder: Path, dtype: torch.dtype) -> None:
        """Write a transformers folder without a tokenizer, adapters merged. A collective call."""
        model, weights = self.policy.model, self.weights()
        if self.recipe.model.lora is not None:
            model = copy.deepcopy(model).float()
            model.load_state_dict(weights, strict=False)
            model = model.merge_and_unload()
            weights = model.state_dict()
        converted = {id(w): w.to(dtype) for w in weights.values()}  # tied ones stay one tensor
        state = {name: converted[id(w)] for name, w in weights.items()}
        config_dtype, model.config.dtype = model.config.dtype, dtype
        try:
            model.save_pretrained(folder, state_dict=state)
        finally:
            model.config.dtype = config_dtype

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


def _move_gradient(working: nn.Parameter, master: nn.Parameter) -> None:
    if master.grad is None:
        master.grad = working.grad.float()
    else:
        master.grad += working.grad
    working.grad = None


def adamw(parameters: list[nn.Parameter], recipe: Recipe) -> torch.optim.Optimizer:
    options = recipe.optimizer
    return torch.optim.AdamW(
        parameters,
        lr=options.learning_rate,
        betas=(options.beta1, options.beta2),
        eps=options.eps,
        weight_decay=options.weight_decay,
    )


# --- building ----------------------------------------------------------------


def build_policy(recipe: Recipe, folder: str | Path) -> PackedPolicy:
    """The fp32 model of ``folder`` with what the recipe asks for around it, in training mode.

    Raises:
        InputError: no such model, one whose logits are not those of its head, or whose attention
            is not plain.
    """
    device = pick_device(recipe.model.device)
    lm = load_causal_lm(folder, dtype="float32", device=device.type)
    policy = wrap_model(recipe, lm.model)
    for name, parameter in policy.model.named_parameters():
        if recipe.model.lora is not None and parameter.requires_grad:
            start_adapter(name, recipe.seed, parameter.data)
    check_attention(policy, folder, device)
    return policy.train()


def wrap_model(recipe: Recipe, model: nn.Module) -> PackedPolicy:
    """A causal language model with what the recipe asks for around it; parameters may be on meta.

    Values of adapters are left open.
    """
    settings, lm = recipe.model, split_head(model)
    if settings.lora is not None:
        model = _with_lora(model, settings.lora)
    if settings.gradient_checkpointing:
        # gradient_checkpointing_enable in older transformers; deprecated in 5.23
        enable = getattr(model, "activation_checkpointing_enable", None)
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    return PackedPolicy(
        model,
        recipe.rollout.temperature,
        logit_scale=lm.logit_scale,
        softcap=lm.softcap,
        offload_activations=settings.offload_activations,
    )


def check_attention(policy: nn.Module, folder: str | Path, device: torch.device) -> None:
    """An attention that groups cannot share a prompt in is known before the first step."""
    try:
        with torch.no_grad():
            policy(pack_groups([[0, 1]], [[[2], [3]]]).to(device))
    except ValueError as error:
        raise InputError(f"the model in {folder} cannot be trained: {error}.") from error


def read_adapter(file: Path) -> dict[str, torch.Tensor]:
    """The adapters of a checkpoint, by the names of the peft model."""
    return torch.load(file, map_location="cpu", weights_only=True)


@torch.no_grad()
def start_adapter(name: str, seed: int, out: torch.Tensor) -> None:
    """Fill an adapter's weight as peft starts it: A uniform, B zero, so that nothing is added yet.

    The values follow from the name, so that every rank has the same ones.

    Raises:
        InputError: the adapter is none of a linear layer.
    """
    if ".lora_A." in name:
        generator = torch.Generator().manual_seed(seed_of("adapter", seed, name))
        whole = torch.empty(out.shape)
        nn.init.kaiming_uniform_(whole, a=math.sqrt(5), generator=generator)
        out.copy_(whole)
    elif ".lora_B." in name:
        out.zero_()
    else:
        raise InputError(f"model.lora.target_modules: {name} belongs to no linear layer.")


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
