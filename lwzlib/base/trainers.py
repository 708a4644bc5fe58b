"""Arguments, rows and saved models: what the trainers share."""

import json
import math
import os
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from peft import LoraConfig, PeftModel
from transformers import PrinterCallback, TrainerCallback

from lwzlib.base.fast_cpu import computed_in
from lwzlib.base.models import load_model
from lwzlib.base.parallel import deepspeed_config
from lwzlib.base.processes import Stop, main_process
from lwzlib.base.quantities import Lora
from lwzlib.base.recipe import Recipe
from lwzlib.base.rows import read_json, write_atomic
from lwzlib.base.run_folder import Run
from lwzlib.base.trackers import Trackers

# {our column: the name under which TRL logs it}
GRPO_COLUMNS = {
    "length": "rewards/length/mean", "format": "rewards/format/mean", "writing": "rewards/writing/mean",
    "overlong": "rewards/overlong/mean",
    "think_words": "think_words", "answer_words": "answer_words", "think_tokens": "think_tokens",
    "answer_tokens": "answer_tokens", "completion_tokens": "completion_tokens",
    "answer_words_not_truncated": "answer_words_not_truncated", "truncated": "truncated",
    "groups_without_variance": "groups_without_variance", "advantage_std": "advantage_std", "loss": "loss",
    "entropy": "entropy", "kl": "kl", "clipped": "clip_ratio/region_mean", "grad_norm": "grad_norm",
    "learning_rate": "learning_rate", "logp_difference": "sampling/sampling_logp_difference/mean",
    "importance_ratio": "sampling/importance_sampling_ratio/mean",
    "cut_for_writing": "cut_for_writing", "not_judged": "not_judged", "writing_std": "rewards/writing/std",
}
RM_COLUMNS = {"loss": "loss", "accuracy": "accuracy", "margin": "margin", "learning_rate": "learning_rate"}
SFT_COLUMNS = {"loss": "loss", "tokens": "num_tokens", "learning_rate": "learning_rate"}


def trainer_arguments(recipe: Recipe, run: Run, checkpoint_every_steps: int | None, lora: Lora | None = None) -> dict:
    """Arguments that every trainer here takes; the last two checkpoints are kept, with None there is none. `lora` as in
    `load_trainee`, whose float32 weights compute in the recipe's dtype, by autocast. To be made before the model: ZeRO-3 shards
    as it loads."""
    cpu = not torch.cuda.is_available()
    zero = _zero(recipe)
    autocast = bool(zero) or (_is_whole(lora) and computed_in(recipe.model.dtype) == "bfloat16")
    if cpu:
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"  # else a rank's is cpu:0, for which torch cannot load an optimiser
    if zero and cpu:
        from deepspeed import init_distributed

        init_distributed(dist_backend="gloo", verbose=False)  # else accelerate starts the group itself, and not for DeepSpeed
    saves = ({"save_strategy": "steps", "save_steps": checkpoint_every_steps, "save_total_limit": 2}
             if checkpoint_every_steps else {"save_strategy": "no"})
    return {**saves, "output_dir": str(run.folder / "checkpoints"), "seed": run.seed, "logging_steps": 1, "report_to": "none",
            "disable_tqdm": True, "log_level": "error", "bf16": autocast and recipe.model.dtype == "bfloat16",
            "use_cpu": cpu, "deepspeed": zero, "gradient_checkpointing": recipe.grpo.gradient_checkpointing,
            "ddp_find_unused_parameters": False,
            "ddp_timeout": 7_200}  # seconds that a rank waits for one that writes, judges or saves


def load_policy(recipe: Recipe, name: str, spread: bool = False):
    """(model, tokenizer) of any name, in the recipe's dtype and attention, as `load_model`. Raises ModelError."""
    m = recipe.model
    return load_model(name, m.dtype, m.attention, m.trust_remote_code, spread=spread)


def load_trainee(recipe: Recipe, name: str, lora: Lora | None = None, scorer: bool = False):
    """`load_model` of what is to be trained: all weights, or an adapter of a `lora` rank above 0. All weights are float32,
    unless ZeRO keeps float32 copies of them: in bfloat16, AdamW's small steps are rounded away. Raises ModelError."""
    m = recipe.model
    dtype = "float32" if _is_whole(lora) and not _zero(recipe) else m.dtype
    return load_model(name, dtype, m.attention, m.trust_remote_code, scorer)


