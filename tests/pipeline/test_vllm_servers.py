"""vLLM's commands against what TRL renders itself; servers that answer, are late, or die: a program in vLLM's place."""

import dataclasses
import itertools
import urllib.error
import urllib.request

import pytest

from lwzlib.base.parallel import vllm_arguments
from lwzlib.base.recipe import load_recipe
from lwzlib.base.rows import RunError
from lwzlib.pipeline import ranks, vllm_servers

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


@pytest.fixture
def paper():
    return load_recipe("paper", "distributed.start_s=20")


@pytest.fixture
def vllm(program):
    """A program named vllm; `does` is what it does before it answers."""
    def put(does=""):
        program("vllm", _SERVER.format(does=does))
        return ranks.World(["127.0.0.1"], 8, ranks.world(load_recipe("smoke", "launch=torchrun")).port,
                                 ["127.0.0.1", "second"])
    return put


def answers(at) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{at.port + 3}/health", timeout=2):
            return True
    except (urllib.error.URLError, ConnectionError):
        return False


def test_servers_have_what_trl_imposes(paper, monkeypatch):
    from trl.scripts import vllm_serve

    monkeypatch.setattr(vllm_serve, "is_vllm_available", lambda **_: False)
    at = ranks.World(["n1"], 8, 10_000, ["n2"])
    theirs = vllm_serve.build_command(vllm_serve.ScriptArguments(
        model="m", tensor_parallel_size=4, data_parallel_size=2, host="n2", port=10_003, gpu_memory_utilization=0.9,
        dtype="bfloat16"))
    theirs = theirs[theirs.index("serve") :]
    ours, = vllm_servers.commands(paper, at, "m")
    flags = {flag: value for flag, value in itertools.pairwise(ours) if flag.startswith("--")}
    for flag, value in itertools.pairwise(theirs):
        if flag.startswith("--") and flag not in ("--kv-cache-dtype", "--model-impl", "--uvicorn-log-level"):  # vLLM's defaults
            assert flags[flag] == value


def test_the_nodes_of_vllm_are_one_server_of_many_copies(paper):
    at = ranks.World(["n1", "n2"], 8, 10_000, ["n3", "n4"])
    first, second = vllm_servers.commands(paper, at, "/models/start")
    assert first[:3] == ["vllm", "serve", "/models/start"] and "--headless" not in first
    assert second[-3:] == ["--headless", "--data-parallel-start-rank", "2"] and second[: len(first)] == first
    for flag, value in (("--data-parallel-size", "4"), ("--data-parallel-size-local", "2"), ("--data-parallel-address", "n3"),
                        ("--host", "n3"), ("--port", "10003"), ("--data-parallel-rpc-port", "10004")):
        assert first[first.index(flag) + 1] == value


def test_ranks_hear_where_the_server_is_once_it_answers_and_it_is_stopped(paper, vllm, tmp_path, monkeypatch, capsys):
    at = vllm("time.sleep(1)")
    with vllm_servers.serve(paper, at, tmp_path, "m") as env:
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
            vllm_servers.serve(paper, at, tmp_path, "m"):
        pytest.fail("entered")


def test_a_server_that_does_not_answer_is_not_waited_for_longer_than_the_recipe_says(vllm, tmp_path):
    at = vllm("time.sleep(600)")
    with pytest.raises(RunError, match=r"(?s)within distributed.start_s = 1 s.*loading the model"), \
            vllm_servers.serve(load_recipe("paper", "distributed.start_s=1"), at, tmp_path, "m"):
        pytest.fail("entered")


def test_servers_that_nobody_started_are_missed_at_once(paper, monkeypatch):
    monkeypatch.delenv("LWZ_VLLM_URL", raising=False)
    with pytest.raises(RunError, match="no server was started"):
        vllm_arguments(paper)


def test_trl_takes_the_arguments_of_every_way(paper, smoke, tmp_path, monkeypatch):
    from lwzlib.base.run_folder import Run
    from lwzlib.method import grpo

    monkeypatch.setenv("LWZ_VLLM_URL", "http://n3:10003")
    monkeypatch.setenv("LWZ_VLLM_PORT", "10002")
    for mode, expected in (("none", (False, None)), ("colocate", (True, None)), ("server", (True, "http://n3:10003"))):
        made = smoke.model_copy(update={"vllm": paper.vllm.model_copy(update={"mode": mode, "sleep": True})})
        config = grpo.config(made, Run(tmp_path, made, 0, ("grpo",)), ["length"])
        assert (config.use_vllm, config.vllm_server_base_url) == expected
        assert config.vllm_tensor_parallel_size == (4 if mode == "colocate" else 1)


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
