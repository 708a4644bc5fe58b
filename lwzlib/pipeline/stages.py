"""The stages of a run."""

from pathlib import Path

from lwzlib.base.paths import RUNS
from lwzlib.base.recipe import Recipe
from lwzlib.base.rows import RunError, digest_of, rows_of
from lwzlib.base.run_folder import Run
from lwzlib.method.queries import queries_of_recipe

_BASE = ("model", "data", "prompt", "cold_start")  # what every trained weight depends on
_JUDGED = (*_BASE, "writing_rm", "reward")
_DISTILLED = (*_JUDGED, "grpo", "cot")
_PRETRAINED = (*_DISTILLED, "corpus", "pretrain")
_SHARED = {
    "cold-start": _BASE,
    "writing-rm": ("model", "data", "writing_rm"),
    "corpus": ("model", "data", "corpus"),
    "distil": (*_DISTILLED, "corpus"),
    "pack": _PRETRAINED,
    "pretrain": _PRETRAINED,
}
# An arm that changes one of these sections has a shared stage of its own, in its folder; else the arms share it.
_OWN = {
    "cold-start": _BASE,
    "writing-rm": ("writing_rm",),
    "corpus": ("model", "corpus"),
    "distil": ("model", "corpus", "cot"),
    "pack": ("model", "corpus", "cot", "pretrain"),
    "pretrain": (*_BASE, "corpus", "cot", "pretrain"),
}
_OF_ARMS = {
    "samples-before": (*_JUDGED, "samples"),
    "grpo": (*_JUDGED, "grpo"),
    "sft": (*_BASE, "sft"),
    "samples-during": (*_JUDGED, "grpo", "samples", "evaluation"),
    "samples-after": (*_JUDGED, "grpo", "samples"),
}


def run_folder(recipe: Recipe, seed: int) -> Path:
    """Where a run goes that was given no folder: `runs/<recipe>` of this repository, or `runs/<recipe>-seed<n>`."""
    return RUNS / (recipe.name if seed == 0 else f"{recipe.name}-seed{seed}")


def stage_run(stage: str, recipe: Recipe, root: str | Path, seed: int, arm: str = "") -> Run:
    """The Run of a stage, shared by the arms or of one of them. Raises RecipeError, DataError or RunError."""
    if stage not in (known := _SHARED | _OF_ARMS):
        raise RunError(f"no stage {stage!r}; stages are {', '.join(known)}")
    own = _own(stage, recipe, arm)
    asked = recipe.for_arm(arm) if own else recipe
    if stage in _SHARED:
        sections, about = _SHARED[stage], {}
    elif stage in arm_stages(recipe, arm):
        sections, about = _sections(stage, asked, arm), asked.arm(arm).model_dump(exclude={"change"})
    else:
        raise RunError(f"arm {arm!r} has no stage {stage!r}; it has {', '.join(arm_stages(recipe, arm))}")
    if own and arm and recipe.arm(arm).change:  # its sections do not say what the arm starts from
        about |= {f"{of or 'shared'}/{other}": stage_run(other, recipe, root, seed, of).fingerprint
                  for other, of in needs(stage, recipe, arm)}
    return Run(Path(root) / (arm if own else "") / stage, asked, seed, sections, _inputs(asked, sections) | about)


def _own(stage: str, recipe: Recipe, arm: str) -> bool:
    """The arm does the stage for itself, in its own folder."""
    changed = {name.split(".")[0] for name in recipe.arm(arm).change} if arm else set()
    return stage in _OF_ARMS or bool(changed & set(_OWN[stage]))


def _sections(stage: str, recipe: Recipe, arm: str) -> tuple[str, ...]:
    """What a stage of an arm depends on: its own sections, and those of what it starts from and learns from."""
    asked = recipe.arm(arm)
    sections = _OF_ARMS[stage] + (_PRETRAINED if asked.start == "continual-pretrain" else ())
    if asked.algorithm == "sft" and stage in ("sft", "samples-after"):
        sections += ("sft",) + (("corpus", *_DISTILLED) if recipe.sft.data == "made" else ())
    return tuple(dict.fromkeys(sections))


def _inputs(recipe: Recipe, sections: tuple[str, ...]) -> dict:
    """Digests of the queries and files that a result depends on, and what the arm changes whose texts are distilled. Raises
    DataError."""
    rm, reward = recipe.writing_rm, recipe.reward
    files = {"model": [recipe.model.name], "writing_rm": [rm.model, rm.pairs, *rm.corpora], "sft": [recipe.sft.data],
             "reward": [reward.writing.model, reward.format.encoder]}  # not corpus.sources: at scale they go once packed
    taught = {f"{name} changes": arm.change for name, arm in recipe.arms.items() if name == recipe.cot.arm and arm.change}
    queries = [query.model_dump(mode="json") for query in queries_of_recipe(recipe)]
    return {"queries_digest": recipe.fingerprint("data", queries=queries)} | (taught if "cot" in sections else {}) | {
        f"{path} holds": digest_of(full) for section in sections for path in files.get(section, [])
        if path not in ("", "made", "stage") and (full := Path(path).expanduser()).exists()}


