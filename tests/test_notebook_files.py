"""The first cell of each notebook, and the exercises at its end, with folded solutions. tests/pipeline/test_notebooks.py runs
them."""

from pathlib import Path

import nbformat
import pytest

NOTEBOOKS = sorted((Path(__file__).resolve().parent.parent / "notebooks").glob("*.ipynb"))
WITHOUT_EXERCISES = ("00", "10")  # a tour of the method, and a page of figures


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_first_cell_says_what_why_how_long_and_where_terms_are_explained(path):
    first = nbformat.read(path, 4).cells[0].source
    places = [first.find(part) for part in ("**Question.** ", "**Why it matters.** ", "**What you will see.** ", "| run time |",
                                            "[glossary](../docs/glossary.md) · [术语表](../docs/glossary.md)")]
    assert min(places) > 0 and places == sorted(places)


@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if p.name[:2] not in WITHOUT_EXERCISES], ids=lambda path: path.stem)
def test_exercises_end_a_notebook_and_their_solutions_are_folded(path):
    cells = nbformat.read(path, 4).cells
    start = next((i for i, cell in enumerate(cells) if cell.source.startswith("## Exercises")), None)
    assert start is not None, "no exercises"
    asked, solved = cells[start::2], cells[start + 1 :: 2]
    assert 2 <= len(asked) <= 3 and len(solved) == len(asked)
    for number, (exercise, solution) in enumerate(zip(asked, solved, strict=True), 1):
        assert exercise.cell_type == "markdown" and f"**{number}. " in exercise.source
        assert solution.cell_type == "code" and solution.metadata.tags == ["solution"]
        assert solution.metadata.jupyter.source_hidden is True
        first, *rest = solution.source.splitlines()
        assert first == "# Solution" and len(rest) < 25  # the first line shows when folded
        assert any(line.lstrip().startswith("# ") for line in rest), "it says what there is to see"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_only_solutions_are_folded(path):
    folded = [cell for cell in nbformat.read(path, 4).cells if cell.metadata.get("jupyter", {}).get("source_hidden")]
    assert all("solution" in cell.metadata.get("tags", []) for cell in folded)
