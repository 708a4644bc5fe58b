"""Curation: lengths that a query states, the rules for ranges, and the whole way against a real server, kills included."""

import asyncio
import doctest
import hashlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from polling import until

from lwzlib.base.rows import DataError
from lwzlib.data import curate as curation
from lwzlib.data import word_ranges
from lwzlib.data.curate import FILTER, RANGE
from lwzlib.data.word_ranges import agreement, enforce, stated
from lwzlib.endpoints import llm
from lwzlib.method.queries import Query, load_queries

KEY = "sk-s3cret-0123456789"


def test_examples_in_the_docstrings():
    assert doctest.testmod(word_ranges).failed == 0


@pytest.mark.parametrize(("query", "expected"), [
    ("An essay of about 800 words on rain", (700, 900)), ("An 800-word essay", (700, 900)), ("in 2k words", (1800, 2200)),
    ("Write 1,500 words.", (1400, 1600)), ("At least 1,500 words on rain", (1500, 1600)), ("1500 words or more", (1500, 1600)),
    ("a report, minimum of 2000 words", (2000, 2200)), ("more than 4000 words", (4000, 4400)),
    ("no more than 300 words", (270, 300)), ("NO MORE THAN 3,000 WORDS", (2700, 3000)),
    ("it must not exceed 1000 words", (900, 1000)), ("800 words max", (700, 800)), ("up to about 2000 words", (1800, 2000)),
    ("2000 words (maximum)", (1800, 2000)), ("no less than 5000 words", (5000, 5500)), ("don’t exceed 600 words", (500, 600)),
    ("word limit: 800", (700, 800)), ("Word count: 1000", (900, 1100)), ("between 1,500 and 2,000 words", (1500, 2000)),
    ("1000-1500 words", (1000, 1500)), ("800 to 1,000 words", (800, 1000)), ("about 500 words", (400, 600)),
    ("about 60 words", (54, 66)), ("about 13,000 words", (11700, 14300)), ("at least 1450 words", (1450, 1595)),
    ("写一篇800字作文", (700, 900)), ("不少于1500字", (1500, 1600)), ("不超过２０００字的通知", (1800, 2000)),
    ("800字左右", (700, 900)), ("1000字以上", (1000, 1100)), ("控制在2000字以内", (1800, 2000)),
    ("约3000个汉字", (2700, 3300)), ("800-1000字", (800, 1000)), ("3000到4000字", (3000, 4000)),
    ("写一万字的小说", (9000, 11000)), ("一千五百字的随笔", (1400, 1600)), ("两千字", (1800, 2200)),
    ("1.2万字", (10800, 13200)), ("不得少于3千字", (3000, 3300)), ("字数：2000", (1800, 2200)),
    ("字数不少于三千", (3000, 3300)), ("字数在800到1000之间", (800, 1000)), ("最多600字", (500, 600)),
    ("至少6000字", (6000, 6600)), ("An essay on the year 1984", None), ("a title of at most 8 words", None),
    ("三字经和四字成语的故事", None), ("千字文讲解", None), ("ten chapters, each about 500 words", None),
    ("每章2000字，共十章", None), ("3000字节的文件", None), ("200字符", None),
    ("a 300-word abstract and a 5,000-word paper", None), ("Shorten my 5000-word thesis", None), ("我的800字作文怎么改", None),
    ("a few words", None), ("", None), ("1" * 400 + " words", None), ("9" + ",999" * 400 + " words", None)])
def test_length_that_a_query_states(query, expected):
    assert stated(query) == expected


