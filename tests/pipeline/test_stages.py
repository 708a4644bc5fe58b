"""The table of stages: what its rows say of fingerprints, order and calls."""

import importlib
import inspect

import pytest

from lwzlib.base.paths import PACKAGE
from lwzlib.base.recipe import load_recipe
from lwzlib.base.rows import RunError
from lwzlib.pipeline import stages
from lwzlib.pipeline.stages import STAGES, Work, arm_stages, needs, places, run_stage, stage_run

_KIT_DATA = "data.train=kit:train data.heldout=kit:heldout reward.length.max_words=14000"
_FORM = {"model", "data", "prompt", "cold_start"}
_JUDGED = _FORM | {"writing_rm", "reward"}
_PRETRAINED = _JUDGED | {"grpo", "cot", "corpus", "pretrain"}
SECTIONS = {  # of nano, written out: a finished stage is loaded only where these are what they were
    ("", "cold-start"): _FORM, ("", "pairs"): {"model", "data", "writing_rm"},
    ("", "writing-rm"): {"model", "data", "writing_rm"}, ("", "corpus"): {"model", "data", "corpus"},
    ("", "distil"): _JUDGED | {"grpo", "cot", "corpus"}, ("", "pack"): _PRETRAINED, ("", "pretrain"): _PRETRAINED,
    ("base-think", "samples-before"): _JUDGED | {"samples"}, ("base-think", "grpo"): _JUDGED | {"grpo"},
    ("base-think", "samples-during"): _JUDGED | {"grpo", "samples", "evaluation"},
    ("base-think", "samples-after"): _JUDGED | {"grpo", "samples"},
    ("continual-pretrain-think", "samples-before"): _PRETRAINED | {"samples"},
    ("continual-pretrain-think", "grpo"): _PRETRAINED,
    ("sft", "samples-before"): _JUDGED | {"samples"}, ("sft", "sft"): _JUDGED | {"grpo", "cot", "corpus", "sft"},
    ("sft", "samples-after"): _JUDGED | {"grpo", "cot", "corpus", "sft", "samples"},
    ("continual-pretrain-sft", "sft"): _PRETRAINED | {"sft"}}


@pytest.mark.parametrize(("arm", "stage"), SECTIONS)
def test_a_result_depends_on_its_own_sections_and_on_those_of_its_needs(arm, stage, tmp_path):
    assert set(stage_run(stage, load_recipe("nano"), tmp_path, 0, arm).sections) == SECTIONS[arm, stage]


def test_sections_do_not_depend_on_amounts(tmp_path):
    """A stage that is not needed for want of queries, weight or share leaves its sections in the fingerprint."""
    nano, little = load_recipe("nano"), load_recipe("nano", "cold_start.queries=0 pretrain.cot_token_fraction=0.0 "
                                                    "reward.weights.writing=0.0")
    for arm, stage in places(little):
        assert stage_run(stage, little, tmp_path, 0, arm).sections == stage_run(stage, nano, tmp_path, 0, arm).sections
    assert not {"cold-start", "writing-rm"} & {stage for _, stage in places(little)}
    assert ("distil", "") not in needs("pack", little) and ("distil", "") in needs("pack", nano)


@pytest.mark.parametrize("name", ["nano", "smoke", "ablations"])
def test_every_stage_comes_after_what_it_needs(name):
    recipe = load_recipe(name)
    ordered = places(recipe)
    assert len(set(ordered)) == len(ordered)
    for number, (arm, stage) in enumerate(ordered):
        before = {other for _, other in ordered[:number]}
        assert {other for other, _ in needs(stage, recipe, arm)} <= before, (arm, stage)


def test_each_row_names_a_function_that_takes_what_the_row_gives(smoke, tmp_path):
    calls = {}

    def signature(name):
        module, function = name.rsplit(".", 1)
        assert (PACKAGE / f"{module.replace('.', '/')}.py").is_file()
        return inspect.signature(getattr(importlib.import_module(f"lwzlib.{module}"), function))

    for stage, row in STAGES.items():
        name = inspect.getclosurevars(row.does).nonlocals
        arm = "sft" if stage == "sft" else "base-think" if row.own_if is None else ""
        needed = {other: tmp_path / other / "model" for other, _ in needs(stage, smoke, arm)}
        run = stage_run(stage, smoke, tmp_path, 0, arm)
        bound = signature(f"{name['module']}.{name['function']}").bind(run.recipe, run, *row.gets(Work(run, arm, needed)))
        calls[stage] = bound.arguments
    assert calls["grpo"]["start"] == str(tmp_path / "cold-start" / "model")


@pytest.mark.parametrize("name", ["nano", "smoke", "paper"])
def test_a_stage_is_done_with_the_artefacts_of_what_it_needs(name, tmp_path, monkeypatch):
    """`launch` does the needs first, each by its own launch; then the stage itself must find all of them finished."""
    recipe, original = load_recipe(name, _KIT_DATA), run_stage
    for arm in recipe.arms:
        for stage in dict.fromkeys((*(s for s, row in STAGES.items() if row.own_if is not None), *arm_stages(recipe, arm))):
            of = arm if STAGES[stage].own_if is None else ""
            done, given = [], []
            monkeypatch.setattr(stages, "run_stage", lambda other, recipe, root, seed, arm, done=done: done.append(
                (other, arm)) or root / other)
            row = STAGES[stage]._replace(does=lambda *_: tmp_path, gets=lambda work, given=given: given.append(work) or ())
            monkeypatch.setitem(STAGES, stage, row)
            assert original(stage, recipe, tmp_path, 0, of) == tmp_path
            assert done == needs(stage, recipe, of)
            assert given[0].needed == {other: tmp_path / other for other, _ in done}
            monkeypatch.undo()


@pytest.mark.parametrize(("asked", "served"), [
    ("", False), ("launch=subprocess vllm.mode=colocate", True),
    ("launch=slurm distributed.nodes=2 vllm.mode=server vllm.nodes=1", True)])
def test_vllm_writes_for_every_stage_that_writes_where_the_recipe_has_it(asked, served, tmp_path):
    recipe = load_recipe("smoke", asked)
    run = stage_run("samples-before", recipe, tmp_path, 0, "base-think")
    assert (Work(run, "base-think", {}).served is not None) == served


def test_what_is_no_stage_is_refused(smoke, tmp_path):
    with pytest.raises(RunError, match="no stage 'grop'; stages are cold-start, pairs, writing-rm"):
        stage_run("grop", smoke, tmp_path, 0, "base-think")
    with pytest.raises(RunError, match="arm 'sft' has no stage 'grpo'; it has samples-before, sft, samples-after"):
        stage_run("grpo", smoke, tmp_path, 0, "sft")
