"""Documents: sentences, tokens, loaders of every kind, quality rules, duplicates."""

import json
import os
import random

import numpy as np
import pytest

from qwenlong.data import dedup
from qwenlong.data.documents import SourceDocument, count_tokens, split_sentences, text_id
from qwenlong.data.loaders import (
    RANGE_BYTES,
    LoadFailure,
    html_text,
    list_units,
    load_unit,
    source_path,
)
from qwenlong.data.quality import (
    detect_language,
    quality_verdicts,
    repeated_share,
    text_share,
)
from qwenlong.data.recipe import QualityConfig, SourceConfig
from qwenlong.errors import InputError

# --- records, sentences, tokens ------------------------------------------------


def test_id_is_the_hash_of_the_text():
    document = SourceDocument(text="abc", source="here")
    assert document.id == text_id("abc") == "ba7816bf8f01cfea"  # sha256 of "abc"
    assert SourceDocument(id="mine", text="abc", source="here").id == "mine"
    with pytest.raises(ValueError, match="at least 1 character"):
        SourceDocument(text="", source="here")


@pytest.mark.parametrize(
    "text, sentences",
    [
        ("", []),
        (" \n\t ", []),
        ("One. Two! Three?", ["One.", "Two!", "Three?"]),
        ("Dr. Smith paid $3.50. He left.", ["Dr. Smith paid $3.50.", "He left."]),
        ("J. Smith wrote e.g. this. Yes.", ["J. Smith wrote e.g. this.", "Yes."]),
        ('He said "Go!" Then he went.', ['He said "Go!"', "Then he went."]),
        ("A heading\n\nA text without end", ["A heading", "A text without end"]),
        ("中文。没有空格！对", ["中文。", "没有空格！", "对"]),
        ("Wait... what", ["Wait...", "what"]),
        ("version 3.11.2 is out", ["version 3.11.2 is out"]),
    ],
)
def test_sentences(text, sentences):
    assert [text[a:b] for a, b in split_sentences(text)] == sentences


def test_sentences_cover_every_visible_character():
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(rng.choice("ab. !?\n。\"')(Dr") for _ in range(rng.randint(0, 60)))
        spans = split_sentences(text)
        outside = list(text)
        for start, end in spans:
            assert start < end
            assert not text[start].isspace() and not text[end - 1].isspace()
            outside[start:end] = [""] * (end - start)
        assert not "".join(outside).strip()
        assert spans == sorted(spans)


def test_token_counts(tmp_path):
    assert count_tokens("") == 0
    assert count_tokens("abcd") == 1
    assert count_tokens("abcde") == 2
    # The first ids of "Hello, world!" in the Qwen vocabulary: Hello , ' world' !
    assert count_tokens("Hello, world!", "qwen") == 4
    assert count_tokens("<|endoftext|>", "qwen") > 1  # text, not a special token
    vocabulary = {"type": "WordLevel", "vocab": {"a": 0, "b": 1, "?": 2}, "unk_token": "?"}
    tokenizer = {"version": "1.0", "model": vocabulary, "pre_tokenizer": {"type": "Whitespace"}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert count_tokens("a b c", str(tmp_path)) == 3
    assert count_tokens("a b c", str(tmp_path / "tokenizer.json")) == 3
    with pytest.raises(InputError, match="unknown tokenizer 'gpt'"):
        count_tokens("a", "gpt")


# --- loaders -------------------------------------------------------------------


def load(kind, path, **options):
    source = SourceConfig(name="test", kind=kind, path=str(path), **options)
    return [item for unit in list_units(source) for item in load_unit(source, unit)]


def test_text_files_in_odd_encodings(tmp_path):
    (tmp_path / "a.txt").write_bytes("naïve\r\nline\r".encode("utf-8-sig"))
    (tmp_path / "b.txt").write_bytes("Größe".encode("utf-16"))
    (tmp_path / "c.txt").write_bytes(b"broken \xff byte")
    (tmp_path / "d.txt").write_bytes(b"bin\x00ary")
    (tmp_path / "e.txt").write_bytes(b"  \n")
    (tmp_path / ".hidden.txt").write_text("hidden")
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "x.txt").write_text("cache")
    loaded = load("text", tmp_path)
    texts = {d.title: d.text for d in loaded if isinstance(d, SourceDocument)}
    assert texts == {"a": "naïve\nline\n", "b": "Größe", "c": "broken \ufffd byte"}
    failures = {f.path: f.reason for f in loaded if isinstance(f, LoadFailure)}
    assert failures == {"d.txt": "ValueError: binary file", "e.txt": "empty"}


