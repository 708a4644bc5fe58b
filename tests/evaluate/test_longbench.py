"""LongBench-Write: the length score against its formula, the prompts, the table against plain loops, a real server."""

import asyncio
import doctest
import json
import random
import re

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from lwzlib.base.kit import LONGBENCH, ModelError, is_prepared
from lwzlib.base.rows import DataError, write_rows
from lwzlib.endpoints import llm
from lwzlib.evaluate import common
from lwzlib.evaluate import longbench as lb
from lwzlib.evaluate.longbench import judge_responses, score_table
from lwzlib.exhibits import figures
from lwzlib.method.text import count_words

words = st.integers(1, 40_000)


def test_examples_in_the_docstrings():
    assert doctest.testmod(lb).failed == doctest.testmod(common).failed == 0


def formula(x, y):
    if y == 0:
        return 0
    if y > x:
        return 100 * max(0, 1 - (y / x - 1) / 3)
    return 100 * max(0, 1 - (x / y - 1) / 2)


def test_length_score_is_the_formula_everywhere():
    for x in (1, 2, 3, 7, 100, 150, 333, 1000):
        for y in range(5 * x + 5):
            assert lb.length_score(x, y) == pytest.approx(formula(x, y), abs=1e-9)


@given(words, words, words)
def test_length_score_rises_to_what_was_asked_for_and_falls_after(x, a, b):
    low, high = sorted((a, b))
    assert 0 <= lb.length_score(x, a) <= 100 and lb.length_score(x, x) == 100
    if high <= x:
        assert lb.length_score(x, low) <= lb.length_score(x, high)
    if low >= x:
        assert lb.length_score(x, low) >= lb.length_score(x, high)
    assert (lb.length_score(x, a) == 0) == (a <= x / 3 or a >= 4 * x)


@given(words)
def test_length_score_is_continuous_where_its_sides_meet(x):
    assert lb.length_score(x, x + 1) == pytest.approx(100 - 100 / (3 * x))
    assert lb.length_score(x + 1, x) == pytest.approx(100 - 100 / (2 * x))


@pytest.mark.parametrize(("required", "written"), [(0, 5), (-1, 5), (5, -1)])
def test_lengths_that_cannot_be_are_refused(required, written):
    with pytest.raises(ValueError, match="must be above 0"):
        lb.length_score(required, written)


@given(st.lists(st.integers(1, 5), min_size=6, max_size=6))
def test_quality_score_is_the_formula(grades):
    score = lb.quality_score(lb.Quality(**dict(zip(lb.DIMENSIONS, grades, strict=True))))
    assert score == pytest.approx((sum(grades) / 6 - 1) * 25) and 0 <= score <= 100


def test_the_prompts_of_the_kit():
    if not is_prepared(LONGBENCH):
        pytest.skip(f"{LONGBENCH} is not prepared (lwz prepare)")
    bench = lb.read_benchmark()
    assert len(bench) == 120 and list(bench) == list(range(120)) and len({item.prompt for item in bench.values()}) == 120
    assert {item.language for item in bench.values()} == {"en", "zh"}
    assert min(item.required_words for item in bench.values()) == 100
    assert max(item.required_words for item in bench.values()) == 20_000
    assert len({item.type for item in bench.values()}) == 7
    frame = score_table(bench, {})
    assert set(frame[frame.scope == "length"].name) == set(lb.CLASSES) and frame.score.isna().all()


