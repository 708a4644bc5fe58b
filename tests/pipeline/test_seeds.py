"""`lwz run --seeds`: what seeds share and what not, what their rows say of it, and the table over them."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from typer.testing import CliRunner

from lwzlib.base.processes import Interrupted
from lwzlib.base.recipe import load_recipe
from lwzlib.base.rows import RunError, read_rows
from lwzlib.cli import main
from lwzlib.cli.options import seed_numbers
from lwzlib.exhibits.page import write_report
from lwzlib.exhibits.run_tables import export, held_out_table, run_table, seed_table
from lwzlib.pipeline import notebooks, seeds
from lwzlib.pipeline.seeds import run_seeds
from lwzlib.pipeline.stages import arm_stages, run_stage, stage_run

ARM = "base-think"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "mine.yaml"
    path.write_text("extends: smoke\nname: mine\nreward: {weights: {writing: 0.0}}\ngrpo: {steps: 2}\n"
                    "samples: {queries: 3, sampling: {max_new_tokens: 60}}\nevaluation: {every_steps: 0}\n"
                    "arms:\n  base-think: {start: base, prompt: think}\n")
    return load_recipe(path)


@pytest.fixture
def stages_only(monkeypatch):
    """Instead of the notebooks of a run, its stages; `stages_only[folder]` is raised before the last of them."""
    raised = {}

    def run(recipe, folder, seed, source, overrides):
        for stage in arm_stages(recipe, ARM):
            if stage == "samples-after" and folder.name in raised:
                raise raised.pop(folder.name)
            run_stage(stage, recipe, folder, seed, ARM)

    monkeypatch.setattr(seeds, "run_notebooks", run)
    return raised


def rows_of(folder, stage="samples-after"):
    return read_rows(folder / ARM / stage / "samples.jsonl")


def test_seeds_share_a_stage_and_their_rows_say_so(recipe, tmp_path, stages_only, capsys):
    stages_only |= {"nano-seed3": KeyboardInterrupt()}
    with pytest.raises(KeyboardInterrupt):
        run_seeds(recipe, tmp_path / "nano", [0, 3], ["cold-start"], "mine", [])
    path = run_seeds(recipe, tmp_path / "nano", [0, 3], ["cold-start"], "mine", [])
    first, other = tmp_path / "nano", tmp_path / "nano-seed3"
    assert (other / "cold-start").is_symlink() and (other / "cold-start").resolve() == first / "cold-start"
    assert stage_run("cold-start", recipe, other, 3).seed == 0 and stage_run("cold-start", recipe, other, 3).finished
    shared = {folder.name: run_table(folder).get("shared") for folder in (first, other)}
    assert shared["nano"] is None and set(shared["nano-seed3"]) == {"cold-start of seed 0"}
    assert "one for all seeds: cold-start. The intervals cover what comes after" in capsys.readouterr().out

    table = seed_table(pd.concat([held_out_table(first), held_out_table(other)])).set_index("reward")
    for reward in ("length", "format"):
        means = {when: [np.mean([row[reward] for row in rows_of(folder, f"samples-{when}")]) for folder in (first, other)]
                 for when in ("before", "after")}
        gains = np.subtract(means["after"], means["before"])
        assert table.before[reward] == pytest.approx(np.mean(means["before"])) and table.seeds[reward] == "0 3"
        assert table.change[reward] == pytest.approx(gains.mean())
        half, ends = stats.t.ppf(0.975, 1) * stats.sem(gains), (table.change_low[reward], table.change_high[reward])
        assert ends == pytest.approx((gains.mean() - half, gains.mean() + half))
    assert path == tmp_path / "nano-seeds.csv" and len(path.read_text().splitlines()) == 1 + len(table)

    run_seeds(recipe, tmp_path / "whole", [0, 3], ["cold-start"], "mine", [])
    assert rows_of(tmp_path / "whole-seed3") == rows_of(other), "interrupted and resumed, as if it had not been"
    assert "cold-start" in [row["stage"] for row in notebooks.stages_found(other)]
    assert "<td>cold-start</td>" in write_report(other).read_text()
    written = export([first, other], tmp_path / "out.csv")
    assert "cold-start of seed 0" in (tmp_path / "out.csv").read_text() and len(written) == 2

    with pytest.raises(RunError, match=r"nano-seed3/cold-start is shared with .*nano/cold-start: give --share cold-start too"):
        run_seeds(recipe, tmp_path / "nano", [0, 3], [], "mine", [])
    run_stage("cold-start", recipe, tmp_path / "nano-seed1", 1)
    with pytest.raises(RunError, match="nano-seed1/cold-start was not shared when it was made"):
        run_seeds(recipe, tmp_path / "nano", [0, 1], ["cold-start"], "mine", [])


def test_a_stage_with_a_seed_of_its_own_is_one_for_all_seeds(recipe, tmp_path, stages_only):
    own = recipe.model_copy(update={"cold_start": recipe.cold_start.model_copy(update={"seed": 7})})
    run_seeds(own, tmp_path / "nano", [0, 3], [], "mine", [])
    first, other = tmp_path / "nano", tmp_path / "nano-seed3"
    assert (other / "cold-start").resolve() == first / "cold-start" and stage_run("cold-start", own, first, 0).seed == 7
    assert set(run_table(first).shared) == set(run_table(other).shared) == {"cold-start of seed 7"}
    before = stage_run("samples-before", own, other, 3, ARM)
    (other / "cold-start").unlink()
    run_stage("cold-start", own, other, 3)
    assert stage_run("samples-before", own, other, 3, ARM).fingerprint == before.fingerprint, "alone or shared"
    weights = [(folder / "cold-start" / "model" / "model.safetensors").read_bytes() for folder in (first, other)]
    assert weights[0] == weights[1]


def test_a_seed_that_fails_does_not_stop_the_others(recipe, tmp_path, stages_only, capsys):
    stages_only |= {"nano": RunError("a long story\nthe disk is full")}
    with pytest.raises(RunError, match=r"1 of 2 seeds failed, .*: seed 0: the disk is full"):
        run_seeds(recipe, tmp_path / "nano", [0, 1], [], "mine", [])
    assert not (tmp_path / "nano" / ARM / "samples-after").exists() and len(rows_of(tmp_path / "nano-seed1")) == 3
    assert not (tmp_path / "nano-seed1" / "cold-start").is_symlink()
    assert (tmp_path / "nano-seeds.csv").read_text().splitlines()[1].startswith("base-think,length,1,")
    stages_only |= {"nano": Interrupted("asked to stop")}
    with pytest.raises(Interrupted):
        run_seeds(recipe, tmp_path / "nano", [0, 1], [], "mine", [])


def test_a_folder_of_another_recipe_is_refused_before_anything_runs(recipe, tmp_path, stages_only):
    run_stage("cold-start", recipe, tmp_path / "nano-seed1", 1)
    other = load_recipe("smoke", "cold_start.queries=3")
    with pytest.raises(RunError, match=r"holds a run of another recipe \(cold_start.queries was 2, is 3\)"):
        run_seeds(other, tmp_path / "nano", [0, 1], ["corpus"], "smoke", [])
    assert not (tmp_path / "nano").exists()


def test_the_corpus_is_the_same_for_every_seed(tmp_path):
    """So the others may link to it, and nothing that builds on it says so."""
    text = tmp_path / "texts.txt"
    text.write_text("\n\n".join(f"Chapter {i}. " + f"The rain of the year {i} fell on the town and on its people. " * 9
                                for i in range(40)))
    small = load_recipe("smoke", {"corpus.sources": [{"at": str(text), "language": "en", "weight": 1.0}], "corpus.parts": 1,
                                  "pretrain.shards": 1})
    for seed in (0, 1):
        run_stage("corpus", small, tmp_path / str(seed), seed)
    tokens = [[path for path in sorted((tmp_path / seed / "corpus" / "tokens").glob("*.ds*")) if path.suffix != ".metadata"]
              for seed in "01"]  # the metadata hold the tokenizer's path
    assert tokens[0] and [path.read_bytes() for path in tokens[0]] == [path.read_bytes() for path in tokens[1]]
    own = stage_run("pack", small, tmp_path / "2", 2)
    (tmp_path / "2").mkdir()
    (tmp_path / "2" / "corpus").symlink_to("../0/corpus")
    assert stage_run("corpus", small, tmp_path / "2", 2).finished
    assert stage_run("pack", small, tmp_path / "2", 2).fingerprint == own.fingerprint


def test_what_builds_on_a_shared_judge_has_another_fingerprint(smoke, smoke_rm, tmp_path):
    places = [("grpo", ARM), ("distil", ""), ("pretrain", ""), ("samples-after", "sft"), ("cold-start", ""), ("corpus", "")]
    own = {place: stage_run(place[0], smoke, tmp_path, 1, place[1]).fingerprint for place in places}
    (tmp_path / "writing-rm").symlink_to(smoke_rm / "writing-rm")
    runs = {place: stage_run(place[0], smoke, tmp_path, 1, place[1]) for place in places}
    assert [place for place in places if runs[place].fingerprint == own[place]] == [("cold-start", ""), ("corpus", "")]
    assert runs["grpo", ARM].inputs["shared"] == {"writing-rm": "seed 0"}
    (tmp_path / "writing-rm").unlink()
    (tmp_path / "writing-rm").symlink_to(tmp_path / "gone")
    with pytest.raises(RunError, match=r"writing-rm is shared with .*/gone, which is gone"):
        stage_run("grpo", smoke, tmp_path, 1, ARM)


def test_a_judge_that_is_shared_with_its_pairs_is_the_first_seeds_own(smoke, smoke_rm, tmp_path):
    """As `--share writing-rm` links them: the finished work of the first seed is taken as it is."""
    for stage in ("pairs", "writing-rm"):
        (tmp_path / stage).symlink_to(smoke_rm / stage)
    assert run_stage("writing-rm", smoke, tmp_path, 1) == tmp_path / "writing-rm" / "model"
    assert stage_run("grpo", smoke, tmp_path, 1, ARM).inputs["shared"] == {"pairs": "seed 0", "writing-rm": "seed 0"}


def test_numbers_of_seeds():
    assert seed_numbers("0-3") == [0, 1, 2, 3] and seed_numbers("0,2, 5") == [0, 2, 5] and seed_numbers("7,1-2") == [7, 1, 2]


@pytest.mark.parametrize(("words", "said"), [
    (["--seeds", "3-1"], "'3-1' must be a number, or two that rise"), (["--seeds", "a"], "'a' must be"),
    (["--seeds", "0,"], "'' must be"), (["--seeds", "-1"], "'-1' must be"), (["--seeds", "0,0-2"], "a seed comes twice"),
    (["--seeds", "0-2", "--seed", "1"], "not both"), (["--share", "writing-rm"], "--share writing-rm needs --seeds")])
def test_what_cannot_be_seeds_is_refused(words, said, tmp_path):
    done = CliRunner().invoke(main.app, ["run", "smoke", "--run-dir", str(tmp_path / "x"), *words], env={"COLUMNS": "200"})
    assert done.exit_code == 2 and said in done.output and not (tmp_path / "x").exists()


def test_only_stages_that_need_no_arm_are_shared(recipe, tmp_path):
    with pytest.raises(RunError, match="--share grpo: seeds can share cold-start, pairs, writing-rm, judge, corpus"):
        run_seeds(recipe, tmp_path / "nano", [0, 1], ["grpo"], "mine", [])
