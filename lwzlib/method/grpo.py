"""GRPO with the paper's advantage: TRL's trainer, and one change.

Changed: the advantages, which are fused from the rewards of each group (`lwzlib.method.advantage`). `LongWriterGRPOTrainer`
overrides `_calculate_rewards`, where the rewards of the whole batch can be seen, and `_generate_and_score_completions`, to put
the advantages in the place of TRL's. `log` adds what was written (TRL's `log_metric`, for reward functions, rounds to float32).
Left as they are: TRL's loss, clipping, KL, generation, vLLM, distribution and checkpoints (`base.lean_grpo` only saves time).

The paper publishes clip epsilon 0.2, KL beta 0 and 150 steps; what it does not, `recipes/paper.yaml` chooses and marks.
"""

import os
from pathlib import Path

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import set_seed
from trl import GRPOConfig

from lwzlib.base import trainers
from lwzlib.base.lean_grpo import LeanGRPOTrainer, sampling_arguments
from lwzlib.base.parallel import accumulation, vllm_arguments, with_context
from lwzlib.base.recipe import Recipe
from lwzlib.base.run_folder import Run
from lwzlib.method import prompts
from lwzlib.method.advantage import PAPER, Fusion, no_variance
from lwzlib.method.queries import load_queries
from lwzlib.method.rewards import build_rewards, whole_completion
from lwzlib.method.text import Style, count_words, parse


class LongWriterGRPOTrainer(LeanGRPOTrainer):
    """TRL's GRPOTrainer with advantages fused per reward. The only change to the method: `output["advantages"]`.

    `fusion` combines the rewards; `reward_weights` of the config weigh the components. `keep` takes
    the rows of each batch of completions, on the main process: a dict per completion with the query's `id` and `type`,
    `completion`, the raw rewards by name, `advantage`, plan and answer lengths in words and tokens, `truncated`.
    """

    def __init__(self, *args, fusion: Fusion = PAPER, keep=lambda rows: None, **kwargs):
        super().__init__(*args, **kwargs)
        self._fusion, self._keep, self._written = fusion, keep, {}

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)  # of all processes
        group_size = self.num_generations if self.model.training else self.num_generations_eval
        groups = rewards.cpu().double().numpy().reshape(-1, group_size, len(self.reward_funcs))
        weights = self.reward_weights.cpu().numpy()
        rows = gather_object([self._row(*parts) for parts in zip(inputs, completions, completion_ids_list, strict=True)])
        texts, style = [row["completion"] for row in rows], inputs[0]["style"]

        advantages = self._fusion(groups, weights, self.reward_func_names, texts, style)

        self._advantages = advantages.ravel()
        for row, scores, advantage in zip(rows, rewards.tolist(), self._advantages.tolist(), strict=True):
            row |= dict(zip(self.reward_func_names, scores, strict=True)) | {"advantage": advantage}
        if self.model.training:
            self._written = trainers.means(rows, self.reward_func_names) | {
                "advantage_std": float(self._advantages.std()), "groups_without_variance": float(no_variance(groups).mean())}
            for i, name in enumerate(self.reward_func_names):  # of its own advantages, whose mean is 0; 0 where it says nothing
                own = self._fusion(groups[..., [i]], [1.0], [name], texts, style)
                self._written[f"advantage_std/{name}"] = float(own.std())
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
        text = whole_completion(completion, example["prompt"])
        parsed = parse(text, example["style"])
        plan_ids, answer_ids = self._tokenizer([parsed.plan, parsed.answer], add_special_tokens=False).input_ids
        return {"id": example["id"], "type": example["type"], "completion": text,
                "think_words": count_words(parsed.plan), "answer_words": count_words(parsed.answer),
                "think_tokens": len(plan_ids), "answer_tokens": len(answer_ids), "completion_tokens": len(completion_ids),
                "truncated": not self.ended(completion_ids)}


def config(recipe: Recipe, run: Run, rewards: list[str]) -> GRPOConfig:
    """TRL's configuration for the recipe. Raises RunError if the batch cannot be cut over the processes."""
    grpo = recipe.grpo
    return GRPOConfig(
        max_steps=grpo.steps, learning_rate=grpo.learning_rate, lr_scheduler_type=grpo.lr_schedule,
        warmup_steps=grpo.warmup_steps, max_grad_norm=grpo.max_grad_norm, loss_type=grpo.loss, epsilon=grpo.clip_eps,
        beta=grpo.kl_beta, use_bias_correction_kl=grpo.kl_bias_correction, num_generations=grpo.group_size,
        per_device_train_batch_size=grpo.micro_batch_completions, top_p=grpo.sampling.top_p,
        gradient_accumulation_steps=accumulation(recipe, int(os.environ.get("WORLD_SIZE", "1"))),
        max_completion_length=grpo.sampling.max_new_tokens, temperature=grpo.sampling.temperature, remove_unused_columns=False,
        mask_truncated_completions=grpo.mask_truncated,
        reward_weights=[getattr(recipe.reward.weights, name) for name in rewards],
        **sampling_arguments(recipe), **vllm_arguments(recipe), **grpo.trl,
        **trainers.trainer_arguments(recipe, run, grpo.checkpoint_every_steps, grpo.lora))


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
    if "writing" in rewards:
        rewards["writing"].check([query.query for query in load_queries(recipe.data.train, recipe.data.languages)])
    args = config(recipe, run, list(rewards))
    model, tokenizer = trainers.load_trainee(recipe, start, recipe.grpo.lora)

    def keep(rows):
        step = grpo_trainer.state.global_step + 1
        run.append("completions", *({"step": step} | row for row in rows[: recipe.grpo.kept_completions_per_step]))

    grpo_trainer = LongWriterGRPOTrainer(
        model, list(rewards.values()), args=args, processing_class=tokenizer, fusion=Fusion.of(recipe), keep=keep,
        train_dataset=with_context(args, dataset(recipe, recipe.arm(arm).prompt, tokenizer), tokenizer),
        callbacks=[trainers.Rows(run, trainers.GRPO_COLUMNS)], peft_config=trainers.lora_config(recipe.grpo.lora))
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
