"""Scores over HTTP, from a real server in a process of its own: right under load, kills, restarts and bad input."""

import concurrent.futures
import contextlib
import http.server
import itertools
import json
import logging
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
from fake_rm_server import expected
from polling import until

from lwzlib.endpoints import rm_server
from lwzlib.method import writing_rm
from lwzlib.method.writing_rm import ScoringError, remote_scores

FAKE = Path(__file__).parents[1] / "fake_rm_server.py"


class Server:
    """A fake server in `folder`; it may be killed and started again on its port."""

    def __init__(self, folder, **settings):
        self.folder, self.settings, self.port = folder, settings, 0
        self.gate, self.log = folder / "gate", folder / "log.txt"
        self.start()

    def start(self, **changes):
        with self.log.open("w") as log:
            settings = json.dumps(self.settings | changes | {"port": self.port})
            self.process = subprocess.Popen([sys.executable, FAKE, self.folder, settings], stderr=log)
        line = until(lambda: re.search(r"running on http://127.0.0.1:(\d+)", self.log.read_text()), "the server")
        self.port = int(line[1])
        self.url = f"http://127.0.0.1:{self.port}"
        assert self.health()["status"] == "ok"

    def health(self):
        return httpx.get(f"{self.url}/health", trust_env=False).json()

    def queued(self, count):
        until(lambda: self.health()["queued_texts"] == count, f"a queue of {count}")

    def post(self, content, **headers):
        content = content if isinstance(content, (str, bytes)) else json.dumps(content)
        return httpx.post(f"{self.url}/score", content=content, headers=headers, trust_env=False, timeout=30)

    def batches(self):
        path = self.folder / "batches.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def end(self, number=signal.SIGKILL):
        self.process.send_signal(number)
        return self.process.wait(15)


@contextlib.contextmanager
def running(folder, **settings):
    server = Server(folder, **settings)
    try:
        yield server
    finally:
        server.gate.unlink(missing_ok=True)
        server.end()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with running(tmp_path_factory.mktemp("rm"), delay_s=0.03, max_body_bytes=1 << 20) as started:
        yield started


@pytest.fixture
def in_background():
    with concurrent.futures.ThreadPoolExecutor(200) as pool:
        yield pool.submit


@pytest.fixture
def gate(server, in_background):
    """The worker is held until `gate.unlink()`."""
    server.gate.touch()
    held = in_background(remote_scores, server.url, [("p", "gate")], 30)
    until(lambda: server.batches() and server.batches()[-1] == ["gate"], "the held batch")
    yield server.gate
    server.gate.unlink(missing_ok=True)
    assert held.result() == [expected(("p", "gate"))]


def texts(count, name="text"):
    return [(f"prompt {i}", f"{name} {i}") for i in range(count)]


def right(asked):
    return [expected(text) for text in asked]


def body(*answers):
    return {"texts": [{"prompt": "p", "answer": answer} for answer in answers]}


def test_200_concurrent_requests_get_their_own_scores_once(server, in_background, capsys):
    before = len(server.batches())
    asked = [texts(1 + i % 4, f"request {i}, text") for i in range(199)] + [texts(50, "long request, text")]
    jobs = [in_background(remote_scores, server.url, some, 30) for some in asked]
    assert [job.result() for job in jobs] == [right(some) for some in asked]
    batches = server.batches()[before:]
    assert sorted(itertools.chain(*batches)) == sorted(answer for some in asked for _, answer in some), "each once"
    assert max(map(len, batches)) == 16 and min(map(len, batches)) > 0
    assert any(len({answer.split(",")[0] for answer in batch}) > 1 for batch in batches), "batches cross requests"
    assert "HTTP 503" in capsys.readouterr().out, "the queue was never full; the test must be made harder"


