"""Corrupt a good text in one controlled way.

A writing reward is trained, or checked, on pairs in which the original is better beyond dispute. A pair in which the
worse text is also shorter teaches length, so every damage but `truncated` keeps about the number of words.

English and Chinese; `rng` alone decides. Texts have at least 3 sentences, not all the same: the damaged text then always
differs. `other` is the text of another document.
"""

import functools
import itertools
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence

from lwzlib.base.paths import TEXTS
from lwzlib.base.rows import read_yaml
from lwzlib.method.text import count_words, language_of, split_sentences

_STOPS = ".!?。！？；;\n"
_ENDED = re.compile(r"[.!?。！？；;][\"'”’」』）)]*$")
OTHER_LANGUAGE = {"en": "zh", "zh": "en"}


@functools.cache
def wordings(language: str) -> dict:
    """Synonyms, filler, keywords, reframes, templates and {name: request} of `en` or `zh`."""
    return read_yaml(TEXTS / "wordings.yaml")[language]


def join(sentences: Iterable[str]) -> str:
    """Text of the sentences: a line break follows one without a stop (a heading, a verse), a space one without Han."""
    return "".join(s + ("\n" if not _ENDED.search(s) else "" if language_of(s) == "zh" else " ") for s in sentences).rstrip()


def plain(text: str) -> str:
    """Undamaged text, laid out as a damaged one is: pairs set this against it, else the layout would tell the two apart."""
    return _laid_out(split_sentences(text), text)


def shuffled(text: str, rng: random.Random, other: str = "") -> str:
    """Sentences of the text in another order."""
    sentences = split_sentences(text)
    order = rng.sample(sentences, len(sentences))
    return _laid_out(order if order != sentences else order[1:] + order[:1], text)


def repeated(text: str, rng: random.Random, other: str = "") -> str:
    """Repeat some stretches, in place of others."""
    def stream(kept: list[str]) -> Iterator[str]:
        for end in range(1, len(kept) + 1):
            yield kept[end - 1]
            if rng.random() < 0.6:
                start = rng.randrange(end)
                yield from kept[start : min(end, start + rng.randint(1, 3))]
        yield from endless(kept, rng)

    return _laid_out(fill(stream(_all_but_the_longest(text)), count_words(text)), text)


def padded(text: str, rng: random.Random, other: str = "") -> str:
    """Say each sentence once more in other words; the text gets half as far."""
    def stream(language: str) -> Iterator[str]:
        for sentence in itertools.cycle(_all_but_the_longest(text)):
            yield from (sentence, reword(sentence, rng, language))  # the second is drawn also where the first is the last taken

    return _laid_out(fill(stream(language_of(text)), count_words(text)), text)


