"""`grpo.trl`: the tables are those of the installed GRPOConfig, what cannot go through is told at load, what can arrives."""

import dataclasses
import json
import re
import subprocess
import sys

import pytest
from pydantic import TypeAdapter
from smoke_runs import ARM, COMMON
from trl import GRPOConfig
from trl.trainer import grpo_trainer
from typer.testing import CliRunner

from lwzlib.base import trl_knobs
from lwzlib.base.recipe import RecipeError, departures, flatten, load_recipe
from lwzlib.base.run_folder import Run
from lwzlib.cli import main
from lwzlib.cluster import readiness
from lwzlib.method import grpo
from lwzlib.pipeline.stages import run_stage, stage_run

FIELDS = {field.name: field for field in dataclasses.fields(GRPOConfig)}
WAYS = {  # recipes that hand TRL different fields
    "smoke": "", "gpu": "vllm.mode=none", "nano": "grpo.lora.rank=4", "colocated": "vllm.mode=colocate",
    "served": "launch=slurm distributed.nodes=2 vllm.nodes=1 vllm.mode=server", "sharded": "launch=torchrun distributed.zero=2"}


def test_each_field_of_the_installed_class_is_in_one_table():
    tables = (trl_knobs.SET, trl_knobs.REFUSED, trl_knobs.FREE)
    assert sorted(name for table in tables for name in table) == sorted(FIELDS)


@pytest.mark.parametrize("name", trl_knobs.FREE)
def test_trls_default_passes_and_what_passes_is_of_trls_type(name):
    assert trl_knobs.problem(name, FIELDS[name].default) == ""
    values = (None, True, 1, 0.5, "token", "sgd", "static", "x", ["x"], {"x": 1})
    for value in (value for value in values if not trl_knobs.problem(name, value)):
        TypeAdapter(FIELDS[name].type).validate_python(value)  # raises
    assert any(trl_knobs.problem(name, value) for value in values)


@pytest.mark.parametrize("way", WAYS)
def test_what_the_kit_hands_trl_is_in_the_tables_and_each_quantity_exists(way, tmp_path, monkeypatch):
    recipe = load_recipe(way if way in ("smoke", "nano") else "gpu", WAYS[way])
    monkeypatch.setenv("LWZ_VLLM_URL", "http://node3:10003")
    monkeypatch.setenv("LWZ_VLLM_PORT", "10002")
    monkeypatch.setattr(grpo, "GRPOConfig", lambda **handed: handed)
    handed = grpo.config(recipe, Run(tmp_path / "stage", recipe, 0, ("model",), {}), ["length", "format"])
    assert handed.keys() <= trl_knobs.SET.keys() | trl_knobs.REFUSED.keys() and len(handed) > 25
    known = flatten(load_recipe("paper").model_dump())
    assert not [name for name in trl_knobs.SET.values() if not any(f"{quantity}.".startswith(f"{name}.") for quantity in known)]


@pytest.mark.parametrize(("sets", "message"), [
    ("grpo.trl.epsilon=0.3", r"grpo\.trl\.epsilon = 0\.3: the recipe has it as grpo\.clip_eps$"),
    ("grpo.trl.report_to=wandb", r"grpo\.trl\.report_to = 'wandb': the recipe has it as tracking\.report_to$"),
    ("grpo.trl.epsilon_hih=0.3", r"grpo\.trl\.epsilon_hih: TRL's GRPOConfig has no such field; did you mean 'epsilon_high'\?"),
    ("grpo.trl.epsilon_high=wide", r"grpo\.trl\.epsilon_high = 'wide': Input should be a valid number"),
    ("grpo.trl.epsilon_high=.nan", r"grpo\.trl\.epsilon_high = nan: Input should be a finite number"),
    ("grpo.trl.importance_sampling_level=word", r"= 'word': Input should be 'token' or 'sequence'"),
    ("grpo.trl.num_iterations=2", r"grpo\.trl\.num_iterations = 2: refused: one generation is one step here"),
    ("grpo.trl.remove_unused_columns=true", r"refused: the rewards read columns"),
    ("grpo.trl.vllm_importance_sampling_clip_min=4.0", r"clip_min = 4\.0 needs a vllm_importance_sampling_clip_max above it"),
    ("grpo.trl=3", r"grpo\.trl = 3"), ("grpo.trl=null", r"grpo\.trl"), ("grpo.trls.x=3", r"no quantity 'grpo\.trls\.x'")])
def test_what_cannot_go_through_is_told_at_load(sets, message):
    with pytest.raises(RecipeError, match=message) as told:
        load_recipe("nano", [sets])
    assert "Value error" not in str(told.value)


