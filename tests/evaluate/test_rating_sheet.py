"""The sheet for human raters: what it holds and hides, a whole session in a real browser, and what comes of its export."""

import html
import json
import re
from collections import Counter

import browser
import pytest
from polling import until

from lwzlib.base.rows import DataError
from lwzlib.evaluate import rating_sheet
from lwzlib.evaluate.rating_sheet import make_sheet
from lwzlib.method.text import shown as read_by_raters

ARMS = ("base-think", "sft-secret", "qwen-72b")
TRAP = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'></script><!-- & \u2028"


def samples(queries=4, arms=ARMS):
    def row(query, i):
        text = f"Text {chr(65 + i)} of {query}.\n\nNext paragraph.\nNext line. {TRAP}"
        asked = f"要求{query}：写一写雨。" if query % 2 else f"Request {query}: write about rain."
        return {"id": f"query-id-{query}", "query": asked,
                "completion": f"<think>hidden plan</think><answer>{text}</answer>"}
    return {arm: [row(query, i) for query in range(queries)] for i, arm in enumerate(arms)}


def sheet_of(page):
    return json.loads(html.unescape(re.search(r'id="sheet">(.*?)</script>', page.read_text(), re.DOTALL)[1]))


def key_of(page):
    return json.loads(rating_sheet.key_of(page).read_text())


def exported(tmp_path, page, choices, **more):
    path = tmp_path / "export.json"
    path.write_text(json.dumps({"sheet": key_of(page)["sheet"], "rater": "Ann", "choices": choices} | more))
    return path


def test_page_is_blind_and_self_contained(tmp_path):
    page = make_sheet(samples(), tmp_path / "new" / "sheet.html", 3, 7)
    said = page.read_text()
    assert not any(hidden in said for hidden in (*ARMS, "query-id", "hidden plan"))
    frame = re.sub(r'id="sheet">.*?</script>', "", said, flags=re.DOTALL)
    assert not re.search(r"""(src|href)=["']?(?!["']?#)""", frame) and "http:" not in frame, "it must need no other file"
    assert said.count("</script>") == 2, "a text cannot end the script that holds it"
    assert len(sheet_of(page)["pairs"]) == 12


def test_key_says_what_the_page_hides(tmp_path):
    arms = samples()
    page = make_sheet(arms, tmp_path / "sheet.html", 3)
    key = key_of(page)["pairs"]
    for pair in sheet_of(page)["pairs"]:
        entry = key[pair["pair"]]
        for side, shown in zip(("left", "right"), pair["texts"], strict=True):
            row = next(row for row in arms[entry[side]] if row["id"] == entry["query_id"])
            assert row["query"] == pair["query"] and shown["text"] in row["completion"]


def test_seed_shuffles_order_and_sides_and_repeats(tmp_path):
    def drawn(seed):
        page = make_sheet(samples(40), tmp_path / f"{seed}.html", 1, seed)
        return page.read_text(), list(key_of(page)["pairs"].values())
    (same, first), (again, _), (other, second) = drawn(1), drawn(1), drawn(2)
    assert same == again and same != other and first != second
    ids = [pair["query_id"] for pair in first]
    assert len(ids) == 40 and ids != [row["id"] for row in samples(40)[ARMS[0]]]
    assert len(sides := Counter((pair["left"], pair["right"]) for pair in first)) == 6 and min(sides.values()) >= 3
    met = Counter(frozenset((pair["left"], pair["right"])) for pair in first)
    assert sorted(met.values()) == [13, 13, 14], "all pairs of arms come equally often"


def test_only_queries_that_both_arms_answered(tmp_path):
    arms = samples(4, ARMS[:2])
    arms["sft-secret"] = arms["sft-secret"][2:]
    page = make_sheet(arms, tmp_path / "s.html", 5)
    assert sorted(pair["query_id"] for pair in key_of(page)["pairs"].values()) == ["query-id-2", "query-id-3"]


@pytest.mark.parametrize(("completion", "shown"), [
    ("<think>p</think> <answer> a\n\nb </answer> more", "a\n\nb"), ("<think>p</think><answer>cut of", "cut of"),
    ("<think>p</think>no tags", "no tags"), ("a<answer>b", "b"), ("plain <b>text</b>", "plain <b>text</b>"),
    ("<think>never ends", ""), ("</think>after", "after"), ("Dear all,<think>a plan", ""), ("", ""),
    ("<answer></answer>", "")])
