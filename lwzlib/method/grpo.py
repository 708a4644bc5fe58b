"""GRPO with the paper's advantage: TRL's trainer, and one change.

`LongWriterGRPOTrainer` overrides two methods of TRL's `GRPOTrainer`: `_calculate_rewards`, only to look at the rewards
of the whole batch and keep what was written, and `_generate_and_score_completions`, only to put the fused advantages
in the place of TRL's. Loss, clipping, KL, generation, vLLM, distribution and checkpoints are TRL's own.
"""

import os
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import set_seed
from trl import GRPOConfig, GRPOTrainer

from lwzlib.base import trainers
from lwzlib.base.parallel import accumulation, vllm_arguments
from lwzlib.base.recipe import Recipe
from lwzlib.base.run_folder import Run
from lwzlib.method import prompts
from lwzlib.method.advantage import fuse, no_variance
from lwzlib.method.queries import load_queries
from lwzlib.method.rewards import build_rewards, completion_text
from lwzlib.method.text import Style, count_words, parse


class LongWriterGRPOTrainer(GRPOTrainer):
    """TRL's GRPOTrainer with advantages fused per reward. The only change to the method: `output["advantages"]`.

    `advantage` is a mode of `lwzlib.method.advantage.fuse`; `reward_weights` of the config weigh the components. `keep` takes
    the rows of each batch of completions, on the main process: a dict per completion with the query's `id` and `type`,
    `completion`, the raw rewards by name, `advantage`, plan and answer lengths in words and tokens, `truncated`.
    """

    def __init__(self, *args, advantage: str = "zscore", keep=lambda rows: None, **kwargs):
        super().__init__(*args, **kwargs)
        self._keep = keep
        self._fuse = partial(fuse, weights=self.reward_weights.cpu().numpy(), mode=advantage)

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        group_size = self.num_generations if self.model.training else self.num_generations_eval
        grouped = rewards.cpu().double().numpy().reshape(-1, group_size, len(self.reward_funcs))
        self._advantages = self._fuse(grouped).ravel()
        rows = gather_object([self._row(*each) for each in zip(inputs, completions, completion_ids_list, strict=True)])
        for row, scores, advantage in zip(rows, rewards.tolist(), self._advantages.tolist(), strict=True):
            row |= dict(zip(self.reward_func_names, scores, strict=True)) | {"advantage": advantage}
        self._log_rows(rows, grouped)
        if self.accelerator.is_main_process and self.model.training:
            self._keep(rows)
        return rewards

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        start = self.accelerator.process_index * len(inputs)
        fused = self._advantages[start : start + len(inputs)]
        output["advantages"] = torch.tensor(fused, dtype=torch.float32, device=output["advantages"].device)
        return output

    def _row(self, example, completion, completion_ids) -> dict:
        completion = completion_text(completion)
        parsed = parse(completion, example["style"])
        tokens = [len(ids) for ids in self._tokenizer([parsed.plan, parsed.answer], add_special_tokens=False).input_ids]
        return {"id": example["id"], "type": example["type"], "completion": completion,
                "think_words": count_words(parsed.plan), "answer_words": count_words(parsed.answer),
                "think_tokens": tokens[0], "answer_tokens": tokens[1], "completion_tokens": len(completion_ids),
                "truncated": not completion_ids or completion_ids[-1] not in self.eos_token_ids}

    def _log_rows(self, rows: list[dict], grouped: np.ndarray) -> None:
        metrics = self._metrics["train" if self.model.training else "eval"]

        def log(name, values):
            metrics[name].append(float(np.mean(values)) if len(values) else float("nan"))

        for name in ("think_words", "answer_words", "think_tokens", "answer_tokens", "completion_tokens", "truncated"):
            log(name, [row[name] for row in rows])
        whole = [row["answer_words"] for row in rows if not row["truncated"]]
        log("answer_words_not_truncated", whole)  # what the paper's Fig 2 shows
        log("advantage_std", [np.std(self._advantages)])
        log("groups_without_variance", no_variance(grouped))
        for kind in sorted({row["type"] for row in rows}):
            for name in self.reward_func_names:
                scores = [row[name] for row in rows if row["type"] == kind and not np.isnan(row[name])]
                log(f"type/{kind}/{name}", scores)


