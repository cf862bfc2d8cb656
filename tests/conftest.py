"""Kernels run in Triton's CPU interpreter unless a GPU or the ahead-of-time tests need the
compiler.
"""

import os
import re
import signal
import sys
import threading


def _wants_compiler() -> bool:
    """Whether the command line selects tests that are marked gpu or aot, however it is spelt."""
    words = " ".join(sys.argv[1:])
    chosen = re.findall(r"(?:^| )(?:-m ?|--markexpr[= ])([^-].*?)(?= -|$)", words)
    return any(re.search(r"(?<!not )\b(gpu|aot)\b", expression) for expression in chosen)


# A shell starts what it leaves in the background with Ctrl-C ignored, and the commands that tests
# interrupt would inherit that.
if threading.current_thread() is threading.main_thread():
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)

if not _wants_compiler() and "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest  # noqa: E402  (the variable is read when kernels are decorated)

from qlkernels.testing import nan_filled_memory  # noqa: E402


@pytest.fixture(autouse=True)
def _uninitialised_memory_is_nan():
    with nan_filled_memory():
        yield


def pytest_collection_modifyitems(items):
    if os.environ.get("TRITON_INTERPRET") == "1":
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.usefixtures("_no_interpreter"))


@pytest.fixture
def _no_interpreter():
    pytest.fail("a GPU test in Triton's interpreter proves nothing: unset TRITON_INTERPRET")
