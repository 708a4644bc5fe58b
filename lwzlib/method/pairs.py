"""Preference pairs in one schema, and a builder that makes them without annotation.

The paper's human preference data are not public. A pair made here prefers an original to a worse text made from it: a
damaged copy (`lwzlib.data.damage`), the small model's own continuation in place of the human one (`human_model`), or another
answer to the same query that leaves out a requirement (`requirement`). Human data plug in by the same schema.
"""

import random
from collections import Counter
from pathlib import Path

import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lwzlib.base.rows import DataError, rows_of
from lwzlib.method.text import count_words, language_of


class Pair(BaseModel):
    """`source` names the document or query that both texts come from; splits keep its pairs together."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt: str = Field(min_length=1)
    chosen: str = Field(min_length=1)
    rejected: str
    source: str = Field(min_length=1)
    kind: str = "human"

    @property
    def language(self) -> str:
        """That of the chosen text: `zh` if it has a Han character, else `en`."""
        return language_of(self.chosen)


def load_pairs(source: str) -> list[Pair]:
    """Pairs of a JSONL file or `hub:<dataset>`. Raises DataError at the first row that breaks the schema."""
    if not source.startswith("hub:") and not Path(source).is_file():
        raise DataError(f"no preference pairs in {source}. The paper's are not public: put yours there, a JSON object a line "
                        "with prompt, chosen, rejected, source and kind; or set writing_rm.pairs=made")
    pairs = []
    for place, row in rows_of(source):
        try:
            pairs.append(Pair.model_validate(row))
        except ValidationError as error:
            problem = error.errors()[0]
            raise DataError(f"{place}: {'.'.join(map(str, problem['loc']))}: {problem['msg']}; a pair has prompt, chosen, "
                            "rejected, source, kind".replace(": : ", ": ")) from None
    if not pairs:
        raise DataError(f"{source} holds no preference pair")
    return pairs


def split_by_source(originals: list, heldout_share: float, seed: int) -> tuple[list, list]:
    """(train, held out), cut by source: no document and no query stands on both sides."""
    sources = sorted({item.source for item in originals})
    random.Random(seed).shuffle(sources)
    heldout = set(sources[: round(len(sources) * heldout_share)])
    return [o for o in originals if o.source not in heldout], [o for o in originals if o.source in heldout]


def balance_lengths(pairs: list[Pair], seed: int) -> list[Pair]:
    """As many pairs whose chosen text is the longer as pairs whose rejected text is (kinds in proportion): then a model
    that only counts words is right half of the time."""
    sides: dict[bool, list[Pair]] = {True: [], False: []}
    for pair in random.Random(seed).sample(pairs, len(pairs)):
        if (difference := count_words(pair.chosen) - count_words(pair.rejected)) != 0:
            sides[difference > 0].append(pair)
    fewer = min(map(len, sides.values()))
    dropped = {id(p) for side in sides.values() for p in side[fewer:]}
    return [pair for pair in pairs if id(pair) not in dropped]


def data_card(pairs: dict[str, list[Pair]]) -> pd.DataFrame:
    """The data card: a row per split and kind with counts, sources, languages and median words."""
    rows = []
    for part, some in pairs.items():
        for kind in dict.fromkeys(pair.kind for pair in some):
            own = [pair for pair in some if pair.kind == kind]
            chosen, rejected = ([count_words(text) for text in texts] for texts in zip(*((p.chosen, p.rejected) for p in own),
                                                                                      strict=True))
            rows.append({
                "split": part, "kind": kind, "pairs": len(own), "sources": len({p.source for p in own}),
                "languages": " ".join(f"{k}:{n}" for k, n in sorted(Counter(p.language for p in own).items())),
                "chosen_words": pd.Series(chosen).median(), "rejected_words": pd.Series(rejected).median(),
                "chosen_longer": sum(a > b for a, b in zip(chosen, rejected, strict=True)) / len(own)})
    return pd.DataFrame(rows)