def test_plan_is_never_shown_and_the_rest_as_it_stands(completion, shown):
    assert read_by_raters(completion) == shown


@pytest.mark.parametrize(("change", "said"), [
    (lambda arms: arms.update({"qwen-72b": []}), "arm qwen-72b has no samples"),
    (lambda arms: [arms.pop(arm) for arm in ARMS[1:]], "at least two arms; given: base-think"),
    (lambda arms: arms.clear(), "given: none"),
    (lambda arms: [row.update(id=f"{arm}-{row['id']}") for arm in ARMS for row in arms[arm]], "no query was answered by two"),
    (lambda arms: arms["base-think"].append(arms["base-think"][0]), "base-think, row 5: a second sample of query 'query-id-0'"),
    (lambda arms: arms["base-think"][1].pop("completion"), "arm base-think, row 2: completion = None"),
    (lambda arms: arms["base-think"][1].update(query="Other"), "query 'query-id-1' has another text in some of the arms")])
def test_samples_that_cannot_be_compared_are_named(tmp_path, change, said):
    arms = samples()
    change(arms)
    with pytest.raises(DataError, match=said):
        make_sheet(arms, tmp_path / "s.html")
    assert not list(tmp_path.iterdir())
    with pytest.raises(DataError, match="pairs_per_query = 0"):
        make_sheet(samples(), tmp_path / "s.html", 0)


def test_key_of_another_sheet_is_never_overwritten(tmp_path):
    make_sheet(samples(), tmp_path / "s.html", seed=1)
    before = key_of(make_sheet(samples(), tmp_path / "s.html", seed=1))
    with pytest.raises(DataError, match=r"s\.key\.json is the key of another sheet"):
        make_sheet(samples(), tmp_path / "s.html", seed=2)
    assert key_of(tmp_path / "s.html") == before


def test_unblinding_gives_the_arenas_rows(tmp_path):
    page = make_sheet(samples(), tmp_path / "s.html")
    key = key_of(page)["pairs"]
    chosen = {"p3": "tie", "p1": "left", "p2": "right"}
    assert rating_sheet.unblind(exported(tmp_path, page, chosen, rater=" Ann "), rating_sheet.key_of(page)) == [
        {"query_id": key[p]["query_id"], "first": key[p]["left"], "second": key[p]["right"], "winner": winner, "judge": "Ann"}
        for p, winner in (("p1", "first"), ("p2", "second"), ("p3", "tie"))]


@pytest.mark.parametrize(("choices", "more", "said"), [
    ({}, {"sheet": "other"}, r"export\.json is of sheet 'other', but .*s\.key\.json is the key of sheet"),
    ({"p9": "left"}, {}, "there is no pair 'p9'"), ({"p1": "first"}, {}, "p1 = 'first'; a choice is left, right, tie"),
    ({"p1": ["left"]}, {}, r"p1 = \['left'\]"), ([], {}, r"choices = \[\]"), ({}, {"rater": " "}, "rater = ' '")])
def test_export_that_does_not_fit_is_refused(tmp_path, choices, more, said):
    page = make_sheet(samples(), tmp_path / "s.html")
    with pytest.raises(DataError, match=said):
        rating_sheet.unblind(exported(tmp_path, page, choices, **more), rating_sheet.key_of(page))


def test_files_that_are_no_export_are_refused(tmp_path):
    page = make_sheet(samples(), tmp_path / "s.html")
    with pytest.raises(DataError, match="is not JSON"):
        rating_sheet.unblind(page, rating_sheet.key_of(page))
    with pytest.raises(DataError, match="needs the fields sheet, rater, choices"):
        rating_sheet.unblind(rating_sheet.key_of(page), rating_sheet.key_of(page))


@pytest.fixture
def session(tmp_path):
    """(page of the sheet, start of a browser on it, folder of downloads). Each start finds what the last one kept."""
    browser.required()
    page, downloads = make_sheet(samples(), tmp_path / "sheet.html", 2, 3), tmp_path / "downloads"
    (tmp_path / "profile").mkdir()
    return page, lambda: browser.page(tmp_path / "profile", downloads), downloads


def seen(tab, of):
    return tab.js(f"document.querySelector({of!r}).textContent")


