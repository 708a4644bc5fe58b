"""The kit's page in a real browser, at the width of a phone and of a laptop, and from rows that are not there."""

import json
import re
import subprocess
import sys

import browser
import made_results as made
import pytest
import yaml
from polling import until

from lwzlib.base.rows import write_rows
from lwzlib.exhibits import catalogue
from lwzlib.exhibits.claims import VERDICTS
from lwzlib.exhibits.page import completions, write_page
from lwzlib.exhibits.results import read_tables
from lwzlib.pipeline.notebooks import NOTEBOOKS

LOOP = "The same sentence stands here again. " * 3


def run_folder(folder, fingerprint, steps=3, commit=made.ABOUT["commit"]):
    """What `lwz run` leaves of one arm: rows, completions and samples."""
    arm = folder / "base-think"
    for stage in ("grpo", "samples-before", "samples-after"):
        (arm / stage).mkdir(parents=True)
        (arm / stage / "status.json").write_text(json.dumps({"fingerprint": fingerprint, "state": "finished"}))
        (arm / stage / "recipe.yaml").write_text(yaml.safe_dump(
            {"seed": 0, "model": {"name": "kit:tiny"}, "grpo": {"steps": steps},
             "inputs": {"algorithm": "grpo", "start": "base"}}))
        (arm / stage / "provenance.json").write_text(json.dumps(
            {"commit": commit, "uncommitted_changes": False, "hardware": "a desk", "versions": {"torch": "9.9"}}))
    text = {"completion": f"<think>Plan <script>window.hacked=1</script></think><answer>First a thing. {LOOP}</answer>",
            "answer_words": 21, "think_words": 2, "length": 0.5, "writing": 1.0, "format": 0.4, "truncated": False}
    write_rows(arm / "grpo" / "metrics.jsonl", [{"step": i, "length": 0.1 * i} for i in (1, 2, 3)])
    write_rows(arm / "grpo" / "completions.jsonl", [{"step": i, "id": "q0", "advantage": 0.1} | text for i in (1, 2, 3) * 6])
    for phase in ("before", "after"):
        write_rows(arm / f"samples-{phase}" / "samples.jsonl",
                   [{"step": 1, "id": "q0", "query": "Why rain?", "word_range": [50, 70]} | text])
    return folder


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """The page of two settings, one of whose runs, and one other, is on this machine."""
    root = tmp_path_factory.mktemp("page")
    made.write(root / "rows", rl=made.rl(), held_out=made.held_out())
    made.write(root / "rows", "gpu", rl=made.rl((0,)).assign(fingerprint="f" * 16))
    run_folder(root / "runs" / "gpu", "f" * 16)
    run_folder(root / "runs" / "mine", "a" * 16, steps=5)
    mark = made.rl().query("arm == 'base-think' and seed == 0").fingerprint.iloc[0]
    run_folder(root / "runs" / "nano", mark, commit="9" * 40)
    return write_page(read_tables(root / "rows"), root / "out", root / "runs")


@pytest.fixture
def tab(tmp_path, request):
    browser.required()
    with browser.page(tmp_path, tmp_path) as found:
        yield found


def test_page_is_one_file_under_5_mb(shown):
    said = shown.read_text()
    assert len(said) < 5_000_000 and "<script>window.hacked" not in said
    assert not re.search(r"""\s(src|href)=["'](?!#)""", said), "it must need no other file"


