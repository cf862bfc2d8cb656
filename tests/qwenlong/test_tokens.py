"""Tokenizing in pieces gives the tokens of the whole text, in any text."""

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qwenlong import tokens as tokens_module
from qwenlong.tokens import tokenize
from tests.qwenlong.tiny_models import TEXT, train_tokenizer

AWKWARD = {
    "prose": TEXT * 20,
    "no white space": "abc123" * 900,
    "digits": "word " + "1234567890" * 500,
    "white space": "a" + " " * 3000 + "b" + "\n" * 3000,
    "emoji and accents": "🙂e\u0301東京 " * 800,
    "special tokens": "<s>a<s> <s" * 400,
    "one character": "x",
    "spaces only": " " * 1000,
}


@pytest.mark.parametrize("splits", [True, False], ids=["words", "one piece"])
@pytest.mark.parametrize("text", AWKWARD.values(), ids=AWKWARD)
@pytest.mark.parametrize("max_tokens", [2, 3, 50, 333, None])
def test_pieces_give_the_tokens_of_the_whole_text(text, max_tokens, splits, monkeypatch):
    monkeypatch.setattr(tokens_module, "PIECE_CHARACTERS", 500)
    tokenizer = train_tokenizer(splits=splits)
    whole = tokenizer(text, return_offsets_mapping=True)
    tokens = tokenize(tokenizer, text, max_tokens)
    assert tokens.ids.tolist() == whole.input_ids[:max_tokens]
    assert tokens.offsets.tolist() == [list(o) for o in whole.offset_mapping[:max_tokens]]
    assert tokens.ids.dtype == tokens.offsets.dtype == np.int64


def test_a_tokenizer_that_counts_from_the_start_is_given_the_whole(monkeypatch):
    """One that cuts its text into threes, wherever they fall, does not fit itself when shifted."""
    monkeypatch.setattr(tokens_module, "PIECE_CHARACTERS", 500)
    text = ("abcde " * 1000)[:5000]
    vocabulary = {text[i : i + 3]: i for i in range(6)} | {text[4997 + 2 :]: 6, "[?]": 7}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[?]"))
    backend.pre_tokenizer = pre_tokenizers.FixedLength(length=3)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[?]")
    whole = tokenizer(text)
    assert len(set(whole.input_ids)) > 1
    assert tokenize(tokenizer, text).ids.tolist() == whole.input_ids


class Counting:
    """A tokenizer that remembers how many characters it was given."""

    def __init__(self):
        self.tokenizer, self.seen = train_tokenizer(), []

    def __call__(self, text, **options):
        self.seen.append(len(text))
        return self.tokenizer(text, **options)


def test_a_few_tokens_of_a_huge_text_take_no_time():
    tokenizer = Counting()
    assert len(tokenize(tokenizer, TEXT * 50_000, 1000).ids) == 1000
    assert sum(tokenizer.seen) < 100_000


def test_a_long_text_goes_through_in_small_pieces(monkeypatch):
    monkeypatch.setattr(tokens_module, "PIECE_CHARACTERS", 5000)
    tokenizer, text = Counting(), TEXT * 60
    tokenize(tokenizer, text)
    assert max(tokenizer.seen) < 6000
    assert sum(tokenizer.seen) < 1.2 * len(text)
