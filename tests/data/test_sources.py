"""Corpora: documents of prose without markup, in order, from the kit, from a file, or refused by name."""

import bz2
import gzip
import itertools
import json
import lzma
import re
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lwzlib.base.kit import SHAKESPEARE, THREE_KINGDOMS, ModelError, is_prepared
from lwzlib.base.rows import DataError
from lwzlib.data.sources import passages, read_documents, read_texts
from lwzlib.method.text import count_words, has_han, language_of

BOOKS = {SHAKESPEARE: (38, 800_000, "en"), THREE_KINGDOMS: (120, 450_000, "zh")}  # documents, words at least


def _kit(source):
    if source in BOOKS and not is_prepared(source):
        pytest.skip(f"{source} is not prepared (lwz prepare)")
    return list(read_documents(source))


def _documents(path):
    return [(name.removeprefix(f"{path}/"), paragraphs) for name, paragraphs in read_documents(str(path))]


def test_the_python_docs_are_prose_without_code():
    found = _kit("kit:python-docs")
    paragraphs = [p for _, paragraphs in found for p in paragraphs]
    assert sum(map(count_words, paragraphs)) > 20_000
    assert all(re.match(r"[A-Z]", p) and p.endswith(".") for p in paragraphs), "sentences, not headings, tables or code"
    code = r">>>|::=|^\s*(def|class|import|for|while|if) .*:$|\*{4}|={4}|-{4}|~{4}"
    assert not [p for p in paragraphs if re.search(code, p)]
    assert sum(p.count("\n") for p in paragraphs) == 0


@pytest.mark.parametrize("source", ["kit:python-docs", *BOOKS])
def test_documents_of_the_kit_are_named_ordered_and_folded(source):
    found = _kit(source)
    assert len({name for name, _ in found}) == len(found) and all(name.startswith(f"{source}/") for name, _ in found)
    paragraphs = [p for _, paragraphs in found for p in paragraphs]
    assert all(p == " ".join(p.split()) != "" for p in paragraphs)
    assert found == _kit(source)


@pytest.mark.parametrize("source", BOOKS)
def test_the_books_are_whole_and_in_their_language(source):
    found, (documents, words, language) = _kit(source), BOOKS[source]
    assert len(found) == documents
    assert {language_of(paragraphs[0]) for _, paragraphs in found} == {language}
    assert sum(count_words(p) for _, paragraphs in found for p in paragraphs) > words


def test_headings_and_names_of_speakers_are_left_out_of_the_plays():
    paragraphs = [p for _, play in _kit(SHAKESPEARE) for p in play]
    assert not [p for p in paragraphs if re.search(r"^#|\*\*", p)][:3]
    assert any(p.startswith("To be, or not to be: that is the question") for p in paragraphs)


def test_the_plays_are_free_of_markup():
    assert not [p for _, play in _kit(SHAKESPEARE) for p in play if re.search(r"[][_*#\\<>|`]", p)][:3]


def test_the_novel_is_in_chinese_without_markup():
    found = _kit(THREE_KINGDOMS)
    assert not [p for _, chapter in found for p in chapter if re.search(r"[_*#\\<>|`]|https?:", p)][:3]
    assert "桃园" in found[0][1][0] and all(has_han(p) for p in found[0][1])


@pytest.mark.parametrize("suffix", ["txt", "md"])
def test_a_text_file_is_one_document(tmp_path, suffix):
    path = tmp_path / f"mine.{suffix}"
    path.write_text("One line\nand  another.\n \n\n\tA second paragraph.\r\n\r\n雨。\n\n", encoding="utf-8")
    assert _documents(path) == [("mine", ["One line and another.", "A second paragraph.", "雨。"])]


def test_each_row_of_a_jsonl_file_is_a_document(tmp_path):
    path = tmp_path / "mine.jsonl"
    rows = [{"text": "One.\n\nTwo."}, {"text": " \n "}, {"text": "雨。", "id": "rain", "other": 1}]
    path.write_text("\n".join(map(json.dumps, rows)))
    assert _documents(path) == [("1", ["One.", "Two."]), ("rain", ["雨。"])], "the empty one is left out"


@pytest.mark.parametrize(("name", "content", "said"), [
    ("mine.jsonl", '{"text": "a"}\n{"txt": "b"}\n', "line 2: a row of a corpus needs a field text"),
    ("mine.jsonl", '{"text": "a"}\n\n{"text": 5}\n', "line 3: a row of a corpus needs a field text"),
    ("mine.jsonl", '["a"]\n', "line 1: a row of a corpus"), ("mine.jsonl", '{"text": \n', "line 1: not JSON"),
    ("mine.txt", None, "no corpus file"), ("mine.md", None, "no corpus file"), ("mine.jsonl", None, "mine.jsonl")])
def test_a_source_that_cannot_be_read_is_refused_by_name(tmp_path, name, content, said):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=said) as error:
        list(read_documents(str(path)))
    assert str(path) in str(error.value)


def test_a_corpus_that_the_kit_has_not_is_refused_with_those_it_has():
    with pytest.raises(DataError, match=r"no corpus 'kit:shakespear'; the kit has kit:python-docs, kit:shakespeare"):
        list(read_documents("kit:shakespear"))


