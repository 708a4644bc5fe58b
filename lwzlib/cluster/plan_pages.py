"""Estimates as people read them: the arithmetic of one plan, and the tables of `cluster_jobs/`.

The paper's own setting is planned on its own hardware; sizes that it does not have are planned by changing the model alone.
"""

import json
from pathlib import Path

import jinja2
from rich.console import Console
from rich.table import Table

from lwzlib.base.parallel import deepspeed_config
from lwzlib.base.paths import CLUSTER_JOBS, TEXTS
from lwzlib.base.recipe import RecipeError, load_recipe
from lwzlib.base.rows import RunError, read_yaml
from lwzlib.cluster import estimate
from lwzlib.cluster.disk import checkpoint_gb, checkpoints, disk
from lwzlib.cluster.estimate import CONSTANTS, GPUS, TRAINS, WRITES, Plan, constant, problems, slots, total
from lwzlib.cluster.shapes import SHAPES, shape_of
from lwzlib.cluster.step_time import Step, checkpoint, decode_s, micro_s, simulate_step

_CHANGES = read_yaml(TEXTS / "paper_plan.yaml")


def planned(recipe: str, sets=None, nodes: int | None = None, gpus: int | None = None, gpu: str = "h800",
            gpu_gib: float | None = None, mean_tokens: float | None = None) -> Plan:
    """The recipe on these GPUs. Raises RecipeError for an unknown GPU, and for what the recipe itself refuses."""
    if gpu not in GPUS:
        raise RecipeError(f"no GPU {gpu!r}; known are {', '.join(GPUS)}; for another memory give --gpu-gib")
    stated = load_recipe(recipe, sets)
    changes: dict = {}
    if nodes or gpus:
        nodes, gpus = nodes or stated.distributed.nodes, gpus or stated.distributed.processes
        changes = {"distributed.nodes": nodes, "distributed.processes": gpus,
                   "launch": "slurm" if nodes > 1 else "torchrun" if gpus > 1 else stated.launch}
        if nodes == 1 and stated.vllm.mode == "server":
            changes |= {"vllm.mode": "colocate", "vllm.nodes": 0, "vllm.sleep": True, "vllm.memory_share": 0.5}
    kind = GPUS[gpu] if gpu_gib is None else GPUS[gpu]._replace(gib=gpu_gib)
    return estimate.make_plan(load_recipe(recipe, sets, changes), kind, mean_tokens)


def show_plan(plan: Plan, out: Console) -> list[str]:
    """Print the arithmetic; the reasons why the recipe cannot run."""
    recipe, reasons = plan.recipe, problems(plan)
    served = f", {plan.nodes[1]} more nodes for vLLM" if plan.nodes[1] else ""
    out.print(f"recipe {recipe.name}: {recipe.model.name} on {plan.nodes[0]} x {recipe.distributed.processes} {plan.gpu.name} "
              f"of {plan.gpu.gib:.0f} GiB{served}; ZeRO {recipe.distributed.zero}, offload {recipe.distributed.offload}, "
              f"vLLM {recipe.vllm.mode}", highlight=False)
    time = None if reasons else simulate_step(plan)
    groups = [(f"{stage}: {TRAINS}", "GiB", estimate.training_memory(plan, stage)) for stage in plan.stages]
    groups += [(f"grpo: {WRITES}", "GiB", estimate.writing_memory(plan)), ("disk, all stages that train", "GB", disk(plan))]
    for group, unit, lines in [*groups, ("a step of grpo", "s", time.lines)] if time else groups:
        table = Table("", unit, "arithmetic", title=group, box=None)
        for line in lines:
            table.add_row(line.name, f"{line.value:.1f}", line.how)
        table.add_row("sum", f"{total(lines):.1f}", "", style="bold")
        out.print(table)
    if time:
        _show_time(plan, time, out)
    for room in room_for_queries(plan):
        out.print(room, highlight=False, soft_wrap=True)
    table = Table("constant", "value", "unit", "kind", "source", box=None)
    for name, known in CONSTANTS.items():
        table.add_row(name, f"{known.value:g}", known.unit, known.kind, known.source)
    out.print(table)
    return reasons


