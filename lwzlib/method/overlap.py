"""Find passages of one text that repeat each other, in time near-linear in its length.

The paper penalises "semantic overlap between passages" and publishes neither metric nor threshold. The kit has two signals,
kept apart and combined:

Lexical: each sentence becomes a set of character n-grams (5 for Latin script, 2 for Han); those whose sets are alike are
near-duplicates (`base.near_duplicates`). It finds copies and copies with a few words changed, in English and Chinese, and is
blind to paraphrase.

Semantic: runs of sentences of about 60 words are embedded, and compared by cosine with those before them (`Meaning`). It
finds paraphrase, in the languages of its encoder only: with the embedded encoder Chinese has the lexical signal alone.
Embedding is linear and takes nearly all the time; each run is compared with at most `_MOST_EARLIER` others.

A text that mixes scripts keeps both signals: n-grams are those of each script by itself, and the encoder gets what is in its
languages, so that a character of the other script here and there hides nothing.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from lwzlib.base.near_duplicates import Parts, first_of_kind
from lwzlib.method.text import count_passages, count_words, fold, has_han, only_han, split_passages, without_han

_LATIN_CHARS, _HAN_CHARS = 5, 2  # of an n-gram
_LATIN = re.compile("[a-z]")  # once folded
_RUN_WORDS, _SHORTEST_RUN_WORDS = 60, 20
_MOST_EARLIER = 4096  # about 250,000 words


@dataclass(frozen=True)
class Meaning:
    """The semantic signal: `encode` maps texts to unit vectors (n, d) float32; runs with a cosine of at least
    `same_meaning` say the same. Han characters are left out unless `languages` has zh."""

    encode: Callable[[list[str]], np.ndarray]
    same_meaning: float
    languages: tuple[str, ...] = ("en",)


@dataclass(frozen=True)
class Overlap:
    """Repeated passages of a text. `lexical` maps the index of a passage to that of the earlier passage it repeats (a negative
    one counts from the end of the passages of `against`); `semantic` maps it to the first passage of the run whose meaning it
    repeats. `words` has the number of words of each passage."""

    passages: list[str]
    words: list[int]
    lexical: dict[int, int]
    semantic: dict[int, int]

    @property
    def share(self) -> float:
        """Share of the words that stand in passages repeated by either signal, in [0, 1]; 0 for an empty text."""
        return sum(self.words[i] for i in self.lexical | self.semantic) / max(1, sum(self.words))


def find_overlap(text: str, near_duplicate: float, against: str = "", meaning: Meaning | None = None) -> Overlap:
    """Passages of `text` that repeat an earlier passage of it or, lexically, any passage of `against` (its plan: that
    a plan means what its text means is no fault).

    Two passages are near-duplicates when the Jaccard similarity of their n-gram sets is at least `near_duplicate`.
    """
    return find_overlaps([text], near_duplicate, [against], meaning)[0]


def find_overlaps(texts: list[str], near_duplicate: float, against: list[str], meaning: Meaning | None = None) -> list[Overlap]:
    """Overlap of each text by itself, with all runs embedded in one call, which pays on short texts."""
    passages, words = [], []
    for text in texts:
        counted = count_passages(text)
        passages.append([passage for passage, _ in counted])
        words.append([max(count, 1) for _, count in counted])  # a line of dashes weighs something too
    lexical = [_lexical(own, near_duplicate, split_passages(plan)) for own, plan in zip(passages, against, strict=True)]
    semantic = _semantic(passages, words, meaning) if meaning else [{}] * len(texts)
    return [Overlap(*parts) for parts in zip(passages, words, lexical, semantic, strict=True)]


def _lexical(own: list[str], near_duplicate: float, earlier: list[str]) -> dict[int, int]:
    """{index in `own` of a passage: index of the first of its kind, negative where it is in `earlier`}."""
    first = first_of_kind([by_script(passage) for passage in earlier + own], near_duplicate)
    return {i - len(earlier): j - len(earlier) for i, j in enumerate(first) if i != j and i >= len(earlier)}


def by_script(passage: str) -> Parts:
    """The folded passage, with the number of characters of its n-grams; the two scripts of one that mixes them, apart."""
    folded = fold(passage)
    if not has_han(folded):
        return ((folded, _LATIN_CHARS),)
    if not _LATIN.search(folded):
        return ((folded, _HAN_CHARS),)
    return ((" ".join(without_han(folded).split()), _LATIN_CHARS), (only_han(folded), _HAN_CHARS))


def runs_of(words: list[int]) -> list[range]:
    """Indices of consecutive passages that come to about 60 words per run; a rest under 20 words is left out."""
    runs, start, run_words = [], 0, 0
    for end, count in enumerate(words, 1):
        run_words += count
        if run_words >= _RUN_WORDS or (end == len(words) and run_words >= _SHORTEST_RUN_WORDS):
            runs.append(range(start, end))
            start, run_words = end, 0
    return runs


def _readable(passages: list[str], words: list[int], languages: tuple[str, ...]) -> tuple[list[str], list[int]]:
    """(what the encoder can read of each passage, its words)."""
    if "zh" in languages or not any(map(has_han, passages)):
        return passages, words
    readable = list(map(without_han, passages))
    return readable, [count if part == passage else count_words(part)
                      for part, passage, count in zip(readable, passages, words, strict=True)]


def _semantic(passages: list[list[str]], words: list[list[int]], meaning: Meaning) -> list[dict[int, int]]:
    """{index of a passage: first passage of the run whose meaning its own run repeats}, for each text."""
    runs, run_texts, read_words = [], [], []
    for own, counts in zip(passages, words, strict=True):
        own, counts = _readable(own, counts, meaning.languages)
        own_runs = runs_of(counts)
        runs.append(own_runs if len(own_runs) > 1 else [])  # one run has nothing to repeat
        run_texts += [" ".join(own[run.start : run.stop]) for run in runs[-1]]
        read_words.append(counts)
    vectors = meaning.encode(run_texts) if run_texts else np.zeros((0, 1))
    repeats: list[dict[int, int]] = []
    for own_runs, counts in zip(runs, read_words, strict=True):
        repeats.append({})
        for later, first in first_alike(vectors[: len(own_runs)], meaning.same_meaning).items():
            repeats[-1] |= {i: own_runs[first].start for i in own_runs[later] if counts[i]}
        vectors = vectors[len(own_runs) :]
    return repeats


def first_alike(vectors: np.ndarray, same_meaning: float) -> dict[int, int]:
    """{index of a row of the unit vectors (n, d): first earlier row, itself no repetition, of cosine >= same_meaning}."""
    alike, kept, kept_vectors = {}, [], np.empty_like(vectors)
    for i, vector in enumerate(vectors):
        first = max(0, len(kept) - _MOST_EARLIER)
        near = np.flatnonzero(kept_vectors[first : len(kept)] @ vector >= same_meaning)
        if len(near):
            alike[i] = kept[first + near[0]]
        else:
            kept_vectors[len(kept)] = vector
            kept.append(i)
    return alike
