"""Log-probabilities of several answers to one prompt, with the prompt read once.

python examples/score_group.py                  # a random model of a few thousand weights
python examples/score_group.py Qwen/Qwen3-0.6B
"""

import sys
import time

import torch
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from qlkernels import pack_groups
from qlkernels.scorer import Scorer

PROMPT_TOKENS, ANSWERS, ANSWER_TOKENS = 400, 8, 20


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


def main() -> None:
    model = make_model(sys.argv[1] if len(sys.argv) > 1 else None).eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    vocab = model.config.vocab_size
    prompt = torch.randint(3, vocab, (PROMPT_TOKENS,), device=model.device)
    answers = list(torch.randint(3, vocab, (ANSWERS, ANSWER_TOKENS), device=model.device))
    scorer = Scorer(model)

    layout = pack_groups([prompt], [answers])
    start = time.perf_counter()
    scores = scorer.score(layout, positions="answers")
    logprobs = layout.gather_answers(scores.logprobs)  # (answers, tokens), nats
    totals = logprobs.sum(dim=1).tolist()
    together = time.perf_counter() - start

    start = time.perf_counter()
    alone = []
    for answer in answers:
        rows = scorer.score(torch.cat([prompt, answer])).logprobs  # row t: the token at t + 1
        alone.append(rows[PROMPT_TOKENS - 1 : -1].sum().item())
    separately = time.perf_counter() - start

    for i, (shared, full) in enumerate(zip(totals, alone, strict=True)):
        print(f"answer {i}: log-probability {shared:.3f}, in its full sequence {full:.3f}")
    print(
        f"{len(layout.input_ids)} rows in {together:.3f} s, one by one {layout.num_full_tokens} "
        f"rows in {separately:.3f} s"
    )


if __name__ == "__main__":
    main()