def config(recipe: Recipe, run: Run, components: list[str]) -> GRPOConfig:
    """TRL's configuration for the recipe. Raises RunError if the batch cannot be cut over the processes."""
    grpo = recipe.grpo
    return GRPOConfig(
        max_steps=grpo.steps, learning_rate=grpo.learning_rate, lr_scheduler_type=grpo.lr_schedule,
        warmup_steps=grpo.warmup_steps, max_grad_norm=grpo.max_grad_norm, loss_type=grpo.loss, epsilon=grpo.clip_eps,
        beta=grpo.kl_beta, num_generations=grpo.group_size, per_device_train_batch_size=grpo.micro_batch_completions,
        gradient_accumulation_steps=accumulation(recipe, int(os.environ.get("WORLD_SIZE", "1"))),
        max_completion_length=grpo.sampling.max_new_tokens, temperature=grpo.sampling.temperature,
        top_p=grpo.sampling.top_p, reward_weights=[getattr(recipe.reward.weights, name) for name in components],
        remove_unused_columns=False, **vllm_arguments(recipe), **trainers.checkpoint_arguments(grpo.checkpoint_every_steps),
        **trainers.trainer_arguments(recipe, run))


def dataset(recipe: Recipe, style: Style, tokenizer) -> Dataset:
    """Columns prompt (text), query, id, type, word_range, style."""
    return Dataset.from_list([
        {"prompt": prompts.render(q.query, style, recipe.model.frame, recipe.prompt, tokenizer), "query": q.query,
         "id": q.id, "type": q.type, "word_range": list(q.word_range), "style": style}
        for q in load_queries(recipe.data.train, recipe.data.languages)])


def trainer(recipe: Recipe, run: Run, arm: str, start: str, writing_rm: str = "") -> LongWriterGRPOTrainer:
    """The trainer of an arm, ready to train from the model `start`."""
    set_seed(run.seed)  # LoRA draws its first weights
    components = build_rewards(recipe, writing_rm)
    args = config(recipe, run, list(components))
    model, tokenizer = trainers.load_policy(recipe, start)

    def keep(rows):
        step = grpo_trainer.state.global_step + 1
        run.append("completions", *({"step": step} | row for row in rows[: recipe.grpo.kept_completions_per_step]))

    grpo_trainer = LongWriterGRPOTrainer(
        model, list(components.values()), args=args, processing_class=tokenizer,
        train_dataset=dataset(recipe, recipe.arm(arm).prompt, tokenizer), callbacks=[trainers.Rows(run, trainers.GRPO_COLUMNS)],
        peft_config=trainers.lora_config(recipe.grpo.lora),
        advantage=recipe.grpo.advantage, keep=keep)
    grpo_trainer.add_callback(trainers.Snapshots(grpo_trainer, run, recipe.evaluation.every_steps))
    return grpo_trainer


def train_arm(recipe: Recipe, run: Run, arm: str, start: str, writing_rm: str = "") -> Path:
    """GRPO on one arm; resumes from the last whole checkpoint.

    Leaves `model/`, `metrics.jsonl` (a row a step), `completions.jsonl` (what was written, capped by the recipe) and
    `snapshots/<step>` of the policy (every `evaluation.every_steps`).
    """
    if run.finished:
        return run.folder / "model"
    with run.work():
        last = trainers.last_checkpoint(run, "metrics", "completions")
        grpo_trainer = trainer(recipe, run, arm, start, writing_rm)
        trainers.save_trained(trainers.train_to_end(grpo_trainer, last), grpo_trainer, run)
    return run.folder / "model"
