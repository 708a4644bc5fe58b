"""The kit installed as a wheel, as in container images: every verb finds its files, and runs go where one works."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from lwzlib.base.kit import TINY, prepare
from lwzlib.base.recipe import presets

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def lwz(tmp_path_factory):
    """lwz(*words) -> output, of the installed command, in an empty folder `lwz.folder`. Its environment has the kit's
    dependencies, and not the kit itself: a plain path runs no `.pth` file of theirs."""
    source, made = tmp_path_factory.mktemp("source") / "kit", tmp_path_factory.mktemp("made")
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for file in filter(None, files):
        (source / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, source / file)
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", made, source], check=True)
    subprocess.run([sys.executable, "-m", "venv", made / "venv"], check=True)
    python = made / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", *made.glob("*.whl")], check=True)
    (site,) = (made / "venv").glob("lib/python3*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    folder = made / "empty"
    folder.mkdir()
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*words):
        done = subprocess.run([python.with_name("lwz"), *words], cwd=folder, env=variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run.folder, run.python = folder, python
    return run


def test_the_installed_package_is_the_wheel(lwz):
    code = "import lwzlib; print(lwzlib.__file__)"
    where = subprocess.run([lwz.python, "-c", code], cwd=lwz.folder, capture_output=True, text=True).stdout
    assert "site-packages/lwzlib" in where and str(ROOT) not in where


@pytest.mark.parametrize("name", presets())
def test_each_recipe_ships(lwz, name):
    assert f"recipe {name}" in lwz("recipe", name)


def test_ledger_figures_and_queries_ship(lwz):
    assert "verdict" in lwz("claims")
    assert "figures/out: 69 files" in lwz("figures") and (lwz.folder / "figures" / "out" / "index.html").is_file()
    assert "found" in lwz("doctor")


def test_smoke_runs_from_an_empty_folder_into_it(lwz):
    prepare(TINY)
    said = lwz("run", "smoke")
    assert f"done: open {lwz.folder}/runs/smoke/report.html" in said.replace("\n", "")
    assert (lwz.folder / "runs" / "smoke" / "base-think" / "grpo" / "metrics.jsonl").is_file()
    assert "already done" in lwz("run", "smoke")
