"""What every recipe hands to TRL, DeepSpeed and vLLM, built by their own classes and read by their own parsers: a name that a
new version does not know fails here, not on a GPU. No model is loaded."""

import importlib.util
import inspect
import json
import os
from types import SimpleNamespace

import pytest
import vllm_cpu
from trl import GRPOConfig, RewardConfig, SFTConfig
from trl.trainer import grpo_trainer

from lwzlib.base import parallel, trainers
from lwzlib.base.paths import CLUSTER_JOBS
from lwzlib.base.recipe import load_recipe, presets
from lwzlib.base.run_folder import Run
from lwzlib.cluster import readiness
from lwzlib.cluster.readiness import refused_flags
from lwzlib.endpoints import serve_rm
from lwzlib.method import cold_start, grpo, pretrain, sft, train_writing_rm
from lwzlib.pipeline import ranks, vllm_servers

REWARDS = ["length", "writing", "format"]
ARMS = [(name, arm) for name in presets() for arm in load_recipe(name).arms]
needs_deepspeed = pytest.mark.skipif(
    "LWZ_REQUIRE_DEEPSPEED" not in os.environ and not importlib.util.find_spec("deepspeed"),
    reason="needs deepspeed: `make zero`")


@pytest.fixture
def served(monkeypatch):
    """The environment of a rank whose servers answer."""
    monkeypatch.setenv(parallel.URL, "http://node3:10003")
    monkeypatch.setenv(parallel._PORT, "10002")


def run_of(recipe, folder):
    return Run(folder / "stage", recipe, 0, ("model",), {})


@pytest.mark.parametrize(("name", "arm"), ARMS)
def test_trl_takes_what_grpo_hands_it(name, arm, served, tmp_path):
    recipe = load_recipe(name).for_arm(arm)
    made = grpo.config(recipe, run_of(recipe, tmp_path), REWARDS)
    assert isinstance(made, GRPOConfig) and made.num_generations == recipe.grpo.group_size
    assert made.use_vllm == (recipe.vllm.mode != "none")
    assert made.generation_batch_size * made.world_size == recipe.grpo.group_size * recipe.grpo.queries_per_step


@pytest.mark.parametrize("mode", ["none", "colocate", "server"])
def test_trl_takes_every_way_to_vllm(mode, served, tmp_path):
    more = {"server": "launch=slurm distributed.nodes=2 vllm.nodes=1"}.get(mode, "")
    recipe = load_recipe("gpu", f"{more} vllm.mode={mode}")
    made = grpo.config(recipe, run_of(recipe, tmp_path), REWARDS)
    assert made.use_vllm == (mode != "none") and (mode == "none" or made.vllm_mode == mode)


class Built(Exception):
    """Carries the configuration that a stage has built, out of the stage."""


def stage_config(monkeypatch, module, name, do):
    """The configuration `name` that a stage of `module` builds; the stage goes no further."""
    real = getattr(module, name)

    def build(**arguments):
        raise Built(real(**arguments))

    monkeypatch.setattr(module, name, build)
    with pytest.raises(Built) as built:
        do()
    return built.value.args[0]


@pytest.mark.parametrize("name", presets())
def test_trl_takes_what_the_other_stages_hand_it(name, tmp_path, monkeypatch):
    recipe = load_recipe(name)
    run = run_of(recipe, tmp_path)
    monkeypatch.setattr(pretrain, "concatenate_datasets", lambda _: [])  # no shards
    monkeypatch.setattr(cold_start.trainers, "load_policy", lambda *_: (None, None))  # loaded before the others
    monkeypatch.setattr(cold_start, "_documents", lambda *_: [{"text": "x"}])
    stages = {"pretrain": (pretrain, "SFTConfig", lambda: pretrain.pretrain(recipe, run, "", tmp_path, tmp_path)),
              "sft": (sft, "SFTConfig", lambda: sft.train_sft(recipe, run, "sft", "", list)),
              "cold_start": (cold_start, "SFTConfig", lambda: cold_start.cold_start(recipe, run)),
              "writing_rm": (train_writing_rm, "RewardConfig", lambda: train_writing_rm.train_rm(recipe, run, None))}
    trained = {stage: stage_config(monkeypatch, *how) for stage, how in stages.items()}
    kinds = {stage: type(made) for stage, made in trained.items()}
    assert kinds == dict.fromkeys(stages, SFTConfig) | {"writing_rm": RewardConfig}
    for stage, made in trained.items():
        assert made.learning_rate == getattr(recipe, stage).learning_rate


def zero_configs():
    """DeepSpeed's configurations: those of recipes that shard, of each way to offload, and of the files for other launchers."""
    paper = {f"paper offload={offload}": parallel.deepspeed_config(load_recipe("paper", f"distributed.offload={offload}"))
             for offload in ("none", "optimizer", "all")}
    recipes = {name: config for name in presets() if (config := parallel.deepspeed_config(load_recipe(name)))}
    return paper | recipes | {path.name: json.loads(path.read_text()) for path in CLUSTER_JOBS.glob("deepspeed/*.json")}


