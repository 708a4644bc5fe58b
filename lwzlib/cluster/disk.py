"""Disk that a recipe fills: checkpoints, of which each stage keeps its last two, snapshots of the policy, and models.

Nothing of it is published. Checkpoints stay when a stage has ended: whoever needs the room removes the folders `checkpoints/`.
"""

from collections import Counter

from lwzlib.cluster.estimate import Line, Plan
from lwzlib.pipeline.stages import places

_KEPT = 2  # `save_total_limit` of base.trainers


def checkpoint_gb(plan: Plan, stage: str = "grpo") -> Line:
    """GB of one checkpoint: what is trained, and its optimiser. Under ZeRO that has float32 copies of the weights, and ZeRO-2
    saves the weights a second time; a model or an adapter that is float32 has two moments."""
    at, width = plan.stages[stage], plan.dtype_bytes
    parameter_bytes = {0: 4 + 8, 2: 2 * width + 12, 3: width + 12}[at.zero]
    return Line("checkpoint", at.trained * parameter_bytes / 1e9, f"{at.trained / 1e9:.3g}e9 x {parameter_bytes} B")


def checkpoints(plan: Plan, step_s: float) -> int:
    """Checkpoints of a GRPO run whose steps take so long: by steps, and by the clock since the last one."""
    every_steps, every_s = plan.recipe.grpo.checkpoint_every_steps, 60 * plan.recipe.distributed.checkpoint_every_minutes
    count, since_s = 0, 0.0
    for step in range(1, plan.recipe.grpo.steps + 1):
        since_s += step_s
        if step % every_steps == 0 or 0 < every_s <= since_s:
            count, since_s = count + 1, 0.0
    return count


def disk(plan: Plan) -> list[Line]:
    """GB that are full when all stages of the recipe that train have ended, and while the largest checkpoint is replaced."""
    recipe, policy = plan.recipe, plan.stages["grpo"]
    runs = Counter(name for _, name in places(recipe))
    saved = {name: checkpoint_gb(plan, name) for name in plan.stages if name != "cold-start"}  # which begins anew
    lines = [Line(f"{name}: checkpoints", runs[name] * _KEPT * one.value, f"{_runs(runs[name])} x {_KEPT} kept x {one.how}")
             for name, one in saved.items()]
    largest = max(saved, key=lambda name: saved[name].value)
    lines.append(Line("a third one", saved[largest].value, f"of {largest}, before the oldest goes: {saved[largest].how}"))
    every = recipe.evaluation.every_steps
    count = len(range(every, recipe.grpo.steps, every)) if every else 0
    parameters, width = (policy.trained, 4) if policy.adapter else (policy.model.parameters, plan.dtype_bytes)
    lines.append(Line("grpo: snapshots", runs["grpo"] * count * parameters * width / 1e9,
                      f"{_runs(runs['grpo'])} x {count}, one every {every} steps, x {parameters / 1e9:.3g}e9 x {width} B"))
    models = sum(runs[name] * stage.model.parameters for name, stage in plan.stages.items())
    return [*lines, Line("models", models * plan.dtype_bytes / 1e9,
                         f"of all stages: {models / 1e9:.3g}e9 x {plan.dtype_bytes} B")]


def _runs(count: int) -> str:
    return "1 run" if count == 1 else f"{count} runs"
