"""Continual pretraining, distilling and fine-tuning: what they learn from, and that a kill changes nothing."""

import hashlib
import json
import math
import shutil

import pytest
import torch
from killing import at_step, killed_then_finished
from trl.trainer.utils import add_fused_lm_head

from lwzlib.base.kit import TINY
from lwzlib.base.models import load_model
from lwzlib.base.recipe import Recipe, RecipeError, load_recipe
from lwzlib.base.rows import DataError, RunError, read_rows
from lwzlib.data import packing
from lwzlib.method.distil import choose
from lwzlib.method.pretrain import perplexity
from lwzlib.method.text import TAGS
from lwzlib.pipeline.notebooks import overview
from lwzlib.pipeline.stages import arm_stages, needs, places, run_stage, stage_run

CPT, SFT = "continual-pretrain-think", "continual-pretrain-sft"


@pytest.fixture(scope="module")
def done(smoke, tmp_path_factory):
    """A run folder in which both arms that start from continual pretraining are trained, and all that they need."""
    root = tmp_path_factory.mktemp("five-arms")
    for arm in (CPT, SFT):
        run_stage("samples-after", smoke, root, 0, arm)
    return root


def weights(folder):
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def comparable(rows):
    return [{key: value for key, value in row.items() if key != "step_s"} for row in rows]


def test_the_perplexity_of_every_source_falls(done):
    rows = read_rows(done / "pretrain" / "perplexity.jsonl")
    before, after = ({row["source"]: row for row in rows if row["when"] == when} for when in ("before", "after"))
    assert set(before) == set(after) == {"kit:python-docs (en)", "kit:three-kingdoms (zh)"}
    assert all(after[source]["perplexity"] < before[source]["perplexity"] and row["tokens"] > 400
               for source, row in before.items())


def test_perplexity_is_that_of_each_text_alone(smoke):
    model, tokenizer = load_model(TINY, "float32", "eager")
    texts = ["One text here, of some length.", "另一篇。"]
    nll, count = 0.0, 0
    for text in texts:
        ids = torch.tensor([tokenizer(text).input_ids])
        with torch.no_grad():
            logits = model(ids).logits[0, :-1]
        nll += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        count += ids.shape[1] - 1
    add_fused_lm_head(model)
    assert perplexity(model, tokenizer, texts, 512, 10_000) == (count, pytest.approx(math.exp(nll / count), rel=1e-5))
    assert perplexity(model, tokenizer, [], 512, 100) == (0, None)


def test_the_arm_starts_from_the_pretrained_model(smoke, done):
    assert weights(done / "pretrain" / "model") != weights(done / "cold-start" / "model")
    assert stage_run("grpo", smoke, done, 0, CPT).finished and stage_run("sft", smoke, done, 0, SFT).finished


def test_killed_pretraining_gives_the_rows_and_weights_of_an_uninterrupted_run(smoke, tmp_path):
    r = load_recipe("smoke", "pretrain.cot_token_fraction=0.0 pretrain.tokens=24000 pretrain.checkpoint_every_steps=2")
    whole = run_stage("pretrain", r, tmp_path / "whole", 0)
    run = killed_then_finished("pretrain", r, tmp_path / "killed", map(at_step, (1, 5, 9)))
    rows = stage_run("pretrain", r, tmp_path / "whole", 0)
    assert comparable(run.rows()) == comparable(rows.rows()) and len(run.rows()) > 12
    assert run.rows("perplexity") == rows.rows("perplexity") and len(run.rows("perplexity")) == 4
    assert weights(run.folder / "model") == weights(whole)
    shutil.rmtree(run.folder / "model")  # as if killed while it was measured or saved
    run.update(state="running")
    run_stage("pretrain", r, tmp_path / "killed", 0)
    assert run.rows("perplexity") == rows.rows("perplexity") and weights(run.folder / "model") == weights(whole)


def test_killed_fine_tuning_gives_the_rows_and_weights_of_an_uninterrupted_run(smoke, done, tmp_path):
    data = tmp_path / "long.jsonl"
    data.write_text("".join(json.dumps({"messages": [{"role": "user", "content": f"Write about {n}."},
                                                     {"role": "assistant", "content": f"Here is number {n}. " * (n % 7 + 9)}]})
                            + "\n" for n in range(40)))
    r = load_recipe("smoke", {"sft.data": str(data), "sft.epochs": 3, "sft.checkpoint_every_steps": 2, "sft.max_tokens": 300})
    whole = run_stage("sft", r, tmp_path / "whole", 0, "sft")
    run = killed_then_finished("sft", r, tmp_path / "killed", map(at_step, (1, 5, 9)), "sft")
    one = stage_run("sft", r, tmp_path / "whole", 0, "sft")
    rows = one.rows()
    assert comparable(run.rows()) == comparable(rows) and len(rows) > 12 and rows[-1]["loss"] < rows[0]["loss"]
    cut = run.status["documents_cut"]
    assert cut == one.status["documents_cut"] and 0 < cut < 40 == run.status["documents"], "the longest do not fit"
    assert weights(run.folder / "model") == weights(whole)


