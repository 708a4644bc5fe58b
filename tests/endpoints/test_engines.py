"""Completions from any engine: the same rows, nothing written or paid for twice, cut and refused ones kept and marked."""

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import types

import pytest
from polling import until
from pydantic import ValidationError

from lwzlib.base import models
from lwzlib.base.kit import TINY, ModelError, prepare
from lwzlib.base.models import load_model, load_tokenizer
from lwzlib.base.quantities import Decoding, Prompt
from lwzlib.base.recipe import RecipeError, load_recipe
from lwzlib.base.rows import RunError, read_rows
from lwzlib.endpoints import endpoint, engines, llm
from lwzlib.endpoints.engines import QueryPrompt
from lwzlib.endpoints.local_server import serving
from lwzlib.method.prompts import framed

GREEDY = Decoding(temperature=0.0, top_p=1.0, max_new_tokens=24)
DRAWN = Decoding(temperature=0.7, top_p=0.8, top_k=20, max_new_tokens=12)
PROMPT = Prompt(wording="brief", worked_examples=0)
TINY_ENGINE = engines.transformers(TINY, "float32", "sdpa", batch=2)


def asked(count=5, frame="plain", style="think"):
    queries = [f"Write {'very ' * i}briefly about rain <{i}>." for i in range(count)]
    return [QueryPrompt(f"q{i}", query, framed(query, style, frame, PROMPT)) for i, query in enumerate(queries)]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(endpoint, "_backoff", lambda _: 0.02)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    prepare(TINY)


@pytest.fixture(scope="module")
def babbler(tmp_path_factory):
    """The folder of a random model that babbles in lower case, each word another; kit:tiny repeats its last byte."""
    import torch
    from transformers import LlamaForCausalLM

    folder = tmp_path_factory.mktemp("babbler")
    config = LlamaForCausalLM.from_pretrained(prepare(TINY)).config
    config.tie_word_embeddings, config.initializer_range = False, 1.0
    tokenizer = load_tokenizer(TINY)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = LlamaForCausalLM(config)
    letters = tokenizer("abcdefghijklmnopqrstuvwxyz ", add_special_tokens=False).input_ids
    others = [token for token in range(config.vocab_size) if token not in letters]
    model.lm_head.weight.data[others] = 0.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def local(babbler):
    return engines.transformers(babbler, "float32", "sdpa", batch=2)


@pytest.fixture(scope="module")
def served(babbler):
    with serving(babbler, "float32", patience_s=60.0) as settings:
        yield settings


@pytest.fixture
def fake(llm_server, tmp_path):
    """fake(script, **settings) -> an engine on the server without a model."""
    def engine(script, **settings):
        llm_server.script(script)
        given = llm.configure(**{"base_url": llm_server.url, "model": "m", "patience_s": 20.0} | settings)
        return engines.server(given, tmp_path / "replies.jsonl")
    return engine


def bodies(server):
    return [request["body"] for request in server.requests]


@pytest.mark.parametrize("frame", ["plain", "chat"])
def test_greedy_rows_of_transformers_and_of_a_server_are_the_same(local, served, tmp_path, frame):
    remote = engines.server(served, tmp_path / "replies.jsonl")
    here, there = (engines.generate(engine, asked(5, frame), GREEDY, tmp_path / f"{engine.identity['engine']}.jsonl")
                   for engine in (local, remote))
    assert [row | {"key": ""} for row in here] == [row | {"key": ""} for row in there]
    assert all(list(row) == list(there[0]) for row in here) and [row["id"] for row in here] == [f"q{i}" for i in range(5)]
    assert all(row["truncated"] and row["tokens"] == len(row["completion"]) == 24 for row in here)
    assert len({row["completion"] for row in here}) == 5 and len(set(here[0]["completion"])) > 5


def test_stop_string_ends_a_completion_and_stays_in_it(local, served, tmp_path):
    whole = engines.generate(local, asked(3), GREEDY, tmp_path / "whole.jsonl")
    stop = whole[0]["completion"][5:8]
    ending = GREEDY.model_copy(update={"stop": [stop, "</answer>"]})
    here = engines.generate(local, asked(3), ending, tmp_path / "here.jsonl")
    there = engines.generate(engines.server(served, tmp_path / "replies.jsonl"), asked(3), ending, tmp_path / "there.jsonl")
    assert here[0]["completion"] == whole[0]["completion"].partition(stop)[0] + stop and not here[0]["truncated"]
    assert here[0]["tokens"] == len(here[0]["completion"]) < 24, "a byte is a token, and padding is none"
    for one, other in zip(here, there, strict=True):  # this server does not know stop strings, and goes on
        assert {**one, "key": "", "tokens": 0} == {**other, "key": "", "tokens": 0} and other["tokens"] == 24


