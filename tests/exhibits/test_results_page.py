"""Tables of docs/results.md against the committed files, read and averaged without the kit."""

import csv
import re
import statistics
from collections import defaultdict

import pytest

from lwzlib.base.paths import FIGURES
from lwzlib.base.rows import read_yaml
from lwzlib.exhibits import results_page
from lwzlib.exhibits.results import read_tables
from lwzlib.exhibits.results_page import made_part


def _committed(name):
    with (FIGURES / "results" / f"{name}.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _cells(part, *first):
    lines = [[cell.strip() for cell in line.strip("|\n ").split("|")] for line in made_part(part).splitlines()]
    return next(line for line in lines if tuple(line[: len(first)]) == first)


@pytest.mark.parametrize("reward", ["length", "writing", "format"])
def test_a_quarter_of_training_is_the_mean_over_seeds(reward):
    steps = defaultdict(list)
    for row in _committed("nano"):
        if row["arm"] == "base-think":
            steps[row["seed"]].append((int(row["step"]), float(row[reward])))
    runs = [[value for _, value in sorted(rows)] for rows in steps.values()]
    quarters = [[statistics.mean(part) for part in parts] for parts in (
        [run[: len(run) // 4] for run in runs], [run[-len(run) // 4 :] for run in runs])]
    assert _cells("training nano", "base-think", reward)[2:] == [str(len(steps)), *(
        f"{statistics.mean(means):.2f} ({min(means):.2f} to {max(means):.2f})" for means in quarters)]


@pytest.mark.parametrize("arm", ["base-think", "sft"])
def test_a_held_out_row_is_the_mean_of_the_seeds_means_before_and_after(arm):
    values = defaultdict(lambda: defaultdict(list))
    for row in _committed("nano_held_out"):
        if row["arm"] == arm and row["phase"] in ("before", "after"):
            values[row["phase"]][row["seed"]].append(float(row["length"]))
    before, after = ([statistics.mean(of_seed) for of_seed in values[phase].values()] for phase in ("before", "after"))
    cells = _cells("held-out nano", arm, "length")
    assert cells[3:5] == [f"{statistics.mean(before):.2f}", f"{statistics.mean(after):.2f}"]
    changes = [b - a for a, b in zip(before, after, strict=True)]
    half = 3.182446 * statistics.stdev(changes) / 2  # Student's t, 3 degrees of freedom
    change, low, high = (statistics.mean(changes) + part for part in (0, -half, half))
    assert len(changes) == 4 and cells[5] == f"{change:+.2f} [{low:+.2f}, {high:+.2f}]"


def test_every_claim_has_one_verdict_a_setting():
    counted = sum(int(count) for count in re.findall(r"^\| \*\*[\w ]+\*\* \| (\d+) \|", made_part("verdicts"), re.MULTILINE))
    ledger = made_part("ledger").splitlines()[2:]
    assert counted == len(ledger) >= len(read_yaml(FIGURES / "claims.yaml"))


@pytest.mark.parametrize("part", ["rows", "training nano", "held-out nano"])
def test_without_rows_a_table_says_so(tmp_path, monkeypatch, part):
    monkeypatch.setattr(results_page, "_committed", lambda: read_tables(tmp_path))
    assert made_part(part) == "No rows: not run here.\n"


def test_rows_names_each_setting_once():
    settings = [line.split("|")[1].strip() for line in made_part("rows").splitlines()[2:]]
    assert sorted(settings) == sorted(set(settings)) and "nano" in settings
