"""Real TRL steps: our advantage against TRL's, resumed runs against uninterrupted ones, learning on the real model."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pytest
import torch
from killing import at_step, killed_then_finished
from smoke_runs import COMMON
from transformers import AutoTokenizer
from trl import GRPOTrainer

from lwzlib.base import models
from lwzlib.base.recipe import load_recipe
from lwzlib.base.rows import DataError, RunError
from lwzlib.method.advantage import Fusion
from lwzlib.method.grpo import trainer
from lwzlib.method.text import parse
from lwzlib.pipeline.launch import launch, launch_arm
from lwzlib.pipeline.stages import arm_stages, run_stage, stage_run

ARM = "base-think"


def test_a_stage_that_the_arm_has_not_is_refused(smoke, tmp_path):
    with pytest.raises(RunError, match=r"arm 'sft' has no stage 'grpo'; it has samples-before, sft, samples-after"):
        stage_run("grpo", smoke, tmp_path, 0, "sft")


def test_queries_that_rl_could_not_use_are_named_before_anything_is_trained(smoke, tmp_path):
    rows = [{"id": name, "query": "Why does rain fall?", "word_range": [50, 70]} for name in "ab"]
    (tmp_path / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    r = load_recipe("smoke", {"data.train": str(tmp_path / "few.jsonl"), "grpo.queries_per_step": 3})
    with pytest.raises(DataError, match=r"few.jsonl has 2 queries, and a step takes grpo.queries_per_step = 3"):
        stage_run("cold-start", r, tmp_path, 0)
    alone = r.model_copy(update={"arms": {"sft": r.arms["sft"]}})
    assert stage_run("sft", alone, tmp_path, 0, "sft"), "without GRPO nothing is drawn by the step"
    r = load_recipe("smoke", {"data.train": str(tmp_path / "few.jsonl"), "reward.length.max_words": 70})
    with pytest.raises(DataError, match=r"few.jsonl, query 'a': word_range \[50, 70\] must end below .*max_words = 70"):
        stage_run("cold-start", r, tmp_path, 0)


def comparable(rows):
    return [{key: value for key, value in row.items() if key != "step_s"} for row in rows]


@pytest.fixture
def one_batch(smoke_rm):
    return partial(_one_batch, str(smoke_rm / "writing-rm" / "model"))


def _one_batch(writing_rm, r, tmp_path):
    run = stage_run("grpo", r, tmp_path, 0, ARM)
    run.folder.mkdir(parents=True, exist_ok=True)
    t = trainer(r, run, ARM, r.model.name, writing_rm)
    t.model.train()
    return t, t._generate_and_score_completions(next(iter(t.get_train_dataloader()))), run


def test_sum_mode_gives_trls_own_advantages(smoke, tmp_path, one_batch):
    r = load_recipe("smoke", "reward.weights.writing=0.0 grpo.advantage=sum grpo.sampling.max_new_tokens=60 grpo.group_size=8 "
                             "grpo.micro_batch_completions=8")
    _t, ours, _ = one_batch(r, tmp_path / "ours")
    theirs = {}
    original = GRPOTrainer._generate_and_score_completions

    def keep(self, inputs):
        out = original(self, inputs)
        theirs["advantages"] = out["advantages"].clone()
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GRPOTrainer, "_generate_and_score_completions", keep)
        _, again, _ = one_batch(r, tmp_path / "theirs")
    assert ours["advantages"].abs().max() > 0, "a group without variance cannot show anything"
    torch.testing.assert_close(again["advantages"], ours["advantages"])
    torch.testing.assert_close(theirs["advantages"], ours["advantages"], atol=2e-4, rtol=1e-3)


def test_rows_say_what_was_written_and_scored(smoke, tmp_path, one_batch):
    _t, batch, run = one_batch(smoke, tmp_path)
    rows = run.rows("completions")
    assert len(rows) == smoke.grpo.group_size
    assert [row["completion_tokens"] for row in rows] == batch["completion_mask"].sum(1).tolist()
    np.testing.assert_allclose([row["advantage"] for row in rows], batch["advantages"].numpy(), atol=1e-6)
    assert all(0 <= row["length"] <= 1 and 0 <= row["format"] <= 1 for row in rows)


def test_a_gate_and_a_clip_reach_the_trainer(smoke, tmp_path, one_batch):
    """The tiny model never finds the form: format has partial credit, length is gated, so that format alone decides."""
    r = load_recipe("smoke", "reward.weights.writing=0.0 grpo.advantage=gate grpo.advantage_clip=0.5 grpo.group_size=8 "
                             "grpo.micro_batch_completions=8 grpo.sampling.max_new_tokens=60 grpo.kept_completions_per_step=8")
    _t, batch, run = one_batch(r, tmp_path)
    rows, names = run.rows("completions"), ["length", "format"]
    rewards = np.array([[[row[name] for name in names] for row in rows]])
    texts = [row["completion"] for row in rows]
    np.testing.assert_allclose(batch["advantages"].numpy(), Fusion("gate", 0.5, 5)(rewards, [1, 1], names, texts, "think")[0],
                               atol=1e-6)
    assert (batch["advantages"] == 0).all() == (np.ptp(rewards[0, :, 1]) == 0)


def test_overlong_is_a_reward_like_the_others(smoke, tmp_path):
    r = load_recipe("smoke", COMMON, "reward.weights.overlong=1 reward.overlong.cache_tokens=12 grpo.steps=1 "
                             "samples.sampling.max_new_tokens=120")
    run_stage("grpo", r, tmp_path, 0, ARM)
    run = stage_run("grpo", r, tmp_path, 0, ARM)
    rows, (step,) = run.rows("completions"), run.rows()
    expected = [max(-1, min(0, (108 - row["completion_tokens"]) / 12)) for row in rows]
    assert [row["overlong"] for row in rows] == pytest.approx(expected) and min(expected) == -1
    assert step["overlong"] == pytest.approx(np.mean([row["overlong"] for row in rows]))
    run_stage("samples-after", r, tmp_path, 0, ARM)
    samples = stage_run("samples-after", r, tmp_path, 0, ARM).rows("samples")
    assert all(row["overlong"] == -1 if row["truncated"] else -1 <= row["overlong"] <= 0 for row in samples)


def test_a_plan_that_the_chat_template_opens_counts_as_opened(smoke, tmp_path, one_batch):
    shutil.copytree(models.resolve(smoke.model.name), tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.chat_template = ("{% for m in messages %}{{ m.content }}\n{% endfor %}"
                               "{% if add_generation_prompt %}<think>\n{% endif %}")
    tokenizer.save_pretrained(tmp_path / "model")
    r = load_recipe("smoke", {"model.name": str(tmp_path / "model"), "model.frame": "chat", "reward.weights.writing": 0.0,
                              "reward.format.partial_credit": 0.1})
    _, _, run = one_batch(r, tmp_path / "run")
    rows = run.rows("completions")
    assert rows and all(row["completion"].startswith("<think>\n") for row in rows)
    assert all(row["format"] > 0 for row in rows if row["completion"].count("<think>") == 1)
    assert any(row["think_words"] for row in rows)


def test_a_completion_is_parsed_once_a_step(smoke, tmp_path, one_batch):
    parse.cache_clear()
    rows = one_batch(smoke, tmp_path)[2].rows("completions")
    calls = parse.cache_info()
    assert calls.misses == len({row["completion"] for row in rows})
    assert calls.hits + calls.misses == 4 * len(rows), "three rewards and the trainer's row read each completion"
    most = load_recipe("gpu").grpo
    assert most.group_size * most.queries_per_step <= calls.maxsize, "a step's completions of one process stay"


def test_micro_batches_do_not_change_what_is_learnt(smoke, tmp_path):
    whole = smoke
    halved = load_recipe("smoke", "grpo.micro_batch_completions=2")
    for r, name in ((whole, "whole"), (halved, "halved")):
        run_stage("grpo", r, tmp_path / name, 0, ARM)
    a, b = (stage_run("grpo", r, tmp_path / n, 0, ARM).rows() for r, n in ((whole, "whole"), (halved, "halved")))
    assert [row["length"] for row in a][:1] == [row["length"] for row in b][:1]
    assert a[0]["grad_norm"] == pytest.approx(b[0]["grad_norm"], rel=1e-3, abs=1e-6)


def test_killed_at_random_moments_gives_the_rows_of_an_uninterrupted_run(smoke, tmp_path):
    r = load_recipe("smoke", "launch=subprocess grpo.steps=12 grpo.checkpoint_every_steps=3 grpo.lora.rank=4")
    launch("grpo", r, tmp_path / "whole", 0, ARM)
    moments = map(at_step, sorted(random.Random(7).sample(range(1, 12), 3)))
    run = killed_then_finished("grpo", r, tmp_path / "killed", moments, ARM)
    whole = stage_run("grpo", r, tmp_path / "whole", 0, ARM)
    for name in ("metrics", "completions"):
        assert comparable(run.rows(name)) == comparable(whole.rows(name))
    assert [row["step"] for row in run.rows()] == list(range(1, 13))
    assert any(row["grad_norm"] for row in whole.rows()), "nothing was learnt, so nothing was compared"


def test_ctrl_c_says_how_to_go_on_and_the_next_start_continues(smoke, tmp_path):
    r = load_recipe("smoke", "reward.weights.writing=0.0 grpo.steps=40 grpo.checkpoint_every_steps=2")
    run = stage_run("grpo", r, tmp_path, 0, ARM)
    asked = tmp_path / "asked.yaml"
    asked.write_text(r.model_dump_json())  # JSON is YAML
    command = [sys.executable, "-m", "lwzlib.cli.main", "stage", "grpo", str(asked), "--run-dir", str(tmp_path), "--arm", ARM]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while process.poll() is None and run.status.get("checkpoint_step", 0) < 2:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    said = process.stderr.read().decode()
    assert process.wait() == 130 and "goes on from the last checkpoint" in said
    assert run.status["state"] == "interrupted"
    run_stage("grpo", r, tmp_path, 0, ARM)
    assert [row["step"] for row in run.rows()] == list(range(1, 41))


def test_finished_stage_is_loaded_and_another_recipe_refused(smoke, tmp_path):
    model = run_stage("grpo", smoke, tmp_path, 0, ARM)
    before = (model / "model.safetensors").stat().st_mtime_ns
    assert run_stage("grpo", smoke, tmp_path, 0, ARM) == model
    assert (model / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(RunError, match=r"grpo\.clip_eps was 0\.2, is 0\.3"):
        run_stage("grpo", load_recipe("smoke", "grpo.clip_eps=0.3"), tmp_path, 0, ARM)


def test_launched_stage_ends_with_its_parent(smoke, tmp_path):
    code = f"from lwzlib.base.recipe import load_recipe; from lwzlib.pipeline.launch import launch; " \
           f"launch('grpo', load_recipe('smoke', " \
           f"'launch=subprocess grpo.steps=100000'), {str(tmp_path)!r}, 0, {ARM!r})"
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    run = stage_run("grpo", load_recipe("smoke", "grpo.steps=100000"), tmp_path, 0, ARM)
    deadline = time.monotonic() + 90
    while run.status.get("step", 0) < 1 and time.monotonic() < deadline:
        time.sleep(0.1)
    child = run.status["pid"]
    parent.kill()
    parent.wait()
    while os.path.exists(f"/proc/{child}") and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not os.path.exists(f"/proc/{child}")
    shutil.rmtree(tmp_path, ignore_errors=True)


def test_failed_stage_shows_its_last_lines(smoke, tmp_path):
    r = load_recipe("smoke", "launch=subprocess model.name=/no/such/model")
    with pytest.raises(RunError, match="model folder /no/such/model does not exist"):
        launch("grpo", r, tmp_path, 0, ARM)


def test_stages_of_an_arm_share_a_process_and_only_what_is_missing_is_done(smoke, tmp_path, capfd):
    r = load_recipe("smoke", COMMON, "launch=subprocess grpo.steps=2 evaluation.every_steps=1")
    runs = launch_arm(r, tmp_path, 0, ARM)
    assert list(runs) == ["samples-before", "grpo", "samples-during", "samples-after"]
    assert all(run.finished for run in runs.values())
    assert len({run.status["pid"] for run in runs.values()}) == 1
    (runs["samples-after"].folder / "status.json").unlink()
    capfd.readouterr()
    again = launch_arm(r, tmp_path, 0, ARM)
    assert again["samples-after"].finished and "step 1/2" not in capfd.readouterr().out
    launch_arm(r, tmp_path, 0, ARM)
    assert capfd.readouterr().out.count("already done") == 4


def test_a_later_stage_that_fails_in_the_shared_process_is_named_and_the_others_stay(smoke, tmp_path):
    r = load_recipe("smoke", COMMON, "launch=subprocess grpo.steps=1 evaluation.every_steps=0")
    (tmp_path / ARM / "samples-after").mkdir(parents=True)
    (tmp_path / ARM / "samples-after" / "samples.jsonl").mkdir()  # where rows should go
    with pytest.raises(RunError, match=r"samples\.jsonl"):
        launch_arm(r, tmp_path, 0, ARM)
    states = {stage: stage_run(stage, r, tmp_path, 0, ARM).status.get("state") for stage in arm_stages(r, ARM)}
    assert states == {"samples-before": "finished", "grpo": "finished", "samples-after": "failed"}
