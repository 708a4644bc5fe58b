"""The writing reward: empty answers, pickling, a real scoring server, GRPO with three rewards, arms with other weights."""

import json
import pickle
import re
import shutil
import subprocess
import sys
import threading
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from fake_rm_server import serving
from typer.testing import CliRunner

from lwzlib.base import recipe, scoring
from lwzlib.base.recipe import RecipeError, load_recipe
from lwzlib.base.rm_client import ScoringError
from lwzlib.base.rows import RunError, write_rows
from lwzlib.base.scoring import score_ids, scores_together
from lwzlib.cli.main import app
from lwzlib.lab import hacks
from lwzlib.method import grpo, rewards
from lwzlib.method.advantage import fuse
from lwzlib.method.prompts import wrap
from lwzlib.method.queries import load_queries
from lwzlib.method.rewards import RewardError, WritingReward, build_rewards
from lwzlib.method.text import parse
from lwzlib.method.writing_rm import Scorer, cut_to_fit
from lwzlib.pipeline.stages import run_stage, stage_run

QUERIES = ["Write about rain.", "Write about bread.", "写一写雨。"]
COMPLETIONS = [wrap("A plan.", "The rain fell on the old town.", "think"), "<answer>Bread rises slowly",
               wrap("", "雨下了一夜。", "think")]
ASKED = {"completions": COMPLETIONS, "style": ["think"] * 3, "query": QUERIES}


@pytest.fixture(scope="module")
def folder(smoke_rm):
    return smoke_rm / "writing-rm" / "model"


@pytest.fixture(scope="module")
def reward(folder):
    return WritingReward(str(folder), "float32")


@pytest.fixture(scope="module")
def server(folder):
    """The model behind vLLM's protocol."""
    scorer = Scorer(folder, "float32", "sdpa")
    lock = threading.Lock()

    def score(ids):
        with lock:
            return score_ids(scorer.model, [ids], 0)[0]

    with serving(model=scorer.info["identity"], score=score) as started:
        yield started


def _floor(folder):
    return json.loads((folder / "writing_rm.json").read_text())["floor"]


def test_the_score_is_the_models_for_query_and_answer_without_plan_and_tags(reward, folder):
    answers = ["The rain fell on the old town.", "Bread rises slowly", "雨下了一夜。"]
    expected = Scorer(folder, "float32", "sdpa")(list(zip(QUERIES, answers, strict=True)))
    np.testing.assert_allclose(reward(**ASKED), expected, atol=1e-5)
    assert len(set(np.round(expected, 4))) == 3
    other_plan = [wrap("Quite another plan.", answer, "think") for answer in answers]
    np.testing.assert_allclose(reward(other_plan, style=["think"] * 3, query=QUERIES), expected, atol=1e-5)


def test_the_score_depends_on_the_query(reward):
    scores = reward(COMPLETIONS[:1] * 3, style=["think"] * 3, query=QUERIES)
    assert len(set(np.round(scores, 6))) == 3


def test_conversational_completions_score_like_texts(reward):
    turns = [[{"role": "assistant", "content": text}] for text in COMPLETIONS]
    assert reward(**ASKED | {"completions": turns}) == reward(**ASKED)


def test_pickling_takes_the_name_of_the_model_and_gives_the_same_scores(reward):
    before = reward(**ASKED)
    packed = pickle.dumps(reward)
    assert len(packed) < 1000, "weights must not travel"
    rewards._scorer.cache_clear()
    again = pickle.loads(packed)
    assert (again, again.__name__) == (reward, "writing")
    assert again(**ASKED) == before


@pytest.mark.parametrize("style", ["think", "direct"])
def test_an_empty_answer_gets_the_floor_and_does_not_reach_the_model(reward, folder, monkeypatch, style):
    came = []
    monkeypatch.setattr(rewards, "_scorer", lambda *_: lambda texts: came.append(texts) or [7.0 + i for i in range(len(texts))])
    empty = ["", wrap("Plan.", " \n ", style), "<think>only a plan", "<answer>"]
    texts = [*empty[:2], "<answer>one</answer>", *empty[2:], "<answer>two"]
    floor = _floor(folder)
    assert reward(texts, style=[style] * 6, query=list("abcdef")) == [floor, floor, 7.0, floor, floor, 8.0]
    assert came == [[("c", "one"), ("f", "two")]]
    assert reward(empty, style=[style] * 4, query=list("abcd")) == [floor] * 4
    assert not any(came[1:]), "nothing was left to score"
    assert reward([], style=[], query=[]) == []


