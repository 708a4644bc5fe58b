"""Trackers, read back from their own files: the rows of metrics.jsonl, no step lost or twice after kills, no key anywhere."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
from killing import at_step, killed_then_finished
from smoke_runs import ARM, COMMON

from lwzlib.base import trackers
from lwzlib.base.recipe import RecipeError, load_recipe
from lwzlib.base.rows import RunError
from lwzlib.base.run_folder import Run
from lwzlib.cluster import readiness
from lwzlib.pipeline.stages import run_stage, stage_run

LOCAL = ["tensorboard", "trackio"]
needs = pytest.mark.skipif(not all(map(importlib.util.find_spec, LOCAL)), reason="needs the extra `trackers`")
needs_wandb = pytest.mark.skipif(not importlib.util.find_spec("wandb"), reason="needs wandb, which is in no extra")


@pytest.fixture
def recipe(smoke, tmp_path, monkeypatch):
    """`smoke` with trackers; what Trackio keeps lies in a folder of its own."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    return lambda names, *sets: load_recipe("smoke", COMMON, {"tracking.report_to": names, "evaluation.every_steps": 0}, *sets)


def in_tensorboard(run) -> dict[int, dict]:
    """{step: values} of all events in the run's folder, those too that a viewer would leave out."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    seen = EventAccumulator(str(run.folder / "tensorboard"), purge_orphaned_data=False).Reload()
    points = [(point.step, name, point.value) for name in seen.Tags()["scalars"] for point in seen.Scalars(name)]
    assert len({point[:2] for point in points}) == len(points), "a step stands there twice"
    return {step: {name: value for at, name, value in points if at == step} for step in {point[0] for point in points}}


def in_trackio(project, folder) -> dict[str, dict[int, dict]]:
    """{name of a run: {step: values}} of a project, by Trackio's own reader, in a process that did not write."""
    code = ("import json, sys; from trackio.sqlite_storage import SQLiteStorage as kept; "
            f"print(json.dumps({{run: kept.get_logs({project!r}, run) for run in kept.get_runs({project!r})}}))")
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"TRACKIO_DIR": str(folder)}, capture_output=True,
                          text=True, check=True)
    logs = json.loads(done.stdout.splitlines()[-1])
    for rows in logs.values():
        assert len({row["step"] for row in rows}) == len(rows), "a step stands there twice"
    return {name: {row.pop("step"): {key: value for key, value in row.items() if key != "timestamp"} for row in rows}
            for name, rows in logs.items()}


def numbers(run) -> dict[int, dict]:
    return {row["step"]: {name: value for name, value in row.items() if name != "step" and value is not None}
            for row in run.rows()}


def same(shown, rows):
    assert {step: pytest.approx(values, rel=1e-6) for step, values in rows.items()} == shown  # TensorBoard's are float32


@needs
def test_a_stage_that_is_killed_twice_is_shown_whole_under_the_names_of_its_rows(recipe, tmp_path):
    made = recipe(LOCAL)
    run = killed_then_finished("grpo", made, tmp_path / "run", [at_step(1), at_step(3)], ARM)
    rows = numbers(run)
    assert list(rows) == [1, 2, 3, 4]
    assert {"length", "format", "advantage_std", "advantage_std/length", "advantage_std/format", "answer_words",
            "completion_tokens", "truncated", "loss"} <= set(rows[1])
    same(in_tensorboard(run), rows)
    shown = in_trackio("smoke", tmp_path / "trackio")
    (name,) = shown
    assert name.startswith(f"{ARM}/grpo seed 0 ")
    same(shown[name], rows)


@needs
def test_stages_and_folders_are_runs_of_their_own_and_change_no_result(recipe, tmp_path):
    made = recipe(["trackio"], "grpo.steps=2")
    silent = recipe([], "grpo.steps=2")
    runs = [killed_then_finished("grpo", one, tmp_path / name, [], ARM)  # Trackio reads TRACKIO_DIR when it is imported
            for name, one in (("a", made), ("b", made), ("c", silent))]
    assert runs[0].fingerprint == runs[2].fingerprint and made.fingerprint() == silent.fingerprint()
    shown = in_trackio("smoke", tmp_path / "trackio")
    assert len(shown) == 2
    for values in shown.values():
        assert list(values) == [1, 2]
    assert {step: row["loss"] for step, row in numbers(runs[0]).items()} == {
        step: row["loss"] for step, row in numbers(runs[2]).items()}
    assert not list((tmp_path / "c").rglob("tensorboard")), "off by default"


@needs
def test_trackers_show_the_other_stages_that_train(recipe, tmp_path):
    made = recipe(["tensorboard"], {"cold_start.queries": 2})
    run_stage("cold-start", made, tmp_path, 0)
    run = stage_run("cold-start", made, tmp_path, 0)
    same(in_tensorboard(run), numbers(run))
    assert "loss" in numbers(run)[1]


@needs_wandb
def test_wandb_gets_the_rows_offline_and_its_key_stays_in_the_environment(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", "5ecret" * 7)
    made = recipe(["wandb"], "grpo.steps=2")
    run_stage("grpo", made, tmp_path / "run", 0, ARM)
    (kept,) = (tmp_path / "run").rglob("run-*.wandb")
    assert kept.stat().st_size > 0 and b"advantage_std/length" in kept.read_bytes()
    assert not [path for path in (tmp_path / "run").rglob("*") if path.is_file() and b"5ecret" in path.read_bytes()]


def test_an_unknown_tracker_is_refused_at_load():
    with pytest.raises(RecipeError, match=r"tracking\.report_to\.0 = 'tensorbord': Input should be 'tensorboard', 'trackio'"):
        load_recipe("nano", "tracking.report_to=[tensorbord]")


def test_a_tracker_that_is_not_installed_is_told_before_anything_is_trained(recipe, tmp_path, monkeypatch):
    made = recipe(["tensorboard", "wandb"], {"cold_start.queries": 2})
    monkeypatch.setattr(readiness, "find_spec", lambda name: name not in trackers.TRACKERS)
    with pytest.raises(RunError, match=r"not installed: tensorboard, wandb: pip install .*trackers.*; pip install wandb"):
        readiness.check_stage("cold-start", made)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # in a notebook, where no command checks first
    with pytest.raises(RunError, match=r"tracking\.report_to: tensorboard cannot start: ModuleNotFoundError"):
        run_stage("cold-start", made, tmp_path, 0)
    assert not (tmp_path / "cold-start" / "metrics.jsonl").exists() or not stage_run("cold-start", made, tmp_path, 0).rows()


def test_a_tracker_that_fails_is_left_out_and_the_run_goes_on(recipe, tmp_path, monkeypatch, capsys):
    seen = []

    def log(values, step):
        seen.append(step)
        if step == 2:
            raise OSError("the line is dead")

    monkeypatch.setitem(trackers.TRACKERS, "wandb", lambda run: trackers.Tracker(0, log, lambda: seen.append("closed")))
    run = Run(tmp_path / "stage", recipe(["wandb"]), 0, ("grpo",), {})
    with run.work():
        run.append("metrics", {"step": 1, "loss": 0.5, "kl": None})
        open_trackers = trackers.Trackers(run)
        for step in (2, 3):
            open_trackers.log({"step": step, "loss": 0.5})
        open_trackers.close()
    assert seen == [1, 2]
    assert "wandb failed (OSError: the line is dead) and gets no more rows" in capsys.readouterr().out
