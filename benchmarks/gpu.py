"""GRPO on one GPU with the embedded model: real runs of both arms, plain TRL beside the kit, growth with the length.

`run`: base-nothink and base-think, three rewards, from the cold start and the Writing RM that the recipe trains; each step's
seconds by part, tokens a second and peak memory. `against`: the kit's trainer and TRL's own take turns on the same work, every
completion forced to its full length. `growth`: the kit's trainer, forced lengths up to 14,000 tokens. Rows go to one CSV with
their provenance; what it holds already is not measured again, and a `run` that was stopped goes on after its last step.

    bash benchmarks/gpu.sh run          on a GPU
    bash benchmarks/gpu.sh dry FOLDER   the same code in small, on a CPU, with a random model: shows only that it runs
"""

import argparse
import gc
import resource
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch
from transformers import TrainerCallback, set_seed
from trl import GRPOTrainer

from lwzlib.base.kit import TINY, prepare
from lwzlib.base.provenance import provenance
from lwzlib.base.recipe import Recipe, load_recipe
from lwzlib.base.run_folder import Run
from lwzlib.base.trainers import last_checkpoint, load_trainee, lora_config, save_trained, train_to_end
from lwzlib.method import grpo
from lwzlib.method.advantage import Fusion
from lwzlib.method.rewards import build_rewards
from lwzlib.pipeline.launch import launch
from lwzlib.pipeline.stages import stage_run

SEED, ARMS = 0, ("base-nothink", "base-think")
KINDS = {"kit": grpo.LongWriterGRPOTrainer, "trl": GRPOTrainer}
COMMON = {"launch": "inline", "grpo.kept_completions_per_step": 0, "data.train": "kit:train", "evaluation.every_steps": 0,
          "reward.length.max_words": 14_000, "model.attention": "sdpa",
          "grpo.checkpoint_every_steps": 1}  # between steps: no step's seconds have it
REAL = {"recipe": "nano", "steps": 10, "tokens": (1024, 4096), "fixed_tokens": 1024, "fixed_steps": 6, "growth_steps": 3,
        "growth": (256, 512, 1024, 2048, 4096, 8192, 14_000),
        "sets": {"grpo.queries_per_step": 4, "grpo.micro_batch_completions": 4}}
DRY = {"recipe": "smoke", "steps": 2, "tokens": (8, 16), "fixed_tokens": 8, "fixed_steps": 2, "growth_steps": 2,
       "growth": (8, 16), "sets": {"grpo.queries_per_step": 1, "grpo.micro_batch_completions": 4}}


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_gib() -> float:
    """Of the GPU since the last call; without one, of the process since its start."""
    if not torch.cuda.is_available():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    found = torch.cuda.max_memory_allocated() / 2**30
    torch.cuda.reset_peak_memory_stats()
    return found


class Parts(TrainerCallback):
    """Hands `keep` a row a step: seconds of writing and of the rewards, of the whole step, peak memory, mean tokens of its
    completions."""

    def __init__(self, trainer: GRPOTrainer, keep: Callable[[dict], None]):
        self.keep, self.row, self.seconds = keep, {}, {}
        for part, name in (("write_s", "_generate_single_turn"), ("reward_s", "_calculate_rewards")):
            setattr(trainer, name, self.timed(part, getattr(trainer, name)))
        trainer.add_callback(self)

    def timed(self, part: str, method):
        def call(*args, **kwargs):
            began = now()
            found = method(*args, **kwargs)
            self.seconds[part] = self.seconds.get(part, 0.0) + now() - began
            return found

        return call

    def on_step_begin(self, args, state, control, **kwargs):
        self.seconds, self.began = {}, now()
        peak_gib()

    def on_step_end(self, args, state, control, **kwargs):
        step_s = now() - self.began
        self.row = {"step": state.global_step, "step_s": step_s, **self.seconds,
                    "update_s": step_s - sum(self.seconds.values()), "peak_gib": peak_gib()}

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            tokens = float(logs["completions/mean_length"])
            self.keep(self.row | {"mean_tokens": tokens, "completions": args.generation_batch_size,
                                  "tokens_per_s": tokens * args.generation_batch_size / self.row["step_s"]})


