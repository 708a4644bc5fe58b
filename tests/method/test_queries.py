"""Queries: the shipped sets keep their promises, and a broken file is refused by file, line and field."""

import json
import re
from collections import Counter

import pytest

from lwzlib.base.recipe import load_recipe
from lwzlib.base.rows import DataError, digest_of
from lwzlib.method.queries import DOMAINS, load_queries
from lwzlib.method.text import answer_language, has_han
from lwzlib.pipeline.inputs import queries_of_recipe

NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight")
GOOD = {"id": "a", "query": "Write about rain.", "word_range": [50, 70]}
SETS = [f"kit:{name}{suffix}" for suffix in ("", "_short", "_lengths") for name in ("train", "heldout")]


def _file(tmp_path, *rows):
    path = tmp_path / "mine.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(("name", "least"), [("kit:train", 240), ("kit:heldout", 60)])
def test_the_shipped_sets_are_large_bilingual_and_span_the_domains(name, least):
    queries = load_queries(name)
    assert len(queries) >= least
    assert sum(q.language == "zh" for q in queries) / len(queries) == pytest.approx(1 / 3, abs=0.05)
    assert {q.domain for q in queries} == set(DOMAINS)


@pytest.mark.parametrize("suffix", ["", "_short", "_lengths"])
def test_train_and_heldout_share_neither_id_nor_query(suffix):
    train, heldout = load_queries(f"kit:train{suffix}"), load_queries(f"kit:heldout{suffix}")
    assert not {q.id for q in train} & {q.id for q in heldout}
    assert not {" ".join(q.query.split()) for q in train} & {" ".join(q.query.split()) for q in heldout}


@pytest.mark.parametrize("name", ["train", "heldout"])
def test_lengths_differ_evenly_and_the_words_that_a_query_states_lie_in_its_range(name):
    queries = load_queries(f"kit:{name}_lengths", ["en"])
    for query in queries:
        asked = re.search(rf"\b({'|'.join(NUMBERS)}) (?:short paragraph|sentence)", query.query, re.IGNORECASE)
        count = 1 + NUMBERS.index(asked[1].lower())
        lower, upper = (60, 90) if "short paragraph" in query.query else (15, 26)
        assert all(abs(end - count * each) <= 2.5 for end, each in zip(query.word_range, (lower, upper), strict=True)), query
        stated = re.search(r"about (\d+) words", query.query)
        assert not stated or query.word_range[0] <= int(stated[1]) <= query.word_range[1], query
    counts = Counter(query.word_range for query in queries)
    assert len(counts) == 11 and max(counts.values()) < 3 * min(counts.values())


@pytest.mark.parametrize("name", ["train", "heldout"])
def test_each_query_has_a_short_variant(name):
    long, short = load_queries(f"kit:{name}"), load_queries(f"kit:{name}_short")
    assert Counter((q.language, q.domain) for q in long) == Counter((q.language, q.domain) for q in short)
    assert max(q.word_range[1] for q in short) < 160  # `max_words` of the nano recipe


@pytest.mark.parametrize("name", SETS)
def test_shipped_queries_are_unique_and_in_the_language_they_state(name):
    queries = load_queries(name)
    assert len({q.query for q in queries}) == len(queries)
    assert all(has_han(q.query) == (q.language == "zh") == (answer_language(q.query) == "zh") for q in queries)


def test_a_file_of_ones_own_needs_three_fields(tmp_path):
    english, chinese = load_queries(_file(tmp_path, GOOD, "", {**GOOD, "id": "b", "query": "写一写雨。"}))
    assert (english.language, chinese.language) == ("en", "zh")
    assert (english.id, english.word_range, english.domain) == ("a", (50, 70), "unknown")


def test_a_stated_language_is_kept(tmp_path):
    assert load_queries(_file(tmp_path, {**GOOD, "language": "zh"}))[0].language == "zh"


@pytest.mark.parametrize(("field", "value"), [
    ("word_range", [70, 50]), ("word_range", [0, 50]), ("word_range", [50]), ("word_range", [50, 12001]),
    ("word_range", "long"), ("query", ""), ("query", 7), ("id", ""), ("language", "fr"), ("domain", "D7"),
    ("words", 50)])
