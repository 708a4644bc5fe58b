"""Words, passages, and the `<think>`/`<answer>` form of a text.

The paper counts length on the text of `<answer>` only, in words = Han characters + runs of Latin letters (digits count as
nothing). LongWriter's own count (`evaluate.longbench`) leaves out a Latin word that touches a digit, Han or an accented letter.
Departures, for a reward must be hard to cheat: such a word counts; Han covers the CJK extensions; an invisible character or a
letter of another script does not end a run: else one in every word would double a policy's count.
"""

import functools
import itertools
import re
import unicodedata
from dataclasses import dataclass
from typing import Literal

import regex

Style = Literal["think", "direct"]
TAGS = {"think": ("<think>", "</think>", "<answer>", "</answer>"), "direct": ("<answer>", "</answer>")}
_TAG = re.compile(r"(</?(?:think|answer)>)")
_HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f"
_HAN_CHARACTER = re.compile(f"[{_HAN}]")
# A word starts with a Latin letter and goes on through letters of any script, marks and invisible characters.
_WORD = regex.compile(rf"[{_HAN}]|\p{{Latin}}[[\p{{L}}\p{{M}}\p{{Cf}}\p{{Cc}}\p{{Co}}]--[{_HAN}\s]]*", regex.V1)
_ASCII_WORD = re.compile(r"[A-Za-z][A-Za-z\x00-\x08\x0e-\x1f\x7f]*")  # fast path for ASCII; must agree with `_WORD`
_MARKS = regex.compile(r"[\p{M}\uff9e\uff9f]{30}")  # the two are letters, and decompose to marks
_HIDDEN = regex.compile(r"[\p{M}\p{Cf}\p{Default_Ignorable_Code_Point}[\p{Cc}--\s]]+", regex.V1)
_LATIN_ALIKE = str.maketrans("АВЕЅІЈКМНОРСТУХаеѕіјорсухһԁԛԝΑΒΕΖΗΙΚΜΝΟΡΤΥΧαικνορυχ",
                             "ABESIJKMHOPCTYXaesijopcyxhdqwABEZHIKMNOPTYXaikvopux")
_LOOK_ALIKE = re.compile(f"[{''.join(map(chr, _LATIN_ALIKE))}]")
_SENTENCE = re.compile(r"[^.!?。！？；;\n]+[.!?。！？；;\n]*[\"'”’」』）)]*")
_LONGEST_PASSAGE_WORDS = 40
_ASKED_IN = [  # how a request names the language of its answer: 用英文写, 写成英文, 英文作文, write it in English
    r"用{0}\w{{0,4}}?(?:写|撰|答|回|作|完成|起草|描述|介绍|说明|创作|输出)", r"(?:写|译|改|换)[成为]{0}",
    r"(?<![于绍论谈])(?<!有关){0}(?:版|作文|文章|邮件|信|演讲|论文|报告|故事)(?!\w*技巧)",
    r"\b(?:writ(?:e|ing|ten)|answer|reply|respond|translat\w{{1,6}}|draft)\b[^.!?\n]{{0,80}}\bin(?:to)? {1}"
    r"(?=\W*$|[.,;:!?)]| (?:and|please|with|about|on|for|of)\b)"]
_NAMES = {"en": ("英[文语]", "english"), "zh": ("[中汉][文语]", "chinese")}
_NAMED = {language: re.compile("|".join(_ASKED_IN).format(*names), re.IGNORECASE) for language, names in _NAMES.items()}


def count_words(text: str) -> int:
    """Number of Han characters + runs of letters that begin with a Latin one; time is linear in the text's length.

    >>> count_words("Spring 春天 came in 1984, didn't it?")
    8
    """
    return len(split_words(text))


def split_words(text: str) -> list[str]:
    """Words of the text, as `count_words` counts them."""
    return _word_pattern(text).findall(text)


def _word_pattern(text: str):
    return _ASCII_WORD if text.isascii() else _WORD


def has_han(text: str) -> bool:
    """Whether the text has a Han character."""
    return bool(_HAN_CHARACTER.search(text))


def without_han(text: str) -> str:
    """The text without its Han characters."""
    return _HAN_CHARACTER.sub("", text)


def only_han(text: str) -> str:
    """The Han characters of the text."""
    return "".join(_HAN_CHARACTER.findall(text))


def language_of(text: str) -> str:
    """Language of most of the text: zh if at least half of its words are Han characters, else en.

    >>> language_of("Explain the Dao (道) in 300 words."), language_of("写一篇关于 GPU 的短文")
    ('en', 'zh')
    """
    han = 0 if text.isascii() else len(only_han(text))
    return "zh" if han and 2 * han >= count_words(text) else "en"


def answer_language(request: str) -> str:
    """Language in which a request wants its answer: the one that it names, else its own.

    >>> answer_language("帮我用英文写一封求职信"), answer_language("帮我写一封求职信")
    ('en', 'zh')
    """
    named = [language for language, pattern in _NAMED.items() if pattern.search(request)]
    return named[0] if len(named) == 1 else language_of(request)