@pytest.mark.parametrize("query", [
    # of several pieces
    "Write several 200-word reviews", "Write three short 500-word stories", "Write 200-word product descriptions for my shop",
    "a few 150-word poems", "write three 500 words essays", "Write 5 poems of about 100 words", "Write essays of 500 words",
    "5 x 200 words", "写几篇200字的书评", "三篇300字的作文", "多篇不少于200字的短文", "几个200字的故事", "800字作文两篇",
    # a difference
    "increase it by 300-500 words", "add 200 words", "shorten by 100 words", "cut out about 100 words", "an extra 200 words",
    "Write another 300 words", "make it 200 words longer", "Expand it from 300 to 500 words", "字数增加300", "增加300字",
    "增加了大约300-500字", "再写200字", "减少100字", "删掉200字", "压缩200字", "少写100字", "比原文多200字",
    # of a section
    "an essay with a 200-word abstract", "a 300-word introduction", "the conclusion should be about 150 words",
    "Abstract: 200 words", "Introduction (300 words)", "Write a report including a 200-word summary",
    "a report with an introduction of 300 words", "200 words for the introduction", "I want the conclusion to be 150 words",
    "Limit the introduction to 200 words", "The first paragraph should be 100 words",
    "Write an essay. Start with a 200-word introduction.", "引言300字", "摘要200字左右", "引言（300字）",
    "写一篇带200字摘要的论文", "写一篇论文，结论部分控制在300字以内"])
def test_length_of_something_else_is_not_that_of_the_whole(query):
    assert stated(query) is None


@pytest.mark.parametrize("query", [
    "limited to {} words", "limit it to {} words", "limit your answer to {} words", "keep it to {} words",
    "keep the whole essay to {} words", "capped at {} words", "restricted to {} words", "a cap of {} words", "max. {} words",
    "the word limit is {} words", "a maximum length of {} words", "never exceed {} words", "do not go over {} words",
    "without exceeding {} words", "{} words at the most", "限制在{}字", "控制在{}字", "限{}字", "字数限制在{}字",
    "控制字数在{}字", "{}字封顶", "{}字内", "别超过{}字", "以{}字为限", "最多写{}字"])
def test_limit_is_kept_however_it_is_said(query):
    assert stated(query.format(1000)) == (900, 1000)


@pytest.mark.parametrize(("query", "expected"), [
    ("300词", (270, 330)), ("300个单词", (270, 330)), ("300个词", (270, 330)), ("300英文单词", (270, 330)),
    ("300词到500词", (300, 500)), ("词数：100", (90, 110)), ("词数不少于100", (100, 110)), ("不小于850字", (850, 935)),
    ("Describe each planet. Write 500 words.", (400, 600)), ("Describe each planet!\nWrite 1.5k words", (1400, 1600)),
    ("Describe every planet\n500 words", (400, 600)), ("Write 500 words; each part has a title", (400, 600)),
    ("The text is 500 words long in total. Each part has a title.", (400, 600)), ("介绍每个行星。写800字。", (700, 900)),
    ("写800字！每段有小标题。", (700, 900)), ("do not cover 800 words", (700, 900))])
def test_word_of_chinese_and_end_of_a_sentence(query, expected):
    assert stated(query) == expected


@pytest.mark.parametrize(("query", "expected"), [
    *((query, (400, 600)) for query in (
        "a 500-word review", "a 500-word analysis of two poems", "a 500-word essay on three cats", "Shorten it to 500 words",
        "compare two poets in 500 words", "some 500 words on cats", "Write 500 words for students.", "500 words more or less",
        "Write another 500-word essay", "Write 500 words and add a title", "keep it close to 500 words", "Word count:\n500",
        "keep it to about 500 words", "a captivating story of 500 words", "Write a 500-word introduction to jazz",
        "Draft me a short abstract of 500 words", "A 500-word summary of Hamlet", "The summary should be 500 words",
        "an essay with introduction, body and conclusion of 500 words", "500字的三国人物评论", "分三段写500字",
        "压缩到500字", "再写一篇500字的作文", "控制在500字左右", "参加比赛的500字作文", "中学生500词作文",
        "写一段500字的摘要", "为论文写摘要500字", "in a 500-word paragraph", "写一篇有摘要的论文，500字",
        "写一篇包括摘要、引言、结论共500字的论文")),
    ("Write at most:\n500 words", (400, 500)), ("控制在850字以上", (850, 935)), ("至少写850字", (850, 935)),
    ("3000词汇量", None), ("500个词语", None), ("学会500个单词", None), ("Write 1.5k words for each", None),
    ("ten parts, each approx. 500 words", None)])
def test_length_that_looks_like_another(query, expected):
    assert stated(query) == expected


