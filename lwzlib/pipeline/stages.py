"""The stages of a run, as one table: what each needs, which sections of the recipe it reads, whose it is, and what does it.

Order, fingerprints, `lwz status`, launching and resuming follow from the rows. To add a stage: a function (recipe, run, ...)
that works in `run.work()` and returns its model or folder; its row in `STAGES`, named in another's `needs` or in `arm_stages`;
its quantities, a section of the recipe (`base/quantities.py`, `recipes/paper.yaml`); files it reads (`pipeline/inputs.py`).

Published is the order of the method: continual pretraining on packed text with chain-of-thought documents that an arm wrote,
then GRPO against a trained Writing RM, and SFT as the baseline. The cold start and the samples of an arm are the kit's own.
"""

import dataclasses
import importlib
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from lwzlib.base.paths import RUNS
from lwzlib.base.processes import main_process
from lwzlib.base.recipe import Recipe
from lwzlib.base.rows import RunError, read_yaml, rows_of
from lwzlib.base.run_folder import Run
from lwzlib.method.writing_rm import is_public
from lwzlib.pipeline.inputs import inputs_of


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
    def writing_rm(self) -> str | Callable:
        """Folder of the Writing RM that this run trained, or of the public one that it measured, "" where there is none; or the
        language model that judges instead."""
        return writing_judge(self.recipe, self.run.folder, str(self.needed.get("judge") or self.needed.get("writing-rm") or ""))

    @property
    def served(self) -> ModuleType | None:
        """What writes and scores completions for a stage: vLLM's servers where the recipe has it, else its own process."""
        return importlib.import_module("lwzlib.pipeline.served") if self.recipe.vllm.mode != "none" else None

    def answers(self) -> Iterable[dict]:
        """Rows that SFT learns from: made from what was distilled, or those of a file."""
        if distilled := self.needed.get("distil"):
            return _later("data.made.made_answers")(self.recipe, self.run.seed, distilled)
        return (row for _, row in rows_of(self.recipe.sft.data))


class Stage(NamedTuple):
    """A row of the table.

    `does` is called with the recipe, the Run and what `gets` adds. `needs`: stages that come before, in this order; START and
    TRAINED depend on the arm, TEACHER on `cot.arm`. `reads`: sections of the recipe, beside those of the needs. `own_if`: an
    arm that changes one of these sections has the stage to itself, the others share one; None: each arm has its own.
    `spreads`: it runs in as many processes as the recipe has. `seeded`: another seed gives another result. `own_seed`: the
    section whose `seed`, unless null, is the stage's.
    """

    does: Callable[..., Path]
    gets: Callable[[Work], tuple] = lambda work: ()
    needs: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    own_if: tuple[str, ...] | None = None
    spreads: bool = False
    seeded: bool = True
    own_seed: str = ""


def _later(name: str) -> Callable:
    """The kit's function of this dotted name, imported when it is called: what trains loads torch."""
    module, function = name.rsplit(".", 1)
    return lambda *arguments: getattr(importlib.import_module(f"lwzlib.{module}"), function)(*arguments)


def writing_judge(recipe: Recipe, folder: Path, trained: str = "") -> str | Callable:
    """What `build_rewards` takes: the language model that judges by the recipe, whose replies are kept in `folder`, else the
    folder of the Writing RM that was `trained`. Raises as `evaluate.judges.judge_of` does."""
    return _later("evaluate.judges.judge_of")(recipe, folder) if recipe.reward.by_language_model else trained


def _sampled(work: Work) -> tuple:
    policy = work.needed.get("grpo") or work.needed.get("sft") or work.start
    return work.arm, str(policy), work.writing_rm, work.served


START = "where the arm starts"  # pretrain or cold-start
TRAINED = "what trains the arm"  # grpo or sft
TEACHER = "the arm that is distilled"  # grpo of cot.arm

