"""Training on one step's completions by the kit's leaner trainer against TRL's own: seconds, and columns of the forward passes.

Completions of drawn lengths stand in for written ones (quantiles of the Beta distribution that `lwz estimate` assumes, in a
fixed random order), so that both trainers do the same work: log-probabilities, loss, backward pass, optimiser. Turns alternate.

    python benchmarks/lean_training.py [--recipe nano] [--tokens 224] [--completions 8] [--rounds 3]
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from scipy.stats import beta
from transformers import set_seed
from trl import GRPOTrainer

from lwzlib.base.lean_grpo import LeanGRPOTrainer
from lwzlib.base.provenance import provenance
from lwzlib.base.recipe import Recipe, load_recipe
from lwzlib.base.run_folder import Run
from lwzlib.base.trainers import load_trainee, lora_config
from lwzlib.method import grpo

SEED = 0


def drawn_lengths(tokens: int, completions: int) -> list[int]:
    quantiles = beta.ppf((np.arange(completions) + 0.5) / completions, 2, 2) * tokens
    return np.random.default_rng(SEED).permutation(np.maximum(1, quantiles.round().astype(int))).tolist()


def trained_s(kind: type, made: Recipe, lengths: list[int], folder: Path) -> tuple[float, list[int]]:
    """(seconds of a step, columns of each of its forward passes)."""
    set_seed(SEED)
    model, tokenizer = load_trainee(made, made.model.name, made.grpo.lora)
    args = grpo.config(made, Run(folder, made, SEED, ("model", "grpo")), ["length"])
    args.save_strategy = "no"
    trainer = kind(model, [lambda completions, **_: [float(i % 2) for i in range(len(completions))]], args=args,
                   processing_class=tokenizer, train_dataset=grpo.dataset(made, "direct", tokenizer),
                   peft_config=lora_config(made.grpo.lora))
    trainer._generate_single_turn = lambda *_, **__: ([[65 + i] * length for i, length in enumerate(lengths)], None)
    columns, forward = [], model.model.forward
    model.model.forward = lambda *inputs, **more: columns.append(more["input_ids"].shape[1]) or forward(*inputs, **more)
    began = time.perf_counter()
    trainer.train()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began, columns


def main(recipe: str, tokens: int, completions: int, rounds: int) -> None:
    made = load_recipe(recipe, {"grpo.steps": 1, "grpo.queries_per_step": 1, "grpo.group_size": completions,
                                "grpo.micro_batch_completions": 1, "grpo.sampling.max_new_tokens": tokens,
                                "reward.weights.writing": 0.0, "reward.weights.format": 0.0})
    lengths, kinds = drawn_lengths(tokens, completions), {"TRL's own": GRPOTrainer, "the kit's": LeanGRPOTrainer}
    seconds, columns = {name: [] for name in kinds}, {}
    with tempfile.TemporaryDirectory() as scratch:
        for turn in range(rounds):
            for name, kind in kinds.items():
                took, columns[name] = trained_s(kind, made, lengths, Path(scratch) / f"{turn}-{name[:3]}")
                seconds[name].append(took)
                print(f"{name}: {took:.1f} s, columns {columns[name]}", flush=True)
    peer = statistics.median(seconds["TRL's own"])
    lines = ["# Training on completions of unlike lengths", "",
             f"{completions} completions of {min(lengths)} to {max(lengths)} tokens after a prompt, one a micro-batch; "
             f"{made.model.name}, recipe {recipe}. Median of {rounds} steps, in turns. {provenance()['hardware']}.", "",
             "| trainer | columns of its forward passes | seconds a step | range | against TRL |", "|---|--:|--:|---|--:|"]
    for name, values in seconds.items():
        middle = statistics.median(values)
        lines.append(f"| {name} | {sum(columns[name]):,} | {middle:.1f} | {min(values):.1f} to {max(values):.1f} | "
                     f"{middle / peer:.2f} |")
    lines += ["", "    python benchmarks/lean_training.py"]
    (Path(__file__).parent / "lean_training.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--recipe", default="nano")
    parser.add_argument("--tokens", type=int, default=224)
    parser.add_argument("--completions", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    main(options.recipe, options.tokens, options.completions, options.rounds)
