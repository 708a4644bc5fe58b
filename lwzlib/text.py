"""Words, passages, and the `<think>`/`<answer>` form.

The paper counts length on the text of `<answer>` only, in words = Han characters + runs of Latin letters (LongWriter's
count). Here accented Latin letters belong to their run, and Han covers the CJK extensions; digits count as nothing, as
in the original.
"""

import itertools
import re
from dataclasses import dataclass
from typing import Literal

Style = Literal["think", "direct"]

_HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f"
_LATIN = "A-Za-z\u00aa\u00ba\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f\u1e00-\u1eff"
_WORD = re.compile(f"[{_HAN}]|[{_LATIN}]+")
_HAN_CHARACTER = re.compile(f"[{_HAN}]")
_TAG = re.compile(r"</?(?:think|answer)>")
_FORM = {
    "think": re.compile(r"\s*<think>(?P<plan>.*?)</think>\s*<answer>(?P<answer>.*?)</answer>\s*", re.DOTALL),
    "direct": re.compile(r"\s*(?P<plan>)<answer>(?P<answer>.*?)</answer>\s*", re.DOTALL),
}
TAGS = {
    "think": ("<think>", "</think>", "<answer>", "</answer>"),
    "direct": ("<answer>", "</answer>"),
}
_SENTENCE = re.compile(r"[^.!?。！？；;\n]+[.!?。！？；;\n]*[\"'”’」』）)]*")
_LONGEST_PASSAGE_WORDS = 40


def count_words(text: str) -> int:
    """Han characters + runs of Latin letters.

    >>> count_words("Spring 春天 came in 1984, didn't it?")
    8
    """
    return sum(1 for _ in _WORD.finditer(text))


def has_han(text: str) -> bool:
    return bool(_HAN_CHARACTER.search(text))


@dataclass(frozen=True)
class Parsed:
    """A completion cut at its tags.

    `exact` is the paper's form: one `<think>` then one `<answer>` (one `<answer>` only for the direct style), each
    closed, with nothing but white space outside and no further tag inside. `plan` and `answer` are read leniently, so
    that a truncated answer still has a length: what follows the first opening tag, up to its closing tag or the end.
    """

    exact: bool
    plan: str
    answer: str


def parse(completion: str, style: Style) -> Parsed:
    """Never raises on any text; time is linear in its length."""
    if len(tags := _TAG.findall(completion)) == len(TAGS[style]) and tuple(tags) == TAGS[style]:
        match = _FORM[style].fullmatch(completion)
        if match:
            return Parsed(True, match["plan"].strip(), match["answer"].strip())
    return Parsed(False, _inside(completion, "think"), _inside(completion, "answer"))


def _inside(text: str, tag: str) -> str:
    _, opening, rest = text.partition(f"<{tag}>")
    if not opening:
        return ""
    end = _TAG.search(rest)
    return (rest[: end.start()] if end else rest).strip()


def split_passages(text: str) -> list[str]:
    """Sentences, English or Chinese; one without any stop is cut every 40 words, so that it cannot hide a loop of words
    (of digits or of another script it can: those are not words here)."""
    return [passage for passage, _ in count_passages(text)]


def count_passages(text: str) -> list[tuple[str, int]]:
    """Each passage with its number of words, for the price of one reading."""
    passages = []
    for sentence in _SENTENCE.findall(text):
        starts = [word.start() for word in _WORD.finditer(sentence)]
        cuts = [0, *starts[_LONGEST_PASSAGE_WORDS::_LONGEST_PASSAGE_WORDS], len(sentence)]
        for n, (a, b) in enumerate(itertools.pairwise(cuts)):
            if passage := sentence[a:b].strip():
                passages.append((passage, min(_LONGEST_PASSAGE_WORDS, len(starts) - n * _LONGEST_PASSAGE_WORDS)))
    return passages


def whole_sentences(text: str) -> str:
    """White space folded, and a last sentence that was cut short left out (unless it is the only one)."""
    folded = " ".join(text.split())
    end = max(folded.rfind(stop) for stop in ".!?。！？")
    return folded[: end + 1] or folded
