"""Kernels run in Triton's CPU interpreter unless a GPU or the ahead-of-time tests need the
compiler.
"""

import os
import sys


def _wants_compiler() -> bool:
    markers = [sys.argv[i + 1] for i, a in enumerate(sys.argv[:-1]) if a == "-m"]
    return any(m in ("gpu", "aot") for m in markers)


if not _wants_compiler() and "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest  # noqa: E402  (the variable is read when kernels are decorated)

from qlkernels.testing import nan_filled_memory  # noqa: E402


@pytest.fixture(autouse=True)
def _uninitialised_memory_is_nan():
    with nan_filled_memory():
        yield