def test_a_broken_row_names_file_line_and_field(tmp_path, field, value):
    path = _file(tmp_path, GOOD, {**GOOD, "id": "b"}, {**GOOD, "id": "c", field: value})
    with pytest.raises(DataError, match=rf"mine\.jsonl, line 3.*\b{field}\b"):
        load_queries(path)


@pytest.mark.parametrize("field", GOOD)
def test_a_missing_field_is_named(tmp_path, field):
    row = {key: value for key, value in GOOD.items() if key != field}
    with pytest.raises(DataError, match=rf"line 1: {field}.*required"):
        load_queries(_file(tmp_path, row))


@pytest.mark.parametrize("line", ["{", "not json", '{"id": "a",}'])
def test_a_line_that_is_not_json_is_named(tmp_path, line):
    with pytest.raises(DataError, match=r"mine\.jsonl, line 2: not JSON"):
        load_queries(_file(tmp_path, GOOD, line))


@pytest.mark.parametrize("line", ["[1, 2]", "null", '"text"'])
def test_a_line_that_is_no_object_is_named(tmp_path, line):
    with pytest.raises(DataError, match=r"mine\.jsonl, line 2"):
        load_queries(_file(tmp_path, GOOD, line))


def test_bytes_that_are_not_utf8_are_named(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b'\n{"id": "\xff\xfe"}\n')
    with pytest.raises(DataError, match="line 2 is not UTF-8"):
        load_queries(str(path))


@pytest.mark.parametrize("source", ["kit:trian", "no/such/file.jsonl"])
def test_a_missing_file_lists_what_the_kit_has(source):
    with pytest.raises(DataError) as caught:
        load_queries(source)
    assert all(name in str(caught.value) for name in [source, *SETS])


def test_a_repeated_id_names_both_lines(tmp_path):
    with pytest.raises(DataError, match=r"line 3: id 'a' was already used at .*line 1"):
        load_queries(_file(tmp_path, GOOD, {**GOOD, "id": "b"}, GOOD))


def test_languages_choose_and_keep_the_order():
    everything, chinese = load_queries("kit:heldout"), load_queries("kit:heldout", ["zh"])
    assert chinese == [q for q in everything if q.language == "zh"]


def test_languages_may_be_any_iterable():
    assert load_queries("kit:heldout", iter(["en", "zh"])) == load_queries("kit:heldout", ["en", "zh"])


def test_no_query_left_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"mine\.jsonl has no query in zh"):
        load_queries(_file(tmp_path, GOOD), ["zh"])
    with pytest.raises(DataError, match="no query"):
        load_queries(_file(tmp_path))


def test_a_held_out_query_that_is_trained_on_is_refused(tmp_path):
    train, heldout = _file(tmp_path, GOOD), tmp_path / "heldout.jsonl"
    heldout.write_text(json.dumps(GOOD | {"id": "b"}) + "\n")
    asked = load_recipe("smoke", {"data.train": train, "data.heldout": str(heldout), "grpo.queries_per_step": 1})
    with pytest.raises(DataError, match=r"heldout.jsonl, query 'b' is also trained on \(query 'a' of .*mine.jsonl\)"):
        queries_of_recipe(asked)


def test_digest_sees_names_sizes_and_both_ends_of_large_files(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_bytes(b"x" * (5 * 2**20))
    first = digest_of(str(folder))
    for at in (0, 2**20 - 1, -1, 4 * 2**20):
        content = bytearray(b"x" * (5 * 2**20))
        content[at] = 0
        (folder / "a.txt").write_bytes(content)
        assert digest_of(str(folder)) != first, at
    (folder / "a.txt").write_bytes(b"x" * (5 * 2**20))
    assert digest_of(str(folder)) == first == digest_of(str((folder / "..").resolve() / "texts"))
    (folder / ".cache").mkdir()
    (folder / ".cache" / "note").write_text("when it was downloaded")
    assert digest_of(folder) == first, "hidden files are no content"
    (folder / "a.txt").rename(folder / "b.txt")
    assert digest_of(str(folder)) != first
    assert digest_of(str(folder / "b.txt")) != digest_of(_file(tmp_path, GOOD))
    (tmp_path / "empty").mkdir()
    assert digest_of(tmp_path / "empty"), "whoever reads it says what it lacks"