@pytest.mark.parametrize("text", ["\n", "300字", "limit it to the ", "add in in ", "introduction of of "])
def test_time_to_read_a_length_is_in_proportion_to_the_text(text):
    begun = time.process_time()
    stated("5" + text * (100_000 // len(text)))
    assert time.process_time() - begun < 20


def test_stated_lengths_agree_with_the_ranges_set_by_hand():
    pairs = [(stated(q.query), q) for name in ("kit:train", "kit:heldout") for q in load_queries(name)]
    differ = [(found, q.id, q.word_range, q.query) for found, q in pairs if found and enforce(1, 1, q.query) != q.word_range]
    found = sum(range is not None for range, _ in pairs)
    print(f"{found} of {len(pairs)} queries state a length; {len(differ)} differ from the range set by hand")
    assert found > 100 and len(differ) <= 0.02 * found, differ


@pytest.mark.parametrize(("lower", "upper", "query", "expected"), [
    (400, 800, "", (400, 800)), (420, 780, "", (400, 800)), (800, 400, "", (400, 800)), (0, 200, "", (100, 200)),
    (0, 30, "", (100, 100)), (1000, 9000, "", (3500, 6500)), (11000, 20000, "", (11000, 12000)),
    (12000, 12000, "", (12000, 12000)),
    (-50, 300, "", (100, 300)), (0, 0, "", "cannot be fulfilled"), (-5, -1, "", "cannot be fulfilled"),
    (13000, 15000, "", "out of limits"), (100, 200, "About 2,000 words, please.", (1800, 2200)),
    (0, 0, "Summarise the attached file in 800 words", "cannot be fulfilled"), (100, 200, "a 13,000-word saga", (11700, 12000)),
    (100, 200, "写两万字", "out of limits"), (100, 200, "写一篇2万字的小说", "out of limits"),
    (0, 0, "a 20,000-word novel", "out of limits"), (100, 200, "from 2000 to 9000 words", (4000, 7000))])
def test_range_is_held_to_the_rules(lower, upper, query, expected):
    assert enforce(lower, upper, query) == expected


@given(st.integers(-10**6, 10**6), st.integers(-10**6, 10**6))
@example(100, 3300)
@example(8901, 12001)
def test_every_prediction_becomes_a_legal_range_or_a_reason(lower, upper):
    found = enforce(lower, upper)
    if isinstance(found, str):
        assert max(lower, upper) <= 0 or min(lower, upper) > 12_000
        return
    assert found[0] % 100 == found[1] % 100 == 0
    assert 100 <= found[0] <= found[1] <= 12_000 and found[1] - found[0] <= 3_000
    assert enforce(*found) == found
    Query(id="a", query="q", word_range=found)


@given(st.integers(50, 20_000), st.sampled_from([
    ("about {} words", 0.9, 1.1), ("{} words", 0.9, 1.1), ("at most {} words", 0.9, 1), ("at least {} words", 1, 1.1),
    ("{}字左右", 0.9, 1.1), ("不超过{}字", 0.9, 1), ("不少于{}字", 1, 1.1)]))
def test_every_stated_length_is_within_ten_percent_to_the_nearest_hundred(n, wording):
    text, least, most = wording
    found = enforce(300, 400, text.format(f"{n:,}" if "words" in text else n))
    if isinstance(found, str):
        assert found == "out of limits" and least * n > 11_900
        return
    assert 0 < found[0] <= found[1] <= 12_000
    assert abs(found[0] - min(least * n, 12_000)) <= 51 and abs(found[1] - min(most * n, 12_000)) <= 51
    assert (least < 1 or found[0] >= n) and (most > 1 or found[1] <= n)


@given(st.text(), st.integers(0, 99_999), st.sampled_from(["words", "字", "-word", "k words", "万字", ""]), st.text())
def test_any_query_has_a_stated_length_or_none(before, n, unit, after):
    found = stated(f"{before}{n}{unit}{after}")
    assert found is None or 0 < found[0] <= found[1]


def test_prompts_state_the_rules_in_both_languages():
    for prompts in (FILTER, RANGE):
        assert set(prompts) == {"en", "zh"} and all(text.count("{query}") == 1 for text in prompts.values())
    for text in RANGE.values():
        for fact in ("400", "800", "100", "12000", "3000", "[0, 0]", '{"range": ['):
            assert fact in text, fact


@pytest.mark.parametrize(("prompts", "language", "digest"), [
    (FILTER, "en", "074bffa326baafb6"), (FILTER, "zh", "588d02827863a134"),
    (RANGE, "en", "332e60415815ec7e"), (RANGE, "zh", "eaa13415f3141ba0")])
def test_prompts_are_the_ones_that_replies_were_paid_for(prompts, language, digest):
    assert hashlib.sha256(prompts[language].encode()).hexdigest()[:16] == digest, "a changed prompt asks everything anew"


def test_agreement_by_hand():
    by_hand = {"a": (100, 199), "b": (1000, 1999), "c": (3000, 4000), "d": (5, 5)}
    predicted = {"a": (150, 249), "b": (1000, 1999), "c": (100, 200), "x": (1, 2)}
    found = agreement(predicted, by_hand)
    assert (found["queries"], found["not_predicted"]) == (3, 1)
    assert found["overlap"] == pytest.approx((50 / 150 + 1 + 0) / 3)
    assert found["middle_inside"] == pytest.approx(1 / 3)  # 199.5 is above 199
    assert found["kendall_tau"] == pytest.approx(-1 / 3)  # order 199.5, 1499.5, 150 against 149.5, 1499.5, 3500
    assert agreement(by_hand, by_hand) == {"queries": 4, "not_predicted": 0, "overlap": 1, "middle_inside": 1, "kendall_tau": 1}
    with pytest.raises(ValueError, match="no query has both"):
        agreement({}, by_hand)


ROWS = [
    {"id": "story", "query": "Write a long story about a lighthouse.", "word_range": [2000, 3000], "domain": "D4"},
    {"query": "写一篇关于雨的散文，2000字左右。"},
    {"id": "joke", "query": "Tell me a joke."},
    {"id": "file", "query": "Review the attached report at length."},
    {"id": "mute", "query": "Write an essay on silence."},
    {"id": "again", "query": "Write a long  STORY about a lighthouse."},
    {"id": "story", "query": "Another story."},
    {"id": "empty", "query": ""}, ["not", "a", "row"], {"id": "five", "query": 5}, {"conversation": [{}]},
    {"conversation": [{"role": "user", "content": "Compose an ode to bread."}, {"role": "assistant", "content": "No."}],
     "language": "English"}]
SCRIPT = {
    "joke": [{"text": '{"keep": false, "reason": "short"}'}], "silence": [{"text": "..."}],
    '{"keep"': [{"text": '<think>Long.</think>```json\n{"keep": true, "reason": "long"}\n```'}],
    "attached": [{"text": '{"range": [0, 0]}'}], "ode to": [{"text": '{"range": "long"}'}, {"text": '{"range": [380, 5000]}'}],
    '{"range"': [{"text": '{"range": [1500, 2500]}'}]}


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "raw.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


def curate(server, source, out):
    settings = llm.configure(base_url=server.url, model="m", api_key_env="LWZ_NO_KEY", patience_s=5.0)
    return asyncio.run(curation.curate(settings, source, out))


def test_queries_are_kept_with_their_range_and_the_others_with_their_reason(llm_server, source, tmp_path, capsys):
    llm_server.script(SCRIPT)
    out = tmp_path / "made" / "queries.jsonl"
    kept, rejects = curate(llm_server, source, out)
    assert load_queries(str(out)) == kept
    assert [(q.query[:5], q.word_range, q.language, q.domain) for q in kept] == [
        ("Write", (1500, 2500), "en", "D4"),
        ("写一篇关于", (1800, 2200), "zh", "unknown"), ("Compo", (1100, 4100), "en", "unknown")]
    assert kept[0].id == "story" and len({q.id for q in kept}) == 3
    assert [json.loads(line) for line in out.with_suffix(".rejects.jsonl").read_text().splitlines()] == rejects
    assert sorted((row["reason"], row["id"].rpartition("/")[2]) for row in rejects) == sorted([
        ("needs no long writing", "joke"), ("cannot be fulfilled", "file"), ("no valid answer", "mute"), ("repeated", "again"),
        ("repeated", "story"), *(("not a query", f"raw.jsonl, line {n}") for n in (8, 9, 10, 11))])
    said = capsys.readouterr().out
    assert "filter 6/6: 8 requests" in said and "range 4/4: 13 requests" in said
    zh = [r["asked"] for r in llm_server.requests if "关于雨" in r["asked"]]
    assert [text.partition("\n")[0] for text in zh] == [FILTER["zh"].partition("\n")[0], RANGE["zh"].partition("\n")[0]]

    before = out.read_bytes(), out.with_suffix(".rejects.jsonl").read_bytes()
    llm_server.script({})
    assert curate(llm_server, source, out) == (kept, rejects) and not llm_server.requests
    assert before == (out.read_bytes(), out.with_suffix(".rejects.jsonl").read_bytes())


def test_file_of_another_making_is_not_overwritten(llm_server, source, tmp_path):
    before = (tmp_path / "raw.jsonl").read_bytes()
    with pytest.raises(DataError, match="was not made by curate"):
        curate(llm_server, source, tmp_path / "raw.jsonl")
    assert (tmp_path / "raw.jsonl").read_bytes() == before


def lwz(server, source, out, *options):
    words = [sys.executable, "-m", "lwzlib.cli.main", "curate", source, out, "--base-url", server.url, "--model", "m", *options]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {
        "OPENAI_API_KEY": KEY, "PYTHONPATH": os.pathsep.join(sys.path), "COLUMNS": "100", "NO_PROXY": "127.0.0.1"})


def test_command_stops_at_its_budget_or_a_kill_and_goes_on(llm_server, tmp_path):
    queries, out = load_queries("kit:heldout"), tmp_path / "made.jsonl"
    script = {'{"keep"': [{"text": '{"keep": true}', "delay_s": 0.02}],
              '{"range"': [{"text": '{"range": [1000, 3000]}', "delay_s": 0.02}]}
    llm_server.script(script)
    first = lwz(llm_server, "kit:heldout", out, "--budget-requests", "20")
    said = first.communicate()[0]
    assert first.returncode == 1 and "lwz: the budget of 20 requests is spent" in said and "Traceback" not in said
    assert len(llm_server.requests) == 20 and not out.exists()

    second = lwz(llm_server, "kit:heldout", out, "-s", "concurrency=4")
    until(lambda: len(llm_server.requests) >= len(queries) + 30, "the ranges", 30)
    second.send_signal(signal.SIGKILL)
    said += second.communicate()[0]
    assert not out.exists()
    third = lwz(llm_server, "kit:heldout", out)
    said += third.communicate()[0]
    assert third.returncode == 0, said
    assert len(queries) * 2 <= len(llm_server.requests) <= len(queries) * 2 + 4, "twice at most what was in flight"
    assert [q.id for q in load_queries(str(out))] == [q.id for q in queries]
    assert f"{len(queries)} kept, 0 rejected" in said and f"queries {len(queries)}, not_predicted 0, overlap 0." in said
    assert {request["auth"] for request in llm_server.requests} == {f"Bearer {KEY}"}
    files = [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    assert KEY not in "".join([said, *files])


def test_command_says_what_is_wrong(llm_server, tmp_path):
    for options, wrong in ((["-s", "concurency=4"], "settings: concurency = 4"),
                           (["--budget-tokens", "-1"], "budget_tokens = -1")):
        process = lwz(llm_server, "kit:heldout", tmp_path / "made.jsonl", *options)
        said = process.communicate()[0]
        assert process.returncode == 1 and wrong in said and "Traceback" not in said


RULES = word_ranges._RULES
LIMITS = {"most": (700, 800), "least": (800, 900), "about": (700, 900)}


@pytest.mark.parametrize(("limit", "request_text"), [
    (rule["limit"], text) for rule in RULES["limits"] for text in rule["examples"]])
def test_each_example_of_a_limit_is_what_its_rule_says(limit, request_text):
    assert stated(request_text) == LIMITS[limit]


@pytest.mark.parametrize("request_text", [
    text for rule in [*RULES["not_its_own"], RULES["of_a_section"]] for text in rule["examples"]])
def test_each_example_of_another_length_states_none(request_text):
    assert stated(request_text) is None


@pytest.mark.parametrize("request_text", RULES["asked_for"]["examples"])
def test_each_example_of_a_section_that_is_asked_for_states_its_length(request_text):
    assert stated(request_text) == (270, 330)
