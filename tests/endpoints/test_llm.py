"""Questions to a real server that misbehaves on purpose: every answer valid, every reply kept, nothing paid for twice."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from polling import until
from pydantic import BaseModel, ConfigDict

from lwzlib.base import rows
from lwzlib.base.rows import RunError, locked, read_rows
from lwzlib.endpoints import endpoint, llm
from lwzlib.endpoints.llm import LLMError, NoAnswer, Request
from lwzlib.endpoints.replies import parse_json

KEY = "sk-s3cret-0123456789"


class Number(BaseModel):
    model_config = ConfigDict(extra="forbid")
    n: int


def says(number, **turn):
    return {"text": json.dumps({"n": number})} | turn


def questions(count):
    return [Request(f"question <{i}>", Number) for i in range(count)]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(endpoint, "_backoff", lambda _: 0.02)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def ask(llm_server, tmp_path):
    """ask(requests, script or None, **settings) -> answers. The cache is `tmp_path`/replies.jsonl."""
    def asking(requests, script=None, spent=None, **settings):
        if script is not None:
            llm_server.script(script)
        given = llm.configure(**{"base_url": llm_server.url, "model": "m", "patience_s": 20.0} | settings)
        return asyncio.run(llm.ask(requests, given, tmp_path / "replies.jsonl", spent))
    return asking


def sent(server):
    return [request["asked"] for request in server.requests]


def test_answers_stand_in_order_and_what_was_asked_is_never_sent_again(ask, llm_server, capsys):
    asked, right = [*questions(20), *questions(5)], [Number(n=i) for i in [*range(20), *range(5)]]
    script, spent = {f"<{i}>": [says(i, delay_s=0.01 * (i % 3))] for i in range(20)}, llm.Spent()
    assert ask(asked, script, spent) == right
    assert sorted(sent(llm_server)) == sorted(request.prompt for request in questions(20))
    assert (spent.requests, spent.cached, spent.tokens) == (20, 0, 200)
    assert re.fullmatch(r"asked 20/20: 20 requests, 0 replies from the cache, 200 tokens, "
                        r"\d+ s \(\d+\.\d s a reply\)\n", capsys.readouterr().out)
    spent = llm.Spent()
    assert ask(asked, {}, spent, base_url="http://127.0.0.1:9/elsewhere") == right
    assert (spent.requests, spent.cached) == (0, 20)
    assert ask([], {}) == [] and not llm_server.requests


def test_another_model_setting_message_or_sample_is_another_question(ask, llm_server):
    one = Request("q", Number)
    ask([one], {})
    for requests, settings in [
            ([one], {"model": "other"}), ([one], {"sampling": {"temperature": 0.0}}),
            ([one], {"endpoint": "completions"}), ([one._replace(sample=1)], {}),
            ([one._replace(prompt="q ")], {}), ([one._replace(prompt=(("system", "q"),))], {})]:
        llm_server.script({})
        ask(requests, **settings)
        assert len(llm_server.requests) == 1, (requests, settings)
    llm_server.script({})
    ask([one], concurrency=2, timeout_s=9.0, reasks=0, budget_tokens=5)
    assert not llm_server.requests


def test_what_is_sent(ask, llm_server):
    turns = (("system", "Be brief."), ("user", "two\ud800"))
    ask([Request(turns, Number)], {})
    ask([Request(turns, Number)], endpoint="completions", sampling={"temperature": 0.0, "stop": ["\n"]})
    chat, plain = llm_server.requests
    assert chat["path"] == "/v1/chat/completions" and chat["auth"] == f"Bearer {KEY}"
    assert chat["body"] == {"model": "m", "messages": [{"role": "system", "content": "Be brief."},
                                                       {"role": "user", "content": "two?"}]}
    assert plain["path"] == "/v1/completions"
    assert plain["body"] == {"model": "m", "prompt": "Be brief.\n\ntwo?", "temperature": 0.0, "stop": ["\n"]}


@pytest.mark.parametrize("text", [
    '{"n": 1}', ' \n{"n": 1}\n', '```json\n{"n": 1}\n```', "```\n{\n\"n\": 1}\n```\nThat is it.", 'The answer is {"n": 1}.',
    '<think>It may be {"n": 2}, or {</think>\n\n{"n": 1}', 'no tag before {"n": 2}</think>```json\n{"n": 1}```',
    'Of the set {a, b} I take {"n": 1}.', '{"n": 1} and } or {', 'First {"n": 7}, no: {"n": 1}', '[{"n": 1}]'])
def test_json_is_found(ask, text):
    assert ask([Request("q", Number)], {"q": [{"text": text}]}, reasks=0) == [Number(n=1)]


@pytest.mark.parametrize(("turn", "said"), [
    ({"text": "I would say one."}, "it has no JSON object"), ({"text": ""}, "it has no JSON object"),
    ({"text": None}, "the reply's content is null"), ({"text": '<think>first {"n": 1} then'}, "it has no JSON object"),
    ({"text": '{"n": 1'}, "it has no JSON object"), ({"text": '{"n": 1,}'}, "it has no JSON object"),
    ({"text": '{"n": "1"}'}, "n = '1': Input should be a valid integer"), ({"text": '{"n": 1.0}'}, "n = 1.0: "),
    ({"text": "{}"}, "n = {}: Field required"), ({"text": '{"n": 1, "m": 2}'}, "m = 2: Extra inputs"),
    ({"text": '{"n": ', "finish": "length"}, "it was cut at its limit of tokens"),
    ({"text": 'It may be {"n": 3}, but then', "finish": "length"}, "it was cut at its limit of tokens")])
def test_invalid_answer_is_sent_back_with_its_error(ask, llm_server, turn, said):
    spent = llm.Spent()
    assert ask([Request("q", Number)], {"q": [turn, says(5)]}, spent) == [Number(n=5)]
    first, again = llm_server.requests
    assert [m["role"] for m in again["body"]["messages"]] == ["user", "assistant", "user"]
    assert again["body"]["messages"][0] == first["body"]["messages"][0]
    assert said in again["body"]["messages"][2]["content"] and spent.requests == 2


def test_answers_that_stay_invalid_are_given_up_and_not_paid_for_again(ask, llm_server):
    wrong = {"<1>": [{"text": "no"}, {"text": "never"}], "question": [says(7)]}
    for expected in (3 + 2, 0):
        found = ask(questions(3), wrong)
        assert found[::2] == [Number(n=7)] * 2 and isinstance(found[1], NoAnswer)
        assert found[1] == "3 answers, none valid; of the last, 'never': it has no JSON object"
        assert len(llm_server.requests) == expected
    assert isinstance(ask([Request("q", Number)], {"q": [{"text": "no"}]}, reasks=0)[0], NoAnswer)
    assert len(llm_server.requests) == 1


@pytest.mark.parametrize("turn", [
    {"status": 500}, {"status": 503, "headers": {"Retry-After": "soon"}}, {"status": 429, "text": "slow down"},
    {"status": 408}, {"raw": "<html>log in</html>"}, {"raw": "{}"}, {"raw": '{"choices": []}'},
    {"raw": '{"choices": [{"message": []}]}'}, {"raw": '{"error": {"message": "upstream"}}'},
    {"delay_s": 5}])
def test_passing_trouble_is_waited_out(ask, llm_server, turn):
    found = ask(questions(2), {"<1>": [turn, turn, says(1)], "<0>": [says(0)]}, timeout_s=1.0 if "delay_s" in turn else 20.0)
    assert found == [Number(n=0), Number(n=1)] and len(llm_server.requests) == 4


def test_retry_after_is_kept(ask, llm_server):
    ask([Request("q", Number)], {"q": [{"status": 429, "headers": {"Retry-After": "1"}}, says(1)]})
    first, second = (request["at"] for request in llm_server.requests)
    assert 1 <= second - first < 5


def test_server_that_starts_late_is_waited_for(ask, monkeypatch):
    began = time.monotonic()
    with pytest.raises(LLMError, match=r"127.0.0.1:9/v1: no reply within patience_s = 0.3; last: Connection error. .*failed"):
        ask([Request("q", Number)], base_url="http://127.0.0.1:9/v1", patience_s=0.3)
    assert time.monotonic() - began < 5


def test_waits_end_with_patience(ask, llm_server):
    began = time.monotonic()
    with pytest.raises(LLMError, match=r"no reply within patience_s = 20; last: HTTP 429 .*later"):
        ask([Request("q", Number)], {"q": [{"status": 429, "text": "later", "headers": {"Retry-After": "9999"}}]})
    assert len(llm_server.requests) == 1 and time.monotonic() - began < 5
    with pytest.raises(LLMError, match=r"last: no reply within timeout_s = 0\.1$"):
        ask([Request("q", Number)], {"q": [{"delay_s": 5}]}, patience_s=0.2, timeout_s=0.1)
    with pytest.raises(LLMError, match="last: HTTP 500"):
        ask([Request("q", Number)], {"q": [{"status": 500}]}, patience_s=0.5)
    assert len(llm_server.requests) > 2


@pytest.mark.parametrize(("turn", "said"), [
    ({"status": 401, "text": "bad key {auth}"}, r"HTTP 401 .*bad key Bearer \*\*\*.*\(the key was taken from OPENAI_API_KEY\)"),
    ({"status": 404, "text": "no model m"}, "HTTP 404 .*no model m"), ({"status": 403}, "HTTP 403"),
    ({"status": 429, "text": "insufficient_quota"}, "HTTP 429 .*insufficient_quota")])
def test_lasting_trouble_stops_everything_and_keeps_what_was_answered(ask, llm_server, turn, said):
    with pytest.raises(LLMError, match=said):
        ask(questions(50), {"<3>": [turn], "question": [says(1, delay_s=0.3)]}, concurrency=4)
    before = len(llm_server.requests)
    assert before <= 8
    assert ask(questions(50), {"question": [says(1)]}) == [Number(n=1)] * 50
    assert len(llm_server.requests) == 50 - (before - 1), "what was in flight is kept"


def test_question_that_is_refused_does_not_stop_the_others(ask, llm_server):
    found = ask(questions(3), {"<1>": [{"status": 400, "text": "too long"}], "question": [says(1)]})
    assert found[::2] == [Number(n=1)] * 2 and isinstance(found[1], NoAnswer) and "too long" in found[1]
    with pytest.raises(LLMError, match=r"refused every question; the first: HTTP 400 .*no temperature"):
        ask(questions(3), {"question": [{"status": 400, "text": "no temperature"}]},
            sampling={"temperature": 0.5})


POISON = [{"status": 500, "text": "CUDA error"}, {"status": 501}, {"raw": '{"error": {"message": "engine is dead"}}'}]


@pytest.mark.parametrize("turn", POISON)
@pytest.mark.parametrize("concurrency", [1, 4])
def test_poisoned_question_is_set_aside_asked_last_and_reported(ask, llm_server, capsys, turn, concurrency):
    script = {"<0>": [turn], "question": [says(1)]}
    found = ask(questions(12), script, concurrency=concurrency, patience_s=900.0)
    assert found[1:] == [Number(n=1)] * 11 and isinstance(found[0], NoAnswer)
    assert re.match(r"HTTP (500|501|200) .*while others were answered", found[0])
    order = sent(llm_server)
    assert order.count("question <0>") == 6 and order[-3:] == ["question <0>"] * 3, "asked last"
    assert "set aside, to be asked last: HTTP" in capsys.readouterr().out
    assert ask(questions(12), script, concurrency=concurrency, patience_s=900.0)[1:] == found[1:]
    assert set(sent(llm_server)[12:]) <= {"question <0>"}, "the others are not asked again"
    assert ask(questions(12), {"question": [says(1)]}) == [Number(n=1)] * 12, "once the server is well"


def test_question_that_hangs_is_set_aside_though_patience_is_short(ask):
    found = ask(questions(6), {"<2>": [{"delay_s": 9}], "question": [says(1)]}, timeout_s=0.4, patience_s=0.7, concurrency=2)
    assert isinstance(found[2], NoAnswer) and "no reply within timeout_s" in found[2] and found.count(Number(n=1)) == 5


def test_gateway_without_its_server_is_waited_for_and_no_question_blamed(ask):
    ask(questions(4), {"question": [says(1)]})
    down = [{"status": 502}, {"status": 504}] * 4
    assert ask(questions(6), {f"<{i}>": [*down, says(1)] for i in (4, 5)} | {"question": [says(1)]}) == [Number(n=1)] * 6


def test_question_set_aside_among_refused_ones_ends_in_a_clear_error(ask):
    script = {"<0>": [{"status": 500, "delay_s": 0.2}], "question": [{"status": 400, "text": "no"}]}
    with pytest.raises(LLMError, match="refused each of the first 8 questions"):
        ask(questions(9), script, concurrency=2)


def test_refusals_after_answers_of_an_earlier_call_do_not_end_the_run(ask):
    spent = llm.Spent()
    ask(questions(2), {"question": [says(1)]}, spent)
    refused = ask([Request(f"long <{i}>", Number) for i in range(12)], {"long": [{"status": 400, "text": "too long"}]}, spent)
    assert len(refused) == 12 and all("too long" in answer for answer in refused)


def test_plan_that_never_ended_is_an_empty_text_and_kept(ask, llm_server):
    message = {"content": None, "reasoning_content": "a long plan"}
    body = json.dumps({"choices": [{"message": message, "finish_reason": "length"}], "usage": {"completion_tokens": 9}})
    for _ in range(2):
        assert ask([Request("q", llm.Written)], {"q": [{"raw": body}]}) == [llm.Written("", "length", 9)]
    assert not llm_server.requests, "not asked again"


def test_damaged_line_of_the_cache_is_asked_again_alone(ask, llm_server, tmp_path, capsys):
    ask(questions(5), {"question": [says(1)]})
    cache = tmp_path / "replies.jsonl"
    lines = cache.read_bytes().splitlines(keepends=True)
    cache.write_bytes(b"".join([lines[0], b"\0" * 40 + lines[1], *lines[2:]]))
    assert ask(questions(5), {"question": [says(1)]}) == [Number(n=1)] * 5 and len(llm_server.requests) == 1
    assert "1 rows are left out, which are damaged" in capsys.readouterr().out and len(read_rows(cache)) == 5


def test_poisoned_question_that_recovers_is_answered_at_the_end(ask):
    assert ask(questions(6), {"<2>": [*[{"status": 500}] * 4, says(1)], "question": [says(1)]}) == [Number(n=1)] * 6


def test_outage_is_waited_out_and_no_question_blamed(ask, llm_server):
    down = [{"status": 500}] * 5
    found = ask(questions(8), {f"<{i}>": [*down, says(1)] for i in range(8)}, concurrency=2)
    assert found == [Number(n=1)] * 8
    with pytest.raises(LLMError, match=r"no reply within patience_s = 0\.5; last: HTTP 500"):
        ask(questions(20), {"question": [{"status": 500}]}, concurrency=2, patience_s=0.5, model="down")
    assert len(set(sent(llm_server))) < 8, "the others are not even asked"


def test_refusals_of_the_first_questions_end_the_run_at_once(ask, llm_server):
    with pytest.raises(LLMError, match=r"refused each of the first 8 questions; the last: HTTP 400 .*no temperature"):
        ask(questions(500), {"question": [{"status": 400, "text": "no temperature"}]}, concurrency=4)
    assert len(llm_server.requests) < 16
    late = {"<0>": [says(1)], "question": [{"status": 400, "text": "too long"}]}
    assert sum(isinstance(answer, NoAnswer) for answer in ask(questions(30), late, concurrency=4)) == 29


@pytest.mark.parametrize(("message", "said"), [
    ({"content": None, "reasoning_content": "I think"}, "content is null; what came stands in reasoning_content: I think"),
    ({"content": "", "reasoning": "I think"}, 'content is ""; what came stands in reasoning: I think'),
    ({"content": None, "tool_calls": [{"id": "a"}]}, r"content is null; what came stands in tool_calls: \[\{'id'"),
    ({"content": None}, "content is null$"), ({}, "without a choice"),
    ({"content": [{"type": "image_url"}]}, r'content is \[\{"type": "image_url"')])
def test_reply_without_a_text_is_an_error_that_names_the_field(ask, llm_server, message, said):
    body = json.dumps({"choices": [{"message": message, "finish_reason": "stop"}], "usage": {"total_tokens": 9}})
    spent = llm.Spent()
    with pytest.raises(LLMError, match=said):
        ask([Request(f"q{i}", llm.Written) for i in range(2)], {"q": [{"raw": body}]}, spent, patience_s=0.3)
    assert spent.tokens == 9 * spent.requests, "what was answered counts"
    mixed = {"<1>": [{"raw": body}], "question": [{"text": "Rain."}]}
    found = ask([Request(f"text, question <{i}>", llm.Written) for i in range(3)], mixed)
    assert [answer.text for answer in found[::2]] == ["Rain."] * 2 and isinstance(found[1], NoAnswer)


def test_content_as_a_list_of_parts_is_one_text(ask):
    parts = [{"type": "text", "text": '{"n"'}, {"type": "text", "text": ": 1}"}]
    body = json.dumps({"choices": [{"message": {"content": parts}, "finish_reason": "stop"}]})
    assert ask([Request("q", Number)], {"q": [{"raw": body}]}) == [Number(n=1)]
    assert ask([Request("q", llm.Written)], {"q": [{"raw": body}]})[0].text == '{"n": 1}'


def test_null_leaves_a_field_out(ask, llm_server):
    ask([Request("q", Number)], {}, sampling={"temperature": None, "top_p": 0.5})
    assert "temperature" not in llm_server.requests[0]["body"] and llm_server.requests[0]["body"]["top_p"] == 0.5


class Judgment(BaseModel):
    score: int
    reason: str


PIECES = st.sampled_from([*"ab{}\"\\ \n<>/", "</think>", "<think>", '{"score": 9, "reason": ""}'])
REASONS = st.lists(PIECES).map("".join)


@given(st.integers(1, 10), REASONS, st.sampled_from(["", "Here: ", "<think>{a} or {\"score\": 1}</think>", "```json\n"]),
       st.sampled_from(["", " }", "\n```", " That is {all}."]))
def test_any_judgment_that_is_json_is_read(score, reason, before, after):
    judgment = Judgment(score=score, reason=reason)
    assert parse_json(before + judgment.model_dump_json() + after, Judgment) == judgment


@given(st.lists(st.sampled_from([*'{}[]":,\\n1e', "</think>", '{"score": 1, "reason": "x"}'])).map("".join))
def test_a_reply_is_read_or_refused_with_a_sentence(text):
    try:
        assert parse_json(text, Judgment)
    except ValueError as error:
        assert str(error)


def test_a_reply_of_braces_is_read_in_time_and_depth():
    with pytest.raises(ValueError, match="no JSON object"):
        parse_json('{"a":' * 3000, Judgment)


@pytest.mark.parametrize("most", [1, 4])
def test_concurrency_is_held(ask, llm_server, most):
    ask(questions(8), {"question": [says(1, delay_s=0.15)]}, concurrency=most)
    assert max(request["busy"] for request in llm_server.requests) == most


def test_requests_per_minute_are_held(ask, llm_server):
    began = time.monotonic()
    ask(questions(8), {}, requests_per_minute=1200)
    assert time.monotonic() - began >= 7 * 0.05 and len(llm_server.requests) == 8


def test_budget_of_requests_stops_and_the_next_run_goes_on(ask, llm_server):
    for expected in (7, 7):
        with pytest.raises(LLMError, match=r"the budget of 7 requests is spent \(7 used\)"):
            ask(questions(20), {}, budget_requests=7)
        assert len(llm_server.requests) == expected
    assert len(ask(questions(20), {}, budget_requests=7)) == 20
    assert len(llm_server.requests) == 6


def test_budget_of_tokens(ask, llm_server):
    with pytest.raises(LLMError, match=r"the budget of 55 tokens is spent \(60 used\)"):
        ask(questions(20), {}, budget_tokens=55, concurrency=1)
    assert len(llm_server.requests) == 6
    with pytest.raises(LLMError, match="does not say how many tokens it used"):
        ask([Request("other", Number)], {"other": [says(1, usage=None)]}, budget_tokens=55)
    assert ask([Request("other", Number)], {"other": [says(1, usage=None)]}, budget_requests=1) == [Number(n=1)]


def test_budget_is_shared_by_calls_that_share_their_totals(ask, llm_server):
    spent = llm.Spent()
    ask(questions(3), {}, spent, budget_requests=4)
    with pytest.raises(LLMError, match="budget of 4 requests"):
        ask(questions(9), {}, spent, budget_requests=4)
    assert spent.requests == 4


PROGRAM = textwrap.dedent("""
    import asyncio, sys, pathlib
    from test_llm import llm, questions
    settings = llm.configure(base_url=sys.argv[1], model="m", concurrency=4)
    asyncio.run(llm.ask(questions(40), settings, pathlib.Path(sys.argv[2])))