def test_prompts_that_are_not_prepared_say_how(monkeypatch, tmp_path):
    monkeypatch.setenv("LWZ_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="lwz prepare"):
        lb.read_benchmark()


def lines(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(("row", "wrong"), [
    ({"prompt": "p", "type": "t", "length": 0}, "length = 0"), ({"prompt": "p", "type": "t"}, "length: Field required"),
    ({"prompt": "p", "type": "t", "length": "100"}, "length = '100'"),
    ({"prompt": "", "type": "t", "length": 1}, "prompt = ''"),
    ({"prompt": "p", "length": 1}, "type: Field required")])
def test_prompts_that_cannot_be_used_are_named(tmp_path, row, wrong):
    with pytest.raises(DataError, match=rf"bench\.jsonl, line 2: {wrong}"):
        lb.read_benchmark(lines(tmp_path / "bench.jsonl", [{"prompt": "p", "type": "t", "length": 1}, row]))


@pytest.mark.parametrize(("row", "wrong"), [
    ({"index": 5, "scores": [{name: 3 for name in lb.DIMENSIONS}]}, "index 5 is not in the benchmark"),
    ({"index": 0, "scores": [{name: 6 for name in lb.DIMENSIONS}]}, r"scores\.0\.relevance = 6"),
    ({"index": 0, "scores": [{name: 3 for name in lb.DIMENSIONS[:5]}]}, r"scores\.0\.reading_experience: Field required"),
    ({"index": 0, "scores": []}, "scores")])
def test_scores_that_cannot_be_used_are_named(tmp_path, row, wrong):
    bench = lb.read_benchmark(lines(tmp_path / "bench.jsonl", [{"prompt": "p", "type": "t", "length": 1}]))
    with pytest.raises(DataError, match=rf"scores\.jsonl, line 1: {wrong}"):
        lb.read_scores(lines(tmp_path / "scores.jsonl", [row]), bench)


@pytest.mark.parametrize(("response", "count"), [
    ("one two 三", 3), ("", 0), ("<think>a long plan</think><answer>two words</answer>", 2), ("a plan</think>\n\none", 1),
    ("<think>a plan that never ends", 0), ("<answer>cut after four words", 4)])
def test_words_are_those_of_the_answer(response, count):
    bench = {0: lb.Item(prompt="p", type="t", length=10)}
    row = lb.lengths(bench, {0: response}).iloc[0]
    assert row.written_words == count and row.S_l == pytest.approx(formula(10, count))


def test_table_is_that_of_the_protocol():
    draw = random.Random(3)
    for _ in range(60):
        bench = {i: lb.Item(type=draw.choice("ab"), length=draw.choice([100, 499, 500, 2000, 3999, 4000, 20_000]),
                            prompt=draw.choice(["Rain", "写雨"])) for i in range(draw.randint(1, 9))}
        answers = {i: "word " * draw.randint(0, 900) for i in bench if draw.random() < 0.8}
        judgments = {i: [lb.Quality(**{name: draw.randint(1, 5) for name in lb.DIMENSIONS}) for _ in range(draw.randint(1, 3))]
                     for i in answers if draw.random() < 0.8}
        s_l = {i: formula(bench[i].required_words, answers[i].count("word")) for i in answers}
        s_q = {}
        for i, given_to in judgments.items():
            s_q[i] = sum((sum(j.model_dump(exclude={"analysis"}).values()) / 6 - 1) * 25 for j in given_to) / len(given_to)
        expected = {"S_l": s_l, "S_q": s_q, "S": {i: (s_l[i] + s_q[i]) / 2 for i in s_q}}
        frame = score_table(bench, answers, judgments, resamples=0)
        for row in frame[frame.measure.isin(expected)].itertuples():
            members = [i for i, item in bench.items() if
                       row.scope == "overall" or row.name in (item.type, item.language) or
                       (row.scope == "length" and list(lb.CLASSES).index(row.name) == sum(
                           item.required_words >= bound for bound in (500, 2000, 4000)))]
            values = [expected[row.measure][i] for i in members if i in expected[row.measure]]
            assert (row.of, row.prompts) == (len(members), len(values))
            assert row.score == pytest.approx(sum(values) / len(values), abs=1e-9) if values else np.isnan(row.score)


def grades(value):
    return {"analysis": "a", **dict.fromkeys(lb.DIMENSIONS, value)}


def test_judging_from_responses_to_the_table_and_the_figure(llm_server, tmp_path):
    bench = lb.read_benchmark(lines(tmp_path / "bench.jsonl", [
        {"prompt": "写春", "type": "Poem", "length": 2}, {"prompt": "Rain", "type": "Essay", "length": 4},
        {"prompt": "Silence", "type": "Essay", "length": 4}, {"prompt": "Unanswered", "type": "Essay", "length": 4}]))
    answers = common.read_responses(lines(tmp_path / "answers.jsonl", [
        {"index": 2, "response": "<think>No"}, {"index": 0, "response": "<think>计划</think><answer>春天来了</answer>"},
        {"index": 1, "response": "It is raining again"}]), bench)
    script = {"raining": [{"text": json.dumps(grades(4))}], "春天": [{"text": json.dumps(grades(9))}, {
        "text": json.dumps(grades(3))}], "Silence": [{"text": "none"}]}
    settings = llm.configure(base_url=llm_server.url, model="m", api_key_env="LWZ_NO_KEY", patience_s=5.0)
    out = tmp_path / "scores.jsonl"
    llm_server.script(script)
    judgments, missing = asyncio.run(judge_responses(settings, bench, answers, out))
    assert [json.loads(line) for line in out.read_text().splitlines()] == [
        {"index": 0, "scores": [grades(3)]}, {"index": 1, "scores": [grades(4)]}]
    assert lb.read_scores(out, bench) == judgments and [row["asked"] for row in missing] == [[2, 0]]
    assert {r["body"]["temperature"] for r in llm_server.requests} == {0.5}
    assert not any("计划" in r["asked"] for r in llm_server.requests)
    frame = score_table(bench, answers, judgments).set_index(["scope", "name", "measure"])
    assert frame.loc["overall", "all", "S_l"][["prompts", "score"]].tolist() == [3, pytest.approx((200 / 3 + 100 + 0) / 3)]
    assert frame.loc["overall", "all", "S_q"][["prompts", "score"]].tolist() == [2, pytest.approx(62.5)]
    assert frame.loc["type", "Essay", "S"][["of", "prompts", "score"]].tolist() == [3, 1, 87.5]

    table = lb.lengths(bench, answers)
    assert table[["required_words", "written_words"]].values.tolist() == [[2, 4], [4, 4], [4, 0]]
    ax = figures.required_against_written(table, Figure().add_subplot())
    assert [line.get_label() for line in ax.lines] == ["as asked", "written"] and ax.get_xscale() == "log"
    assert ax.lines[1].get_ydata().min() == ax.get_ylim()[0], "an empty answer lies on the lower edge"
    both = pd.concat([table.assign(model="a"), table.assign(model="b")])
    ax = figures.required_against_written(both, Figure().add_subplot())
    assert [line.get_label() for line in ax.lines[1:]] == ["a", "b"]
    assert not figures.required_against_written(lb.lengths(bench, {}), Figure().add_subplot()).lines


@given(st.text(st.sampled_from("aGé1_ 字\u3400,.-'") , max_size=30))
def test_words_are_counted_as_their_authors_count_them(text):
    count = 0
    for run in re.findall(r"\w+|\W+", text):  # a Latin word is a whole run of word characters that are ASCII letters
        count += sum("\u4e00" <= c <= "\u9fff" for c in run) + (run.isascii() and run.isalpha())
    assert lb.count_published_words(text) == count


def test_published_count_departs_from_the_rewards():
    text = "GPT4 and 3D models, COVID19"
    assert lb.count_published_words(text) == 2 and count_words(text) == 5
    assert lb.DECODING.temperature == 0.5 and lb.DECODING.max_new_tokens == 32_768


def test_a_plan_that_a_template_opened_and_that_never_ends_has_no_words(tmp_path):
    bench = lb.read_benchmark(_bench_file(tmp_path, 3))
    texts = ["p</think>one two", "p</think>one", "a plan without an end"]
    rows = [{"index": n, "response": text} for n, text in enumerate(texts)]
    write_rows(tmp_path / "responses.jsonl", rows)
    assert list(lb.lengths(bench, common.read_responses(tmp_path / "responses.jsonl", bench)).written_words) == [2, 1, 0]


def _bench_file(folder, count):
    write_rows(folder / "bench.jsonl", [{"prompt": f"Write {n}.", "type": "story", "length": 100} for n in range(count)])
    return str(folder / "bench.jsonl")
