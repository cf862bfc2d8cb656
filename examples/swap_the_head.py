"""Any training loop, with the head swapped: the same loss, and no logits.

    python examples/swap_the_head.py                  # a random model of a few thousand weights
    python examples/swap_the_head.py Qwen/Qwen3-0.6B  # any model on the hub or a folder

Three ways to the same step: transformers alone; one line that changes the model; the op itself.
"""

import sys

import torch
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from qlkernels import hf, linear_logprob, targets_from_labels


def make_model(name: str | None):
    if name is not None:
        return AutoModelForCausalLM.from_pretrained(name)
    torch.manual_seed(0)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=503, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        )
    )  # fmt: skip


def gradient_norm(model) -> float:
    grads = [p.grad.norm() for p in model.parameters() if p.grad is not None]
    return torch.stack(grads).norm().item()


def main() -> None:
    model = make_model(sys.argv[1] if len(sys.argv) > 1 else None).train()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    ids = torch.randint(3, model.config.vocab_size, (2, 64), device=model.device)
    labels = ids.masked_fill(torch.arange(64, device=model.device) < 40, -100)  # the prompt

    # transformers alone: logits of (2, 64, V), most of them for rows without a label
    loss = model(input_ids=ids, labels=labels).loss
    loss.backward()
    print(f"logits          loss {loss.item():.5f}, gradient norm {gradient_norm(model):.5f}")

    # one line: the loss comes from hidden states, and only rows with a label cost anything
    model.zero_grad()
    hf.apply(model)
    loss = model(input_ids=ids, labels=labels).loss
    loss.backward()
    print(f"hf.apply        loss {loss.item():.5f}, gradient norm {gradient_norm(model):.5f}")
    hf.undo(model)

    # the op itself, where a loop needs log-probabilities and entropies of its own
    model.zero_grad()
    hidden_states = model.model(input_ids=ids).last_hidden_state  # [B, S, H]
    target_ids, row_mask = targets_from_labels(labels)
    scores = linear_logprob(hidden_states, model.lm_head.weight, target_ids, row_mask=row_mask)
    loss = -scores.logprobs.sum() / row_mask.sum()
    loss.backward()
    entropy = scores.entropy.sum() / row_mask.sum()
    print(
        f"linear_logprob  loss {loss.item():.5f}, gradient norm {gradient_norm(model):.5f}, "
        f"entropy {entropy.item():.3f} nats"
    )


if __name__ == "__main__":
    main()
