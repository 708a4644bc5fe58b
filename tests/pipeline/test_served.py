"""What vLLM servers write for a stage: rounds, seeds, resuming, refusals. A program stands in vLLM's place; `test_vllm` has
the real one."""

import dataclasses
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from lwzlib.base import models
from lwzlib.base.kit import TINY
from lwzlib.base.models import load_tokenizer
from lwzlib.base.policy import Policy
from lwzlib.base.recipe import load_recipe
from lwzlib.base.rows import RunError, read_rows
from lwzlib.base.trainers import load_policy
from lwzlib.method import samples
from lwzlib.method.queries import load_queries
from lwzlib.method.rewards import build_rewards
from lwzlib.method.samples import framed_queries, scored
from lwzlib.method.text import parse
from lwzlib.method.writing_rm import bounded_ids, read_info
from lwzlib.pipeline import ranks, served, vllm_servers
from lwzlib.pipeline.stages import stage_run

SERVED = ("launch=slurm distributed.nodes=2 vllm.mode=server vllm.nodes=1 reward.weights.writing=0.0 cold_start.queries=0 "
          "cot.exact_only=false cot.batch_completions=3")
_SERVER = '''
import http.server, json, os, sys
assert "VLLM_SERVER_DEV_MODE" not in os.environ
if "--headless" in sys.argv:
    import time; time.sleep(600)
open({log!r}, "a").write(json.dumps(sys.argv[1:]) + "\\n")
class Answers(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.reply(200, {{}})
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        open({log!r}, "a").write(json.dumps(asked) + "\\n")
        if self.path == "/pooling":
            data = [{{"index": i, "data": [float(len(text))]}} for i, text in enumerate(asked["input"])]
            return self.reply(200, {{"model": asked["model"], "data": data}})
        text = f"<think>a plan of some words</think><answer>draw {{asked['seed']}} of {{hash(asked['prompt']) % 1000}}</answer>"
        if {refuses!r} and {refuses!r} in asked["prompt"]:
            return self.reply(400, {{"error": "too long"}})
        self.reply(200, {{"choices": [{{"text": text, "finish_reason": "length" if asked["seed"] % 2 else "stop"}}],
                         "usage": {{"total_tokens": 20, "completion_tokens": 10}}}})
    def reply(self, status, content):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_):
        pass
host, port = (sys.argv[sys.argv.index(flag) + 1] for flag in ("--host", "--port"))
http.server.ThreadingHTTPServer((host, int(port)), Answers).serve_forever()
'''


@pytest.fixture
def vllm(tmp_path, monkeypatch, program):
    """A program named vllm, two nodes that are this machine; returns what it was asked."""
    def put(refuses=""):
        program("vllm", _SERVER.format(log=str(tmp_path / "asked.jsonl"), refuses=refuses))
        at = ranks.world(load_recipe("smoke", "launch=torchrun"))
        reached_at = {"here": ("127.0.0.2", "lo"), "n2": ("10.0.0.2", "eth0")}
        at = ranks.World(["here"], 1, at.port, ["here", "n2"], reached_at=reached_at)
        monkeypatch.setattr(vllm_servers, "everywhere", lambda _: at)
        monkeypatch.setattr(ranks, "meet", lambda at: at)
        return lambda: [json.loads(line) for line in (tmp_path / "asked.jsonl").read_text().splitlines()]
    return put


def written(tmp_path, r, times=2):
    """Two queries, each `times` times, as `distil` asks."""
    run = stage_run("distil", r, tmp_path / "run", 3)
    run.folder.mkdir(parents=True, exist_ok=True)
    queries = [q for q in load_queries(r.data.train, ["en"])[:2] for _ in range(times)]
    return run, scored(r, run, "completions", Policy(TINY), "", queries, "think", r.grpo.sampling, 3, ["</answer>"],
                       served)