def _is_whole(lora: Lora | None) -> bool:
    return not (lora and lora.rank)


def _zero(recipe: Recipe) -> dict | None:
    return deepspeed_config(recipe) if "RANK" in os.environ else None  # a stage that is one process shards nothing


def lora_config(lora: Lora, **more) -> LoraConfig | None:
    """Adapter of a recipe, with `more` of peft's own arguments; None where all weights are trained."""
    return LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=lora.targets, **more) if lora.rank else None


def last_checkpoint(run: Run, *names: str) -> str | None:
    """Path of the last whole checkpoint, None without one; the rows of each file in `names` are cut back to it."""
    status = run.status
    run.rewind(status.get("checkpoint_step", 0), *names)
    return str(run.folder / "checkpoints" / status["checkpoint"]) if "checkpoint" in status else None


class AtBegin(TrainerCallback):
    """Calls `do(model)` when the model lies where it is trained: before, ZeRO-3 has shards of it that nobody can use."""

    def __init__(self, do):
        self.do = do

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """Call `do` before the first step, with the model in eval mode; its own mode comes back."""
        training = model.training
        self.do(model.eval())
        model.train(training)


class Snapshots(TrainerCallback):
    """Keeps the policy every so many steps, to be rated later: the weights that are trained, nothing of the optimiser."""

    def __init__(self, trainer, run: Run, every_steps: int):
        self.trainer, self.run, self.every_steps = trainer, run, every_steps

    def on_step_end(self, args, state, control, **kwargs):
        """Save into `snapshots/<step>`; never the last step, whose model `save_trained` keeps, nor if `every_steps` is 0."""
        if self.every_steps and state.global_step % self.every_steps == 0 and state.global_step < state.max_steps:
            _save_weights(self.trainer.accelerator.unwrap_model(self.trainer.model), self.trainer, self.run,
                          self.run.folder / "snapshots" / str(state.global_step))


def load_snapshot(recipe: Recipe, folder: Path, start: str):
    """(model, tokenizer) of a snapshot; an adapter is merged into the model `start`, on which it was trained."""
    if not (folder / "adapter_config.json").exists():
        return load_policy(recipe, str(folder), spread=True)
    model, tokenizer = load_policy(recipe, start, spread=True)
    return PeftModel.from_pretrained(model, folder).merge_and_unload(), tokenizer


def train_to_end(trainer, checkpoint: str | None = None):
    """Train without the library's own printout (`Rows` shows one line per step) and return the model, with its adapter merged.
    Raises KeyboardInterrupt where `Rows` stopped it, after a checkpoint, because the process was asked to stop."""
    trainer.remove_callback(PrinterCallback)
    Stop.training = True
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    finally:
        Stop.training = False
    if trainer.state.global_step < trainer.state.max_steps:
        raise KeyboardInterrupt
    model = trainer.accelerator.unwrap_model(trainer.model)
    return model.merge_and_unload() if isinstance(model, PeftModel) else model


def save_trained(model, trainer, run: Run, notes: dict[str, dict] | None = None) -> None:
    """Write safetensors under `model/`, whole or not at all, with the trainer's tokenizer, and `notes` as JSON files beside.
    Every process calls it: ZeRO-3 has the weights in shards."""
    scratch, final = run.folder / ".model", run.folder / "model"
    if main_process():
        shutil.rmtree(scratch, ignore_errors=True)
    _save_weights(model, trainer, run, scratch)
    if not main_process():
        return
    for name, content in (notes or {}).items():
        (scratch / name).write_text(json.dumps(content, indent=1))
    shutil.rmtree(final, ignore_errors=True)
    os.rename(scratch, final)


def _save_weights(model, trainer, run: Run, folder: Path) -> None:
    """Write a model, or its adapter, with the tokenizer. Weights are written in the recipe's dtype, and the folder says so:
    vLLM takes the dtype that it finds there."""
    sharded, adapter = trainer.is_deepspeed_enabled and run.recipe.distributed.zero == 3, isinstance(model, PeftModel)
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped) if sharded else {} if adapter else model.state_dict()
    if not main_process():
        return
    trainer.processing_class.save_pretrained(folder)
    if adapter:  # never sharded: `Recipe` refuses it
        return model.save_pretrained(folder)
    dtype, written = run.recipe.model.dtype, {}
    for tensor in weights.values():  # tied weights are one tensor under two names
        written.setdefault(tensor.data_ptr(), tensor.to(getattr(torch, dtype)) if tensor.is_floating_point() else tensor)
    model.save_pretrained(folder, state_dict={name: written[tensor.data_ptr()] for name, tensor in weights.items()})
    config = folder / "config.json"
    write_atomic(config, json.dumps(read_json(config) | {"dtype": dtype}, indent=2))


