"""Preference pairs: their schema, their split by source, their balance in length, and their data card.

The paper trains its Writing RM on human preference data that are not public. Here human data plug in by this schema, or pairs
are made without annotation (`lwzlib.data.made`): they prefer an original to a damaged copy of it, a human continuation to the
small model's own (`human_model`), or an answer that meets a requirement to one that leaves it out (`requirement`).
"""

import hashlib
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, model_validator

from lwzlib.base.recipe import Recipe
from lwzlib.base.rows import DataError, RunError, rows_of, validated, write_rows
from lwzlib.base.run_folder import Run
from lwzlib.method.text import count_words, language_of

_DELETED = {"[deleted]", "[removed]"}  # what Reddit shows in the place of a text that is no more


class Pair(BaseModel):
    """One preference pair. `source` names the document or query that both texts come from; splits keep its pairs together."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt: str = Field(min_length=1)
    chosen: str = Field(min_length=1)
    rejected: str
    source: str = Field(min_length=1)
    kind: str = "human"

    @model_validator(mode="before")
    @classmethod
    def _in_these_columns(cls, row):
        return public_pair(row) or row

    @property
    def language(self) -> str:
        """Language of the chosen text, `en` or `zh`."""
        return language_of(self.chosen)


PAIR_FILES = ("pairs_train.jsonl", "pairs_heldout.jsonl")
PairMaker = Callable[[Recipe, Run], tuple[list[Pair], list[Pair]]]  # called where writing_rm.pairs is `made`


def prepare_pairs(recipe: Recipe, run: Run, maker: PairMaker) -> Path:
    """Leave training and held-out pairs, read from where the recipe says or made by `maker`, in `PAIR_FILES`, and their data
    card in `card.csv`; returns the run's folder."""
    settings = recipe.writing_rm
    if run.finished:
        return run.folder
    with run.work():
        if settings.pairs == "made":
            train, heldout = maker(recipe, run)
        else:
            train, heldout = split_by_source(load_pairs(settings.pairs, settings.fold_layout), settings.heldout_share, run.seed)
        if settings.length_balanced:
            train = balance_lengths(train, run.seed)
        for part, pairs in (("train", train), ("heldout", heldout)):
            if not pairs:
                raise RunError(f"no {part} pairs are left; give more sources, another writing_rm.heldout_share, or "
                               "writing_rm.length_balanced=false")
        data_card({"train": train, "heldout": heldout}).to_csv(run.folder / "card.csv", index=False)
        for file, pairs in zip(PAIR_FILES, (train, heldout), strict=True):
            write_rows(run.folder / file, [pair.model_dump() for pair in pairs])
    return run.folder


def public_pair(row) -> dict | None:
    """A row of LitBench (prompt, chosen_story, rejected_story) or of WritingPreferenceBench (prompt, chosen and rejected with a
    text and a score each, genre) in the columns of `Pair`; None for any other row. Their prompt stands for the source."""
    if not isinstance(row, dict):
        return None
    if "chosen_story" in row:
        chosen, rejected, kind = row["chosen_story"], row.get("rejected_story"), "litbench"
    elif isinstance(row.get("chosen"), dict) and isinstance(row.get("rejected"), dict):
        chosen, rejected = row["chosen"].get("text"), row["rejected"].get("text")
        kind = row.get("genre") or "writing-preference-bench"
    else:
        return None
    source = hashlib.sha256(str(row.get("prompt")).encode()).hexdigest()[:16]
    return {"prompt": row.get("prompt"), "chosen": chosen, "rejected": rejected, "source": source, "kind": kind}


def is_tie(chosen: str, rejected: str, fold_layout: bool) -> bool:
    """Whether the two texts of a pair are the same to a Writing RM that folds the layout, or does not."""
    return chosen == rejected or (fold_layout and chosen.split() == rejected.split())


def load_pairs(source: str, fold_layout: bool = False) -> list[Pair]:
    """Pairs of a JSONL file or `hub:<dataset>`. Raises DataError at the first row that breaks the schema, or whose texts are
    the same (with `fold_layout`, but for their white space): nothing can be learnt from it, nor measured."""
    if not source.startswith("hub:") and not Path(source).is_file():
        raise DataError(f"no preference pairs in {source}. The paper's are not public: put yours there, one JSON object per "
                        "line with prompt, chosen, rejected, source and kind; or set writing_rm.pairs=made, or "
                        "writing_rm.pairs=hub:SAA-Lab/LitBench-Train")
    pairs, left_out = [], 0
    for place, row in rows_of(source):
        try:
            pair = validated(place, row, Pair)
        except DataError as error:
            raise DataError(f"{error}; a pair has prompt, chosen, rejected, source, kind, or is a row of LitBench or "
                            "WritingPreferenceBench with its texts") from None
        lost = {pair.chosen, pair.rejected} & _DELETED or is_tie(pair.chosen, pair.rejected, fold_layout)
        if lost and public_pair(row):
            left_out += 1  # nobody can mend a dataset on the hub
            continue
        if is_tie(pair.chosen, pair.rejected, fold_layout):
            but = " but for white space, which writing_rm.fold_layout folds" if pair.chosen != pair.rejected else ""
            raise DataError(f"{place}: chosen and rejected are the same{but}: leave the pair out")
        pairs.append(pair)
    if left_out:
        print(f"{source}: {left_out:,} pairs are left out: their texts are the same, or one was deleted", flush=True)
    if not pairs:
        raise DataError(f"{source} holds no preference pair")
    return pairs


def split_by_source(originals: list, heldout_share: float, seed: int) -> tuple[list, list]:
    """(train, held out) of items that have a `source`: no document and no query stands on both sides."""
    sources = sorted({item.source for item in originals})
    random.Random(seed).shuffle(sources)
    heldout = set(sources[: round(len(sources) * heldout_share)])
    return [item for item in originals if item.source not in heldout], [item for item in originals if item.source in heldout]


def balance_lengths(pairs: list[Pair], seed: int) -> list[Pair]:
    """Pairs in their order, without the surplus of those whose chosen text is the longer one, or the shorter one (kinds in
    proportion): then a model that only counts words is right half of the time."""
    sides: dict[bool, list[Pair]] = {True: [], False: []}
    for pair in random.Random(seed).sample(pairs, len(pairs)):
        if difference := count_words(pair.chosen) - count_words(pair.rejected):
            sides[difference > 0].append(pair)
    fewer = min(map(len, sides.values()))
    dropped = {id(pair) for side in sides.values() for pair in side[fewer:]}
    return [pair for pair in pairs if id(pair) not in dropped]


def data_card(pairs: dict[str, list[Pair]]) -> pd.DataFrame:
    """The data card: one row per split and kind, with counts, sources, languages and median words."""
    rows = []
    for split, split_pairs in pairs.items():
        for kind in dict.fromkeys(pair.kind for pair in split_pairs):
            own = [pair for pair in split_pairs if pair.kind == kind]
            languages = sorted(Counter(pair.language for pair in own).items())
            chosen_words = np.array([count_words(pair.chosen) for pair in own])
            rejected_words = np.array([count_words(pair.rejected) for pair in own])
            rows.append({
                "split": split, "kind": kind, "pairs": len(own), "sources": len({pair.source for pair in own}),
                "languages": " ".join(f"{language}:{count}" for language, count in languages),
                "chosen_words": np.median(chosen_words), "rejected_words": np.median(rejected_words),
                "chosen_longer": (chosen_words > rejected_words).mean()})
    return pd.DataFrame(rows)
