"""Estimates as people read them: the arithmetic of one plan, and the tables of `cluster_jobs/`.

The paper's own setting is planned on its own hardware; sizes that it does not have are planned by changing the model alone.
"""

import dataclasses
import json

from rich.console import Console
from rich.table import Table

from lwzlib.base.parallel import deepspeed_config
from lwzlib.base.paths import CLUSTER_JOBS
from lwzlib.base.recipe import RecipeError, load_recipe
from lwzlib.cluster.estimate import (
    GPUS,
    SHAPES,
    C,
    Plan,
    assuming,
    c,
    plan,
    problems,
    shape,
    slots,
    training_memory,
    writing_memory,
)
from lwzlib.cluster.step_time import decode_s, micro_s, simulate_step


def planned(recipe: str, sets=None, nodes: int | None = None, gpus: int | None = None, gpu: str = "h800",
            gpu_gib: float | None = None, mean_tokens: float | None = None) -> Plan:
    """The recipe on these GPUs. Raises RecipeError for an unknown GPU, and for what the recipe itself refuses."""
    if gpu not in GPUS:
        raise RecipeError(f"no GPU {gpu!r}; known are {', '.join(GPUS)}; for another memory give --gpu-gib")
    asked = load_recipe(recipe, sets)
    changes: dict = {}
    if nodes or gpus:
        changes = {"distributed.nodes": nodes or asked.distributed.nodes, "distributed.processes": gpus or
                   asked.distributed.processes}
        several = changes["distributed.nodes"] > 1 or changes["distributed.processes"] > 1
        changes["launch"] = "slurm" if changes["distributed.nodes"] > 1 else "torchrun" if several else asked.launch
        if changes["distributed.nodes"] == 1 and asked.vllm.mode == "server":
            changes |= {"vllm.mode": "colocate", "vllm.nodes": 0, "vllm.sleep": True, "vllm.memory_share": 0.5}
    found = GPUS[gpu] if gpu_gib is None else dataclasses.replace(GPUS[gpu], gib=gpu_gib)
    return plan(load_recipe(recipe, sets, changes), found, mean_tokens)


def show_plan(p: Plan, out: Console) -> list[str]:
    """Print the arithmetic; the reasons why the recipe cannot run."""
    r = p.recipe
    served = f", {p.nodes[1]} more nodes for vLLM" if p.nodes[1] else ""
    out.print(f"recipe {r.name}: {r.model.name} on {p.nodes[0]} x {r.distributed.processes} {p.gpu.name} of {p.gpu.gib:.0f} GiB"
              f"{served}; ZeRO {r.distributed.zero}, offload {r.distributed.offload}, vLLM {r.vllm.mode}", highlight=False)
    reasons = problems(p)
    groups = [training_memory(p), writing_memory(p)]
    time = None if reasons else simulate_step(p)
    for lines in groups + ([time.lines] if time else []):
        unit = lines[0].unit
        table = Table("", unit, "arithmetic", title=lines[0].group, box=None)
        for line in lines:
            table.add_row(line.name, f"{line.value:.1f}", line.how)
        table.add_row("sum", f"{sum(line.value for line in lines):.1f}", "", style="bold")
        out.print(table)
    if time:
        out.print(f"a step: {time.seconds:.0f} s, {hours(p, 1):.2f} GPU-hours; {r.grpo.steps} steps: "
                  f"{time.seconds * r.grpo.steps / 3600:.1f} h, {hours(p, r.grpo.steps):.0f} GPU-hours; bound by "
                  f"{time.bound.name}; of writing {time.tail_s:.0f} s are the length tail, of training {time.waiting_s:.0f} s "
                  "waiting for the longest", highlight=False, soft_wrap=True)
    table = Table("constant", "value", "unit", "", "source", box=None)
    for name, constant in C.items():
        table.add_row(name, f"{constant.value:g}", constant.unit, constant.kind, constant.source)
    out.print(table)
    return reasons


def hours(p: Plan, steps: int) -> float:
    """GPU-hours of all GPUs that are held, the served Writing RM's too."""
    judge = c("rm_gpus") if p.recipe.reward.writing.url and p.recipe.reward.weights.writing else 0
    return simulate_step(p).seconds * steps * (p.gpus + judge) / 3600


ONE_NODE = ["distributed.zero=3", "distributed.offload=none", "grpo.queries_per_step=8", "vllm.tensor_parallel=1"]
SERVED = ["reward.writing.url=http://judge:8017"]


