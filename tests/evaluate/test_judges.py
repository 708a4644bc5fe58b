"""Language models as the writing reward: what is asked and how scores follow, bad input, GRPO of the smoke recipe with a judge
over HTTP, killed and resumed, with the server away for a while, and in two processes."""

import asyncio
import json
import pickle
import re
import socket
import subprocess
import sys
import threading
from collections import Counter
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import fault_server
import numpy as np
import pytest
import smoke_runs
from hypothesis import given
from hypothesis import strategies as st
from killing import at_step, killed_then_finished
from polling import until
from trl.trainer.utils import is_async_callable

from lwzlib.base.awaited import scores_of
from lwzlib.base.recipe import RecipeError, load_recipe
from lwzlib.base.rows import DataError, read_rows, write_rows
from lwzlib.cluster import readiness
from lwzlib.endpoints.llm import LLMError, configure
from lwzlib.evaluate.judge_files import kit_criteria, read_prompts, read_references
from lwzlib.evaluate.judges import PairwiseJudge, judge_of, ring
from lwzlib.exhibits import run_tables
from lwzlib.method.advantage import fuse
from lwzlib.method.prompts import wrap
from lwzlib.method.queries import load_queries
from lwzlib.method.rewards import RewardError
from lwzlib.pipeline.stages import needs, run_stage, stage_run

EN, ZH = "Write about rain.", "写一写雨。"
NOBODY = configure(base_url="http://127.0.0.1:9/v1", model="fault")
JUDGES = {"rubric": "kit:rubric", "pairwise": "kit:pairwise"}


def recipe(judge, url, *overrides):
    return load_recipe("smoke", {
        "reward.writing.judge": judge, "reward.writing.model": "fault", "reward.writing.url": url,
        "reward.writing.patience_s": 60, "reward.writing.prompts": JUDGES[judge], "cold_start.queries": 0,
        "pretrain.cot_token_fraction": 0.0}, *overrides)


def completion(answer):
    return wrap("A plan.", answer, "think")


def scores(judge, answers, queries=None, **more):
    asked = {"completions": list(map(completion, answers)), "style": ["think"] * len(answers)}
    return scores_of(judge, **asked, query=queries or [EN] * len(answers), **more)


@pytest.fixture
def made(llm_server, tmp_path):
    """Judges at the server that says what a test scripts."""
    def make(judge, *overrides):
        asking = {"reward.writing.requests": {"reasks": 0, "concurrency": 2}}
        return judge_of(recipe(judge, llm_server.url, asking, *overrides), tmp_path)
    return make


@pytest.fixture(scope="module")
def judging(tmp_path_factory):
    """(address, its log) of a judge whose scores follow from what it is asked."""
    folder = tmp_path_factory.mktemp("judge")
    with fault_server.running(folder, 0) as url:
        yield url, folder / "log.jsonl"


def score(number):
    return [{"text": json.dumps({"score": number, "reason": "so"})}]


def winner(name):
    return [{"text": json.dumps({"winner": name})}]


def test_a_rubric_is_asked_criterion_by_criterion_in_the_language_of_the_query(made, llm_server):
    names = [criterion.name for criterion in kit_criteria()["en"]]
    llm_server.script({name: score(number) for number, name in enumerate(names, 2)} | {"": score(9)})
    logged = []
    answers = ["It rained.", "", "雨下了一夜。"]
    found = scores(made("rubric"), answers, [EN, EN, ZH], log_metric=lambda *metric: logged.append(metric))
    assert found == [np.mean(range(2, 2 + len(names))), 1.0, 9.0] and logged == [("not_judged", 0.0)]
    asked = [request["asked"] for request in llm_server.requests]
    assert len(asked) == 2 * len(names), "an empty answer is not asked about"
    assert sum("评论" in text or "打分" in text for text in asked) == len(names)
    assert all("A plan." not in text and "<answer>" not in text for text in asked), "the answer alone is judged"


