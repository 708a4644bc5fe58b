"""Decoding in a block of `lwzlib.base.fast_cpu.faster` against transformers' own `generate`, on a CPU.

Both write the same number of tokens for the same prompts with the same model, in turns, in one process: with and without a
LoRA adapter, as in RL. The faster block is part of `model.generate` after `fast_cpu.speed_up`: its preparation is in its time.

    python benchmarks/decoding.py [--recipe nano] [--tokens 100] [--rounds 3]
"""

import argparse
import os
import statistics
import sys
import time
from pathlib import Path

import torch
from peft import get_peft_model

from lwzlib.base.provenance import provenance
from lwzlib.base.recipe import Recipe, load_recipe
from lwzlib.base.trainers import load_policy, lora_config
from lwzlib.method import grpo
from lwzlib.pipeline.launch import of_processes

HERE = Path(__file__).resolve().parent
BATCHES = (1, 8, 16, 32)


def seconds(generate, texts: dict, tokens: int) -> float:
    torch.manual_seed(0)
    start = time.perf_counter()
    with torch.no_grad():
        generate(**texts, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
    return time.perf_counter() - start


def row(adapter: bool, batch: int, made: Recipe, tokens: int, rounds: int) -> str:
    torch.manual_seed(0)
    model, tokenizer = load_policy(made, made.model.name)
    faster = model.generate
    model.__dict__.pop("generate")  # transformers' own is left
    plain = model.generate
    if adapter:
        get_peft_model(model, lora_config(made.grpo.lora)).eval()  # puts its layers into the model
    queries = grpo.dataset(made, next(iter(made.arms.values())).prompt, tokenizer)["prompt"]
    texts = tokenizer([queries[i % 8] for i in range(batch)], return_tensors="pt", padding=True, add_special_tokens=False)
    seconds(plain, texts, 5)
    taken = [(seconds(plain, texts, tokens), seconds(faster, texts, tokens)) for _ in range(rounds)]
    theirs, ours = (1000 * statistics.median(each) / tokens for each in zip(*taken, strict=True))
    ratios = [a / b for a, b in taken]
    made_row = (f"| {'LoRA' if adapter else 'none'} | {batch} | {theirs:.1f} | {ours:.1f} | {statistics.median(ratios):.2f} | "
                f"{min(ratios):.2f} to {max(ratios):.2f} |")
    print(made_row, flush=True)
    return made_row


def main(name: str, tokens: int, rounds: int) -> None:
    made, origin = load_recipe(name), provenance()
    versions = ", ".join(f"{package} {origin['versions'][package]}" for package in ("torch", "transformers", "peft"))
    lines = [
        "# Decoding on a CPU", "", f"{origin['hardware']}, {torch.get_num_threads()} threads; {origin['started']}; "
        f"Python {origin['python']}, {versions}.", "",
        f"Model {made.model.name}, {made.model.dtype}, {made.model.attention} attention; {tokens} tokens a sequence, drawn; "
        f"{rounds} rounds in turns.", "Medians; \"a token\" is one of each sequence. What is drawn has the",
        "same distribution, and logits and greedy tokens are the same to the bit (`tests/base/test_fast_cpu.py`).", "",
        "| adapter | sequences | transformers, ms a token | kit, ms a token | times faster | rounds |",
        "|---|--:|--:|--:|--:|--:|",
        *[row(adapter, batch, made, tokens, rounds) for adapter in (False, True) for batch in BATCHES]]
    (HERE / "decoding.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--recipe", default="nano")
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if not of_processes().items() <= os.environ.items():  # read at the start of a process only: as stages have it
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | of_processes())
    main(options.recipe, options.tokens, options.rounds)