def test_made_data_are_best_completions_and_human_passages(smoke, done):
    rows = read_rows(done / SFT / "sft" / "data.jsonl")
    human = [row for row in rows if row["source"].startswith("kit:")]
    assert len(human) == smoke.sft.human_passages
    for row in human:
        asked, answer = (turn["content"] for turn in row["messages"])
        assert "in the manner of the python docs" in asked and len(answer) > 100
    distilled = {row["query"]: row["answer"] for row in read_rows(done / "distil" / "documents.jsonl")}
    assert all(distilled[row["messages"][0]["content"]] == row["messages"][1]["content"] for row in rows if row not in human)


@pytest.mark.parametrize(("row", "said"), [
    ({"text": "no turns"}, "needs messages, two turns"),
    ({"messages": [{"role": "user", "content": "a"}]}, "needs messages, two turns"),
    ({"messages": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]}, "of user and assistant"),
    ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": " "}]}, "not empty"),
])
def test_a_row_that_is_no_answer_is_named(tmp_path, row, said):
    data = tmp_path / "bad.jsonl"
    data.write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=f"bad.jsonl, row 1: .*{said}"):
        run_stage("sft", load_recipe("smoke", {"sft.data": str(data)}), tmp_path / "run", 0, "sft")


def completion(plan, answer, **rewards):
    return {"completion": f"<think>{plan}</think>\n<answer>{answer}</answer>", "truncated": False, "length": 0.5,
            "writing": 0.5, "format": 1.0} | rewards


def test_the_best_of_each_group_is_kept_and_the_others_are_counted():
    r = load_recipe("nano", "cot.completions_per_query=3")
    groups = [
        [completion("a", "one"), completion("b", "two", writing=0.9, length=0.9), completion("c", "three")],
        [completion("a", "four", length=0.9) | {"truncated": True}, completion("b", "five"), completion("c", "six")],
        [completion("a", "seven"), completion("b", "eight") | {"completion": "<answer>eight</answer>", "length": 0.9},
         completion("c", "nine")],
    ]
    kept, left_out = choose(r, [row for group in groups for row in group])
    assert kept == [groups[0][1]] and left_out == {"truncated": 1, "form not exact": 1}


def test_documents_have_the_arms_prompt_and_a_whole_completion(smoke, done):
    rows = read_rows(done / "distil" / "documents.jsonl")
    assert 1 <= len(rows) <= smoke.cot.queries
    for row in rows:
        prompt, written = row["text"].split("<|im_start|>assistant\n")
        assert row["query"] in prompt and TAGS["think"][0] in prompt and not written.endswith(" ")


def test_no_document_to_distil_says_what_to_do(tmp_path):
    r = load_recipe("smoke", "cot.exact_only=true grpo.steps=1 reward.weights.writing=0.0")
    with pytest.raises(RunError, match=r"none of 4 completions .* set pretrain.cot_token_fraction=0"):
        run_stage("distil", r, tmp_path, 0)


def test_an_arm_that_changes_the_start_has_stages_of_its_own(tmp_path):
    arms = {"base-think": {"start": "base", "prompt": "think"},
            "wide": {"start": "continual-pretrain", "prompt": "think", "change": {"pretrain.tokens": 9999}},
            "kl": {"start": "continual-pretrain", "prompt": "think", "change": {"grpo.kl_beta": 0.001}}}
    r = Recipe.model_validate(
        load_recipe("smoke").model_dump() | {"arms": arms})
    folders = {(stage, arm): stage_run(stage, r, tmp_path, 0, arm).folder.relative_to(tmp_path)
               for stage in ("cold-start", "corpus", "pack", "pretrain", "writing-rm") for arm in arms}
    assert str(folders["pretrain", "wide"]) == "wide/pretrain" and str(folders["pack", "wide"]) == "wide/pack"
    assert str(folders["pretrain", "kl"]) == "pretrain" and str(folders["corpus", "wide"]) == "corpus"
    assert {str(folders["writing-rm", arm]) for arm in arms} == {"writing-rm"}
    assert stage_run("pretrain", r, tmp_path, 0, "wide").recipe.pretrain.tokens == 9999


def with_arms(smoke, **changes):
    """The smoke recipe with the arms `base-think` and `mine`, the latter after continual pretraining, and what each changes."""
    arms = {"base-think": {"start": "base", "prompt": "think", "change": changes.get("teacher", {})},
            "mine": {"start": "continual-pretrain", "prompt": "think", "change": changes.get("mine", {})}}
    return Recipe.model_validate(smoke.model_dump() | {"arms": arms})