_JUDGED = ("writing-rm", "judge")  # one of them, or neither: what the recipe's judge needs
_FORM = ("model", "data", "prompt", "cold_start")
STAGES = {
    "cold-start": Stage(
        _later("method.cold_start.cold_start"), reads=_FORM, own_if=_FORM, own_seed="cold_start"),
    "pairs": Stage(
        _later("method.pairs.prepare_pairs"), lambda work: (_later("data.made.made_pairs"),),
        reads=("model", "data", "writing_rm"), own_if=("writing_rm",), own_seed="writing_rm"),
    "writing-rm": Stage(
        _later("method.train_writing_rm.train_rm"), lambda work: (work.needed["pairs"],),
        needs=("pairs",), own_if=("writing_rm",), spreads=True, own_seed="writing_rm"),
    "judge": Stage(
        _later("evaluate.judge_quality.measure_judge"), lambda work: (work.needed["pairs"], work.writing_rm),
        needs=("pairs", "writing-rm"), reads=("reward",), own_if=("writing_rm", "reward"), own_seed="writing_rm"),
    "corpus": Stage(
        _later("data.tokenise.prepare_corpus"), reads=("model", "data", "corpus"), own_if=("model", "corpus"),
        seeded=False),
    "distil": Stage(
        _later("method.distil.distil"),
        lambda work: (str(work.needed["grpo"]), work.writing_rm, _later("data.tokenise.tokenise"), work.served),
        needs=(TEACHER, *_JUDGED), reads=("cot", "corpus"), own_if=("model", "corpus", "cot")),
    "pack": Stage(
        _later("data.packing.pack"), lambda work: (work.needed["corpus"], work.needed.get("distil")),
        needs=("corpus", "distil"), reads=("pretrain",), own_if=("model", "corpus", "cot", "pretrain")),
    "pretrain": Stage(
        _later("method.pretrain.pretrain"), lambda work: (work.start, work.needed["corpus"], work.needed["pack"]),
        needs=("cold-start", "corpus", "pack"), own_if=(*_FORM, "corpus", "cot", "pretrain"), spreads=True),
    "samples-before": Stage(
        _later("method.samples.write_samples"), _sampled, needs=(START, *_JUDGED), reads=("reward", "samples")),
    "grpo": Stage(
        _later("method.grpo.train_arm"), lambda work: (work.arm, work.start, work.writing_rm),
        needs=(START, *_JUDGED), reads=("reward", "grpo"), spreads=True),
    "sft": Stage(
        _later("method.sft.train_sft"), lambda work: (work.arm, work.start, work.answers),
        needs=(START, "distil"), reads=("sft",), spreads=True),
    "samples-during": Stage(
        _later("method.samples.write_samples_during"),
        lambda work: (work.arm, work.start, work.needed["grpo"].parent, work.writing_rm, work.served),
        needs=("grpo", START, *_JUDGED), reads=("reward", "samples", "evaluation")),
    "samples-after": Stage(
        _later("method.samples.write_samples"), _sampled, needs=(TRAINED, START, *_JUDGED),
        reads=("reward", "grpo", "samples")),
}

_CARD_AFTER = ("grpo", "sft", "samples-after")  # stages of an arm that give its model card something to say


def arm_stages(recipe: Recipe, arm: str) -> list[str]:
    """Stages of one arm, in order; `samples-during` only where the policy is rated during RL (`evaluation.every_steps`)."""
    changed = recipe.for_arm(arm)
    during = changed.arm(arm).algorithm == "grpo" and 0 < changed.evaluation.every_steps < changed.grpo.steps
    return ["samples-before", recipe.arm(arm).algorithm, *["samples-during"] * during, "samples-after"]


def needs(stage: str, recipe: Recipe, arm: str = "") -> list[tuple[str, str]]:
    """(stage, arm) that must be finished before, in this order; those have needs of their own."""
    changed = recipe.for_arm(arm) if arm else recipe
    taught, paid = stage != "pack" or changed.pretrain.cot_token_fraction > 0, changed.reward.weights.writing > 0
    wanted = {"cold-start": changed.cold_start.queries > 0, "writing-rm": paid and changed.reward.writing.model == "stage",
              "judge": paid and is_public(changed), "distil": taught}
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
    return of_seed(RUNS / recipe.name, seed)