def test_nothing_is_paid_for_twice_and_the_budget_holds_over_steps(made, llm_server):
    llm_server.script({"": score(5)})
    count = len(kit_criteria()["en"])
    assert scores(made("rubric"), ["It rained.", "It rained."]) == [5.0, 5.0]
    assert scores(pickle.loads(pickle.dumps(made("rubric"))), ["It rained."]) == [5.0]
    assert len(llm_server.requests) == count
    budgeted = made("rubric", {"reward.writing.requests": {"budget_requests": count + 1}})
    scores(budgeted, ["It snowed."])
    with pytest.raises(LLMError, match=f"the budget of {count + 1} requests is spent"):
        scores(budgeted, ["It hailed."])


def test_a_judgment_that_cannot_be_had_is_none_and_counted(made, llm_server, capfd):
    name = kit_criteria()["en"][1].name
    llm_server.script({f"{name}:": [{"text": '{"score": 11, "reason": "so"}'}], "": score(5)})
    logged = []
    assert scores(made("rubric"), ["It rained.", ""], log_metric=lambda *metric: logged.append(metric)) == [None, 1.0]
    assert logged == [("not_judged", 0.5)]
    assert "1 of 5 judgments of fault are missing; the first: 1 answers, none valid" in capfd.readouterr().out
    assert np.isfinite(fuse(np.array([[[None, 1.0], [4.0, 0.0]]], dtype=float), [1, 1])).all()


def test_scores_that_are_all_the_same_are_said_loudly(made, llm_server, capfd):
    llm_server.script({"It rained": score(6), "": score(5)})
    scores(made("rubric"), ["It snowed.", "It hailed."])
    assert "ALL THE SAME: fault gave each of 2 answers 5" in capfd.readouterr().out
    scores(made("rubric"), ["It snowed.", "It rained."])
    assert "ALL THE SAME" not in capfd.readouterr().out


def test_pairs_are_judged_in_both_orders_so_a_judge_who_likes_the_first_decides_nothing(made, llm_server):
    llm_server.script({"": winner("A")})
    assert scores(made("pairwise"), ["one", "two", "three", "four"]) == [0.5] * 4
    assert len(llm_server.requests) == 12, "6 pairs, 2 orders"


def test_the_better_text_wins_whatever_its_place_an_empty_one_loses_and_equal_ones_tie(made, llm_server):
    llm_server.script({"<A>\ngood": winner("A"), "<B>\ngood": winner("B"), "": winner("tie")})
    found = scores(made("pairwise"), ["good", "bad", "bad", ""])
    assert found == pytest.approx([1.0, (0 + 0.5 + 1) / 3, (0 + 0.5 + 1) / 3, 0.0])
    assert len(llm_server.requests) == 2, "of the equal texts, the same question is sent once"
    assert scores(made("pairwise"), ["good", "bad", "good"], [EN, ZH, ZH]) == [None, 0.0, 1.0]


def test_a_pair_counts_if_both_orders_were_judged(made, llm_server):
    llm_server.script({"<A>\none": winner("A"), "": [{"text": "The second."}]})
    assert scores(made("pairwise", "reward.writing.opponents=1"), ["one", "two"]) == [None, None]


def test_an_id_of_two_queries_is_refused(tmp_path):
    two = [query.model_copy(update={"id": "1"}) for query in load_queries("kit:train_short")[:2]]
    write_rows(tmp_path / "references.jsonl", [{"id": "1", "answer": "Rain."}])
    with pytest.raises(DataError, match="'1' is the id of two queries"):
        read_references(str(tmp_path / "references.jsonl"), two)


def test_references_stand_in_for_a_group(made, llm_server, tmp_path):
    rows = [{"id": query.id, "answer": f"The reference of {query.id}."}
            for source in ("kit:train_short", "kit:heldout_short") for query in load_queries(source)]
    write_rows(tmp_path / "references.jsonl", rows)
    judge = made("pairwise", {"reward.writing.references": str(tmp_path / "references.jsonl"), "reward.writing.opponents": 99})
    query = load_queries("kit:heldout_short")[0]
    llm_server.script({"<A>\ngood": winner("A"), "<B>\ngood": winner("B"), "<A>\nThe reference": winner("A"), "": winner("B")})
    texts = ["good", "bad", "", f"The reference of {query.id}."]
    assert scores(judge, texts, [query.query] * 4) == [1.0, 0.0, 0.0, 0.5] and len(llm_server.requests) == 4


