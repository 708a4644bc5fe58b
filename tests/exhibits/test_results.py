"""Every number has its source: published rows their exhibit and confidence, own rows what made them."""

import json

import made_results as made
import numpy as np
import pandas as pd
import pytest
import yaml

from lwzlib.base.marks import published_marks
from lwzlib.base.recipe import flatten, load_recipe
from lwzlib.base.rows import DataError, write_rows
from lwzlib.exhibits import catalogue, results
from lwzlib.exhibits.results import read_tables
from lwzlib.exhibits.run_tables import mixture_rows


def test_every_committed_row_says_what_made_it():
    tables = read_tables()
    assert {*tables.rl.seed} >= {0} and len(tables.rl) and tables.rl.commit.str.fullmatch("[0-9a-f]{40}").all()
    assert set(tables.published.confidence) == {"A", "B"} and tables.published.source.str.len().min() > 10


def test_published_quantities_are_those_of_the_papers_recipe():
    method = read_tables().published.query("exhibit == 'Method'").set_index("metric")
    quantities, marks = flatten(load_recipe("paper").model_dump(exclude={"arms"})), published_marks()
    shared = method.index.intersection(list(quantities))
    assert len(shared) == 14
    for name in shared:
        assert quantities[name] == method.value[name] and marks[name][0] == method.confidence[name], name


def test_what_is_not_published_is_absent():
    table = read_tables().published.query("exhibit == 'Table 1'").groupby("model").metric.agg(set)
    assert table["Qwen2.5-Max"] == {"avg"} and table["DeepSeek-V3"] == {"Elo"}
    assert {"Table 3", "Table 4", "Table 5"}.isdisjoint(read_tables().published.exhibit)


@pytest.mark.parametrize("column", ["model", "arm", "seed", "fingerprint", "commit", "hardware", "versions", "step"])
@pytest.mark.parametrize("kind", ["rl", "held_out"])
def test_a_row_without_its_provenance_is_refused_by_file_line_and_field(tmp_path, kind, column):
    table = getattr(made, kind)().astype(object)
    table.loc[4, column] = None
    made.write(tmp_path, **{kind: table})
    with pytest.raises(DataError, match=rf"nano(_held_out)?\.csv, line 6: {column}|line 6: .*needs its RL step"):
        read_tables(tmp_path)


@pytest.mark.parametrize(("kind", "change", "said"), [
    ("rl", lambda t: t.assign(commit="abc"), "line 2: commit = 'abc'"),
    ("rl", lambda t: t.drop(columns="commit"), "line 2: commit: Field required"),
    ("rl", lambda t: t.assign(length="high"), "line 2: length = 'high'"),
    ("rl", lambda t: t.assign(writing=np.inf), "line 2: writing = 'inf'"),
    ("rl", lambda t: pd.concat([t, t[:1]]), "base-nothink / 0 / 1 was already at line 2"),
    ("rl", lambda t: t.assign(fingerprint=["f" * 16, *t.fingerprint[1:]]), "line 3: .*rows of two runs"),
    ("held_out", lambda t: t.assign(judge=""), "line 2: .*a writing score needs its judge"),
    ("held_out", lambda t: t.assign(phase="later"), "line 2: phase = 'later'"),
    ("held_out", lambda t: pd.concat([t, t[:1]]), "base-nothink / 0 / before / 0 / q0 was already")])
def test_rows_that_cannot_be_right_are_refused(tmp_path, kind, change, said):
    made.write(tmp_path, **{kind: change(getattr(made, kind)())})
    with pytest.raises(DataError, match=said):
        read_tables(tmp_path)


def test_tables_of_a_setting_and_of_none(tmp_path):
    tables = read_tables(made.write(made.write(tmp_path, rl=made.rl(), held_out=made.held_out()), "gpu", rl=made.rl((0,))))
    assert tables.settings == ["nano", "gpu"]
    assert len(tables.of("gpu").rl) == 24 and tables.of("gpu").held_out.empty and len(tables.of("nano").rl) == 72
    none = read_tables(tmp_path / "none")
    assert none.settings == [] and none.of("nano").elo.empty and len(none.published)


def test_no_published_numbers_is_a_clear_error(tmp_path):
    with pytest.raises(DataError, match=f"no published numbers in {tmp_path}"):
        read_tables(published=tmp_path)


def test_elo_follows_the_scores_and_only_within_a_seed():
    table = made.held_out().assign(setting="nano")
    found = results.embedded_elo(table).set_index(["arm", "step"]).elo
    assert found["base-nothink", 0] == 1000
    ends = [found["continual-pretrain-think", made.STEPS], found["base-think", made.STEPS], found["base-nothink", made.STEPS]]
    assert ends == sorted(ends, reverse=True) and found["base-think", 0] < 1000
    shifted = table.assign(writing=table.writing + 100 * table.seed)
    pd.testing.assert_frame_equal(results.embedded_elo(shifted), results.embedded_elo(table)), "each seed has its own judge"
    judged = results.judgments(table)
    assert set(judged.seed) == {0, 1, 2} and judged.judge.nunique() == 3
    players = 3 * 3 + 2 * 2
    assert len(judged) == 3 * made.QUERIES * players * (players - 1), "every pair, in both orders"


def test_elo_equals_an_independent_fit():
    """One query list, two players: the rating is the logit of the win rate."""
    table = made.held_out((0,), {arm: made.ARMS[arm] for arm in ("base-nothink",)}).assign(setting="nano")
    table = table[table.phase != "during"]
    wins = table.id.isin([f"q{i}" for i in range(9)])
    table["writing"] = np.where((table.phase == "after") == wins, 2.0, 1.0)
    after = results.embedded_elo(table).set_index("step").elo[float(made.STEPS)]
    assert after == pytest.approx(1000 + 400 * np.log10(9 / 3), abs=1e-6)


def test_mixture_of_a_run_is_exported_with_its_provenance(tmp_path):
    pack = tmp_path / "run" / "pack"
    pack.mkdir(parents=True)
    assert mixture_rows(tmp_path / "run").empty
    (pack / "recipe.yaml").write_text(yaml.safe_dump({
        "seed": 4, "model": {"name": "kit:tiny"}, "pretrain": {"cot_token_fraction": 0.2}, "inputs": {},
        "corpus": {"sources": [{"at": "a", "language": "en", "weight": 1.0}]}}))
    (pack / "status.json").write_text(json.dumps({"fingerprint": "a" * 16}))
    (pack / "provenance.json").write_text(json.dumps({
        "commit": "b" * 40, "uncommitted_changes": False, "hardware": "a desk", "versions": {"torch": "9"}}))
    write_rows(pack / "shards.jsonl", [{"sequences": 1, "padding": 0, "tokens": {"a (en)": 80, "cot": 20}, "epochs": {}}])
    made.write(tmp_path / "rows", "mine", mixture=mixture_rows(tmp_path / "run"))
    found = read_tables(tmp_path / "rows").mixture.set_index("source")
    assert found.tokens.to_dict() == {"a (en)": 80, "cot": 20} and set(found.seed) == {4} and set(found.setting) == {"mine"}
    table = catalogue.EXHIBITS["table_2"].make(read_tables(tmp_path / "rows").of("mine"))
    assert table[table.source == "measured"].share.tolist() == ["80.0%", "20.0%"]
