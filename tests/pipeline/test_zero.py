"""DeepSpeed's ZeRO over two processes: they learn what one learns, in bfloat16 too, and load what plain transformers loads."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from smoke_runs import ARM, COMMON, same, trained, weights

from lwzlib.base import models
from lwzlib.base.recipe import load_recipe
from lwzlib.cluster import disk
from lwzlib.cluster.estimate import GPUS, make_plan
from lwzlib.method import rewards
from lwzlib.method.queries import load_queries
from lwzlib.pipeline import launch
from lwzlib.pipeline.stages import stage_run

TWO = ["launch=torchrun", "distributed.processes=2", "grpo.micro_batch_completions=2"]

pytestmark = pytest.mark.skipif(
    "LWZ_REQUIRE_DEEPSPEED" not in os.environ and not (importlib.util.find_spec("deepspeed") and shutil.which("g++")),
    reason="needs deepspeed and a C++ compiler: `make zero`")


@pytest.mark.parametrize("zero", [2, 3])
def test_zero_learns_what_one_process_learns(alone, rowwise, tmp_path, zero):
    run = trained(tmp_path, TWO, [f"distributed.zero={zero}"])
    same(run, alone)
    shards = list((run.folder / "checkpoints" / run.status["checkpoint"]).rglob("zero_pp_rank_1*_optim_states.pt"))
    assert shards, "rank 1 has no shard: DeepSpeed did not engage"


def test_zero_learns_with_a_judge_that_zero_trained(smoke, tmp_path):
    """One process makes its pairs with a whole model; beside a sharded policy it is sharded, and says what it says whole."""
    made = load_recipe("smoke", TWO, ["distributed.zero=3", "cold_start.queries=0", "writing_rm.batch_pairs=2", "grpo.steps=2",
                                      "grpo.kept_completions_per_step=100"])
    run = launch.launch("grpo", made, tmp_path, 0, ARM)
    judge = stage_run("writing-rm", made, tmp_path, 0)
    assert run.finished and judge.finished and len(judge.rows("scores")) == len(
        stage_run("pairs", made, tmp_path, 0).rows("pairs_heldout"))
    alone = rewards.WritingReward(str(judge.folder / "model"), made.model.dtype, made.model.attention)
    rows, queries = run.rows("completions"), {q.id: q.query for q in load_queries(made.data.train, made.data.languages)}
    expected = alone([row["completion"] for row in rows], ["think"] * len(rows), [queries[row["id"]] for row in rows])
    assert len(rows) == 2 * made.grpo.group_size * made.grpo.queries_per_step and len(set(expected)) > 1
    assert [row["writing"] for row in rows] == pytest.approx(expected, abs=1e-4)


LOADS = """
import json, os, torch
from accelerate import PartialState
from transformers.integrations import HfDeepSpeedConfig
from lwzlib.base import fast_cpu, models
from deepspeed import init_distributed

fast_cpu.computed_in = lambda dtype: dtype  # also on a CPU without a bfloat16 product
os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
init_distributed(dist_backend="gloo", verbose=False)
config = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}, "bf16": {"enabled": True}, "train_micro_batch_size_per_gpu": 1})
with models.unsharded():
    plain, _ = models.load_model("kit:tiny", "bfloat16", "eager")
moves, move = [], torch.nn.Module.to
torch.nn.Module.to = lambda self, *where, **more: moves.append(str(where)) or move(self, *where, **more)
sharded, _ = models.load_model("kit:tiny", "bfloat16", "eager")
names = ("inv_freq", "original_inv_freq")
same = [torch.equal(getattr(plain.model.rotary_emb, name), getattr(sharded.model.rotary_emb, name)) for name in names]
print(json.dumps({"same": same, "dtype": str(sharded.model.rotary_emb.inv_freq.dtype), "moves": moves,
                  "sharded": all(hasattr(weight, "ds_id") for weight in sharded.parameters()),
                  "device": str(models.input_device(sharded))}))
