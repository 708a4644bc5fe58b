"""Figures are pure functions of committed rows: same bytes, gaps for what is missing, provenance on every row."""

import json

import pandas as pd
import pytest
import yaml
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from lwzlib.base.rows import write_rows
from lwzlib.evaluate import intervals
from lwzlib.exhibits import figures
from lwzlib.exhibits.page import write_report
from lwzlib.exhibits.run_tables import held_out_changes, held_out_table, mixture_table, padding_share, run_table


def test_a_quantity_that_was_not_measured_is_a_gap_that_says_so():
    table = pd.DataFrame({"arm": "a", "seed": 0, "step": [1, 2], "length": [0.1, 0.2]})
    assert "not run here" in figures.svg(figures.panel(table, ("length", "writing")))


def sampled(folder, arm, algorithm, start, **lengths):
    """Held-out samples of an arm: the length reward of each query, by phase."""
    for phase, values in lengths.items():
        stage = folder / arm / f"samples-{phase}"
        stage.mkdir(parents=True)
        (stage / "recipe.yaml").write_text(yaml.safe_dump(
            {"seed": 3, "model": {"name": "kit:tiny"}, "inputs": {"algorithm": algorithm, "start": start, "prompt": "direct"}}
            | ({"grpo": {"steps": 8}} if phase == "after" else {})))
        (stage / "status.json").write_text(json.dumps({"fingerprint": "f", "state": "finished", "wall_s": 12.5}))
        (stage / "provenance.json").write_text(json.dumps(
            {"commit": None, "uncommitted_changes": None, "versions": {"torch": "9.9"}, "python": "3", "hardware": "a desk",
             "started": "2025-01-01T00:00:00Z"}))
        write_rows(stage / "samples.jsonl", [
            {"step": i, "id": f"q{i}", "query": f"Question {i}?", "word_range": [1, 9], "completion": f"<answer>{arm}</answer>",
             "truncated": False, "answer_words": 1, "think_words": 0, "length": value} for i, value in enumerate(values)])


@pytest.fixture
def held_out(tmp_path):
    sampled(tmp_path, "sft", "sft", "base", before=[0.2, 0.4, 0.3], after=[0.3, 0.5, 0.4])
    sampled(tmp_path, "base-think", "grpo", "base", before=[0.1, 0.9, 0.5], after=[0.9, 0.1])
    sampled(tmp_path, "another", "grpo", "continual-pretrain", before=[0.5, 0.5, 0.5])
    return tmp_path


def test_held_out_table_has_both_phases_of_every_arm_with_samples(held_out):
    table = held_out_table(held_out)
    assert list(table.arm.unique()) == ["base-think", "sft", "another"], "the paper's arms first"
    assert table.groupby(["arm", "phase"]).size().to_dict() == {
        ("base-think", "before"): 3, ("base-think", "after"): 2, ("sft", "before"): 3, ("sft", "after"): 3,
        ("another", "before"): 3}
    steps = table.groupby(["arm", "phase"]).step.first()
    assert (steps["base-think", "before"], steps["base-think", "after"]) == (0, 8) and pd.isna(steps["sft", "after"])
    assert table.groupby("arm").algorithm.first().to_dict() == {"sft": "sft", "base-think": "grpo", "another": "grpo"}
    assert table[table.arm == "another"].start.eq("continual-pretrain").all() and table.seed.eq(3).all()


def test_changes_are_of_the_same_queries(held_out):
    gains = held_out_changes(held_out_table(held_out)).set_index("arm")
    assert "another" not in gains.index, "no sample after its training"
    assert gains.queries.to_dict() == {"base-think": 2, "sft": 3}
    assert gains.before["base-think"] == pytest.approx(0.5), "the third query has no answer after"
    assert gains.difference["sft"] == pytest.approx(0.1)
    assert (gains.low["sft"], gains.high["sft"]) == pytest.approx((0.1, 0.1)), "each query gained the same"
    assert gains.low["base-think"] <= -0.8 < 0.8 <= gains.high["base-think"]


def test_interval_covers_the_true_mean_about_as_often_as_it_says():
    import numpy as np

    random = np.random.default_rng(0)
    ends = [intervals.bootstrap_mean(random.normal(2, 1, 40))[1:] for _ in range(60)]
    assert 0.85 <= np.mean([low < 2 < high for low, high in ends]) <= 1
    assert np.isnan(intervals.bootstrap_mean([0.5])[1:]).all(), "one value has no interval"


def packed(folder, fraction, shards):
    folder.mkdir(parents=True)
    sources = [{"at": "a", "language": "en", "weight": 3.0}, {"at": "b", "language": "zh", "weight": 1.0}]
    (folder / "recipe.yaml").write_text(yaml.safe_dump(
        {"corpus": {"sources": sources}, "pretrain": {"cot_token_fraction": fraction}, "inputs": {}}))
    write_rows(folder / "shards.jsonl", shards)
    return folder


