"""Tables of docs/results.md, and the verdicts of the README, from the committed rows.

`python -m lwzlib.exhibits.results_page` makes them anew; the words around them stay.
"""

import functools

from lwzlib.base.pages import markdown_table, rewrite
from lwzlib.base.paths import DOCS, FIGURES
from lwzlib.exhibits.claims import by_verdict, ledger, ledger_markdown, load_claims
from lwzlib.exhibits.results import Tables, read_tables, scale_table
from lwzlib.exhibits.run_tables import quarter_means, seed_table

PAGES = (DOCS / "results.md", DOCS.parent / "README.md")
_NONE = "No rows: not run here.\n"
_WHY = {"inconclusive": "too few seeds, or too small a difference: the ledger says what could have been seen",
        "not run": "no rows: the ledger says what each needs"}


def made_part(name: str) -> str:
    """Part of a page by the name in its mark: `verdicts`, `ledger`, `rows`, or `training <setting>`, `held-out <setting>`."""
    tables = _committed()
    kind, _, setting = name.partition(" ")
    return {"verdicts": _verdicts, "ledger": lambda known: ledger_markdown(ledger(load_claims(), known)), "rows": _rows,
            "training": _training, "held-out": _held_out}[kind](tables.of(setting) if setting else tables)


@functools.cache
def _committed() -> Tables:
    return read_tables(FIGURES / "results")


def _verdicts(tables: Tables) -> str:
    """Number of claims by verdict, each in each setting that tests it; the claims that are decided, by name."""
    lines = []
    for verdict, of in by_verdict(ledger(load_claims(), tables)).items():
        named = "; ".join(f"{entry.claim.claim} ({entry.setting})" for entry in of)
        lines.append((f"**{verdict}**", len(of), _WHY.get(verdict, named)))
    return markdown_table(("verdict", "claims", "which, or why"), lines)


def _rows(tables: Tables) -> str:
    table = scale_table(tables)
    return markdown_table(table.columns, table.itertuples(index=False)) if len(table) else _NONE


def _training(tables: Tables) -> str:
    """Rewards in the first and the last quarter of RL: the mean over the seeds, and the lowest and highest of them."""
    if tables.rl.empty:
        return _NONE
    means = quarter_means(tables.rl).groupby(["arm", "quantity"], sort=False)
    return markdown_table(("arm", "reward", "seeds", "first quarter of RL", "last quarter"), (
        (*of, len(rows), *(f"{rows[when].mean():.2f} ({rows[when].min():.2f} to {rows[when].max():.2f})"
                           for when in ("first quarter", "last quarter"))) for of, rows in means))


def _held_out(tables: Tables) -> str:
    """Rewards on held-out queries before and after training, over seeds."""
    rows = []
    for row in seed_table(tables.held_out[tables.held_out.phase != "during"]).to_dict("records"):
        seeds = len(row["seeds"].split())
        interval = f" [{row['change_low']:+.2f}, {row['change_high']:+.2f}]" if seeds > 1 else ""
        rows.append((row["arm"], row["reward"], seeds, f"{row['before']:.2f}", f"{row['after']:.2f}",
                     f"{row['change']:+.2f}{interval}"))
    heads = ("arm", "reward", "seeds", "before", "after", "change [95% interval over seeds]")
    return markdown_table(heads, rows) if rows else _NONE


if __name__ == "__main__":
    for page in PAGES:
        rewrite(page, made_part)
