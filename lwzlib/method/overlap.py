"""Passages of one text that repeat each other, in time near-linear in its length.

The paper penalises "semantic overlap between passages" and publishes neither metric nor threshold. Here are two signals,
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
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from lwzlib.base import models
from lwzlib.base.kit import ModelError
from lwzlib.base.models import unsharded
from lwzlib.method.text import count_passages, fold, has_han, split_passages

_BANDS, _ROWS = 16, 3  # two passages with Jaccard 0.6 meet in some band with probability 0.98, with 0.05 in 0.2%
_MOST_CANDIDATES = 16  # per bucket; keeps the worst case linear
_MULTIPLIERS = np.random.default_rng(20250618).integers(1, 2**32, _BANDS * _ROWS, dtype=np.uint32) | np.uint32(1)
_MIX = np.uint64(0x9E3779B97F4A7C15)
_BAND = np.arange(_BANDS, dtype=np.uint64)
_LATIN_CHARS, _HAN_CHARS = 5, 2
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
    """`lexical` maps the index of a passage of the text to the earlier passage it repeats (a negative index, from -1,
    counts the passages of `against`); `semantic` maps it to the first passage of the run whose meaning it repeats.
    `words` are those of each passage."""

    passages: list[str]
    words: list[int]
    lexical: dict[int, int]
    semantic: dict[int, int]

    @property
    def share(self) -> float:
        """Share of the words that stand in passages repeated by either signal, in [0, 1]; 0 for an empty text."""
        return self.share_of(self.lexical | self.semantic)

    def share_of(self, repeated) -> float:
        """The same for any indices of passages: those of one signal, for example."""
        return sum(self.words[i] for i in repeated) / max(1, sum(self.words))


def find_overlap(text: str, near_duplicate: float, against: str = "", meaning: Meaning | None = None) -> Overlap:
    """Passages of `text` that repeat an earlier passage of it or, lexically, any passage of `against` (its plan: that
    a plan means what its text means is no fault).

    Two passages are near-duplicates when the Jaccard similarity of their n-gram sets is at least `near_duplicate`.
    """
    return find_overlaps([text], near_duplicate, [against], meaning)[0]


def find_overlaps(texts: list[str], near_duplicate: float, against: list[str], meaning: Meaning | None = None):
    """A list of Overlap: each text by itself, with all runs embedded in one call, which pays on short texts."""
    counted = [count_passages(text) for text in texts]
    words = [[max(count, 1) for _, count in passages] for passages in counted]  # a line of dashes weighs something too
    passages = [[passage for passage, _ in some] for some in counted]
    lexical = [_lexical(p, near_duplicate, split_passages(plan)) for p, plan in zip(passages, against, strict=True)]
    semantic = _semantic(passages, words, meaning) if meaning else [{}] * len(texts)
    return [Overlap(*each) for each in zip(passages, words, lexical, semantic, strict=True)]


def runs_of(passages: list[str], words: list[int], languages: tuple[str, ...] = ("en", "zh")) -> list[range]:
    """Indices of consecutive passages that come to about 60 words each; a rest under 20 words is left out."""
    found, start, total = [], 0, 0
    for i, count in enumerate(words):
        total += count
        if total >= _RUN_WORDS or (i + 1 == len(words) and total >= _SHORTEST_RUN_WORDS):
            found.append(range(start, i + 1))
            start, total = i + 1, 0
    return [run for run in found if "zh" in languages or not has_han("".join(passages[i] for i in run))]


def _semantic(passages: list[list[str]], words: list[list[int]], meaning: Meaning) -> list[dict[int, int]]:
    runs = [runs_of(*each, meaning.languages) for each in zip(passages, words, strict=True)]
    runs = [some if len(some) > 1 else [] for some in runs]  # one run has nothing to repeat
    texts = [" ".join(own[i] for i in run) for own, some in zip(passages, runs, strict=True) for run in some]
    vectors, found = meaning.encode(texts) if texts else np.zeros((0, 1)), []
    for some in runs:
        own, vectors = vectors[: len(some)], vectors[len(some) :]
        earlier = first_alike(own, meaning.same_meaning)
        found.append({i: some[j].start for k, j in earlier.items() for i in some[k]})
    return found


def first_alike(vectors: np.ndarray, same_meaning: float) -> dict[int, int]:
    """{index of a row of the unit vectors (n, d): first earlier row, itself no repetition, of cosine >= same_meaning}."""
    alike, kept, seen = {}, [], np.empty_like(vectors)
    for i, vector in enumerate(vectors):
        first = max(0, len(kept) - _MOST_EARLIER)
        near = np.flatnonzero(seen[first : len(kept)] @ vector >= same_meaning)
        if len(near):
            alike[i] = kept[first + near[0]]
        else:
            seen[len(kept)] = vector
            kept.append(i)
    return alike


def grams_of(passage: str) -> frozenset:
    """Hashes of the n-grams of one passage, of which the lexical signal takes the Jaccard similarity."""
    return frozenset(_gram_hashes([passage])[0].tolist())


def _lexical(own: list[str], near_duplicate: float, earlier: list[str]) -> dict[int, int]:
    grams, signatures = _signatures(earlier + own)
    buckets: dict[int, list[int]] = {}
    duplicates, met = {}, {}  # met: what a passage repeats, or its own index; an exact copy need not be compared
    for i, (passage, bands) in enumerate(zip(earlier + own, signatures, strict=True)):
        first = met[passage] if passage in met else _first_match(i, bands, buckets, grams, near_duplicate)
        met.setdefault(passage, i if first is None else first)
        if i >= len(earlier) and first is not None:
            duplicates[i - len(earlier)] = first - len(earlier)
        elif first is None:
            for key in bands:
                bucket = buckets.setdefault(key, [])
                if len(bucket) < _MOST_CANDIDATES:
                    bucket.append(i)
    return duplicates


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
    """The n-gram hashes of a passage, as a function of its index (few are ever asked for), and of its keys, one a band,
    those that another passage has too: in an honest text nearly none. Buckets for the others would cost more than the rest."""
    hashes, keys = [], [np.zeros((0, _BANDS), dtype=np.uint64)]
    for start in range(0, len(passages), _CHUNK_PASSAGES):
        some, lengths = _gram_hashes(passages[start : start + _CHUNK_PASSAGES])
        ends = np.cumsum(lengths)
        hashes += [some[a:b] for a, b in zip(ends - lengths, ends, strict=True)]
        keys.append(_band_keys(some, ends - lengths))
    whole = np.concatenate(keys)
    _, which, counts = np.unique(whole, return_inverse=True, return_counts=True)
    shared = (counts > 1)[which].reshape(whole.shape)
    met = [row[mask].tolist() for row, mask in zip(whole, shared, strict=True)]
    return functools.cache(lambda i: frozenset(hashes[i].tolist())), met


def _band_keys(hashes: np.ndarray, starts: np.ndarray) -> np.ndarray:
    minima = np.empty((_BANDS * _ROWS, len(starts)), dtype=np.uint32)
    short = (hashes >> np.uint64(32)).astype(np.uint32)
    for k, multiplier in enumerate(_MULTIPLIERS):
        mixed = short * multiplier
        mixed ^= mixed >> np.uint32(15)
        minima[k] = np.minimum.reduceat(mixed, starts)
    keys = np.zeros((len(starts), _BANDS), dtype=np.uint64)
    for row in minima.reshape(_BANDS, _ROWS, -1).transpose(1, 2, 0):
        keys = (keys + row) * _MIX
        keys ^= keys >> np.uint64(32)
    return keys * np.uint64(_BANDS) + _BAND


def _gram_hashes(passages: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """64-bit hashes of the character n-grams of all passages, one after the other, and how many each has (at least 1).

    Folded by `text.fold`. All are hashed at once; grams that reach into the next passage are then left out.
    """
    folded = [fold(passage) for passage in passages]
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


@functools.cache
def _load_encoder(name: str):
    import torch
    from sentence_transformers import SentenceTransformer
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:  # bfloat16: three times as fast on CPU, cosines equal to three digits
        with torch.random.fork_rng(), unsharded():  # loaded in the midst of training
            return SentenceTransformer(models.resolve(name), model_kwargs={"dtype": torch.bfloat16})
    except OSError as error:
        raise ModelError(f"cannot load sentence encoder {name}: {str(error).splitlines()[0]}") from error


def encode(texts: list[str], name: str, batch: int = 64) -> np.ndarray:
    """Unit vectors (n, d) float32. A text longer than the encoder's context is cut (256 tokens for kit:minilm)."""
    encoder = _load_encoder(name)
    return encoder.encode(texts, batch_size=batch, normalize_embeddings=True, show_progress_bar=False).astype(np.float32)
