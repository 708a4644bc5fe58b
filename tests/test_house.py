"""The house: imports go down from floor to floor, never up and never in a circle; the map in `lwzlib/__init__.py`, the README's
layout and the tree say the same; files and functions stay short."""

import ast
import graphlib
import re
from pathlib import Path

import pytest

import lwzlib

PACKAGE = Path(lwzlib.__file__).parent
ROOT = PACKAGE.parent
FLOORS = (("base",), ("method",), ("endpoints",), ("data", "evaluate"), ("exhibits", "lab"), ("pipeline",), ("cluster",),
          ("cli",))
FLOOR = {folder: floor for floor, folders in enumerate(FLOORS) for folder in folders}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE)
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in FILES} | {"lwzlib"}


def imported_by(path: Path) -> set[str]:
    """Modules of the kit that a file imports, also inside its functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import hides its floor"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return {name for name in names if name in MODULES and name.count(".") == 2}


def folder(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path):
    climbing = {name for name in imported_by(path) if (below := name.split(".")[1]) != folder(path)
                and FLOOR[below] >= FLOOR[folder(path)]}
    assert not climbing, f"{folder(path)} stands on floor {FLOOR[folder(path)]} of {FLOORS}"
    if folder(path) == "method":
        assert {name.split(".")[1] for name in imported_by(path)} <= {"base", "method"}


def test_no_circle():
    graph = {".".join(path.relative_to(ROOT).with_suffix("").parts): imported_by(path) for path in FILES}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


def test_a_circle_would_be_seen():
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter({"a": {"b"}, "b": {"a"}}).prepare()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_and_functions_are_short(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 300
    long = [node.name for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            and node.end_lineno - node.lineno + 1 > 50]
    assert not long


def test_map_layout_and_tree_agree():
    mapped = re.findall(r"^    (\w+)/ ", lwzlib.__doc__, re.MULTILINE)
    layout = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Layout")[2].partition("\n## ")[0]
    assert mapped == re.findall(r"`lwzlib/(\w+)/`", layout)
    there = {path.name for path in PACKAGE.iterdir() if path.is_dir() and not path.name.startswith("__")}
    assert set(mapped) == there
    assert set(FLOOR) == there - {"queries", "texts"}
