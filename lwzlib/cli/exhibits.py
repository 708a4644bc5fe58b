"""Commands of the exhibits, under `lwz`: figures, export, report, claims."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer()
out = Console()


@app.command()
def figures(results: Path = Path("figures/results"), published: Path = Path("figures/published"),
            folder: Path = Path("figures/out"),
            runs: Annotated[Path, typer.Option(help="Run folders in here add their completions to the page.")] = Path("runs")):
    """Every exhibit of the paper from committed rows, as PDF, SVG, PNG, and the page index.html: no network, no GPU."""
    from lwzlib.exhibits.catalogue import write_exhibits
    from lwzlib.exhibits.page import write_page
    from lwzlib.exhibits.results import read_tables

    tables = read_tables(results, published)
    written = write_exhibits(tables, folder)
    out.print(f"{folder}: {len(written)} files\n{write_page(tables, folder, runs)}", highlight=False, soft_wrap=True)


@app.command()
def export(run_dirs: list[Path],
           to: Annotated[Path, typer.Option(help="Such as figures/results/mine.csv; what is there is replaced.")]):
    """Write the rows of finished runs, with their provenance, as tables that `lwz figures` draws: those of RL to `to`, those
    of the held-out samples and of the pretraining mixture beside it."""
    import pandas as pd

    from lwzlib.exhibits.run_tables import held_out_table, mixture_rows, run_table
    from lwzlib.pipeline.notebooks import stages_found

    if to.suffix != ".csv" or to.stem.endswith(("_held_out", "_mixture")):
        raise typer.BadParameter(f"--to {to} must end in .csv, and not in _held_out.csv or _mixture.csv, which `lwz figures` "
                                 "reads as other tables")
    for folder in run_dirs:
        for row in stages_found(folder):
            if row["state"] != "finished":
                at = f", at step {row['step']} of {row['of']}" if row["of"] else ""
                raise typer.BadParameter(f"{folder}: {row['stage']} of {row['arm']} is {row['state']}{at}; `lwz run` goes on "
                                         "with it; remove its folder if the recipe asks for it no more")
    table = pd.concat([run_table(folder) for folder in run_dirs], ignore_index=True)
    if table.empty:
        raise typer.BadParameter(f"no GRPO rows in {', '.join(map(str, run_dirs))}")
    if table.commit.isna().any():
        raise typer.BadParameter("these runs know no commit, and `lwz figures` refuses rows without one: run the kit from a "
                                 "git clone")
    if (twice := table[table.duplicated(["arm", "seed", "step"])]).size:
        raise typer.BadParameter(f"arm {twice.arm.iloc[0]}, seed {twice.seed.iloc[0]} is in two of these runs, and a table "
                                 "holds one: export them one by one, each --to a file of its own")
    to.parent.mkdir(parents=True, exist_ok=True)
    texts = ["type", "query", "word_range", "completion"]  # these stay in the run folder
    held_out = pd.concat([held_out_table(folder, during=True) for folder in run_dirs], ignore_index=True)
    held_out = held_out.drop(columns=texts, errors="ignore").astype({"step": "Int64"})
    mixture = pd.concat([mixture_rows(folder) for folder in run_dirs], ignore_index=True)
    for kind, rows in (("", table), ("_held_out", held_out), ("_mixture", mixture)):
        path = to.with_stem(f"{to.stem}{kind}")
        if rows.empty:
            path.unlink(missing_ok=True)  # these runs have none where others had
            continue
        rows.round(4).to_csv(path, index=False)
        out.print(f"{path}: {len(rows)} rows", highlight=False)


@app.command()
def report(run_dir: Path):
    """Write report.html for a run folder."""
    from lwzlib.exhibits.page import write_report

    out.print(write_report(run_dir), highlight=False)


@app.command()
def claims(results: Path = Path("figures/results"), ledger: Path = Path("figures/claims.yaml"),
           markdown: Annotated[bool, typer.Option(help="As a Markdown table.")] = False):
    """The claims ledger: what the paper says, what was measured here, and the verdict that follows from the rows."""
    from lwzlib.exhibits import claims as book
    from lwzlib.exhibits.claims import ledger_markdown, load_claims, why_not_run
    from lwzlib.exhibits.results import read_tables

    entries = book.ledger(load_claims(ledger), read_tables(results))
    if markdown:
        print(ledger_markdown(entries))
        return
    table = Table("claim", "setting", "measured here", "verdict", show_lines=True)
    for entry in entries:
        found = "\n".join(map(str, entry.findings)) or why_not_run(entry)
        table.add_row(entry.claim.claim, entry.setting, found.replace("[", "\\["), entry.verdict)
    out.print(table, highlight=False)
