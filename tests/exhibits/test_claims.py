"""Verdicts follow from rows: they change with them, and none is given without an interval that excludes the opposite."""

import itertools
import re
import shlex
from pathlib import Path

import made_results as made
import numpy as np
import pandas as pd
import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ttest_1samp

from lwzlib.base.recipe import load_recipe
from lwzlib.base.rows import DataError
from lwzlib.cli import main
from lwzlib.exhibits import claims, results
from lwzlib.exhibits.claims import combined_verdict, examine_test, ledger_markdown, load_claims, verdict_of
from lwzlib.exhibits.results import read_tables

ROOT = Path(__file__).resolve().parents[2]
BOOK = {claim.id: claim for claim in load_claims()}


def tables(tmp_path, **kinds):
    return read_tables(made.write(tmp_path, **kinds))


def verdicts(found):
    return {entry.claim.id: entry.verdict for entry in claims.ledger(list(BOOK.values()), found)}


def test_the_ledger_holds_the_papers_claims_and_the_reviewers_questions():
    assert {"averaging", "think-overtakes", "think-starts-lower", "plan-saturates", "cpt-starts-higher", "cpt-ends-higher",
            "sft-does-not-profit", "rl-beats-sft", "beats-100b"} <= {c.id for c in BOOK.values() if c.of == "paper"}
    assert {"kl-beta", "plan-cap", "length-hacking", "judge-bias", "small-scale"} <= {
        c.id for c in BOOK.values() if c.of == "reviewers"}


@pytest.mark.parametrize("claim", BOOK.values(), ids=BOOK)
def test_notebook_command_and_arms_of_each_claim_exist(claim):
    assert (ROOT / "notebooks" / f"{claim.notebook}.ipynb").is_file()
    program, command, *words = shlex.split(claim.command)
    known = typer.main.get_command(main.app).commands
    assert program == "lwz" and command in known
    known[command].make_context(command, list(words), resilient_parsing=False)
    if command == "run":
        sets = [after for before, after in itertools.pairwise(words) if before == "-s"]
        asked = load_recipe(words[0], sets)
        arms = {term.split()[0] for test in claim.tests for term in test.contrast}
        assert arms <= set(asked.arms), f"{claim.command} does not make {arms - set(asked.arms)}"