def test_top_k_of_one_is_greedy(local, tmp_path):
    one = Decoding(temperature=1.0, top_p=1.0, top_k=1, max_new_tokens=24)
    found = [engines.generate(local, asked(2), how, tmp_path / f"{how.top_k}.jsonl") for how in (GREEDY, one)]
    assert [row["completion"] for row in found[0]] == [row["completion"] for row in found[1]]


def test_end_of_a_text_is_a_token_and_not_truncated(local, babbler, tmp_path, monkeypatch):
    row, *_ = engines.generate(local, asked(3), GREEDY, tmp_path / "whole.jsonl")
    made, tokenizer = load_model(babbler, "float32", "sdpa")
    ids = tokenizer(row["completion"], add_special_tokens=False).input_ids
    end = next(i for i, token in enumerate(ids) if token not in ids[:i] and i > 0)
    made.generation_config.eos_token_id = [tokenizer.eos_token_id, ids[end]]  # of the model, not of its tokenizer
    monkeypatch.setattr(engines, "load_model", lambda *_: (made, tokenizer))
    first, *_ = engines.generate(local, asked(3), GREEDY, tmp_path / "ended.jsonl")
    assert not first["truncated"] and first["tokens"] == end + 1


@pytest.mark.parametrize("kept", [0, 1, 2, 3])
def test_stopped_generation_goes_on_at_the_row_and_equals_one_that_was_not(local, babbler, tmp_path, kept, capsys):
    whole = engines.generate(local, asked(), DRAWN, tmp_path / "whole.jsonl", seed=3)
    assert f"{babbler}: 5/5 completions, 60 tokens, " in (said := capsys.readouterr().out) and said.endswith(" tokens/s\n")
    lines = (tmp_path / "whole.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "cut.jsonl").write_bytes(b"".join(lines[:kept]) + lines[kept][:20])
    assert engines.generate(local, asked(), DRAWN, tmp_path / "cut.jsonl", seed=3) == whole
    assert (tmp_path / "cut.jsonl").read_bytes() == b"".join(lines)
    assert engines.generate(local, asked(), DRAWN, tmp_path / "other.jsonl", seed=4) != whole


def test_rows_are_written_one_by_one_and_never_again(tmp_path):
    def write(prompts, decoding, seed, first):
        for i in range(first, len(prompts)):
            assert len(read_rows(tmp_path / "out.jsonl")) == i
            written.append(i)
            yield i, llm.Written("text", "stop", 1)
            if i == 2 and len(written) == 3:
                raise KeyboardInterrupt
    written, engine = [], engines.Engine({"engine": "counting"}, write)
    with pytest.raises(KeyboardInterrupt):
        engines.generate(engine, asked(), GREEDY, tmp_path / "out.jsonl")
    for count, expected in ((5, [0, 1, 2, 3, 4]), (5, []), (3, []), (7, [5, 6])):
        rows = engines.generate(engine, asked(count), GREEDY, tmp_path / "out.jsonl")
        assert [row["id"] for row in rows] == [f"q{i}" for i in range(count)]
        assert written == expected, "the same prompts, fewer, and more of them"
        written.clear()


def test_file_of_another_engine_decoding_or_prompt_is_refused(tmp_path):
    out = tmp_path / "out.jsonl"
    engines.generate(TINY_ENGINE, asked(2), GREEDY, out)
    before = out.read_bytes()
    for change in ({"engine": engines.transformers(TINY, "float32", "sdpa", 4)}, {"seed": 1},
                   {"decoding": GREEDY.model_copy(update={"stop": ["x"]})}, {"prompts": asked(2, style="direct")},
                   {"prompts": asked(2)[::-1]}):
        with pytest.raises(RunError, match=r"out\.jsonl, row 1: q0 was written by another engine"):
            engines.generate(**{"engine": TINY_ENGINE, "prompts": asked(2), "decoding": GREEDY, "out": out} | change)
    with pytest.raises(RunError, match="ids must be unique"):
        engines.generate(TINY_ENGINE, asked(2) * 2, GREEDY, out)
    assert out.read_bytes() == before


def test_base_model_is_asked_for_a_completion_and_an_instruct_model_in_a_chat(fake, llm_server, tmp_path):
    engine = fake({"rain": [{"text": "ok"}]}, sampling={"top_p": None, "min_p": 0.1})
    engines.generate(engine, asked(1), DRAWN, tmp_path / "plain.jsonl", seed=9)
    engines.generate(engine, asked(1, "chat"), GREEDY.model_copy(update={"stop": ["</answer>"]}), tmp_path / "chat.jsonl")
    plain, chat = llm_server.requests
    assert plain["path"] == "/v1/completions" and chat["path"] == "/v1/chat/completions"
    assert plain["body"] == {"model": "m", "prompt": asked(1)[0].prompt, "temperature": 0.7, "top_k": 20, "max_tokens": 12,
                             "seed": 9, "min_p": 0.1}
    assert chat["body"] == {"model": "m", "temperature": 0.0, "max_tokens": 24, "seed": 0, "min_p": 0.1, "messages": [
        {"role": "system", "content": "First plan in <think> </think>, then write in <answer> </answer>."},
        {"role": "user", "content": "Write briefly about rain <0>."}]}
    with pytest.raises(ValueError, match="texts and messages"):
        engines.generate(engine, [*asked(1), *asked(2, "chat")[1:]], GREEDY, tmp_path / "mixed.jsonl")


def test_more_prompts_are_asked_alone(fake, llm_server, tmp_path):
    engine = fake({f"<{i}>": [{"text": f"text {i}"}] for i in range(5)})
    for count in (2, 5, 3):
        rows = engines.generate(engine, asked(count), GREEDY, tmp_path / "out.jsonl")
        assert [row["completion"] for row in rows] == [f"text {i}" for i in range(count)]
    assert len(llm_server.requests) == 5


def test_stop_strings_are_sent_to_a_server_that_keeps_them(fake, llm_server, tmp_path):
    engine = fake({"rain": [{"text": "<answer>a</answer>"}]}, sampling={"include_stop_str_in_output": True})
    engines.generate(engine, asked(1), GREEDY.model_copy(update={"stop": ["</answer>"]}), tmp_path / "out.jsonl")
    assert bodies(llm_server)[0]["stop"] == ["</answer>"] and bodies(llm_server)[0]["include_stop_str_in_output"] is True


@pytest.mark.parametrize(("turn", "completion", "truncated"), [
    ({"text": " <think>a</think>\n<answer>b"}, " <think>a</think>\n<answer>b", False),
    ({"text": "cut", "finish": "length"}, "cut", True), ({"text": "cut", "finish": "content_filter"}, "cut", True),
    ({"text": "no reason", "finish": None}, "no reason", False), ({"text": ""}, "", False),
    ({"text": "<answer>a</answer> and more", "finish": "length"}, "<answer>a</answer>", False),
    ({"text": '{"n": 1}'}, '{"n": 1}', False)])
@pytest.mark.parametrize("frame", ["plain", "chat"])
def test_reply_becomes_a_row_as_it_is_and_marked(fake, tmp_path, frame, turn, completion, truncated):
    ending = GREEDY.model_copy(update={"stop": ["</answer>"]})
    (row,) = engines.generate(fake({"rain": [turn]}), asked(1, frame), ending, tmp_path / "out.jsonl")
    assert row.pop("key") and row == {"id": "q0", "query": "Write briefly about rain <0>.", "completion": completion,
                                      "truncated": truncated, "tokens": 3, "error": ""}


def test_refused_prompt_is_a_row_that_says_so(fake, llm_server, tmp_path):
    engine = fake({"<1>": [{"status": 400, "text": "too long"}], "rain": [{"text": "ok"}]})
    rows = engines.generate(engine, asked(3), GREEDY, tmp_path / "out.jsonl")
    assert [row["completion"] for row in rows] == ["ok", "", "ok"] and not any(row["truncated"] for row in rows)
    assert "HTTP 400" in rows[1]["error"] and "too long" in rows[1]["error"] and rows[0]["error"] == ""
    assert engines.generate(engine, asked(3), GREEDY, tmp_path / "out.jsonl") == rows and len(bodies(llm_server)) == 3 + 1
    rows = engines.generate(fake({"rain": [{"text": "well"}]}), asked(3), GREEDY, tmp_path / "out.jsonl")
    assert [row["completion"] for row in rows] == ["ok", "well", "ok"] and len(bodies(llm_server)) == 1, "the others are kept"


def test_rows_without_the_kept_replies_are_not_asked_again(fake, llm_server, tmp_path):
    engines.generate(fake({"rain": [{"text": "ok"}]}), asked(2), GREEDY, tmp_path / "out.jsonl")
    for path in tmp_path.glob("*replies*"):
        path.unlink()
    rows = engines.generate(fake({"rain": [{"text": "new"}]}), asked(3), GREEDY, tmp_path / "out.jsonl")
    assert [row["completion"] for row in rows] == ["ok", "ok", "new"] and len(bodies(llm_server)) == 1
    with pytest.raises(llm.LLMError, match="refused every question"):
        engines.generate(fake({"rain": [{"status": 422}]}), asked(3), DRAWN, tmp_path / "other.jsonl")
    assert read_rows(tmp_path / "other.jsonl") == []


def test_budget_stops_and_the_next_call_pays_for_the_rest(fake, llm_server, tmp_path, capsys):
    for expected in (4, 4):
        with pytest.raises(llm.LLMError, match="budget of 4 requests"):
            engines.generate(fake({}, budget_requests=4), asked(10), GREEDY, tmp_path / "out.jsonl")
        assert len(llm_server.requests) == expected
    assert len(engines.generate(fake({}, budget_requests=4), asked(10), GREEDY, tmp_path / "out.jsonl")) == 10
    assert len(llm_server.requests) == 2
    assert capsys.readouterr().out.rstrip().endswith(" tokens/s")


PROGRAM = textwrap.dedent("""
    import pathlib, sys
    from test_engines import GREEDY, asked, engines, llm
    settings, folder = llm.configure(base_url=sys.argv[1], model="m", concurrency=4), pathlib.Path(sys.argv[2])
    engines.generate(engines.server(settings, folder / "replies.jsonl"), asked(40), GREEDY, folder / "out.jsonl")
""")


def test_killed_process_pays_only_for_the_rest(fake, llm_server, tmp_path):
    engine = fake({"rain": [{"text": "ok", "delay_s": 0.05}]})
    path = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, llm_server.url, tmp_path], env=os.environ | {"PYTHONPATH": path})
    until(lambda: len(llm_server.requests) >= 15, "15 requests", 60)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept, before = len(read_rows(tmp_path / "replies.jsonl")), len(llm_server.requests)
    assert before - 4 <= kept < 40
    llm_server.script({"rain": [{"text": "ok"}]})
    rows = engines.generate(engine, asked(40), GREEDY, tmp_path / "out.jsonl")
    assert [row["completion"] for row in rows] == ["ok"] * 40 and len(llm_server.requests) == 40 - kept


