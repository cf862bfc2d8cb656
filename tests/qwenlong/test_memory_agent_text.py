"""Chunks: the text and nothing but the text, cut where it may be cut, read from disk."""

import asyncio
import random
import threading
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenlong import prompts
from qwenlong.errors import InputError
from qwenlong.memory_agent import (
    CharacterTokenizer,
    ChunkStream,
    TextSource,
    count_tokens,
    cut_at,
    token_ends,
)
from qwenlong.types import Sample
from tests.qwenlong.agent_models import WordTokenizer, filler
from tests.qwenlong.tiny_models import TEXT, train_tokenizer

WORDS = WordTokenizer()


@pytest.fixture(scope="module")
def bpe():
    return train_tokenizer(bos=True)


def read_all(stream):
    chunks = []
    while (chunk := stream.get(len(chunks))) is not None:
        chunks.append(chunk)
    return chunks


# --- tokens and cuts -------------------------------------------------------------


def test_token_ends(bpe):
    assert token_ends(WORDS, "a bb  c").tolist() == [1, 4, 7]
    assert token_ends(CharacterTokenizer(), "abcdefghi").tolist() == [4, 8, 9]
    assert token_ends(CharacterTokenizer(2), "abcde", 2).tolist() == [2, 4]
    for tokenizer in (WORDS, CharacterTokenizer(), bpe):
        assert token_ends(tokenizer, "").tolist() == []
    ids = bpe(TEXT, add_special_tokens=False, return_offsets_mapping=True)
    assert token_ends(bpe, TEXT).tolist() == [end for _, end in ids["offset_mapping"]]
    assert token_ends(bpe, TEXT, 5).tolist() == token_ends(bpe, TEXT).tolist()[:5]


def test_a_tokenizer_without_offsets_is_refused():
    with pytest.raises(InputError, match="object gives no character offsets"):
        token_ends(object(), "a")


@pytest.mark.parametrize(
    "text, limit, snap, piece",
    [
        ("one two three four", 9, 0, "one two three four"),
        ("one two three four", 4, 2, "one two three four"),
        ("one two three four", 3, 0, "one two three"),
        ("One two. Three four five", 4, 2, "One two."),
        ("One two. Three four five", 4, 1, "One two. Three "),  # no sentence ends so late: a word
        ("one two\nthree four five", 4, 3, "one two\n"),  # a line
        ("One. Two. Three four five", 4, 4, "One. Two."),  # the last of several
        ("Mr. Smith went out. He ran", 5, 4, "Mr. Smith went out."),
        ("Mr. Smith went out and ran", 3, 3, "Mr. Smith "),  # no sentence ends at "Mr."
        ("A b c. D e f", 3, 2, "A b c."),  # the end of a sentence is the limit
        ("甲 乙。丙 丁。戊", 2, 1, "甲 乙。"),
    ],
)
def test_cut_at(text, limit, snap, piece):
    end, tokens = cut_at(WORDS, text, limit, snap)
    assert text[:end] == piece and tokens == len(piece.split()) <= limit


def test_a_decimal_point_at_the_end_of_what_is_seen_ends_no_sentence():
    text = "It costs 3.5 and more words follow here."
    assert text[: cut_at(WORDS, text, 3, 2)[0]] == "It costs "


# --- chunks put together are the text ------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.text(st.sampled_from("ab .\n\t!?甲。é🙂\u0301\r"), max_size=600),
    st.integers(16, 40),
    st.sampled_from([0.0, 0.25, 0.5]),
)
def test_chunks_are_the_text(text, size, snap):
    for tokenizer in (WORDS, CharacterTokenizer(3)):
        source = TextSource.from_text(text)
        chunks = read_all(ChunkStream(source, tokenizer, size, snap=snap))
        assert "".join(c.text for c in chunks) == text
        assert [c.index for c in chunks] == list(range(len(chunks)))
        assert [c.start for c in chunks] == [0, *(c.end for c in chunks)][: len(chunks)]
        assert (chunks[-1].end if chunks else 0) == source.size == len(text.encode())
        for c in chunks:
            assert c.tokens == count_tokens(tokenizer, c.text) <= size


def test_chunks_of_a_byte_level_tokenizer(bpe):
    text = TEXT * 3
    for size, snap in ((16, 0.5), (50, 0.25), (333, 0.0)):
        chunks = read_all(ChunkStream(TextSource.from_text(text), bpe, size, snap=snap))
        assert "".join(c.text for c in chunks) == text
        assert all(c.tokens == count_tokens(bpe, c.text) <= size for c in chunks)
        # a snap gives up at most its share (and what tokenizes differently at the ends)
        assert all(c.tokens >= size * (1 - snap) - 4 for c in chunks[:-1])


def test_chunks_end_with_sentences():
    chunks = read_all(ChunkStream(TextSource.from_text(filler(4000)), WORDS, 100))
    assert all(c.text.endswith(".") and c.tokens == 96 for c in chunks[:-1])


def test_without_snapping_chunks_are_full():
    chunks = read_all(ChunkStream(TextSource.from_text(filler(4000)), WORDS, 101, snap=0.0))
    assert [c.tokens for c in chunks] == [101] * 39 + [4000 - 39 * 101]


@pytest.mark.parametrize(
    "text", ["x" * 30_000, " " * 30_000, "\n" * 30_000, "word " * 10_000, "甲" * 20_000]
)
def test_texts_without_structure(text):
    for tokenizer in (WORDS, CharacterTokenizer()):
        source = TextSource.from_text(text)
        chunks = read_all(ChunkStream(source, tokenizer, 64))
        assert "".join(c.text for c in chunks) == text
        assert max(len(c.text.encode()) for c in chunks) <= 256 * 64