def test_verdicts_change_when_rows_change(tmp_path):
    found = verdicts(tables(tmp_path, rl=made.rl(), held_out=made.held_out()))
    assert {name for name, verdict in found.items() if verdict == "supported"} == {
        "rewards-rise", "think-starts-lower", "think-overtakes", "plan-saturates", "cpt-starts-higher", "cpt-ends-higher",
        "rl-beats-sft", "rl-heeds-length"}
    assert {name for name, verdict in found.items() if verdict == "not run"} == {
        "averaging", "beats-100b", "kl-beta", "plan-cap", "length-hacking", "dilution", "judge-bias",
        "writing-rm"}
    turned = made.held_out()
    turned["writing"] = -turned.writing
    falling = made.rl().assign(writing=lambda t: -t.writing, think_tokens=lambda t: 10 * 2 ** ((t.step + 1) // 2))
    found = verdicts(tables(tmp_path, rl=falling, held_out=turned))
    assert found["cpt-starts-higher"] == found["rl-beats-sft"] == found["rewards-rise"] == "not supported"
    assert found["plan-saturates"] == "not supported"
    (tmp_path / "nano_held_out.csv").unlink()
    assert verdicts(read_tables(tmp_path))["cpt-starts-higher"] == "not run"


def test_one_seed_decides_nothing_and_says_so(tmp_path):
    entries = claims.ledger(list(BOOK.values()), tables(tmp_path, rl=made.rl((0,)), held_out=made.held_out((0,))))
    assert {entry.verdict for entry in entries} == {"inconclusive", "not run"}
    said = [str(finding) for entry in entries for finding in entry.findings]
    assert said and all(re.search(r"over \d+ (queries|steps); one seed, so no interval over seeds", line) for line in said)


def test_each_setting_has_a_verdict_of_its_own(tmp_path):
    made.write(tmp_path, "gpu", held_out=made.held_out().assign(writing=lambda t: -t.writing))
    entries = claims.ledger([BOOK["cpt-starts-higher"]], tables(tmp_path, held_out=made.held_out()))
    assert {entry.setting: entry.verdict for entry in entries} == {"nano": "supported", "gpu": "not supported"}


def test_intervals_are_students_over_queries_and_over_seeds(tmp_path):
    held_out = made.held_out()
    finding = examine_test(BOOK["think-overtakes"].tests[0], tables(tmp_path, held_out=held_out).of("nano"))
    after = held_out[held_out.phase == "after"].set_index(["arm", "seed", "id"]).writing
    difference = after["base-think"] - after["base-nothink"]
    assert finding.effect == pytest.approx(difference.mean())
    for covers, level in ((f"{made.QUERIES} queries", "id"), ("3 seeds", "seed")):
        expected = ttest_1samp(difference.groupby(level=level).mean(), 0).confidence_interval()
        assert finding.intervals[covers] == pytest.approx((expected.low, expected.high)), covers


def test_a_gain_is_compared_query_by_query():
    """What all arms share at a query or seed does not widen the interval."""
    rows = made.held_out()
    shared = rows.writing + 5 * rows.id.str[1:].astype(int) + rows.seed
    one, other = (examine_test(BOOK["sft-does-not-profit"].tests[0], results.Tables(
        None, made.rl().iloc[:0], rows.assign(writing=writing), None)) for writing in (rows.writing, shared))
    assert one.effect == pytest.approx(other.effect)
    for covers in one.intervals:
        assert one.intervals[covers] == pytest.approx(other.intervals[covers])


@given(st.lists(st.tuples(st.floats(-2, 2), st.floats(0, 2)), min_size=1, max_size=3), st.integers(1, 4),
       st.sampled_from([(0, None), (None, 0), (-0.1, 0.1)]))
def test_supported_only_if_every_interval_excludes_the_opposite(found, seeds, region):
    test = claims.Test(name="n", column="c", contrast={"a after": 1, "b after": -1}, region=region)
    intervals = [(low, low + width) for low, width in found]
    verdict = verdict_of(intervals, seeds, test)
    inside = [test.low < low and high < test.high for low, high in intervals]
    outside = [high < test.low or low > test.high for low, high in intervals]
    assert (verdict == "supported") == (all(inside) and seeds > 1)
    assert (verdict == "not supported") == (all(outside) and seeds > 1)
    assert verdict_of([*intervals, (np.nan, np.nan)], seeds, test) == "inconclusive"


@given(st.lists(st.tuples(st.floats(-0.3, 0.3), st.floats(0, 0.3)), min_size=1, max_size=3), st.floats(0.01, 0.5))
def test_a_difference_that_is_not_worth_having_is_a_verdict_of_its_own(found, worth):
    test = claims.Test(name="n", column="c", contrast={"a after": 1, "b after": -1}, region=(0, None), worth=worth)
    intervals = [(low, low + width) for low, width in found]
    within = max(abs(end) for ends in intervals for end in ends) < worth
    assert (verdict_of(intervals, 4, test) == "no relevant difference") == within
    assert verdict_of(intervals, 1, test) == "inconclusive", "one seed does not show that two arms are alike"


def test_what_stays_open_says_what_could_have_been_seen():
    open_, decided = (claims.Finding("writing", verdict, 0.1, {"4 seeds": (-0.2, 0.4), "9 queries": (0.0, 0.2)}, (0, 1, 2, 3))
                      for verdict in ("inconclusive", "supported"))
    assert str(open_).endswith("; an effect of 0.43 would have been detected with 80% power") and "would" not in str(decided)


@pytest.mark.parametrize(("parts", "verdict"), [
    (["no relevant difference"] * 2, "no relevant difference"), (["no relevant difference", "supported"], "not supported"),
    (["no relevant difference", "inconclusive"], "inconclusive"),
    (["no relevant difference", "inconclusive", "supported"], "not supported"),
    (["supported"] * 2, "supported"), (["supported", "inconclusive"], "inconclusive"),
    (["supported", "not run"], "inconclusive"), (["not supported", "supported"], "not supported"),
    (["not supported", "not run"], "not supported")])
def test_a_claim_is_as_strong_as_its_weakest_part(parts, verdict):
    assert combined_verdict(parts) == verdict


@pytest.mark.parametrize(("change", "said"), [
    ({"notebok": "x"}, "claim x: notebok"), ({"tests": [], "why_not": ""}, "either tests, or `why_not`"),
    ({"of": "me"}, "of = 'me'"),
    ({"tests": [{"name": "n", "column": "c", "contrast": {"a after": 1, "b after": 1}, "region": [-1, 1], "worth": 2}],
      "why_not": ""}, "worth = 2.0 needs a region that is open"),
    ({"tests": [{"name": "n", "column": "c", "contrast": {"a": 1, "b": 1}, "region": [0, None]}]}, "'a' is not of the form")])
def test_a_claim_that_cannot_be_tested_is_refused_by_name(tmp_path, change, said):
    import yaml

    row = {"id": "x", "of": "paper", "claim": "c", "published": "p", "notebook": "n", "command": "lwz run nano", "why_not": "w"}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump([row | change]))
    with pytest.raises(DataError, match=said):
        load_claims(tmp_path / "c.yaml")


def test_markdown_has_a_row_an_entry(tmp_path):
    entries = claims.ledger(list(BOOK.values()), tables(tmp_path, rl=made.rl(), held_out=made.held_out()))
    lines = ledger_markdown(entries).splitlines()
    assert len(lines) == len(entries) + 2 and {line.count(" | ") for line in lines[2:]} == {3}
    assert pd.Series(lines).str.contains("over 3 seeds").any()