def test_patterns_and_order(tmp_path):
    for name in ("b/2.txt", "a/1.txt", "a/skip.txt", "c.md", "z.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(name)
    kept = load("text", tmp_path, exclude=["*/skip*"])
    assert [d.meta["path"] for d in kept] == ["z.txt", "a/1.txt", "b/2.txt"]
    assert [d.text for d in load("text", tmp_path, include=["*.md"])] == ["c.md"]
    assert [d.text for d in load("text", tmp_path / "c.md")] == ["c.md"]
    with pytest.raises(InputError, match="no file below"):
        load("pdf", tmp_path)
    with pytest.raises(InputError, match="does not exist"):
        load("text", tmp_path / "nowhere")


def test_markdown(tmp_path):
    (tmp_path / "page.md").write_text("---\nauthor: x\n---\nintro\n\n## The Title\n\ntext\n")
    (document,) = load("markdown", tmp_path)
    assert document.title == "The Title"
    assert document.text == "intro\n\n## The Title\n\ntext\n"


def test_html():
    page = """<html><head><title> A &amp; B </title><style>p {}</style></head><body><nav>menu</nav>
    <h1>Head</h1><p>First  <b>bold</b>, 1 &lt; 2.<br>second</p><script>var x = "<p>no</p>";</script>
    <ul><li>one<li>two</ul><pre>  keep
    space</pre><table><tr><td>1<td>2</tr></table></body>"""
    title, text = html_text(page)
    assert title == "A & B"
    for line in ("Head", "First bold, 1 < 2.", "second", "one", "two", "  keep", "    space"):
        assert line in text.splitlines()
    assert "1\t2" in text
    for silent in ("menu", "var x", "p {}"):
        assert silent not in text
    assert html_text("") == ("", "")
    assert html_text("<head><p>unclosed <body>seen")[1] == "seen"


def test_python_repository(tmp_path):
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg" / "__init__.py").write_text("x = 1\n")
    (tmp_path / "pkg" / "latin.py").write_bytes("# coding: latin-1\n# é\n".encode("latin-1"))
    (tmp_path / "pkg" / "bad.py").write_bytes(b"# coding: nonsense\n")
    loaded = load("python", tmp_path)
    titles = {d.title: d for d in loaded if isinstance(d, SourceDocument)}
    assert set(titles) == {"pkg", "pkg.latin"}
    assert titles["pkg.latin"].text.endswith("# é\n")
    assert titles["pkg"].kind == "python"
    (failure,) = (f for f in loaded if isinstance(f, LoadFailure))
    assert failure.path == "pkg/bad.py"


def test_pdf(tmp_path):
    pypdf = pytest.importorskip("pypdf")
    writer = pypdf.PdfWriter()
    writer.add_blank_page(72, 72)
    writer.write(tmp_path / "blank.pdf")
    (tmp_path / "broken.pdf").write_bytes(b"%PDF-1.7 nothing")
    stream = b"BT /F1 12 Tf 20 50 Td (Hello PDF) Tj ET"
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 200 100] /Contents 4 0 R"
        b" /Resources << /Font << /F1 5 0 R >> >> >>",
        b"<< /Length %d >>\nstream\n%s\nendstream" % (len(stream), stream),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    data, offsets = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, 1):
        offsets.append(len(data))
        data += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    table = b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    data += b"xref\n0 6\n0000000000 65535 f \n%strailer\n<< /Size 6 /Root 1 0 R >>\n" % table
    data += b"startxref\n%d\n%%%%EOF" % (len(data) - len(table) - 73)
    (tmp_path / "text.pdf").write_bytes(data)
    loaded = load("pdf", tmp_path)
    documents = [d for d in loaded if isinstance(d, SourceDocument)]
    assert [d.text.strip() for d in documents] == ["Hello PDF"]
    assert {f.path for f in loaded if isinstance(f, LoadFailure)} == {"blank.pdf", "broken.pdf"}


def test_csv_tables(tmp_path):
    rows = ["name,value,code,note", "a,1,007,", 'b,-2.50,1e5,"x, y"', "short,1", "c,3,0,z"]
    (tmp_path / "data.csv").write_text("\n".join(rows) + "\n")
    (tmp_path / "twice.csv").write_text("a,a\n1,2\n")
    (tmp_path / "tabs.tsv").write_text("x\ty\n1\t2\n")
    loaded = load("csv", tmp_path, rows_per_document=2)
    documents = [d for d in loaded if isinstance(d, SourceDocument)]
    assert [d.title for d in documents] == [
        "data, rows 1 to 2",
        "data, rows 3 to 4",
        "tabs, rows 1 to 1",
    ]
    meta = documents[0].meta
    assert meta["columns"] == ["name", "value", "code", "note"]
    assert meta["rows"] == [["a", 1, "007", None], ["b", -2.5, "1e5", "x, y"]]
    assert meta["table"] == "data" and documents[0].kind == "table"
    assert documents[1].meta["rows"] == [["c", 3, 0, "z"]]
    reasons = [f.reason for f in loaded if isinstance(f, LoadFailure)]
    assert reasons[0] == "1 rows from row 2 have another number of cells"
    assert "not unique" in reasons[1]