def normalise(form: Literal["NFC", "NFKD"], text: str) -> str:
    """Unicode normalisation in linear time: a run of marks, whose sorting is quadratic, is broken after 30 by a grapheme
    joiner (Unicode's stream-safe text process, UAX 15)."""
    return unicodedata.normalize(form, _MARKS.sub("\\g<0>\u034f", text))


def fold(text: str) -> str:
    """Fold case, white space, accents, compatibility forms such as full-width letters, invisible characters, and Cyrillic
    and Greek letters that look Latin, so that a copy cannot hide behind them.

    >>> fold("Sp\\u200bring  Сame")
    'spring came'
    """
    if not (text.isascii() and text.isprintable()):
        text = _HIDDEN.sub("", normalise("NFKD", text))
        text = text.translate(_LATIN_ALIKE) if _LOOK_ALIKE.search(text) else text  # to search is quick, to translate slow
    return " ".join(text.lower().split())


@dataclass(frozen=True)
class Parsed:
    """A completion cut at its tags.

    `exact` is the paper's form: one `<think>` then one `<answer>` (one `<answer>` only for the direct style), each
    closed, with nothing but white space outside and no further tag inside. `plan` and `answer` are read leniently, so
    that a truncated answer still has a length: each is the text after its first opening tag, up to the next tag or the end.
    `tags_in_place` counts the tags of the form that stand, each once and in order, before the first that does not.
    """

    exact: bool
    plan: str
    answer: str
    tags_in_place: int


@functools.lru_cache(maxsize=256)  # a step's completions of one process: three rewards and the trainer's rows read each
def parse(completion: str, style: Style) -> Parsed:
    """Parts of a completion. Never raises on any text; time is linear in its length.

    >>> parse("<think>plan</think><answer>cut off", "think")
    Parsed(exact=False, plan='plan', answer='cut off', tags_in_place=3)
    """
    pieces = [piece.strip() for piece in _TAG.split(completion)]
    texts, tags, form = pieces[0::2], pieces[1::2], TAGS[style]  # text, tag, text, tag, ..., text

    def after(tag: str) -> str:
        return texts[tags.index(tag) + 1] if tag in tags else ""

    outside = texts[0::2]  # before, between and after the elements, if the tags have the form
    in_place = [tag == wanted and tags.count(tag) == 1 for tag, wanted in zip(tags, form, strict=False)]
    return Parsed(exact=tuple(tags) == form and not any(outside), plan=after("<think>"), answer=after("<answer>"),
                  tags_in_place=[*in_place, False].index(False))


def has_form(parsed: Parsed, style: Style, min_plan_words: int) -> bool:
    """Whether a completion has the exact form with an answer, and with `min_plan_words` words of plan if one is asked for."""
    planned = style == "direct" or count_words(parsed.plan) >= min_plan_words
    return parsed.exact and planned and bool(parsed.answer)


def shown(completion: str) -> str:
    """Text that a judge or a rater reads: the answer, closed or not; without any <answer> tag the text after the plan, or the
    whole text. Truncated and malformed texts are judged as they stand; a plan alone gives nothing to judge.

    >>> shown("<think>plan</think>Rain fell."), shown("<think>a plan that never ends")
    ('Rain fell.', '')
    """
    if "<answer>" in completion:
        return parse(completion, "think").answer
    _, closing, rest = completion.rpartition("</think>")
    return rest.strip() if closing or "<think>" not in completion else ""


def split_sentences(text: str) -> list[str]:
    """Sentences and lines, English or Chinese, however long."""
    return [sentence.strip() for sentence in _SENTENCE.findall(text) if sentence.strip()]


def split_passages(text: str) -> list[str]:
    """Sentences, English or Chinese; one without any stop is cut every 40 words, so that it cannot hide a loop of words
    (it can hide one of digits or of another script: those are not words here)."""
    return [passage for passage, _ in count_passages(text)]


def count_passages(text: str) -> list[tuple[str, int]]:
    """(passage, its number of words) of each of `split_passages`, for the price of one reading."""
    passages = []
    for sentence in _SENTENCE.findall(text):
        words, cuts = count_words(sentence), [0, len(sentence)]
        if words > _LONGEST_PASSAGE_WORDS:
            starts = [word.start() for word in _word_pattern(sentence).finditer(sentence)]
            cuts[1:1] = starts[_LONGEST_PASSAGE_WORDS::_LONGEST_PASSAGE_WORDS]
        for n, (a, b) in enumerate(itertools.pairwise(cuts)):
            if passage := sentence[a:b].strip():
                passages.append((passage, min(_LONGEST_PASSAGE_WORDS, words - n * _LONGEST_PASSAGE_WORDS)))
    return passages


def whole_sentences(text: str, folded: bool = True) -> str:
    """The text, its white space `folded`, without a last sentence that was cut short (unless it is the only one)."""
    text = " ".join(text.split()) if folded else text
    end = max(text.rfind(stop) for stop in ".!?。！？")
    return text[: end + 1] or text
