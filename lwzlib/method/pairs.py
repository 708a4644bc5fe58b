"""Preference pairs: their schema, their split by source, their balance in length, and their data card.

The paper trains its Writing RM on human preference data that are not public. Here human data plug in by this schema, or pairs
are made without annotation (`lwzlib.data.made`): they prefer an original to a damaged copy of it, a human continuation to the
small model's own (`human_model`), or an answer that meets a requirement to one that leaves it out (`requirement`).
"""

import random
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict, Field

from lwzlib.base.rows import DataError, rows_of, validated
from lwzlib.method.text import count_words, language_of


class Pair(BaseModel):
    """One preference pair. `source` names the document or query that both texts come from; splits keep its pairs together."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt: str = Field(min_length=1)
    chosen: str = Field(min_length=1)
    rejected: str
    source: str = Field(min_length=1)
    kind: str = "human"

    @property
    def language(self) -> str:
        """Language of the chosen text: `zh` if it has a Han character, else `en`."""
        return language_of(self.chosen)


def load_pairs(source: str) -> list[Pair]:
    """Pairs of a JSONL file or `hub:<dataset>`. Raises DataError at the first row that breaks the schema."""
    if not source.startswith("hub:") and not Path(source).is_file():
        raise DataError(f"no preference pairs in {source}. The paper's are not public: put yours there, one JSON object per "
                        "line with prompt, chosen, rejected, source and kind; or set writing_rm.pairs=made")
    pairs = []
    for place, row in rows_of(source):
        try:
            pairs.append(validated(place, row, Pair))
        except DataError as error:
            raise DataError(f"{error}; a pair has prompt, chosen, rejected, source, kind") from None
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
