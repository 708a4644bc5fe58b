"""The kit's own OpenAI-compatible server, with a real model in it: answers, loses no query, and never outlives its user."""

import asyncio
import signal
import subprocess
import sys

import httpx
import openai
import pytest
from polling import until
from pydantic import BaseModel

from lwzlib.base.kit import TINY, ModelError
from lwzlib.base.rows import read_rows, write_rows
from lwzlib.data import curate
from lwzlib.endpoints import llm
from lwzlib.endpoints.local_server import serving
from lwzlib.method.queries import load_queries


class Anything(BaseModel):
    n: int


@pytest.fixture(scope="module")
def settings():
    with serving(TINY, "float32", sampling={"max_tokens": 8}, reasks=1, patience_s=60.0) as found:
        yield found


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def gone(url):
    try:
        httpx.get(url.replace("/v1", "/health"), trust_env=False)
    except httpx.TransportError:
        return True
    return False


def test_it_speaks_the_protocol(settings):
    client = openai.OpenAI(base_url=settings.base_url, api_key="none")
    reply = client.chat.completions.create(model=settings.model, messages=[{"role": "user", "content": "Hello"}], max_tokens=5)
    assert reply.choices[0].message.role == "assistant" and isinstance(reply.choices[0].message.content, str)
    assert reply.usage.completion_tokens == 5 and reply.choices[0].finish_reason == "length"
    assert reply.usage.prompt_tokens > 5, "a byte is a token, and the chat template adds its own"


def test_questions_asked_at_once_each_get_an_answer_and_a_row(settings, tmp_path):
    cache, spent = tmp_path / "replies.jsonl", llm.Spent()
    requests = [llm.Request(f"Question {n}", Anything) for n in range(5)]
    answers = asyncio.run(llm.ask(requests, settings, cache, spent))
    assert len(answers) == 5 and all(isinstance(said, llm.NoAnswer) for said in answers), "random weights write no JSON"
    assert spent.requests == len(read_rows(cache)) == 10 and spent.tokens > 10 * 8  # each is asked again once
    again = llm.Spent()
    assert asyncio.run(llm.ask(requests, settings, cache, again)) == answers and again.requests == 0


def test_curation_with_a_model_that_knows_nothing_rejects_all_and_loses_none(settings, tmp_path):
    queries = [q for language in ("en", "zh") for q in load_queries("kit:train", [language])[:2]]
    write_rows(tmp_path / "raw.jsonl", [q.model_dump() for q in queries])
    kept, rejects = asyncio.run(curate.curate(settings, str(tmp_path / "raw.jsonl"), tmp_path / "kept.jsonl"))
    assert kept == [] and [row["id"] for row in rejects] == [q.id for q in queries]
    assert {row["reason"] for row in rejects} == {"no valid answer"}
    assert all("none valid" in row["detail"] for row in rejects)
    assert read_rows(tmp_path / "kept.rejects.jsonl") == rejects and read_rows(tmp_path / "kept.jsonl") == []


def test_it_ends_with_its_block_even_by_an_error():
    with pytest.raises(ZeroDivisionError), serving(TINY, "float32") as settings:
        assert not gone(settings.base_url)
        raise ZeroDivisionError
    assert gone(settings.base_url)


def test_it_ends_when_its_user_is_killed():
    program = ("import sys\nfrom lwzlib.endpoints.local_server import serving\n"
               "with serving('kit:tiny', 'float32') as s: print(s.base_url, flush=True); sys.stdin.read()")
    user = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    url = user.stdout.readline().strip()
    assert url and not gone(url)
    user.send_signal(signal.SIGKILL)
    user.communicate()
    until(lambda: gone(url), "the end of the server")


def test_model_that_is_not_there_or_not_whole_is_named(tmp_path):
    with pytest.raises(ModelError, match="no/such/folder does not exist"), serving("/no/such/folder"):
        pass
    with pytest.raises(ModelError, match=f"server of {tmp_path} ended with exit code 1; its last lines:") as error, \
         serving(str(tmp_path)):
        pass
    assert "Error" in str(error.value)
