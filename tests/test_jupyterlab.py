"""A student's way: a notebook in JupyterLab in a real browser, run by its menu, with pictures and sliders that answer."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import browser
import papermill
import pytest
from polling import until

NOTEBOOK = Path(__file__).resolve().parent.parent / "notebooks" / "02_reward_design.ipynb"
CODE = "[...document.querySelectorAll('.jp-Notebook .jp-CodeCell')]"
DONE = r"""(cell => cell.querySelector('.jp-InputPlaceholder') ? cell.querySelector('.jp-OutputArea-output')
               : /\[\d+\]/.test(cell.querySelector('.jp-InputPrompt').textContent))"""  # a folded cell shows no number
IDLE = "document.querySelector('.jp-Notebook-ExecutionIndicator[data-status=idle]')"
OUTPUTS = "document.querySelectorAll('.jp-OutputArea-output[data-mime-type=\"application/vnd.jupyter.{}\"]')"


@contextlib.contextmanager
def jupyterlab(folder, work):
    """The address of a server of its own for `folder`, on loopback, with its settings and records in `work`."""
    tracker = work / "settings" / "@jupyterlab" / "notebook-extension" / "tracker.jupyterlab-settings"
    tracker.parent.mkdir(parents=True)
    tracker.write_text('{"windowingMode": "none"}')  # every cell is in the page, not only those in sight
    places = {"JUPYTER_CONFIG_DIR": "config", "JUPYTER_RUNTIME_DIR": "runtime", "JUPYTERLAB_SETTINGS_DIR": "settings",
              "JUPYTERLAB_WORKSPACES_DIR": "workspaces", "IPYTHONDIR": "ipython"}
    env = os.environ | {name: str(work / place) for name, place in places.items()} | {"JUPYTER_TOKEN": "of-this-test"}
    log = (work / "log").open("w")
    server = subprocess.Popen(
        [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1", "--ServerApp.port=0",
         f"--ServerApp.root_dir={folder}"], env=env, stdout=log, stderr=log)
    try:
        # The server makes the file, then writes it.
        said = until(lambda: [text for file in (work / "runtime").glob("jpserver-*.json")
                              if (text := file.read_text()).rstrip().endswith("}")], "the server", 120)[0]
        yield json.loads(said)["url"]
    finally:
        server.terminate()
        server.wait(30)
        log.close()


def click(page, place):
    """A real click in the middle of what the JavaScript expression `place` finds."""
    middle = "(found => { const box = found.getBoundingClientRect(); return [box.x + box.width / 2, box.y + box.height / 2] })"
    x, y = page.js(f"{middle}({place})")
    for kind, button in (("mouseMoved", "none"), ("mousePressed", "left"), ("mouseReleased", "left")):
        page.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button=button, clickCount=1)


def soon(page, condition, looks=1):
    """It came true within 20 s, at so many looks in a row. The page itself looks, four times a second: asked at every moment,
    it would take the cores from the kernel."""
    return page.js(f"""new Promise(done => {{
        let seen = 0, end = Date.now() + 20000
        const look = () => {{
            seen = ({condition}) ? seen + 1 : 0
            seen >= {looks} || Date.now() > end ? done(seen >= {looks}) : setTimeout(look, 250)
        }}
        look() }})""")


@pytest.fixture(scope="module")
def lab(smoke, tmp_path_factory):
    """The page with the notebook open, run by the menu to its end."""
    browser.required()
    folder, work = tmp_path_factory.mktemp("notebooks"), tmp_path_factory.mktemp("jupyter")
    papermill.execute_notebook(NOTEBOOK, folder / NOTEBOOK.name, {"recipe": "smoke", "run_dir": str(work / "run")},
                               prepare_only=True, progress_bar=False)
    (work / "profile").mkdir()
    with jupyterlab(folder, work) as address, browser.page(work / "profile", work) as page:
        page.size(1280)
        page.open(f"{address}lab/tree/{NOTEBOOK.name}?token=of-this-test")
        until(lambda: page.js(f"{CODE}.length > 10"), "the notebook", 120)
        until(lambda: soon(page, f"!!{IDLE}", looks=12), "the kernel", 120)  # it is idle for a moment before it has begun
        click(page, "[...document.querySelectorAll('.lm-MenuBar-item')].find(item => item.textContent === 'Run')")
        run_all = "document.querySelector('.lm-Menu-item[data-command=\"runmenu:run-all\"]')"
        until(lambda: page.js(f"!!{run_all}"), "the menu", 30)
        click(page, run_all)
        until(lambda: soon(page, f"{OUTPUTS.format('error')}.length > 0 || {CODE}.every{DONE}"), "the end", 480)
        yield page


def test_every_cell_runs_without_an_error(lab):
    said = lab.js(f"[...{OUTPUTS.format('error')}].map(output => output.textContent)")
    assert said == []


def test_the_figures_are_there(lab):
    widths = lab.js("[...document.querySelectorAll('.jp-RenderedImage img')].map(image => image.naturalWidth)")
    assert len(widths) >= 4 and min(widths) > 300


def test_solutions_are_folded_and_open_with_a_click(lab):
    folded = f"{CODE}.filter(cell => cell.querySelector('.jp-InputPlaceholder'))"
    assert lab.js(f"{folded}.length") == 3
    lab.js(f"{folded}[0].scrollIntoView()")
    click(lab, f"{folded}[0].querySelector('.jp-InputPlaceholder')")
    until(lambda: lab.js(f"{folded}.length") == 2, "the first solution")


def test_a_slider_moves_the_rewards(lab):
    handle = "document.querySelectorAll('.jp-OutputArea .noUi-handle')[0]"
    labels = "[...document.querySelectorAll('.jp-OutputArea .widget-label')]"
    label = f"{labels}.find(each => each.textContent.startsWith('length')).textContent"
    until(lambda: lab.js(f"!!{handle}"), "the sliders", 60)
    assert lab.js(label) == "length 1.00"
    lab.js(f"{handle}.scrollIntoView()")
    lab.js(f"{handle}.focus()")
    for _ in range(20):
        lab.key("ArrowRight")
    until(lambda: lab.js(label) < "length 0.60", "a lower length reward", 60)
