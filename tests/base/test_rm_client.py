"""Scores over HTTP: each text its own, through outages of the server, and never a number that the server did not give."""

import concurrent.futures
import json
import multiprocessing
import re
import socket
import subprocess
import sys
import time

import pytest
from fake_rm_server import Server, answer, expected, serving
from polling import until

from lwzlib.base import rm_client
from lwzlib.base.rm_client import ScoringError, ask


@pytest.fixture
def server():
    with serving() as started:
        yield started


@pytest.fixture
def in_background():
    with concurrent.futures.ThreadPoolExecutor(40) as pool:
        yield pool.submit


def texts(count, first=0):
    return [(first, i, i + 1) for i in range(count)]


def right(asked):
    return [expected(ids) for ids in asked]


def test_concurrent_clients_get_their_own_scores_in_order(server, in_background):
    jobs = [(asked, in_background(ask, server.url, "rm-a", asked, 30)) for asked in (texts(1 + 5 * i, i) for i in range(40))]
    assert all(job.result() == right(asked) for asked, job in jobs)
    assert max(len(request["input"]) for request in server.requests) == 64
    assert {(r["path"], r["model"], r["use_activation"]) for r in server.requests} == {("/pooling", "rm-a", False)}


def test_server_killed_and_restarted_while_the_client_waits(server, in_background, capsys):
    asked = texts(8)
    server.gate.clear()
    job = in_background(ask, server.url, "rm-a", asked, 30, batch_texts=4)
    until(lambda: server.requests, "the first request")
    server.stop()
    said = until(lambda: capsys.readouterr().out, "the client's line")
    with serving(port=server.server_port):
        assert job.result() == right(asked)
    wait, *go_on = (said + capsys.readouterr().out).splitlines()
    assert wait.startswith(f"{server.url}, texts 0 to 3: waiting up to 30 s: "), wait
    assert len(go_on) == 1 and re.match(rf"{server.url}, texts 0 to 3: going on after \d+\.\d s", go_on[0]), go_on


def test_another_model_behind_the_address_is_refused_at_once(server, in_background):
    with pytest.raises(ScoringError, match=r"texts 0 to 0: HTTP 404 .*`rm-z` does not exist.*lwz serve-rm.*'rm-z'"):
        ask(server.url, "rm-z", texts(1), 60)
    server.gate.clear()
    job = in_background(ask, server.url, "rm-a", texts(3), 30, batch_texts=2)
    until(lambda: len(server.requests) == 2, "the request")
    server.stop()
    with serving(model="rm-b", port=server.server_port), pytest.raises(ScoringError, match=r"HTTP 404 .*`rm-a` does not"):
        job.result()


def test_scores_that_another_model_signs_are_refused():
    with serving(script=[answer("rm-b", texts(1))]) as server, \
            pytest.raises(ScoringError, match="texts 0 to 0: scored by 'rm-b', expected 'rm-a'"):
        ask(server.url, "rm-a", texts(1), 5)


@pytest.mark.parametrize("silent", [False, True])
def test_patience_ends_about_when_it_was_said(server, silent):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # bound and not listening: refused
        url = server.url if silent else f"http://127.0.0.1:{free.getsockname()[1]}"
        server.gate.clear()
        began = time.monotonic()
        with pytest.raises(ScoringError, match=rf"{url}, texts 0 to 0: no scores after [12]\.\d s; last cause: "
                           + ("ReadTimeout" if silent else "ConnectError.*refused")):
            ask(url, "rm-a", texts(1), 1.2)
        assert 1.2 <= time.monotonic() - began < 2.9
    server.gate.set()
    assert ask(server.url, "rm-a", texts(3), 5) == right(texts(3))


def test_token_is_sent_and_never_shown(monkeypatch, capfd):
    refusal = (401, {}, b"this server asks for its LWZ_RM_TOKEN")
    with serving(script=[answer("rm-a", texts(1)), refusal]) as server:
        assert ask(server.url, "rm-a", texts(1), 5) == right(texts(1))
        assert "Authorization" not in server.requests[0]["headers"]
        monkeypatch.setenv("LWZ_RM_TOKEN", "s3cret-token")
        with pytest.raises(ScoringError, match=r"HTTP 401 .*LWZ_RM_TOKEN") as wrong:
            ask(server.url, "rm-a", texts(1), 5)
        assert server.requests[1]["headers"]["Authorization"] == "Bearer s3cret-token"
        monkeypatch.setenv("LWZ_RM_TOKEN", "s3cret-token\n")
        with pytest.raises(ScoringError, match="LWZ_RM_TOKEN must be printable") as broken:
            ask(server.url, "rm-a", texts(1), 5)
    assert "s3cret" not in f"{''.join(capfd.readouterr())}{wrong.value}{broken.value}"


