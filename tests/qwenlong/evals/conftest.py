import pytest

from qwenlong.evals.dataset import TASKS, generate
from qwenlong.evals.haystack import Haystack
from qwenlong.evals.texts import TokenCounter

SEED = 11


@pytest.fixture(scope="session")
def haystack():
    """The texts of this Python; a token is four characters."""
    return Haystack.load(TokenCounter("chars4"))


@pytest.fixture(scope="session")
def samples(haystack):
    """Two samples of every task, 6,000 tokens each."""
    return list(generate(haystack, tasks=list(TASKS), lengths=[6_000], count=2, seed=SEED))