def test_full_queue_is_refused_at_once_and_health_says_how_full(server, gate, in_background):
    first = in_background(remote_scores, server.url, texts(60), 30)
    server.queued(60)
    refused = server.post(body(*"abcde"))
    assert (refused.status_code, refused.headers["Retry-After"]) == (503, "1") and "60 of 64" in refused.json()["error"]
    second = in_background(server.post, body(*"abcd"))
    server.queued(64)
    assert server.health() == {"status": "ok", "model": "rm-a", "max_tokens": 20_000, "queued_texts": 64}
    gate.unlink()
    assert first.result() == right(texts(60))
    assert second.result().json() == {"scores": right([("p", answer) for answer in "abcd"]), "model": "rm-a"}


def test_killed_client_costs_nobody_else_anything(server, gate, in_background):
    code = ("import sys; from lwzlib.method.writing_rm import remote_scores\n"
            "remote_scores(sys.argv[1], [('p', f'victim {i}') for i in range(40)], 30)")
    victim = subprocess.Popen([sys.executable, "-c", code, server.url])
    server.queued(40)
    other = in_background(remote_scores, server.url, texts(20), 30)
    server.queued(60)
    with socket.create_connection(("127.0.0.1", server.port)) as half:  # gone in the middle of its body
        half.sendall(b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{")
    victim.kill()
    victim.wait()
    gate.unlink()
    assert other.result() == right(texts(20))
    assert not any("victim" in answer for batch in server.batches() for answer in batch), "dead texts were scored"
    assert "Traceback" not in server.log.read_text() and "never retrieved" not in server.log.read_text()


def test_server_killed_and_restarted_while_the_client_waits(tmp_path, in_background, capsys):
    with running(tmp_path, delay_s=0.01) as server:
        server.gate.touch()
        asked = [*texts(8), ("p", "gate"), *texts(8, "later")]
        job = in_background(remote_scores, server.url, asked, 30, batch_texts=4)
        until(lambda: len(server.batches()) == 3, "the third request")
        server.end()
        said = until(lambda: capsys.readouterr().out, "the client's line")
        server.gate.unlink()
        server.start()
        assert job.result() == right(asked)
    wait, *go_on = (said + capsys.readouterr().out).splitlines()
    assert wait.startswith(f"{server.url}, texts 8 to 11: waiting up to 30 s: "), wait
    assert len(go_on) == 1 and re.match(rf"{server.url}, texts 8 to 11: going on after \d+\.\d s", go_on[0]), go_on


def test_identity_that_changes_is_an_error(tmp_path, in_background):
    with running(tmp_path) as server:
        with pytest.raises(ScoringError, match="scored by 'rm-a', expected 'rm-z'"):
            remote_scores(server.url, texts(1), 5, identity="rm-z")
        assert remote_scores(server.url, texts(1), 5, identity="rm-a") == right(texts(1))
        server.gate.touch()
        job = in_background(remote_scores, server.url, [("p", "one"), ("p", "gate")], 30, batch_texts=1)
        until(lambda: server.batches()[-1] == ["gate"], "the second request")
        server.end()
        server.gate.unlink()
        server.start(identity="rm-b")
        with pytest.raises(ScoringError, match="texts 1 to 1: scored by 'rm-b', expected 'rm-a'"):
            job.result()


def test_sigterm_finishes_what_it_can_and_sends_the_rest_away(tmp_path, in_background, capsys):
    with running(tmp_path, grace_s=0.5) as server:
        server.gate.touch()
        asked = [("p", "gate"), *texts(30)]
        job = in_background(remote_scores, server.url, asked, 30)
        until(server.batches, "the held batch")
        server.process.send_signal(signal.SIGTERM)
        said = until(lambda: capsys.readouterr().out, "the client's line")
        assert "HTTP 503" in said and "shutting down" in said
        server.gate.unlink()
        assert server.process.wait(15) == -signal.SIGTERM
        assert "Traceback" not in server.log.read_text()
        server.start(grace_s=5)
        assert job.result() == right(asked)
        server.gate.touch()
        job = in_background(remote_scores, server.url, asked, 5)
        until(lambda: server.batches()[-1][0] == "gate", "the held batch")
        server.process.send_signal(signal.SIGINT)
        until(lambda: "Shutting down" in server.log.read_text(), "the signal")
        server.gate.unlink()
        assert job.result() == right(asked), "a request within the grace time is answered"
        assert server.process.wait(15) == 0
        assert "waiting" not in capsys.readouterr().out


@pytest.mark.parametrize("stopped", [False, True])
def test_patience_ends_about_when_it_was_said(server, stopped):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # bound and not listening: refused
        url = server.url if stopped else f"http://127.0.0.1:{free.getsockname()[1]}"
        began = time.monotonic()
        if stopped:
            server.process.send_signal(signal.SIGSTOP)
        try:
            with pytest.raises(ScoringError, match=rf"{url}, texts 0 to 0: no scores after [12]\.\d s; last cause: "
                               + ("ReadTimeout" if stopped else "ConnectError.*refused")):
                remote_scores(url, texts(1), 1.2)
        finally:
            server.process.send_signal(signal.SIGCONT)
        assert 1.2 <= time.monotonic() - began < 2.4
    assert remote_scores(server.url, texts(3), 5) == right(texts(3))


def test_too_long_text_is_named_with_its_tokens_and_the_limit(server):
    longest = "word " * 19_999
    assert remote_scores(server.url, [("p", longest)], 5) == right([("p", longest)])
    refused = server.post(body("fits", longest + "word"))
    assert (refused.status_code, refused.json()["error"]) == (413, "texts.1 has 20001 tokens; the limit is 20000")
    with pytest.raises(ScoringError, match=r"texts 2 to 3: HTTP 413 .*texts\.1 has 20001 tokens"):
        remote_scores(server.url, [*texts(3), ("p", longest + "word")], 5, batch_texts=2)
    assert remote_scores(server.url, texts(3), 5) == right(texts(3))


def test_long_text_fails_only_its_request_in_a_shared_batch(server, gate, in_background):
    good = in_background(remote_scores, server.url, texts(3), 30)
    server.queued(3)
    bad = in_background(server.post, body("fits", "word " * 20_000))
    server.queued(5)
    gate.unlink()
    assert (good.result(), bad.result().status_code) == (right(texts(3)), 413)


@pytest.mark.parametrize("declared", [True, False])
def test_too_large_body_is_refused(server, declared):
    content = json.dumps(body("x" * (3 << 20))).encode()
    refused = httpx.post(f"{server.url}/score", content=content if declared else iter([content[:99], content[99:]]),
                         trust_env=False)
    assert refused.status_code == 413 and "more than 1048576 bytes" in refused.json()["error"]


@pytest.mark.parametrize(("content", "said"), [
    ("", "body = b'': Invalid JSON"), ("{", "body = b'{': Invalid JSON"), (b"\x00\xff\x80" * 99, r"body = b'\x00\xff"),
    (b'{"texts": [{"prompt": "\xff", "answer": ""}]}', "Invalid JSON"), ("[" * 50_000, "recursion limit"),
    ('{"texts": [{"prompt": "\\ud800", "answer": ""}]}', "hex escape"), ("null", "body = b'null'"), ("[]", "body = b'[]'"),
    ("{}", "texts = {}: Field required"), ({"texts": []}, "texts = []: List should have at least 1 item"),
    ({"texts": {}}, "texts = {}: Input should be a valid array"), ({"texts": None}, "texts = None"),
    ({"texts": [{"prompt": "p"}]}, "texts.0.answer = {'prompt': 'p'}: Field required"),
    ({"texts": [{"prompt": 5, "answer": "a"}]}, "texts.0.prompt = 5: Input should be a valid string"),
    ({"texts": [{"prompt": "p", "answer": ["a"]}]}, "texts.0.answer = ['a']: Input should be a valid string"),
    ({"texts": ["p"]}, "texts.0 = 'p': Input should be an object"), ({"texts": [["p", "a"]]}, "texts.0 = ['p', 'a']"),
    (body("a") | {"model": "other"}, "model = 'other': Extra inputs"),
    ({"texts": [{"prompt": "p", "answer": "a", "scoer": 1}]}, "texts.0.scoer = 1: Extra inputs"),
    (body(*"x" * 65), "65 entries; at most 64"), ({"texts": [5] * 60}, "texts.2 = 5")])
def test_malformed_body_is_refused_by_field_and_value(server, content, said):
    refused = server.post(content)
    assert refused.status_code == 400 and said in refused.json()["error"], refused.text
    assert len(refused.text) < 700
    assert server.post(body("a")).json()["scores"] == right([("p", "a")])


@pytest.mark.parametrize(("answer", "said"), [
    ("raise", "RuntimeError: boom"), ("stop", "StopIteration"), ("nan", "scores [0."), ("inf", "inf]"),
    ("too few", "2 texts, scores [0."), ("uncountable", "cannot count")])
def test_scorer_that_fails_fails_its_own_request_only(server, gate, in_background, answer, said):
    good = [in_background(remote_scores, server.url, texts(2, "first"), 30)]
    server.queued(2)
    bad = in_background(server.post, body("fits", answer))
    server.queued(4)
    good.append(in_background(remote_scores, server.url, texts(2, "second"), 30))
    server.queued(6)
    gate.unlink()
    assert [job.result() for job in good] == [right(texts(2, "first")), right(texts(2, "second"))]
    assert bad.result().status_code == 500 and said in bad.result().json()["error"], bad.result().text
    if answer != "uncountable":
        assert any({"first 0", answer, "second 0"} <= set(batch) for batch in server.batches()), "not one batch"
    with pytest.raises(ScoringError, match=r"HTTP 500 .*the scorer failed"):
        remote_scores(server.url, [("p", answer)], 5)


def test_token_is_asked_for_and_never_shown(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("LWZ_RM_TOKEN", "s3cret-token")
    with running(tmp_path) as server:
        assert remote_scores(server.url, texts(3), 5) == right(texts(3))
        for header in ({}, {"Authorization": "Bearer s3cret"}, {"Authorization": "s3cret-token"},
                       {"Authorization": b"Bearer s3cret-token\xe9"}):
            refused = server.post(body("a"), **header)
            assert (refused.status_code, refused.headers["WWW-Authenticate"]) == (401, "Bearer")
        assert server.health()["status"] == "ok"
        monkeypatch.setenv("LWZ_RM_TOKEN", "wr0ng-token")
        with pytest.raises(ScoringError, match=r"HTTP 401 .*LWZ_RM_TOKEN") as wrong:
            remote_scores(server.url, texts(1), 5)
        monkeypatch.setenv("LWZ_RM_TOKEN", "s3cret-token\n")
        with pytest.raises(ScoringError, match="LWZ_RM_TOKEN must be printable") as broken:
            remote_scores(server.url, texts(1), 5)
        said = f"{server.log.read_text()}{''.join(capfd.readouterr())}{wrong.value}{broken.value}"
        assert "s3cret" not in said and "wr0ng" not in said


@pytest.mark.parametrize(("host", "token", "warns"), [
    ("127.0.0.1", "", False), ("::1", "", False), ("localhost", "", False), ("0.0.0.0", "", True), ("::", "", True),
    ("", "", True), ("node7", "", True), ("0.0.0.0", "s3cret", False)])
def test_open_host_without_a_token_is_warned_of(monkeypatch, caplog, host, token, warns):
    monkeypatch.setenv("LWZ_RM_TOKEN", token)
    monkeypatch.setattr(rm_server.uvicorn, "run", lambda *_, **settings: asked.update(settings))
    asked = {}
    with caplog.at_level(logging.WARNING):
        rm_server.serve(None, host)
    assert asked["host"] == host and ("WITHOUT AUTHENTICATION" in caplog.text) == warns


def test_any_text_and_any_number_of_them(server, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # a cluster's proxy must not be asked
    asked = [("", ""), ("雨\u2028\x00\r\n\"\\", "🙂" * 5000), ("p", "two\ud800"), *texts(150)]
    assert remote_scores(f"{server.url}/", asked, 10) == right([*asked[:2], ("p", "two?"), *asked[3:]])
    assert remote_scores("http://nowhere.invalid", [], 5) == []


def test_several_processes_ask_after_a_fork(server):
    assert remote_scores(server.url, texts(5), 5) == right(texts(5))
    with multiprocessing.get_context("fork").Pool(3) as pool:
        jobs = [pool.apply_async(remote_scores, (server.url, texts(9, f"{i}"), 10, 2)) for i in range(6)]
        assert [job.get(20) for job in jobs] == [right(texts(9, f"{i}")) for i in range(6)]


@pytest.mark.parametrize("url", ["127.0.0.1:80", "ftp://x", "http://x:port"])
def test_url_that_cannot_be_is_refused_at_once(url):
    began = time.monotonic()
    with pytest.raises(ScoringError, match=re.escape(url)):
        remote_scores(url, texts(1), 60)
    assert time.monotonic() - began < 5


@contextlib.contextmanager
def _scripted(*answers):
    """A server that gives these (status, headers, body) in turn, and when each request came."""
    left, came = list(answers), []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            came.append(time.monotonic())
            self.rfile.read(int(self.headers["Content-Length"]))
            status, headers, content = left.pop(0)
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(content))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        threading.Thread(target=listening.serve_forever, args=(0.02,)).start()
        try:
            yield f"http://127.0.0.1:{listening.server_port}", came
        finally:
            listening.shutdown()


GOOD = (200, {}, b'{"scores": [0.5], "model": "m"}')


@pytest.mark.parametrize("answer", [
    b'{"scores": [NaN], "model": "m"}', b'{"scores": [1e999], "model": "m"}', b'{"scores": ["0.5"], "model": "m"}',
    b'{"scores": [true], "model": "m"}', b'{"scores": [null], "model": "m"}', b'{"scores": [], "model": "m"}',
    b'{"scores": [0.5, 0.5], "model": "m"}', b'{"scores": [0.5]}', b"<html>log in</html>", b""])
def test_answer_without_one_number_per_text_is_an_error(answer):
    with _scripted((200, {}, answer)) as (url, _), pytest.raises(ScoringError, match=r"finite scores|for 1 texts"):
        remote_scores(url, texts(1), 5)


@pytest.mark.parametrize("status", [301, 400, 404, 413, 429, 500])
def test_other_answers_are_errors_at_once(status):
    with _scripted((status, {"Location": "/"}, b"because"), GOOD) as (url, came):
        with pytest.raises(ScoringError, match=f"HTTP {status} because"):
            remote_scores(url, texts(1), 5)
        assert len(came) == 1


@pytest.mark.parametrize("asked", ["1", "soon", "-5", "Wed, 21 Oct 2026 07:28:00 GMT"])
def test_gateway_errors_are_tried_again_and_retry_after_is_kept(monkeypatch, asked):
    monkeypatch.setattr(writing_rm, "_backoff", lambda _: 0.01)
    cut = (200, {"Content-Length": "99"}, b"{")  # closed in the middle
    with _scripted((502, {}, b""), cut, (503, {"Retry-After": asked}, b""), (504, {}, b""), GOOD) as (url, came):
        assert remote_scores(url, texts(1), 20) == [0.5]
    assert len(came) == 5 and (came[3] - came[2] >= 1 or asked != "1")


def test_long_retry_after_does_not_outlast_patience():
    began = time.monotonic()
    with (_scripted(*[(503, {"Retry-After": "9999"}, b"")] * 9) as (url, came),
          pytest.raises(ScoringError, match=r"no scores after 0\.[5-9] s; last cause: HTTP 503")):
        remote_scores(url, texts(1), 0.5)
    assert len(came) == 2 and time.monotonic() - began < 1.5


def test_importing_the_client_needs_no_server():
    code = "import sys, lwzlib.method.writing_rm; sys.exit(any(m in sys.modules for m in ('starlette', 'uvicorn', 'torch')))"
    assert subprocess.run([sys.executable, "-c", code], env=os.environ).returncode == 0
