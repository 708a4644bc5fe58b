"""`lwz run --seeds`: the same recipe with several seeds, a run folder each, and a table over them.

What another seed would not change is done once, by the first of them; the others link to it: the corpus, and what has a seed
of its own in the recipe (`cold_start.seed`, `writing_rm.seed`). Of the other stages that need no arm a person may share more,
each with what it needs; each stage that builds on such a one says so, in its fingerprint and in its rows. However a stage came
to be shared, the interval over seeds covers only what still differs.
"""

import os
from pathlib import Path

from lwzlib.base.processes import Interrupted
from lwzlib.base.recipe import Recipe
from lwzlib.base.rows import RunError, write_atomic
from lwzlib.pipeline.launch import launch
from lwzlib.pipeline.notebooks import run_notebooks, stages_of
from lwzlib.pipeline.stages import STAGES, of_seed, places, varies


def _with_needs(stage: str) -> set[str]:
    """The stage and all that it needs; START, TRAINED and TEACHER, what an arm makes, are in no table of stages."""
    return {stage}.union(*(_with_needs(other) if other in STAGES else {other} for other in STAGES[stage].needs))


SHAREABLE = tuple(name for name in STAGES if _with_needs(name) <= set(STAGES))


def run_seeds(recipe: Recipe, stem: Path, seeds: list[int], share: list[str], source: str, overrides: list[str]) -> Path:
    """`run_notebooks` for each seed in `stages.of_seed(stem, seed)`, after the stages `share`; writes `<stem>-seeds.csv` and
    returns it. A seed that fails does not keep the others from running. Raises RunError at the end if any did; before anything
    is executed, if a folder holds another run, or one that shares other stages."""
    if unknown := [name for name in share if name not in SHAREABLE]:
        raise RunError(f"--share {unknown[0]}: seeds can share {', '.join(SHAREABLE)}")
    fixed = {name for name in SHAREABLE if not any(varies(needed, recipe) for needed in _with_needs(name))}
    share = [name for name in SHAREABLE if name in fixed or any(name in _with_needs(wanted) for wanted in share)]
    folders = {seed: of_seed(stem, seed) for seed in seeds}
    for seed, folder in folders.items():
        _check_shared(recipe, folder, share, seed == seeds[0])
        for run in stages_of(recipe, folder, seed).values():
            run.check()
    _do_shared(recipe, folders, share)
    failed = {}
    for seed, folder in folders.items():
        print(f"seed {seed} of {', '.join(map(str, seeds))}: {folder}", flush=True)
        try:
            run_notebooks(recipe, folder, seed, source, overrides)
        except Interrupted:
            raise
        except Exception as error:  # whatever it is, hours of other seeds must not wait for it: a kernel may die, say
            failed[seed] = f"{type(error).__name__}: {error}".strip()
            print(f"seed {seed} failed; the others go on:\n{failed[seed]}", flush=True)
    done = [stage for stage in share if STAGES[stage].seeded and ("", stage) in places(recipe)]
    path = _show(list(folders.values()), stem, done)
    if failed:
        raise RunError(f"{len(failed)} of {len(seeds)} seeds failed, and the same command goes on with them: " + "; ".join(
            f"seed {seed}: {said.splitlines()[-1]}" for seed, said in failed.items()))
    return path


def _check_shared(recipe: Recipe, folder: Path, share: list[str], first: bool) -> None:
    """Raise RunError where a folder shares what is not to be shared, or has done itself what is."""
    for arm, stage in places(recipe):
        place = folder / arm / stage
        if not varies(stage, recipe):
            continue
        if place.is_symlink() and stage not in share:
            raise RunError(f"{place} is shared with {place.resolve()}: give --share {stage} too, or another --run-dir")
        if place.exists() and not place.is_symlink() and stage in share and not first:
            raise RunError(f"{place} was not shared when it was made: leave {stage} out of --share, or give another --run-dir")


def _do_shared(recipe: Recipe, folders: dict[int, Path], share: list[str]) -> None:
    """Do the stages that are shared with the first seed, and link to them from the folders of the others."""
    first, *others = folders
    for arm, stage in places(recipe):
        if stage not in share:
            continue
        done = launch(stage, recipe, folders[first], first, arm).folder.resolve()
        for seed in others:
            place = folders[seed] / arm / stage
            if place.is_symlink() and place.resolve() != done:
                raise RunError(f"{place} is shared with {place.resolve()}, not with {done}: give another --run-dir")
            if not place.exists():
                place.parent.mkdir(parents=True, exist_ok=True)
                place.symlink_to(os.path.relpath(done, place.parent.resolve()))


def _show(folders: list[Path], stem: Path, share: list[str]) -> Path:
    """Print and write the table over seeds. Returns its file."""
    import pandas as pd
    from rich.console import Console
    from rich.table import Table

    from lwzlib.exhibits.run_tables import held_out_table, seed_table

    table = seed_table(pd.concat([held_out_table(folder) for folder in folders], ignore_index=True))
    path = stem.with_name(f"{stem.name}-seeds.csv")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, table.to_csv(index=False))
    shown = Table("arm", "reward", "before", "after", "change", "seeds", box=None,
                  title="held-out queries: means over seeds, 95% intervals (Student's t)")
    for row in table.to_dict("records"):
        cells = [f"{row[name]:{form}} [{row[f'{name}_low']:{form}}, {row[f'{name}_high']:{form}}]".replace("[", "\\[")
                 if row[f"{name}_low"] == row[f"{name}_low"] else f"{row[name]:{form}}"
                 for name, form in (("before", ".2f"), ("after", ".2f"), ("change", "+.2f"))]
        shown.add_row(row["arm"], row["reward"], *cells, row["seeds"])
    Console().print(shown)
    if share:
        print(f"one for all seeds: {', '.join(share)}. The intervals cover what comes after, not another {share[0]}")
    print(f"{path}: {len(table)} rows")
    return path