""")


def test_killed_process_pays_only_for_the_rest(ask, llm_server, tmp_path):
    llm_server.script({"question": [says(1, delay_s=0.05)]})
    path = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, llm_server.url, tmp_path / "replies.jsonl"],
                               env=os.environ | {"PYTHONPATH": path})
    until(lambda: len(llm_server.requests) >= 15, "15 requests", 30)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept, before = len(read_rows(tmp_path / "replies.jsonl")), len(llm_server.requests)
    assert before - 4 <= kept < 40, "all but what was in flight"
    assert ask(questions(40), {"question": [says(1)]}) == [Number(n=1)] * 40
    assert len(llm_server.requests) == 40 - kept


def test_row_that_a_kill_cut_short_is_asked_again_alone(ask, llm_server, tmp_path):
    ask(questions(5), {})
    cache = tmp_path / "replies.jsonl"
    cache.write_bytes(cache.read_bytes()[:-9])
    assert ask(questions(6), {}) == [Number(n=1)] * 6
    assert len(llm_server.requests) == 2
    assert len({json.loads(line)["key"] for line in cache.read_text().splitlines()}) == 6


def test_two_processes_do_not_share_a_cache_at_once(ask, tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "_LOCK_PATIENCE_S", 0)
    with (locked(tmp_path / ".replies.jsonl.lock"), pytest.raises(RunError, match="in use by another process")):
        ask(questions(1), {})


def test_key_is_nowhere(ask, llm_server, tmp_path, monkeypatch, capfd):
    said = []
    for script in ({"question": [{"status": 401, "text": "{auth}"}]}, {"question": [{"status": 400, "text": "{auth}"}]},
                   {"question": [{"status": 500, "text": "{auth}"}]}, {"question": [says(1)]},
                   {"other": [{"text": f"You are {KEY}"}]}):
        try:
            said.append(ask([*questions(2), Request("other", Number)] if "other" in script else questions(2), script,
                            patience_s=0.1))
        except LLMError as error:
            said.append(error)
    monkeypatch.setenv("OPENAI_API_KEY", KEY + "\n")
    with pytest.raises(LLMError, match="OPENAI_API_KEY must be printable ASCII") as broken:
        ask(questions(9), {})
    everything = [*map(repr, said), str(broken.value), *capfd.readouterr(),
                  *(path.read_text() for path in tmp_path.rglob("*") if path.is_file())]
    assert "You are ***" in "".join(everything) and "s3cret" not in "".join(everything)
    assert f"Bearer {KEY}" in {request["auth"] for request in llm_server.requests} or not llm_server.requests


def test_key_may_have_another_name_or_be_missing(ask, llm_server, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "other-key")
    ask(questions(1), {}, api_key_env="JUDGE_KEY")
    ask(questions(2), api_key_env="NOT_SET")
    assert [request["auth"] for request in llm_server.requests] == ["Bearer other-key", "Bearer none"]


@pytest.mark.parametrize(("given", "said"), [
    ({"base_url": "api.openai.com"}, "base_url = 'api.openai.com'"), ({"base_url": "ftp://x"}, "base_url"),
    ({"base_url": "http://x:port"}, "base_url"), ({"base_url": "http://user:key@x"}, "base_url"), ({"model": ""}, "model = ''"),
    ({"concurrency": 0}, "concurrency = 0: .*greater than or equal to 1"), ({"concurrency": "8"}, "valid integer"),
    ({"timeout_s": 0}, "timeout_s = 0"),
    ({"endpoint": "responses"}, "'chat' or 'completions'"), ({"modle": "x"}, "modle = 'x'")])
def test_settings_that_cannot_be_are_named(given, said):
    with pytest.raises(LLMError, match=said):
        llm.configure(**{"base_url": "http://[::1]:8000/v1", "model": "m"} | given)
