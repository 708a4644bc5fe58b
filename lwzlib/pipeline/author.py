"""Who writes for `lwz write`: a model that a run has trained, any other model, or one behind a server; each with a recipe's
prompt and decoding."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from lwzlib.base.models import load_model
from lwzlib.base.quantities import Decoding, nearest_name
from lwzlib.base.recipe import Recipe, flatten, load_recipe, presets
from lwzlib.base.rows import RunError, read_yaml
from lwzlib.base.run_folder import has_model, status_of
from lwzlib.endpoints import llm, streams
from lwzlib.endpoints.llm import Written
from lwzlib.endpoints.streams import Show
from lwzlib.method import prompts
from lwzlib.method.text import Style
from lwzlib.pipeline.stages import STAGES

_SHARED = ("cold-start", "pretrain")
_KEPT = ("model", "prompt", "samples")  # sections that say how a model is asked


class Author(NamedTuple):
    """`write`(query, seed, show) gives a completion, and shows it as it comes."""

    identity: dict  # what a text depends on, beside its request and the seed
    recipe: Recipe
    style: Style
    write: Callable[[str, int, Show], Written]


def of_model(name: str, recipe: Recipe, style: Style, **more) -> Author:
    """The author that is a model of this name, as in a recipe, loaded here on all GPUs. Raises ModelError."""
    m, decoding = recipe.model, _decoding(recipe)
    model, tokenizer = load_model(name, m.dtype, m.attention, m.trust_remote_code, spread=True)

    def write(query: str, seed: int, show: Show) -> Written:
        text = prompts.render(query, style, m.frame, recipe.prompt, tokenizer)
        return streams.in_process(model, tokenizer, text, decoding, seed, show)

    return Author({"model": name} | more | _how(recipe, style), recipe, style, write)


def of_server(settings: llm.Settings, recipe: Recipe, style: Style) -> Author:
    """The author that is a model behind an address; of a recipe whose `model.frame` is plain by completions, else by chat."""
    def write(query: str, seed: int, show: Show) -> Written:
        prompt = prompts.framed(query, style, recipe.model.frame, recipe.prompt)
        return streams.from_server(settings, prompt, _decoding(recipe), seed, show)

    server = {"model": settings.model, "server": settings.base_url, "request": settings.sampling}
    return Author(server | _how(recipe, style), recipe, style, write)


def _how(recipe: Recipe, style: Style) -> dict:
    return {"style": style, "frame": recipe.model.frame, "wording": recipe.prompt.wording,
            "decoding": _decoding(recipe).model_dump()}


def _decoding(recipe: Recipe) -> Decoding:
    return Decoding(**recipe.samples.sampling.model_dump(), stop=recipe.samples.stop)


def of_run(folder: Path, arm: str, source: str, sets: list[str] | None, style: Style | None) -> Author:
    """The author that is an arm of a run, its `cold-start`, its `pretrain`, or `base`, the model they start from; asked as the
    run asks it. What the run does not say comes from the recipe `source`, by default that of the folder's name. `arm` may be
    left out where one is trained. Raises RunError for one that is not there or not trained."""
    trained, any_stage = _trained(folder), _any_stage(folder)
    assert any_stage, "see `is_run`"
    arms = [name for name in trained if name not in _SHARED]
    if not arm and len(arms) != 1:
        raise RunError(f"{folder} has {'several arms' if arms else 'no trained arm'}: give --arm, one of "
                       f"{', '.join([*trained, 'base'])}")
    arm = arm or arms[0]
    source = source or _recipe_name(folder)
    if arm not in (*trained, "base"):
        raise RunError(_missing(folder, arm, source, list(trained)))
    stage = trained.get(arm, any_stage)
    kept = _kept(stage, folder, arm)
    recipe = load_recipe(source, flatten({name: kept[name] for name in _KEPT if name in kept}), sets)
    style = style or kept["inputs"].get("prompt", "think")
    if arm == "base":
        return of_model(recipe.model.name, recipe, style)
    return of_model(str(stage / "model"), recipe, style, arm=arm, fingerprint=status_of(stage).get("fingerprint"))


def is_run(model: str) -> bool:
    """Whether this names a run folder, and no model. Raises RunError for a folder that is neither."""
    folder = Path(model).expanduser()
    if not folder.is_dir() or (folder / "config.json").is_file():
        return False
    if not _any_stage(folder):
        raise RunError(f"{folder} is neither a model (it has no config.json) nor a run folder (it has no stage)")
    return True


def _any_stage(folder: Path) -> Path | None:
    """A stage whose recipe names the model of the run."""
    stages = [folder / name for name in STAGES]
    stages += [place for name, row in STAGES.items() if row.own_if is None for place in sorted(folder.glob(f"*/{name}"))]
    return next((stage for stage in stages if (stage / "recipe.yaml").is_file()), None)


def _trained(folder: Path) -> dict[str, Path]:
    """Stages that left a model, by the name of the arm, or of the stage where the arms share it."""
    stages = [*(folder / name for name in _SHARED), *sorted(folder.glob("*/grpo")), *sorted(folder.glob("*/sft"))]
    return {stage.name if stage.parent == folder else stage.parent.name: stage for stage in stages if has_model(stage)}


def _kept(stage: Path, folder: Path, arm: str) -> dict:
    """Sections of the recipe that the run keeps: those of the stage, and `samples` of the arm or, without any, of another."""
    samples = [*folder.glob(f"{arm}/samples-*/recipe.yaml"), *sorted(folder.glob("*/samples-*/recipe.yaml"))]
    return (read_yaml(samples[0]) if samples else {}) | read_yaml(stage / "recipe.yaml")


def _recipe_name(folder: Path) -> str:
    name = folder.resolve().name.partition("-seed")[0]
    return name if name in presets() else "nano"


def _missing(folder: Path, arm: str, source: str, trained: list[str]) -> str:
    known = load_recipe(source).arms
    if arm in known or (folder / arm).is_dir():
        algorithm = known[arm].algorithm if arm in known else "grpo"
        return (f"arm {arm!r} of {folder} is not trained yet: `lwz stage {algorithm} {source} --arm {arm} --run-dir {folder}` "
                "does it, with the --seed and -s of the run")
    return f"{folder} has no arm {arm!r}{nearest_name(arm, [*trained, 'base'])}; it has {', '.join([*trained, 'base'])}"