def test_dialogues(tmp_path):
    openai = {"title": "Trip", "messages": [{"role": "user", "content": "Hi"}]}
    sharegpt = {"conversations": [{"from": "human", "value": "A"}, {"from": "gpt", "value": "B"}]}
    (tmp_path / "many.json").write_text(json.dumps([openai, sharegpt, {"messages": []}]))
    (tmp_path / "one.json").write_text(json.dumps([{"role": "user", "content": "Solo"}]))
    (tmp_path / "rows.jsonl").write_text(json.dumps(openai) + "\n")
    (tmp_path / "wrong.json").write_text("[1, 2]")
    loaded = load("dialogue", tmp_path)
    texts = {d.title: d.text for d in loaded if isinstance(d, SourceDocument)}
    assert texts["Trip"] == "User: Hi"
    assert texts["many, 2"] == "Human: A\n\nGpt: B"
    assert texts["one, 1"] == "User: Solo"
    assert sum(isinstance(f, LoadFailure) for f in loaded) >= 2


def test_jsonl_ranges_give_every_row_once(tmp_path):
    row = {"text": "x" * 1000, "title": "t"}
    count = RANGE_BYTES * 2 // len(json.dumps(row)) + 10
    with open(tmp_path / "rows.jsonl", "w") as file:
        for i in range(count):
            file.write(json.dumps({**row, "meta": {"i": i}}) + "\n")
        file.write("not json\n")
    source = SourceConfig(name="rows", kind="jsonl", path=str(tmp_path))
    units = list(list_units(source))
    assert len(units) == 3
    loaded = [item for unit in units for item in load_unit(source, unit)]
    numbers = [d.meta["i"] for d in loaded if isinstance(d, SourceDocument)]
    assert numbers == list(range(count))
    assert isinstance(loaded[-1], LoadFailure)


def test_lone_surrogates_and_nul_do_not_reach_a_document(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "a\\ud800b\\u0000c"}\n')
    (document,) = load("jsonl", tmp_path)
    assert document.text == "a?bc"


def test_a_file_name_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "größe.txt").write_text("fine")
    assert [d.title for d in load("text", tmp_path)] == ["größe"]
    with open(os.path.join(os.fsencode(tmp_path), b"bad\xff.txt"), "wb") as file:
        file.write(b"text")
    with pytest.raises(InputError, match=r"'.*bad\\udcff.txt' is not UTF-8"):
        load("text", tmp_path)


def test_builtin_topics_and_unknown_loaders():
    source = SourceConfig(name="topics", kind="builtin", loader="python-topics")
    (unit,) = list_units(source)
    documents = list(load_unit(source, unit))
    assert len(documents) > 70
    assert {d.source for d in documents} == {"topics"}
    with pytest.raises(InputError, match="builtin loader 'nothing' is unknown"):
        list(list_units(SourceConfig(name="x", kind="builtin", loader="nothing")))


def test_stdlib_path():
    source = SourceConfig(name="x", kind="python", path="${stdlib}/json")
    assert (source_path(source) / "decoder.py").is_file()


# --- quality -------------------------------------------------------------------


@pytest.mark.parametrize(
    "language, text",
    [
        ("en", "The cat sat on the mat and it was not amused by the dog that had come in."),
        ("de", "Die Katze sitzt auf der Matte und ist nicht mit dem Hund in das Haus gegangen."),
        ("fr", "Le chat est sur la table et les enfants sont dans le jardin avec une balle."),
        ("zh", "这是一个用中文写成的句子，没有空格。"),
        ("ja", "これは日本語で書かれた文章です。"),
        ("ru", "Это предложение написано по-русски."),
        ("und", "xk3 zq9 7781 ### qqq"),
        ("und", ""),
    ],
)
def test_language(language, text):
    assert detect_language(text) == language


def test_text_share_and_repetition():
    assert text_share("abc 12\n") == 1.0
    assert text_share("ab!!") == 0.5
    assert text_share("ab\ufffd\ufffd") == 0.0  # weighs double
    assert repeated_share("a line of text\n" * 4) == 0.75
    assert repeated_share("short\n" * 9) == 0.0
    assert repeated_share("") == 0.0