def test_no_text_has_no_chunks():
    assert ChunkStream(TextSource.from_text(""), WORDS, 16).get(0) is None


@pytest.mark.parametrize("size, snap, message", [(15, 0.1, "at least 16"), (16, 0.6, "snap is")])
def test_stream_arguments(size, snap, message):
    with pytest.raises(ValueError, match=message):
        ChunkStream(TextSource.from_text("a"), WORDS, size, snap=snap)


def test_any_order_of_reading_and_known_ends_give_the_same_chunks():
    source = TextSource.from_text(filler(3000) + " Ünï. " * 50)
    chunks = read_all(ChunkStream(source, WORDS, 64))
    order = list(range(len(chunks))) * 2
    random.Random(0).shuffle(order)
    stream = ChunkStream(source, WORDS, 64)
    assert all(stream.get(i) == chunks[i] for i in order)
    stream = ChunkStream(source, WORDS, 64)
    stream.know([c.end for c in chunks[:20]])
    stream.know([c.end for c in chunks[:3]])  # knows more already
    assert stream.get(20) == chunks[20] and stream.get(3) == chunks[3]
    assert stream.get(len(chunks)) is None


def test_readers_in_threads_agree():
    source = TextSource.from_text(filler(20_000))
    expected = read_all(ChunkStream(source, WORDS, 64))
    stream, found = ChunkStream(source, WORDS, 64), {}
    threads = [
        threading.Thread(target=lambda i=i: found.__setitem__(i, read_all(stream)))
        for i in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(found[i] == expected for i in range(4))


# --- prefetch --------------------------------------------------------------------


class Watched(TextSource):
    """Notes where it was read."""

    def __init__(self, *args):
        super().__init__(*args)
        self.reads = []

    def read(self, start, count):
        self.reads.append(start)
        return super().read(start, count)


def test_the_next_chunk_is_prepared_before_it_is_asked_for():
    async def first_only():
        source = Watched.from_text(filler(2000))
        stream = ChunkStream(source, WORDS, 64)
        first = await stream.aget(0)
        await asyncio.gather(*stream._pending.values())
        return first, stream.source.reads

    first, reads = asyncio.run(first_only())
    assert first.index == 0 and first.end in reads  # chunk 1 begins where chunk 0 ends


def test_a_prepared_chunk_that_cannot_be_read_fails_its_reader_alone(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(filler(4000))

    async def run():
        stream = ChunkStream(TextSource.from_files([path]), WORDS, 64)
        await stream.aget(0)
        await asyncio.gather(*stream._pending.values())
        path.write_text("short")
        await stream.aget(1)  # was prepared
        with pytest.raises(InputError, match="became shorter"):
            await stream.aget(2)

    asyncio.run(run())


# --- sources ---------------------------------------------------------------------


def test_files_are_read_as_one_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfalpha\r\nbeta")
    (tmp_path / "b.txt").write_bytes("gämma \xff".encode("latin-1"))
    source = TextSource.from_files([tmp_path / "a.txt", tmp_path / "b.txt"])
    expected = prompts.document_block(
        (("a.txt", "alpha\r\nbeta", None), ("b.txt", "g\ufffdmma \ufffd", None))
    )
    chunks = read_all(ChunkStream(source, WORDS, 16))
    assert "".join(c.text for c in chunks) == expected
    assert source.name == "a.txt and 1 more"
    single = TextSource.from_files([tmp_path / "a.txt"])
    assert single.read(0, 99) == b"alpha\r\nbeta" and single.name == "a.txt"
    assert single.read(3, 2) == b"ha" and single.read(99, 5) == b""


@pytest.mark.parametrize(
    "data, message", [(None, "cannot be read"), (b"", "is empty"), (b"PK\0\1", "zero bytes")]
)
def test_files_that_are_no_text(tmp_path, data, message):
    path = tmp_path / "x"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(InputError, match=message):
        TextSource.from_files([path])
    with pytest.raises(InputError, match="no input file"):
        TextSource.from_files([])


def test_a_sample_is_read_as_its_full_prompt_shows_it():
    sample = Sample(
        id="s",
        task="reading_qa",
        question="q",
        documents=[
            {"id": "d1", "title": "One", "text": "first"},
            {"id": "d2", "ref": "0" * 64, "role": "distractor"},
        ],
        answers=["secret"],
        answer_type="text",
        reward="sub_em",
    )
    source = TextSource.from_sample(sample, lambda ref: "second")
    text = source.read(0, 10_000).decode()
    assert text == prompts.document_block(prompts.view(sample).documents, lambda ref: "second")
    assert "second" in text and "secret" not in text and "distractor" not in text


def test_the_fingerprint_is_that_of_the_content(tmp_path):
    (tmp_path / "a").write_text("same")
    (tmp_path / "b").write_text("same")
    a, b = (TextSource.from_files([tmp_path / name]) for name in "ab")
    assert a.fingerprint() == b.fingerprint() == TextSource.from_text("same").fingerprint()
    assert a.fingerprint() != TextSource.from_text("other").fingerprint()


def test_memory_does_not_grow_with_the_text(tmp_path):
    """Peak allocations while a text of 60 times the length of a chunk and one of 6 are read."""
    peaks = []
    for chunks in (6, 60):
        path = tmp_path / f"{chunks}.txt"
        path.write_text(filler(chunks * 4000))
        source = TextSource.from_files([path])
        tracemalloc.start()
        stream = ChunkStream(source, CharacterTokenizer(), 5000)
        index = 0
        while stream.get(index) is not None:
            index += 1
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert index > chunks * 0.9
    assert peaks[1] < 1.2 * peaks[0] + 100_000