@pytest.mark.parametrize("width", [390, 1280])
def test_every_exhibit_is_there_and_nothing_fails(tab, shown, width):
    tab.size(width)
    tab.open(shown.as_uri())
    assert tab.js("document.documentElement.scrollWidth - innerWidth") <= 0, "the page scrolls sideways"
    seen = tab.js("""[...document.querySelectorAll('.exhibits:not([hidden]) .exhibit')].map(e => [e.dataset.exhibit,
        e.querySelector('svg, table').getBoundingClientRect().width, e.getBoundingClientRect().right])""")
    assert [name for name, *_ in seen] == list(catalogue.EXHIBITS)
    assert all(wide > 200 and right <= width for _, wide, right in seen if wide), seen
    claims = tab.js("[...document.querySelectorAll('[data-claim]')].map(e => e.querySelector('.verdict').textContent)")
    assert len(claims) > 17 and set(claims) <= set(VERDICTS)
    counted = tab.js("[...document.querySelectorAll('.verdicts b')].map(e => e.textContent)")
    assert counted and sorted(f"{claims.count(verdict)} {verdict}" for verdict in set(claims)) == sorted(counted)
    assert tab.js("document.querySelector('.verdicts').getBoundingClientRect().bottom") < 900, "not on the first screen"
    assert tab.js("window.hacked") is None and not tab.errors
    nodes = [n for n in tab.call("Accessibility.getFullAXTree")["nodes"] if not n["ignored"]]
    roles = ("checkbox", "combobox", "button", "region", "image", "figure", "DisclosureTriangle")
    unnamed = [n["role"]["value"] for n in nodes if n["role"]["value"] in roles and not n["name"]["value"]]
    assert not unnamed, unnamed


def test_each_points_tooltip_names_its_run_by_pointer_and_by_keyboard(tab, shown):
    tab.size(1280)
    tab.open(shown.as_uri())
    tips = tab.js("[...document.querySelectorAll('.measured [data-point] title, .measured[data-point] title')]"
                  ".map(t => t.textContent)")
    assert len(tips) > 300
    assert all(re.search(r"seeds? \d.*commit [0-9a-f]{9}", tip) for tip in tips)
    assert all(sum(tip.startswith(f"{arm}, ") for tip in tips) > 2 for arm in made.ARMS)
    at = tab.js("""(() => { const p = document.querySelector('[data-exhibit=figure_3] .measured use');
        p.scrollIntoView({block: 'center'}); const b = p.getBoundingClientRect();
        return [b.x + b.width / 2, b.y + b.height / 2] })()""")
    tab.call("Input.dispatchMouseEvent", type="mouseMoved", x=at[0], y=at[1])
    until(lambda: "commit" in tab.js("document.getElementById('tip').textContent"), "the tooltip")
    tab.call("Input.dispatchMouseEvent", type="mouseMoved", x=1, y=1)
    until(lambda: tab.js("document.getElementById('tip').hidden"), "its end")
    tab.js("document.querySelector('[data-exhibit=figure_2] figure').focus()")
    tab.key("ArrowRight")
    first = tab.js("document.getElementById('tip').textContent")
    tab.key("ArrowRight")
    second = tab.js("document.getElementById('tip').textContent")
    assert first != second and "commit" in second and not tab.js("document.getElementById('tip').hidden")


def test_toggles_hide_what_they_name(tab, shown):
    tab.open(shown.as_uri())
    def visible(kind):
        return tab.js(f"[...document.querySelectorAll('.exhibits:not([hidden]) .{kind}')]"
                      ".filter(e => e.getClientRects().length).length")
    before = visible("published"), visible("measured")
    tab.js("document.getElementById('published').click()")
    assert visible("published") == 0 and visible("measured") == before[1] > 50
    tab.js("document.getElementById('published').click(); document.getElementById('measured').click()")
    assert (visible("published"), visible("measured")) == (before[0], 0)