class Rows(TrainerCallback):
    """Writes one row per step and remembers the last checkpoint that is whole. A row whose step is repeated after a kill
    replaces the old one, because `Run.rewind` cut the file back first.

    Saves by the clock too, and when the process is asked to stop (`processes.Stop`): then a last time, and ends."""

    def __init__(self, run: Run, columns: dict[str, str]):
        self.run, self.columns = run, columns
        self.since, self.tokens, self.saved = time.perf_counter(), 0, time.monotonic()
        self.every_s = 60 * run.recipe.distributed.checkpoint_every_minutes
        self.trackers: Trackers | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        """Open the trackers, in the first process alone, with the rows that a resumed run has already."""
        self.trackers = Trackers(self.run) if state.is_world_process_zero else None

    def on_train_end(self, args, state, control, **kwargs):
        """Close the trackers."""
        if self.trackers:
            self.trackers.close()

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Turn each log with a loss into a row and a printed line, in the first process alone."""
        if not state.is_world_process_zero or "loss" not in logs:
            return
        values = {ours: logs[theirs] for ours, theirs in self.columns.items() if theirs in logs}
        values |= {name: value for name, value in logs.items() if name.startswith(("type/", "advantage_std/"))}
        row = {"step": state.global_step} | {name: _number(value) for name, value in values.items()}
        if "tokens" in row:  # TRL counts them from the start of the process; those of one step are the same after a kill
            row["tokens"], self.tokens = row["tokens"] - self.tokens, row["tokens"]
        now = time.perf_counter()
        row["step_s"], self.since = round(now - self.since, 2), now
        if torch.cuda.is_available():
            row["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)  # with a colocated vLLM's
        self.run.append("metrics", row)
        if self.trackers:
            self.trackers.log(row)
        self.run.update(step=state.global_step, total=state.max_steps)
        shown = "  ".join(f"{name} {row[name]:.2f}" for name in ("length", "writing", "format", "accuracy", "loss")
                          if row.get(name) is not None)
        print(f"{self.run.folder.parent.name}/{self.run.folder.name}  step {state.global_step}/{state.max_steps}  "
              f"{shown}  {row['step_s']:.1f} s", flush=True)

    def on_step_end(self, args, state, control, **kwargs):
        """Tell transformers to save, or to save and stop; all processes set the same."""
        due, stopping = _agreed(0 < self.every_s <= time.monotonic() - self.saved, Stop.asked)
        control.should_save |= due or stopping
        control.should_training_stop |= stopping

    def on_save(self, args, state, control, **kwargs):
        """Name the checkpoint, which is whole now, in `status.json`."""
        self.saved = time.monotonic()
        if state.is_world_process_zero:
            self.run.update(checkpoint=f"checkpoint-{state.global_step}", checkpoint_step=state.global_step)


def means(rows: list[dict], rewards: list[str]) -> dict[str, float | None]:
    """Means over the completions of a batch: lengths, the share of truncated ones, and each reward by type of query; None
    where there is no value. The paper's Fig 2 shows `answer_words_not_truncated`."""
    values = {"answer_words_not_truncated": [row["answer_words"] for row in rows if not row["truncated"]]}
    for name in ("think_words", "answer_words", "think_tokens", "answer_tokens", "completion_tokens", "truncated"):
        values[name] = [row[name] for row in rows]
    for kind in sorted({row["type"] for row in rows}):
        for name in rewards:
            scores = [row[name] for row in rows if row["type"] == kind]
            values[f"type/{kind}/{name}"] = [score for score in scores if not np.isnan(score)]
    return {name: float(np.mean(numbers)) if numbers else None for name, numbers in values.items()}


def _agreed(*facts: bool) -> list[bool]:
    """Whether each fact holds in any of the processes: all must save and stop at the same step."""
    state = PartialState()
    flags = torch.tensor(facts, dtype=torch.int32, device=state.device)
    if state.num_processes > 1:
        torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
    return [bool(flag) for flag in flags]


def _number(value) -> float | None:
    """Number of a log entry, which TRL may give as text; None, an honest gap, for NaN."""
    number = float("nan") if value is None else float(value)
    return None if math.isnan(number) else number
