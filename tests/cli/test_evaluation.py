"""The arena from the command line: judged by the run's own Writing RM, rated again from the file, and by a person."""

import json
import shutil

import pytest
from typer.testing import CliRunner

from lwzlib.base.rows import DataError, read_rows, write_rows
from lwzlib.cli import main
from lwzlib.evaluate import arena, elo
from lwzlib.evaluate.elo import ArenaError


def lwz(*words):
    done = CliRunner().invoke(main.app, list(map(str, words)), catch_exceptions=False, env={"COLUMNS": "150"})
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture
def run_dir(smoke_rm, tmp_path):
    """Two arms that answered five queries, one of them nothing at all to the last."""
    shutil.copytree(smoke_rm / "writing-rm", tmp_path / "writing-rm")
    for arm, words in (("plain", "It rains."), ("loud", "RAIN! RAIN! RAIN! and thunder too")):
        for phase in ("before", "after"):
            folder = tmp_path / arm / f"samples-{phase}"
            folder.mkdir(parents=True)
            write_rows(folder / "samples.jsonl", (
                {"id": f"q{n}", "query": f"Write of {n}.", "type": "story",
                 "completion": f"<answer>{f'{n} {words} {phase}' if (arm, n) != ('loud', 4) else ''}</answer>"}
                for n in range(5)))
    return tmp_path


def test_arena_judges_every_pair_in_both_orders_and_elo_reads_the_file(run_dir):
    said = lwz("arena", run_dir, "--anchor", "plain before")
    judgments = read_rows(run_dir / "arena.jsonl")
    assert len(judgments) == 6 * 2 * 5 and {row["winner"] for row in judgments} <= {"first", "second", "tie"}
    assert "it shows what they learnt, not how" in said and "plain before = 1000" in said
    again = lwz("elo", run_dir / "arena.jsonl", "--anchor", "plain before")
    assert said.endswith(again), "the same table from the recorded judgments"
    rated = elo.ratings(arena.read_judgments(run_dir / "arena.jsonl"), "plain before").table
    assert all(f"{value:.0f}" in said for value in rated.elo)


def test_a_sheet_is_written_for_a_rater_and_its_export_becomes_judgments(run_dir):
    sheet = run_dir / "rate.html"
    lwz("rate", run_dir, "--to", sheet)
    key = json.loads((run_dir / "rate.key.json").read_text())
    assert len(key["pairs"]) == 5 and "samples" not in sheet.read_text()
    export = run_dir / "export.json"
    export.write_text(json.dumps({"sheet": key["sheet"], "rater": "Ann", "choices": dict.fromkeys(key["pairs"], "left")}))
    assert "5 judgments" in lwz("unblind", export, run_dir / "rate.key.json", "--to", run_dir / "ann.jsonl")
    found = arena.read_judgments(run_dir / "ann.jsonl")
    assert set(found.judge) == {"Ann"} and set(found.winner) == {"first"} and len(found) == 5
    other = run_dir / "bob.json"
    other.write_text(export.read_text().replace("Ann", "Bob"))
    with pytest.raises(DataError, match=r"ann.jsonl holds the judgments of Ann: give --to another file"):
        lwz("unblind", other, run_dir / "rate.key.json", "--to", run_dir / "ann.jsonl")
    lwz("unblind", other, run_dir / "rate.key.json")
    for name in ("Ann", "Bob"):
        assert set(arena.read_judgments(run_dir / f"{name.lower()}.jsonl").judge) == {name}


def test_a_folder_without_samples_says_so(tmp_path):
    with pytest.raises(ArenaError, match="no samples in"):
        lwz("rate", tmp_path)
