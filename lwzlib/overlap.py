"""Near-duplicate passages within one text, in time near-linear in its length.

The paper penalises "semantic overlap between passages" and publishes neither metric nor threshold. This module is the
lexical half: it finds copies and copies with a few words changed, in English and Chinese, and is blind to paraphrase.

Each sentence becomes a set of character n-grams (5 for Latin script, 2 for Han). MinHash signatures, computed for the
whole text at once, block the sentences into buckets; only those that share a bucket are compared, by exact Jaccard
similarity. A duplicate is compared with the first of its kind and never enters a bucket itself, so a text that repeats
one sentence ten thousand times costs no more than an honest one.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from lwzlib.text import count_passages, has_han, split_passages

_BANDS, _ROWS = 16, 3  # two passages with Jaccard 0.6 meet in some band with probability 0.98, with 0.05 in 0.2%
_MOST_CANDIDATES = 16  # per bucket; keeps the worst case linear
_MULTIPLIERS = np.random.default_rng(20250618).integers(1, 2**32, _BANDS * _ROWS, dtype=np.uint32) | np.uint32(1)
_MIX = np.uint64(0x9E3779B97F4A7C15)
_BAND = np.arange(_BANDS, dtype=np.uint64)
_LATIN_CHARS, _HAN_CHARS = 5, 2


@dataclass(frozen=True)
class Overlap:
    """`duplicates` maps the index of a passage of the text to the earlier passage it repeats (a negative index, from
    -1, counts the passages of `against`). `repeated_words` of `total_words` stand in such passages."""

    passages: list[str]
    duplicates: dict[int, int]
    repeated_words: int
    total_words: int

    @property
    def share(self) -> float:
        """In [0, 1]; 0 for an empty text."""
        return self.repeated_words / self.total_words if self.total_words else 0.0


def find_overlap(text: str, near_duplicate: float, against: str = "") -> Overlap:
    """Passages of `text` that nearly repeat an earlier passage of it, or any passage of `against` (its plan).

    Two passages are near-duplicates when the Jaccard similarity of their n-gram sets is at least `near_duplicate`.
    """
    counted = count_passages(text)
    earlier, own = split_passages(against), [passage for passage, _ in counted]
    grams, signatures = _signatures(earlier + own)
    buckets: dict[int, list[int]] = {}
    duplicates = {}
    for i, bands in enumerate(signatures):
        first = _first_match(i, bands, buckets, grams, near_duplicate)
        if i >= len(earlier) and first is not None:
            duplicates[i - len(earlier)] = first - len(earlier)
        elif first is None:
            for key in bands:
                bucket = buckets.setdefault(key, [])
                if len(bucket) < _MOST_CANDIDATES:
                    bucket.append(i)
    words = [max(count, 1) for _, count in counted]  # a line of dashes weighs something too
    return Overlap(own, duplicates, sum(words[i] for i in duplicates), sum(words))


def _first_match(i, bands, buckets, grams, near_duplicate) -> int | None:
    seen = set()
    for key in bands:
        for j in buckets.get(key, ()):
            if j not in seen:
                seen.add(j)
                shared = len(grams(i) & grams(j))
                if shared >= near_duplicate * (len(grams(i)) + len(grams(j)) - shared):
                    return j
    return None


def _signatures(passages: list[str]) -> tuple[Callable[[int], frozenset], list[list[int]]]:
    """The n-gram hashes of a passage, as a function of its index (few are ever asked for), and a key per band for each."""
    if not passages:
        return lambda i: frozenset(), []
    hashes, lengths = _gram_hashes(passages)
    ends = np.cumsum(lengths)
    starts = ends - lengths
    minima = np.empty((_BANDS * _ROWS, len(passages)), dtype=np.uint32)
    short = (hashes >> np.uint64(32)).astype(np.uint32)
    for k, multiplier in enumerate(_MULTIPLIERS):
        mixed = short * multiplier
        mixed ^= mixed >> np.uint32(15)
        minima[k] = np.minimum.reduceat(mixed, starts)
    keys = np.zeros((len(passages), _BANDS), dtype=np.uint64)
    for row in minima.reshape(_BANDS, _ROWS, -1).transpose(1, 2, 0):
        keys = (keys + row) * _MIX
        keys ^= keys >> np.uint64(32)
    grams = functools.cache(lambda i: frozenset(hashes[starts[i] : ends[i]].tolist()))
    return grams, (keys * np.uint64(_BANDS) + _BAND).tolist()


def _gram_hashes(passages: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """64-bit hashes of the character n-grams of all passages, one after the other, and how many each has (at least 1).

    Case and white space are folded. All are hashed at once; grams that reach into the next passage are then left out.
    """
    folded = [" ".join(passage.lower().split()) for passage in passages]
    sizes = np.array([_HAN_CHARS if has_han(passage) else _LATIN_CHARS for passage in passages])
    padded = [passage.ljust(size, "\0") for passage, size in zip(folded, sizes, strict=True)]
    chars = np.array([len(passage) for passage in padded])
    text = "".join(padded) + "\0" * _LATIN_CHARS
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32).astype(np.uint64)
    count = int(chars.sum())
    by_size, total = {}, np.zeros(count, dtype=np.uint64)
    for k in range(_LATIN_CHARS):
        total = (total + codes[k : count + k]) * _MIX
        total ^= total >> np.uint64(32)
        by_size[k + 1] = total
    size_at = np.repeat(sizes, chars)
    left = np.repeat(np.cumsum(chars), chars) - np.arange(count)  # characters up to the end of the passage
    hashes = np.where(size_at == _HAN_CHARS, by_size[_HAN_CHARS], by_size[_LATIN_CHARS])
    return hashes[left >= size_at], chars - sizes + 1