def test_setting_completions_and_comparison(tab, shown):
    tab.open(shown.as_uri())
    tab.js("const s = document.getElementById('setting'); s.selectedIndex = 1; s.onchange()")
    tall = "[...document.querySelectorAll('.exhibits')].map(e => [e.dataset.setting, e.offsetHeight > 0])"
    assert tab.js(tall) == [["nano", False], ["gpu", True]], "one setting at a time, to the eye"
    runs = tab.js("[...document.querySelectorAll('details.run')].map(d => [d.querySelector('summary').textContent,"
                  " d.querySelectorAll('article').length, d.querySelectorAll('mark').length])")
    of = {said.split(" · ")[0]: (articles, marks) for said, articles, marks in runs}
    assert of["gpu: base-think, seed 0"] == (14, 28), "4 completions of 3 steps, 2 samples, each with two repeats"
    assert of["runs/mine, not committed: base-think, seed 0"] == (14, 28) and of["nano: base-think, seed 0"] == (0, 0)
    assert of["runs/nano, not committed: base-think, seed 0"] == (14, 28), "the same fingerprint, but another commit"
    assert len(of) == 3 * 3 + 2 * 3 + 3 + 2
    assert not tab.js("document.querySelector('.run article details').open"), "the plan is folded"
    text = tab.js("document.getElementById('difference').textContent")
    assert "first (solid): gpu: base-think, seed 0" in text and "second less first" in text, "like beside like"
    assert "second (dashed): runs/nano, not committed: base-think, seed 0" in text

    def choose(which, name):
        tab.js(f"""(() => {{ const s = document.getElementById('{which}');
            s.selectedIndex = [...s.options].findIndex(o => o.text === '{name}'); s.onchange() }})()""")
    choose("one", "nano: base-nothink, seed 1")
    assert "its folder is not here" in tab.js("document.getElementById('difference').textContent")
    choose("one", "gpu: base-think, seed 0")
    choose("two", "runs/mine, not committed: base-think, seed 0")
    rows = tab.js("[...document.querySelectorAll('#difference tr')].map(r => [...r.cells].map(c => c.textContent))")
    assert ["grpo.steps", "3", "5", "differs"] in rows, "what was changed"
    assert not [row for row in rows if row[0] in ("model.name", "seed")], "what was not changed"
    assert tab.js("document.querySelectorAll('#plot polyline').length") == 2 and not tab.errors


def test_without_rows_the_page_says_so(tab, tmp_path):
    tab.open(write_page(read_tables(tmp_path / "none"), tmp_path / "out", tmp_path / "no-runs").as_uri())
    said = tab.js("document.body.innerText")
    assert "No run: not run here." in said and "It takes two runs: not run here." in said and not tab.errors
    assert set(tab.js("[...document.querySelectorAll('.verdict')].map(e => e.textContent)")) == {"not run"}
    assert tab.js("[...document.querySelectorAll('.exhibit')].every(e => e.textContent.includes('not run here'))")


def test_texts_that_would_make_it_too_large_are_left_out_and_counted(tmp_path):
    arm = run_folder(tmp_path / "mine", "a" * 16) / "base-think"
    assert len(completions(arm, 10**6)[0]) == 14
    kept, left_out = completions(arm, 1000)
    assert 0 < len(kept) < 14 and len(kept) + left_out == 14


def test_same_rows_same_bytes(shown):
    root = shown.parent.parent
    assert write_page(read_tables(root / "rows"), root / "again", root / "runs").read_bytes() == shown.read_bytes()


def test_figures_and_claims_by_command(tmp_path):
    rows = made.write(tmp_path / "rows", rl=made.rl((0,)))

    def lwz(*words):
        return subprocess.run([sys.executable, "-m", "lwzlib.cli.main", *map(str, words)], capture_output=True, text=True)
    done = lwz("figures", "--results", rows, "--folder", tmp_path / "out", "--runs", tmp_path)
    assert done.returncode == 0 and "index.html" in done.stdout, done.stderr
    assert (tmp_path / "out" / "figure_2_nano.pdf").exists()
    done = lwz("claims", "--results", rows, "--markdown")
    assert done.returncode == 0 and "one seed, so no interval over seeds | **inconclusive** |" in done.stdout, done.stderr
    (rows / "nano.csv").write_text((rows / "nano.csv").read_text().replace(made.ABOUT["commit"], "lost", 1))
    done = lwz("figures", "--results", rows, "--folder", tmp_path / "out")
    assert done.returncode == 1 and done.stderr.startswith("lwz: ") and "nano.csv, line 2: commit = 'lost'" in done.stderr


@pytest.mark.parametrize("rows", [None, {"rl": made.rl(), "held_out": made.held_out()}], ids=["none", "three seeds"])
def test_notebook_of_the_figures_runs_with_and_without_rows(tmp_path, rows):
    import papermill

    folder = made.write(tmp_path / "rows", **rows or {})
    papermill.execute_notebook(NOTEBOOKS / "10_paper_figures.ipynb", tmp_path / "out.ipynb", {"results_dir": str(folder)},
                               kernel_name="python3", cwd=NOTEBOOKS, progress_bar=False)
    said = (tmp_path / "out.ipynb").read_text()
    assert said.count('"image/svg+xml"') == 6 and "line 2: commit = None" in said
    assert ("over 3 seeds" in said) == bool(rows) and ("nano: not run here" in said) == (not rows)