def test_no_proxy_is_asked_and_no_texts_are_not_sent(server, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # a cluster's proxy must not see the texts
    assert ask(f"{server.url}/", "rm-a", texts(150), 10) == right(texts(150))
    assert ask("http://nowhere.invalid", "rm-a", [], 5) == []


def test_several_processes_ask_after_a_fork(server):
    assert ask(server.url, "rm-a", texts(5), 5) == right(texts(5))
    with multiprocessing.get_context("fork").Pool(3) as pool:
        jobs = [pool.apply_async(ask, (server.url, "rm-a", texts(9, i), 10, 2)) for i in range(6)]
        assert [job.get(20) for job in jobs] == [right(texts(9, i)) for i in range(6)]


@pytest.mark.parametrize("url", ["127.0.0.1:80", "ftp://x", "http://x:port"])
def test_url_that_cannot_be_is_refused_at_once(url):
    began = time.monotonic()
    with pytest.raises(ScoringError, match=re.escape(url)):
        ask(url, "rm-a", texts(1), 60)
    assert time.monotonic() - began < 5


def _rows(*values, first=0):
    return json.dumps({"model": "rm-a", "data": [{"index": first + i, "data": value} for i, value in enumerate(values)]})


@pytest.mark.parametrize("content", [
    _rows([float("nan")]), _rows([float("inf")]), _rows(["0.5"]), _rows([True]), _rows([None]), _rows([]), _rows([0.5, 0.5]),
    _rows(0.5), _rows(), _rows([0.5], [0.5]), _rows([0.5], first=1), '{"model": "rm-a"}',
    '{"data": [{"index": 0, "data": [1]}]}', "<html>log in</html>", ""])
def test_answer_without_one_number_per_text_is_an_error(content):
    with serving(script=[(200, {}, content.encode())]) as server, \
            pytest.raises(ScoringError, match=r"texts 0 to 0: (not finite scores|\d scores for 1 texts)"):
        ask(server.url, "rm-a", texts(1), 5)


@pytest.mark.parametrize("status", [301, 400, 404, 413, 429, 500])
def test_other_answers_are_errors_at_once(status):
    with serving(script=[(status, {"Location": "/"}, b"because")]) as server:
        with pytest.raises(ScoringError, match=f"HTTP {status} because"):
            ask(server.url, "rm-a", texts(1), 5)
        assert len(server.requests) == 1


def test_an_engine_that_died_is_waited_for_and_a_request_that_failed_is_not(monkeypatch, capsys):
    monkeypatch.setattr(rm_client, "_PAUSE_S", 0.01)
    failed = (500, {}, b"EngineCore encountered an issue")
    with serving(script=[failed, failed, (502, {}, b"")]) as server:  # its /health says 503 meanwhile
        assert ask(server.url, "rm-a", texts(1), 20) == right(texts(1))
        assert len(server.requests) == 4 and "waiting up to 20 s: HTTP 500 EngineCore" in capsys.readouterr().out
        server.script.append(failed)  # the last: its /health says 200
        with pytest.raises(ScoringError, match="HTTP 500 EngineCore"):
            ask(server.url, "rm-a", texts(1), 20)
        assert len(server.requests) == 5


def test_a_server_that_ends_is_waited_for_though_its_health_is_still_well(monkeypatch):
    monkeypatch.setattr(rm_client, "_PAUSE_S", 0.01)
    with serving(script=[(500, {}, b'{"error": {"message": "cannot schedule new futures after shutdown"}}')]) as server:
        assert ask(server.url, "rm-a", texts(1), 20) == right(texts(1)) and len(server.requests) == 2


@pytest.mark.parametrize("told", ["1", "soon", "-5", "Wed, 21 Oct 2026 07:28:00 GMT"])
def test_gateway_errors_are_tried_again_and_retry_after_is_kept(monkeypatch, told):
    monkeypatch.setattr(rm_client, "_PAUSE_S", 0.01)
    cut = (200, {"Content-Length": "99"}, b"{")  # closed in the middle
    with serving(script=[(502, {}, b""), cut, (503, {"Retry-After": told}, b""), (504, {}, b"")]) as server:
        assert ask(server.url, "rm-a", texts(1), 20) == right(texts(1))
    came = [request["at"] for request in server.requests]
    assert len(came) == 5 and (came[3] - came[2] >= 1 or told != "1")


def test_long_retry_after_does_not_outlast_patience():
    began = time.monotonic()
    with serving(script=[(503, {"Retry-After": "9999"}, b"")] * 9) as server:
        with pytest.raises(ScoringError, match=r"no scores after 0\.[5-9] s; last cause: HTTP 503"):
            ask(server.url, "rm-a", texts(1), 0.5)
        assert len(server.requests) == 2 and time.monotonic() - began < 2


def test_a_killed_client_costs_nobody_else_anything(server):
    server.gate.clear()
    code = "import sys; from lwzlib.base.rm_client import ask; ask(sys.argv[1], 'rm-a', [(1, 2)], 30)"
    victim = subprocess.Popen([sys.executable, "-c", code, server.url])
    until(lambda: server.requests, "the victim's request")
    victim.kill()
    victim.wait()
    server.gate.set()
    assert ask(server.url, "rm-a", texts(20), 30) == right(texts(20))


def test_a_fake_server_stands_again_on_its_port():
    first = Server()
    first.stop()
    with serving(port=first.server_port) as second:
        assert ask(second.url, "rm-a", texts(1), 5) == right(texts(1))