def test_a_query_is_drawn_once_a_round_and_scored_in_order(vllm, tmp_path, monkeypatch):
    asked = vllm()
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # a cluster's proxy does not know its nodes
    monkeypatch.delenv("NO_PROXY", raising=False)
    r = load_recipe("smoke", SERVED)
    _, rows = written(tmp_path, r)
    command, *requests = asked()
    assert command[:2] == ["serve", models.resolve(TINY)]
    prompts = [len(load_tokenizer(TINY)(request["prompt"]).input_ids) for request in requests]
    assert command[command.index("--max-model-len") + 1] == str(max(prompts) + r.grpo.sampling.max_new_tokens)
    assert command[command.index("--generation-config") + 1] == "vllm"
    assert "--weight-transfer-config" not in command
    assert command[command.index("--data-parallel-size") + 1] == "2", "a copy on each node"
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and rows[0]["query"] == rows[1]["query"] != rows[2]["query"]
    assert len({row["completion"] for row in rows}) == 4
    assert [row["truncated"] for row in rows] == [False, False, False, False], "they ended with the stop string"
    scorers = build_rewards(r)
    for row in rows:
        expected = {name: scorer(completions=[row["completion"]], style=["think"], word_range=[tuple(row["word_range"])],
                                 query=[row["query"]])[0] for name, scorer in scorers.items()}
        assert {name: row[name] for name in expected} == expected
    sampling = r.grpo.sampling
    for request in requests:
        assert request | {"prompt": "", "seed": 0} == {
            "model": models.resolve(TINY), "prompt": "", "seed": 0, "temperature": sampling.temperature,
            "top_p": sampling.top_p, "max_tokens": sampling.max_new_tokens, "stop": ["</answer>"],
            "include_stop_str_in_output": True, "add_special_tokens": False}
    assert sorted(request["seed"] for request in requests) == [3000, 3000, 3001, 3001]
    tokenizer = load_tokenizer(TINY)
    prompts = framed_queries(r, load_queries(r.data.train, ["en"])[:2], "think", tokenizer)
    assert {request["prompt"] for request in requests} == set(prompts)


def test_servers_of_the_writing_rm_score_what_was_written(vllm, smoke_rm, tmp_path):
    """After the policy's servers have ended, vLLM serves the Writing RM on all nodes; nothing is scored in this process."""
    asked, folder = vllm(), str(smoke_rm / "writing-rm" / "model")
    r = load_recipe("smoke", SERVED, {"reward.weights.writing": 1.0, "reward.writing.model": folder})
    _, rows = written(tmp_path, r)
    info, commands = read_info(folder), [words for words in asked() if isinstance(words, list)]
    assert [words[1] for words in commands] == [models.resolve(TINY), folder], "one after the other"
    flags = dict(zip(commands[1][2::2], commands[1][3::2], strict=False))
    assert (flags["--runner"], flags["--served-model-name"], flags["--max-model-len"]) == (
        "pooling", info["identity"], str(info["max_tokens"]))
    assert flags["--data-parallel-size"] == "2" and "--weight-transfer-config" not in flags
    texts = [(row["query"], parse(row["completion"], "think").answer) for row in rows]
    expected = [float(len(ids)) for ids in bounded_ids(load_tokenizer(folder), info, texts)]
    assert [row["writing"] for row in rows] == expected
    url = load_recipe("smoke", SERVED, {"reward.weights.writing": 1.0, "reward.writing.url": "http://mine:1"})
    with served.judged(url, stage_run("distil", r, tmp_path, 0), folder) as judged:
        assert judged is url, "a server that the recipe names is used"


