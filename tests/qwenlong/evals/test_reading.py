"""Cutting texts to tokens, and contexts to a window."""

import random

import pytest

from qwenlong.errors import InputError
from qwenlong.evals.reading import fit
from qwenlong.evals.texts import TokenCounter
from qwenlong.prompts import render
from qwenlong.types import Document, Sample, TokenCount

CHARS, QWEN = TokenCounter("chars4"), TokenCounter("qwen")
TEXT = "A short text, with  two spaces.\nA new line; numbers: 12,345.6 and Übung 東京 end."


# --- cutting -----------------------------------------------------------------


def word_ends(text):
    ends = [i for i in range(1, len(text)) if text[i].isspace() and not text[i - 1].isspace()]
    return [0, *ends, len(text)]


def word_starts(text):
    starts = [i for i in range(1, len(text)) if text[i - 1].isspace() and not text[i].isspace()]
    return [0, *starts, len(text)]


@pytest.mark.parametrize("tokens", [CHARS, QWEN], ids=["chars4", "qwen"])
def test_head_and_tail_are_the_longest_that_fit(tokens):
    for n in range(-1, tokens(TEXT) + 3):
        head = max((TEXT[:e] for e in word_ends(TEXT) if tokens(TEXT[:e]) <= max(0, n)), key=len)
        tail = max((TEXT[s:] for s in word_starts(TEXT) if tokens(TEXT[s:]) <= max(0, n)), key=len)
        assert (tokens.head(TEXT, n), tokens.tail(TEXT, n)) == (head, tail)


def test_empty_and_wordless_texts():
    assert CHARS.head("", 5) == CHARS.tail("", 5) == ""
    assert CHARS.head("x" * 100, 5) == CHARS.tail("x" * 100, 5) == ""
    assert CHARS.head("x" * 20, 5) == CHARS.tail("x" * 20, 5) == "x" * 20


def test_a_cut_of_a_huge_text_counts_little_of_it():
    seen = []

    class Watched(TokenCounter):
        def __init__(self):
            self.name = "watched"
            self._count = lambda text: seen.append(len(text)) or (len(text) + 3) // 4

    text = "word " * 2_000_000
    assert len(Watched().head(text, 1_000)) == 3_999
    assert len(Watched().tail(text, 1_000)) == 4_000
    assert sum(seen) < 200_000


# --- windows -----------------------------------------------------------------


def sample_of(*texts, **fields):
    documents = [Document(id=f"d{i}", title=f"T{i}", text=text) for i, text in enumerate(texts)]
    row = {"task": "t", "answers": ["x"], "answer_type": "text", "reward": "cover"}
    return Sample(id="s", documents=documents, **(row | {"question": "What?"} | fields))


def prompt(sample):
    return render(sample)[0]["content"]


@pytest.mark.parametrize("keep", ["ends", "last"])
@pytest.mark.parametrize("tokens", [CHARS, QWEN], ids=["chars4", "qwen"])
def test_a_fitted_prompt_fills_its_room_and_no_more(keep, tokens):
    rng = random.Random(0)
    for size in (1, 3, 40):
        texts = [" ".join(f"w{rng.randrange(1000)}" for _ in range(600 // size + 20))] * size
        for room in (150, 300, 500):
            fitted, truncated = fit(sample_of(*texts), room, tokens, keep=keep)
            n = tokens(prompt(fitted))
            assert truncated and n <= room
            assert n >= room - 60  # a header, or a word, may not fit


def test_the_middle_goes_and_both_ends_stay():
    words = [f"w{i:04d}" for i in range(1000)]
    fitted, truncated = fit(sample_of(" ".join(words)), 800, CHARS)
    shown = prompt(fitted)
    assert truncated and [d.title for d in fitted.documents] == ["T0", "T0"]
    kept = [word for word in words if word in shown]
    assert kept[0] == "w0000" and kept[-1] == "w0999" and "w0500" not in kept
    head = sum(word < "w0500" for word in kept)
    assert abs(head - (len(kept) - head)) < 10
    assert "What?" in shown and "Therefore, the answer is" in shown


def test_the_last_window_keeps_the_end_alone():
    words = [f"w{i:04d}" for i in range(1000)]
    documents = [" ".join(words[i : i + 100]) for i in range(0, 1000, 100)]
    fitted, _ = fit(sample_of(*documents), 500, CHARS, keep="last")
    kept = [word for word in words if word in prompt(fitted)]
    assert kept == words[-len(kept) :] and len(kept) > 150
    assert fitted.documents[-1].text == documents[-1]
    assert documents[-2].endswith(fitted.documents[-2].text)


@pytest.mark.parametrize("keep", ["ends", "last"])
def test_what_fits_is_left_alone(keep):
    sample = sample_of("one text", "another")
    fitted, truncated = fit(sample, 400, CHARS, keep=keep)
    assert not truncated and prompt(fitted) == prompt(sample)
    counted = sample.model_copy(update={"tokens": TokenCount(tokenizer="chars4", n=40)})
    assert fit(counted, 400, CHARS)[0] is counted


def test_counts_of_another_tokenizer_are_not_trusted():
    sample = sample_of("word " * 3_000, tokens=TokenCount(tokenizer="other", n=1))
    fitted, truncated = fit(sample, 500, CHARS)
    assert truncated and CHARS(prompt(fitted)) <= 500


def test_only_what_is_shown_is_read():
    read = []
    documents = [Document(id=str(i), title="t", ref=f"{i:064x}") for i in range(1000)]

    def resolve(sha):
        read.append(int(sha, 16))
        return "word " * 40

    sample = sample_of().model_copy(update={"documents": documents})
    fit(sample, 500, CHARS, keep="last", resolve=resolve)
    assert len(read) < 50 and 999 in read and 500 not in read


def test_a_question_longer_than_the_window_is_one_sentence():
    with pytest.raises(InputError, match="sample 's': its question alone"):
        fit(sample_of("text", question="word " * 1000), 200, CHARS)
    with pytest.raises(ValueError, match="unknown keep 'first'"):
        fit(sample_of("text"), 200, CHARS, keep="first")


def test_room_for_the_question_alone_shows_no_document():
    bare = CHARS(prompt(sample_of()))
    fitted, truncated = fit(sample_of("word " * 100), bare + 3, CHARS)
    assert truncated and not fitted.documents
