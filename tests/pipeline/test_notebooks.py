"""The notebooks through papermill, continuing, the first error, the page in a real browser, and the command line."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import browser
import nbformat
import papermill
import pytest
from typer.testing import CliRunner

from lwzlib.base.recipe import departures, load_recipe
from lwzlib.base.rows import RunError
from lwzlib.cli import main
from lwzlib.evaluate import arena, trust
from lwzlib.exhibits.page import write_report
from lwzlib.pipeline import notebooks
from lwzlib.pipeline.notebooks import Step, _execute, run_notebooks, stages_found, steps

ROOT = Path(__file__).resolve().parents[2]


def lwz(*words, **kwargs):
    return subprocess.run([sys.executable, "-m", "lwzlib.cli.main", *map(str, words)], capture_output=True, text=True, **kwargs)


def unboxed(said):
    """What a command complains, without its frame and line breaks."""
    return " ".join(said.replace("│", " ").split())


@pytest.fixture(scope="module")
def smoke_run(smoke, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "smoke"
    done = lwz("run", "smoke", "--run-dir", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_run_leaves_every_notebook_executed_and_a_page(smoke_run, smoke):
    executed = steps(smoke, smoke_run, 0, "smoke", [])
    for step in executed:
        notebook = nbformat.read(smoke_run / "notebooks" / f"{step.output}.ipynb", 4)
        assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code"), step.output
    assert (smoke_run / "report.html").stat().st_size > 10_000


def test_every_notebook_is_part_of_the_run(smoke, tmp_path):
    assert {step.notebook for step in steps(smoke, tmp_path, 0, "smoke", [])} == {
        path.stem for path in (ROOT / "notebooks").glob("*.ipynb")} - {"10_paper_figures"}, "that one shows committed rows"


def test_where_the_sliders_do_not_show_there_is_a_picture(smoke_run):
    cells = nbformat.read(smoke_run / "notebooks" / "02_reward_design.ipynb", 4).cells
    maps, sliders = (next(cell for cell in cells if f"sliders.{name}(" in cell.source) for name in ("surface", "sliders"))
    assert any("image/png" in output.get("data", {}) for output in maps.outputs)
    assert any("application/vnd.jupyter.widget-view+json" in output.get("data", {}) for output in sliders.outputs)


def test_running_again_does_nothing_again(smoke_run, smoke):
    again = lwz("run", "smoke", "--run-dir", smoke_run)
    assert again.returncode == 0
    assert again.stdout.count("already done") == len(steps(smoke, smoke_run, 0, "smoke", []))


def test_what_was_removed_is_done_again(smoke_run, smoke, tmp_path, monkeypatch):
    """Also the notebooks that showed it: each remembers which stages were finished when it ended."""
    shutil.copytree(smoke_run, folder := tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints", "notebooks"))
    executed, back = [], []

    def execute(step, output):
        executed.append(step.output)
        if step.output == "05_train_grpo_base-think" and back:
            shutil.move(back.pop(), folder / "base-think" / "grpo")  # what it does again is whole before the next is looked at

    monkeypatch.setattr(notebooks, "_execute", execute)
    shutil.move(folder / "base-think", tmp_path / "base-think")  # a run that is not that far
    run_notebooks(smoke, folder, 0, "smoke", [])
    before, rest = executed[: executed.index("05_train_grpo_base-think")], executed[executed.index("06_think_vs_nothink") :]
    executed.clear()
    shutil.move(tmp_path / "base-think", folder / "base-think")
    (folder / "notebooks" / "done.json").unlink()
    run_notebooks(smoke, folder, 0, "smoke", [])
    assert executed[: len(before)] == before and executed[-len(rest) :] == rest
    executed.clear()
    run_notebooks(smoke, folder, 0, "smoke", [])
    assert executed == []
    back.append(shutil.move(folder / "base-think" / "grpo", tmp_path / "grpo"))
    run_notebooks(smoke, folder, 0, "smoke", [])
    assert "05_train_grpo_base-think" in executed and not back and executed[-len(rest) :] == rest


@pytest.mark.parametrize("notebook", ["02_reward_design", "03_writing_rm", "04_grpo_step_by_step"])
def test_a_notebook_that_shows_all_rewards_runs_whatever_the_recipe_pays_for(smoke_run, tmp_path, notebook):
    paid = ["reward.weights.length=0", "reward.weights.writing=0", "grpo.loss=dr_grpo", "grpo.advantage=sum"]
    papermill.execute_notebook(
        ROOT / "notebooks" / f"{notebook}.ipynb", tmp_path / "out.ipynb", kernel_name="python3", cwd=tmp_path,
        progress_bar=False, parameters={"recipe": "smoke", "run_dir": str(smoke_run), "overrides": paid})
    said = "".join(str(output) for cell in nbformat.read(tmp_path / "out.ipynb", 4).cells for output in cell.get("outputs", []))
    assert notebook[:2] != "04" or "equal the trainer's: True" in said


def test_a_run_that_pays_no_judge_trains_none(smoke, tmp_path):
    unpaid = load_recipe("smoke", "reward.weights.writing=0")
    assert "03_writing_rm" not in [step.notebook for step in steps(unpaid, tmp_path, 0, "smoke", [])]


def test_first_error_names_the_cell_and_stops(smoke, tmp_path):
    done = lwz("run", "smoke", "--run-dir", tmp_path, "-s", "model.name=/no/such/model")
    assert done.returncode == 1
    assert "stopped in cell" in done.stderr and "model folder /no/such/model does not exist" in done.stderr
    assert not (tmp_path / "notebooks" / "02_reward_design.ipynb").exists()


def test_a_relative_path_means_the_same_in_a_notebook_as_in_the_command(tmp_path, monkeypatch):
    (tmp_path / "mine.yaml").write_text("extends: smoke\nname: mine\ndata: {train: mine.jsonl}\n")
    (tmp_path / "mine.jsonl").write_text('{"id": "a", "query": "Why does rain fall?", "word_range": [50, 70]}\n')
    cells = [nbformat.v4.new_code_cell(source, metadata={"tags": tags}) for source, tags in (
        ("recipe = ''", ["parameters"]),
        ("from lwzlib.base.recipe import load_recipe\nfrom lwzlib.method.queries import load_queries\n"
         "print(load_queries(load_recipe(recipe).data.train)[0].id)", []))]
    language = {"language_info": {"name": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=language), tmp_path / "small.ipynb")
    monkeypatch.setattr(notebooks, "NOTEBOOKS", tmp_path)
    monkeypatch.chdir(tmp_path)
    _execute(Step("small", "small", {"recipe": "mine.yaml"}), tmp_path / "out.ipynb")
    assert nbformat.read("out.ipynb", 4).cells[-1].outputs[0].text == "a\n"


def test_queries_that_are_not_there_are_refused_before_anything_runs(tmp_path):
    done = lwz("run", "smoke", "--run-dir", tmp_path / "x", "-s", "data.heldout=/no/such/file.jsonl")
    assert done.returncode == 1 and "no file /no/such/file.jsonl" in done.stderr
    assert not (tmp_path / "x").exists()


def test_misspelt_quantity_is_refused_before_anything_runs(tmp_path):
    done = lwz("run", "nano", "--run-dir", tmp_path / "x", "-s", "grpo.stepz=5")
    assert done.returncode == 1 and "did you mean 'grpo.steps'" in done.stderr
    assert not (tmp_path / "x").exists()


def test_a_folder_of_another_recipe_is_refused_before_anything_runs(smoke_run, smoke):
    other, before = load_recipe("smoke", "grpo.kl_beta=0.04"), (smoke_run / "notebooks" / "done.json").read_text()
    written = {path: path.stat().st_mtime_ns for path in smoke_run.rglob("*") if path.is_file()}
    with pytest.raises(RunError, match=r"holds a run of another recipe \(grpo\.kl_beta was 0\.0, is 0\.04\)"):
        run_notebooks(other, smoke_run, 0, "smoke", ["grpo.kl_beta=0.04"])
    assert (smoke_run / "notebooks" / "done.json").read_text() == before
    assert {path: path.stat().st_mtime_ns for path in smoke_run.rglob("*") if path.is_file()} == written


def test_status_of_a_run_folder_shows_what_was_started(smoke_run):
    done = CliRunner().invoke(main.app, ["status", str(smoke_run)], env={"COLUMNS": "200"})
    rows = [line.split() for line in done.output.splitlines()[2:]]
    assert done.exit_code == 0 and len(rows) == len(stages_found(smoke_run)) > 15
    assert ["base-think", "grpo", "finished", "4/4"] in [row[:4] for row in rows]
    assert [row for row in rows if row[:4] == ["all", "arms", "cold-start", "finished"]]


def test_two_runs_of_one_arm_and_seed_are_not_exported_together(smoke_run, tmp_path):
    to = tmp_path / "new" / "mine.csv"
    done = CliRunner().invoke(main.app, ["export", str(smoke_run), str(smoke_run), "--to", str(to)], env={"COLUMNS": "300"})
    assert done.exit_code == 2 and not to.exists()
    assert "arm base-nothink, seed 0 is in two of these runs" in done.output and "one by one" in done.output
    done = CliRunner().invoke(main.app, ["export", str(smoke_run), "--to", str(to)])
    assert done.exit_code == 0 and to.exists(), "into a folder that it makes"


def test_only_a_whole_run_is_exported_and_nothing_of_another_stays(smoke_run, tmp_path):
    arm, to = tmp_path / "run" / "base-think", tmp_path / "mine.csv"
    shutil.copytree(smoke_run / "base-think" / "grpo", arm / "grpo", ignore=shutil.ignore_patterns("model", "checkpoints"))
    stale = to.with_stem("mine_held_out")
    stale.write_text("of another run\n")
    for name in ("mine", "mine_held_out.csv"):
        assert "must end in .csv" in unboxed(lwz("export", arm.parent, "--to", tmp_path / name).stderr)
    assert lwz("export", arm.parent, "--to", to).returncode == 0 and to.exists() and not stale.exists()
    status = json.loads((arm / "grpo" / "status.json").read_text())
    (arm / "grpo" / "status.json").write_text(json.dumps(status | {"state": "running", "step": 3}))
    again = lwz("export", arm.parent, "--to", to)
    assert again.returncode == 2 and "is killed, at step 3 of 4" in unboxed(again.stderr)
    (arm / "grpo" / "status.json").write_text(json.dumps(status))
    made = json.loads((arm / "grpo" / "provenance.json").read_text())
    (arm / "grpo" / "provenance.json").write_text(json.dumps(made | {"commit": None, "uncommitted_changes": None}))
    again = lwz("export", arm.parent, "--to", tmp_path / "new.csv")
    assert again.returncode == 2 and "know no commit" in unboxed(again.stderr) and not (tmp_path / "new.csv").exists()


def test_evaluation_takes_another_judge_and_another_model(smoke_run, llm_server, tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    llm_server.script({"<request>": [{"text": '{"winner": "A", "reason": "It comes first."}'}]})
    out = tmp_path / "out.ipynb"
    papermill.execute_notebook(
        ROOT / "notebooks" / "09_evaluate.ipynb", out, kernel_name="python3", cwd=ROOT / "notebooks", progress_bar=False,
        parameters={"recipe": "smoke", "run_dir": str(smoke_run), "model": "kit:tiny", "judge_model": "m",
                    "judge_base_url": llm_server.url})
    said = "".join(str(output) for cell in nbformat.read(out, 4).cells for output in cell.get("outputs", []))
    judgments = arena.read_judgments(smoke_run / "arena.jsonl")
    assert set(judgments.judge) == {"m"} and "kit:tiny" in set(judgments["first"]) and "judge: m" in said
    assert len(judgments) == 2 * 2 * 15, "both orders of six players' pairs on two queries"
    assert trust.position_bias(judgments).value == 1, "the first place always won, and the notebook would say so"


def test_notebooks_are_stripped_short_and_parameterised():
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = nbformat.read(path, 4).cells
        code = [cell for cell in cells if cell.cell_type == "code"]
        assert not any(cell.outputs or cell.execution_count for cell in code), path.name
        assert sum("parameters" in cell.metadata.get("tags", []) for cell in code) == 1, path.name
        assert max(len(cell.source.splitlines()) for cell in code) <= 25, path.name
        assert "**Question.**" in cells[0].source and "run time" in cells[0].source, path.name


def test_page_is_self_contained_and_names_what_was_measured(smoke_run):
    page = (smoke_run / "report.html").read_text()
    assert not re.search(r"""(src|href)=["'](?!#)""", page), "the page must not need any other file"
    rows = [json.loads(line) for line in (smoke_run / "base-think" / "samples-after" / "samples.jsonl").open()]
    assert rows[0]["query"] in page
    for name, _, _ in departures(load_recipe("smoke", "grpo.steps=4")):
        assert name in page or not name.startswith(("grpo.", "model.", "reward.")), name