def _show_time(plan: Plan, time: Step, out: Console) -> None:
    steps, count, saved_gb = plan.recipe.grpo.steps, checkpoints(plan, time.seconds), checkpoint_gb(plan).value
    save_h = count * checkpoint(plan).value / 3600
    out.print(f"a step: {time.seconds:.0f} s, {gpu_hours(plan, 1):.2f} GPU-hours; {steps} steps: "
              f"{time.seconds * steps / 3600:.1f} h, {gpu_hours(plan, steps):.0f} GPU-hours; bound by {time.bound.name}; "
              f"of writing {time.tail_s:.0f} s are the length tail, of training {time.waiting_s:.0f} s waiting for the "
              f"longest\n{count} checkpoints of {saved_gb:.1f} GB are written besides, "
              f"{count * saved_gb / 1000:.2g} TB in {save_h:.1f} h", highlight=False, soft_wrap=True)
    if plan.recipe.name == "paper":
        for row in readings(plan):
            out.print(", ".join(f"{name}: {value}" for name, value in row.items()), highlight=False, soft_wrap=True)


def room_for_queries(plan: Plan) -> list[str]:
    """A line for each kind of sampling: the tokens that the Writing RM has for a query beside the longest completion."""
    recipe, reads, assumed = plan.recipe, plan.recipe.writing_rm.max_tokens, constant("prompt_tokens")
    longest = {section: getattr(recipe, section).sampling.max_new_tokens
               for section in ("grpo", "samples") if recipe.reward.weights.writing and recipe.reward.writing.model == "stage"}
    return [f"writing_rm.max_tokens = {reads} leaves {max(0, reads - tokens)} tokens for a query beside "
            f"{section}.sampling.max_new_tokens = {tokens}"
            + f": less than the {assumed:.0f} assumed, so the longest answers are cut for it" * (tokens + assumed > reads)
            for section, tokens in longest.items()]


def readings(plan: Plan) -> list[dict]:
    """What a step costs by each reading of the paper's "32": a row per reading. One note has 32 completions a query, another
    32 trajectories a step."""
    rows = []
    for name, sizes in _CHANGES["readings"].items():
        grpo = plan.recipe.grpo.model_copy(update=sizes)
        row = {"reading": name} | sizes | {"completions a step": grpo.group_size * grpo.queries_per_step}
        try:
            other = estimate.make_plan(plan.recipe.model_copy(update={"grpo": grpo}), plan.gpu, plan.mean_tokens)
        except RunError as error:  # fewer completions than GPUs
            rows.append(row | {"s a step": str(error), "GPU-hours, all steps": ""})
        else:
            rows.append(row | {"s a step": f"{simulate_step(other).seconds:.0f}",
                               "GPU-hours, all steps": f"{gpu_hours(other, grpo.steps):.0f}"})
    return rows


def gpu_hours(plan: Plan, steps: int) -> float:
    """Hours times all GPUs that are held, those of a served Writing RM too."""
    reward = plan.recipe.reward
    judge = constant("rm_gpus") if reward.writing.url and reward.weights.writing and not reward.by_language_model else 0
    return simulate_step(plan).seconds * steps * (plan.gpus + judge) / 3600


def sizes_table() -> list[dict]:
    """The paper's setting with other models: 14B and 32B on 8 x 8 GPUs with vLLM on half of them, 0.5B to 7B on one node."""
    rows = []
    for name, shape in SHAPES.items():
        if shape.parameters > 40e9:
            continue
        small = shape.parameters < 10e9
        one_node = f" writing_rm.model={name} {_CHANGES['one_node']}" if small else ""
        plan = planned("paper", f"model.name={name}{one_node}", 1 if small else 8, 8)
        time = simulate_step(plan)
        rows.append({
            "model": name.split("/")[1], "nodes": "1" if small else f"{plan.nodes[0]} + {plan.nodes[1]} vLLM",
            "completions a step": plan.completions, "vLLM": plan.recipe.vllm.mode,
            "GiB, training": f"{total(estimate.training_memory(plan)):.1f}",
            "GiB, writing": f"{total(estimate.writing_memory(plan)):.1f}",
            "completions at once": slots(plan), "s a step": f"{time.seconds:.0f}", "bound by": time.bound.name,
            "GPU-hours a step": f"{gpu_hours(plan, 1):.1f}",
            "GPU-hours, 150 steps": f"{gpu_hours(plan, plan.recipe.grpo.steps):.0f}",
            "fits": "; ".join(problems(plan)) or "yes"})
    return rows


