"""What verl finds through its entry point: the names of our estimator and trainers.

verl loads this module at the end of ``import verl``. Neither torch nor verl is imported here, and
nothing in verl is replaced: two names are added to verl's registries once the modules that hold
them are imported, so that a process that never trains pays nothing.

    algorithm.adv_estimator     qwenlong_task
    trainer.v1.trainer_mode     qwenlong_sync, qwenlong_colocate_async, qwenlong_separate_async

verl swallows what a plug-in raises, so a version that does not fit is refused where a name is used.
``VERL_USE_EXTERNAL_PLUGINS=none`` leaves the plug-in out.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

ESTIMATOR = "qwenlong_task"
PREFIX = "qwenlong_"  # before a name of verl's
MODES = ("sync", "colocate_async", "separate_async")
_REGISTRIES = "verl.trainer.ppo.core_algos", "verl.trainer.ppo.v1"


class _AfterImport(MetaPathFinder):
    """Calls ``action(module)`` after the import of one module; finds nothing itself."""

    def __init__(self, name: str, action: Callable[[ModuleType], None]) -> None:
        self.name, self.action = name, action

    def find_spec(self, fullname, path=None, target=None) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            self.action(module)

        spec.loader.exec_module = exec_module
        return spec


def register() -> None:
    """Add our names to verl's registries, at once or when their modules are imported."""
    for name, action in zip(_REGISTRIES, (_add_estimator, _add_trainers), strict=True):
        if name in sys.modules:
            action(sys.modules[name])
        elif not any(isinstance(f, _AfterImport) and f.name == name for f in sys.meta_path):
            sys.meta_path.insert(0, _AfterImport(name, action))


def _add_estimator(core_algos: ModuleType) -> None:
    if hasattr(core_algos, "register_adv_est"):
        core_algos.register_adv_est(ESTIMATOR)(_estimator)


def _estimator(*args, **kwargs):
    from qwenlong.integrations.verl import task_advantages  # refuses versions that do not fit

    return task_advantages(*args, **kwargs)


def _add_trainers(v1: ModuleType) -> None:
    try:
        from qwenlong.integrations.verl import trainers

        found = trainers()
    except Exception as error:  # verl's import must go on: whoever uses a name hears of it
        if not hasattr(v1, "register_trainer"):
            return
        is_plain = isinstance(error, ImportError)
        refused = _refusing(v1, str(error) if is_plain else f"{type(error).__name__}: {error}")
        found = {PREFIX + mode: refused for mode in MODES}
    for name, trainer in found.items():
        v1.register_trainer(name)(trainer)


def _refusing(v1: ModuleType, reason: str) -> type:
    def refuse(cls, *_args, **_kwargs):
        raise ImportError(reason)

    return type("RefusedTrainer", (v1.PPOTrainer,), {"__new__": refuse})


register()