def run_of(made: Recipe, folder: Path, arm: str) -> list[dict]:
    """A real run of an arm, after the stages it needs; every completion ends where it ends. It goes on from its checkpoint."""
    launch("cold-start", made, folder.parent, SEED)
    launch("writing-rm", made, folder.parent, SEED)
    run = stage_run("grpo", made, folder, SEED, arm)
    if run.finished:
        return run.rows("parts")
    with run.work():
        last = last_checkpoint(run, "metrics", "parts")
        trainer = grpo.trainer(made.for_arm(arm), run, arm, str(folder.parent / "cold-start" / "model"),
                               str(folder.parent / "writing-rm" / "model"))
        Parts(trainer, lambda row: run.append("parts", row))
        save_trained(train_to_end(trainer, last), trainer, run)
    return run.rows("parts")


def fixed(kind: str, made: Recipe, folder: Path) -> list[dict]:
    """Steps of forced length from the model as it is, by the kit's trainer or by TRL's own."""
    run = Run(folder, made, SEED, ("model", "grpo"))
    folder.mkdir(parents=True, exist_ok=True)
    set_seed(SEED)
    scorers = build_rewards(made, str(folder.parent / "writing-rm" / "model"))
    args = grpo.config(made, run, list(scorers))
    args.save_strategy, args.generation_kwargs = "no", {"min_new_tokens": made.grpo.sampling.max_new_tokens}
    model, tokenizer = load_trainee(made, made.model.name, made.grpo.lora)
    trainer = KINDS[kind](model, list(scorers.values()), args=args, processing_class=tokenizer,
                          train_dataset=grpo.dataset(made, "direct", tokenizer), peft_config=lora_config(made.grpo.lora),
                          **({"fusion": Fusion.of(made)} if kind == "kit" else {}))
    rows: list[dict] = []
    Parts(trainer, rows.append)
    train_to_end(trainer)
    return rows


def measurements(asked: dict, folder: Path):
    """(what it is called, how to measure it) in order."""
    def made(tokens: int, steps: int) -> Recipe:
        return load_recipe(asked["recipe"], COMMON | asked["sets"] | {"grpo.sampling.max_new_tokens": tokens,
                                                                      "grpo.steps": steps})

    for tokens in asked["tokens"]:
        for arm in ARMS:
            yield ({"measure": "run", "trainer": "kit", "arm": arm, "max_new_tokens": tokens}, made(tokens, asked["steps"]),
                   lambda r, arm=arm, tokens=tokens: run_of(r, folder / str(tokens), arm))
    for turn, kind in enumerate(("kit", "trl", "trl", "kit")):
        yield ({"measure": f"against {turn}", "trainer": kind, "arm": "", "max_new_tokens": asked["fixed_tokens"]},
               made(asked["fixed_tokens"], asked["fixed_steps"]), lambda r, kind=kind: fixed(kind, r, folder / "fixed"))
    for tokens in asked["growth"]:
        yield ({"measure": "growth", "trainer": "kit", "arm": "", "max_new_tokens": tokens},
               made(tokens, asked["growth_steps"]), lambda r: fixed("kit", r, folder / "fixed"))


def main(asked: dict, folder: Path, out: Path) -> None:
    origin = provenance()
    about = {"model": load_recipe(asked["recipe"]).model.name, "seed": SEED, "commit": origin["commit"],
             "hardware": origin["hardware"],
             "versions": " ".join(f"{name} {version}" for name, version in origin["versions"].items())}
    out.parent.mkdir(parents=True, exist_ok=True)
    done = pd.read_csv(out, keep_default_na=False) if out.exists() else pd.DataFrame()
    for name, made, measure in measurements(asked, folder):
        if len(done) and (done[list(name)].astype(str) == pd.Series(name).astype(str)).all(axis=1).any():
            print(f"{name}: already in {out}", flush=True)
            continue
        try:
            rows = measure(made)
        except torch.cuda.OutOfMemoryError as error:  # a result too: the length at which memory ends
            rows = [{"step": 0, "failed": str(error).splitlines()[0]}]
        table = pd.DataFrame([name | row | {"fingerprint": made.fingerprint()} | about for row in rows])
        done = pd.concat([done, table], ignore_index=True)
        done.round(4).to_csv(out, index=False)
        print(f"{name}: {len(rows)} steps, median {table.get('step_s', pd.Series(dtype=float)).median():.2f} s", flush=True)
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dry", action="store_true", help="in small, on any machine")
    parser.add_argument("--folder", type=Path, default=Path("runs/gpu-benchmark"))
    parser.add_argument("--out", type=Path, default=Path("figures/results/gpu.csv"))
    options = parser.parse_args()
    if not (options.dry or torch.cuda.is_available()):
        parser.error("no CUDA GPU here: nothing would be measured; --dry runs the same code in small")
    if options.dry:
        prepare(TINY)
    main(DRY if options.dry else REAL, options.folder, options.out)
