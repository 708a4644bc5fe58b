"""The page that compares ways to combine rewards is what they give, and its picture is drawn from them."""

import re

import numpy as np
import pytest

from lwzlib.base.pages import remade
from lwzlib.base.recipe import load_recipe
from lwzlib.lab import fusions
from lwzlib.lab.hacks import ATTACKS, asking
from lwzlib.method.advantage import MODES, fuse

WAYS = fusions.of(load_recipe("nano"))


def test_the_picture_is_that_of_the_made_groups(tmp_path):
    fusions.picture(WAYS, tmp_path / "again.svg")
    assert (tmp_path / "again.svg").read_bytes() == fusions.PICTURE.read_bytes(), "stale: run `python -m lwzlib.lab.fusions`"


def test_every_mode_is_compared_and_a_clip_of_the_recipe_is_taken():
    assert {way.mode for way in WAYS.values()} == set(MODES)
    assert [name for name, way in WAYS.items() if way.clip] == ["zscore, clip 2"]
    assert fusions.of(load_recipe("nano", "grpo.advantage_clip=3.5 grpo.advantage=sum"))["zscore, clip 3.5"].clip == 3.5


def test_a_made_group_is_combined_as_in_training():
    table = fusions.made_group(fusions.BROKEN, WAYS)
    np.testing.assert_array_equal(table.zscore, fuse(fusions.BROKEN[None], [1, 1])[0])
    assert table.gate[4] == table.gate.min() < table.zscore[4] and table.length[4] == table.length.max()
    whole = fusions.made_group(fusions.GROUP, WAYS)
    assert (whole.gate == whole.zscore).all()


def test_the_page_is_what_the_command_writes(monkeypatch):
    """The hack suite's tables take minutes: of them the attacks, the ways, and the gains of the text are looked at."""
    hacked, page = [], fusions.PAGE.read_text(encoding="utf-8")
    tables = dict(re.findall(r"<!-- made: (hacks[\w ]+) -->\n(.*?)<!-- end -->", page, re.DOTALL))
    monkeypatch.setattr(fusions, "_hacked", lambda recipe, times: hacked.append(times))
    markdown = fusions._markdown
    monkeypatch.setattr(fusions, "_markdown", lambda table: {1: tables["hacks at the length"], 2: tables["hacks at a quarter"]}[
        len(hacked)] if table is None else markdown(table))
    assert remade(page, fusions.made_part) == page, "stale: run `python -m lwzlib.lab.fusions`"
    assert hacked == [1, 4]
    for table in tables.values():
        head, _, *rows = table.splitlines()
        assert [cell.strip() for cell in head.strip("|").split("|")] == ["attack", *WAYS]
        assert {row.split("|")[1].strip() for row in rows} == set(ATTACKS)


@pytest.mark.parametrize("way", WAYS)
def test_gains_are_those_of_the_hack_suite(way):
    found = fusions.gains({"size": lambda completions, **_: [float(len(text)) for text in completions]}, [1], {
        "zscore": WAYS["zscore"], way: WAYS[way]}, asking(1)[:1])
    assert set(found.index) == set(ATTACKS) and found[way].notna().all()
    assert found.zscore.is_monotonic_decreasing and found.zscore.iloc[0] > 0
