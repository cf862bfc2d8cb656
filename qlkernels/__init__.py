"""Fused kernels for long-context reinforcement learning of language models.

Importing starts no CUDA and compiles nothing.
"""

from qlkernels._scores import TokenScores
from qlkernels.attention import attention, prefix_attention
from qlkernels.linear_logprob import linear_logprob
from qlkernels.linear_policy_loss import LinearPolicyLoss, linear_policy_loss
from qlkernels.logprob_entropy import logprob_entropy, token_entropy
from qlkernels.logprob_entropy_with_grad import logprob_entropy_with_grad
from qlkernels.moe import moe_mlp
from qlkernels.moe_routing import (
    ExpertIndex,
    Routing,
    build_expert_index,
    load_balancing_loss,
    moe_route,
)
from qlkernels.policy_loss import PolicyLoss, policy_loss
from qlkernels.prefix_group import PackedGroups, pack_groups
from qlkernels.targets import targets_from_labels
