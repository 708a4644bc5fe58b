"""Find passages of one text that repeat each other, in time near-linear in its length.

The paper penalises "semantic overlap between passages" and publishes neither metric nor threshold. The kit has two signals,
kept apart and combined:

Lexical: each sentence becomes a set of character n-grams (5 for Latin script, 2 for Han). MinHash signatures block the
sentences into buckets; only those that share a bucket are compared, by exact Jaccard similarity. It finds copies and
copies with a few words changed, in English and Chinese, and is blind to paraphrase. A duplicate is compared with the
first of its kind and never enters a bucket itself, so a text that repeats one sentence ten thousand times costs no more
than an honest one.

Semantic: runs of sentences of about 60 words are embedded, and compared by cosine with those before them (`Meaning`). It
finds paraphrase, in the languages of its encoder only: with the embedded encoder Chinese has the lexical signal alone.
Embedding is linear and takes nearly all the time; each run is compared with at most `_MOST_EARLIER` others.
"""

import functools
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from lwzlib.method.text import count_passages, fold, has_han, split_passages

_LATIN_CHARS, _HAN_CHARS = 5, 2  # of an n-gram
_BANDS, _ROWS = 16, 3  # two passages with Jaccard 0.6 meet in some band with probability 0.98, with 0.05 in 0.2%
_MOST_CANDIDATES = 16  # per bucket; keeps the worst case linear
_MULTIPLIERS = np.random.default_rng(20250618).integers(1, 2**32, _BANDS * _ROWS, dtype=np.uint32) | np.uint32(1)
_MIX = np.uint64(0x9E3779B97F4A7C15)
_CHUNK_PASSAGES = 256  # hashed at a time: what is in work stays in the processor's cache
_RUN_WORDS, _SHORTEST_RUN_WORDS = 60, 20
_MOST_EARLIER = 4096  # about 250,000 words


@dataclass(frozen=True)
class Meaning:
    """The semantic signal: `encode` maps texts to unit vectors (n, d) float32; runs with a cosine of at least
    `same_meaning` say the same. Runs with Han characters are left out unless `languages` has zh."""

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
    passages, repeats = earlier + own, {}
    grams, band_keys = _signatures(passages)
    first_of_kind: dict[str, int] = {}  # {passage: index of what it repeats, or its own}; an exact copy is not compared again
    buckets: dict[int, list[int]] = defaultdict(list)  # {band key: indices of passages that have it, each first of its kind}

    def first_near(i: int, keys: list[int]) -> int:
        compared = set()
        for key in keys:
            for j in buckets[key]:
                if j not in compared:
                    compared.add(j)
                    shared = len(grams(i) & grams(j))
                    if shared >= near_duplicate * (len(grams(i)) + len(grams(j)) - shared):
                        return j
        return i

    for i, (passage, keys) in enumerate(zip(passages, band_keys, strict=True)):
        if passage not in first_of_kind:
            first_of_kind[passage] = first_near(i, keys)
            for key in keys if first_of_kind[passage] == i else ():
                if len(buckets[key]) < _MOST_CANDIDATES:
                    buckets[key].append(i)
        first = first_of_kind[passage]
        if first != i and i >= len(earlier):
            repeats[i - len(earlier)] = first - len(earlier)
    return repeats


def _signatures(passages: list[str]) -> tuple[Callable[[int], frozenset], list[list[int]]]:
    """(n-gram hashes of a passage, as a function of its index: few are ever asked for; band keys of each passage).

    Only keys that another passage has too: in an honest text nearly none. Buckets for the others would cost more than the
    rest of the search.
    """
    hashes, keys_of_chunks = [], [np.zeros((0, _BANDS), dtype=np.uint64)]
    for start in range(0, len(passages), _CHUNK_PASSAGES):
        chunk, grams = _gram_hashes(passages[start : start + _CHUNK_PASSAGES])
        ends = np.cumsum(grams)
        hashes += [chunk[a:b] for a, b in zip(ends - grams, ends, strict=True)]
        keys_of_chunks.append(_band_keys(chunk, ends - grams))
    keys = np.concatenate(keys_of_chunks)
    _, places, counts = np.unique(keys, return_inverse=True, return_counts=True)
    shared = (counts > 1)[places].reshape(keys.shape)
    shared_keys = [row[mask].tolist() for row, mask in zip(keys, shared, strict=True)]
    return functools.cache(lambda i: frozenset(hashes[i].tolist())), shared_keys


