"""The stages of a run, as one table: what each needs, which sections of the recipe it reads, whose it is, and what does it.

Fingerprints, order, `lwz status`, launching and resuming follow from the rows. To add a stage, add a row to `STAGES`; it is
reached where another row needs it or `arm_stages` names it. Its quantities go into a section of the recipe
(`base/quantities.py`), the files it reads into `_inputs`.

Published is the order of the method: continual pretraining on packed text with chain-of-thought documents that an arm wrote,
then GRPO against a trained Writing RM, and SFT as the baseline. The cold start and the samples of an arm are the kit's own.
"""

import importlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from lwzlib.base.paths import RUNS
from lwzlib.base.recipe import Recipe
from lwzlib.base.rows import RunError, digest_of, rows_of
from lwzlib.base.run_folder import Run
from lwzlib.method.queries import queries_of_recipe


class Work(NamedTuple):
    """A stage that is due: its Run, its arm ("" where the arms share it), and the artefacts of the stages it needs, by name."""

    run: Run
    arm: str
    needed: dict[str, Path]

    @property
    def recipe(self) -> Recipe:
        """The recipe, with what the arm changes."""
        return self.run.recipe

    @property
    def start(self) -> str:
        """Name or folder of the model that training starts from."""
        return str(self.needed.get("pretrain") or self.needed.get("cold-start") or self.recipe.model.name)

    @property
    def writing_rm(self) -> str:
        """Folder of the Writing RM that this run trained; "" where there is none."""
        return str(self.needed.get("writing-rm", ""))

    @property
    def writer(self) -> Callable | None:
        """Who writes completions for a stage: the vLLM servers of the recipe, or None for the stage's own process."""
        return _later("pipeline.served.write") if self.recipe.vllm.mode == "server" else None

    def answers(self) -> Iterable[dict]:
        """Rows that SFT learns from: made from what was distilled, or those of a file."""
        if distilled := self.needed.get("distil"):
            return _later("data.made.made_answers")(self.recipe, self.run.seed, distilled)
        return (row for _, row in rows_of(self.recipe.sft.data))


class Stage(NamedTuple):
    """A row of the table.

    `does` is called with the recipe, the Run and what `gets` adds. `needs`: stages that come before, in this order; START and
    TRAINED depend on the arm, TEACHER on `cot.arm`. `reads`: sections of the recipe, beside those of the needs. `own_if`: an
    arm that changes one of these sections does the stage in its own folder, the others share it; None: each arm has its own.
    `spreads`: it runs in as many processes as the recipe has.
    """

    does: Callable[..., Path]
    gets: Callable[[Work], tuple] = lambda work: ()
    needs: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    own_if: tuple[str, ...] | None = None
    spreads: bool = False


def _later(name: str) -> Callable:
    """The kit's function of this dotted name, imported when it is called: what trains loads torch."""
    module, function = name.rsplit(".", 1)
    return lambda *arguments: getattr(importlib.import_module(f"lwzlib.{module}"), function)(*arguments)


def _sampled(work: Work) -> tuple:
    policy = work.needed.get("grpo") or work.needed.get("sft") or work.start
    return work.arm, str(policy), work.writing_rm, work.writer


START = "where the arm starts"  # pretrain or cold-start
TRAINED = "what trains the arm"  # grpo or sft
TEACHER = "the arm that is distilled"  # grpo of cot.arm