"""


def test_zero_3_loads_the_rotations_of_a_plain_model(smoke):
    """DeepSpeed alone makes them bfloat16. And nothing that ZeRO has placed is moved."""
    env = os.environ | {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29471"}
    done = subprocess.run([sys.executable, "-c", LOADS], env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "same": [True, True], "dtype": "torch.float32", "moves": [], "sharded": True, "device": "cpu"}


ACCUMULATES = """
import os, sys, torch, deepspeed
from deepspeed.utils import safe_get_full_grad
from lwzlib.base.parallel import deepspeed_config
from lwzlib.base.recipe import load_recipe

os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
deepspeed.init_distributed(dist_backend="gloo", verbose=False)
given = deepspeed_config(load_recipe("paper", ["distributed.zero=" + sys.argv[1]]))
zero = {name: value for name, value in given["zero_optimization"].items() if value != "auto"}
config = {name: value for name, value in given.items() if value != "auto"} | {
    "zero_optimization": zero, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 257}
layer = torch.nn.Linear(1, 1, bias=False)
engine, *_ = deepspeed.initialize(model=layer, optimizer=torch.optim.AdamW(layer.parameters()), config=config)
for value in [1.0] + 256 * [1 / 512]:
    engine.backward(engine(torch.tensor([[value]], dtype=torch.bfloat16)).sum())
    if engine.is_gradient_accumulation_boundary():
        print(safe_get_full_grad(next(layer.parameters())).item() * 257)
    engine.step()
"""


@pytest.mark.parametrize("zero", ["2", "3"])
def test_small_gradients_of_later_micro_batches_count(zero):
    """In bfloat16 1 + 1/512 is 1: a sum of 1 and 256 such gradients would be 1, and is 1.5."""
    env = os.environ | {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29472"}
    done = subprocess.run([sys.executable, "-c", ACCUMULATES, zero], env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout.splitlines()[-1]) == pytest.approx(1.5, rel=0.02)


BFLOAT16 = ["model.dtype=bfloat16", "distributed.zero=3", "grpo.gradient_checkpointing=true"]


def test_zero_3_trains_grpo_in_bfloat16(smoke, tmp_path):
    run = trained(tmp_path, TWO, BFLOAT16, ["grpo.micro_batch_completions=1"])
    written, start = weights(run), load_file(f"{models.resolve('kit:tiny')}/model.safetensors")
    assert [row["step"] for row in run.rows()] == [1, 2, 3, 4]
    assert {value.dtype for value in written.values()} == {torch.bfloat16}
    assert max((value.float() - start[name]).abs().max().item() for name, value in written.items()) > 1e-3
    checkpoint = run.folder / "checkpoints" / run.status["checkpoint"]
    saved = [*checkpoint.glob("*.safetensors"), *checkpoint.glob("*/*optim_states.pt")]
    expected = disk.checkpoint_gb(make_plan(run.recipe, GPUS["h100"])).value * 1e9
    assert sum(file.stat().st_size for file in saved) == pytest.approx(expected, rel=0.05)


def test_zero_3_pretrains_in_bfloat16(smoke, tmp_path):
    """Four sequences a step on two processes are two micro-batches; the perplexity falls as in one process."""
    asked = [*COMMON, "pretrain.cot_token_fraction=0.0", "pretrain.tokens=4000"]
    arm = "continual-pretrain-think"
    sharded, alone = (launch.launch("pretrain", load_recipe("smoke", asked, more), tmp_path / name, 0, arm)
                      for name, more in (("sharded", [*TWO, *BFLOAT16]), ("alone", [])))
    ours, theirs = ([row["perplexity"] for row in run.rows("perplexity")] for run in (sharded, alone))
    assert ours == pytest.approx(theirs, rel=0.03) and ours[2] < ours[0] and len(ours) == 4