def sizes_table() -> list[dict]:
    """The paper's setting with other models: 14B and 32B on 8 x 8 GPUs with vLLM on half of them, 0.5B to 7B on one node."""
    rows = []
    for name in SHAPES:
        small = SHAPES[name].parameters < 10e9
        if SHAPES[name].parameters > 40e9:
            continue
        judge = [f"writing_rm.model={name}"] if small else []
        p = planned("paper", [f"model.name={name}", *judge, *(ONE_NODE if small else [])], *((1, 8) if small else (8, 8)))
        reasons, time = problems(p), simulate_step(p)
        rows.append({
            "model": name.split("/")[1], "nodes": "1" if small else f"{p.nodes[0]} + {p.nodes[1]} vLLM",
            "completions a step": p.completions, "vLLM": p.recipe.vllm.mode,
            "GiB, training": f"{sum(line.value for line in training_memory(p)):.1f}",
            "GiB, writing": f"{sum(line.value for line in writing_memory(p)):.1f}", "completions at once": slots(p),
            "s a step": f"{time.seconds:.0f}", "bound by": time.bound.name, "GPU-hours a step": f"{hours(p, 1):.1f}",
            "GPU-hours, 150 steps": f"{hours(p, p.recipe.grpo.steps):.0f}", "fits": "; ".join(reasons) or "yes"})
    return rows


def changes_table() -> list[dict]:
    """What of the paper's GRPO step one change alone would save; seconds for 1,024 completions."""
    base = planned("paper")
    now = simulate_step(base)
    halves = {"vLLM on 2 nodes, training on 6": ["vllm.nodes=2", "grpo.queries_per_step=30"],
              "vLLM beside the trainer on all 8 nodes": ["vllm.mode=colocate", "vllm.nodes=0", "vllm.sleep=true",
                                                         "vllm.memory_share=0.5"],
              "two GPUs a copy in vLLM": ["vllm.tensor_parallel=2"], "eight GPUs a copy in vLLM": ["vllm.tensor_parallel=8"],
              "no gradient checkpointing": ["grpo.gradient_checkpointing=false"],
              "Writing RM on 8 more GPUs, `lwz serve-rm`": SERVED}
    rows = [("as the recipe has it", "recipe", now.seconds, "")]
    for name, sets in halves.items():
        p = planned("paper", sets)
        rows.append((name, "recipe", simulate_step(p).seconds * 1024 / p.completions, "; ".join(problems(p))))
    for name, values in {"weights sent at 50 GB/s": {"sync_gbs": 50.0},
                         "training at 0.45 of peak": {"train_flops_share": 0.45}}.items():
        with assuming(**values):
            rows.append((name, "hardware or software", simulate_step(base).seconds, ""))
    parts = {line.name: line.value for line in now.lines}
    rows += [("micro-batches of like length: no GPU waits", "software", now.seconds - now.waiting_s, ""),
             ("no length tail while writing", "bound", now.seconds - now.tail_s, ""),
             ("Writing RM scores while others write", "software", now.seconds - min(parts["Writing RM"], parts["writing"]), ""),
             ("writing and scoring one step ahead of training", "method: off-policy by a step",
              max(parts["writing"] + parts["Writing RM"], now.seconds - parts["writing"] - parts["Writing RM"]), "")]
    return [{"change": name, "a change of": kind, "s for 1,024 completions": f"{seconds:.0f}",
             "saves": f"{1 - seconds / now.seconds:.0%}", "fits": reason or "yes"} for name, kind, seconds, reason in rows]


