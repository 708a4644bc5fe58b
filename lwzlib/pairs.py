"""Preference pairs in one schema, and a builder that makes them without annotation.

The paper's human preference data are not public. A pair made here prefers an original to a worse text made from it: a
damaged copy (`lwzlib.damage`), the small model's own continuation in place of the human one (`human_model`), or another
answer to the same query that leaves out a requirement (`requirement`). Human data plug in by the same schema.
"""

import itertools
import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lwzlib import corpus
from lwzlib.damage import DAMAGES, plain
from lwzlib.data import DataError, rows_of
from lwzlib.text import count_words, has_han, language_of, split_sentences

_CONTINUE = {"en": "Continue this text.\n\n{}", "zh": "请续写下文。\n\n{}"}
_MENTION = {"en": "{} Mention the word {}.", "zh": "{}文中须提到“{}”。"}
_SHOWN_WORDS = 40  # of the passage that a human text continues


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


@dataclass(frozen=True)
class Original:
    """A text worth preferring, the prompt it answers, and another text of a model for that prompt (or none)."""

    source: str
    prompt: str
    text: str
    human: bool
    alternative: str = ""


def load(source: str) -> list[Pair]:
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


def human_originals(sources: Iterable[str], passage_words: int, most: int, seed: int) -> list[Original]:
    """At most `most` passages of each corpus, each with the end of the passage before it as its prompt."""
    found = []
    for source in sources:
        own = []
        for document in corpus.documents(source):
            for before, text in itertools.pairwise(corpus.passages(document, passage_words)):
                prompt = _CONTINUE[document.language].format(_tail(before))
                own.append(Original(document.id, prompt, text, human=True))
        found += random.Random(seed).sample(own, min(most, len(own)))
    return found


def _tail(text: str) -> str:
    if has_han(text):
        return text[-2 * _SHOWN_WORDS :]
    return " ".join(text.split()[-_SHOWN_WORDS:])


def _damageable(text: str) -> bool:
    return len(set(split_sentences(text))) >= 3


def _damaged(name):
    def make(original, rng, other):
        if not (_damageable(original.text) and _damageable(other.text)):
            return None
        return original.prompt, plain(original.text), DAMAGES[name](original.text, rng, other.text)

    return make


def _human_model(original, rng, other):
    usable = original.human and original.alternative
    return (original.prompt, " ".join(original.text.split()), original.alternative) if usable else None


def _requirement(original, rng, other):
    """The query, with a word asked for that the text has and the alternative has not; the text was not written for it,
    so that nothing but the requirement tells the two apart."""
    if original.human or not original.alternative:
        return None
    language = language_of(original.text)
    pattern = r"[\u4e00-\u9fff]{2}" if language == "zh" else r"\b[a-z]{6,}\b"
    missing = sorted(set(re.findall(pattern, original.text)) - set(re.findall(pattern, original.alternative)))
    missing = [word for word in missing if word not in f"{original.prompt} {original.alternative}".lower()]
    if not missing:
        return None
    return _MENTION[language].format(original.prompt, rng.choice(missing)), original.text, original.alternative


KINDS = {name: _damaged(name) for name in DAMAGES} | {"human_model": _human_model, "requirement": _requirement}


def build(originals: list[Original], kinds: Sequence[str], per_kind: int, seed: int) -> list[Pair]:
    """At most `per_kind` pairs of each kind, spread over the originals, human and model-written in turn; each original
    gives at most one pair a kind."""
    rng = random.Random(seed)
    pairs = []
    for kind in kinds:
        human, written = ([o for o in originals if o.human == is_human] for is_human in (True, False))
        turns = itertools.zip_longest(*(rng.sample(some, len(some)) for some in (human, written)))
        ordered, found = [o for turn in turns for o in turn if o], []
        for original in ordered:
            others = [o for o in originals if o.source != original.source and has_han(o.text) == has_han(original.text)]
            usable = len(found) < per_kind and (others or kind not in DAMAGES)
            made = KINDS[kind](original, rng, rng.choice(others or [original])) if usable else None
            if made and made[1] != made[2]:
                found.append(Pair(prompt=made[0], chosen=made[1], rejected=made[2], source=original.source, kind=kind))
        pairs += found
    return pairs


def split(originals: list, heldout_share: float, seed: int) -> tuple[list, list]:
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


def card(pairs: dict[str, list[Pair]]) -> pd.DataFrame:
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
