"""Word ranges: what a query states about its own length, the rules that a predicted range is held to, and how well
predictions match ranges set by hand. Pure functions.
"""

import re
from collections.abc import Mapping

from lwzlib.method.text import fold

Range = tuple[int, int]
MOST_WORDS, WIDEST_WORDS = 12_000, 3_000
_NUMBER = r"(?:(?:\d{1,3}(?:,\d{3}){1,2}|\d{1,7}(?:\.\d+)?)\s?[k千万]?|(?:[一二两三四五六七八九][百千万])+)"
_COUNT = re.compile(rf"(?P<head>word (?:count|limit|length)[^\d.]{{0,12}}|字数[^\d。一二两三四五六七八九]{{0,8}})?"
                    rf"(?<!\d)(?<!\d[.,])(?:(?P<low>{_NUMBER})\s*(?:words?|字)?\s*(?:-|–|—|~|to|and|到|至)\s*)?"
                    rf"(?P<n>{_NUMBER})(?P<unit>\s*-?\s*words?\b|\s*[余多]?个?汉?字(?![节符母]))?")
_DIGITS = dict(zip("一二两三四五六七八九", (1, 2, 2, 3, 4, 5, 6, 7, 8, 9), strict=True))
_UNITS = {"": 1, "k": 1000, "百": 100, "千": 1000, "万": 10_000}
_LIMITS = [  # (what N is, said before N, said after the count); the first that fits: "no less than" has "less than" in it
    ("most", r"(?:no|not) (?:more|longer) than|(?:not|n.t) exceed(?:ing)?|不\w{0,2}超过|不\w?[多高]于", r"(?!)"),
    ("least", r"(?:no|not) (?:less|fewer|shorter) than|不\w?[少低]于", r"(?!)"),
    ("most", r"at most|up to|under|below|within|less than|fewer than|max(?:imum)?(?: of)?|limit(?: of)?|[至最]多|上限|[少低]于",
     r"or (?:less|fewer|under)\b|max(?:imum)?\b|at most\b|limit\b|以内|之内|以下"),
    ("least", r"at least|more than|over|exceed(?:s|ing)?|min(?:imum)?(?: of)?|至少|最少|超过|[多大]于",
     r"or (?:more|over)\b|min(?:imum)?\b|at least\b|以上"),
]
_TENTHS = {"about": (9, 11), "most": (9, 10), "least": (10, 11)}
_PART = re.compile(r"\b(?:each|every|per|apiece)\b|每|各|分别")  # the length of a part is not that of the whole
_GIVEN = re.compile(r"(?:\b(?:this|that|these|my|our|your|following|attached|above)|这篇|那篇|以下|上面|我的)\s*$")


def stated(query: str) -> Range | None:
    """The range that follows from the one length which the query states: N is within 10%, a limit is kept. None if it
    states none, several, that of a part or of a given text, or one below 50 words, such as a title's.

    Rounded to hundreds, unless that would break a limit or leave no width.

    >>> stated("An essay of about 1,200 words."), stated("不超过800字的通知"), stated("No more than 350 words on rain.")
    ((1100, 1300), (700, 800), (315, 350))
    """
    text, ranges = fold(query), set()
    for match in _COUNT.finditer(text):
        before, after = text[max(0, match.start() - 40) : match.start("low" if match["low"] else "n")], text[match.end() :][:20]
        low, n = _number(match["low"] or ""), _number(match["n"])
        if (match["head"] or match["unit"]) and n >= 50:
            given = _PART.search(before + " " + after) or _GIVEN.search(before) or (match["low"] and not 50 <= low < n)
            ranges.add(None if given else (low, n) if low else _within(_limit(before, after), n))
    return ranges.pop() if len(ranges) == 1 else None


def _number(text: str) -> int:
    parts = re.findall(r"([\d.]+|[一二两三四五六七八九])\s?([k百千万]?)", text.replace(",", ""))
    return round(sum(float(_DIGITS.get(n, n)) * _UNITS[unit] for n, unit in parts))


def _limit(before: str, after: str) -> str:
    return next((limit for limit, left, right in _LIMITS if re.search(rf"(?:{left})[\s:]*(?:about |around |约)?$", before)
                 or re.match(rf"\s?\(?(?:{right})", after)), "about")


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