def test_verdicts_name_what_failed():
    config = QualityConfig(min_tokens=5, languages=["en"])
    good = SourceDocument(text="The cat is on the mat, and it is not amused.", source="s")
    verdicts = quality_verdicts(good, 10, config)
    assert {name: v["verdict"] for name, v in verdicts.items()} == {
        "length": "pass",
        "characters": "pass",
        "repetition": "pass",
        "language": "pass",
    }
    bad = SourceDocument(text="€€€ die der und das ist nicht " * 3, source="s")
    assert quality_verdicts(bad, 4, config)["length"] == {"verdict": "fail", "tokens": 4}
    assert quality_verdicts(bad, 10, config)["language"]["verdict"] == "fail"
    code = SourceDocument(text="x = y * z", source="s", kind="python")
    assert quality_verdicts(code, 10, config)["language"]["verdict"] == "pass"


# --- duplicates ----------------------------------------------------------------


def near(texts, tmp_path, threshold=0.8):
    signatures = np.array([dedup.signature(t) for t in texts]).reshape(-1, dedup.PERMUTATIONS)
    half = len(texts) // 2
    np.save(tmp_path / "a.npy", signatures[:half])
    np.save(tmp_path / "b.npy", signatures[half:])
    files = [tmp_path / "a.npy", tmp_path / "b.npy"]
    return dedup.near_duplicates(files, threshold, tmp_path).tolist()


def jaccard(a, b):
    x, y = set(dedup.shingles(a)), set(dedup.shingles(b))
    return len(x & y) / len(x | y)


def test_near_duplicates_are_found_and_others_kept(tmp_path):
    rng = random.Random(0)
    vocabulary = [f"word{i}" for i in range(3000)]
    originals = [[rng.choice(vocabulary) for _ in range(400)] for _ in range(60)]
    copies, different = [], []
    for words in originals:
        copy, other = list(words), list(words)
        for place in rng.sample(range(400), 4):
            copy[place] = rng.choice(vocabulary)
        for place in rng.sample(range(400), 120):
            other[place] = rng.choice(vocabulary)
        copies.append(copy)
        different.append(other)
    texts = [" ".join(words) for words in originals + copies + different]
    for i in range(60):
        assert jaccard(texts[i], texts[60 + i]) > 0.88
        assert jaccard(texts[i], texts[120 + i]) < 0.5
    found = near(texts, tmp_path)
    assert found[:60] == list(range(60))
    assert sum(found[60 + i] == i for i in range(60)) == 60
    assert found[120:] == list(range(120, 180))


def test_near_duplicates_awkward(tmp_path):
    assert near([], tmp_path) == []
    assert near(["one"], tmp_path) == [0]
    same = "a b c d e f g h i j k l m n"
    assert near([same, "other words are here for once", same, same], tmp_path) == [0, 1, 0, 0]
    assert not list(tmp_path.glob(".*.tmp"))
    chinese = "这是一个没有空格的很长的句子" * 3
    assert near([chinese, chinese + "了"], tmp_path) == [0, 0]


def test_exact_duplicates():
    hashes = np.array([b"a" * 32, b"b" * 32, b"a" * 31 + b"x", b"a" * 32, b"b" * 32], dtype="V32")
    keys = np.array([1, 2, 1, 1, 2], dtype=np.uint64)  # the third shares a key, not a hash
    assert dedup.exact_duplicates(keys[[0, 1, 3, 4]], hashes[[0, 1, 3, 4]]).tolist() == [0, 1, 0, 1]
    assert dedup.exact_duplicates(keys, hashes)[2] == 2
    assert dedup.exact_duplicates(keys[:0], hashes[:0]).tolist() == []


def test_estimate_is_close_to_jaccard():
    rng = random.Random(1)
    errors = []
    for _ in range(80):
        words = [str(rng.randrange(4000)) for _ in range(300)]
        other = list(words)
        for place in rng.sample(range(300), rng.randint(0, 60)):
            other[place] = str(rng.randrange(4000))
        a, b = " ".join(words), " ".join(other)
        estimate = (dedup.signature(a) == dedup.signature(b)).mean()
        errors.append(estimate - jaccard(a, b))
    assert abs(np.mean(errors)) < 0.02
    assert np.std(errors) < 0.05


def test_exact_signature_resembles_only_itself():
    a, b = dedup.exact_signature("a text"), dedup.exact_signature("a text.")
    assert (a == dedup.exact_signature("a text")).all()
    assert (a == b).sum() <= 2