def test_a_text_over_the_limit_is_named_with_the_quantity(reward):
    with pytest.raises(RunError, match=r"text 1 has \d+ tokens .*writing_rm\.max_tokens"):
        reward([COMPLETIONS[0], "<answer>" + "word " * 1000], style=["think"] * 2, query=QUERIES[:2])


def test_in_training_a_text_over_the_limit_is_cut_and_counted(reward, folder):
    """Its score is that of the longest beginning that the model reads, whatever came after."""
    shares, long = [], "word " * 1000
    asked = {"style": ["think"] * 2, "query": QUERIES[:2], "log_metric": lambda *logged: shares.append(logged)}
    first, cut = reward([COMPLETIONS[0], f"<answer>{long}</answer>"], **asked)
    assert first == pytest.approx(reward(COMPLETIONS[:1], style=["think"], query=QUERIES[:1])[0], abs=1e-5)
    assert shares == [("cut_for_writing", 0.5)]
    (_, fitting), = cut_to_fit(str(folder), [(QUERIES[1], long)])
    assert f"{long} ".startswith(fitting) and 3000 < len(fitting) < len(long)
    assert cut == pytest.approx(reward.of_answers([(QUERIES[1], fitting)])[0], abs=1e-5)
    with pytest.raises(RunError, match=r"has 409[78] tokens"):
        reward.of_answers([(QUERIES[1], long[: len(fitting) + 1])])


def test_a_query_that_leaves_no_room_for_an_answer_is_refused_at_the_start(reward, smoke, smoke_rm, tmp_path):
    reward.check(QUERIES)
    rows = [{"id": str(i), "query": query, "word_range": [50, 70]} for i, query in enumerate([*QUERIES, "Why? " * 900])]
    write_rows(tmp_path / "queries.jsonl", rows)
    made = load_recipe("smoke", {"data.train": str(tmp_path / "queries.jsonl")})
    run = stage_run("grpo", made, tmp_path / "run", 0, "base-think")
    with pytest.raises(RewardError, match=r"the query 'Why\? .*' is longer than the Writing RM reads: .*max_tokens = 4096"):
        grpo.trainer(made, run, "base-think", made.model.name, str(smoke_rm / "writing-rm" / "model"))


def test_served_scores_equal_those_in_process(reward, folder, server):
    remote = WritingReward(str(folder), url=server.url, patience_s=30)
    texts = ["", *COMPLETIONS, *(f"<answer>Rain {'again ' * n}fell." for n in range(20))]
    asked = {"completions": texts, "style": ["think"] * 24, "query": QUERIES * 8}
    found = remote(**asked)
    np.testing.assert_allclose(found, reward(**asked), atol=2e-5)
    assert found[0] == _floor(folder) and np.std(found) > 1e-3
    assert pickle.loads(pickle.dumps(remote))(**asked) == pytest.approx(found, abs=1e-5)


def test_equal_texts_are_sent_once(folder, server):
    remote, before = WritingReward(str(folder), url=server.url, patience_s=30), len(server.requests)
    scores = remote(COMPLETIONS[:1] * 5 + ["<answer>\ud800"] * 2, style=["think"] * 7, query=QUERIES[:1] * 7)
    assert len(set(scores)) == 2 and scores[0] == scores[4] and scores[5] == scores[6]
    assert [len(request["input"]) for request in server.requests[before:]] == [2]
    assert remote(["<answer>?"], ["think"], QUERIES[:1]) == scores[5:6], "what no tokenizer takes is a question mark"


def test_a_text_over_the_limit_is_refused_before_anything_is_sent(folder, server):
    remote, before = WritingReward(str(folder), url=server.url, patience_s=30), len(server.requests)
    with pytest.raises(RunError, match=r"text 1 has \d+ tokens .* at most 4096 \(writing_rm\.max_tokens\)"):
        remote([COMPLETIONS[0], "<answer>" + "word " * 1000], style=["think"] * 2, query=QUERIES[:2])
    assert len(server.requests) == before and len(remote(**ASKED)) == 3