def of_seed(folder: Path, seed: int) -> Path:
    """Run folder of a seed beside that of seed 0: `<folder>-seed<n>`."""
    return folder.with_name(f"{folder.name}-seed{seed}") if seed else folder


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
    inputs = inputs_of(changed, sections) | (changed.arm(arm).model_dump(exclude={"change"}) if every_arm else {})
    folder, seed = Path(root) / (arm if own else "") / stage, seed_of(stage, changed, seed)
    if folder.is_symlink():  # the work of another seed, which says what it shared itself
        seed, shared = _kept(folder)["seed"], _kept(folder)["inputs"].get("shared", {})
    else:
        shared = shared_needs(stage, recipe, root, arm)
    if shared:
        inputs |= {"shared": shared}
    if own and arm and recipe.arm(arm).change:  # its sections do not say what the arm starts from
        inputs |= {f"{of or 'shared'}/{other}": stage_run(other, recipe, root, seed, of).fingerprint
                   for other, of in needs(stage, recipe, arm)}
    return Run(folder, changed, seed, sections, inputs)


def seed_of(stage: str, recipe: Recipe, seed: int) -> int:
    """Seed of a stage, in a run of that seed: the recipe's own for it, if it has one."""
    section = STAGES[stage].own_seed
    return seed if not section or (own := getattr(recipe, section).seed) is None else own


def varies(stage: str, recipe: Recipe) -> bool:
    """Whether another seed of the run gives another result of the stage, beside what it needs."""
    return STAGES[stage].seeded and seed_of(stage, recipe, 0) != seed_of(stage, recipe, 1)


def shared_needs(stage: str, recipe: Recipe, root: str | Path, arm: str) -> dict[str, str]:
    """{stage: its seed} of what a stage builds on and shares with another seed, whose result depends on that seed. Raises
    RunError for a link to nothing."""
    shared: dict[str, str] = {}
    for other, of in needs(stage, recipe, arm):
        if of and of not in recipe.arms:  # cot.arm, of a recipe that distils nothing
            continue
        folder = Path(root) / (of if _is_own(other, recipe, of) else "") / other
        if folder.is_symlink() and varies(other, recipe):
            shared[other] = f"seed {_kept(folder)['seed']}"
        shared |= shared_needs(other, recipe, root, of)
    return shared


def _kept(folder: Path) -> dict:
    """The `recipe.yaml` of a stage that is shared."""
    try:
        return read_yaml(folder / "recipe.yaml")
    except FileNotFoundError:
        raise RunError(f"{folder} is shared with {folder.resolve()}, which is gone: remove the link, or restore that folder"
                       ) from None


def run_stage(stage: str, recipe: Recipe, root: str | Path, seed: int, arm: str = "") -> Path:
    """Do the stage here, after those it needs, unless it is finished. Returns its artefact: a model's folder, or its own."""
    run = stage_run(stage, recipe, root, seed, arm)
    if run.finished and stage != "pack":  # pack checks its shards for damage even when finished
        return run.folder / "model" if (run.folder / "model").is_dir() else run.folder
    needed = {other: run_stage(other, recipe, root, seed, of) for other, of in needs(stage, recipe, arm)}
    artefact = STAGES[stage].does(run.recipe, run, *STAGES[stage].gets(Work(run, arm, needed)))
    if stage in _CARD_AFTER and main_process() and run.finished:
        _later("exhibits.model_card.write_card")(root, arm)
    return artefact


def measure_judge(recipe: Recipe, root: str | Path, seed: int) -> Path:
    """Measure the recipe's judge on the run's held-out pairs, several beside each other in `judges/`; the trained Writing RM is
    measured as it is trained. Returns the folder with `quality.json`."""
    writing = recipe.reward.writing
    if not recipe.reward.weights.writing:
        raise RunError("reward.weights.writing = 0: this recipe pays for no writing, so it has no judge to measure")
    if writing.judge == "reward-model" and writing.model == "stage":
        return run_stage("writing-rm", recipe, root, seed).parent
    whole = stage_run("judge", recipe, root, seed)
    if (whole.status.get("state"), whole.status.get("fingerprint")) == ("finished", whole.fingerprint):
        return whole.folder  # of a public reward model, before it was trained on
    name = f"{writing.judge} {Path(writing.model).name} {whole.fingerprint[:6]}".replace(" ", "-")
    run = dataclasses.replace(whole, folder=Path(root) / "judges" / name)
    return STAGES["judge"].does(recipe, run, *STAGES["judge"].gets(
        Work(run, "", {"pairs": run_stage("pairs", recipe, root, seed)})))