def ready(tab):
    until(lambda: tab.js("document.querySelector('main > :not([hidden])') !== null"), "what the browser kept")


def begin(tab, page, name="Ann Lee"):
    tab.open(page.as_uri())
    ready(tab)
    for letter in name:
        tab.key(letter)  # the field has the focus
    tab.key("Enter")
    until(lambda: name in seen(tab, "#rater"), "the first pair")


def shown(tab):
    """What is asked now: (number, request, text 1, text 2)."""
    return (seen(tab, "#heading"), seen(tab, "#query"), seen(tab, "#left .text"), seen(tab, "#right .text"))


def download(tab, folder):
    tab.js("document.querySelector('.export').click()")
    path = until(lambda: folder.exists() and next(iter(folder.glob("*.json")), None), "the export")
    return until(lambda: path.stat().st_size and path, "its content")


def test_whole_session_in_a_real_browser(session, tmp_path):
    page, start, downloads = session
    pairs = sheet_of(page)["pairs"]
    keys = ["1", "2", "0", "1", "1", "2", "0", "2"]
    name = {"1": "left", "2": "right", "0": "tie"}
    with start() as tab:
        begin(tab, page)
        assert "Ann Lee" in seen(tab, "#rater"), "1, 2 and 0 in a name are no choices"
        for i, key in enumerate(keys[:5]):
            assert shown(tab)[0] == f"Pair {i + 1} of 8"
            tab.key(key)
        for _ in range(3):
            tab.key("ArrowLeft")
        assert "Pair 3 of 8; your choice: Tie; 5 of 8 rated" in seen(tab, "#news")
        keys[2] = "2"
        tab.key("2")  # changed
        assert "Pair 4 of 8; your choice: Text 1; 5 of 8 rated" in seen(tab, "#news")
        tab.key("ArrowRight")
        for _ in range(10):  # often: a store that is empty now and then must not pass
            tab.reload()
            ready(tab)
            assert shown(tab)[0] == "Pair 5 of 8" and not tab.errors
    with start() as tab:  # another day
        tab.open(page.as_uri())
        ready(tab)
        assert shown(tab)[0] == "Pair 5 of 8"
        tab.key("ArrowRight")
        for key in keys[5:]:
            tab.key(key)
        assert seen(tab, "#sum") == "8 of 8 rated" and not tab.errors
        export = download(tab, downloads)
    assert not any(arm in export.read_text() for arm in ARMS)
    rows, key = rating_sheet.unblind(export, rating_sheet.key_of(page)), key_of(page)["pairs"]
    winner = {"left": "first", "right": "second", "tie": "tie"}
    asked = [key[pair["pair"]] for pair in pairs]
    assert rows == [{"query_id": pair["query_id"], "first": pair["left"], "second": pair["right"],
                     "winner": winner[name[pressed]], "judge": "Ann Lee"} for pair, pressed in zip(asked, keys, strict=True)]


def test_texts_are_shown_as_they_are_and_do_nothing(session):
    page, start, _ = session
    with start() as tab:
        begin(tab, page)
        for i, pair in enumerate(sheet_of(page)["pairs"], 1):
            number, query, *texts = shown(tab)
            assert number == f"Pair {i} of 8" and query == pair["query"]
            assert texts == [re.sub(r"\n\n", "", text["text"]) for text in pair["texts"]]
            assert all(TRAP.strip() in text for text in texts)
            assert tab.js("document.querySelectorAll('#left .text p').length") == 2, "paragraphs are kept"
            assert tab.js("[...document.querySelectorAll('#query, .text')].map(e => e.lang)")[0] == pair["lang"]
            tab.key("ArrowRight")
        assert tab.js("window.hacked") is None and tab.js("document.querySelectorAll('img').length") == 0
        assert seen(tab, "#sum") == "0 of 8 rated" and not tab.errors


