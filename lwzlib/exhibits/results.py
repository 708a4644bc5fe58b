"""Published numbers (`figures/published`) and the committed rows of own runs (`figures/results`), read and checked.

`<setting>.csv` holds a row an RL step, `<setting>_held_out.csv` a row a held-out sample, `<setting>_mixture.csv` a row a
source of the pretraining tokens; the setting is the recipe, or whatever the file is named after. A row that does not say
what made it is refused: a number that nobody can trace is worth less than a gap.

The paper's Elo is of Arena-Write. Here Elo is of the embedded arena: the held-out queries, judged by the scores of the
Writing RM that the arms were trained on. So it shows what they learnt, not how well they write.
"""

import csv
import functools
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, model_validator

from lwzlib.base.paths import FIGURES
from lwzlib.base.rows import DataError, validated
from lwzlib.evaluate import TIE_MARGIN, arena, elo
from lwzlib.evaluate.arena import judgment_table
from lwzlib.evaluate.length_control import with_length_control

ANCHOR = "base-nothink@0"
_Finite = Annotated[float, Field(allow_inf_nan=False)]
_Said = Annotated[str, Field(min_length=1)]


class _Row(BaseModel):
    """Provenance that every measured row carries. Further columns are numbers, empty where nothing was measured."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, _Finite | None]

    model: _Said
    arm: _Said
    seed: Annotated[int, Field(ge=0)]
    fingerprint: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
    commit: Annotated[str, Field(pattern=r"^[0-9a-f]{40}\+?$")]  # + : with other changes, see provenance.commit_of
    hardware: _Said
    versions: _Said
    shared: str | None = None  # stages that it took from another seed's run


class RlRow(_Row):
    """Row of `<setting>.csv`: one RL step, counted from 1; rewards and lengths are among its further columns."""

    step: Annotated[int, Field(ge=1)]


class HeldOutRow(_Row):
    """A row of `<setting>_held_out.csv`: one sample; `writing` is its score by the Writing RM, None where there was none."""

    algorithm: Literal["grpo", "sft"]
    start: _Said
    judge: str | None  # the Writing RM's identity
    phase: Literal["before", "during", "after"]
    step: Annotated[int, Field(ge=0)] | None  # of RL; SFT has none
    id: _Said
    writing: _Finite | None = None
    truncated: bool

    @model_validator(mode="after")
    def _complete(self):
        if self.writing is not None and not self.judge:
            raise ValueError("a writing score needs its judge, the identity of the Writing RM")
        if self.step is None and (self.algorithm == "grpo" or self.phase == "during"):
            raise ValueError(f"a row of algorithm {self.algorithm}, phase {self.phase} needs its RL step")
        return self


class MixtureRow(_Row):
    """A row of `<setting>_mixture.csv`: the tokens that were packed from one source."""

    source: _Said
    tokens: Annotated[int, Field(ge=0)]


class Published(BaseModel):
    """A published number: `qualifier` is how it was given, `confidence` how well it is known (A or B)."""

    model_config = ConfigDict(extra="forbid")

    exhibit: _Said
    model: str | None
    params: str | None
    start: str | None
    algorithm: str | None
    metric: _Said
    value: _Finite
    qualifier: Literal["exact", "about", "near", "above", "at most"]
    unit: str | None
    source: _Said
    confidence: Literal["A", "B"]
    note: str | None


_KINDS: dict[str, tuple[type[BaseModel], list[str]]] = {
    "_held_out": (HeldOutRow, ["arm", "seed", "phase", "step", "id"]),
    "_mixture": (MixtureRow, ["arm", "seed", "source"]), "": (RlRow, ["arm", "seed", "step"])}


@dataclass(frozen=True)
class Tables:
    """Tables that the exhibits are drawn from. All but `published` carry the `setting` that they were measured in."""

    published: pd.DataFrame
    rl: pd.DataFrame
    held_out: pd.DataFrame
    mixture: pd.DataFrame

    def of(self, setting: str) -> "Tables":
        """Tables of one setting, kept, so that its Elo is computed once."""
        if setting not in self._parts:
            measured = (getattr(self, field.name) for field in fields(self)[1:])
            self._parts[setting] = Tables(self.published, *(rows[rows.setting == setting] for rows in measured))
        return self._parts[setting]

    def numbers(self, exhibit: str, *metrics: str) -> pd.DataFrame:
        """Published numbers of an exhibit: of these metrics, or all."""
        rows = self.published[self.published.exhibit == exhibit]
        return rows[rows.metric.isin(metrics)] if metrics else rows

    @functools.cached_property
    def _parts(self) -> dict[str, "Tables"]:
        return {}

    @functools.cached_property
    def elo(self) -> pd.DataFrame:
        """Ratings of one setting, by `embedded_elo`."""
        return embedded_elo(self.held_out)

    @property
    def settings(self) -> list[str]:
        """Settings that have rows: the kit's recipes by scale, then others by name."""
        scales, measured = ("nano", "laptop", "gpu", "paper"), {*self.rl.setting, *self.held_out.setting, *self.mixture.setting}
        return sorted(measured, key=lambda name: (scales.index(name) if name in scales else len(scales), name))


def scale_table(tables: Tables) -> pd.DataFrame:
    """Scale of each setting, as text: model, arms, seeds, RL steps, held-out queries, machine, commits, what seeds share."""
    rows: list[dict] = []
    for setting in tables.settings:
        of = tables.of(setting)
        both = pd.concat([of.rl, of.held_out]).reindex(columns=["model", "arm", "seed", "hardware", "commit", "shared"])
        values = {name: list(map(str, sorted(both[name].dropna().unique()))) for name in both}
        rows.append({"setting": setting, "model": ", ".join(values["model"]), "arms": len(values["arm"]),
                     "seeds": ", ".join(values["seed"]), "RL steps": of.rl.step.max() if len(of.rl) else "none",
                     "held-out queries": of.held_out.id.nunique() if len(of.held_out) else "none",
                     "machine": "; ".join(values["hardware"]),
                     "commits": ", ".join(commit[:7] + commit[40:] for commit in values["commit"]),
                     "seeds share": ", ".join(values["shared"]) or "nothing"})
    return pd.DataFrame(rows)


