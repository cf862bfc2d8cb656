"""Shapes, providers, byte counts and checks of every op. Importing this fills the registry."""

import bench.ceilings
from bench.cases import (
    attention,
    linear_logprob,
    linear_policy_loss,
    logprob_entropy,
    moe,
    moe_routing,
    policy_loss,
)
