"""Run by torchrun: losses and the last weights of three steps, under ZeRO-3 or plain.

zero3_worker.py HOW OUT      HOW: (split|tied)-(untouched|apply|trl)
"""

import json
import sys

import deepspeed
import deepspeed.ops
import torch
import torch.distributed as dist
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from qlkernels import hf
from qwenlong.integrations.trl import patch_trl

# a C++ extension that DeepSpeed builds for collectives on the CPU; gloo does without
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two sequences for each of two ranks."""
    g = torch.Generator().manual_seed(step)
    ids = torch.randint(3, 97, (4, 12), generator=g)
    return ids, ids.masked_fill(torch.arange(12) < 5, -100)


def main(how: str, out: str) -> None:
    deepspeed.init_distributed(dist_backend="gloo")
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=97, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_experts=4,
            num_experts_per_tok=2, moe_intermediate_size=16, tie_word_embeddings="tied" in how,
        )
    ).train()  # fmt: skip
    extra = {}
    if "apply" in how:
        hf.apply(model)
    elif "trl" in how:
        from transformers.integrations.deepspeed import HfDeepSpeedConfig
        from trl.trainer.utils import add_fused_lm_head

        # how TRL learns that the weights are sharded
        keep = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})  # noqa: F841
        add_fused_lm_head(model, outputs=("log_probs", "entropy"))
        patch_trl()
        extra = {"fused_lm_head": True}
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.5),
        config=dict(
            train_micro_batch_size_per_gpu=2,
            gradient_accumulation_steps=1,
            zero_optimization=dict(stage=3, stage3_param_persistence_threshold=0),
            zero_allow_untested_optimizer=True,
            gradient_clipping=0.0,
        ),
    )
    losses = []
    for step in range(3):
        ids, labels = batch(step)
        mine = slice(2 * rank, 2 * rank + 2)
        loss = engine(input_ids=ids[mine], labels=labels[mine], use_cache=False, **extra).loss
        engine.backward(loss)
        engine.step()
        dist.all_reduce(loss.detach())
        losses.append(loss.item() / dist.get_world_size())
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        sums = {n: p.detach().double().abs().sum().item() for n, p in model.named_parameters()}
    if rank == 0:
        with open(out, "w") as file:
            json.dump({"losses": losses, "weights": sums}, file)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