@needs_deepspeed
@pytest.mark.parametrize("name", zero_configs())
def test_deepspeed_takes_what_transformers_makes_of_its_configuration(name, tmp_path):
    from deepspeed.runtime.config import DeepSpeedConfig
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    config = HfTrainerDeepSpeedConfig(zero_configs()[name])
    args = GRPOConfig(str(tmp_path), use_cpu=True, bf16=config.is_true("bf16.enabled"))
    config.trainer_config_process(args)
    config.trainer_config_finalize(args, SimpleNamespace(config=SimpleNamespace(hidden_size=64)), 10)
    assert "auto" not in json.dumps(config.config)
    taken = DeepSpeedConfig(config.config)
    assert taken.zero_optimization_stage == config.config["zero_optimization"]["stage"]
    assert taken.train_batch_size == args.per_device_train_batch_size * args.gradient_accumulation_steps


@needs_deepspeed
def test_deepspeed_refuses_a_name_that_it_does_not_know():
    from deepspeed.runtime.config import DeepSpeedConfig

    config = {"train_batch_size": 1, "zero_optimization": {"stage": 3, "stage3_gather_weights_on_save": True}}
    with pytest.raises(ValueError, match="stage3_gather_weights_on_save"):
        DeepSpeedConfig(config)


@pytest.fixture
def reward_servers(tmp_path, monkeypatch):
    """Arguments of the Writing RM's server, for each recipe, with a token."""
    (tmp_path / "writing_rm.json").write_text(json.dumps({"identity": "0123abcd", "max_tokens": 512}))
    monkeypatch.setattr(serve_rm, "find_spec", lambda name: True)
    monkeypatch.setenv("LWZ_RM_TOKEN", "s3cret")
    return [serve_rm.serve_command(tmp_path, load_recipe(name), "127.0.0.1", 8017, "", []) for name in presets()]


@vllm_cpu.needed
def test_vllm_takes_what_its_servers_are_started_with(reward_servers, monkeypatch):
    python = vllm_cpu.make()
    arguments = [command[3:] for command in reward_servers]
    for name in presets():
        if (recipe := load_recipe(name)).vllm.mode == "server":
            at = ranks.World(["n1"], recipe.distributed.processes, 10_000, ["n2", "n3"],
                             reached_at={"n2": ("10.0.0.2", "eth0")})
            arguments += [command[2:] for trains in (True, False)
                          for command in vllm_servers.commands(recipe, at, recipe.model.name, 1024, trains)]
    assert len(arguments) >= len(presets()) + 4
    assert refused_flags(arguments, python) == ""
    assert refused_flags([*arguments, ["m", "--tensor-paralel", "2"]], python).startswith(
        "vllm serve: unrecognized arguments: --tensor-paralel")
    module = reward_servers[0][2]
    assert list(vllm_cpu.FOLDER.glob(f"lib/*/site-packages/{module.replace('.', '/')}.py")), f"vLLM has no module {module}"


@vllm_cpu.needed
def test_the_doctor_asks_the_installed_vllm(monkeypatch):
    monkeypatch.setattr(readiness.sys, "executable", str(vllm_cpu.make()))
    monkeypatch.setattr(readiness, "find_spec", lambda name: True)
    look, paper, place = readiness.CHECKS["flags of vllm serve"], load_recipe("paper"), readiness.Place(8, None)
    assert look(load_recipe("nano"), place) is None and look(load_recipe("gpu"), place) == look(paper, place) == ""
    monkeypatch.setattr(vllm_servers, "_TRAINS", ["--generation-confg", "vllm"])
    assert look(paper, place).startswith("vllm serve: unrecognized arguments: --generation-confg")


def test_trl_logs_what_our_rows_read():
    source = inspect.getsource(grpo_trainer)
    named = [name for name in trainers.GRPO_COLUMNS.values() if "/" in name and not name.startswith("rewards/")]
    assert "sampling/importance_sampling_ratio/mean" in named and all(f'"{name}"' in source for name in named)


def test_the_kl_penalty_is_the_classic_one_and_vllms_correction_is_by_token(tmp_path):
    """TRL's own defaults weigh the penalty by the ratio, and a completion by the product of its tokens' ratios."""
    recipe = load_recipe("paper", "vllm.mode=none vllm.nodes=0 grpo.kl_beta=0.04")
    ours, theirs = grpo.config(recipe, run_of(recipe, tmp_path), REWARDS), GRPOConfig(str(tmp_path), use_cpu=True, bf16=False)
    assert (ours.beta, ours.use_bias_correction_kl, ours.vllm_importance_sampling_mode) == (0.04, False, "token_truncate")
    assert (theirs.use_bias_correction_kl, theirs.vllm_importance_sampling_mode) == (True, "sequence_mask"), "else say it less"
