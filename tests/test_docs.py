"""Pages say what is: made tables are fresh, links lead somewhere, commands exist, the kit says how to cite it."""

import re
import shlex
from pathlib import Path

import pytest
import yaml
from typer.main import get_command

from lwzlib.base.marks import PAGE, made_part, published_marks, reasons, table_rows
from lwzlib.base.pages import remade
from lwzlib.base.recipe import Recipe, departures, load_recipe, presets
from lwzlib.cli import main
from lwzlib.exhibits import results_page
from lwzlib.method.text import has_han

ROOT = Path(__file__).resolve().parent.parent
SECTIONS = [name for name in Recipe.model_fields if name not in ("name", "arms")]
TERMS = re.findall(r"^### ([^\n]+?) · ([^\n]+)\n(.*?)\n\n(.*?)\n\nWhere: ([^\n]+)$",
                   (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("cluster_jobs/*.md"))]
TEXT = {page: page.read_text(encoding="utf-8") for page in PAGES}
LINKS = [(page, target) for page in PAGES for target in re.findall(r"\]\(([^)\s]+)\)", TEXT[page]) if "://" not in target]
_COMMAND = re.compile(r"(?:^|[`;&] *)(?:\.venv/bin/)?(lwz [^`;&\n]+?)(?: {2,}#[^\n]*)?(?=$|[`;&])", re.MULTILINE)
COMMANDS = sorted({command for page in PAGES for command in _COMMAND.findall(re.sub(r" *\\\n *", " ", TEXT[page]))})


def quantities(page):
    return re.findall(r"^\| `([\w.]+)` \|", page, re.MULTILINE)


def test_the_page_of_departures_is_what_the_recipes_say():
    page = PAGE.read_text(encoding="utf-8")
    assert remade(page, made_part) == page, "stale: run `python -m lwzlib.base.marks`"
    missing, changed = page.split("## 2 ")
    marked = {name for name, (mark, _) in published_marks().items() if mark == "N"}
    assert sorted(quantities(missing)) == sorted(marked)
    assert sorted(quantities(changed)) == sorted(name for name, *_ in departures(load_recipe("nano")))


@pytest.mark.parametrize("page", results_page.PAGES, ids=lambda page: page.name)
def test_numbers_and_verdicts_are_those_of_the_committed_rows(page):
    assert "<!-- made: " in TEXT[page]
    assert remade(TEXT[page], results_page.made_part) == TEXT[page], "stale: run `python -m lwzlib.exhibits.results_page`"


def test_the_readme_is_read_in_minutes():
    assert len(TEXT[ROOT / "README.md"].splitlines()) <= 120


def _anchor(heading):
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize(("page", "target"), LINKS, ids=[f"{page.name}:{target}" for page, target in LINKS])
def test_a_link_leads_to_a_file_and_its_heading(page, target):
    path, _, anchor = target.partition("#")
    linked = (page.parent / path).resolve() if path else page
    assert linked.exists()
    if anchor:
        assert anchor in map(_anchor, re.findall(r"^#+ (.+)$", linked.read_text(encoding="utf-8"), re.MULTILINE))


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_a_page_is_one_that_lwz_takes(command):
    """Parsed by the command itself and its recipe loaded, but not run; a page may name a command without its arguments."""
    _, verb, *words = shlex.split(command)
    told = get_command(main.app).commands[verb]
    if words and hasattr(told, "commands"):
        verb, told, words = words[0], told.commands[words[0]], words[1:]
    if words:
        given = told.make_context(verb, words).params
        named = given["name"] if verb == "recipe" else given.get("recipe")
        if named in presets():
            assert load_recipe(named, given.get("sets"))


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
