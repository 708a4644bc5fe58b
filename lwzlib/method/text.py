"""Words, passages, and the `<think>`/`<answer>` form.

The paper counts length on the text of `<answer>` only, in words = Han characters + runs of Latin letters (LongWriter's
count). Here accented Latin letters belong to their run, and Han covers the CJK extensions; digits count as nothing, as
in the original. A character that one cannot see, or a letter of any other script, does not end a run: else a policy that
puts a zero-width space or a Cyrillic letter into every word would double its count.
"""

import itertools
import re
import unicodedata
from dataclasses import dataclass
from typing import Literal

import regex

Style = Literal["think", "direct"]
_HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f"
# A word starts with a Latin letter and goes on through letters of any script, marks, and what one cannot see.
_WORD = regex.compile(rf"[{_HAN}]|\p{{Latin}}[[\p{{L}}\p{{M}}\p{{Cf}}\p{{Cc}}\p{{Co}}]--[{_HAN}\s]]*", regex.V1)
_ASCII_WORD = re.compile(r"[A-Za-z][A-Za-z\x00-\x08\x0e-\x1f\x7f]*")  # the same of such a text, in a fraction of the time
_HAN_CHARACTER = re.compile(f"[{_HAN}]")
_TAG = re.compile(r"(</?(?:think|answer)>)")
TAGS = {
    "think": ("<think>", "</think>", "<answer>", "</answer>"),
    "direct": ("<answer>", "</answer>"),
}
_HIDDEN = regex.compile(r"[\p{M}\p{Cf}\p{Default_Ignorable_Code_Point}[\p{Cc}--\s]]+", regex.V1)
_LATIN_ALIKE = str.maketrans("АВЕЅІЈКМНОРСТУХаеѕіјорсухһԁԛԝΑΒΕΖΗΙΚΜΝΟΡΤΥΧαικνορυχ",
                             "ABESIJKMHOPCTYXaesijopcyxhdqwABEZHIKMNOPTYXaikvopux")
_LOOK_ALIKE = re.compile(f"[{''.join(map(chr, _LATIN_ALIKE))}]")
_SENTENCE = re.compile(r"[^.!?。！？；;\n]+[.!?。！？；;\n]*[\"'”’」』）)]*")
_LONGEST_PASSAGE_WORDS = 40


def count_words(text: str) -> int:
    """Han characters + runs of letters that have a Latin one among them; time is linear in the length.

    >>> count_words("Spring 春天 came in 1984, didn't it?")
    8
    """
    return len(split_words(text))


def split_words(text: str) -> list[str]:
    """What `count_words` counts."""
    return _word_in(text).findall(text)


def _word_in(text: str):
    return _ASCII_WORD if text.isascii() else _WORD


def has_han(text: str) -> bool:
    """There is a Han character in it."""
    return bool(_HAN_CHARACTER.search(text))


def language_of(text: str) -> str:
    """zh where there is a Han character, else en."""
    return "zh" if has_han(text) else "en"


def fold(text: str) -> str:
    """Folds case, white space, accents, compatibility forms such as full-width letters, invisible characters, and Cyrillic
    and Greek letters that look Latin, so that a copy cannot hide behind them.

    >>> fold("Sp\\u200bring  Сame")
    'spring came'
    """
    if not (text.isascii() and text.isprintable()):
        text = _HIDDEN.sub("", unicodedata.normalize("NFKD", text))
        text = text.translate(_LATIN_ALIKE) if _LOOK_ALIKE.search(text) else text  # to search is quick, to translate slow
    return " ".join(text.lower().split())


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
    cut = [piece.strip() for piece in _TAG.split(completion)]
    outside = cut[0::4]  # text, tag, text, tag, text: what stands before, between and after the two elements
    if tuple(cut[1::2]) == TAGS[style] and not any(outside):
        return Parsed(True, cut[2] if style == "think" else "", cut[-3])
    return Parsed(False, _inside(completion, "think"), _inside(completion, "answer"))


def tags_in_place(completion: str, style: Style) -> int:
    """How many tags of the form stand, each once and in their order, before the first that does not.

    >>> [tags_in_place(text, "think") for text in ("<think>plan</think><answer>cut off", "<think><answer>a</answer></think>")]
    [3, 1]
    """
    found = _TAG.findall(completion)
    right = (tag == wanted and found.count(tag) == 1 for tag, wanted in zip(found, TAGS[style], strict=False))
    return sum(itertools.takewhile(bool, right))


def shown(completion: str) -> str:
    """What a judge or a rater reads: the answer, closed or not; without any <answer> tag what follows the plan, or the whole
    text. Truncated and malformed texts are judged as they stand, nothing at all if only a plan was written.

    >>> shown("<think>plan</think>Rain fell."), shown("<think>a plan that never ends")
    ('Rain fell.', '')
    """
    if "<answer>" in completion:
        return parse(completion, "think").answer
    _, ended, rest = completion.rpartition("</think>")
    return rest.strip() if ended or "<think>" not in completion else ""


def _inside(text: str, tag: str) -> str:
    _, opening, rest = text.partition(f"<{tag}>")
    if not opening:
        return ""
    end = _TAG.search(rest)
    return (rest[: end.start()] if end else rest).strip()


def split_sentences(text: str) -> list[str]:
    """Sentences and lines, English or Chinese, however long."""
    return [sentence for found in _SENTENCE.findall(text) if (sentence := found.strip())]


def split_passages(text: str) -> list[str]:
    """Sentences, English or Chinese; one without any stop is cut every 40 words, so that it cannot hide a loop of words
    (of digits or of another script it can: those are not words here)."""
    return [passage for passage, _ in count_passages(text)]


def count_passages(text: str) -> list[tuple[str, int]]:
    """Each passage with its number of words, for the price of one reading."""
    passages = []
    for sentence in _SENTENCE.findall(text):
        words = len(_word_in(sentence).findall(sentence))
        long = words > _LONGEST_PASSAGE_WORDS
        starts = [word.start() for word in _word_in(sentence).finditer(sentence)] if long else []
        cuts = [0, *starts[_LONGEST_PASSAGE_WORDS::_LONGEST_PASSAGE_WORDS], len(sentence)]
        for n, (a, b) in enumerate(itertools.pairwise(cuts)):
            if passage := sentence[a:b].strip():
                passages.append((passage, min(_LONGEST_PASSAGE_WORDS, words - n * _LONGEST_PASSAGE_WORDS)))
    return passages


def whole_sentences(text: str) -> str:
    """White space folded, and a last sentence that was cut short left out (unless it is the only one)."""
    folded = " ".join(text.split())
    end = max(folded.rfind(stop) for stop in ".!?。！？")
    return folded[: end + 1] or folded
