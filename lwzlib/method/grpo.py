"""GRPO with the paper's advantage: TRL's trainer, and one change.

Changed: the advantages, which are fused from the rewards of each group (`lwzlib.method.advantage`). `LongWriterGRPOTrainer`
overrides `_calculate_rewards`, where the rewards of the whole batch can be seen, and `_generate_and_score_completions`, to put
the advantages in the place of TRL's. `log` adds what was written (TRL's `log_metric`, for reward functions, rounds to float32).
Left as they are: TRL's loss, clipping, KL, generation, vLLM, distribution and checkpoints.

The paper publishes clip epsilon 0.2, KL beta 0 and 150 steps; what it does not, `recipes/paper.yaml` chooses and marks.
"""

import os
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
        self._mode, self._keep, self._written = advantage, keep, {}

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)  # of all processes
        group_size = self.num_generations if self.model.training else self.num_generations_eval
        groups = rewards.cpu().double().numpy().reshape(-1, group_size, len(self.reward_funcs))
        weights = self.reward_weights.cpu().numpy()

        advantages = fuse(groups, weights, self._mode)

        self._advantages = advantages.ravel()
        rows = gather_object([self._row(*parts) for parts in zip(inputs, completions, completion_ids_list, strict=True)])
        for row, scores, advantage in zip(rows, rewards.tolist(), self._advantages.tolist(), strict=True):
            row |= dict(zip(self.reward_func_names, scores, strict=True)) | {"advantage": advantage}
        if self.model.training:
            self._written = means(rows, self.reward_func_names) | {
                "advantage_std": float(self._advantages.std()), "groups_without_variance": float(no_variance(groups).mean())}
            if self.accelerator.is_main_process:
                self._keep(rows)
        return rewards

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        start = self.accelerator.process_index * len(inputs)
        own = self._advantages[start : start + len(inputs)]
        output["advantages"] = torch.tensor(own, dtype=torch.float32, device=output["advantages"].device)
        return output

    def log(self, logs, start_time=None):
        """Log what TRL logs, and the means of what was written since the last log."""
        super().log(logs | self._written, start_time)
        self._written = {}

    def _row(self, example, completion, completion_ids) -> dict:
        text = completion_text(completion)
        parsed = parse(text, example["style"])
        plan_ids, answer_ids = self._tokenizer([parsed.plan, parsed.answer], add_special_tokens=False).input_ids
        return {"id": example["id"], "type": example["type"], "completion": text,
                "think_words": count_words(parsed.plan), "answer_words": count_words(parsed.answer),
                "think_tokens": len(plan_ids), "answer_tokens": len(answer_ids), "completion_tokens": len(completion_ids),
                "truncated": not completion_ids or completion_ids[-1] not in self.eos_token_ids}


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


def config(recipe: Recipe, run: Run, rewards: list[str]) -> GRPOConfig:
    """TRL's configuration for the recipe. Raises RunError if the batch cannot be cut over the processes."""
    grpo = recipe.grpo
    return GRPOConfig(
        max_steps=grpo.steps, learning_rate=grpo.learning_rate, lr_scheduler_type=grpo.lr_schedule,
        warmup_steps=grpo.warmup_steps, max_grad_norm=grpo.max_grad_norm, loss_type=grpo.loss, epsilon=grpo.clip_eps,
        beta=grpo.kl_beta, num_generations=grpo.group_size, per_device_train_batch_size=grpo.micro_batch_completions,
        gradient_accumulation_steps=accumulation(recipe, int(os.environ.get("WORLD_SIZE", "1"))),
        max_completion_length=grpo.sampling.max_new_tokens, temperature=grpo.sampling.temperature, remove_unused_columns=False,
        top_p=grpo.sampling.top_p, reward_weights=[getattr(recipe.reward.weights, name) for name in rewards],
        **vllm_arguments(recipe), **trainers.trainer_arguments(recipe, run, grpo.checkpoint_every_steps))


def dataset(recipe: Recipe, style: Style, tokenizer) -> Dataset:
    """Columns prompt (text), query, id, type, word_range, style."""
    return Dataset.from_list([
        {"prompt": prompts.render(q.query, style, recipe.model.frame, recipe.prompt, tokenizer), "query": q.query,
         "id": q.id, "type": q.type, "word_range": list(q.word_range), "style": style}
        for q in load_queries(recipe.data.train, recipe.data.languages)])


def trainer(recipe: Recipe, run: Run, arm: str, start: str, writing_rm: str = "") -> LongWriterGRPOTrainer:
    """The trainer of an arm, ready to train from the model `start`."""
    set_seed(run.seed)  # LoRA draws its first weights
    rewards = build_rewards(recipe, writing_rm)
    args = config(recipe, run, list(rewards))
    model, tokenizer = trainers.load_policy(recipe, start)

    def keep(rows):
        step = grpo_trainer.state.global_step + 1
        run.append("completions", *({"step": step} | row for row in rows[: recipe.grpo.kept_completions_per_step]))

    grpo_trainer = LongWriterGRPOTrainer(
        model, list(rewards.values()), args=args, processing_class=tokenizer,
        train_dataset=dataset(recipe, recipe.arm(arm).prompt, tokenizer), callbacks=[trainers.Rows(run, trainers.GRPO_COLUMNS)],
        peft_config=trainers.lora_config(recipe.grpo.lora), advantage=recipe.grpo.advantage, keep=keep)
    grpo_trainer.add_callback(trainers.Snapshots(grpo_trainer, run, recipe.evaluation.every_steps))
    return grpo_trainer


def train_arm(recipe: Recipe, run: Run, arm: str, start: str, writing_rm: str = "") -> Path:
    """GRPO on one arm; resumes from the last whole checkpoint.

    Leaves `model/`, `metrics.jsonl` (one row per step), `completions.jsonl` (what was written, capped by the recipe) and
    `snapshots/<step>` of the policy (every `evaluation.every_steps`).
    """
    if run.finished:
        return run.folder / "model"
    with run.work():
        last = trainers.last_checkpoint(run, "metrics", "completions")
        grpo_trainer = trainer(recipe, run, arm, start, writing_rm)
        trainers.save_trained(trainers.train_to_end(grpo_trainer, last), grpo_trainer, run)
    return run.folder / "model"