def test_mixture_shares_sum_to_one_and_stand_beside_what_was_asked(tmp_path):
    pack = packed(tmp_path / "pack", 0.2, [
        {"sequences": 3, "padding": 0.1, "tokens": {"a (en)": 60, "b (zh)": 20, "cot": 25}, "epochs": {"a (en)": 1}},
        {"sequences": 1, "padding": 0.5, "tokens": {"a (en)": 60, "b (zh)": 20, "cot": 15}, "epochs": {"a (en)": 3}}])
    table = mixture_table(pack).set_index("source")
    assert table.share.sum() == pytest.approx(1) and table.asked.sum() == pytest.approx(1)
    assert table.share.to_dict() == pytest.approx({"a (en)": 0.6, "b (zh)": 0.2, "cot": 0.2})
    assert table.asked.to_dict() == pytest.approx({"a (en)": 0.6, "b (zh)": 0.2, "cot": 0.2})
    assert table.epochs["a (en)"] == 2 and pd.isna(table.epochs["cot"]), "what was not counted is a gap"
    assert padding_share(pack) == pytest.approx(0.2), "weighted by sequences"
    ax = figures.mixture(table.reset_index(), Figure().subplots())
    assert [bar.get_width() for bar in ax.patches] == pytest.approx([0.6, 0.2, 0.2])


def test_an_empty_table_draws_nothing(tmp_path):
    drawn = [figures.mixture(mixture_table(tmp_path), Figure().subplots()),
             figures.held_out(held_out_table(tmp_path), Figure().subplots(), "length"),
             figures.curve(run_table(tmp_path), Figure().subplots(), "length"),
             figures.boundaries(pd.DataFrame(columns=["sequence", "source", "tokens"]), Figure().subplots(), 8)]
    assert not any([*ax.lines, *ax.patches, *ax.collections] for ax in drawn)
    assert pd.isna(padding_share(tmp_path)) and held_out_changes(held_out_table(tmp_path)).empty


def test_held_out_marks_each_phase_and_dashes_sft(held_out):
    table = held_out_table(held_out)
    ax = figures.held_out(table, Figure().subplots(), "length")
    points = [line for line in ax.lines if line.get_marker() not in ("None", None, "")]
    assert len(points) == 5, "before and after of two arms, before of the third"
    assert sum(to_hex(line.get_markerfacecolor()) == "#ffffff" for line in points) == 3, "open: before"
    dashed = {line.get_color() for line in ax.lines if line.get_linestyle() == "--"}
    assert dashed == {figures.ARMS["sft"][0]}


def test_boundaries_draw_each_document_at_its_place():
    table = pd.DataFrame({"sequence": [7, 7, 9], "source": ["b", "a", "a"], "tokens": [3, 4, 6]})
    ax = figures.boundaries(table, Figure().subplots(), 8)
    found = sorted((round(bar.get_y() + bar.get_height() / 2, 6), bar.get_x(), bar.get_width()) for bar in ax.patches)
    assert found == [(0, 0, 3), (0, 3, 4), (1, 0, 6)]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["7", "9"]


def test_seven_arms_are_told_apart_and_drawn():
    arms = [*figures.ARMS, "mine", "yours"]
    chosen = figures.styles(arms)
    assert len({colour for colour, _, _ in chosen.values()}) == len({marker for *_, marker in chosen.values()}) == 7
    assert {arm for arm, (_, dash, _) in chosen.items() if dash == "--"} == {"sft", "continual-pretrain-sft"}
    assert figures.styles(["base-think"])["base-think"] == chosen["base-think"], "alike in every figure"
    table = pd.DataFrame([{"arm": arm, "seed": 0, "step": step, "length": 0.5} for arm in arms for step in (1, 2)])
    labels = figures.curve(table, Figure().subplots(), "length").get_legend_handles_labels()[1]
    assert sorted(labels) == sorted(arms)


def test_the_page_shows_arms_without_rl_and_what_was_packed(held_out):
    packed(held_out / "pack", 0.0, [
        {"sequences": 2, "tokens": {"a (en)": 90, "b (zh)": 30}, "epochs": {"a (en)": 1.0, "b (zh)": 0.5}, "padding": 0.25}])
    (held_out / "pretrain").mkdir()
    write_rows(held_out / "pretrain" / "perplexity.jsonl", [
        {"step": 1, "when": "before", "source": "a (en)", "tokens": 9, "perplexity": 31.25},
        {"step": 2, "when": "after", "source": "a (en)", "tokens": 9, "perplexity": None}])
    page = write_report(held_out).read_text()
    for part in ("No arm was trained", "sft, before", "sft, after", "base-think, after", "Continual pretraining", "31.25",
                 "25.0% of the packed", "+0.100 to +0.100", "12.5", "a desk, Python 3, torch 9.9"):
        assert part in page, part
