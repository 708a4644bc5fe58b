"""vLLM's commands against what TRL renders itself; servers that answer, are late, or die: a program in vLLM's place."""

import contextlib
import dataclasses
import functools
import http.server
import itertools
import os
import subprocess
import sys
import threading
import urllib.error
import urllib.request

import pytest

from lwzlib.base.kit import TINY
from lwzlib.base.models import load_tokenizer
from lwzlib.base.parallel import vllm_arguments
from lwzlib.base.recipe import load_recipe
from lwzlib.base.rows import RunError
from lwzlib.base.run_folder import Run
from lwzlib.method import grpo
from lwzlib.pipeline import ranks, vllm_servers
from lwzlib.pipeline.stages import stage_run

_SERVER = '''
import http.server, os, sys, time
assert os.environ["VLLM_SERVER_DEV_MODE"] == "1"
if "--headless" in sys.argv:
    time.sleep(600)
print("loading the model", flush=True)
{does}
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer.allow_reuse_address = True
class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", port), Health).serve_forever()
'''


def world(hosts, servers, port=10_000, *addresses):
    """A world whose nodes have met: those without an address are at 10.0.0.1, 10.0.0.2 and so on."""
    at = ranks.World(hosts, 8, port, servers)
    known = [*addresses, *(f"10.0.0.{number}" for number in range(len(addresses) + 1, len(at.nodes) + 1))]
    return dataclasses.replace(at, reached_at={node: (address, "eth0") for node, address in zip(at.nodes, known, strict=True)})


@pytest.fixture
def paper():
    return load_recipe("paper", "distributed.start_s=20")


@pytest.fixture
def vllm(program):
    """A program named vllm; `does` is what it does before it answers."""
    def put(does=""):
        program("vllm", _SERVER.format(does=does))
        port = ranks.world(load_recipe("smoke", "launch=torchrun")).port
        return world(["here"], ["here", "second"], port, "127.0.0.1")
    return put


def answers(at) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{at.port + 3}/health", timeout=2):
            return True
    except (urllib.error.URLError, ConnectionError):
        return False


@pytest.fixture
def dead_proxy(monkeypatch):
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")


def test_the_wait_for_a_server_passes_by_a_proxy(paper, vllm, tmp_path, dead_proxy):
    with vllm_servers.serve(paper, vllm(), tmp_path, "m", 15_000):
        pass


_ASKS = """
import sys, urllib.error, urllib.request, httpx, requests
asks = {"requests": lambda url: requests.get(url).status_code, "httpx": lambda url: httpx.get(url).status_code,
        "urllib": lambda url: urllib.request.urlopen(url).status}
for url in sys.argv[1:]:
    for name, ask in asks.items():
        try:
            print(name, ask(url))
        except (requests.ConnectionError, httpx.ConnectError, urllib.error.URLError) as error:
            print(name, "refused" if "refused" in str(error) else error)
"""


@pytest.mark.parametrize("known", ["", "elsewhere.org", "*"])
def test_ranks_reach_the_servers_of_their_job_directly_and_the_rest_through_the_proxy(tmp_path, dead_proxy, monkeypatch, known):
    monkeypatch.setenv("no_proxy", known)
    answer = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.2", 0), answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        _, env = ranks.in_every_rank(world(["here"], ["there"], 10_000, "127.0.0.1", "127.0.0.2"), ["true"], tmp_path)
        command = [sys.executable, "-c", _ASKS, f"http://127.0.0.2:{server.server_port}/", "http://judge.invalid/"]
        done = subprocess.run(command, env=os.environ | env, capture_output=True, text=True, check=True)
        server.shutdown()
    lines = done.stdout.splitlines()
    assert lines[:3] == ["requests 200", "httpx 200", "urllib 200"]
    assert known == "*" or lines[3:] == ["requests refused", "httpx refused", "urllib refused"], "of the proxy"
    assert known in env["NO_PROXY"].split(",") or not known


def test_servers_have_what_trl_imposes(paper, monkeypatch):
    from trl.scripts import vllm_serve

    monkeypatch.setattr(vllm_serve, "is_vllm_available", lambda **_: False)
    at = world(["n1"], ["n2"])
    theirs = vllm_serve.build_command(vllm_serve.ScriptArguments(
        model="m", tensor_parallel_size=4, data_parallel_size=2, host="10.0.0.2", port=10_003, gpu_memory_utilization=0.9,
        dtype="bfloat16", max_model_len=15_000))
    theirs = theirs[theirs.index("serve") :]
    ours, = vllm_servers.commands(paper, at, "m", 15_000)
    flags = {flag: value for flag, value in itertools.pairwise(ours) if flag.startswith("--")}
    for flag, value in itertools.pairwise(theirs):
        if flag.startswith("--") and flag not in ("--kv-cache-dtype", "--model-impl", "--uvicorn-log-level"):  # vLLM's defaults
            assert flags[flag] == value


def test_the_nodes_of_vllm_are_one_server_of_many_copies(paper):
    at = world(["n1", "n2"], ["n3", "n4"])
    first, second = vllm_servers.commands(paper, at, "/models/start", 15_000)
    assert first[:3] == ["vllm", "serve", "/models/start"] and "--headless" not in first
    assert second[-3:] == ["--headless", "--data-parallel-start-rank", "2"] and second[: len(first)] == first
    for flag, value in (("--data-parallel-size", "4"), ("--data-parallel-size-local", "2"),
                        ("--data-parallel-address", "10.0.0.3"), ("--host", "10.0.0.3"), ("--port", "10003"),
                        ("--generation-config", "vllm"), ("--data-parallel-rpc-port", "10004")):
        assert first[first.index(flag) + 1] == value


