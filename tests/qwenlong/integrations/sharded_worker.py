"""Run by torchrun: losses and the last weights of three steps on weights that ranks share.

sharded_worker.py ENGINE-HEAD-HOW OUT
ENGINE: zero3, fsdp2, ulysses     HEAD: split, tied     HOW: untouched, apply, trl
"""

import json
import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from qlkernels import hf
from qwenlong.integrations.trl import patch_trl

SEQUENCE = 12


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two sequences for each of two ranks."""
    g = torch.Generator().manual_seed(step)
    ids = torch.randint(3, 97, (4, SEQUENCE), generator=g)
    return ids, ids.masked_fill(torch.arange(SEQUENCE) < 5, -100)


def make_model(head: str) -> nn.Module:
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=97, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_experts=4,
            num_experts_per_tok=2, moe_intermediate_size=16, tie_word_embeddings=head == "tied",
        )
    ).train()  # fmt: skip


def change(model: nn.Module, engine: str, how: str) -> dict:
    """What the loss is computed by, and what calls of the model need for it."""
    if how == "apply":
        hf.apply(model, attention=engine != "ulysses")  # Ulysses wraps the attention itself
    elif how == "trl":
        from transformers.integrations.deepspeed import HfDeepSpeedConfig
        from trl.trainer.utils import add_fused_lm_head

        # how TRL learns that the weights are sharded; it lives as long as the model
        model.zero3 = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})
        add_fused_lm_head(model, outputs=("log_probs", "entropy"))
        patch_trl()
        return {"fused_lm_head": True}
    return {}


def deepspeed_engine(model: nn.Module, stage: int, mpu=None):
    import deepspeed

    engine, *_ = deepspeed.initialize(
        model=model,
        mpu=mpu,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.5),
        config=dict(
            train_micro_batch_size_per_gpu=2,
            gradient_accumulation_steps=1,
            zero_optimization=dict(stage=stage, stage3_param_persistence_threshold=0),
            zero_allow_untested_optimizer=True,
            gradient_clipping=0.0,
            sequence_parallel_size=1 if mpu is None else 2,
        ),
    )
    return engine


def zero3(head: str, how: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    import deepspeed

    model = make_model(head)
    extra = change(model, "zero3", how)
    engine = deepspeed_engine(model, stage=3)
    losses = []
    for step in range(3):
        ids, labels = (x[2 * dist.get_rank() :][:2] for x in batch(step))
        loss = engine(input_ids=ids, labels=labels, use_cache=False, **extra).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.detach())
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        return losses, {n: p.detach().clone() for n, p in model.named_parameters()}


def fsdp2(head: str, how: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    from torch.distributed.fsdp import fully_shard

    model = make_model(head)
    change(model, "fsdp2", how)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for step in range(3):
        ids, labels = (x[2 * dist.get_rank() :][:2] for x in batch(step))
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return losses, {n: p.full_tensor().detach() for n, p in model.named_parameters()}


def ulysses(head: str, how: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Every sequence is split over the ranks; a rank has half of its rows and their labels."""
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

    model = make_model(head)
    mpu = UlyssesSPAttentionHF.register_with_transformers(
        model_name_or_path=model, core_attn_implementation="sdpa", sequence_parallel_size=2,
        micro_batch_size=2, seq_length=SEQUENCE, seq_length_is_variable=True,
    )  # fmt: skip
    change(model, "ulysses", how)
    engine = deepspeed_engine(model, stage=2, mpu=mpu)
    rows = slice(dist.get_rank() * SEQUENCE // 2, (dist.get_rank() + 1) * SEQUENCE // 2)
    losses = []
    for step in range(3):
        ids, labels = (x[:2] for x in batch(step))
        shifted = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
        mine = dict(
            input_ids=ids[:, rows].contiguous(),
            position_ids=torch.arange(SEQUENCE)[rows].expand(2, -1).contiguous(),
            use_cache=False,
        )
        share = (shifted != -100).sum() / dist.get_world_size()  # ranks' gradients are averaged
        targets = shifted[:, rows].contiguous()
        if how == "apply":
            loss = engine(
                **mine, shift_labels=targets, token_scores=True, num_items_in_batch=share
            ).loss
        else:
            logits = engine(**mine).logits
            loss = nn.functional.cross_entropy(
                logits.flatten(0, 1), targets.flatten(), reduction="sum"
            )
            loss = loss / share
        engine.backward(loss)
        engine.step()
        losses.append(loss.detach())
    return losses, {n: p.detach() for n, p in model.named_parameters()}


def main(what: str, out: str) -> None:
    engine, head, how = what.split("-")
    if engine == "fsdp2":
        dist.init_process_group("gloo")
    else:
        import deepspeed
        import deepspeed.ops

        # a C++ extension that DeepSpeed builds for collectives on the CPU; gloo does without
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend="gloo")
    losses, weights = {"zero3": zero3, "fsdp2": fsdp2, "ulysses": ulysses}[engine](head, how)
    mean = torch.stack(losses)
    dist.all_reduce(mean)
    found = {
        "losses": (mean / dist.get_world_size()).tolist(),
        "weights": {n: p.double().abs().sum().item() for n, p in weights.items()},
    }
    if dist.get_rank() == 0:
        with open(out, "w") as file:
            json.dump(found, file)
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    main(*sys.argv[1:])