def test_an_arm_is_checked_at_load_too(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("extends: nano\narms: {base-think: {start: base, prompt: think, change: {grpo.trl.beta: 1.0}}}\n")
    with pytest.raises(RecipeError, match=r"arm base-think: grpo\.trl\.beta = 1\.0: the recipe has it as grpo\.kl_beta"):
        load_recipe(path)


def test_a_field_is_given_in_a_file_by_an_arm_and_by_overrides(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("extends: nano\nname: mine\ngrpo:\n  trl: {epsilon_high: 0.28}\narms:\n  base-think: {start: base, prompt: "
                    "think, change: {grpo.trl.delta: 2.0}}\n  plain: {start: base, prompt: think, change: {grpo.trl: {}}}\n")
    mine = load_recipe(path)
    assert mine.grpo.trl == {"epsilon_high": 0.28}
    assert mine.for_arm("base-think").grpo.trl == {"epsilon_high": 0.28, "delta": 2.0} and mine.for_arm("plain").grpo.trl == {}
    assert load_recipe(path, "grpo.trl.top_k=5").grpo.trl == {"epsilon_high": 0.28, "top_k": 5}
    assert load_recipe(path, ["grpo.trl={top_k: 5}", "grpo.trl.min_p=0.1"]).grpo.trl == {"top_k": 5, "min_p": 0.1}
    assert load_recipe(path, "arms.base-think.change.grpo.trl.delta=3.0").for_arm("base-think").grpo.trl["delta"] == 3.0
    assert load_recipe("nano").grpo.trl == {}


def test_it_is_part_of_the_fingerprint_and_shown_as_one_quantity(monkeypatch):
    monkeypatch.setattr(main.out, "_width", 200)  # a worker of xdist has a width from the start
    plain, wide = load_recipe("nano"), load_recipe("nano", "grpo.trl.epsilon_high=0.28")
    assert plain.fingerprint("grpo") != wide.fingerprint("grpo") and flatten(plain.model_dump())["grpo.trl"] == {}
    assert departures(wide, "nano") == [("grpo.trl", {}, {"epsilon_high": 0.28})]
    again = type(wide).model_validate_json(wide.model_dump_json())
    assert again.fingerprint() == wide.fingerprint()
    for sets, shown in (("grpo.steps=3", "{}"), ("grpo.trl.epsilon_high=0.28", "{'epsilon_high': 0.28}")):
        said = CliRunner().invoke(main.app, ["recipe", "nano", "--all", "-s", sets]).output
        assert any(re.match(rf"\s*grpo\.trl\s+{re.escape(shown)}\s", line) for line in said.splitlines())


def test_a_recipe_with_fields_loads_without_trl():
    code = ("import sys; from lwzlib.base.recipe import load_recipe; load_recipe('nano', 'grpo.trl.epsilon_high=0.28'); "
            "sys.exit(any(name in sys.modules for name in ('trl', 'torch', 'transformers')))")
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_doctor_asks_the_installed_trl(monkeypatch):
    here, look = readiness.Place(0, None), readiness.CHECKS["TRL"]
    made = load_recipe("nano", "grpo.trl.epsilon_high=0.28")
    assert look(load_recipe("nano"), here) is None and look(made, here) == ""
    monkeypatch.delitem(GRPOConfig.__dataclass_fields__, "epsilon_high")  # as of another version
    assert look(made, here) == "the TRL that is installed has no epsilon_high, which grpo.trl sets"


def trained(folder, monkeypatch, *sets):
    """(completions, TRL's arguments) of a real step."""
    seen, init = {}, grpo_trainer.GRPOTrainer.__init__
    with monkeypatch.context() as patch:
        patch.setattr(grpo_trainer.GRPOTrainer, "__init__",
                      lambda self, *args, **more: (init(self, *args, **more), seen.update(args=self.args))[0])
        made = load_recipe("smoke", COMMON, "grpo.steps=1 evaluation.every_steps=0", list(sets))
        run_stage("grpo", made, folder, 0, ARM)
    return stage_run("grpo", made, folder, 0, ARM).rows("completions"), seen["args"]


def test_fields_reach_trl_and_do_what_they_say(smoke, tmp_path, monkeypatch):
    plain, defaults = trained(tmp_path / "plain", monkeypatch)
    greedy, given = trained(tmp_path / "greedy", monkeypatch, "grpo.trl.top_k=1", "grpo.trl.epsilon_high=0.28")
    assert (defaults.epsilon_high, defaults.top_k, given.epsilon_high, given.top_k) == (None, 0, 0.28, 1)
    assert len({row["completion"] for row in plain}) == len(plain) > 1 == len({row["completion"] for row in greedy})
    assert json.loads(given.to_json_string())["epsilon_high"] == 0.28
