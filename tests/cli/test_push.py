"""`lwz push` against a stand-in for the hub: what goes there, what stays here, and what is said when it is refused."""

import os
import subprocess
import sys

import fake_hub
import pytest
from huggingface_hub import ModelCard

from lwzlib.base import kit
from lwzlib.base.recipe import load_recipe
from lwzlib.pipeline.stages import stage_run

ARM = "base-think"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """An arm whose model is the tiny one, with files beside the weights that are nobody else's business."""
    made = stage_run("grpo", load_recipe("smoke", "reward.weights.writing=0.0"), tmp_path_factory.mktemp("run"), 0, ARM)
    with made.work():
        model = made.folder / "model"
        model.mkdir()
        for file in kit.prepare(kit.TINY).iterdir():
            if file.name != "sha256.json":
                (model / file.name).write_bytes(file.read_bytes())
        for name in ("optimizer.pt", "rows.jsonl", "training_args.bin", "notes.md", ".hidden.json"):
            (model / name).write_text("ours")
    return made


@pytest.fixture
def hub():
    with fake_hub.running() as running:
        yield running


def push(hub, folder, *words, answer="", **env):
    settings = {name: value for name, value in os.environ.items() if name not in ("HF_HUB_OFFLINE", "HF_TOKEN")}
    settings |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": fake_hub.TOKEN, "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1",
                 "HF_HOME": str(folder / "home")} | env
    done = subprocess.run([sys.executable, "-m", "lwzlib.cli.main", "push", str(folder), *words], input=answer, env=settings,
                          capture_output=True, text=True)
    assert fake_hub.TOKEN not in done.stdout + done.stderr
    return done


def test_model_and_card_go_and_nothing_else(run, hub):
    root, model = run.folder.parent.parent, run.folder / "model"
    refused = push(hub, root, "--arm", ARM, "--to", "ada/nano", answer="n\n")
    assert refused.returncode == 1 and not hub.repositories
    assert "a PUBLIC ada/nano?" in refused.stdout and "stays here: notes.md, optimizer.pt, rows.jsonl" in refused.stdout
    done = push(hub, root, "--arm", ARM, "--to", "ada/nano", "--private", answer="y\n")
    assert done.returncode == 0, done.stderr
    assert f"done: {hub.url}/ada/nano/commit/" in done.stdout
    sent = hub.files["ada/nano"]
    assert sent == {name: (model / name).read_bytes() for name in (
        "README.md", "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json")}
    assert list(hub.blobs.values()) == [sent["model.safetensors"]], "weights by LFS"
    assert hub.repositories["ada/nano"]["visibility"] == "private" and hub.tokens == {f"Bearer {fake_hub.TOKEN}"}
    card = ModelCard(sent["README.md"].decode())
    assert "name = 'ada/nano'" in card.text and card.data.pipeline_tag == "text-generation"


@pytest.mark.parametrize(("what", "status", "said"), [
    ("create", 401, "the token is not valid there"), ("create", 403, "the token may not write there"),
    ("commit", 403, "the token may not write there"), ("commit", 409, "somebody else changes that repository")])
def test_a_refusal_is_one_line_without_the_token(run, hub, what, status, said):
    hub.refuses[what] = status
    done = push(hub, run.folder.parent.parent, "--arm", ARM, "--to", "ada/nano", "--yes")
    assert done.returncode == 1 and not hub.files
    assert done.stderr.startswith("lwz: ") and done.stderr.count("\n") == 1
    assert f"({status} " in done.stderr and said in done.stderr and "Bearer ***" in done.stderr


def test_what_cannot_go_is_told_before_the_hub_is_asked(run, hub, tmp_path):
    root = run.folder.parent.parent
    for words, env, said in (
            (("--to", "ada/nano"), {"HF_TOKEN": ""}, "no token of the hub: set HF_TOKEN, or run `hf auth login`"),
            (("--to", "nano"), {}, "must be user/name"),
            (("--to", "ada/nano"), {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
            (("--to", "ada/nano"), {"HF_ENDPOINT": "http://127.0.0.1:9"}, "cannot be reached")):
        done = push(hub, root, "--arm", ARM, *words, "--yes", **env)
        assert done.returncode == 1 and said in done.stderr and done.stderr.count("\n") == 1, done.stderr
    run.update(state="failed")
    done = push(hub, root, "--arm", ARM, "--to", "ada/nano", "--yes")
    run.update(state="finished")
    assert done.returncode == 1 and "grpo is failed: `lwz run` goes on with it" in done.stderr
    assert not hub.tokens


def test_what_is_to_be_private_does_not_go_where_all_can_see_it(run, hub):
    hub.repositories["ada/nano"] = {"visibility": "public"}
    done = push(hub, run.folder.parent.parent, "--arm", ARM, "--to", "ada/nano", "--yes", "--private")
    assert done.returncode == 1 and "ada/nano is there already, and is public" in done.stderr and not hub.files
