"""Word ranges: what a query states about its own length, the rules that a predicted range is held to, and how well
predictions match ranges set by hand. Pure functions.

The rules by which a request states a length are rows of `texts/stated_lengths.yaml`, each with examples.
"""

import re
import unicodedata
from collections.abc import Mapping

from lwzlib.base.paths import TEXTS
from lwzlib.base.rows import DataError, read_yaml
from lwzlib.method.text import fold, language_of

Range = tuple[int, int]
MOST_WORDS, WIDEST_WORDS = 12_000, 3_000
_NUMBER = r"(?:(?:\d{1,3}(?:,\d{3}){1,2}|\d{1,7}(?:\.\d+)?)\s?[k千万]?|(?:[一二两三四五六七八九][百千万])+)"
_COUNT = re.compile(rf"(?P<head>word (?:count|limit|length)[^\d.]{{0,12}}|[字词]数[^\d。一二两三四五六七八九]{{0,8}})?"
                    rf"(?<!\d)(?<!\d[.,])(?:(?P<low>{_NUMBER})\s*(?:words?|个?(?:字|单?词))?\s*(?:-|–|—|~|to|and|到|至)\s*)?"
                    rf"(?P<n>{_NUMBER})(?P<unit>\s*-?\s*words?\b|\s*[余多]?个?[汉英文语单]{{0,3}}(?:字(?![节符母])|词(?![汇语条组性])))?")
_DIGITS = dict(zip("一二两三四五六七八九", (1, 2, 2, 3, 4, 5, 6, 7, 8, 9), strict=True))
_UNITS = {"": 1, "k": 1000, "百": 100, "千": 1000, "万": 10_000}
_TENTHS = {"about": (9, 11), "most": (9, 10), "least": (10, 11)}


def _joined(patterns: list[str]) -> str:
    """The patterns as one, with their fragments filled in; () gives one that never fits."""
    joined = "|".join(patterns) or "(?!)"
    for name, fragment in reversed(_RULES["fragments"].items()):  # each may name those before it
        joined = joined.replace(f"<{name}>", fragment)
    return joined


_RULES = read_yaml(TEXTS / "stated_lengths.yaml")
_END = re.compile(_RULES["sentence_end"])
_LIMITS = [(rule["limit"], re.compile(rf"(?<![a-z])(?:{_joined(rule['before'])})[\s:.写]*{_joined(['<about>'])}?$"),
            re.compile(rf"\s?\(?(?:{_joined(rule.get('after', []))})")) for rule in _RULES["limits"]]
_NOT_ITS_OWN = re.compile(_joined([pattern for rule in _RULES["not_its_own"] for pattern in rule["patterns"]]))
_OF_A_SECTION, _ASKED_FOR = (re.compile(_joined(_RULES[name]["patterns"])) for name in ("of_a_section", "asked_for"))


def stated(query: str) -> Range | None:
    """The range that follows from the one length which the query states: N is within 10%, a limit is kept, rounded to hundreds
    unless that would break a limit or leave no width. None if the query states no length, several, that of a part, of several
    pieces or of a given text, a difference, or a length below 50 words, such as a title's.

    >>> stated("An essay of about 1,200 words."), stated("不超过800字的通知"), stated("No more than 350 words on rain.")
    ((1100, 1300), (700, 800), (315, 350))
    """
    text, ranges = "\n".join(filter(None, map(fold, query.splitlines()))).replace("#", " "), set()
    for match in _COUNT.finditer(text):
        start = match.start("low" if match["low"] else "n")
        before, after = _END.split(text[max(0, start - 40) : start])[-1], _END.split(text[match.end() :][:30])[0]
        low, n = _number(match["low"] or ""), _number(match["n"])
        if (match["head"] or match["unit"]) and n >= 50:
            said = f"{before}#{match['unit'] or ''}{after}"
            other = (_NOT_ITS_OWN.search(said) or (_OF_A_SECTION.search(said) and not _ASKED_FOR.search(said))
                     or (match["low"] and not 50 <= low < n))
            ranges.add(None if other else (low, n) if low else _within(_limit(before, after), n))
    return ranges.pop() if len(ranges) == 1 else None


def _number(text: str) -> int:
    parts = re.findall(r"([\d.]+|[一二两三四五六七八九])\s?([k百千万]?)", text.replace(",", ""))
    return round(sum(float(_DIGITS.get(n, n)) * _UNITS[unit] for n, unit in parts))


