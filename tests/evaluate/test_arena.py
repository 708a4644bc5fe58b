"""The arena end to end: reading, both orders, a language model as judge against a real server, kills included."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from itertools import permutations

import numpy as np
import pandas as pd
import pytest
from polling import until

from lwzlib.base.rows import DataError, append_rows, write_rows
from lwzlib.endpoints import llm
from lwzlib.evaluate import arena, elo
from lwzlib.evaluate.arena import read_arena, save_judgments
from lwzlib.evaluate.elo import ArenaError
from lwzlib.method.queries import load_queries
from lwzlib.method.text import shown

SIX = ["m1", "m2", "m3", "m4", "m5", "m6"]
EN, ZH = "Write an essay on bread.", "写一篇关于雨的散文。"


def public(path, *rows):
    write_rows(path, [{"type": "Essay", "length": 200} | row for row in rows])
    return str(path)


def test_public_form_is_read_however_it_holds_the_six_baselines(tmp_path):
    texts = {model: f"by {model}" for model in SIX}
    listed = [{"model": model, "response": text} for model, text in texts.items()]
    path = public(tmp_path / "a.jsonl", {"idx": 1, "question": EN, "baseline_response": texts},
                  {"idx": 2, "question": ZH, "baseline_response": listed},
                  {"idx": 3, "question": EN, "baseline_response": json.dumps(listed)},
                  {"idx": 4, "question": EN, "baseline_response": "", "length": None, "more": 1})
    found = read_arena(path)
    assert found.tasks["2"] == arena.Task("2", ZH, "Essay") and list(found.tasks) == list("1234")
    assert found.texts == {model: dict.fromkeys("123", f"by {model}") for model in SIX}
    joined = found.joined_by("ours", {"1": "x", "4": "y"})
    assert joined.texts["ours"] == {"1": "x", "4": "y"} and "ours" not in found.texts
    against = [match for match in arena.matches(joined) if "ours" in match]
    assert len(against) == 12 and {match.query_id for match in against} == {"1"}
    for name, texts, reason in (("m1", {}, "already a model 'm1'"), ("new", {"9": "x"}, "unknown queries: 9")):
        with pytest.raises(ArenaError, match=reason):
            found.joined_by(name, texts)


@pytest.mark.parametrize(("row", "reason"), [
    ({"idx": 1}, "line 1: question: Field required"), ({"idx": 1, "question": ""}, "line 1: question = '': String should have"),
    ({"idx": 1, "question": EN, "baseline_response": "one text"}, "must be {model: text} or a list"),
    ({"idx": 1, "question": EN, "baseline_response": {"m": 5}}, "must be {model: text} or a list"),
    ({"idx": 1, "question": EN, "baseline_response": "5"}, "must be {model: text} or a list"),
    ({"idx": 1, "question": EN, "baseline_response": ["a", "b"]}, "must be {model: text} or a list"),
    ({"idx": 1, "question": EN, "baseline_response": [{"model": "m", "response": "a"}] * 2}, "each model once"),
])
def test_broken_public_row_is_refused_at_its_place(tmp_path, row, reason):
    with pytest.raises(DataError) as error:
        read_arena(public(tmp_path / "a.jsonl", row))
    assert reason in str(error.value)


def test_public_file_twice_the_same_or_empty_is_refused(tmp_path):
    with pytest.raises(DataError, match="line 2: idx 1 is there twice"):
        read_arena(public(tmp_path / "a.jsonl", {"idx": 1, "question": EN}, {"idx": "1", "question": EN}))
    with pytest.raises(DataError, match="has no row"):
        read_arena(public(tmp_path / "b.jsonl"))


def test_embedded_arena_of_held_out_queries():
    queries = load_queries("kit:heldout")
    rows = [{"id": q.id, "query": q.query, "type": q.type, "completion": f"<think>p</think><answer>on {q.id}</answer>",
             "truncated": False} for q in queries]
    found = arena.of_samples({"think": rows, "nothink": rows[:10]})
    assert list(found.tasks) == [q.id for q in queries] and found.texts["think"][queries[0].id] == f"on {queries[0].id}"
    assert len(arena.matches(found)) == 20
    with pytest.raises(ArenaError, match="answered twice"):
        arena.of_samples({"think": rows + rows[:1]})
    with pytest.raises(ArenaError, match=r"nothink: query .* has another text"):
        arena.of_samples({"think": rows, "nothink": [rows[0] | {"query": "other"}]})


@pytest.mark.parametrize(("completion", "text"), [
    ("<think>p</think><answer> a b </answer>", "a b"), ("<answer>cut sho", "cut sho"), ("plain text", "plain text"),
    ("<think>a plan that never ends", ""), ("<think>p</think> no tags ", "no tags"), ("", "")])
def test_judge_reads_what_was_written_for_the_reader(completion, text):
    assert shown(completion) == text


def small(models=("good", "poor", "same"), queries=4):
    tasks = {str(q): arena.Task(str(q), ZH if q % 2 else EN) for q in range(queries)}
    return arena.Arena(tasks, {model: {q: f"{model}-{q} {{first}} {{request}}" for q in tasks} for model in models})


def test_every_pair_is_shown_in_both_orders():
    made = small(queries=3)
    found = arena.matches(made)
    assert sorted(found) == sorted((q, *pair) for q in "012" for pair in permutations(("good", "poor", "same"), 2))


def test_prompts_are_twins_and_texts_are_filled_in_as_they_stand():
    assert set(arena.JUDGE) == {"en", "zh"}
    for text in arena.JUDGE.values():
        assert all(text.count(part) == 1 for part in ("{request}", "{first}", "{second}", '"winner"', "<A>\n", "\n</B>"))
    asked = arena.judge_prompt(small(), arena.Match("1", "good", "poor"))
    assert asked.startswith(arena.JUDGE["zh"][:20]) and f"<request>\n{ZH}\n</request>" in asked
    assert "<A>\ngood-1 {first} {request}\n</A>\n\n<B>\npoor-1 {first} {request}\n</B>" in asked


def verdict(winner, **turn):
    return [{"text": json.dumps({"winner": winner, "reason": "so"})} | turn]


# `good` wins; `poor` and `same` tie in one order, and the first wins in the other; on query 3 `good` first gets no answer
SCRIPT = {"<A>\ngood-3": [{"text": "I cannot say"}], "<A>\ngood": verdict("A"), "<B>\ngood": verdict("B"),
          "<A>\npoor": verdict("A"), "<A>\nsame": verdict("tie")}


def judge(server, made, replies, **settings):
    asked = llm.configure(base_url=server.url, model="judge-7b", api_key_env="LWZ_NO_KEY", patience_s=5.0, **settings)
    return asyncio.run(arena.judged_by_llm(made, arena.matches(made), asked, replies))


def test_language_model_judges_and_nothing_is_asked_twice(llm_server, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(arena, "_PROMPTS_IN_MEMORY", 10)
    llm_server.script(SCRIPT)
    made = small()
    found = judge(llm_server, made, tmp_path / "replies.jsonl")
    assert len(found) == 24 and list(found.columns) == arena.COLUMNS and set(found.judge) == {"judge-7b"}
    assert len(llm_server.requests) == 24 + 2 * 2  # each of the two that are not valid is asked again twice
    failed = found[found.winner.isna()]
    assert failed[["query_id", "first"]].to_numpy().tolist() == [["3", "good"]] * 2
    assert failed.reason.str.contains("none valid").all() and (found[found.winner.notna()].reason == "so").all()
    results = elo.win_tie_loss(found).set_index(["model", "other"])
    assert results.loc[("good", "poor"), ["wins", "losses", "missing"]].tolist() == [7, 0, 1]
    assert results.loc[("poor", "same"), ["wins", "ties", "inconsistent"]].tolist() == [4, 4, 1]
    rated = elo.ratings(found, "poor", resamples=20)
    assert rated.table.model.tolist() == ["good", "poor", "same"] and rated.table.elo[0] == np.inf
    assert rated.statements[0] == "2 of 24 judgments are missing and left out"
    assert "judge, from 20 of 24: 4/4" in capsys.readouterr().out

    llm_server.script({})
    pd.testing.assert_frame_equal(judge(llm_server, made, tmp_path / "replies.jsonl"), found)
    assert not llm_server.requests
    save_judgments(tmp_path / "judgments.jsonl", found)
    pd.testing.assert_frame_equal(arena.read_judgments(tmp_path / "judgments.jsonl"), found)


def test_kill_and_budget_lose_no_judgment_and_pay_for_none_twice(llm_server, tmp_path):
    made, replies, concurrency = small(queries=20), tmp_path / "replies.jsonl", 4
    total = len(arena.matches(made))
    script = {"<A>\ngood": "A", "<B>\ngood": "B", "<request>": "tie"}
    llm_server.script({part: verdict(winner, delay_s=0.02) for part, winner in script.items()})
    code = ("import asyncio, sys; from pathlib import Path; from test_arena import *; from types import SimpleNamespace as S\n"
            f"judge(S(url=sys.argv[1]), small(queries=20), Path(sys.argv[2]), concurrency={concurrency})")
    process = subprocess.Popen([sys.executable, "-c", code, llm_server.url, replies],
                               env=os.environ | {"PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path])})
    until(lambda: len(llm_server.requests) >= 30 or process.poll() is not None, "30 questions", 60)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    paid = len(replies.read_text().splitlines())
    assert 30 - concurrency <= paid < total
    with pytest.raises(llm.LLMError, match="the budget of 40 requests is spent"):
        judge(llm_server, made, replies, concurrency=concurrency, budget_requests=40)
    found = judge(llm_server, made, replies, concurrency=concurrency)
    assert len(found) == total and found.winner.notna().all()
    assert total <= len(llm_server.requests) <= total + concurrency, "twice at most what was in flight at the kill"
    assert elo.win_tie_loss(found, "good")[["wins", "losses"]].to_numpy().tolist() == [[40, 0], [40, 0]]


def test_writing_rm_judges_by_score_with_a_margin():
    made = small(queries=2)
    values = {"good": 2.0, "poor": 1.5, "same": 1.0}
    asked = []

    def scorer(texts):
        asked.extend(texts)
        return [np.nan if text.startswith("same-1") else values[text[:4]] for _, text in texts]

    scores = arena.score_texts(made, scorer)
    assert len(asked) == 6 and asked[0] == (EN, made.texts["good"]["0"])
    found = arena.judged_by_scores(arena.matches(made), scores, "writing-rm abc", 0.5)
    rows = found.set_index(["query_id", "first", "second"]).winner
    assert rows["0", "good", "poor"] == rows["0", "poor", "good"] == "tie", "exactly the margin"
    assert rows["0", "good", "same"] == "first" and rows["0", "same", "good"] == "second"
    assert rows["1", "same", "good"] is None and set(found.judge) == {"writing-rm abc"}
    assert found.reason[0] == "scores differ by +0.5"


def test_recorded_judgments_are_held_to_the_schema(tmp_path):
    row = {"query_id": "1", "first": "a", "second": "b", "winner": "tie", "judge": "human 1"}
    path = tmp_path / "human.jsonl"
    append_rows(path, [row, row | {"judge": "human 2", "winner": None}])
    assert arena.read_judgments(path).winner.tolist() == ["tie", None]
    for wrong, reason in ((row, "line 3: 1 / a / b / human 1 was judged before"), (row | {"second": "a"}, "plays itself"),
                          (row | {"winner": "A", "judge": "x"}, "line 3: winner = 'A': Input should be"),
                          (row | {"time": 3, "judge": "x"}, "line 3: time = 3: Extra inputs")):
        write_rows(path, [row, row | {"judge": "human 2"}, wrong])
        with pytest.raises(DataError) as error:
            arena.read_judgments(path)
        assert reason in str(error.value)


def test_importing_the_evaluation_loads_nothing_heavy():
    code = ("import sys, lwzlib.evaluate.arena, lwzlib.evaluate.trust\n"
            "print(*{'torch', 'transformers', 'sklearn', 'scipy', 'matplotlib'} & {*sys.modules})")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_baselines_are_judged_without_their_plan_like_the_player(tmp_path):
    found = read_arena(public(tmp_path / "a.jsonl", {
        "idx": 1, "question": EN, "baseline_response": {"m": "<think>a plan</think>\n\nThe text.", "n": "</think>Text."}}))
    assert found.texts == {"m": {"1": "The text."}, "n": {"1": "Text."}}


def test_a_plan_that_a_template_opened_and_that_never_ends_is_no_text(tmp_path):
    write_rows(tmp_path / "player.jsonl", [{"id": str(n), "completion": text} for n, text in enumerate(
        ["plan</think>Rain.", "plan</think><answer>Snow.</answer>", "a plan that never ends"])])
    tasks = {str(n): arena.Task(str(n), EN) for n in range(3)}
    assert arena.read_player(tmp_path / "player.jsonl", arena.Arena(tasks, {})) == {"0": "Rain.", "1": "Snow.", "2": ""}
    write_rows(tmp_path / "plain.jsonl", [{"id": "0", "completion": "Rain."}, {"id": "1", "completion": "stray</think>Snow."}])
    assert arena.read_player(tmp_path / "plain.jsonl", arena.Arena(tasks, {})) == {"0": "Rain.", "1": "Snow."}


def test_an_arena_of_one_player_and_a_file_without_judgments_say_what_is_missing(tmp_path):
    card = read_arena(public(tmp_path / "a.jsonl", {"idx": 1, "question": EN, "baseline_response": ""}))
    with pytest.raises(ArenaError, match=r"no two models answered the same query; the arena has ours: give `--player name="):
        arena.matches(card.joined_by("ours", {"1": "x"}))
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match=r"empty.jsonl has no judgment; a judgment is \{query_id, first, second, winner"):
        arena.read_judgments(tmp_path / "empty.jsonl")
    write_rows(tmp_path / "hard.jsonl", [{"question_id": "1", "model": "m", "judge": "j", "games": [{"score": "A>>B"}]}])
    with pytest.raises(DataError, match=r"hard.jsonl, line 1: query_id: Field required; a judgment is \{query_id"):
        arena.read_judgments(tmp_path / "hard.jsonl")