def test_page_of_an_empty_folder_says_so(tmp_path):
    page = write_report(tmp_path).read_text()
    assert "No arm was trained" in page and "No samples" in page


@pytest.mark.parametrize("width", [390, 1280])
def test_page_in_a_real_browser(smoke_run, tmp_path, width):
    browser.required()
    probe = tmp_path / "probe.html"
    script = ("<script>window.onload=()=>{document.title=JSON.stringify({over:document.documentElement.scrollWidth-"
              "innerWidth,h2:document.querySelectorAll('h2').length,svg:document.querySelector('figure svg')"
              ".getBoundingClientRect().width})}</script>")
    probe.write_text((smoke_run / "report.html").read_text().replace("</body>", script + "</body>"))
    done = subprocess.run(
        [browser.CHROMIUM, *browser.QUIET, f"--user-data-dir={tmp_path / 'profile'}",
         f"--window-size={width},900", "--virtual-time-budget=3000", "--dump-dom", probe.as_uri()],
        capture_output=True, text=True, timeout=90)
    seen = json.loads(re.search(r"<title>(\{.*?\})</title>", done.stdout)[1].replace("&quot;", '"'))
    assert seen["over"] <= 0, "the page scrolls sideways"
    assert seen["h2"] == 8 and seen["svg"] > 300


def test_doctor_says_how_to_mend(tmp_path):
    done = lwz("doctor", env=os.environ | {"LWZ_CACHE": str(tmp_path), "COLUMNS": "200"})
    assert done.returncode == 1, "without the embedded model nano cannot run"
    assert "lwz prepare" in done.stdout


def test_score_names_the_repeated_passage(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("<think>plan</think><answer>" + "The same sentence stands here again. " * 9 + "</answer>")
    done = lwz("score", text, 40, 60)
    assert done.returncode == 0, done.stderr
    assert "length  1.000" in done.stdout and "The same sentence stands here again" in done.stdout
