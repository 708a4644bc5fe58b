"""Honest writing made worse on purpose, in one way at a time.

A writing reward is trained, or checked, on pairs in which the original is better beyond dispute. A pair in which the
worse text is also shorter teaches length, so every damage but `truncated` keeps about the number of words.

English and Chinese; `rng` alone decides. Texts have at least 3 sentences, not all the same; what comes back is then always
different. `other` is the text of another document.
"""

import functools
import itertools
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence

import yaml

from lwzlib.base.paths import TEXTS
from lwzlib.method.text import count_words, has_han, language_of, split_sentences

_STOPS = ".!?。！？；;\n"
_ENDED = re.compile(r"[.!?。！？；;][\"'”’」』）)]*$")
OTHER_LANGUAGE = {"en": "zh", "zh": "en"}


@functools.cache
def wordings(language: str) -> dict[str, list]:
    """Synonyms, filler, keywords, reframes and templates of `en` or `zh`."""
    return yaml.safe_load((TEXTS / "wordings.yaml").read_text(encoding="utf-8"))[language]


def join(sentences: Iterable[str]) -> str:
    """With a line break after each that has no stop, such as a heading or a verse, and a space after one without Han."""
    return "".join(s + ("\n" if not _ENDED.search(s) else "" if has_han(s) else " ") for s in sentences).rstrip()


def plain(text: str) -> str:
    """The text itself, laid out as a damaged one is: in pairs, set this against it, else the layout tells them apart."""
    return _laid_out(split_sentences(text), text)


def shuffled(text: str, rng: random.Random, other: str = "") -> str:
    """The same sentences in another order."""
    sentences = split_sentences(text)
    order = rng.sample(sentences, len(sentences))
    return _laid_out(order if order != sentences else order[1:] + order[:1], text)


def repeated(text: str, rng: random.Random, other: str = "") -> str:
    """Some stretches come again, in place of others."""
    def stream(kept: list[str]) -> Iterator[str]:
        for end in range(1, len(kept) + 1):
            yield kept[end - 1]
            if rng.random() < 0.6:
                start = rng.randrange(end)
                yield from kept[start : min(end, start + rng.randint(1, 3))]
        yield from endless(kept, rng)

    return _laid_out(fill(stream(_all_but_the_longest(text)), count_words(text)), text)


def padded(text: str, rng: random.Random, other: str = "") -> str:
    """Each sentence is said once more in other words, and the text gets half as far."""
    kept, language = _all_but_the_longest(text), language_of(text)
    stream = (said for sentence in itertools.cycle(kept) for said in (sentence, reword(sentence, rng, language)))
    return _laid_out(fill(stream, count_words(text)), text)


def truncated(text: str, rng: random.Random, other: str = "") -> str:
    """Cut within a sentence, somewhere from 10% to 70% of the characters."""
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
    """The other document's text, as long as this one."""
    return _laid_out(fill(itertools.cycle(split_sentences(other)), count_words(text)), text)


def language_switched(text: str, rng: random.Random, other: str = "") -> str:
    """A stretch of a third to two thirds of the sentences gives way to sentences of the other language."""
    length = _some(text, rng)
    start = rng.randint(0, len(split_sentences(text)) - length)
    return _replaced(text, range(start, start + length), OTHER_LANGUAGE[language_of(text)], rng)


def filler(text: str, rng: random.Random, other: str = "") -> str:
    """A third to two thirds of the sentences give way to sentences that would fit any text."""
    return _replaced(text, rng.sample(range(len(split_sentences(text))), _some(text, rng)), language_of(text), rng)


DAMAGES: dict[str, Callable[[str, random.Random, str], str]] = {
    damage.__name__: damage
    for damage in (shuffled, repeated, padded, truncated, stuffed, off_topic, language_switched, filler)}


def reword(text: str, rng: random.Random, language: str, reframe: bool = True) -> str:
    """The same content in other words, sentence by sentence: synonyms change, and with `reframe` so does the opening."""
    pattern, groups = _synonyms(language)

    def other_word(match: re.Match) -> str:
        known = match[0].lower()
        word = rng.choice([each for each in groups[known] if each != known] or [known])
        return word[0].upper() + word[1:] if match[0][0].isupper() else word

    def said(sentence: str, frame: str) -> str:
        other = pattern.sub(other_word, sentence)
        return frame.format(other if frame == "{}" or re.match(r"I\b", other) else other[:1].lower() + other[1:])

    frames = wordings(language)["reframes"] if reframe else ["{}"]
    return join(said(sentence, rng.choice(frames)) for sentence in split_sentences(text))


@functools.cache
def _synonyms(language: str) -> tuple[re.Pattern, dict[str, list[str]]]:
    groups = {word.lower(): group for group in wordings(language)["synonyms"] for word in group}
    words = "|".join(map(re.escape, sorted(groups, key=len, reverse=True)))
    return re.compile(words if language == "zh" else rf"\b(?:{words})\b", re.IGNORECASE), groups


def fill(stream: Iterable[str], words: int) -> list[str]:
    """Sentences off the stream, at least one, until their number of words is as near to `words` as it gets."""
    taken, total = [], 0
    for sentence in stream:
        count = max(1, count_words(sentence))  # a line of digits too brings the end nearer
        if taken and abs(words - total) <= abs(words - total - count):
            break
        taken.append(sentence)
        total += count
    return taken


def endless(sentences: list[str], rng: random.Random) -> Iterator[str]:
    """All of them in a random order, then in another, without an end."""
    while True:
        yield from rng.sample(sentences, len(sentences))


def _some(text: str, rng: random.Random) -> int:
    return max(1, round(len(split_sentences(text)) * rng.uniform(0.33, 0.67)))


def _replaced(text: str, lost: Sequence[int], language: str, rng: random.Random) -> str:
    sentences = split_sentences(text)
    new = fill(endless(wordings(language)["filler"], rng), sum(count_words(sentences[i]) for i in lost))
    placed = [(i, sentence) for i, sentence in enumerate(sentences) if i not in lost]
    placed += zip(itertools.cycle(lost), new, strict=False)
    return _laid_out([sentence for _, sentence in sorted(placed, key=lambda pair: pair[0])], text)


def _all_but_the_longest(text: str) -> list[str]:
    """What takes its place is then always different, and never longer by much."""
    sentences = split_sentences(text)
    longest = max(sentences, key=count_words)
    return [sentence for sentence in sentences if sentence != longest] or sentences


def _laid_out(sentences: list[str], like: str) -> str:
    """In as many paragraphs as `like` has, of even length."""
    count = min(len(sentences), sum(1 for part in re.split(r"\n\s*\n", like) if part.strip()))
    cuts = [len(sentences) * i // count for i in range(count + 1)]
    return "\n\n".join(join(sentences[a:b]) for a, b in itertools.pairwise(cuts))
