"""How well the two signals of repetition tell repeated passages from honest ones: the data behind their thresholds.

Honest: long texts by people, and texts that repeat by nature (refrains, legal wording, lists, tables). Repeated: the
same texts with passages put in again, as they are, reworded by synonyms, filled into a template, or paraphrased by hand.
A sentence's lexical score is its highest Jaccard similarity with an earlier sentence; a run's semantic score, its
highest cosine with an earlier run. Nothing here is used in training.
"""

import functools
import random
from collections.abc import Callable

import numpy as np
import pandas as pd

from lwzlib.base.rows import read_rows
from lwzlib.data import damage
from lwzlib.data.sources import Document, read_documents
from lwzlib.method import overlap
from lwzlib.method.text import count_passages, count_words

CORPORA = {"kit:python-docs": 8, "kit:shakespeare": 8, "kit:three-kingdoms": 8}  # documents taken of each


def honest(words: int) -> list[dict]:
    """Texts of at most `words` words: {id, kind, language, text}; kind is `plain`, or what repeats by nature."""
    found = [row | {"id": f"natural/{row['id']}"} for row in read_rows(damage.TEXTS / "natural_repeats.jsonl")]
    for source, count in CORPORA.items():
        longest = sorted(read_documents(source), key=lambda d: -sum(map(count_words, d.paragraphs)))[:count]
        found += [{"id": d.id, "kind": "plain", "language": d.language, "text": _start(d, words)} for d in longest]
    return found


def _start(document: Document, words: int) -> str:
    taken, total = [], 0
    for passage, count in count_passages("\n\n".join(document.paragraphs)):
        taken.append(passage)
        if (total := total + count) >= words:
            break
    return " ".join(taken)


def repeated(texts: list[dict], seed: int = 0, times: int = 3) -> list[dict]:
    """{kind, language, id, text, before, added}: each plain text, with a passage `added` that repeats one of the text, or
    the passage `before` it; `times` per kind of repetition."""
    rng, found = random.Random(seed), []
    paraphrases = read_rows(damage.TEXTS / "paraphrases.jsonl")
    by_hand = {language: [r for r in paraphrases if r["language"] == language] for language in ("en", "zh")}
    for text in (t for t in texts if t["kind"] == "plain"):
        language, passages = text["language"], [p for p, _ in count_passages(text["text"])]
        runs = _runs(passages)
        for _ in range(times):
            own, pair = " ".join(passages[i] for i in rng.choice(runs[:-1])), rng.choice(by_hand[language])
            frame = rng.choice(damage.wordings(language)["templates"])
            topics = rng.sample(damage.wordings(language)["keywords"], 2)
            for kind, before, added in (
                    ("copied", "", own), ("reworded", "", damage.reword(own, rng, language)),
                    ("templated", *(frame.format(n=n, topic=topic) for n, topic in enumerate(topics, 1))),
                    ("paraphrased by hand", pair["original"], pair["paraphrase"])):
                found.append(text | {"kind": kind, "before": before, "added": added})
    return found


def scores(texts: list[dict], encode: Callable) -> pd.DataFrame:
    """A row per unit: kind, language, id, signal (lexical: a sentence; semantic: a run, English only), score in [0, 1].
    Of a text with `added` only the units of what was added, else all but the first."""
    found = []
    for text in texts:
        about = {name: text[name] for name in ("kind", "language", "id")}
        first, *later = (text["text"], text["before"], text["added"]) if "added" in text else (text["text"],)
        signals: dict[str, Callable] = {"lexical": _lexical, "semantic": functools.partial(_semantic, encode)}
        for signal in ("lexical", "semantic")[: 1 + (text["language"] == "en")]:
            found += [about | {"signal": signal, "score": score} for score in signals[signal](first, *later)]
    return pd.DataFrame(found)


def _lexical(text: str, before: str = "", added: str = "") -> list[float]:
    earlier = _grams(text) + _grams(before)
    if added:
        return [max(_jaccard(own, one) for one in earlier) for own in _grams(added)]
    return [max(_jaccard(own, one) for one in earlier[:i]) for i, own in enumerate(earlier) if i]


def _semantic(encode: Callable, text: str, before: str = "", added: str = "") -> list[float]:
    vectors = _vectors(encode, text)
    if added:
        new = encode([added, before] if before else [added])
        return [float((np.vstack([vectors, new[1:]]) @ new[0]).max())]
    cosines = vectors @ vectors.T
    return [float(cosines[i, :i].max()) for i in range(1, len(vectors))]


@functools.lru_cache(4)  # the texts come in order, each many times
def _grams(text: str) -> list[frozenset]:
    return [overlap.grams_of(passage) for passage, _ in count_passages(text)]


@functools.lru_cache(1)
def _vectors(encode: Callable, text: str) -> np.ndarray:
    passages = [passage for passage, _ in count_passages(text)]
    return encode([" ".join(passages[i] for i in run) for run in _runs(passages)])


def _runs(passages: list[str]) -> list[range]:
    return overlap.runs_of(passages, [max(1, count_words(p)) for p in passages])


def _jaccard(one: frozenset, other: frozenset) -> float:
    return len(one & other) / len(one | other)


def shares(texts: list[dict], rewards: dict) -> pd.DataFrame:
    """Share of each honest text's words that a FormatReward of each name in `rewards` finds repeated."""
    found = [{"kind": t["kind"], "language": t["language"], "id": t["id"]} for t in texts]
    for name, reward in rewards.items():
        for row, result in zip(found, reward.overlaps([t["text"] for t in texts], [""] * len(texts)), strict=True):
            row[name] = result.share
    return pd.DataFrame(found)
