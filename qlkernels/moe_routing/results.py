"""What the ops return."""

from typing import NamedTuple

import torch

OP = "moe_route"
INDEX_OP = "build_expert_index"


class Routing(NamedTuple):
    topk_ids: torch.Tensor  # [T, top_k] int32, likeliest expert first; replayed rows as given
    topk_weights: torch.Tensor  # [T, top_k] fp32
    tokens_per_expert: torch.Tensor  # [E] int32
    prob_sums: torch.Tensor  # [E] fp32, softmax summed over the tokens


class ExpertIndex(NamedTuple):
    sort_order: torch.Tensor  # [T * top_k] int32: stable sort by expert; token is this // top_k
    inverse_order: torch.Tensor  # [T * top_k] int32: where each (token, slot) went
    expert_offsets: torch.Tensor  # [E + 1] int32: first row of each expert; last: rows in total
