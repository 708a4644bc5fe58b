"""Judges of writing on held-out pairs: a public reward model in the place of the trained one, and one table for all."""

import json
import shutil

import fault_server
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
from typer.testing import CliRunner

from lwzlib.base.kit import TINY, ModelError
from lwzlib.base.models import load_model, resolve
from lwzlib.base.recipe import load_recipe
from lwzlib.base.rows import RunError, read_json, read_rows
from lwzlib.cli.main import app
from lwzlib.cluster.readiness import check_stage
from lwzlib.evaluate.judge_quality import public_info, qualities
from lwzlib.exhibits.run_tables import judge_identity
from lwzlib.method.rewards import RewardError, build_rewards
from lwzlib.method.train_writing_rm import quality
from lwzlib.method.writing_rm import Scorer
from lwzlib.pipeline.stages import needs, places, run_stage


@pytest.fixture(scope="module")
def public(smoke, tmp_path_factory):
    """A folder as a public reward model has it: one label, a chat template, no writing_rm.json."""
    folder = tmp_path_factory.mktemp("public-rm")
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model, tokenizer = load_model(TINY, "float32", "sdpa", scorer=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def judged(public, smoke_rm, tmp_path_factory):
    """(recipe with the public judge, run folder in which an arm was trained by it)"""
    root = tmp_path_factory.mktemp("run")
    shutil.copytree(smoke_rm / "pairs", root / "pairs")
    recipe = load_recipe("smoke", {"reward.writing.model": public, "cold_start.queries": 0, "grpo.steps": 2})
    run_stage("grpo", recipe, root, 0, "base-nothink")
    return recipe, root


def test_a_public_reward_model_is_measured_and_trained_on_and_none_is_trained(judged, public):
    recipe, root = judged
    assert {path.name for path in root.iterdir()} == {"pairs", "judge", "base-nothink"}
    rows, scored = read_rows(root / "base-nothink" / "grpo" / "completions.jsonl"), read_rows(root / "judge" / "scores.jsonl")
    assert read_json(root / "judge" / "quality.json") == quality(scored)
    floor = min(min(row["chosen"], row["rejected"]) for row in scored)
    assert [row["writing"] for row in rows] == [pytest.approx(floor)] * 8, "a random model never writes an answer"
    info = read_json(root / "judge" / "writing_rm.json")
    assert info == public_info(public) | {"floor": floor} and info["frame"] == "messages"
    assert build_rewards(recipe, str(root / "judge"))["writing"](["<answer></answer>"], ["direct"], ["Write."]) == [floor]


def test_it_reads_a_query_and_an_answer_in_its_own_chat_template(judged, public):
    """Against transformers' own classifier, fed with the template's text."""
    recipe, root = judged
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(public), AutoTokenizer.from_pretrained(public)
    texts = [("Write about rain.", "The rain fell."), ("Write about bread.", "Bread  rises\n\nslowly."),
             ("写雨。", "雨下了一夜。")]
    reward = build_rewards(recipe, str(root / "judge"))["writing"]
    ours = reward([f"<answer>{answer}</answer>" for _, answer in texts], ["direct"] * 3, [query for query, _ in texts])
    for (query, answer), score in zip(texts, ours, strict=True):
        messages = [{"role": "user", "content": query}, {"role": "assistant", "content": answer}]
        ids = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)
        with torch.no_grad():
            np.testing.assert_allclose(score, model(**ids).logits.item(), atol=1e-5)


def test_a_message_that_ends_with_the_padding_is_read_to_its_end(public, tmp_path):
    """Llama's reward models have no padding of their own, and their messages end with the end of a text."""
    folder = _changed(public, tmp_path / "unpadded")
    config, own = tmp_path / "unpadded" / "tokenizer_config.json", AutoTokenizer.from_pretrained(public)
    config.write_text(json.dumps({name: value for name, value in read_json(config).items() if name != "pad_token"}))
    (tmp_path / "unpadded" / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}")
    (tmp_path / "unpadded" / "writing_rm.json").write_text(json.dumps(public_info(folder) | {"floor": 0.0}))
    texts = [("Rain.", "It fell."), ("Bread, which is longer.", "It rose slowly, as bread does.")]
    scores = Scorer(folder, "float32", "sdpa")(texts)
    model = AutoModelForSequenceClassification.from_pretrained(public)
    for (query, answer), score in zip(texts, scores, strict=True):
        ids = own(f"{query}<|im_end|>{answer}<|im_end|>", add_special_tokens=False, return_tensors="pt").input_ids
        with torch.no_grad():
            whole = model.score(model.model(ids).last_hidden_state[0, -1]).item()
        np.testing.assert_allclose(score, whole, atol=1e-5)


