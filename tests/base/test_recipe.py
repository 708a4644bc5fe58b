"""Recipes: presets load, unknown names and bad values are refused by name, departures and fingerprints are exact."""

import re

import pytest

from lwzlib.base.marks import published_marks
from lwzlib.base.recipe import RECIPES, RecipeError, departures, flatten, load_recipe, presets


def _write(tmp_path, text):
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", presets(), ids="{}.yaml".format)
def test_every_preset_loads_under_its_own_name(name):
    assert load_recipe(name).name == name


def test_the_presets_that_the_docs_name_are_shipped():
    assert {"paper", "nano", "laptop", "gpu", "smoke"} <= set(presets())


def test_every_quantity_of_the_paper_recipe_carries_a_mark():
    paper = flatten(load_recipe("paper").model_dump(exclude={"arms", "name"}))
    assert set(published_marks()) == set(paper)


def test_marks_are_read_with_their_letter_and_note():
    marks = published_marks()
    assert {mark for mark, _ in marks.values()} == {"A", "B", "N"}
    assert marks["grpo.group_size"][0] == "B"
    assert marks["reward.weights.length"] == ("A", "plain average")
    assert marks["samples.stop"][0] == "A"


@pytest.mark.parametrize("overrides", [{"grpo.step": 3}, ["grpo.step=3"], "grpo.step=3"])
def test_unknown_name_in_overrides_is_refused_with_the_nearest(overrides):
    with pytest.raises(RecipeError, match=r"'grpo\.step'.*did you mean 'grpo\.steps'"):
        load_recipe("nano", overrides)


def test_unknown_name_in_a_file_is_refused_with_the_nearest(tmp_path):
    with pytest.raises(RecipeError, match=r"'grpo\.grup_size'.*did you mean 'grpo\.group_size'"):
        load_recipe(_write(tmp_path, "extends: nano\ngrpo: {grup_size: 4}\n"))


def test_a_file_states_only_its_departures_from_its_parent(tmp_path):
    mine = load_recipe(_write(tmp_path, "extends: nano\nname: mine\ngrpo: {steps: 7}\n"))
    assert departures(mine, "nano") == [("grpo.steps", load_recipe("nano").grpo.steps, 7)]


def test_arms_of_a_file_replace_those_of_its_parent(tmp_path):
    mine = load_recipe(_write(tmp_path, "extends: nano\narms: {only: {start: base, prompt: think}}\n"))
    assert list(mine.arms) == ["only"]


@pytest.mark.parametrize(("name", "value"), [
    ("grpo.group_size", 1), ("grpo.clip_eps", 1.0), ("reward.weights.length", -0.5), ("grpo.steps", 2.5),
    ("grpo.sampling.temperature", 0), ("grpo.loss", "ppo"), ("reward.format.partial_credit", 0.25),
    ("data.languages", ["fr"]), ("grpo.steps", True), ("prompt.worked_examples", 3)])
def test_value_out_of_range_names_the_quantity(name, value):
    with pytest.raises(RecipeError, match=name.replace(".", r"\.")):
        load_recipe("nano", {name: value})


@pytest.mark.parametrize("name", ["reward.weights.length", "grpo.max_grad_norm", "grpo.kl_beta"])
@pytest.mark.parametrize("value", [".inf", ".nan"])
def test_a_number_that_is_not_finite_names_the_quantity(name, value):
    with pytest.raises(RecipeError, match=name.replace(".", r"\.")):
        load_recipe("nano", [f"{name}={value}"])


def test_batches_that_cannot_be_cut_whole_are_refused():
    with pytest.raises(RecipeError, match=r"grpo.*divisor of 16"):
        load_recipe("nano", {"grpo.micro_batch_completions": 3})


@pytest.mark.parametrize(("text", "number"), [("1e-4", 1e-4), ("1E-4", 1e-4), ("3.0e-4", 3e-4), ("1e0", 1.0)])
def test_exponents_are_numbers_in_overrides_and_in_files(tmp_path, text, number):
    assert load_recipe("nano", f"grpo.learning_rate={text}").grpo.learning_rate == number
    path = _write(tmp_path, f"extends: nano\ngrpo: {{learning_rate: {text}}}\n")
    assert load_recipe(path).grpo.learning_rate == number


def test_overrides_as_dict_list_and_string_agree():
    as_dict = load_recipe("nano", {"grpo.steps": 5, "data.languages": ["en", "zh"], "grpo.kl_beta": 1e-3})
    as_list = load_recipe("nano", ["grpo.steps=5", "data.languages=[en, zh]", "grpo.kl_beta=1e-3"])
    as_text = load_recipe("nano", "grpo.steps=5 'data.languages=[en, zh]' grpo.kl_beta=1e-3")
    assert as_dict == as_list == as_text != load_recipe("nano")


