"""Importing this module is ``patch_verl()``: the value of verl's key
``actor_rollout_ref.model.external_lib``, which each of verl's processes imports before it builds a
model.
"""

from qwenlong.integrations.verl_kernels import patch_verl

PATCH = patch_verl()