@pytest.mark.parametrize("source", BOOKS)
def test_a_book_that_is_not_prepared_says_how(monkeypatch, tmp_path, source):
    monkeypatch.setenv("LWZ_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="lwz prepare"):
        list(read_documents(source))


@given(st.lists(st.integers(1, 40), min_size=1, max_size=40), st.integers(1, 60))
def test_passages_are_whole_consecutive_paragraphs_of_the_size_asked_for(sizes, words):
    paragraphs = [f"{'abc'[i % 3]} " * (size - 1) + "end" for i, size in enumerate(sizes)]
    expected, at = [], 0
    while at < len(sizes):  # the shortest stretch that is long enough, from where the last one ended
        end = next((e for e in range(at + 1, len(sizes) + 1) if sum(sizes[at:e]) >= words), None)
        if end is None:
            break
        expected += ["\n\n".join(paragraphs[at:end])] if sum(sizes[at:end]) <= 2 * words else []
        at = end
    found = passages(paragraphs, words)
    assert found == expected
    assert all(words <= count_words(passage) <= 2 * words for passage in found)


@pytest.mark.parametrize("source", ["kit:python-docs", *BOOKS])
def test_passages_of_the_kit_are_in_order_and_of_the_size_asked_for(source):
    made = 0
    for _, paragraphs in _kit(source)[:20]:
        found, left = passages(paragraphs, 60), list(paragraphs)
        made += len(found)
        for passage in found:
            assert 60 <= count_words(passage) <= 120
            parts = passage.split("\n\n")
            while left[: len(parts)] != parts:
                left.pop(0)
            left = left[len(parts) :]
    assert made >= 20


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "folder"])
def test_parts_share_the_documents_out_and_lose_none(tmp_path, kind):
    rows = [{"id": f"n{i}", "text": f"Document number {i}."} for i in range(23)]
    if kind == "jsonl":
        source = tmp_path / "rows.jsonl"
        source.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    elif kind == "parquet":
        source = tmp_path / "rows.parquet"
        pq.write_table(pa.Table.from_pylist(rows), source)
    else:
        source = tmp_path
        for row in rows:
            (tmp_path / f"{row['id']}.txt").write_text(row["text"])
    shares = [[text for _, text in read_texts(str(source), part, 5)] for part in range(5)]
    assert sorted(text for share in shares for text in share) == sorted(row["text"] for row in rows)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_parquet_file_that_is_none_is_named(tmp_path):
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(DataError, match=r"cannot read .*bad\.parquet"):
        list(read_texts(str(tmp_path / "bad.parquet")))


PACKED = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, "": bytes}


@pytest.mark.parametrize("packing", PACKED)
def test_a_packed_file_is_read_like_an_unpacked_one(tmp_path, packing):
    (tmp_path / f"a.jsonl{packing}").write_bytes(PACKED[packing](b'\xef\xbb\xbf{"text": "One."}\n{"text": "Two."}\n'))
    (tmp_path / f"b.txt{packing}").write_bytes(PACKED[packing]("\ufeff雨。".encode()))
    (tmp_path / ".gitattributes").write_bytes(b"hidden")
    jsonl, txt = f"a.jsonl{packing}", f"b.txt{packing}"
    assert _documents(tmp_path) == [(f"{jsonl}/1", ["One."]), (f"{jsonl}/2", ["Two."]), (f"{txt}/b", ["雨。"])]
    assert [name for name, _ in read_documents(str(tmp_path / f"b.txt{packing}"))] == [f"{tmp_path}/b.txt{packing}/b"]


@pytest.mark.parametrize("name", ["00000.jsonl.zst", "a.csv", "b.parquet.gz", "c.zip", "d"])
def test_a_folder_with_a_file_that_cannot_be_read_names_it(tmp_path, name):
    (tmp_path / "README.md").write_text("A card.")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / name).write_bytes(b"x")
    with pytest.raises(DataError, match=rf"1 of its files cannot be read, the first .*deep/{re.escape(name)}"):
        list(read_documents(str(tmp_path)))


@pytest.mark.parametrize(("name", "content", "said"), [
    ("a.txt", "rain".encode("utf-16"), "a.txt is UTF-16; make it UTF-8"), ("a.txt", b"rain\0rain", "a.txt holds NUL bytes"),
    ("a.md", b"caf\xe9", "a.md is not UTF-8"), ("a.jsonl", '{"text": "a"}'.encode("utf-16"), "a.jsonl, line 1 is UTF-16"),
    ("a.jsonl", b'{"text": "a"}\n{"text": "\\ud83d"}\n', r"a.jsonl, line 2: a half of a surrogate pair"),
    ("a.jsonl", b'{"text": "a"}\n{"text": "\xed\xa0\xbd"}\n', r"a.jsonl, line 2 is not UTF-8"),
    ("a.jsonl", b'{"text": "\xe9"}\n', r"a.jsonl, line 1 is not UTF-8"),
    ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 999, mtime=0)[:40], "a.jsonl.gz cannot be read to its end"),
    ("a.txt.gz", b"no archive", "a.txt.gz cannot be read to its end"),
    ("a.jsonl.zst", b"x", ".zst files are not read; unpack it")])
def test_bytes_that_are_no_text_are_refused_by_file_and_line(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=said):
        list(read_documents(str(tmp_path / name)))


@given(st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("\ufeff\u2028\x85\x1c"), min_size=1))
def test_any_text_comes_back_from_a_row_with_or_without_a_mark(text):
    with tempfile.TemporaryDirectory() as folder:
        for number, (escaped, mark) in enumerate(itertools.product([True, False], [b"", b"\xef\xbb\xbf"])):
            path = Path(folder) / f"{number}.jsonl"
            path.write_bytes(mark + json.dumps({"text": text}, ensure_ascii=escaped).encode())
            assert [found for _, found in read_texts(str(path))] == [text]