def _limit(before: str, after: str) -> str:
    return next((limit for limit, left, right in _LIMITS if right.match(after) or left.search(before)), "about")


def _within(limit: str, n: int) -> Range:
    least, most = _TENTHS[limit]
    lower, upper = -(-n * least // 10), n * most // 10
    hundreds = round(lower, -2), round(upper, -2)
    kept = (limit != "most" or hundreds[1] <= n) and (limit != "least" or hundreds[0] >= n)
    return hundreds if kept and 0 < hundreds[0] < hundreds[1] else (lower, upper)


def enforce(lower: int, upper: int, query: str = "") -> Range | str:
    """A predicted range held to the rules, or the reason to drop the query. Bounds: multiples of 100 from 100 to 12,000 and at
    most 3,000 apart, around the same middle. A length that the query states takes the place of the prediction, unless this
    says that the request cannot be fulfilled."""
    fixed = stated(query)
    if (fixed and fixed[0] > MOST_WORDS) or min(lower, upper) > MOST_WORDS:
        return "out of limits"
    if max(lower, upper) <= 0:
        return "cannot be fulfilled"
    lower, upper = fixed or (max(1, min(lower, upper) // 100) * 100, -(-max(lower, upper) // 100) * 100)
    upper = min(upper, MOST_WORDS)
    if upper - lower > WIDEST_WORDS:
        lower = (lower + upper - WIDEST_WORDS) // 200 * 100
        upper = lower + WIDEST_WORDS
    return lower, upper


def with_length(request: str, words: str) -> tuple[str, Range]:
    """The request with its length added in its own language, and the range that follows: `words` is a number, of which 10%
    more or less will do, or a range. Raises DataError for another form, or a request that states a length itself.

    >>> with_length("Describe rain.", "60"), with_length("写一段关于雨的文字", "200-400")
    (('Describe rain. Write about 60 words.', (54, 66)), ('写一段关于雨的文字。写200到400字。', (200, 400)))
    """
    form = re.fullmatch(r"\s*(\d{1,6})(?:\s*[-–]\s*(\d{1,6}))?\s*", words)
    lower, upper = (int(form[1]), int(form[2] or form[1])) if form else (0, 0)
    if not 0 < lower <= upper:
        raise DataError(f"{words!r} is no number of words: give one such as 300, or a range such as 200-400")
    if own := stated(request):
        raise DataError(f"{words!r} words, but the request states its own length, {own[0]:,} to {own[1]:,}: leave one out")
    chinese, range_given = language_of(request) == "zh", bool(form and form[2])
    stop = "" if unicodedata.category(request[-1]).startswith("P") else "。" if chinese else "."
    if chinese:
        length = f"写{lower}到{upper}字。" if range_given else f"写{lower}字左右。"
    else:
        length = f" Write {lower:,} to {upper:,} words." if range_given else f" Write about {lower:,} words."
    return request + stop + length, (lower, upper) if range_given else _within("about", lower)


def agreement(predicted: Mapping[str, Range], by_hand: Mapping[str, Range]) -> dict:
    """How well ranges by id match those set by hand, over the ids that both have. `overlap`: mean of words in both ranges over
    words in either. `middle_inside`: share whose predicted middle lies in the range set by hand. `kendall_tau`: of the
    middles (tau-b; nan if there is no order to compare)."""
    from scipy.stats import kendalltau

    pairs = [(predicted[key], by_hand[key]) for key in by_hand if key in predicted]
    if not pairs:
        raise ValueError("no query has both a predicted range and one set by hand")
    overlap = [max(0, min(ours[1], hand[1]) - max(ours[0], hand[0]) + 1) / (max(ours[1], hand[1]) - min(ours[0], hand[0]) + 1)
               for ours, hand in pairs]
    tau = kendalltau(*zip(*((sum(ours), sum(hand)) for ours, hand in pairs), strict=True)).statistic
    inside = sum(hand[0] <= sum(ours) / 2 <= hand[1] for ours, hand in pairs)
    return {"queries": len(pairs), "not_predicted": len(by_hand) - len(pairs), "overlap": sum(overlap) / len(pairs),
            "middle_inside": inside / len(pairs), "kendall_tau": float(tau)}