def test_servers_of_a_public_reward_model_get_its_weights(vllm, smoke_rm, tmp_path):
    """The folder of the stage `judge` describes it, and holds none."""
    asked, weights, folder = vllm(), str(smoke_rm / "writing-rm" / "model"), tmp_path / "judge"
    folder.mkdir()
    (folder / "writing_rm.json").write_text(json.dumps(read_info(weights) | {"model": weights, "identity": "public/rm"}))
    made = load_recipe("smoke", SERVED, {"reward.weights.writing": 1.0, "reward.writing.model": str(folder)})
    written(tmp_path, made)
    commands = [words for words in asked() if isinstance(words, list)]
    assert [words[1] for words in commands] == [models.resolve(TINY), weights] and "public/rm" in commands[1]


def test_a_run_that_was_killed_while_scoring_starts_no_server_again(vllm, tmp_path, monkeypatch):
    asked = vllm()
    r = load_recipe("smoke", SERVED)
    build, scored = build_rewards, []

    def failing(*args):
        def scorer(completions, **_):
            scored.extend(completions)
            if len(scored) > 3:
                raise KeyboardInterrupt
            return [1.0] * len(completions)
        return {"length": scorer}

    monkeypatch.setattr(samples, "build_rewards", failing)
    with pytest.raises(KeyboardInterrupt):
        written(tmp_path, r)
    monkeypatch.setattr(samples, "build_rewards", build)
    before = asked()
    (tmp_path / "bin" / "vllm").unlink()
    run, rows = written(tmp_path, r)
    assert asked() == before and len(rows) == 4 and [row["step"] for row in rows] == [1, 2, 3, 4]
    assert [row["completion"] for row in rows] == [row["completion"] for row in sorted(
        (row for k in (0, 1) for row in read_rows(run.folder / f"completions.written-{k}.jsonl")),
        key=lambda row: [q["query"] for q in rows].index(row["query"]))]


def test_a_prompt_that_is_refused_is_named_and_nothing_is_scored(vllm, tmp_path):
    r = load_recipe("smoke", SERVED)
    _, second = load_queries(r.data.train, ["en"])[:2]
    vllm(refuses=second.query)
    with pytest.raises(RunError, match=f"vLLM refused query {second.id}: HTTP 400.*too long"):
        written(tmp_path, r)
    assert not stage_run("distil", r, tmp_path / "run", 3).rows("completions")


def test_a_server_that_does_not_start_is_shown(vllm, tmp_path):
    vllm()
    (tmp_path / "bin" / "vllm").write_text("#!/bin/sh\necho no GPU here\nexit 3\n")
    with pytest.raises(RunError, match=r"(?s)exit code 3 before it answered.*no GPU here"):
        written(tmp_path, load_recipe("smoke", SERVED))


def test_a_snapshot_that_is_an_adapter_is_merged_for_the_server(smoke, tmp_path):
    model, tokenizer = load_policy(smoke, TINY)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "snapshot")
    tokenizer.save_pretrained(tmp_path / "snapshot")
    run = stage_run("grpo", smoke, tmp_path, 0, "base-think")
    policy = Policy(str(tmp_path / "snapshot"), TINY)
    merged = AutoModelForCausalLM.from_pretrained(policy.folder(smoke, run), dtype=torch.float32).state_dict()
    for name, value in policy.load(smoke)[0].state_dict().items():
        torch.testing.assert_close(value, merged[name], msg=name)
    assert load_tokenizer(policy.folder(smoke, run)).eos_token == tokenizer.eos_token
    assert Policy(TINY).folder(smoke, run) == models.resolve(TINY)


def test_all_nodes_of_an_allocation_write(monkeypatch):
    monkeypatch.setattr(ranks, "allocated", lambda: [f"n{i}" for i in range(1, 9)])
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    at = vllm_servers.everywhere(load_recipe("paper"))
    at = dataclasses.replace(at, reached_at={"n1": ("10.0.0.1", "eth0")})
    assert at.servers == [f"n{i}" for i in range(1, 9)] and at.hosts == ["n1"] and at.slurm
    first = vllm_servers.commands(load_recipe("paper"), at, "m", 15_000, trains=False)[0]
    assert first[first.index("--data-parallel-size") + 1] == "16"