def test_its_identity_stands_in_the_rows_that_it_scored(judged, public):
    recipe, root = judged
    assert judge_identity(root, recipe.model_dump(), "base-nothink") == public


def test_a_judge_that_was_not_measured_is_told_from_one_that_is_missing(public):
    with pytest.raises(RewardError, match=r"was not measured yet.*lwz stage judge"):
        build_rewards(load_recipe("smoke", {"reward.writing.model": public}))


def _changed(public, folder, **config):
    shutil.copytree(public, folder)
    (folder / "config.json").write_text(json.dumps(read_json(folder / "config.json") | config))
    return str(folder)


def test_what_is_no_reward_model_is_refused_before_anything_is_trained(public, tmp_path):
    two = _changed(public, tmp_path / "two", id2label={"0": "bad", "1": "good"}, label2id={"bad": 0, "good": 1})
    assert AutoConfig.from_pretrained(two).num_labels == 2
    mute = _changed(public, tmp_path / "mute")
    (tmp_path / "mute" / "chat_template.jinja").unlink()
    for name, message in ((two, "with 2 labels; a reward model is"), (resolve(TINY), r"LlamaForCausalLM with 2 labels"),
                          (mute, "no chat template"), ("/no/such/folder", "does not exist")):
        with pytest.raises(ModelError, match=message):
            public_info(name)
        with pytest.raises(RunError, match=message):
            check_stage("cold-start", load_recipe("smoke", {"reward.writing.model": name}))


def test_only_a_public_judge_needs_to_be_measured(public, smoke):
    recipe = load_recipe("smoke", {"reward.writing.model": public})
    assert ("", "judge") in places(recipe) and ("", "writing-rm") not in places(recipe)
    assert ("", "judge") not in places(smoke)
    assert ("judge", "base-think") not in needs("grpo", load_recipe("smoke", {"reward.writing.model": public,
                                                                              "reward.weights.writing": 0.0}), "base-think")


def test_judges_stand_beside_each_other_in_one_table(smoke_rm, public, tmp_path):
    root = tmp_path / "run"
    shutil.copytree(smoke_rm, root)
    done = CliRunner().invoke(app, ["judge-quality", "smoke", "--run-dir", str(root), "-s", f"reward.writing.model={public}"])
    assert done.exit_code == 0, done.output
    trained, other = qualities(root).values()
    assert trained == read_json(root / "writing-rm" / "quality.json") != other
    for kind, (share, *_, pairs) in other["accuracy"].items():
        assert f"{share:.2f} [" in done.output and kind[:6] in done.output and pairs == trained["accuracy"][kind][3]
    again = CliRunner().invoke(app, ["judge-quality", "smoke", "--run-dir", str(root)])
    assert again.exit_code == 0 and len(qualities(root)) == 2, again.output


@pytest.mark.parametrize("judge", ["rubric", "pairwise"])
def test_a_language_model_is_measured_on_the_same_pairs(smoke_rm, judge, tmp_path):
    root = tmp_path / "run"
    shutil.copytree(smoke_rm, root)
    with fault_server.running(tmp_path, 0) as url:
        changes = {"judge": judge, "model": "fault", "url": url, "prompts": f"kit:{judge}"}
        sets = [word for name, value in changes.items() for word in ("-s", f"reward.writing.{name}={value}")]
        done = CliRunner().invoke(app, ["judge-quality", "smoke", "--run-dir", str(root), *sets])
    assert done.exit_code == 0, done.output
    trained, other = qualities(root).values()
    assert set(other["accuracy"]) == set(trained["accuracy"]) and other["accuracy"]["all"][3] == trained["accuracy"]["all"][3]
    (folder,) = (root / "judges").iterdir()
    rows = read_rows(folder / "scores.jsonl")
    if judge == "pairwise":  # each pair was compared with itself alone
        assert all(row["chosen"] + row["rejected"] == 1 and "markdown" not in row for row in rows)
    else:
        assert all(1 <= row[side] <= 10 for row in rows for side in ("chosen", "rejected"))


def test_a_recipe_that_pays_for_no_writing_has_no_judge(tmp_path):
    done = CliRunner().invoke(app, ["judge-quality", "smoke", "--run-dir", str(tmp_path), "-s", "reward.weights.writing=0.0"])
    assert "reward.weights.writing" in str(done.exception)
