"""The held-out samples of the policy during RL: from snapshots that are the policy, resumed, refused where there are none."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from lwzlib.base import trainers
from lwzlib.base.recipe import load_recipe
from lwzlib.base.rows import RunError
from lwzlib.exhibits.run_tables import held_out_table
from lwzlib.pipeline.stages import run_stage, stage_run

ARM = "base-nothink"
QUICK = "reward.weights.writing=0.0 cold_start.queries=0"


@pytest.mark.parametrize("rank", [0, 2])
def test_a_snapshot_is_the_policy_of_its_step(smoke, tmp_path, rank):
    """Trained for two steps and stopped there, and snapshot after two of four: the learning rate is constant."""
    r = load_recipe("smoke", f"{QUICK} grpo.lora.rank={rank} grpo.lora.targets=[q_proj]")
    run_stage("grpo", r, tmp_path / "four", 0, ARM)
    short = run_stage("grpo", load_recipe("smoke", f"{QUICK} grpo.lora.rank={rank} grpo.lora.targets=[q_proj] grpo.steps=2"),
                      tmp_path / "two", 0, ARM)
    snapshots = tmp_path / "four" / ARM / "grpo" / "snapshots"
    assert [path.name for path in snapshots.iterdir()] == ["2"], "the last step is the model itself"
    assert (snapshots / "2" / "adapter_config.json").exists() == (rank > 0) and not list(snapshots.rglob("*optim*"))
    kept, _ = trainers.load_snapshot(r, snapshots / "2", r.model.name)
    expected = AutoModelForCausalLM.from_pretrained(short, dtype=torch.float32).state_dict()
    started = AutoModelForCausalLM.from_pretrained(run_stage("grpo", r, tmp_path / "four", 0, ARM)).state_dict()
    assert any(not torch.equal(expected[name], started[name]) for name in expected), "the steps between moved it"
    for name, value in kept.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-7, msg=name)


def test_samples_during_rl_resume_and_stand_in_the_held_out_table(smoke, tmp_path):
    r = load_recipe("smoke", f"{QUICK} evaluation.every_steps=1")
    for stage in ("samples-before", "samples-during", "samples-after"):
        run_stage(stage, r, tmp_path, 0, ARM)
    table = held_out_table(tmp_path, during=True)
    assert table.groupby(["phase", "step"], sort=False).size().to_dict() == {
        ("before", 0): 2, ("during", 1): 2, ("during", 2): 2, ("during", 3): 2, ("after", 4): 2}
    assert set(held_out_table(tmp_path).phase) == {"before", "after"}
    run = stage_run("samples-during", r, tmp_path, 0, ARM)
    whole = {step: run.rows(f"samples_{step}") for step in (1, 2, 3)}
    (run.folder / "samples_3.jsonl").unlink()
    run.update(state="interrupted")
    run_stage("samples-during", r, tmp_path, 0, ARM)
    assert {step: run.rows(f"samples_{step}") for step in (1, 2, 3)} == whole


def test_a_policy_that_was_not_kept_is_named(smoke, tmp_path):
    run_stage("grpo", load_recipe("smoke", QUICK), tmp_path, 0, ARM)
    with pytest.raises(RunError, match=r"kept no policy of step 1, 3: it was trained with another evaluation.every_steps"):
        run_stage("samples-during", load_recipe("smoke", f"{QUICK} evaluation.every_steps=1"), tmp_path, 0, ARM)