@given(st.integers(1, 40), st.integers(1, 45))
def test_in_the_ring_each_meets_as_many_others_and_no_pair_comes_twice(size, opponents):
    pairs = ring(size, opponents)
    met = Counter(member for pair in pairs for member in pair)
    expected = min(opponents, size - 1)
    assert {met[member] for member in range(size)} == {expected + (expected % 2 and size % 2)}
    assert len(set(map(frozenset, pairs))) == len(pairs) and all(i != j for i, j in pairs)


@given(st.lists(st.sampled_from("abcd"), min_size=2, max_size=7), st.integers(1, 6), st.data())
def test_what_one_wins_another_loses(answers, opponents, data):
    """The wins of a group are half of its meetings, whatever the judge says; and with each verdict turned round, losses."""
    texts = [(EN, answer) for answer in answers]
    judge = PairwiseJudge(NOBODY, read_prompts("kit:pairwise", "pairwise"), {}, "", Path(), opponents)
    replies = {key: SimpleNamespace(winner=data.draw(st.sampled_from(["A", "B", "tie"]))) for key in judge.questions(texts)}
    found = judge.scores(texts, replies)
    met = Counter(member for pair in judge.pairs(texts) for member in pair)
    assert all(0 <= one <= 1 for one in found)
    assert sum(one * met[i] for i, one in enumerate(found)) == pytest.approx(len(judge.pairs(texts)))
    turned = {key: SimpleNamespace(winner={"A": "B", "B": "A", "tie": "tie"}[reply.winner]) for key, reply in replies.items()}
    np.testing.assert_allclose(judge.scores(texts, turned), 1 - np.array(found))


def test_trl_awaits_the_judge_and_a_notebook_does_not(made, llm_server):
    llm_server.script({"": score(4)})
    judge = made("rubric")
    assert is_async_callable(judge) and judge.__name__ == "writing"

    async def in_a_loop():
        return scores(judge, ["It rained."])

    assert asyncio.run(in_a_loop()) == [4.0]


@pytest.mark.parametrize(("judge", "overrides", "error", "said"), [
    ("rubric", {"reward.writing.requests": {"concurency": 3}}, RewardError, r"reward\.writing .*concurency = 3"),
    ("rubric", {"reward.writing.requests": {"model": "x"}}, RewardError, r"reward\.writing\.requests holds model"),
    ("rubric", {"reward.writing.url": "localhost"}, RewardError, r"base_url = 'localhost'"),
    ("rubric", {"reward.writing.prompts": "kit:pairwise"}, DataError, r"kit:pairwise, en lacks \{query\}, \{response\}, "),
    ("pairwise", {"reward.writing.prompts": "kit:rubric"}, DataError, r"lacks \{request\}.*of the kit take kit:pairwise"),
    ("rubric", {"reward.writing.prompts": "/no/such.yaml"}, DataError, r"no file /no/such\.yaml.*kit:critic"),
    ("rubric", {"reward.writing.criteria": "/no/such.jsonl"}, DataError, "no file /no/such.jsonl"),
    ("pairwise", {"reward.writing.opponents": 4}, RecipeError, r"opponents = 4 must be below grpo\.group_size = 4"),
    ("pairwise", {"cot.batch_completions": 5, "pretrain.cot_token_fraction": 0.1}, RecipeError, r"cot\.batch_completions = 5")])
def test_what_cannot_be_asked_is_refused_by_name(tmp_path, judge, overrides, error, said):
    with pytest.raises(error, match=said):
        judge_of(recipe(judge, "http://127.0.0.1:9/v1", overrides), tmp_path)


BANDS = {"criteria_description": "d", "1-2": "a", "3-4": "b", "5-6": "c", "7-8": "d", "9-10": "e"}


