"""The page of departures is what the recipes say, the glossary points to what is there, and the kit says how to cite it."""

import re
from pathlib import Path

import pytest
import yaml

from lwzlib.base.marks import PAGE, published_marks, reasons, rewritten_page, table_rows
from lwzlib.base.recipe import Recipe, departures, load_recipe
from lwzlib.method.text import has_han

ROOT = Path(__file__).resolve().parent.parent
SECTIONS = [name for name in Recipe.model_fields if name not in ("name", "arms")]
TERMS = re.findall(r"^### ([^\n]+?) · ([^\n]+)\n(.*?)\n\n(.*?)\n\nWhere: ([^\n]+)$",
                   (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def quantities(page):
    return re.findall(r"^\| `([\w.]+)` \|", page, re.MULTILINE)


def test_the_page_of_departures_is_what_the_recipes_say():
    page = PAGE.read_text(encoding="utf-8")
    assert rewritten_page(page) == page, "stale: run `python -m lwzlib.base.marks`"
    missing, changed = page.split("## 2 ")
    marked = {name for name, (mark, _) in published_marks().items() if mark == "N"}
    assert sorted(quantities(missing)) == sorted(marked)
    assert sorted(quantities(changed)) == sorted(name for name, *_ in departures(load_recipe("nano")))


def test_every_choice_has_a_reason():
    rows = table_rows("not published", SECTIONS) + table_rows("nano", SECTIONS)
    without = [name for name, *_, why in rows if not why.strip()]
    assert not without, "say why, in a comment on its line"


def test_a_reason_is_that_of_the_line_or_of_the_section_around_it(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("extends: nano\ngrpo:  # all of it\n  steps: 3  # few\n  loss: grpo\n  sampling: {top_p: 0.9}  # both\n"
                    "cot: {queries: 2}\nsamples:\n  stop: ['a # b']  #no space\n# a line of its own\n  queries: 4  # last")
    assert reasons(path) == {"extends": "", "grpo.steps": "few", "grpo.loss": "all of it", "grpo.sampling.top_p": "both",
                             "cot.queries": "", "samples.stop": "no space", "samples.queries": "last"}


def test_the_glossary_has_every_term_whole():
    text = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    assert len(TERMS) == text.count("\n### ") > 30
    for english, chinese, meaning, chinese_meaning, _ in TERMS:
        assert not has_han(meaning) and 2 <= len(re.findall(r"[.:;](?=\s|$)", meaning)) <= 4, english
        assert has_han(chinese_meaning) and len(re.findall("[。；：，]", chinese_meaning)) >= 2, chinese


@pytest.mark.parametrize("term", TERMS, ids=[term[0] for term in TERMS])
def test_what_the_glossary_points_to_is_there(term):
    named = re.findall(r"`([^`]+)`", term[4])
    assert named and all((ROOT / path).is_file() for path in named), named


def test_citation_names_kit_and_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0" and citation["message"] and citation["title"] and citation["authors"]
    project = (ROOT / "pyproject.toml").read_text()
    assert f'version = "{citation["version"]}"' in project and f'license = "{citation["license"]}"' in project
    paper = citation["preferred-citation"]
    assert len(paper["authors"]) == 5 and "2506.18841" in paper["url"] and paper["year"] == 2025
    assert "Apache License" in (ROOT / "LICENSE").read_text()
