"""Choosing an implementation: an explicit choice runs or raises, only ``auto`` may choose."""

from collections.abc import Callable, Mapping

from qlkernels._target import is_interpreting

Why = str | None


def pick_impl(op: str, impl: str, blockers: Mapping[str, Why | Callable[[], Why]]) -> str:
    """Return the implementation to run. ``blockers`` maps each to why it cannot run here, or to a
    function that says so and is asked only where it matters; fastest first. Triton's interpreter is
    never chosen, only ordered.
    """
    if impl == "auto":
        for name in blockers:
            if _reason(blockers, name) is None and not (name == "triton" and is_interpreting()):
                return name
        reasons = {name: _reason(blockers, name) for name in blockers}
        raise RuntimeError(f"{op}: nothing can run here: {reasons}")
    if impl not in blockers:
        raise ValueError(f"{op}: unknown impl {impl!r}; choose 'auto' or one of {list(blockers)}")
    why = _reason(blockers, impl)
    if why is not None:
        raise RuntimeError(f"{op}: impl={impl!r} cannot run here: {why}")
    return impl


def _reason(blockers, name: str) -> Why:
    why = blockers[name]
    return why() if callable(why) else why