_FORM = ("model", "data", "prompt", "cold_start")
STAGES = {
    "cold-start": Stage(
        _later("method.cold_start.cold_start"), reads=_FORM, own_if=_FORM),
    "writing-rm": Stage(
        _later("method.train_writing_rm.train_rm"), lambda work: (_later("data.made.made_pairs"),),
        reads=("model", "data", "writing_rm"), own_if=("writing_rm",), spreads=True),
    "corpus": Stage(
        _later("data.tokenise.prepare_corpus"), reads=("model", "data", "corpus"), own_if=("model", "corpus")),
    "distil": Stage(
        _later("method.distil.distil"),
        lambda work: (str(work.needed["grpo"]), work.writing_rm, _later("data.tokenise.tokenise"), work.writer),
        needs=(TEACHER, "writing-rm"), reads=("cot", "corpus"), own_if=("model", "corpus", "cot")),
    "pack": Stage(
        _later("data.packing.pack"), lambda work: (work.needed["corpus"], work.needed.get("distil")),
        needs=("corpus", "distil"), reads=("pretrain",), own_if=("model", "corpus", "cot", "pretrain")),
    "pretrain": Stage(
        _later("method.pretrain.pretrain"), lambda work: (work.start, work.needed["corpus"], work.needed["pack"]),
        needs=("cold-start", "corpus", "pack"), own_if=(*_FORM, "corpus", "cot", "pretrain"), spreads=True),
    "samples-before": Stage(
        _later("method.samples.write_samples"), _sampled, needs=(START, "writing-rm"), reads=("reward", "samples")),
    "grpo": Stage(
        _later("method.grpo.train_arm"), lambda work: (work.arm, work.start, work.writing_rm),
        needs=(START, "writing-rm"), reads=("reward", "grpo"), spreads=True),
    "sft": Stage(
        _later("method.sft.train_sft"), lambda work: (work.arm, work.start, work.answers),
        needs=(START, "distil"), reads=("sft",), spreads=True),
    "samples-during": Stage(
        _later("method.samples.write_samples_during"),
        lambda work: (work.arm, work.start, work.needed["grpo"].parent, work.writing_rm, work.writer),
        needs=("grpo", START, "writing-rm"), reads=("reward", "samples", "evaluation")),
    "samples-after": Stage(
        _later("method.samples.write_samples"), _sampled, needs=(TRAINED, START, "writing-rm"),
        reads=("reward", "grpo", "samples")),
}


def arm_stages(recipe: Recipe, arm: str) -> list[str]:
    """Stages of one arm, in order; `samples-during` only where the policy is rated during RL (`evaluation.every_steps`)."""
    changed = recipe.for_arm(arm)
    during = changed.arm(arm).algorithm == "grpo" and 0 < changed.evaluation.every_steps < changed.grpo.steps
    return ["samples-before", recipe.arm(arm).algorithm, *["samples-during"] * during, "samples-after"]


def needs(stage: str, recipe: Recipe, arm: str = "") -> list[tuple[str, str]]:
    """(stage, arm) that must be finished before, in this order; those have needs of their own."""
    changed = recipe.for_arm(arm) if arm else recipe
    taught = stage != "pack" or changed.pretrain.cot_token_fraction > 0
    paid = changed.reward.weights.writing > 0 and changed.reward.writing.model == "stage"
    wanted = {"cold-start": changed.cold_start.queries > 0, "writing-rm": paid, "distil": taught}
    return [(name, of) for name, of in _possible_needs(stage, changed, arm) if wanted.get(name, True)]


def _possible_needs(stage: str, recipe: Recipe, arm: str) -> list[tuple[str, str]]:
    """(stage, arm) of a row's needs, with those too that the recipe's amounts make needless."""
    own = recipe.arms.get(arm)  # none: a recipe that distils nothing may lack cot.arm
    named = {START: ("pretrain" if own and own.start == "continual-pretrain" else "cold-start", arm),
             TRAINED: (own.algorithm if own else "grpo", arm), TEACHER: ("grpo", recipe.cot.arm)}
    from_file = stage == "sft" and recipe.sft.data != "made"
    return [named.get(name, (name, arm)) for name in STAGES[stage].needs if not (from_file and name == "distil")]


def _sections(stage: str, recipe: Recipe, arm: str) -> tuple[str, ...]:
    """Sections of the recipe that a result depends on: those of the row, and of all that it may need."""
    sections = list(STAGES[stage].reads)
    for other, of in _possible_needs(stage, recipe, arm):
        sections += _sections(other, recipe, of)
    return tuple(dict.fromkeys(sections))


