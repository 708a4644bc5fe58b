"""One optimiser step of the kit's LongWriterGRPOTrainer against TRL's own GRPOTrainer.

Both get the same base model (no cold start), recipe, reward functions, queries, seed and LoRA; the kit's also keeps the
completions it is told to keep, as in a real run. Every completion is forced to `max_new_tokens` tokens, so that both do
the same amount of work. Turns alternate, kit then TRL, in one process; each turn builds a fresh trainer. A step is the
wall time from one step's end to the next, so the first step of a turn is warm-up and is not counted.

    python benchmarks/trainer_step.py [--recipe nano] [--steps 4] [--rounds 3]
"""

import argparse
import gc
import statistics
import tempfile
import time
from pathlib import Path

import torch
from transformers import TrainerCallback, set_seed
from trl import GRPOTrainer

from lwzlib.base.provenance import provenance
from lwzlib.base.recipe import Recipe, load_recipe
from lwzlib.base.run_folder import Run
from lwzlib.base.trainers import load_trainee, lora_config, train_to_end
from lwzlib.method import grpo
from lwzlib.method.advantage import Fusion
from lwzlib.method.rewards import build_rewards

HERE = Path(__file__).resolve().parent
SEED = 0


class StepEnds(TrainerCallback):
    def __init__(self):
        self.times = []

    def on_step_end(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())


def build(kind: type, made: Recipe, run: Run, ends: StepEnds) -> GRPOTrainer:
    set_seed(SEED)
    model, tokenizer = load_trainee(made, made.model.name, made.grpo.lora)
    components = build_rewards(made)
    args = grpo.config(made, run, list(components))
    args.save_strategy = "no"
    args.generation_kwargs = {"min_new_tokens": made.grpo.sampling.max_new_tokens}
    style = next(iter(made.arms.values())).prompt
    extra = {}
    if kind is grpo.LongWriterGRPOTrainer:
        kept = made.grpo.kept_completions_per_step
        extra = {"fusion": Fusion.of(made), "keep": lambda rows: run.append("completions", *rows[:kept])}
    return kind(
        model, list(components.values()), args=args, processing_class=tokenizer,
        train_dataset=grpo.dataset(made, style, tokenizer), callbacks=[ends],
        peft_config=lora_config(made.grpo.lora),
        **extra)


def turn(kind: type, made: Recipe) -> tuple[list[float], set]:
    """(seconds of each step after the first, the lengths in tokens that completions had)."""
    with tempfile.TemporaryDirectory() as folder:
        ends = StepEnds()
        trainer = build(kind, made, Run(Path(folder), made, SEED, ("model", "grpo")), ends)
        train_to_end(trainer)
        lengths = {row[name] for row in trainer.state.log_history if "loss" in row
                   for name in ("completions/min_length", "completions/max_length")}
    del trainer
    gc.collect()
    return [after - before for before, after in zip(ends.times, ends.times[1:], strict=False)], lengths


def main(name: str, steps: int, rounds: int) -> None:
    made, origin = load_recipe(name, {"grpo.steps": steps, "reward.weights.writing": 0.0}), provenance()
    kinds = (grpo.LongWriterGRPOTrainer, GRPOTrainer)
    seconds, lengths = {kind: [] for kind in kinds}, set()  # kind -> a list of steps per round
    for i in range(rounds):
        for kind in kinds:
            step_s, seen = turn(kind, made)
            seconds[kind].append(step_s)
            lengths |= seen
            print(f"round {i + 1}/{rounds}  {kind.__name__}  " + " ".join(f"{s:.3f}" for s in step_s), flush=True)
    kit, trl = ([statistics.median(each) for each in seconds[kind]] for kind in kinds)
    both = [statistics.median(s for each in seconds[kind] for s in each) for kind in kinds]
    ratios = [ours / theirs for ours, theirs in zip(kit, trl, strict=True)]
    versions = ", ".join(f"{package} {origin['versions'][package]}" for package in ("torch", "trl", "transformers"))
    tokens = " to ".join(f"{n:.0f}" for n in sorted({min(lengths), max(lengths)}))
    lines = [
        "# Trainer step", "", f"{origin['hardware']}, {torch.get_num_threads()} threads; {origin['started']}; "
        f"Python {origin['python']}, {versions}.", "",
        f"Recipe `{name}`, model {made.model.name}, {made.grpo.group_size * made.grpo.queries_per_step} completions of "
        f"{tokens} tokens a step;", f"{rounds} rounds of {steps} steps, the first of each not counted. Medians over",
        "all counted steps.", "", "| trainer | median step, s | fastest, s | slowest, s |", "|---|--:|--:|--:|"]
    for kind, median in zip(kinds, both, strict=True):
        every = [s for each in seconds[kind] for s in each]
        lines.append(f"| {kind.__name__} | {median:.3f} | {min(every):.3f} | {max(every):.3f} |")
    lines += ["", "| kit / TRL | ratio |", "|---|--:|", f"| ratio of the medians | {both[0] / both[1]:.3f} |",
              f"| lowest of a round | {min(ratios):.3f} |", f"| highest of a round | {max(ratios):.3f} |"]
    print("\n".join(["", *lines]))
    (HERE / "trainer_step.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--recipe", default="nano")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if options.steps < 2 or options.rounds < 1:
        parser.error("--steps must be at least 2 and --rounds at least 1")
    main(options.recipe, options.steps, options.rounds)