def test_an_arm_with_a_share_of_distilled_documents_of_its_own_gets_them(smoke, tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "pack", lambda recipe, run, corpus, cot: cot)
    none = with_arms(smoke, mine={"pretrain.cot_token_fraction": 0.0})
    assert ("pack", "mine") in needs("pretrain", none, "mine") and ("", "distil") not in places(none)
    assert run_stage("pack", none, tmp_path / "none", 0, "mine") is None
    assert not (tmp_path / "none" / "base-think").exists(), "no teacher is trained for nothing"
    some = with_arms(smoke.model_copy(update={"pretrain": smoke.pretrain.model_copy(update={"cot_token_fraction": 0.0})}),
                     mine={"pretrain.cot_token_fraction": 0.5})
    assert ("", "distil") in places(some)
    assert run_stage("pack", some, tmp_path / "some", 0, "mine").name == "distil"


def test_what_the_teacher_changes_makes_other_documents(smoke, tmp_path):
    def fingerprint(stage, r):
        return stage_run(stage, r, tmp_path, 0, "mine").fingerprint

    same, other = with_arms(smoke), with_arms(smoke, teacher={"grpo.steps": 2})
    for stage in ("distil", "pack", "pretrain", "grpo"):
        assert fingerprint(stage, same) != fingerprint(stage, other)
    assert fingerprint("corpus", same) == fingerprint("corpus", other)


def test_what_an_arm_starts_from_is_part_of_it_also_where_the_arm_changes_the_same_quantity(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("extends: smoke\nname: mine\narms:\n  base-think: {start: base, prompt: think}\n"
                    "  with-kl: {start: continual-pretrain, prompt: think, change: {grpo.kl_beta: 0.001}}\n")
    before, after = (load_recipe(str(path), {"grpo.kl_beta": beta}) for beta in (0.0, 0.01))
    for stage in arm_stages(before, "with-kl"):
        first, second = (stage_run(stage, r, tmp_path, 0, "with-kl").fingerprint for r in (before, after))
        assert first != second, f"{stage}: the teacher of its pretraining is another"


def test_files_that_a_result_depends_on_are_part_of_it(smoke_rm, tmp_path):
    shutil.copytree(smoke_rm / "writing-rm" / "model", judge := tmp_path / "judge")
    (text := tmp_path / "texts.txt").write_text("A street at noon.")
    r = load_recipe("smoke", {"reward.writing.model": str(judge), "writing_rm.corpora": [str(text)]})
    stages = ("writing-rm", "grpo", "samples-after")
    before = [stage_run(stage, r, tmp_path, 0, "base-think").fingerprint for stage in stages]
    text.write_text("A street by night.")
    after = [stage_run(stage, r, tmp_path, 0, "base-think").fingerprint for stage in stages]
    (judge / "writing_rm.json").write_text((judge / "writing_rm.json").read_text() + "\n")
    last = [stage_run(stage, r, tmp_path, 0, "base-think").fingerprint for stage in stages]
    assert not set(before) & set(after) and after[0] == last[0] and not set(after[1:]) & set(last[1:])


def test_an_arm_rates_its_policy_as_often_as_it_says(smoke):
    never = with_arms(smoke, mine={"evaluation.every_steps": 0})
    assert "samples-during" in arm_stages(never, "base-think") and "samples-during" not in arm_stages(never, "mine")


def test_the_overview_lists_every_stage_once_with_its_state(smoke, done, tmp_path):
    rows = overview(smoke, done, 0)
    names = [(row["arm"], row["stage"]) for row in rows]
    assert len(set(names)) == len(names) == 7 + sum(3 + (arm.algorithm == "grpo") for arm in smoke.arms.values())
    state = {name: row["state"] for name, row in zip(names, rows, strict=True)}
    assert state["all arms", "pretrain"] == state[CPT, "grpo"] == "finished" and state["base-nothink", "grpo"] == "to do"
    assert all(row["seconds"] is not None for row in rows if row["state"] == "finished")
    assert {row["state"] for row in overview(smoke, tmp_path, 0)} == {"to do"}


@pytest.mark.parametrize(("change", "said"), [
    ("cot.arm=no-such", r"cot\.arm = 'no-such' must name an arm"), ("cot.arm=sft", r"cot\.arm = 'sft' must name an arm"),
    ("cot.arm=base-nothink", "must name an arm that starts from base, plans"),
])
def test_the_arm_to_distil_must_be_one_that_plans(change, said):
    with pytest.raises(RecipeError, match=said):
        load_recipe("smoke", change)


def test_fine_tuning_has_no_plans(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("extends: smoke\nname: mine\narms:\n  x: {start: base, prompt: think, algorithm: sft}\n")
    with pytest.raises(RecipeError, match="needs prompt direct"):
        load_recipe(path)