def test_a_server_of_another_model_is_refused(folder, server, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    info = json.loads((other / "writing_rm.json").read_text())
    (other / "writing_rm.json").write_text(json.dumps(info | {"identity": "another"}))
    with pytest.raises(ScoringError, match=r"404 .*`another` does not exist"):
        WritingReward(str(other), url=server.url, patience_s=30)(**ASKED)


def test_importing_the_rewards_loads_no_http_client_and_no_torch():
    code = "import sys, lwzlib.method.rewards; sys.exit(any(m in sys.modules for m in ('httpx', 'torch', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_build_without_a_writing_rm_says_what_to_do(smoke, tmp_path):
    for asked in ("", str(tmp_path)):
        with pytest.raises(ValueError, match=r"reward\.weights\.writing.*lwz stage writing-rm.*reward\.writing\.model"):
            build_rewards(smoke, asked)
    with pytest.raises(ValueError, match=r"/no/such was not measured yet.*lwz stage judge"):
        build_rewards(load_recipe("smoke", {"reward.writing.model": "/no/such"}))
    assert "writing" not in build_rewards(load_recipe("smoke", {"reward.weights.writing": 0.0}))


def test_build_takes_the_stages_model_or_the_one_that_is_named(smoke, folder):
    expected = WritingReward(str(folder), "float32", "eager", "", 600)
    assert build_rewards(smoke, str(folder))["writing"] == expected
    assert list(build_rewards(smoke, str(folder))) == ["length", "writing", "format"]
    named = load_recipe("smoke", {"reward.writing.model": str(folder), "reward.writing.url": "http://h:1",
                                  "reward.writing.patience_s": 9})
    assert build_rewards(named)["writing"] == WritingReward(str(folder), "float32", "eager", "http://h:1", 9)


def _grpo(r, root, arm):
    folder = run_stage("grpo", r, root, 0, arm).parent
    return tuple([json.loads(line) for line in (folder / name).read_text().splitlines()]
                 for name in ("metrics.jsonl", "completions.jsonl"))


LARGE = {"grpo.steps": 2, "grpo.group_size": 12, "grpo.micro_batch_completions": 12, "grpo.kept_completions_per_step": 12,
         "grpo.sampling.max_new_tokens": 90}


@pytest.fixture(scope="module")
def arms(tmp_path_factory):
    """A recipe of long completions, in which some open an answer, with arms that change the weights."""
    path = tmp_path_factory.mktemp("recipe") / "arms.yaml"
    changes = {"all-three": "", "length-only": "reward.weights.format: 0.0, reward.weights.writing: 0.0",
               "writing-double": "reward.weights.writing: 2.0", "summed": "grpo.advantage: sum"}
    path.write_text("extends: smoke\nname: arms\narms:\n" + "".join(
        f"  {name}: {{start: base, prompt: think, change: {{{change}}}}}\n" for name, change in changes.items()))
    return load_recipe(path, LARGE)


def _check_advantages(completions, weights, mode="zscore"):
    for step in (1, 2):
        group = [row for row in completions if row["step"] == step]
        scores = np.array([[[row[name] for name in ("length", "writing", "format")] for row in group]])
        np.testing.assert_allclose([row["advantage"] for row in group], fuse(scores, weights, mode)[0], atol=2e-3)
        assert np.ptp(scores, axis=1).min(axis=0)[1] > 0, "a group without variance cannot show anything"


def test_grpo_trains_on_three_rewards(arms, smoke_rm, reward):
    metrics, completions = _grpo(arms, smoke_rm, "all-three")
    assert [row["step"] for row in metrics] == [1, 2]
    for row in metrics:
        own = [c["writing"] for c in completions if c["step"] == row["step"]]
        assert np.isfinite(row["writing"]) and row["writing"] == pytest.approx(np.mean(own), abs=1e-5)
    queries = {q.id: q.query for q in load_queries(arms.data.train)}
    again = reward([c["completion"] for c in completions], ["think"] * 24, [queries[c["id"]] for c in completions])
    np.testing.assert_allclose([c["writing"] for c in completions], again, atol=1e-4)
    answered = [bool(parse(c["completion"], "think").answer) for c in completions]
    assert 2 < sum(answered) < 24, "both kinds must be there"
    _check_advantages(completions, [1, 1, 1])


@pytest.mark.parametrize(("arm", "weights", "mode"), [("writing-double", [1, 2, 1], "zscore"), ("summed", [1, 1, 1], "sum")])
def test_an_arm_uses_what_it_changes(arms, smoke_rm, arm, weights, mode):
    _, completions = _grpo(arms, smoke_rm, arm)
    _check_advantages(completions, weights, mode)
    with pytest.raises(AssertionError):
        _check_advantages(completions, [1, 1, 1])


def test_an_arm_without_the_writing_reward_needs_no_writing_rm(arms, tmp_path):
    metrics, completions = _grpo(arms, tmp_path, "length-only")
    for row in (*metrics, *completions):
        assert "length" in row and not {"writing", "format"} & set(row)
    assert not (tmp_path / "writing-rm").exists()
    asked = recipe.yaml.safe_load((tmp_path / "length-only" / "grpo" / "recipe.yaml").read_text())
    assert asked["reward"]["weights"] == {
        "length": 1.0, "writing": 0.0, "format": 0.0, "overlong": 0.0}


def test_other_arms_keep_the_weights_of_the_recipe(arms):
    assert arms.for_arm("all-three") is arms
    assert arms.for_arm("writing-double").reward.weights.model_dump() == {
        "length": 1.0, "writing": 2.0, "format": 1.0, "overlong": 0.0}
    assert arms.reward.weights.writing == 1.0


@pytest.mark.parametrize(("change", "said"), [
    ("reward.weights.wriing: 0.0", r"'reward\.weights\.wriing'.*did you mean 'reward\.weights\.writing'"),
    ("reward.weights.writing: -1.0", r"arm bad.*reward\.weights\.writing = -1\.0"),
    ("grpo.advantage: best", r"arm bad.*grpo\.advantage")])
def test_a_change_that_cannot_be_is_refused_when_the_recipe_is_loaded(tmp_path, change, said):
    path = tmp_path / "mine.yaml"
    path.write_text(f"extends: smoke\nname: mine\narms:\n  bad: {{start: base, prompt: think, change: {{{change}}}}}\n")
    with pytest.raises(RecipeError, match=said):
        load_recipe(path)


def test_a_finished_arm_is_not_taken_for_one_with_another_change(arms, smoke_rm):
    _grpo(arms, smoke_rm, "all-three")
    other = arms.model_copy(update={"arms": {"all-three": arms.arms["writing-double"]}})
    with pytest.raises(RunError, match=r"reward\.weights\.writing was 1\.0, is 2\.0"):
        run_stage("grpo", other, smoke_rm, 0, "all-three")


def test_the_command_line_scores_a_text_with_a_writing_rm(folder, tmp_path):
    (tmp_path / "text.txt").write_text(COMPLETIONS[0])
    command = ["score", str(tmp_path / "text.txt"), "5", "9", "--recipe", "smoke", "--query", QUERIES[0]]
    said, without = (CliRunner().invoke(app, [*command, *more]).output for more in (["--writing-rm", str(folder)], []))
    expected = WritingReward(str(folder), "float32")(COMPLETIONS[:1], ["think"], QUERIES[:1])[0]
    assert float(re.search(r"writing +(-?[\d.]+)", said)[1]) == pytest.approx(expected, abs=6e-4)
    assert "format" in without and "writing" not in without


def test_the_command_line_tries_attacks_on_the_writing_reward(folder, monkeypatch):
    few = hacks.groups()[:1]
    monkeypatch.setattr(hacks, "groups", lambda: few)
    command = ["hacks", "--recipe", "smoke"]
    with_it, without = (CliRunner().invoke(app, [*command, *more]) for more in (["--writing-rm", str(folder)], []))
    for said in (with_it, without):
        assert said.exit_code == 0 and "repetition" in said.output
    assert "writing" in with_it.output and "writing" not in without.output


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_texts_of_all_processes_are_scored_in_as_many_passes_each(monkeypatch, processes):
    """Threads as processes: each has other texts, one has none, and some have the same."""
    texts = [[[1, 2], [3], [1, 2]], [], [[4, 4, 4], [3]]][:processes]
    passes, scored, barrier, shelf = Counter(), {}, threading.Barrier(processes), {}

    def gather(rank, part):
        shelf[rank] = part
        barrier.wait(10)
        whole = [each for other in range(processes) for each in shelf[other]]
        barrier.wait(10)
        return whole

    def score(model, ids, batch_tokens):
        passes[at.rank] += len(ids)
        assert batch_tokens == 0 and len(set(ids)) == len(ids), "one text a pass"
        return [float(sum(each)) for each in ids]

    def process(rank):
        at.rank = rank
        everything = scores_together(None, gather(rank, texts[rank]))
        scored[rank] = [everything[tuple(text)] for text in texts[rank]]

    at = threading.local()
    monkeypatch.setattr("accelerate.utils.gather_object", lambda part: gather(at.rank, part))
    monkeypatch.setattr("accelerate.PartialState", lambda: SimpleNamespace(num_processes=processes, process_index=at.rank))
    monkeypatch.setattr("transformers.integrations.is_deepspeed_zero3_enabled", lambda: True)
    monkeypatch.setattr(scoring, "score_ids", score)
    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert scored == {rank: [float(sum(each)) for each in own] for rank, own in enumerate(texts)}
    assert len(set(passes.values())) == 1 and len(passes) == processes
