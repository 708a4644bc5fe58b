"""Whether a recipe can run, told before a job is submitted or a weight is loaded: one table of checks.

`lwz doctor RECIPE` shows all of them. A stage looks at the machine that it is on, and the papermill engine at what the profile
asks for: there the GPUs are on other nodes. Memory is that of `lwzlib.cluster.estimate`. No check loads weights, or needs
the network. The paper says nothing of its software.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from lwzlib.base import models
from lwzlib.base.kit import ModelError
from lwzlib.base.recipe import Recipe, RecipeError
from lwzlib.base.rows import DataError, RunError
from lwzlib.cluster.estimate import GIB, GPUS, Gpu, make_plan, problems
from lwzlib.cluster.profile import Profile, load_profile
from lwzlib.endpoints.llm import LLMError
from lwzlib.method.rewards import RewardError
from lwzlib.method.writing_rm import is_public
from lwzlib.pipeline import ranks, vllm_servers
from lwzlib.pipeline.inputs import queries_of_recipe
from lwzlib.pipeline.stages import STAGES, places

_ALONE = ("inline", "subprocess")
_NO_MODEL = ("corpus", "pack")  # stages that load no weights
_INSTALL = "pip install -e '.[gpu]' (Linux, GPU)"
_TRACKERS = dict.fromkeys(("tensorboard", "trackio"), "pip install -e '.[trackers]'") | {"wandb": "pip install wandb"}
_PARSE = """
import json, sys
from vllm.entrypoints.cli.serve import FlexibleArgumentParser, make_arg_parser
for arguments in json.load(sys.stdin):
    make_arg_parser(FlexibleArgumentParser()).parse_args(arguments)"""


class Place(NamedTuple):
    """Where a recipe would run: this machine, or the nodes that a profile asks for."""

    gpus: int  # that a process sees
    gpu: Gpu | None  # its kind; None: not known
    nodes: int | None = None  # None: not looked at
    here: bool = True
    same_python: bool = True  # its packages are those of this process
    spreads: bool = True  # whether the recipe's processes share the node, or one has it to itself
    stage: str = ""  # the one that is due; "": all


def here(spreads: bool = True) -> Place:
    """This machine. To be called where CUDA may be initialised: never in a notebook's process."""
    import torch

    gpus = torch.cuda.device_count()
    if not gpus:
        return Place(0, None, spreads=spreads)
    card = torch.cuda.get_device_properties(0)
    return Place(gpus, Gpu(card.name, card.total_memory / GIB, float("nan"), float("nan")), spreads=spreads)


def asked_of(site: Profile) -> Place:
    """The nodes that a profile asks for."""
    return Place(site.gpus_per_node, GPUS[site.gpu] if site.gpu else None, site.nodes, here=False,
                 same_python=not (site.container or site.python))


def place_of(recipe: Recipe) -> Place:
    """This machine; for launch: slurm, outside a job, the nodes of the profile. Raises ClusterError for a wrong profile."""
    return asked_of(load_profile()) if recipe.launch == "slurm" and "SLURM_JOB_ID" not in os.environ else here()


def _packages(recipe: Recipe, place: Place) -> str | None:
    loras = (recipe.grpo.lora, recipe.sft.lora, recipe.writing_rm.lora, recipe.cold_start.lora)
    wanted = {"vllm": recipe.vllm.mode != "none", "deepspeed": recipe.distributed.zero > 0,
              "peft": any(lora.rank for lora in loras)} | dict.fromkeys(recipe.tracking.report_to, True)
    if not place.same_python or not any(wanted.values()):
        return None
    if missing := [name for name, is_wanted in wanted.items() if is_wanted and not find_spec(name)]:
        extras = dict.fromkeys(_TRACKERS.get(name, _INSTALL) for name in missing)
        return f"not installed: {', '.join(missing)}: {'; '.join(extras)}"
    if recipe.vllm.mode != "none" and not shutil.which(vllm_servers.program()):
        return f"the program vllm is neither on PATH nor in {Path(sys.executable).parent}: {_INSTALL}"
    return ""


def _trl(recipe: Recipe, place: Place) -> str | None:
    fields = dict.fromkeys(field for arm in recipe.arms for field in recipe.for_arm(arm).grpo.trl)
    if not fields or not place.same_python:
        return None
    from trl import GRPOConfig

    unknown = [field for field in fields if field not in GRPOConfig.__dataclass_fields__]
    return f"the TRL that is installed has no {', '.join(unknown)}, which grpo.trl sets" if unknown else ""


