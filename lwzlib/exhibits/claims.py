"""The claims ledger: `figures/claims.yaml` against the committed rows; every verdict is computed, none is written down.

A test is a weighted sum of one column over arms, at the same queries (or places in a quarter of the RL steps) and seeds. Its
intervals are Student's t, 95%, each over what it names: over queries or steps, of their means over the seeds; and over seeds,
of the seeds' means. With one seed the latter does not exist, and nothing is decided.

  no relevant difference  all intervals lie within the smallest effect worth having, on either side of none
  supported               all lie inside the claim's region: they exclude the opposite
  not supported           all lie outside it
  inconclusive            none of these, or there is one seed only, or a part of the claim was not run
  not run                 no rows
A claim of several parts is supported if all of them are, and not supported if any of them is not, or if some make a relevant
difference and others do not. What is worth having belongs in the file before the rows are made: `git log figures/claims.yaml`.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from lwzlib.base.pages import markdown_table
from lwzlib.base.paths import FIGURES
from lwzlib.base.rows import DataError, read_yaml, validated
from lwzlib.evaluate.intervals import t_interval
from lwzlib.exhibits.results import Tables
from lwzlib.exhibits.run_tables import quarter

NO_DIFFERENCE = "no relevant difference"
VERDICTS = ("supported", "not supported", NO_DIFFERENCE, "inconclusive", "not run")
_SEEN = (1.96 + 0.84) / 1.96  # half-intervals: the effect that is detected with 80% power, by the normal approximation
_TERM = re.compile(r"\S+ (before|after|quarter [1-4])")


class Test(BaseModel):
    """`region`: (low, high), either of which may be open, in units of `column`, or as a share if `relative`. In the same units,
    `worth` is the smallest effect worth having, of a test whose region is open at one end."""

    __test__ = False  # for pytest
    model_config = ConfigDict(extra="forbid")

    name: str
    column: str
    contrast: dict[str, float] = Field(min_length=2)
    region: tuple[float | None, float | None]
    relative: bool = False
    worth: Annotated[float, Field(gt=0)] | None = None

    @field_validator("contrast")
    @classmethod
    def _terms(cls, contrast):
        if bad := [term for term in contrast if not _TERM.fullmatch(term)]:
            raise ValueError(f"{bad[0]!r} is not of the form '<arm> before', '<arm> after' or '<arm> quarter <1-4>'")
        return contrast

    @model_validator(mode="after")
    def _open_where_worth(self):
        if self.worth and None not in self.region:
            raise ValueError(f"worth = {self.worth} needs a region that is open at one end, not {list(self.region)}")
        return self

    @property
    def low(self) -> float:
        """Lower end of `region`; -inf where it is open."""
        return -np.inf if self.region[0] is None else self.region[0]

    @property
    def high(self) -> float:
        """Upper end of `region`; inf where it is open."""
        return np.inf if self.region[1] is None else self.region[1]


class Claim(BaseModel):
    """An entry of `figures/claims.yaml`; `command` makes the rows that its tests read."""

    model_config = ConfigDict(extra="forbid")

    id: Annotated[str, Field(pattern=r"^[a-z0-9-]+$")]
    of: Literal["paper", "reviewers", "kit"]
    claim: str
    published: str
    notebook: str
    command: str
    tests: list[Test] = []
    why_not: str = ""  # why it is not tested

    @model_validator(mode="after")
    def _tested_or_excused(self):
        if bool(self.tests) == bool(self.why_not):
            raise ValueError("a claim has either tests, or `why_not`")
        return self


@dataclass(frozen=True)
class Finding:
    """One test in one setting: the effect, and its intervals by what they cover ({} if it was not run)."""

    name: str
    verdict: str
    effect: float
    intervals: dict[str, tuple[float, float]]
    seeds: tuple[int, ...]
    relative: bool = False

    def __str__(self):
        if self.verdict == "not run":
            return f"{self.name}: not run here"
        form = "{:+.0%}" if self.relative else "{:+.2f}"
        parts = [f"[{form.format(low)}, {form.format(high)}] over {covers}" for covers, (low, high) in self.intervals.items()]
        parts += ["one seed, so no interval over seeds"] * (len(self.seeds) == 1)
        halves = [(high - low) / 2 for low, high in self.intervals.values() if low < high]
        if self.verdict == "inconclusive" and len(self.seeds) > 1 and halves:
            parts += [f"an effect of {form.format(_SEEN * max(halves)).lstrip('+')} would have been detected with 80% power"]
        return f"{self.name}: {form.format(self.effect)}; {'; '.join(parts)}"


@dataclass(frozen=True)
class Entry:
    """A claim in one setting ("" if no setting has rows for it)."""

    claim: Claim
    setting: str
    verdict: str
    findings: tuple[Finding, ...]


def load_claims(path: Path = FIGURES / "claims.yaml") -> list[Claim]:
    """Entries of `figures/claims.yaml`. Raises DataError, which names the claim and the field, for one of another form."""
    rows = read_yaml(Path(path))
    claims = [validated(f"{path}, claim {row.get('id', i)}", row, Claim) for i, row in enumerate(rows)]
    if len({claim.id for claim in claims}) < len(claims):
        raise DataError(f"{path}: two claims have the same id")
    return claims


def ledger(claims: list[Claim], tables: Tables) -> list[Entry]:
    """One entry per claim and setting that has rows for it; one `not run` entry for a claim without any."""
    entries = []
    for claim in claims:
        run = []
        for setting in tables.settings:
            findings = tuple(examine_test(test, tables.of(setting)) for test in claim.tests)
            if any(finding.verdict != "not run" for finding in findings):
                run.append(Entry(claim, setting, combined_verdict([finding.verdict for finding in findings]), findings))
        entries += run or [Entry(claim, "", "not run", ())]
    return entries


def by_verdict(entries: list[Entry]) -> dict[str, list[Entry]]:
    """Entries by verdict, of the verdicts that some have."""
    return {verdict: of for verdict in VERDICTS if (of := [entry for entry in entries if entry.verdict == verdict])}


def combined_verdict(verdicts: list[str]) -> str:
    """Verdict on a claim from those on its parts, at least one of which was run."""
    found = set(verdicts)
    if "not supported" in found or {"supported", NO_DIFFERENCE} <= found:
        return "not supported"
    return found.pop() if len(found) == 1 else "inconclusive"


def examine_test(test: Test, tables: Tables) -> Finding:
    """Finding of one test in one setting."""
    terms = [weight * values for term, weight in test.contrast.items()
             if (values := _values(tables, term, test.column)) is not None]
    if len(terms) < len(test.contrast):
        return Finding(test.name, "not run", np.nan, {}, ())
    shared = pd.concat(terms, axis=1, keys=range(len(terms))).dropna()
    if shared.empty:
        return Finding(test.name, "not run", np.nan, {}, ())
    sums = shared.sum(axis=1)
    if test.relative:
        sums /= shared.abs().mean(axis=None)
    units, seeds = (sums.groupby(level=level).mean() for level in ("unit", "seed"))
    covers = "queries" if next(iter(test.contrast)).endswith(("before", "after")) else "steps"
    intervals = {f"{len(units)} {covers}": t_interval(units)}
    if len(seeds) > 1:
        intervals[f"{len(seeds)} seeds"] = t_interval(seeds)
    verdict = verdict_of(intervals.values(), len(seeds), test)
    return Finding(test.name, verdict, float(seeds.mean()), intervals, tuple(map(int, seeds.index)), test.relative)


def verdict_of(intervals, seeds: int, test: Test) -> str:
    """Verdict by the rule above. An interval without ends (of one value) excludes nothing."""
    if seeds < 2 or any(np.isnan(ends).any() for ends in intervals):
        return "inconclusive"
    if test.worth and all(-test.worth < low and high < test.worth for low, high in intervals):
        return NO_DIFFERENCE
    if all(low > test.low and high < test.high for low, high in intervals):
        return "supported"
    return "not supported" if all(high < test.low or low > test.high for low, high in intervals) else "inconclusive"


def _values(tables: Tables, term: str, column: str) -> pd.Series | None:
    """Values by (seed, unit) of one term, or None where it was not measured."""
    arm, _, when = term.partition(" ")
    of_steps = when.startswith("quarter")
    rows = tables.rl if of_steps else tables.held_out
    rows = rows[(rows.arm == arm) & (True if of_steps else rows.phase == when)]
    if column not in rows or rows[column].isna().all():
        return None
    if of_steps:
        rows = pd.concat([quarter(steps, int(when[-1])) for _, steps in rows.groupby("seed")])
    named = rows.assign(unit=rows.place if of_steps else rows.id)
    return named.set_index(["seed", "unit"])[column].astype(float)


def ledger_markdown(entries: list[Entry]) -> str:
    """The ledger as a Markdown table."""
    rows = []
    for entry in entries:
        claim = entry.claim
        measured = "<br>".join([f"*{entry.setting}*", *map(str, entry.findings)]) if entry.findings else why_not_run(entry)
        rows.append((f"{claim.claim} ({claim.of}; `{claim.notebook}`, `{claim.command}`)", claim.published, measured,
                     f"**{entry.verdict}**"))
    return markdown_table(("claim", "published", "measured here", "verdict"), rows)


def why_not_run(entry: Entry) -> str:
    """Reason why a claim has no findings."""
    return f"not run here: {entry.claim.why_not or f'`{entry.claim.command}` makes the rows'}"