def changes_table() -> list[dict]:
    """Seconds for 1,024 completions of the paper's GRPO step, with one change alone, and what that would save."""
    paper = planned("paper")
    now = simulate_step(paper)
    part_s = {line.name: line.value for line in now.lines}
    generating_s = part_s["writing"] + part_s["Writing RM"]
    rows = [("as the recipe has it", "recipe", now.seconds, "")]
    for name, sets in _CHANGES["recipe"].items():
        plan = planned("paper", sets)
        rows.append((name, "recipe", simulate_step(plan).seconds * 1024 / plan.completions, "; ".join(problems(plan, "grpo"))))
    for name, values in _CHANGES["constants"].items():
        with estimate.assuming(**values):
            rows.append((name, "hardware or software", simulate_step(paper).seconds, ""))
    rows += [
        ("no GPU waits for a longer completion of another", "bound", now.seconds - now.waiting_s, ""),
        ("no length tail while writing", "bound", now.seconds - now.tail_s, ""),
        ("Writing RM scores while others write", "software", now.seconds - min(part_s["Writing RM"], part_s["writing"]), ""),
        ("writing and scoring one step ahead of training", "method: off-policy by a step",
         max(generating_s, now.seconds - generating_s), "")]
    return [{"change": name, "a change of": kind, "s for 1,024 completions": f"{seconds:.0f}",
             "saves": f"{1 - seconds / now.seconds:.0%}", "fits": reason or "yes"} for name, kind, seconds, reason in rows]


def stage_times() -> dict[str, float]:
    """Hours, days and minutes of the stages of `paper` on its 8 nodes, where their sizes are published."""
    plan = planned("paper")
    recipe, grpo, replicas = plan.recipe, simulate_step(plan), plan.gpus // plan.recipe.vllm.tensor_parallel
    completions, mean, places = recipe.cot.queries * recipe.cot.completions_per_query, plan.mean_tokens, slots(plan)
    written_s = completions * mean / (replicas * places) * decode_s(plan, places, mean / 2)
    judged = shape_of(recipe.writing_rm.model).flops(completions * mean, mean / 2, 1)
    training = planned("paper", ["vllm.mode=none", "vllm.nodes=0"])  # pretraining has all nodes: nothing is served beside it
    sequence = recipe.pretrain.sequence_tokens
    sequence_s = micro_s(training, sequence - constant("prompt_tokens"), 4) / training.training_gpus
    longest = recipe.samples.sampling.max_new_tokens
    samples_s = longest * decode_s(plan, -(-recipe.samples.queries // replicas), longest / 2)
    return {"grpo_h": grpo.seconds * recipe.grpo.steps / 3600, "distilled": completions, "writing_h": written_s / 3600,
            "scoring_h": judged / (plan.gpus * plan.gpu.flops * constant("prefill_flops_share")) / 3600,
            "pretrain_days": recipe.pretrain.tokens / sequence * sequence_s / 86400, "samples_min": samples_s / 60}


def stage_sizes(plan: Plan) -> dict:
    """Memory of each stage that trains, and the disk of all."""
    return {"memory": [{"stage": name, "GPUs": stage.gpus, "tokens at once": f"{stage.sequences} x {stage.tokens}",
                        "GiB, training": f"{total(estimate.training_memory(plan, name)):.1f}"}
                       for name, stage in plan.stages.items()],
            "disk": [{"disk": line.name, "GB": f"{line.value:.0f}", "arithmetic": line.how} for line in disk(plan)],
            "saves": checkpoints(plan, simulate_step(plan).seconds), "save_s": checkpoint(plan).value,
            "checkpoint_gb": checkpoint_gb(plan).value,
            "room_gib": plan.gpu.gib - constant("reserve_gib")}


def markdown(rows: list[dict]) -> str:
    """A table; its columns are those of the first row."""
    head = [f"| {' | '.join(rows[0])} |", f"|{'---|' * len(rows[0])}"]
    return "\n".join(head + [f"| {' | '.join(map(str, row.values()))} |" for row in rows])


def pages() -> dict[str, str]:
    """{file of cluster_jobs/: content}: what `python -m lwzlib.cluster.plan_pages` writes."""
    templates = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), undefined=jinja2.StrictUndefined,
                                   trim_blocks=True)  # Markdown, not HTML: nothing to escape
    templates.filters["markdown"] = markdown
    paper = planned("paper")
    estimates = templates.get_template("estimates.md.j2").render(
        mean_tokens=paper.mean_tokens, sizes=sizes_table(), constants=CONSTANTS)
    plan_page = templates.get_template("paper_plan.md.j2").render(
        step=simulate_step(paper), changes=changes_table(), nodes=paper.nodes,
        readings=readings(paper), grpo_bound=simulate_step(paper).bound.name, **stage_times(), **stage_sizes(paper))
    texts = {"estimates.md": estimates, "paper_plan.md": plan_page}
    for name, sets in _CHANGES["deepspeed"].items():
        texts[f"deepspeed/{name}.json"] = json.dumps(deepspeed_config(load_recipe("paper", sets)), indent=1)
    return {file: text.rstrip("\n") + "\n" for file, text in texts.items()}


if __name__ == "__main__":
    for file, content in pages().items():
        path = CLUSTER_JOBS / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
        print(path)