def _attention(recipe: Recipe, place: Place) -> str | None:
    name = recipe.model.attention
    if not place.same_python:
        return None
    if not name.startswith("flash"):
        return ""
    from transformers.utils import is_kernels_available

    why = _refused_attention(name) if place.here else "" if find_spec("flash_attn") or is_kernels_available() else (
        "neither kernels nor flash-attn is installed.")
    return f"model.attention = {name!r} cannot load: {why} {models.FLASH_NEEDS}" if why else ""


def _refused_attention(name: str) -> str:
    """What transformers says against it on this machine, where it builds a model of no weights with it; "" if nothing."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    small = LlamaConfig(vocab_size=8, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1)
    try:
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(small, attn_implementation=name, dtype=torch.bfloat16)
    except ImportError as error:
        return str(error).splitlines()[0]
    return ""


def _gpus(recipe: Recipe, place: Place) -> str | None:
    where, wanting = recipe.distributed, _wanting_gpus(recipe)
    if not place.gpus:  # a CPU does for the others; of a profile without a number of GPUs nothing is known
        return f"no CUDA GPU, and {wanting} wants one" if wanting and place.here else None
    if recipe.launch in _ALONE and place.gpus > 1:
        return (f"launch: {recipe.launch} is one process and sees {place.gpus} GPUs, which TRL refuses: set "
                "CUDA_VISIBLE_DEVICES=0, or gpus_per_node=1 in the profile")
    for number, wanted, what, key in ((place.nodes, where.nodes, "nodes", "nodes"),
                                      (place.gpus, where.processes, "processes a node", "gpus_per_node")):
        if number is not None and number < wanted and place.spreads:
            gives = f"{number} GPUs are visible" if place.here else f"the profile gives {key}={number}"
            return f"it wants {wanted} {what}, and {gives}: change either"
    return ""


def _wanting_gpus(recipe: Recipe) -> str:
    """The quantity that makes a recipe one for GPUs; "" if a CPU will do."""
    if recipe.vllm.mode != "none":
        return f"vllm.mode = {recipe.vllm.mode}"
    return "model.attention = flash_attention_2" if recipe.model.attention == "flash_attention_2" else ""


def _memory(recipe: Recipe, place: Place) -> str | None:
    if not place.gpu:
        return None
    try:
        plan = make_plan(recipe, place.gpu)
    except (RecipeError, ModelError):  # a model of unknown shape, or one that only the nodes have: nothing to compute with
        return None
    if place.stage:
        return "; ".join(problems(plan, place.stage)) if place.stage in plan.stages else None  # others only write
    return "; ".join(problems(plan))


def _tokenizer(recipe: Recipe, place: Place) -> str | None:
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from transformers import AutoTokenizer

    judge = [recipe.writing_rm.model] * any(stage == "writing-rm" for _, stage in places(recipe))
    for name in dict.fromkeys((recipe.model.name, *judge)):
        try:
            tokenizer = AutoTokenizer.from_pretrained(models.resolve(name), local_files_only=True,
                                                      trust_remote_code=recipe.model.trust_remote_code)
        except ModelError as error:
            return str(error) if place.here else None  # the nodes may have it
        except OSError:  # on the hub, and not here yet
            if HF_HUB_OFFLINE and place.here:
                return f"{name} is not in the hub's cache on this machine, and HF_HUB_OFFLINE is set"
            return None
        if tokenizer.eos_token_id is None:
            return f"the tokenizer of {name} has no end of text (eos_token): nothing would stop a completion, or pad it"
        if recipe.model.frame == "chat" and not tokenizer.chat_template:
            return f"the tokenizer of {name} has no chat template: give model.frame=plain"
    return ""


def _judge(recipe: Recipe, place: Place) -> str | None:
    changed = [recipe.for_arm(name) for name in recipe.arms]
    judged = {arm.reward.writing.model_dump_json(): arm for arm in changed if arm.reward.weights.writing}
    try:
        looked = [_look_at_judge(arm, place) for arm in judged.values()]
    except (RewardError, DataError, LLMError, ModelError) as error:
        return str(error)
    return "" if any(looked) else None


def _look_at_judge(arm: Recipe, place: Place) -> bool:
    """Whether there was something to look at. Raises an error that says why the judge of an arm cannot judge."""
    writing = arm.reward.writing
    if arm.reward.by_language_model:
        from lwzlib.evaluate.judges import judge_of

        judge = judge_of(arm, Path())
        judge.check_queries([query.query for query in queries_of_recipe(arm)])
        asked = not place.stage or "judge" in STAGES[place.stage].needs  # other stages can do without it
        if place.here and asked:  # a stage waits for a server that still loads; the doctor does not
            judge.check_address(writing.patience_s if place.stage else min(5, writing.patience_s))
        return True
    if is_public(arm) and place.here:
        from lwzlib.evaluate.judge_quality import public_info

        public_info(writing.model)
        return True
    return False


def _git(recipe: Recipe, place: Place) -> str | None:
    return "" if shutil.which("git") else "git is not installed: results will not name their commit"


def _compiler(recipe: Recipe, place: Place) -> str | None:
    if not (place.here and place.gpus):
        return None
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton wants a C compiler, and there is no gcc or clang: apt-get install gcc"
    return "" if header.is_file() else f"Triton wants Python.h, and there is no {header}: apt-get install python3-dev"


def _slurm(recipe: Recipe, place: Place) -> str | None:
    programs = ("srun", "scontrol") if place.here else ("sbatch", "srun", "scontrol", "scancel", "squeue", "sinfo")
    if recipe.launch != "slurm":
        return None
    missing = [program for program in programs if not shutil.which(program)]
    return f"no {', '.join(missing)}: start from a login node of the cluster" if missing else ""


def _vllm_flags(recipe: Recipe, place: Place) -> str | None:
    if recipe.vllm.mode == "none" or not place.same_python or not find_spec("vllm"):
        return None
    at = ranks.World(["train"], recipe.distributed.processes, 10_000, ["serve0", "serve1"],
                     reached_at={"serve0": ("10.0.0.1", "eth0")})
    commands = [vllm_servers.commands(recipe, at, recipe.model.name, 1024, *what) for what in (
        (True,), (False,), (False, vllm_servers.scores("an identity")))]
    return refused_flags([command[2:] for of_servers in commands for command in of_servers],
                         sys.executable)


def refused_flags(arguments: list[list[str]], python: str | Path) -> str | None:
    """Why vLLM's own parser, in the environment of `python`, refuses one of these lists of arguments of `vllm serve`; "" if it
    takes them all, None where it cannot be asked (vLLM for CUDA finds no GPU on a login node)."""
    asked = subprocess.run([python, "-c", _PARSE], input=json.dumps(arguments), capture_output=True, text=True)
    if asked.returncode not in (0, 2):  # 2: argparse
        return None
    return f"vllm serve: {asked.stderr.strip().splitlines()[-1].partition('error: ')[2]}" if asked.returncode else ""


CHECKS: dict[str, Callable[[Recipe, Place], str | None]] = {  # "": it can; None: nothing to look at
    "packages": _packages, "TRL": _trl, "attention": _attention, "GPUs": _gpus, "memory": _memory, "tokenizer": _tokenizer,
    "judge": _judge, "git": _git, "C compiler": _compiler, "Slurm": _slurm, "flags of vllm serve": _vllm_flags}
HARMLESS = ("git",)  # what it says does not keep a recipe from running
_SUBMITTED = ("packages", "TRL", "attention", "GPUs", "memory", "tokenizer", "judge", "flags of vllm serve")  # elsewhere, too
_STARTED = ("packages", "TRL", "attention", "GPUs", "judge", "C compiler")  # soon done: each rank looks


def reasons(recipe: Recipe, place: Place, names: Iterable[str] = _SUBMITTED) -> list[str]:
    """Why the recipe cannot run there; empty if it can, as far as these checks tell."""
    return [reason for name in names if (reason := CHECKS[name](recipe, place))]


def check_stage(stage: str, recipe: Recipe) -> None:
    """Raise RunError, with all reasons, if this machine cannot do a stage that loads weights; memory is an estimate from above,
    so of it there is a warning. In the process that does the stage."""
    if stage in _NO_MODEL:
        return
    place = here(STAGES[stage].spreads)._replace(stage=stage)
    if why := reasons(recipe, place, _STARTED):
        raise RunError(f"recipe {recipe.name} cannot run here: {'; '.join(why)} (`lwz doctor RECIPE` shows all checks)")
    if too_little := _memory(recipe, place):
        print(f"memory may not suffice, `lwz estimate` says: {too_little}", flush=True)