def run_stage(stage: str, recipe: Recipe, root: str | Path, seed: int, arm: str = "") -> Path:
    """Do the stage here, after the stages it needs; returns its artefact. A finished stage returns at once."""
    from lwzlib.method.cold_start import cold_start
    from lwzlib.method.pretrain import pretrain

    run = stage_run(stage, recipe, root, seed, arm)
    if run.finished and stage != "pack":  # that one looks for damage first
        return run.folder / "model" if (run.folder / "model").is_dir() else run.folder

    def first(other, of=arm):
        return run_stage(other, recipe, root, seed, of)

    def base():
        return str(first("cold-start")) if run.recipe.cold_start.queries else run.recipe.model.name

    if stage == "cold-start":
        return cold_start(run.recipe, run)
    if stage == "writing-rm":
        from lwzlib.data.made import made_pairs
        from lwzlib.method.train_writing_rm import train_rm

        return train_rm(run.recipe, run, made_pairs)
    if stage in ("corpus", "distil", "pack"):
        return _material(stage, run, first)
    if stage == "pretrain":
        return pretrain(run.recipe, run, base(), first("corpus"), first("pack"))
    start = str(first("pretrain")) if recipe.arm(arm).start == "continual-pretrain" else base()
    if stage == "sft":
        from lwzlib.data.made import made_answers
        from lwzlib.method.sft import train_sft

        if run.recipe.sft.data == "made":
            distilled = first("distil")
            return train_sft(run.recipe, run, arm, start, lambda: made_answers(run.recipe, run.seed, distilled))
        return train_sft(run.recipe, run, arm, start, lambda: (row for _, row in rows_of(run.recipe.sft.data)))
    writing_rm = _writing_rm(run.recipe, first)
    if stage == "grpo":
        from lwzlib.method.grpo import train_arm

        return train_arm(run.recipe, run, arm, start, writing_rm)
    from lwzlib.method.samples import write_samples, write_samples_during

    if stage == "samples-during":
        return write_samples_during(run.recipe, run, arm, start, first("grpo").parent, writing_rm, _served(run.recipe))
    return write_samples(run.recipe, run, arm, start if stage == "samples-before" else
                   str(first(recipe.arm(arm).algorithm)), writing_rm, _served(run.recipe))


def _material(stage: str, run: Run, first) -> Path:
    """The stages that make what continual pretraining reads."""
    if stage == "distil":
        from lwzlib.data.tokenise import tokenise
        from lwzlib.method.distil import distil

        return distil(run.recipe, run, str(first("grpo", run.recipe.cot.arm)), _writing_rm(run.recipe, first),
                      tokenise, _served(run.recipe))
    from lwzlib.data import packing
    from lwzlib.data.tokenise import prepare_corpus

    if stage == "corpus":
        return prepare_corpus(run.recipe, run)
    return packing.pack(run.recipe, run, first("corpus"), first("distil") if run.recipe.pretrain.cot_token_fraction else None)


def _served(recipe: Recipe):
    """Who writes for a stage: vLLM servers where the recipe has them, else (None) the stage itself."""
    from lwzlib.pipeline import served

    return served.write if recipe.vllm.mode == "server" else None


def _writing_rm(recipe: Recipe, first) -> str:
    return str(first("writing-rm")) if recipe.reward.weights.writing > 0 and recipe.reward.writing.model == "stage" else ""


def arm_stages(recipe: Recipe, arm: str) -> list[str]:
    """Of one arm, in order; `samples-during` only where the policy is rated while RL goes on (`evaluation.every_steps`)."""
    asked = recipe.for_arm(arm)
    during = asked.arm(arm).algorithm == "grpo" and 0 < asked.evaluation.every_steps < asked.grpo.steps
    return ["samples-before", recipe.arm(arm).algorithm, *["samples-during"] * during, "samples-after"]


def places(recipe: Recipe) -> list[tuple[str, str]]:
    """(arm, or "" where it is shared, stage) of the whole recipe, in an order in which they can be done."""
    found: dict[tuple[str, str], None] = {}

    def add(stage: str, arm: str) -> None:
        place = (arm if _own(stage, recipe, arm) else "", stage)
        if place not in found:
            for other, of in needs(stage, recipe, arm):
                add(other, of)
            found[place] = None

    for name in recipe.arms:
        for stage in arm_stages(recipe, name):
            add(stage, name)
    return list(found)


def needs(stage: str, recipe: Recipe, arm: str = "") -> list[tuple[str, str]]:
    """(stage, arm) that must be finished before, in this order; those have needs of their own."""
    asked = recipe.for_arm(arm) if arm else recipe
    base = [("cold-start", arm)] if asked.cold_start.queries else []
    judge = [("writing-rm", arm)] if _writing_rm(asked, lambda stage: stage) else []
    material = {"distil": [("grpo", asked.cot.arm), *judge], "pretrain": [*base, ("corpus", arm), ("pack", arm)],
                "pack": [("corpus", arm), *[("distil", arm)] * (asked.pretrain.cot_token_fraction > 0)]}
    if stage in _SHARED:
        return material.get(stage, [])
    start = [("pretrain", arm)] if recipe.arm(arm).start == "continual-pretrain" else base
    if stage == "sft":
        return start + [("distil", arm)] * (asked.sft.data == "made")
    return [(recipe.arm(arm).algorithm, arm)] * (stage in ("samples-during", "samples-after")) + start + judge