def truncated(text: str, rng: random.Random, other: str = "") -> str:
    """Cut the text within a sentence, somewhere from 10% to 70% of its characters."""
    inner = [i for i in range(max(1, len(text) // 10), len(text) * 7 // 10) if text[i - 1].isalnum() and text[i] not in _STOPS]
    return text[: rng.choice(inner or [len(text) // 2])]


def stuffed(text: str, rng: random.Random, other: str = "") -> str:
    """Advertising keywords between the words: a quarter as many words again."""
    language = language_of(text)
    pieces, budget = re.split(r"(?<=\s)(?=\S)|(?<=[，、。！？])", text), count_words(text) // 4
    for keyword in fill(endless(wordings(language)["keywords"], rng), budget):
        pieces.insert(rng.randrange(len(pieces)), keyword + {"en": ", ", "zh": "，"}[language])
    return "".join(pieces)


def off_topic(text: str, rng: random.Random, other: str) -> str:
    """Text of the other document, as long as this one."""
    return _laid_out(fill(itertools.cycle(split_sentences(other)), count_words(text)), text)


def language_switched(text: str, rng: random.Random, other: str = "") -> str:
    """Replace a stretch of a third to two thirds of the sentences by sentences of the other language."""
    def stretch(sentences: int, replaced: int) -> range:
        start = rng.randint(0, sentences - replaced)
        return range(start, start + replaced)

    return _with_filler(text, stretch, OTHER_LANGUAGE[language_of(text)], rng)


def filler(text: str, rng: random.Random, other: str = "") -> str:
    """Replace a third to two thirds of the sentences by sentences that would fit any text."""
    return _with_filler(text, lambda sentences, replaced: rng.sample(range(sentences), replaced), language_of(text), rng)


DAMAGES: dict[str, Callable[[str, random.Random, str], str]] = {
    damage.__name__: damage
    for damage in (shuffled, repeated, padded, truncated, stuffed, off_topic, language_switched, filler)}


def reword(text: str, rng: random.Random, language: str, reframe: bool = True) -> str:
    """Say the same in other words, sentence by sentence: synonyms change, and with `reframe` so does the opening."""
    pattern, groups = _synonyms(language)
    frames = wordings(language)["reframes"] if reframe else ["{}"]

    def synonym(match: re.Match) -> str:
        known = match[0].lower()
        word = rng.choice([word for word in groups[known] if word != known] or [known])
        return word[0].upper() + word[1:] if match[0][0].isupper() else word

    def reworded(sentence: str) -> str:
        frame, swapped = rng.choice(frames), pattern.sub(synonym, sentence)
        keep_capital = frame == "{}" or re.match(r"I\b", swapped)
        return frame.format(swapped if keep_capital else swapped[:1].lower() + swapped[1:])

    return join(map(reworded, split_sentences(text)))


@functools.cache
def _synonyms(language: str) -> tuple[re.Pattern, dict[str, list[str]]]:
    groups = {word.lower(): group for group in wordings(language)["synonyms"] for word in group}
    words = "|".join(map(re.escape, sorted(groups, key=len, reverse=True)))
    return re.compile(words if language == "zh" else rf"\b(?:{words})\b", re.IGNORECASE), groups


def fill(stream: Iterable[str], words: int) -> list[str]:
    """Sentences of the stream, at least one, until their number of words is as near to `words` as it gets."""
    taken, total = [], 0
    for sentence in stream:
        count = max(1, count_words(sentence))  # a line of digits too brings the end nearer
        if taken and abs(words - total) <= abs(words - total - count):
            break
        taken.append(sentence)
        total += count
    return taken


def endless(sentences: list[str], rng: random.Random) -> Iterator[str]:
    """Sentences in a random order, then all in another, without an end."""
    while True:
        yield from rng.sample(sentences, len(sentences))


def _with_filler(text: str, choose: Callable[[int, int], Sequence[int]], language: str, rng: random.Random) -> str:
    """The text with filler of `language` in place of a third to two thirds of its sentences, as many words as they had;
    `choose`(sentences, replaced) gives their numbers."""
    sentences = split_sentences(text)
    lost = choose(len(sentences), max(1, round(len(sentences) * rng.uniform(0.33, 0.67))))
    new = fill(endless(wordings(language)["filler"], rng), sum(count_words(sentences[i]) for i in lost))
    placed = [(i, sentence) for i, sentence in enumerate(sentences) if i not in lost]
    placed += zip(itertools.cycle(lost), new, strict=False)
    return _laid_out([sentence for _, sentence in sorted(placed, key=lambda pair: pair[0])], text)


def _all_but_the_longest(text: str) -> list[str]:
    """Sentences without the longest: a text filled up with them always differs, and is never longer by much."""
    sentences = split_sentences(text)
    longest = max(sentences, key=count_words)
    return [sentence for sentence in sentences if sentence != longest] or sentences


def _laid_out(sentences: list[str], original: str) -> str:
    """Text in as many paragraphs as the original has, of even length."""
    count = min(len(sentences), sum(1 for part in re.split(r"\n\s*\n", original) if part.strip()))
    cuts = [len(sentences) * i // count for i in range(count + 1)]
    return "\n\n".join(join(sentences[a:b]) for a, b in itertools.pairwise(cuts))