@pytest.mark.parametrize(("rows", "said"), [
    ([{"query": EN, "checklist": []}], r"line 1: checklist = \[\]"),
    ([{"query": EN, "criteria": [BANDS | {"name": "one"}] * 2}], "line 1.*two criteria have the same name"),
    ([{"checklist": [BANDS | {"name": "one"}]}], "line 1.*by `query` or by `id`"),
    ([{"query": EN, "checklist": [BANDS | {"name": "one"}]}] * 2, "line 2: there is a row before for the query"),
    ([{"query": EN, "checklist": [BANDS | {"name": "one"}]}], "has nothing for the query 'In one short paragraph")])
def test_a_query_without_criteria_is_refused_before_anything_is_trained(judging, tmp_path, rows, said):
    write_rows(tmp_path / "criteria.jsonl", rows)
    r = recipe("rubric", judging[0], {"reward.writing.criteria": str(tmp_path / "criteria.jsonl")})
    with pytest.raises(DataError, match=said):
        run_stage("grpo", r, tmp_path / "run", 0, "base-think")
    assert read_rows(tmp_path / "run" / "base-think" / "grpo" / "metrics.jsonl") == []
    assert re.search(said, readiness.CHECKS["judge"](r, readiness.here()))


def test_criteria_and_prompts_of_a_users_own(made, llm_server, tmp_path):
    """The form of WritingBench's file, and a prompt with a system message."""
    rows = [{"index": 1, "query": EN, "criteria": [BANDS | {"name": "Wetness"}]}]
    write_rows(tmp_path / "criteria.jsonl", rows)
    (tmp_path / "prompts.yaml").write_text("en: {system: You judge., user: '{query}|{response}|{criterion}'}")
    judge = made("rubric", {"reward.writing.criteria": str(tmp_path / "criteria.jsonl"),
                            "reward.writing.prompts": str(tmp_path / "prompts.yaml")})
    llm_server.script({"": score(8)})
    assert scores(judge, ["Rain {query}."]) == [8.0]
    (request,) = llm_server.requests
    assert [message["role"] for message in request["body"]["messages"]] == ["system", "user"]
    assert request["asked"].startswith(f"You judge.\n\n{EN}|Rain {{query}}.|Wetness: d\n1-2: a")
    with pytest.raises(DataError, match=f"has nothing for the query '{ZH}'"):
        scores(judge, ["雨。"], [ZH])
    with pytest.raises(DataError, match="no prompt in zh"):
        made("rubric", {"reward.writing.prompts": str(tmp_path / "prompts.yaml")}).check_queries([ZH])


def test_an_address_that_does_not_answer_or_lacks_the_model_is_refused_at_the_start(judging, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    for url, model, said in ((nobody, "fault", r"url: http://127\.0\.0\.1:\d+/v1: no reply within patience_s = 1; last: Conn"),
                             (judging[0], "other", r"url: .* has no model 'other'; it has fault")):
        r = recipe("rubric", url, {"reward.writing.model": model, "reward.writing.patience_s": 1})
        with pytest.raises(LLMError, match=said):
            run_stage("grpo", r, tmp_path / model, 0, "base-think")
        assert re.search(said, readiness.CHECKS["judge"](r, readiness.here()))
    assert readiness.CHECKS["judge"](recipe("rubric", judging[0]), readiness.here()) == ""
    assert readiness.CHECKS["judge"](load_recipe("smoke"), readiness.here()) is None


def test_a_server_without_a_list_of_models_is_taken_at_its_word(tmp_path):
    files = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), files) as server:  # 404 for /v1/models
        threading.Thread(target=server.serve_forever, daemon=True).start()
        judge_of(recipe("rubric", f"http://127.0.0.1:{server.server_port}/v1"), tmp_path).check([EN])
        server.shutdown()


LARGE = ["grpo.group_size=8", "grpo.micro_batch_completions=8", "grpo.kept_completions_per_step=8",
         "grpo.sampling.max_new_tokens=120"]


