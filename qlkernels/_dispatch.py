"""Choosing an implementation: an explicit choice runs or raises, only ``auto`` may choose."""

from collections.abc import Mapping

from qlkernels._target import is_interpreting


def pick_impl(op: str, impl: str, blockers: Mapping[str, str | None]) -> str:
    """Return the implementation to run. ``blockers`` maps each to why it cannot run here, fastest
    first. Triton's interpreter is never chosen, only ordered.
    """
    if impl == "auto":
        for name, why in blockers.items():
            if why is None and not (name == "triton" and is_interpreting()):
                return name
        raise RuntimeError(f"{op}: nothing can run here: {dict(blockers)}")
    if impl not in blockers:
        raise ValueError(f"{op}: unknown impl {impl!r}; choose 'auto' or one of {list(blockers)}")
    if blockers[impl] is not None:
        raise RuntimeError(f"{op}: impl={impl!r} cannot run here: {blockers[impl]}")
    return impl
