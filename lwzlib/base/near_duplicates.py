"""Near-duplicates among many short texts, in time near-linear in their length.

MinHash signatures of each text's n-grams block the texts into buckets; only those that share a bucket are compared, by exact
Jaccard similarity. A duplicate is compared with the first of its kind and never enters a bucket itself, so a text that stands
there ten thousand times costs no more than different ones.
"""

import functools
import itertools
from collections import Counter, defaultdict
from collections.abc import Callable

import numpy as np

Parts = tuple[tuple[str, int], ...]  # a text in parts, each with the number of characters of its n-grams, at most 5
_BANDS, _ROWS = 16, 3  # two texts with Jaccard 0.6 meet in some band with probability 0.98, with 0.05 in 0.2%
_MOST_CANDIDATES, _MOST_COMPARED = 16, 64  # of a bucket, and with a text: keep the worst case linear
_MULTIPLIERS = np.random.default_rng(20250618).integers(1, 2**32, _BANDS * _ROWS, dtype=np.uint32) | np.uint32(1)
_MIX = np.uint64(0x9E3779B97F4A7C15)
_CHUNK_TEXTS, _LONGEST_GRAM = 256, 5  # hashed at a time: what is in work stays in the processor's cache


def first_of_kind(texts: list[Parts], near_duplicate: float) -> list[int]:
    """Index of the first near-duplicate of each text, or its own: two texts are near-duplicates when the Jaccard similarity of
    their n-gram sets is at least `near_duplicate`."""
    grams, band_keys = _signatures(texts)
    first: dict[Parts, int] = {}  # an exact copy is not compared again
    buckets: dict[int, list[int]] = defaultdict(list)  # {band key: indices of texts that have it, each first of its kind}

    def first_near(i: int, keys: list[int]) -> int:
        shared_bands = Counter(itertools.chain.from_iterable(buckets[key] for key in keys))
        for j, _ in shared_bands.most_common(_MOST_COMPARED):
            shared = len(grams(i) & grams(j))
            if shared >= near_duplicate * (len(grams(i)) + len(grams(j)) - shared):
                return j
        return i

    for i, (text, keys) in enumerate(zip(texts, band_keys, strict=True)):
        if text not in first:
            first[text] = first_near(i, keys)
            for key in keys if first[text] == i else ():
                if len(buckets[key]) < _MOST_CANDIDATES:
                    buckets[key].append(i)
    return [first[text] for text in texts]


def grams_of(text: Parts) -> frozenset:
    """Hashes of the n-grams of one text."""
    return frozenset(_gram_hashes([text])[0].tolist())


def _signatures(texts: list[Parts]) -> tuple[Callable[[int], frozenset], list[list[int]]]:
    """(n-gram hashes of a text, as a function of its index: few are ever asked for; band keys of each text).

    Only keys that another text has too: among honest texts nearly none. Buckets for the others would cost more than the
    rest of the search.
    """
    hashes, keys_of_chunks = [], [np.zeros((0, _BANDS), dtype=np.uint64)]
    for start in range(0, len(texts), _CHUNK_TEXTS):
        chunk, grams = _gram_hashes(texts[start : start + _CHUNK_TEXTS])
        ends = np.cumsum(grams)
        hashes += [chunk[a:b] for a, b in zip(ends - grams, ends, strict=True)]
        keys_of_chunks.append(_band_keys(chunk, ends - grams))
    keys = np.concatenate(keys_of_chunks)
    _, places, counts = np.unique(keys, return_inverse=True, return_counts=True)
    shared = (counts > 1)[places].reshape(keys.shape)
    shared_keys = [row[mask].tolist() for row, mask in zip(keys, shared, strict=True)]
    return functools.cache(lambda i: frozenset(hashes[i].tolist())), shared_keys


def _band_keys(hashes: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Keys (texts, bands) of texts whose n-gram hashes begin at `starts`: equal where a band's minima are equal."""
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


def _gram_hashes(texts: list[Parts]) -> tuple[np.ndarray, np.ndarray]:
    """64-bit hashes of the character n-grams of all texts, one after the other, and how many each has (at least 1).

    All are hashed at once; n-grams that reach into the next part are then left out.
    """
    parts = list(itertools.chain.from_iterable(texts))
    sizes = np.array([size for _, size in parts])
    padded = [part.ljust(size, "\0") for part, size in parts]
    chars = np.array([len(part) for part in padded])
    joined, total_chars = "".join(padded) + "\0" * _LONGEST_GRAM, int(chars.sum())
    codes = np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), dtype=np.uint32).astype(np.uint64)
    size_at = np.repeat(sizes, chars)
    hashes = rolling = np.zeros(total_chars, dtype=np.uint64)
    for size in range(1, _LONGEST_GRAM + 1):
        rolling = (rolling + codes[size - 1 : total_chars + size - 1]) * _MIX
        rolling ^= rolling >> np.uint64(32)  # at each character, the hash of the n-gram of `size` characters from there
        hashes = np.where(size_at == size, rolling, hashes) if (sizes == size).any() else hashes
    left_chars = np.repeat(np.cumsum(chars), chars) - np.arange(total_chars)  # up to the end of the part
    grams, parts_each = chars - sizes + 1, np.array([len(text) for text in texts], dtype=int)
    if len(parts) > len(texts):
        grams = np.add.reduceat(grams, np.cumsum(parts_each) - parts_each)
    return hashes[left_chars >= size_at], grams