def read_tables(results: Path = FIGURES / "results", published: Path = FIGURES / "published") -> Tables:
    """Tables of both folders; a results file that is missing leaves its table empty. Raises DataError, which names file,
    line and field, for a row without its provenance, a row that comes twice, or two runs under one arm and seed."""
    numbers = [_checked(path, Published, ["exhibit", "model", "metric"]) for path in sorted(Path(published).glob("*.csv"))]
    if not numbers:
        raise DataError(f"no published numbers in {published}; they are in figures/published of the project")
    measured: dict[str, list] = {kind: [] for kind in _KINDS}
    for path in sorted(Path(results).glob("*.csv")):
        kind = next(kind for kind in _KINDS if path.stem.endswith(kind))
        rows = _checked(path, *_KINDS[kind])
        measured[kind].append(rows.assign(setting=path.stem.removesuffix(kind)))
    rl, held_out, mixture = (_joined(measured[kind], _KINDS[kind][0]) for kind in ("", "_held_out", "_mixture"))
    return Tables(_joined(numbers, Published), rl, with_length_control(held_out), mixture)


def _checked(path: Path, kind: type[BaseModel], key: list[str]) -> pd.DataFrame:
    rows, seen, runs = [], {}, {}
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        for cells in reader:
            place = f"{path}, line {reader.line_num}"
            row = validated(place, {name: cell or None for name, cell in cells.items()}, kind).model_dump()
            mark = tuple(row[name] for name in key)
            if mark in seen:
                raise DataError(f"{place}: {' / '.join(map(str, mark))} was already at line {seen[mark]}")
            seen[mark] = reader.line_num
            if kind is RlRow:
                run = (row["arm"], row["seed"])
                if runs.setdefault(run, row["fingerprint"]) != row["fingerprint"]:
                    raise DataError(f"{place}: fingerprint = {row['fingerprint']!r}, but {run[0]} with seed {run[1]} began as "
                                    f"{runs[run]!r}: rows of two runs")
            rows.append(row)
    return pd.DataFrame(rows, columns=None if rows else list(kind.model_fields))


def _joined(tables: list[pd.DataFrame], kind: type[BaseModel]) -> pd.DataFrame:
    tables = [table for table in tables if len(table)]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=[*kind.model_fields, "setting"])


def judgments(held_out: pd.DataFrame) -> pd.DataFrame:
    """The embedded arena of one setting: every two players of a seed on every query, the higher score of that seed's
    Writing RM wins. Players are `arm@step`, and `arm after` for an arm without RL steps; column `seed` is added."""
    if not ("writing" in held_out and held_out.writing.notna().any()):
        return judgment_table([]).assign(seed=[])
    rows = held_out.dropna(subset="writing")
    steps = [0 if phase == "before" else step for phase, step in zip(rows.phase, rows.step, strict=True)]
    rows = rows.assign(player=[arena.player_name(arm, step) for arm, step in zip(rows.arm, steps, strict=True)])
    judged = []
    for (seed, judge), samples in rows.groupby(["seed", "judge"]):
        texts = {player: dict.fromkeys(own.id, "") for player, own in samples.groupby("player")}
        tasks = {id: arena.Task(id, "") for id in sorted(set(samples.id))}
        scores = {(row.player, row.id): row.writing for row in samples.itertuples()}
        matches = arena.matches(arena.Arena(tasks, texts))
        judged.append(arena.judged_by_scores(matches, scores, f"Writing RM {judge}", TIE_MARGIN).assign(seed=seed))
    return pd.concat(judged, ignore_index=True)


def embedded_elo(held_out: pd.DataFrame) -> pd.DataFrame:
    """Elo of one setting's embedded arena, a row a player: arm, step (NaN without one), elo, low, high (95%, over queries),
    seeds, and over several seeds `seed_low`, `seed_high`, the range of their own ratings. The no-think arm before its
    training stands at 1000; without it, whoever is first by name. Empty where nothing was judged."""
    judged = judgments(held_out)
    columns = ["arm", "step", "elo", "low", "high", "seeds", "seed_low", "seed_high", "anchor"]
    if judged.empty:
        return pd.DataFrame({name: pd.Series(dtype=object if name in ("arm", "anchor") else float) for name in columns})
    names = elo.players(judged)[0]
    anchor = ANCHOR if ANCHOR in names else names[0]
    table = elo.ratings(judged, anchor).table
    own = [elo.ratings(of_seed, anchor, resamples=1).table.set_index("model").elo
           for _, of_seed in judged.groupby("seed") if anchor in elo.players(of_seed)[0]]
    per_seed = pd.DataFrame(dict(enumerate(own))).reindex(table.model)
    cut = table.model.str.extract(f"^{elo.STEP}$")
    several = len(own) > 1
    return table.assign(
        arm=cut.arm.fillna(table.model.str.removesuffix(" after")), step=cut.step.astype(float), anchor=anchor,
        seeds=judged.seed.nunique(), seed_low=per_seed.min(axis=1).to_numpy() if several else float("nan"),
        seed_high=per_seed.max(axis=1).to_numpy() if several else float("nan"))[columns].sort_values(
            ["arm", "step"], ignore_index=True)
