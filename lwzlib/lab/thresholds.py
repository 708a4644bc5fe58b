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

from lwzlib.base.near_duplicates import grams_of
from lwzlib.base.paths import TEXTS
from lwzlib.base.rows import read_rows
from lwzlib.data.damage import reword, wordings
from lwzlib.data.sources import read_documents
from lwzlib.method import overlap
from lwzlib.method.text import count_passages, count_words, language_of

CORPORA = {"kit:python-docs": 8, "kit:shakespeare": 8, "kit:three-kingdoms": 8}  # documents taken from each


def honest(words: int) -> list[dict]:
    """Texts of at most `words` words: {id, kind, language, text}; kind is `plain`, or what repeats by nature."""
    texts = [row | {"id": f"natural/{row['id']}"} for row in read_rows(TEXTS / "natural_repeats.jsonl")]
    for source, count in CORPORA.items():
        longest = sorted(read_documents(source), key=lambda document: -sum(map(count_words, document[1])))[:count]
        texts += [{"id": name, "kind": "plain", "language": language_of(paragraphs[0]), "text": _start(paragraphs, words)}
                  for name, paragraphs in longest]
    return texts


def _start(paragraphs: list[str], words: int) -> str:
    taken, total = [], 0
    for passage, count in count_passages("\n\n".join(paragraphs)):
        taken.append(passage)
        if (total := total + count) >= words:
            break
    return " ".join(taken)


def repeated(texts: list[dict], seed: int = 0, times: int = 3) -> list[dict]:
    """{kind, language, id, text, before, added}: each plain text, with a passage `added` that repeats one of the text, or
    the passage `before` it; `times` per kind of repetition."""
    rng, rows, paraphrases = random.Random(seed), [], read_rows(TEXTS / "paraphrases.jsonl")
    for text in (text for text in texts if text["kind"] == "plain"):
        language, runs = text["language"], _runs_of(text["text"])
        by_hand = [pair for pair in paraphrases if pair["language"] == language]
        for _ in range(times):
            own, pair = rng.choice(runs[:-1]), rng.choice(by_hand)
            frame = rng.choice(wordings(language)["templates"])
            first, second = rng.sample(wordings(language)["keywords"], 2)
            for kind, before, added in (
                    ("copied", "", own), ("reworded", "", reword(own, rng, language)),
                    ("templated", frame.format(n=1, topic=first), frame.format(n=2, topic=second)),
                    ("paraphrased by hand", pair["original"], pair["paraphrase"])):
                rows.append(text | {"kind": kind, "before": before, "added": added})
    return rows


def scores(texts: list[dict], encode: Callable) -> pd.DataFrame:
    """One row per unit: kind, language, id, signal (lexical: a sentence; semantic: a run, English only), score in [0, 1].
    A text with `added` gives only the units of what was added, another all but the first."""
    rows = []
    for text in texts:
        parts = text["text"], text.get("before", ""), text.get("added", "")
        signals = {"lexical": _lexical(*parts)}
        if text["language"] == "en":
            signals["semantic"] = _semantic(encode, *parts)
        for signal, values in signals.items():
            rows += [_label(text) | {"signal": signal, "score": score} for score in values]
    return pd.DataFrame(rows)


def _label(text: dict) -> dict:
    return {name: text[name] for name in ("kind", "language", "id")}


def _lexical(text: str, before: str, added: str) -> list[float]:
    earlier = _grams(text) + _grams(before)
    if added:
        return [_highest_jaccard(own, earlier) for own in _grams(added)]
    return [_highest_jaccard(own, earlier[:i]) for i, own in enumerate(earlier) if i]


def _highest_jaccard(own: frozenset, earlier: list[frozenset]) -> float:
    return max(len(own & other) / len(own | other) for other in earlier)


def _semantic(encode: Callable, text: str, before: str, added: str) -> list[float]:
    vectors = _vectors(encode, text)
    if added:
        new = encode([added, before] if before else [added])
        return [float((np.vstack([vectors, new[1:]]) @ new[0]).max())]
    cosines = vectors @ vectors.T
    return [float(cosines[i, :i].max()) for i in range(1, len(vectors))]


@functools.lru_cache(4)  # the texts come in order, each many times
def _grams(text: str) -> list[frozenset]:
    return [grams_of(overlap.by_script(passage)) for passage, _ in count_passages(text)]


@functools.lru_cache(1)
def _vectors(encode: Callable, text: str) -> np.ndarray:
    return encode(_runs_of(text))


def _runs_of(text: str) -> list[str]:
    """Runs of passages, as the semantic signal compares them."""
    passages = [passage for passage, _ in count_passages(text)]
    runs = overlap.runs_of([max(1, count_words(passage)) for passage in passages])
    return [" ".join(passages[run.start : run.stop]) for run in runs]


def shares(texts: list[dict], rewards: dict) -> pd.DataFrame:
    """Share of each honest text's words that a FormatReward of each name in `rewards` finds repeated."""
    table, answers = pd.DataFrame(list(map(_label, texts))), [text["text"] for text in texts]
    for name, reward in rewards.items():
        table[name] = [overlaps.share for overlaps in reward.overlaps(answers, [""] * len(answers))]
    return table
