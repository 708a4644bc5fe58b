"""One set of versions: constraints, the conda environment and the gpu extra agree; importing costs nothing."""

import functools
import importlib.metadata
import operator
import re
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent


def pins():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(re.fullmatch(r"([\w.-]+)==([\w.+!-]+)", line).groups() for line in lines if line and line[0] != "#")


def test_installed_versions_are_the_pinned_ones():
    for package in ("torch", "transformers", "trl", "accelerate", "datasets", "papermill"):
        assert importlib.metadata.version(package).split("+")[0] == pins()[package], package


def test_every_dependency_is_pinned_and_conda_uses_the_same_file():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + functools.reduce(operator.iadd, project["optional-dependencies"].values(), [])
    known = {name.lower().replace("_", "-") for name in pins()}
    assert {w.lower() for w in wanted} <= known
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    assert next(d for d in conda if isinstance(d, dict))["pip"] == ["-c constraints.txt", "-e .[gpu,dev]"]


def test_the_extras_resolve_to_the_pinned_versions_on_the_python_of_debian_12(tmp_path):
    done = subprocess.run(
        ["uv", "pip", "compile", "-q", "pyproject.toml", "--extra", "gpu", "--extra", "dev", "-c", "constraints.txt",
         "--python-version", "3.11.2", "-o", tmp_path / "gpu.txt"], cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    resolved = dict(re.findall(r"^([\w.-]+)==(\S+)", (tmp_path / "gpu.txt").read_text(), re.MULTILINE))
    for package in ("vllm", "deepspeed", "torch", "transformers", "trl"):
        assert resolved[package] == pins()[package]


def test_importing_loads_nothing_heavy():
    code = ("import sys, lwzlib, lwzlib.base.recipe, lwzlib.method.text, lwzlib.method.overlap, lwzlib.method.advantage; "
            "sys.exit(any(m in sys.modules for m in ('torch', 'trl', 'transformers', 'vllm', 'matplotlib')))")
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    light = ("import sys; from lwzlib.cli import main; sys.exit(str([m for m in ('torch', 'trl', 'transformers', 'matplotlib', "
             "'submitit', 'papermill', 'nbformat', 'pandas', 'datatrove', 'scipy') if m in sys.modules]).strip('[]'))")
    started = subprocess.run([sys.executable, "-c", light], capture_output=True, text=True)
    assert started.stderr.strip() == "", "what vLLM's environment lacks, and `lwz serve-rm` starts there"
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import lwzlib"], check=True)
    print(f"import lwzlib, interpreter included: {time.perf_counter() - began:.3f} s")
