"""Matrix products in bfloat16 against float32 on this CPU: why `fast_cpu.computed_in` chooses float32 where the CPU has none.

A product of a model's hidden states with its output head, forward, and its gradient with respect to the head, in turns.

    python benchmarks/bfloat16.py [--rounds 5]
"""

import argparse
import statistics
import time
from pathlib import Path

import torch

from lwzlib.base.fast_cpu import computed_in
from lwzlib.base.provenance import provenance

HERE = Path(__file__).resolve().parent
TOKENS, HIDDEN, VOCABULARY = 256, 576, 8192  # hidden states of SmolLM2-135M; a sixth of its vocabulary


def seconds(dtype: torch.dtype) -> tuple[float, float]:
    """(of the forward product, of the head's gradient)."""
    torch.manual_seed(0)
    hidden, head = torch.randn(TOKENS, HIDDEN, dtype=dtype), torch.randn(VOCABULARY, HIDDEN, dtype=dtype, requires_grad=True)
    started = time.perf_counter()
    logits = hidden @ head.T
    forward = time.perf_counter()
    logits.backward(torch.ones_like(logits))
    return forward - started, time.perf_counter() - forward


def main(rounds: int) -> None:
    made, taken = provenance(), {torch.bfloat16: [], torch.float32: []}
    for dtype in [*taken] * (rounds + 1):
        taken[dtype].append(seconds(dtype))
    lines = ["# Products in bfloat16 on a CPU", "",
             f"{made['hardware']}, {torch.get_num_threads()} threads; {made['started']}; torch {made['versions']['torch']}. "
             f"Models of dtype bfloat16 compute here in {computed_in('bfloat16')}.", "",
             f"{TOKENS} x {HIDDEN} by {HIDDEN} x {VOCABULARY}; median of {rounds} rounds in turns, the first not counted.", "",
             "| product | bfloat16, ms | float32, ms | times slower |", "|---|--:|--:|--:|"]
    for place, name in enumerate(("forward", "gradient of the head")):
        slow, fast = (1000 * statistics.median(times[place] for times in taken[dtype][1:]) for dtype in taken)
        lines.append(f"| {name} | {slow:.1f} | {fast:.1f} | {slow / fast:.1f} |")
    print("\n".join(lines))
    (HERE / "bfloat16.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    main(parser.parse_args().rounds)