def test_ranks_hear_where_the_server_is_once_it_answers_and_it_is_stopped(paper, vllm, tmp_path, monkeypatch, capsys):
    at = vllm("time.sleep(1)")
    with vllm_servers.serve(paper, at, tmp_path, "m", 15_000) as env:
        assert answers(at)
        monkeypatch.setenv("LWZ_VLLM_URL", env["LWZ_VLLM_URL"])
        monkeypatch.setenv("LWZ_VLLM_PORT", env["LWZ_VLLM_PORT"])
        found = vllm_arguments(paper)
    assert not answers(at)
    assert found == {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": f"http://127.0.0.1:{at.port + 3}",
                     "vllm_group_port": at.port + 2, "vllm_server_timeout": 20.0}
    assert f"vLLM answers at http://127.0.0.1:{at.port + 3}, 2 nodes" in capsys.readouterr().out


def test_a_server_that_dies_is_shown_with_the_end_of_its_log(paper, vllm, tmp_path):
    at = vllm("raise SystemExit('out of GPU memory')")
    with pytest.raises(RunError, match=r"(?s)exit code 1 before it answered.*loading the model.*out of GPU memory"), \
            vllm_servers.serve(paper, at, tmp_path, "m", 15_000):
        pytest.fail("entered")


def test_a_server_that_does_not_answer_is_not_waited_for_longer_than_the_recipe_says(vllm, tmp_path):
    at = vllm("time.sleep(600)")
    with pytest.raises(RunError, match=r"(?s)within distributed.start_s = 1 s.*loading the model"), \
            vllm_servers.serve(load_recipe("paper", "distributed.start_s=1"), at, tmp_path, "m", 15_000):
        pytest.fail("entered")


def test_servers_that_nobody_started_are_missed_at_once(paper, monkeypatch):
    monkeypatch.delenv("LWZ_VLLM_URL", raising=False)
    with pytest.raises(RunError, match="no server was started"):
        vllm_arguments(paper)


def test_trl_takes_the_arguments_of_every_way(paper, smoke, tmp_path, monkeypatch):
    monkeypatch.setenv("LWZ_VLLM_URL", "http://n3:10003")
    monkeypatch.setenv("LWZ_VLLM_PORT", "10002")
    for mode, expected in (("none", (False, None)), ("colocate", (True, None)), ("server", (True, "http://n3:10003"))):
        made = smoke.model_copy(update={"vllm": paper.vllm.model_copy(update={"mode": mode, "sleep": True})})
        config = grpo.config(made, Run(tmp_path, made, 0, ("grpo",)), ["length"])
        assert (config.use_vllm, config.vllm_server_base_url) == expected
        assert config.vllm_tensor_parallel_size == (4 if mode == "colocate" else 1)


def longest_prompt(r, model=TINY, style="think") -> int:
    tokenizer = load_tokenizer(model)
    return max(len(tokenizer(prompt).input_ids) for prompt in grpo.dataset(r, style, tokenizer)["prompt"])


@contextlib.contextmanager
def _no_server(recipe, at, logs, model, longest_tokens):
    yield {"longest_tokens": longest_tokens}


def test_servers_have_room_for_the_longest_prompt_and_what_the_arm_writes(smoke, tmp_path, monkeypatch):
    monkeypatch.setattr(ranks, "allocated", lambda: ["n1", "n2"])
    monkeypatch.setattr(ranks, "meet", lambda at: at)
    monkeypatch.setattr(vllm_servers, "serve", _no_server)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    (tmp_path / "short.yaml").write_text(
        "extends: smoke\nlaunch: slurm\ndistributed: {nodes: 2}\nvllm: {mode: server, nodes: 1}\narms:\n"
        "  base-think: {start: base, prompt: think}\n"
        "  short: {start: base, prompt: direct, change: {grpo.sampling.max_new_tokens: 5}}\n")
    served = load_recipe(tmp_path / "short.yaml")
    for arm, style, new_tokens in (("base-think", "think", 24), ("short", "direct", 5)):
        run = stage_run("grpo", served, tmp_path, 0, arm)
        with vllm_servers.ready("grpo", run, arm, TINY) as (_, told):
            assert told == {"longest_tokens": longest_prompt(served, style=style) + new_tokens}


def test_a_colocated_vllm_has_that_room_too(smoke, tmp_path):
    free = smoke.model_copy(update={"reward": load_recipe("smoke", "reward.weights.writing=0.0").reward})
    trainer = grpo.trainer(free, stage_run("grpo", free, tmp_path, 0, "base-think"), "base-think", TINY)
    assert trainer.args.vllm_max_model_length == longest_prompt(free) + 24


def test_other_stages_train_on_the_servers_nodes_too(paper, monkeypatch):
    monkeypatch.setattr(ranks, "allocated", lambda: [f"n{i}" for i in range(1, 9)])
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    alone, served = ranks.world(paper), ranks.world(paper, served=True)
    assert (alone.size, served.size, served.servers) == (64, 32, ["n5", "n6", "n7", "n8"])
    assert dataclasses.replace(alone, hosts=[]) == dataclasses.replace(served, hosts=[], servers=[])
    assert alone.port == ranks.job_port("77") == 10_385


def test_an_allocation_that_is_too_small_is_refused(paper, monkeypatch):
    monkeypatch.setattr(ranks, "allocated", lambda: ["n1", "n2"])
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    with pytest.raises(RunError, match="nodes = 8, and Slurm job 77 has 2: n1, n2"):
        ranks.world(paper)