def test_it_works_inside_a_running_loop_as_notebooks_have(fake, tmp_path):
    async def cell():
        return engines.generate(fake({"rain": [{"text": "ok"}]}), asked(2), GREEDY, tmp_path / "out.jsonl")
    assert [row["completion"] for row in asyncio.run(cell())] == ["ok", "ok"]


def test_vllm_gets_the_same_tokens_and_settings_and_goes_on_at_the_row(tmp_path, monkeypatch):
    """Without vLLM: a stand-in with the signatures of its documentation."""
    class LLM:
        def __init__(self, **config):
            made.append(config)

        def generate(self, prompts, params):
            calls.append((prompts, params))
            return [types.SimpleNamespace(outputs=[types.SimpleNamespace(text="<answer>a</answer>", finish_reason="stop",
                                                                         token_ids=[1, 2, 3])]) for _ in prompts]
    made, calls = [], []
    monkeypatch.setitem(sys.modules, "vllm", types.SimpleNamespace(LLM=LLM, SamplingParams=dict))
    engine = engines.vllm(TINY, batch=2, dtype="float32", max_model_len=4096)
    ending = DRAWN.model_copy(update={"stop": ["</answer>"]})
    rows = engines.generate(engine, asked(3), ending, tmp_path / "out.jsonl", seed=5)
    assert [(row["completion"], row["truncated"], row["tokens"]) for row in rows] == [("<answer>a</answer>", False, 3)] * 3
    assert engines.generate(engine, asked(4), ending, tmp_path / "out.jsonl", seed=5)[:3] == rows
    assert [len(prompts) for prompts, _ in calls] == [2, 1, 1]
    assert made[0] == {"model": models.resolve(TINY), "trust_remote_code": False, "seed": 5, "dtype": "float32",
                       "max_model_len": 4096}
    assert calls[2][1] == [{"temperature": 0.7, "top_p": 0.8, "top_k": 20, "max_tokens": 12, "stop": ["</answer>"],
                            "include_stop_str_in_output": True, "seed": 8}]
    assert load_tokenizer(TINY).decode(calls[2][0][0]["prompt_token_ids"]) == asked(4)[3].prompt


def test_vllm_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ModelError, match="needs vLLM"):
        engines.generate(engines.vllm(TINY), asked(1), GREEDY, tmp_path / "out.jsonl")


def test_samples_and_evaluations_may_be_greedy_and_rl_may_not():
    assert load_recipe("smoke", "samples.sampling.temperature=0.0").samples.sampling.temperature == 0
    with pytest.raises(RecipeError, match=r"grpo.sampling.temperature = 0 makes all completions of a group the same"):
        load_recipe("smoke", "grpo.sampling.temperature=0.0")
    with pytest.raises(ValidationError):
        Decoding(temperature=0.5, top_p=1.0, max_new_tokens=1, top_k=-1)
