"""What a test registers is forgotten after it, so that no other test depends on the order."""

import sys

import pytest

from qwenlong.advantage_rules import ADVANTAGES
from qwenlong.episodes import EPISODES
from qwenlong.rewards.registry import _REWARDS
from qwenlong.stage_data import TASK_MAKERS

REGISTRIES = (ADVANTAGES, EPISODES, _REWARDS, TASK_MAKERS)


@pytest.fixture(autouse=True)
def _registries():
    before = [dict(registry) for registry in REGISTRIES]
    modules = set(sys.modules)
    yield
    for registry, entries in zip(REGISTRIES, before, strict=True):
        registry.clear()
        registry.update(entries)
    # A plugin is imported once: it registers again only when it is forgotten too.
    for name in set(sys.modules) - modules:
        if name.startswith("qwenlong_plugin_"):
            del sys.modules[name]