def _band_keys(hashes: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Keys (passages, bands) of passages whose n-gram hashes begin at `starts`: equal where a band's minima are equal."""
    minima = np.empty((_BANDS * _ROWS, len(starts)), dtype=np.uint32)  # the MinHash signatures
    short = (hashes >> np.uint64(32)).astype(np.uint32)
    for k, multiplier in enumerate(_MULTIPLIERS):  # each makes another hash function of the n-grams
        mixed = short * multiplier
        mixed ^= mixed >> np.uint32(15)
        minima[k] = np.minimum.reduceat(mixed, starts)
    keys = np.zeros((len(starts), _BANDS), dtype=np.uint64)
    for row in minima.reshape(_BANDS, _ROWS, -1).transpose(1, 2, 0):
        keys = (keys + row) * _MIX
        keys ^= keys >> np.uint64(32)
    return keys * np.uint64(_BANDS) + np.arange(_BANDS, dtype=np.uint64)  # a key of one band is none of another


def grams_of(passage: str) -> frozenset:
    """Hashes of the n-grams of one passage, of which the lexical signal takes the Jaccard similarity."""
    return frozenset(_gram_hashes([passage])[0].tolist())


def _gram_hashes(passages: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """64-bit hashes of the character n-grams of all passages, one after the other, and how many each has (at least 1).

    Passages are folded by `text.fold`. All are hashed at once; n-grams that reach into the next passage are then left out.
    """
    sizes = np.array([_HAN_CHARS if has_han(passage) else _LATIN_CHARS for passage in passages])
    padded = [fold(passage).ljust(size, "\0") for passage, size in zip(passages, sizes, strict=True)]
    chars = np.array([len(passage) for passage in padded])
    text, total_chars = "".join(padded) + "\0" * _LATIN_CHARS, int(chars.sum())
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32).astype(np.uint64)
    by_size, rolling = {}, np.zeros(total_chars, dtype=np.uint64)
    for k in range(_LATIN_CHARS):
        rolling = (rolling + codes[k : total_chars + k]) * _MIX
        rolling ^= rolling >> np.uint64(32)
        by_size[k + 1] = rolling  # at each character, the hash of the n-gram of k + 1 characters from there
    size_at = np.repeat(sizes, chars)
    left_chars = np.repeat(np.cumsum(chars), chars) - np.arange(total_chars)  # up to the end of the passage
    hashes = np.where(size_at == _HAN_CHARS, by_size[_HAN_CHARS], by_size[_LATIN_CHARS])
    return hashes[left_chars >= size_at], chars - sizes + 1


def runs_of(passages: list[str], words: list[int], languages: tuple[str, ...] = ("en", "zh")) -> list[range]:
    """Indices of consecutive passages that come to about 60 words per run; a rest under 20 words is left out."""
    runs, start, run_words = [], 0, 0
    for end, count in enumerate(words, 1):
        run_words += count
        if run_words >= _RUN_WORDS or (end == len(words) and run_words >= _SHORTEST_RUN_WORDS):
            runs.append(range(start, end))
            start, run_words = end, 0
    return [run for run in runs if "zh" in languages or not has_han("".join(passages[run.start : run.stop]))]


def _semantic(passages: list[list[str]], words: list[list[int]], meaning: Meaning) -> list[dict[int, int]]:
    """{index of a passage: first passage of the run whose meaning its own run repeats}, for each text."""
    runs, run_texts = [], []
    for own, counts in zip(passages, words, strict=True):
        own_runs = runs_of(own, counts, meaning.languages)
        runs.append(own_runs if len(own_runs) > 1 else [])  # one run has nothing to repeat
        run_texts += [" ".join(own[run.start : run.stop]) for run in runs[-1]]
    vectors = meaning.encode(run_texts) if run_texts else np.zeros((0, 1))
    repeats: list[dict[int, int]] = []
    for own_runs in runs:
        repeats.append({})
        for later, first in first_alike(vectors[: len(own_runs)], meaning.same_meaning).items():
            repeats[-1] |= dict.fromkeys(own_runs[later], own_runs[first].start)
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