def test_import_goes_on_elsewhere_and_refuses_what_does_not_fit(session, tmp_path):
    page, start, downloads = session
    with start() as tab:
        tab.open(page.as_uri())
        ready(tab)
        for choices, more, said in (({}, {"sheet": "x"}, "of another sheet (x)"), ({"p77": "tie"}, {}, "unknown pair: p77"),
                                    ({"p1": "first"}, {}, "unknown choice: p1 = first"), ({}, {"rater": ""}, "no export")):
            tab.give("#import", exported(tmp_path, page, choices, **more))
            until(lambda said=said: said in seen(tab, "#problem"), said)
        tab.give("#import", page)
        until(lambda: "no export" in seen(tab, "#problem"), "the complaint")
        tab.give("#import", exported(tmp_path, page, {"p1": "left", "p2": "tie", "p4": "right"}, rater="Bo"))
        until(lambda: shown(tab)[0] == "Pair 3 of 8", "the first pair without a choice")
        assert "Bo" in seen(tab, "#rater") and seen(tab, "#problem") == ""
        tab.key("0")
        assert shown(tab)[0] == "Pair 4 of 8"
        tab.js("document.getElementById('rater').click()")  # a second rater at the same machine starts from nothing
        for letter in "Cy":
            tab.key(letter)
        tab.key("Enter")
        until(lambda: "Pair 1 of 8; no choice yet; 0 of 8 rated" in seen(tab, "#news"), "her first pair")
        for _ in range(8):
            tab.key("ArrowRight")
        assert json.loads(download(tab, downloads).read_text())["choices"] == {} and not tab.errors


def test_what_a_rater_chose_in_another_tab_is_found(session):
    page, start, _ = session
    with start() as tab:
        tab.open(page.as_uri())
        ready(tab)  # this tab has read what the browser keeps; now another one adds to it
        tab.js("""new Promise(done => {
          const change = base.transaction("kept", "readwrite");
          change.objectStore("kept").put({choices: {p1: "left", p2: "tie"}, at: 2}, "rater:Ann Lee");
          change.oncomplete = () => done();
        })""")
        for letter in "Ann Lee":
            tab.key(letter)
        tab.key("Enter")
        until(lambda: "Pair 3 of 8; no choice yet; 2 of 8 rated" in seen(tab, "#news"), "what she chose there")
        tab.reload()
        ready(tab)
        assert "2 of 8 rated" in seen(tab, "#news")


@pytest.mark.parametrize("broken", [
    "Object.defineProperty(window, 'indexedDB', {value: undefined})",
    "IDBFactory.prototype.open = () => { throw new DOMException('denied', 'SecurityError'); }",
    "IDBObjectStore.prototype.put = function () { this.transaction.abort(); }"])
def test_a_browser_that_keeps_nothing_says_so_and_exports(session, broken):
    page, start, downloads = session
    with start() as tab:
        tab.call("Page.addScriptToEvaluateOnNewDocument", source=broken)
        begin(tab, page)
        tab.key("1")
        until(lambda: "keeps nothing: export before you close" in seen(tab, "#problem"), "the warning")
        assert shown(tab)[0] == "Pair 2 of 8" and not tab.errors
        assert json.loads(download(tab, downloads).read_text())["choices"] == {"p1": "left"}


@pytest.mark.parametrize("width", [390, 1280])
def test_it_fits_the_screen_and_has_names_for_a_screen_reader(session, width):
    page, start, _ = session
    with start() as tab:
        tab.size(width)
        tab.open(page.as_uri())
        ready(tab)
        over = "document.documentElement.scrollWidth - innerWidth"
        assert tab.js(over) <= 0, "the first screen scrolls sideways"
        begin(tab, page)
        for language in ("en", "zh"):
            assert tab.js("document.documentElement.lang") == language
            assert tab.js(over) <= 0, "the page scrolls sideways"
            left, right = (tab.js(f"document.getElementById('{side}').getBoundingClientRect().x") for side in ("left", "right"))
            assert (left < right) == (width > 700), "side by side, or one below the other"
            nodes = [n for n in tab.call("Accessibility.getFullAXTree")["nodes"] if not n["ignored"]]
            named = [n["name"]["value"] for n in nodes if n["role"]["value"] in ("button", "progressbar", "article", "region")]
            assert len(named) == 12 and all(named), named
            tab.js("document.getElementById('language').click()")
        assert seen(tab, "#heading") == "Pair 1 of 8", "and back"


def test_page_speaks_the_language_of_most_queries(tmp_path):
    chinese = {arm: [row for row in rows if "雨" in row["query"]] for arm, rows in samples().items()}
    assert sheet_of(make_sheet(chinese, tmp_path / "zh.html"))["lang"] == "zh"
    assert sheet_of(make_sheet(samples(), tmp_path / "en.html"))["lang"] == "en"
