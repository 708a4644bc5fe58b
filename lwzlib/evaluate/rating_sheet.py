"""A sheet for human raters: one self-contained page, two texts side by side, blind; its export becomes judgments.

The paper's human study compares pairs of texts. Here a rater opens a file, chooses by keys, and exports a file. The page
holds no name of an arm: which text came from where stands in a key file beside it, which stays with whoever made the sheet.
"""

import hashlib
import itertools
import json
import random
from collections import Counter
from pathlib import Path

import jinja2

from lwzlib.base.rows import DataError, read_text, write_atomic
from lwzlib.method.text import language_of, shown

_WINNER = {"left": "first", "right": "second", "tie": "tie"}


def make_sheet(samples: dict[str, list[dict]], out: Path, pairs_per_query: int = 1, seed: int = 0) -> Path:
    """Write the page `out` and its key `out`.key.json; returns `out`.

    `samples`: the rows {id, query, completion} of each arm, as in `samples.jsonl`. Of each query that at least two arms
    answered, `pairs_per_query` pairs of arms are shown (all, if there are fewer), so chosen that all pairs of arms come
    about equally often. `seed` draws them, their order and their sides. A completion that was cut off, or has no answer, is
    shown as it stands; plans are never shown.

    Raises DataError for fewer than two arms, an arm without samples, a row that cannot be used, no common query, or where
    `out` is another sheet: what its raters export would be lost with its key.
    """
    if pairs_per_query < 1:
        raise DataError(f"pairs_per_query = {pairs_per_query}; it must be at least 1")
    arms = {arm: _by_query(arm, rows) for arm, rows in samples.items()}
    if len(arms) < 2:
        raise DataError(f"a sheet compares at least two arms; given: {', '.join(arms) or 'none'}")
    drawn = _draw(arms, pairs_per_query, random.Random(seed))
    if not drawn:
        raise DataError(f"no query was answered by two of the arms {', '.join(arms)}: nothing can be compared")
    key, pairs, digits = {}, [], len(str(len(drawn)))
    for number, (query, left, right) in enumerate(drawn, 1):
        name = f"p{number:0{digits}}"
        key[name] = {"query_id": query, "left": left, "right": right}
        pairs.append(_page_pair(name, arms[left][query], arms[right][query]))
    sheet = hashlib.sha256(json.dumps([pairs, key]).encode()).hexdigest()[:12]
    if key_of(out).exists() and _json(key_of(out), "sheet")["sheet"] != sheet:
        raise DataError(f"{key_of(out)} is the key of another sheet, and the only one; choose another name for this sheet")
    chinese = sum(pair["lang"] == "zh" for pair in pairs) * 2 > len(pairs)
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True)
    page = environment.get_template("rating_sheet.html.j2").render(
        sheet={"sheet": sheet, "lang": "zh" if chinese else "en", "pairs": pairs})
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(key_of(out), json.dumps({"sheet": sheet, "seed": seed, "pairs": key}, ensure_ascii=False, indent=1))
    write_atomic(out, page)
    return out


def key_of(sheet: Path) -> Path:
    """Path of the key of a sheet."""
    return sheet.with_suffix(".key.json")


def unblind(export: Path, key: Path) -> list[dict]:
    """The arena's judgments {query_id, first, second, winner, judge} of what one rater exported, in the order of the sheet.

    `first` is the arm whose text stood on the left; `winner` is first, second or tie. Pairs without a choice are left out.
    Raises DataError if either file is broken, or the export is of another sheet or has an unknown pair or choice.
    """
    exported, known = _json(export, "sheet", "rater", "choices"), _json(key, "sheet", "pairs")
    rater, choices = exported["rater"], exported["choices"]
    if exported["sheet"] != known["sheet"]:
        raise DataError(f"{export} is of sheet {exported['sheet']!r}, but {key} is the key of sheet {known['sheet']!r}")
    if not isinstance(rater, str) or not rater.strip():
        raise DataError(f"{export}: rater = {rater!r}; a judgment needs the rater's name")
    if not isinstance(choices, dict):
        raise DataError(f"{export}: choices = {choices!r:.80}; it must be {{pair: choice}}")
    for pair, choice in choices.items():
        if pair not in known["pairs"]:
            raise DataError(f"{export}: there is no pair {pair!r} in {key}")
        if not isinstance(choice, str) or choice not in _WINNER:
            raise DataError(f"{export}: {pair} = {choice!r}; a choice is {', '.join(_WINNER)}")
    return [{"query_id": pair["query_id"], "first": pair["left"], "second": pair["right"], "winner": _WINNER[choices[name]],
             "judge": rater.strip()} for name, pair in known["pairs"].items() if name in choices]


def _by_query(arm: str, rows: list[dict]) -> dict[str, dict]:
    if not rows:
        raise DataError(f"arm {arm} has no samples")
    samples = {}
    for number, row in enumerate(rows, 1):
        for field in ("id", "query", "completion"):
            if not isinstance(row.get(field), str):
                raise DataError(f"arm {arm}, row {number}: {field} = {row.get(field)!r:.80}; a text is needed")
        if row["id"] in samples:
            raise DataError(f"arm {arm}, row {number}: a second sample of query {row['id']!r}; give one per query")
        samples[row["id"]] = row
    return samples


def _draw(arms: dict[str, dict], pairs_per_query: int, chance: random.Random) -> list[tuple[str, str, str]]:
    """(query id, left arm, right arm), shuffled; the pairs of arms that came least often so far come first."""
    drawn, used = [], Counter()
    for query in dict.fromkeys(itertools.chain.from_iterable(arms.values())):
        there = [arm for arm in arms if query in arms[arm]]
        if len({arms[arm][query]["query"] for arm in there}) > 1:
            raise DataError(f"query {query!r} has another text in some of the arms {', '.join(there)}")
        pairs = list(itertools.combinations(there, 2))
        chance.shuffle(pairs)
        for pair in sorted(pairs, key=lambda pair: used[pair])[:pairs_per_query]:
            used[pair] += 1
            drawn.append((query, *chance.sample(pair, 2)))
    chance.shuffle(drawn)
    return drawn


def _page_pair(name: str, left: dict, right: dict) -> dict:
    texts = [shown(row["completion"]) for row in (left, right)]
    return {"pair": name, "query": left["query"], "lang": language_of(left["query"]),
            "texts": [{"text": text, "lang": language_of(text)} for text in texts]}


def _json(path: Path, *fields: str) -> dict:
    try:
        content = json.loads(read_text(path))
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict) or any(field not in content for field in fields):
        raise DataError(f"{path} needs the fields {', '.join(fields)}: is it the right file?")
    return content
