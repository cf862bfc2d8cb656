"""Functions of another library with ours in their place, until the last patch is undone."""

from __future__ import annotations

from collections.abc import Iterable
from types import ModuleType


class Replacements:
    """What is replaced in one library, and what was there before. Patches of it may be nested."""

    def __init__(self) -> None:
        self.originals: dict[str, object] = {}  # by name, while patched
        self._modules: dict[str, ModuleType] = {}
        self._depth = 0

    def patch(self, ours: Iterable[tuple[ModuleType, str, object]]) -> Patch:
        """Put each value at its name in its module; where a patch is on already, only count."""
        if self._depth == 0:
            for module, name, value in ours:
                self._modules[name], self.originals[name] = module, getattr(module, name)
                setattr(module, name, value)
        self._depth += 1
        return Patch(self)

    def release(self) -> None:
        """One patch less; the last one gives the library its own functions back."""
        self._depth -= 1
        if self._depth == 0:
            for name, original in self.originals.items():
                setattr(self._modules[name], name, original)
            self.originals.clear()


class Patch:
    """What ``patch_trl`` and ``patch_verl`` return: ``undo()``, or leave the ``with`` block."""

    def __init__(self, replacements: Replacements) -> None:
        self._replacements: Replacements | None = replacements

    def undo(self) -> None:
        """Give the library its own functions back, once every patch is undone. Twice does no harm.

        A model of verl that was given the backend keeps its name, which verl then refuses.
        """
        if self._replacements is not None:
            self._replacements.release()
            self._replacements = None

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *_error) -> None:
        self.undo()