def test_overrides_do_not_leak_into_the_next_load():
    load_recipe("nano", {"grpo.steps": 999})
    assert load_recipe("nano").grpo.steps != 999


@pytest.mark.parametrize("override", ["grpo.steps", "data.languages=[en", "data.train='kit:train"])
def test_an_override_that_cannot_be_read_is_a_recipe_error(override):
    with pytest.raises(RecipeError):
        load_recipe("nano", override)


def test_departures_of_nano_are_named_with_both_values():
    values = {name: (theirs, ours) for name, theirs, ours in departures(load_recipe("nano"))}
    nano = load_recipe("nano")
    assert values["grpo.steps"] == (150, nano.grpo.steps)
    assert values["prompt.wording"] == ("full", "brief")
    assert {"model.name", "writing_rm.pairs", "reward.length.max_words", "grpo.group_size"} <= set(values)
    assert "grpo.advantage" not in values


def test_the_paper_departs_from_itself_in_nothing():
    assert departures(load_recipe("paper")) == []


def test_fingerprint_changes_only_with_a_chosen_section():
    before, after = load_recipe("nano"), load_recipe("nano", "grpo.steps=5")
    assert before.fingerprint("model", "data") == after.fingerprint("model", "data")
    assert before.fingerprint("model", "grpo") != after.fingerprint("model", "grpo")
    assert before.fingerprint() != after.fingerprint()


def test_fingerprint_depends_on_the_extras_and_on_nothing_else():
    one, same = load_recipe("nano"), load_recipe("nano")
    assert one.fingerprint("grpo", seed=1) == same.fingerprint("grpo", seed=1) != one.fingerprint("grpo", seed=2)


@pytest.mark.parametrize(("more", "message"), [
    ("extends: [nano]\n", r"extends = \['nano'\] must be one name"),
    ("extends: nano\narms: {a/b: {start: base, prompt: think}}\n", r"arms.*a/b"),
    ("extends: nano\narms: {base-think: {start: base, prompt: think, change: {launch: inline}}}\n",
     "'launch' holds for a whole run")])
def test_what_no_run_could_follow_is_refused(tmp_path, more, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(_write(tmp_path, more))


def test_an_override_reaches_what_an_arm_changes():
    r = load_recipe("ablations", "arms.with-kl.change.grpo.kl_beta=0.01")
    assert (r.for_arm("with-kl").grpo.kl_beta, r.grpo.kl_beta) == (0.01, 0.0)


def test_unknown_preset_names_the_nearest():
    with pytest.raises(RecipeError, match="'nanoo'; did you mean 'nano'"):
        load_recipe("nanoo")


def test_unknown_arm_names_the_nearest():
    with pytest.raises(RecipeError, match="'base-thnk'; did you mean 'base-think'"):
        load_recipe("nano").arm("base-thnk")


@pytest.mark.parametrize("text", ["- a\n- b\n", "grpo: [1\n", "extends: nanoo\n", "name: alone\n"])
def test_a_file_that_is_no_recipe_is_refused(tmp_path, text):
    with pytest.raises(RecipeError):
        load_recipe(_write(tmp_path, text))


def test_a_file_that_extends_itself_is_refused(tmp_path):
    path = tmp_path / "mine.yaml"
    with pytest.raises(RecipeError):
        load_recipe(_write(tmp_path, f"extends: {path}\n"))


def test_the_arms_of_the_page_on_recipes_are_a_recipe(tmp_path):
    page = (RECIPES.parent / "docs" / "recipes.md").read_text()
    path = tmp_path / "mine.yaml"
    path.write_text(re.search(r"```yaml\n(.*?)```", page, re.DOTALL)[1])
    mine = load_recipe(path)
    assert {"base-think", "with-kl"} <= set(mine.arms) and mine.for_arm("with-kl").grpo.kl_beta == 0.001


def test_a_section_that_may_be_absent_is_taken_away_by_its_name(tmp_path):
    mine = _write(tmp_path, "extends: smoke\nname: mine\ncorpus: {slurm: {partition: cpu, time: '1:00:00', memory_gb: 8}}\n")
    assert load_recipe(mine).corpus.slurm and load_recipe(mine, "corpus.slurm=null").corpus.slurm is None
    with pytest.raises(RecipeError, match="corpus"):
        load_recipe(mine, "corpus=null")