def run_folder(recipe: Recipe, seed: int) -> Path:
    """Folder of a run that was given none: `runs/<recipe>` of this repository, or `runs/<recipe>-seed<n>`."""
    return RUNS / (recipe.name if seed == 0 else f"{recipe.name}-seed{seed}")


def places(recipe: Recipe) -> list[tuple[str, str]]:
    """(arm, or "" where it is shared, stage) of the whole recipe, in an order in which they can be done."""
    ordered: dict[tuple[str, str], None] = {}

    def add(stage: str, arm: str) -> None:
        place = (arm if _is_own(stage, recipe, arm) else "", stage)
        if place not in ordered:
            for other, of in needs(stage, recipe, arm):
                add(other, of)
            ordered[place] = None

    for name in recipe.arms:
        for stage in arm_stages(recipe, name):
            add(stage, name)
    return list(ordered)


def _is_own(stage: str, recipe: Recipe, arm: str) -> bool:
    """Whether the arm does the stage for itself, in its own folder."""
    own_if = STAGES[stage].own_if
    changed = {name.split(".")[0] for name in recipe.arm(arm).change} if arm else set()
    return own_if is None or bool(changed & set(own_if))


def stage_run(stage: str, recipe: Recipe, root: str | Path, seed: int, arm: str = "") -> Run:
    """The Run of a stage, shared by the arms or of one of them. Raises RecipeError, DataError or RunError."""
    if stage not in STAGES:
        raise RunError(f"no stage {stage!r}; stages are {', '.join(STAGES)}")
    own, every_arm = _is_own(stage, recipe, arm), STAGES[stage].own_if is None
    if every_arm and stage not in arm_stages(recipe, arm):
        raise RunError(f"arm {arm!r} has no stage {stage!r}; it has {', '.join(arm_stages(recipe, arm))}")
    changed = recipe.for_arm(arm) if own else recipe
    sections = _sections(stage, changed, arm)
    inputs = _inputs(changed, sections) | (changed.arm(arm).model_dump(exclude={"change"}) if every_arm else {})
    if own and arm and recipe.arm(arm).change:  # its sections do not say what the arm starts from
        inputs |= {f"{of or 'shared'}/{other}": stage_run(other, recipe, root, seed, of).fingerprint
                   for other, of in needs(stage, recipe, arm)}
    return Run(Path(root) / (arm if own else "") / stage, changed, seed, sections, inputs)


def _inputs(recipe: Recipe, sections: tuple[str, ...]) -> dict:
    """Digests of the queries and files that a result depends on, and what the arm changes whose texts are distilled. Raises
    DataError."""
    rm, reward = recipe.writing_rm, recipe.reward
    files = {"model": [recipe.model.name], "writing_rm": [rm.model, rm.pairs, *rm.corpora], "sft": [recipe.sft.data],
             "reward": [reward.writing.model, reward.format.encoder]}  # not corpus.sources: at scale they go once packed
    queries = [query.model_dump(mode="json") for query in queries_of_recipe(recipe)]
    inputs: dict = {"queries_digest": recipe.fingerprint("data", queries=queries)}
    if "cot" in sections:
        inputs |= {f"{name} changes": arm.change for name, arm in recipe.arms.items() if name == recipe.cot.arm and arm.change}
    for section in sections:
        for name in files.get(section, []):
            path = Path(name).expanduser()
            if name not in ("", "made", "stage") and path.exists():
                inputs[f"{name} holds"] = digest_of(path)
    return inputs


def run_stage(stage: str, recipe: Recipe, root: str | Path, seed: int, arm: str = "") -> Path:
    """Do the stage here, after the stages it needs; a finished one returns at once. Returns its artefact: the folder of a
    model, or the stage's own."""
    run = stage_run(stage, recipe, root, seed, arm)
    if run.finished and stage != "pack":  # pack checks its shards for damage even when finished
        return run.folder / "model" if (run.folder / "model").is_dir() else run.folder
    needed = {other: run_stage(other, recipe, root, seed, of) for other, of in needs(stage, recipe, arm)}
    return STAGES[stage].does(run.recipe, run, *STAGES[stage].gets(Work(run, arm, needed)))