@pytest.fixture(scope="module")
def whole(judging, tmp_path_factory):
    """{judge: (the Run, requests that it made)} of runs that nobody disturbed."""
    runs, before = {}, 0
    for judge in JUDGES:
        r, root = recipe(judge, judging[0], LARGE), tmp_path_factory.mktemp(judge)
        run_stage("grpo", r, root, 0, "base-think")
        after = len(read_rows(judging[1]))
        runs[judge], before = (stage_run("grpo", r, root, 0, "base-think"), after - before), after
    return runs


@pytest.mark.parametrize("judge", JUDGES)
def test_grpo_trains_on_what_a_judge_says_over_http(whole, judge):
    run, requests = whole[judge]
    assert [row["step"] for row in run.rows()] == [1, 2, 3, 4] and requests >= 4, "one a step"
    completions = run.rows("completions")
    for row in run.rows():
        own = [one["writing"] for one in completions if one["step"] == row["step"]]
        assert row["writing"] == pytest.approx(np.mean(own), abs=1e-5) and row["not_judged"] == 0
    assert np.std([one["writing"] for one in completions]) > 0.05
    low, high = {"rubric": (1, 10), "pairwise": (0, 1)}[judge]
    assert all(low <= one["writing"] <= high for one in completions)
    assert run_tables.judge_identity("", run.recipe.model_dump(), "") == f"fault, {judge}, {JUDGES[judge]}"
    assert ("writing-rm", "base-think") not in needs("grpo", run.recipe, "base-think")


def test_a_killed_run_pays_for_nothing_twice_and_ends_with_the_same_rows(whole, judging, tmp_path):
    run, requests = whole["rubric"]
    before = len(read_rows(judging[1]))
    killed = killed_then_finished("grpo", run.recipe, tmp_path, [at_step(3)], "base-think")
    assert smoke_runs.comparable(killed.rows()) == smoke_runs.comparable(run.rows())
    assert killed.rows("completions") == run.rows("completions")
    # What a kill finds in flight is asked again: at most `concurrency` requests.
    assert requests <= len(read_rows(judging[1])) - before <= requests + 8


def test_a_judge_that_is_away_for_a_while_loses_nothing(whole, tmp_path):
    run, _ = whole["pairwise"]
    log = tmp_path / "log.txt"
    with fault_server.running(tmp_path / "server", 0) as url, log.open("w") as file:
        r = recipe("pairwise", url, LARGE)
        training = subprocess.Popen([sys.executable, "-u", "-c", STAGE, r.model_dump_json(), tmp_path / "run"], stdout=file)
        waited = stage_run("grpo", r, tmp_path / "run", 0, "base-think")
        until(lambda: waited.status.get("step", 0) >= 1, "step 1", 200)
    until(lambda: "waiting: Connection error" in log.read_text() or training.poll() is not None, "a request in vain", 200)
    assert training.poll() is None, log.read_text()
    with fault_server.running(tmp_path / "server", 0, int(re.search(r":(\d+)/", url)[1])):
        assert training.wait(200) == 0, log.read_text()
    assert smoke_runs.comparable(waited.rows()) == smoke_runs.comparable(run.rows())


STAGE = """
import sys
from lwzlib.base.recipe import Recipe
from lwzlib.pipeline.stages import run_stage
run_stage("grpo", Recipe.model_validate_json(sys.argv[1]), sys.argv[2], 0, "base-think")
"""


def test_two_processes_ask_once_and_learn_what_one_learns(judging, rowwise, monkeypatch, tmp_path):
    """A group lies in both processes; rank 0 asks for it."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    common, two = [*LARGE, "grpo.steps=2"], ["launch=torchrun", "distributed.processes=2", "grpo.micro_batch_completions=4"]
    r = {count: recipe("pairwise", judging[0], common, more) for count, more in ((1, ["launch=subprocess"]), (2, two))}
    runs = {count: smoke_runs.launch("grpo", of, tmp_path / str(count), 0, "base-think") for count, of in r.items()}
    first, second = (run.rows("completions") for run in runs.values())
    assert [row["writing"] for row in first] == pytest.approx([row["writing"] for row in second])
    assert np.std([row["writing"] for row in first]) > 0.05
    smoke_runs.same(runs[2], runs[1])
