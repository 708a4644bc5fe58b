"""Commands about exhibits, under `lwz`: figures, export, report, claims."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from lwzlib.base.paths import FIGURES
from lwzlib.base.rows import DataError
from lwzlib.cli.options import EXHIBITS, Seeds, out, seed_numbers
from lwzlib.pipeline.stages import of_seed

app = typer.Typer()


@app.command(rich_help_panel=EXHIBITS)
def figures(results: Path = FIGURES / "results", published: Path = FIGURES / "published",
            folder: Path = Path("figures/out"),
            runs: Annotated[Path, typer.Option(help="Run folders in here add their completions to the page.")] = Path("runs")):
    """Draw every exhibit of the paper, and the page of them.

    From committed rows, as PDF, SVG and PNG: no network, no GPU."""
    from lwzlib.exhibits.catalogue import write_exhibits
    from lwzlib.exhibits.page import write_page
    from lwzlib.exhibits.results import read_tables

    tables = read_tables(results, published)
    written = write_exhibits(tables, folder)
    out.print(f"{folder}: {len(written)} files\n{write_page(tables, folder, runs)}", highlight=False, soft_wrap=True)


@app.command(rich_help_panel=EXHIBITS)
def export(run_dirs: list[Path],
           to: Annotated[Path, typer.Option(help="Such as figures/results/mine.csv; what is there is replaced.")],
           seeds: Seeds = ""):
    """Write the rows of finished runs as tables to commit.

    With their provenance: the rows of RL to `--to`, those of the held-out samples and of the pretraining mixture beside it.
    `lwz figures` draws them."""
    from lwzlib.exhibits import run_tables

    if seeds:
        run_dirs = [of_seed(folder, seed) for folder in run_dirs for seed in seed_numbers(seeds)]
    try:
        written = run_tables.export(run_dirs, to)
    except DataError as error:
        raise typer.BadParameter(str(error)) from None
    for path, rows in written.items():
        out.print(f"{path}: {rows} rows", highlight=False)


@app.command(rich_help_panel=EXHIBITS)
def report(run_dir: Path):
    """Write report.html for a run folder."""
    from lwzlib.exhibits.page import write_report

    out.print(write_report(run_dir), highlight=False)


@app.command(rich_help_panel=EXHIBITS)
def claims(results: Path = FIGURES / "results", ledger: Path = FIGURES / "claims.yaml",
           markdown: Annotated[bool, typer.Option(help="As a Markdown table.")] = False):
    """Print the claims ledger: each claim and its verdict.

    What the paper says, or its reviewers or this kit ask, what was measured here, and the verdict that follows."""
    from lwzlib.exhibits import claims as book
    from lwzlib.exhibits.results import read_tables

    entries = book.ledger(book.load_claims(ledger), read_tables(results))
    if markdown:
        print(book.ledger_markdown(entries))
        return
    table = Table("claim", "setting", "measured here", "verdict", show_lines=True)
    for entry in entries:
        measured = "\n".join(map(str, entry.findings)) or book.why_not_run(entry)
        table.add_row(entry.claim.claim, entry.setting, measured.replace("[", "\\["), entry.verdict)
    out.print(table, highlight=False)