def stages_table() -> list[dict]:
    """Where the stages of `paper` run and for how long, on its 8 nodes; "unknown" where a size is not published."""
    p = planned("paper")
    r, grpo = p.recipe, simulate_step(p)
    whole = dataclasses.replace(p, recipe=r.model_copy(update={"vllm": r.vllm.model_copy(update={"mode": "none", "nodes": 0})}))

    def forward_backward_h(tokens: float, sequence: int) -> float:
        each = micro_s(whole, sequence - c("prompt_tokens"), 4)
        return tokens / sequence / whole.training_gpus * each / 3600

    copies, places, judge = p.gpus // r.vllm.tensor_parallel, slots(p), shape(r.writing_rm.model)
    distilled = r.cot.queries * r.cot.completions_per_query
    written_h = distilled * p.mean_tokens / (copies * places) * decode_s(p, places, p.mean_tokens / 2) / 3600
    scored_h = judge.flops(distilled * p.mean_tokens, p.mean_tokens / 2, 1) / (p.gpu.flops * c("prefill_flops_share")) / 3600
    longest = r.samples.sampling.max_new_tokens
    samples_h = longest * decode_s(p, -(-r.samples.queries // copies), longest / 2) / 3600
    rows = [
        ("writing-rm", "8 x 8", "unknown", "the number of pairs is not published", "ZeRO-3, by launch: slurm"),
        ("corpus", "CPU nodes", "unknown", "the size of the raw corpus is not published", "Slurm job arrays"),
        ("grpo, each of 3 arms", f"{p.nodes[0]} + {p.nodes[1]} vLLM, 8 GPUs each",
         f"{grpo.seconds * r.grpo.steps / 3600:.0f} h", grpo.bound.name, "launch: slurm; not run on GPUs yet"),
        ("distil", "8 x 8 vLLM, then 1 x 8", f"{written_h:.0f} h and {scored_h:.0f} h",
         f"the Writing RM: one process, a layer after the other over its GPUs, {distilled:,} completions",
         "vLLM on all nodes writes; `cot.completions_per_query` and `cot.queries` shorten both; not run on GPUs yet"),
        ("pretrain", "8 x 8", f"{forward_backward_h(r.pretrain.tokens, r.pretrain.sequence_tokens) / 24:.1f} days",
         "arithmetic of 30e9 tokens", "ZeRO-3, by launch: slurm; not run on GPUs yet"),
        ("sft, each of 2 arms", "8 x 8", "unknown", "tokens of LongWriter-6k: not counted here", "ZeRO-3, by launch: slurm"),
        ("samples, each", "8 x 8 vLLM, then 1 x 8", f"{60 * samples_h:.0f} min, and loading", "the longest completion",
         "as distil; not run on GPUs yet")]
    return [dict(zip(("stage", "nodes x GPUs", "time", "bound by", "in this kit"), row, strict=True)) for row in rows]


def markdown(rows: list[dict]) -> str:
    """A table; its columns are those of the first row."""
    head = [f"| {' | '.join(rows[0])} |", f"|{'---|' * len(rows[0])}"]
    return "\n".join(head + [f"| {' | '.join(map(str, row.values()))} |" for row in rows])


def pages() -> dict[str, str]:
    """{file of cluster_jobs/: content}: what `python -m lwzlib.cluster.plan_pages` writes."""
    known = [{"constant": name, "value": f"{each.value:g} {each.unit}", "source": each.source} | {"": each.kind}
             for name, each in C.items()]
    sources = "\n\n".join(f"**{kind.capitalize()}**\n\n" + markdown([{key: row[key] for key in ("constant", "value", "source")}
                                                                       for row in known if row[""] == kind])
                            for kind in ("published", "measured", "assumed"))
    p = planned("paper", SERVED)
    time = simulate_step(p)
    parts = [{"part": line.name, "s": f"{line.value:.1f}", "share": f"{line.value / time.seconds:.0%}", "arithmetic": line.how}
             for line in time.lines]
    estimates = f"""# What GRPO needs, by size of the model

Made by `python -m lwzlib.cluster.plan_pages`; nothing here was run. H800 of 80 GiB, the paper's sampling (at most 14,000 new
tokens), a mean of {p.mean_tokens:.0f} tokens assumed. On one node: 256 completions a step, ZeRO-3, vLLM beside the trainer and
a Writing
RM of the policy's size; on 8 nodes: 1,024 completions, and one of 72B. It is sharded beside the policy.
`lwz estimate RECIPE` shows the arithmetic line by line.

{markdown(sizes_table())}

## Constants

{sources}
"""
    plan_page = f"""# The paper's setting on 8 nodes of 8 H800

Made by `python -m lwzlib.cluster.plan_pages`; simulated, nothing here was run. Constants and their sources: `estimates.md`.

## A GRPO step

{markdown(parts)}

{time.seconds:.0f} s. Of writing, {time.tail_s:.0f} s are the length tail: less than half of a copy's completions still run. Of
training, {time.waiting_s:.0f} s are spent waiting for the GPU with the longest completion.
Not in it: the sentence encoder, tensor-parallel communication, checkpoints, start-up.

## What to change first

{markdown(changes_table())}

## Stages

{markdown(stages_table())}
"""
    settings = {"zero2": "distributed.zero=2", "zero3": "distributed.zero=3", "zero3_offload":
                "distributed.zero=3 distributed.offload=all"}
    configs = {f"deepspeed/{name}.json": json.dumps(deepspeed_config(load_recipe("paper", sets)), indent=1) + "\n"
               for name, sets in settings.items()}
    return {"estimates.md": estimates, "paper_plan.md": plan_page} | configs


if __name__ == "__main__":
    for file, content in pages().items():
        path = CLUSTER_JOBS / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
        print(path)
