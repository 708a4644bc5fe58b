"""A stage's folder: its states, what it refuses, and that neither a kill nor a full disk costs what was done."""

import contextlib
import json
import os
import resource
import subprocess
import sys

import pytest
import yaml

from lwzlib.base import provenance, rows, run_folder
from lwzlib.base.provenance import commit_of
from lwzlib.base.recipe import load_recipe
from lwzlib.base.rows import DataError, RunError, append_rows, read_rows, write_atomic
from lwzlib.base.run_folder import Run, status_of


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(rows, "_LOCK_PATIENCE_S", 0)
    monkeypatch.setattr(provenance, "hardware", lambda: "test")  # the real one imports torch


def _run(folder, overrides=None, seed=1, sections=("model", "grpo"), **inputs):
    return Run(folder / "stage", load_recipe("smoke", overrides), seed, sections, inputs)


def _finish(folder, **inputs):
    with _run(folder, **inputs).work():
        pass


@contextlib.contextmanager
def _largest_file(size):
    """No file may grow beyond `size` bytes: a real partial write, as on a disk that fills up."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_run_is_finished_after_its_work_and_not_before(tmp_path):
    run = _run(tmp_path)
    assert (run.status, run.finished) == ({}, False)
    with run.work():
        assert (run.status["state"], run.status["pid"], run.finished) == ("running", os.getpid(), False)
    assert (run.status["state"], run.finished) == ("finished", True)
    assert _run(tmp_path).finished


def test_work_leaves_what_was_asked_and_what_made_it(tmp_path):
    _finish(tmp_path, model_hash="abc")
    content = yaml.safe_load((tmp_path / "stage" / "recipe.yaml").read_text())
    assert (set(content), content["seed"]) == ({"model", "grpo", "seed", "inputs"}, 1)
    assert content["inputs"] == {"model_hash": "abc"}
    made = json.loads((tmp_path / "stage" / "provenance.json").read_text())
    assert {"commit", "versions", "hardware", "started"} <= set(made)


@pytest.mark.parametrize(("error", "state"), [
    (KeyboardInterrupt, "interrupted"), (ValueError, "failed"), (SystemExit, "failed")])
def test_work_that_stops_early_says_how_and_goes_on_later(tmp_path, error, state):
    run = _run(tmp_path)
    with pytest.raises(error), run.work():
        run.update(step=3)
        raise error
    assert (run.status["state"], run.finished) == (state, False)
    with run.work():
        assert run.status["step"] == 3
    assert run.finished


@pytest.mark.parametrize(("changes", "named"), [
    ({"overrides": {"grpo.steps": 9}}, "grpo.steps was 4, is 9"), ({"seed": 2}, "seed was 1, is 2"),
    ({"start": "other"}, "inputs.start was None, is 'other'")])
def test_another_recipe_seed_or_input_is_refused_by_name(tmp_path, changes, named):
    _finish(tmp_path)
    other, before = _run(tmp_path, **changes), _run(tmp_path).status
    with pytest.raises(RunError, match=f"another recipe.*{named}"):
        other.check()
    with pytest.raises(RunError), other.work():
        pytest.fail("entered")
    assert _run(tmp_path).status == before


def test_a_section_that_the_stage_does_not_use_may_change(tmp_path):
    _finish(tmp_path)
    assert _run(tmp_path, {"samples.queries": 1}).finished


def test_rewind_drops_later_rows_and_a_half_written_line(tmp_path):
    run = _run(tmp_path)
    run.folder.mkdir()
    run.append("metrics", *({"step": step, "text": "雨\u2028\ud800\r\n"} for step in (1, 2, 2, 3)))
    whole = (run.folder / "metrics.jsonl").read_bytes()
    (run.folder / "metrics.jsonl").write_bytes(whole + b'{"step": 2, "te')
    assert [row["step"] for row in run.rows()] == [1, 2, 2, 3]
    run.rewind(2, "metrics", "absent")
    assert ([row["step"] for row in run.rows()], run.rows("absent")) == ([1, 2, 2], [])
    run.append("metrics", {"step": 3, "text": "雨\u2028\ud800\r\n"})
    assert (run.folder / "metrics.jsonl").read_bytes() == whole


def test_a_broken_line_that_is_not_the_last_is_an_error(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st\n{"step": 2}\n')
    with pytest.raises(DataError, match=r"metrics.jsonl, line 2 is damaged"):
        read_rows(tmp_path / "metrics.jsonl")


def test_append_to_a_full_device_says_that_the_disk_is_full(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(RunError, match=r"metrics\.jsonl: the disk is full"):
        append_rows(tmp_path / "metrics.jsonl", [{"step": 1}])


@pytest.mark.parametrize("size", [200, 100_000])  # below and above Python's write buffer
def test_append_without_room_leaves_the_file_as_before(tmp_path, size):
    path = tmp_path / "metrics.jsonl"
    append_rows(path, [{"step": 1, "text": "x" * 500}])
    before = path.read_bytes()
    with _largest_file(len(before) + 100), pytest.raises(RunError, match="cannot write"):
        append_rows(path, [{"step": 2, "text": "y" * size}])
    assert path.read_bytes() == before
    append_rows(path, [{"step": 2}])
    assert [row["step"] for row in read_rows(path)] == [1, 2]


def test_write_atomic_without_room_leaves_the_old_file_and_no_scratch(tmp_path):
    write_atomic(tmp_path / "status.json", "old")
    with _largest_file(100), pytest.raises(RunError, match="cannot write"):
        write_atomic(tmp_path / "status.json", "new" * 1000)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("status.json", "old")]


def test_a_status_that_cannot_be_written_stays_the_old_one(tmp_path):
    _finish(tmp_path)
    with _largest_file(10), pytest.raises(RunError, match="cannot write"):
        _run(tmp_path).update(state="running")
    assert _run(tmp_path).finished


def test_a_folder_in_use_is_refused_and_free_again_later(tmp_path):
    with _run(tmp_path).work():
        before = _run(tmp_path).status
        with pytest.raises(RunError, match="in use by another process"):
            _finish(tmp_path)
        assert _run(tmp_path).status == before
    _finish(tmp_path)
    assert _run(tmp_path).finished


def test_a_stage_that_was_killed_is_not_said_to_run(tmp_path):
    stage = tmp_path / "stage"
    assert status_of(stage) == {}
    with _run(tmp_path).work():
        assert status_of(stage)["state"] == "running"
        left = (stage / "status.json").read_text()
    assert status_of(stage)["state"] == "finished"
    (stage / "status.json").write_text(left)  # as a kill leaves it
    assert status_of(stage)["state"] == "killed"
    elsewhere = json.loads(left) | {"host": "another machine"}  # its lock may not be seen here
    (stage / "status.json").write_text(json.dumps(elsewhere))
    assert status_of(stage)["state"] == "running"


def test_rows_that_several_commits_made_name_none_as_the_whole_truth(tmp_path, monkeypatch):
    def work(commit, dirty, versions="1"):
        made = {"commit": commit, "uncommitted_changes": dirty, "versions": {"torch": versions}}
        monkeypatch.setattr(run_folder, "provenance", lambda: made)
        with contextlib.suppress(ValueError), _run(tmp_path).work():
            raise ValueError
        return json.loads((tmp_path / "stage" / "provenance.json").read_text())

    assert commit_of(work("a" * 40, False)) == "a" * 40
    assert commit_of(work("a" * 40, False)) == "a" * 40, "the same again is no change"
    assert "resumed" not in work("a" * 40, False)
    assert commit_of(work("a" * 40, False, "2")) == "a" * 40, "versions are kept, and are no change of the code"
    made = work("b" * 40, False, "2")
    assert commit_of(made) == "a" * 40 + "+" and [later["commit"] for later in made["resumed"]] == ["a" * 40, "b" * 40]
    assert commit_of({"commit": "a" * 40, "uncommitted_changes": True}) == "a" * 40 + "+"
    assert commit_of({"commit": None, "uncommitted_changes": None}) is None


def _damage(path, content):
    path.write_bytes(content)


@pytest.mark.parametrize("content", [b"", b"\0" * 200, b'{"state": "fin'])
def test_a_status_that_a_power_loss_damaged_is_made_anew_and_the_stage_goes_on(tmp_path, content, capsys):
    run = _run(tmp_path)
    with contextlib.suppress(KeyboardInterrupt), run.work():
        run.append("metrics", *({"step": n} for n in range(1, 8)))
        for step in (2, 4, 10):
            (run.folder / "checkpoints" / f"checkpoint-{step}").mkdir(parents=True)
        for step in (2, 4):
            state = run.folder / "checkpoints" / f"checkpoint-{step}" / "trainer_state.json"
            state.write_text(json.dumps({"global_step": step}))
        (run.folder / "checkpoints" / "checkpoint-10" / "trainer_state.json").write_bytes(b"\0\0")
        raise KeyboardInterrupt
    _damage(run.folder / "status.json", content)
    assert status_of(run.folder) == {"state": "damaged"} and not run.finished
    with pytest.raises(RunError, match="holds a run of another recipe"):
        assert _run(tmp_path, {"grpo.steps": 77}).finished
    with run.work():
        assert run.status["checkpoint"] == "checkpoint-4", "the last that is whole"
        run.rewind(run.status["checkpoint_step"], "metrics")
        assert [row["step"] for row in run.rows()] == [1, 2, 3, 4]
    assert run.finished and "goes on from checkpoint-4" in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"\0" * 9, None])
def test_what_made_the_first_rows_is_unknown_once_its_file_is_lost(tmp_path, content):
    _finish(tmp_path)
    path = tmp_path / "stage" / "provenance.json"
    path.unlink() if content is None else _damage(path, content)
    _damage(tmp_path / "stage" / "status.json", b"")
    _finish(tmp_path)
    made = json.loads(path.read_text())
    assert made["commit"] is None and commit_of(made) is None and made["hardware"] == "unknown"
    assert [later["hardware"] for later in made["resumed"]] == ["test"]


def test_damaged_rows_after_the_checkpoint_are_dropped_and_others_named(tmp_path):
    run = _run(tmp_path)
    with run.work():
        run.append("metrics", *({"step": n} for n in range(1, 7)))
    path = run.folder / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:4], b"\0" * 40 + lines[4], *lines[5:]]))
    with pytest.raises(DataError, match=r"metrics.jsonl, line 5 is damaged: restore the file, or make it again"):
        run.rows()
    with pytest.raises(DataError, match=r"line 5 is damaged"):
        run.rewind(5, "metrics")
    run.rewind(3, "metrics")
    assert [row["step"] for row in run.rows()] == [1, 2, 3]
    path.write_bytes(b"\0\n" + lines[1])
    run.rewind(0, "metrics")
    assert run.rows() == [], "from the start nothing is needed"


@pytest.mark.parametrize("content", [b"", b"\0\0", None])
def test_a_recipe_that_is_lost_with_the_status_is_named(tmp_path, content):
    _finish(tmp_path)
    _damage(tmp_path / "stage" / "status.json", b"[]")
    path = tmp_path / "stage" / "recipe.yaml"
    path.unlink() if content is None else _damage(path, content)
    with pytest.raises(DataError, match=r"recipe.yaml is damaged or lost: restore it, or remove .*stage and run the same"):
        _finish(tmp_path)


def test_a_machine_without_git_leaves_the_commit_unknown_and_says_so_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    provenance._git_installed.cache_clear()
    try:
        for name in ("one", "two"):
            with _run(tmp_path / name).work():
                pass
            made = json.loads((tmp_path / name / "stage" / "provenance.json").read_text())
            assert made["commit"] is None and made["uncommitted_changes"] is None and commit_of(made) is None
    finally:
        provenance._git_installed.cache_clear()
    assert capsys.readouterr().err.count("git is not installed: the commit that makes these results stays unknown") == 1


@pytest.mark.parametrize("forgets", [True, False])
def test_each_stage_says_how_much_memory_it_needed_also_after_a_larger_one_in_the_same_process(tmp_path, forgets):
    """A system that cannot forget a peak (some containers) leaves that of the smaller stage unknown."""
    code = ("import sys; from pathlib import Path; sys.path[:0] = sys.argv[3:]; from test_run_folder import _run\n"
            "from lwzlib.base import processes\n"
            "if sys.argv[2] == 'False':\n"
            "    processes.Path = lambda name: Path(name.replace('clear_refs', 'no/clear_refs'))\n"
            "for name, mib in (('large', 400), ('small', 1)):\n"
            "    with _run(Path(sys.argv[1]) / name).work():\n"
            "        b'x' * (mib * 2**20)\n"  # written to, so that it is resident
            "print(processes.forget_peak_memory())")
    ended = subprocess.run([sys.executable, "-c", code, tmp_path, str(forgets), *sys.path], check=True, capture_output=True,
                           text=True)
    large, small = (status_of(tmp_path / name / "stage")["host_peak_gib"] for name in ("large", "small"))
    assert large > 0.4
    if float(ended.stdout.split()[-1]):
        assert small is None
    else:
        assert forgets and large > small + 0.3 and small > 0
