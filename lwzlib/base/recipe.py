"""The recipe: every quantity of a run, typed, bounded, and refused when its name is unknown.

`recipes/paper.yaml` states the published setting whole and marks each line A (paper or model card), B (one detailed
note of the paper) or N (not published: our choice). Every other preset `extends` it and states only its departures, so
what differs from the paper is computed (`departures`), never remembered.
"""

import functools
import hashlib
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from lwzlib.base import placement
from lwzlib.base import quantities as q
from lwzlib.base.paths import RECIPES
from lwzlib.base.quantities import nearest_name
from lwzlib.base.reward_quantities import Reward

_NOT_METHOD = {"arms", "name", "launch", "distributed", "vllm", "tracking"}
_HOW_ASKED = {"api_key_env", "concurrency", "requests_per_minute", "use_proxy", "timeout_s", "usd_per_million_read",
              "usd_per_million_written", "budget_requests", "budget_tokens"}  # what else stands in `requests` changes replies
_NOT_RESULT: Any = {"reward": {"writing": {"url": True, "patience_s": True, "requests": _HOW_ASKED}},
                    "tracking": True}


class RecipeError(ValueError):
    """A recipe that cannot be used; the message names the quantity, its value and what would be right."""


class Recipe(q.Section):
    """A whole recipe, as `load_recipe` returns it; quantities of two sections that cannot go together are refused too."""

    name: str
    launch: Literal["inline", "subprocess", "torchrun", "slurm"]
    model: q.Model
    data: q.Data
    prompt: q.Prompt
    cold_start: q.ColdStart
    writing_rm: q.WritingRM
    reward: Reward
    grpo: q.Grpo
    corpus: q.Corpus
    cot: q.Cot
    pretrain: q.Pretrain
    sft: q.Sft
    samples: q.Samples
    evaluation: q.Evaluation
    distributed: placement.Distributed
    vllm: placement.Vllm
    tracking: placement.Tracking
    arms: dict[Annotated[str, Field(pattern=r"^\w[\w-]*$")], q.Arm] = Field(min_length=1)  # each is a folder's name, too

    @model_validator(mode="after")
    def _continual_pretraining(self):
        if self.corpus.parts % self.pretrain.shards:
            raise ValueError(f"corpus.parts = {self.corpus.parts} must be a multiple of pretrain.shards = "
                             f"{self.pretrain.shards}: a shard takes whole parts")
        teacher = self.arms.get(self.cot.arm)
        if any(map(self._takes_cot, self.arms)) and not (
                teacher and (teacher.start, teacher.prompt, teacher.algorithm) == ("base", "think", "grpo")):
            raise ValueError(f"cot.arm = {self.cot.arm!r} must name an arm that starts from base, plans, and is trained by "
                             f"grpo; arms are {', '.join(self.arms)}")
        return self

    @model_validator(mode="after")
    def _placement(self):
        where, vllm = self.distributed, self.vllm
        if where.nodes > 1 and self.launch != "slurm":
            raise ValueError(f"distributed.nodes = {where.nodes} needs launch: slurm, not {self.launch}")
        if self.launch in ("inline", "subprocess") and (where.processes > 1 or where.zero):
            raise ValueError(f"launch: {self.launch} is one process; distributed.processes = {where.processes} and "
                             f"distributed.zero = {where.zero} need launch: torchrun or slurm")
        if self.launch == "inline" and vllm.mode == "colocate":
            raise ValueError("launch: inline is one process for all stages, and vLLM can be colocated in it once: "
                             "vllm.mode = 'colocate' needs launch: subprocess, torchrun or slurm")
        if (vllm.mode == "server") != (0 < vllm.nodes < where.nodes):
            raise ValueError(f"vllm.nodes = {vllm.nodes} must be 1 to {where.nodes - 1} of distributed.nodes where vllm.mode "
                             "is server, and 0 elsewhere")
        if vllm.mode != "none" and where.processes % vllm.tensor_parallel:
            raise ValueError(f"vllm.tensor_parallel = {vllm.tensor_parallel} must divide distributed.processes = "
                             f"{where.processes}: a copy of the model lies on one node")
        adapters = [name for name in ("grpo", "sft", "writing_rm") if getattr(self, name).lora.rank]
        if where.zero == 3 and adapters:
            raise ValueError("distributed.zero = 3 cannot merge an adapter: give zero: 2, or "
                             f"{', '.join(f'{name}.lora.rank: 0' for name in adapters)}")
        return self

    @model_validator(mode="after")
    def _pairs_of_a_group(self):
        if not (self.reward.by_language_model and self.reward.writing.judge == "pairwise") or self.reward.writing.references:
            return self
        if (opponents := self.reward.writing.opponents) >= self.grpo.group_size:
            raise ValueError(f"reward.writing.opponents = {opponents} must be below grpo.group_size = {self.grpo.group_size}: "
                             "a completion is compared with others of its group")
        if any(map(self._takes_cot, self.arms)) and self.cot.batch_completions % self.cot.completions_per_query:
            raise ValueError(f"cot.batch_completions = {self.cot.batch_completions} must be a multiple of "
                             f"cot.completions_per_query = {self.cot.completions_per_query} with judge: pairwise: the answers "
                             "to a query are compared in one batch")
        return self

    def _takes_cot(self, name: str) -> bool:
        """Whether an arm learns from what the arm `cot.arm` writes."""
        arm = self.arms[name]
        cot_share = arm.change.get("pretrain.cot_token_fraction", self.pretrain.cot_token_fraction)
        made = arm.change.get("sft.data", self.sft.data) == "made"
        return (arm.start == "continual-pretrain" and cot_share != 0) or (arm.algorithm == "sft" and made)

    def arm(self, name: str) -> q.Arm:
        """The arm of that name. Raises RecipeError, with the nearest name, for one that the recipe does not have."""
        if name not in self.arms:
            raise RecipeError(f"recipe {self.name} has no arm {name!r}{nearest_name(name, self.arms)}; "
                              f"it has {', '.join(self.arms)}")
        return self.arms[name]

    def for_arm(self, name: str) -> "Recipe":
        """The recipe with what the arm changes. Raises RecipeError for an unknown arm, quantity or value."""
        change, place = self.arm(name).change, f"{self.name}, arm {name}"
        for quantity in change:
            if quantity.split(".")[0] in _NOT_METHOD or quantity.endswith(".seed"):
                raise RecipeError(f"{place}: {quantity!r} holds for a whole run, an arm cannot change it")
        return _validated(self.model_dump(), change, place) if change else self

    def fingerprint(self, *sections: str, **extra: Any) -> str:
        """Hex digest of the named sections (all of them if none is named), without addresses and trackers, and of what
        else a result depends on."""
        content = self.model_dump(exclude=_NOT_RESULT)
        chosen = {key: content[key] for key in sections or content}
        return hashlib.sha256(json.dumps([chosen, extra], sort_keys=True).encode()).hexdigest()[:16]


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-6 as text; people write it as a number."""


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789"))


def flatten(tree: dict, prefix: str = "") -> dict[str, Any]:
    """Nested dict -> {dotted name: value}; a table that takes any name (`grpo.trl`) is one value."""
    flat = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        nested = isinstance(value, dict) and not is_open(name)
        flat |= flatten(value, f"{name}.") if nested else {name: value}
    return flat


def _open_tables(section: type[q.Section], prefix: str = "") -> set[str]:
    tables = set()
    for name, field in section.model_fields.items():
        if field.annotation == dict[str, Any]:
            tables.add(prefix + name)
        elif isinstance(field.annotation, type) and issubclass(field.annotation, q.Section):
            tables |= _open_tables(field.annotation, f"{prefix}{name}.")
    return tables


_OPEN_TABLES = _open_tables(Recipe)


def is_open(name: str) -> bool:
    """Whether the quantity of that dotted name, of the recipe or of an arm's `change`, is a table that takes any name."""
    return name.rpartition(".change.")[2] in _OPEN_TABLES


def presets() -> list[str]:
    """Names of the recipes that the kit brings along."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load_recipe(source: str | Path, *overrides: dict | list[str] | str | None) -> Recipe:
    """A preset by name or a YAML file by path, with overrides applied in order: {"grpo.steps": 5}, ["grpo.steps=5"] or
    "grpo.steps=5 grpo.group_size=4".

    Raises RecipeError for an unknown preset, an unknown name (with the nearest valid one) or a value out of range.
    """
    changes: dict = {}
    for given in overrides:
        changes |= parse_overrides(given)
    recipe = _validated(_read(source), changes, source)
    for name in recipe.arms:
        recipe.for_arm(name)
    return recipe


def departures(recipe: Recipe, reference: str = "paper") -> list[tuple[str, Any, Any]]:
    """(name, value in the reference, value here) for each quantity of the method that differs; arms are left out."""
    theirs, ours = (flatten(r.model_dump(exclude=_NOT_METHOD)) for r in (load_recipe(reference), recipe))
    return [(name, theirs.get(name), ours[name]) for name in ours if theirs.get(name) != ours[name]]


def recipe_path(source: str | Path) -> Path:
    """The YAML file of a preset, or the path itself. Raises RecipeError, with the nearest name, for an unknown preset."""
    if Path(source).suffix in {".yaml", ".yml"}:
        return Path(source)
    if str(source) not in presets():
        raise RecipeError(f"no recipe {str(source)!r}{nearest_name(str(source), presets())}; presets: "
                          f"{', '.join(presets())}, or give a path that ends in .yaml")
    return RECIPES / f"{source}.yaml"


def _read(source: str | Path) -> dict:
    return read_extending(source, recipe_path, "recipe", RecipeError, _Loader, merge)


def read_extending(source, find: Callable, what: str, wrong: type[Exception], loader: type, merge: Callable) -> dict:
    """The YAML mapping at `find(source)`, laid by `merge(below, above)` over the one that it `extends`, and so on. Raises
    `wrong`, which names the file, for one that cannot be read, is no mapping, or extends itself; `what`: recipe or profile."""
    paths: list[Path] = []
    layers: list[dict] = []
    while source or not layers:
        path = find(source)
        try:
            tree = yaml.load(path.read_text(encoding="utf-8"), loader)
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise wrong(f"cannot read {what} {path}: {error}") from None
        if not isinstance(tree, dict):
            raise wrong(f"{what} {path} must be a mapping of names to values, not {type(tree).__name__}")
        if path in paths:
            raise wrong(f"{what} {path} extends itself")
        source = tree.pop("extends", None)
        if not isinstance(source, str | None):
            raise wrong(f"{what} {path}: extends = {source!r} must be one name")
        paths.append(path)
        layers.append(tree)
    return functools.reduce(merge, reversed(layers))


def merge(below: dict, above: dict) -> dict:
    """The two trees as one: `above` wins, section by section; a table of arms replaces the one below it."""
    merged = dict(below)
    for key, value in above.items():
        nested = isinstance(value, dict) and isinstance(below.get(key), dict) and key != "arms"
        merged[key] = merge(below[key], value) if nested else value
    return merged


def parse_overrides(overrides: dict | list[str] | str | None) -> dict[str, Any]:
    """{dotted name: value} of overrides in any of the forms that `load_recipe` takes. Raises RecipeError for another."""
    if isinstance(overrides, dict):
        return overrides
    try:
        pairs = [word.partition("=") for word in (shlex.split(overrides) if isinstance(overrides, str) else overrides or [])]
        values = {name: yaml.load(value, _Loader) for name, _, value in pairs}
    except (yaml.YAMLError, ValueError) as error:
        raise RecipeError(f"cannot read override {overrides!r}: {error}") from None
    for name, equals, _ in pairs:
        if not equals:
            raise RecipeError(f"override {name!r} is not of the form name=value, such as grpo.steps=5")
    return values


def _validated(tree: dict, changes: dict, source: str | Path) -> Recipe:
    """The recipe of a tree, of which `changes` sets quantities by their dotted names."""
    for name, value in changes.items():
        _put(tree, name, value)
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise RecipeError(f"recipe {source}: " + "; ".join(map(_explained, error.errors()))) from None


def _put(tree: dict, name: str, value: Any) -> None:
    known = flatten(tree)
    if table := next((at for at in known if is_open(at) and name.startswith(f"{at}.") and isinstance(known[at], dict)), ""):
        name, value = table, known[table] | {name.removeprefix(f"{table}."): value}
    if name not in known and not (value is None and any(other.startswith(f"{name}.") for other in known)):
        raise RecipeError(f"no quantity {name!r} in the recipe{nearest_name(name, known)}")
    while name not in tree:  # the keys of an arm's `change` have dots themselves
        section, _, name = name.partition(".")
        tree = tree[section]
    tree[name] = value


def _explained(problem: ErrorDetails) -> str:
    name = ".".join(map(str, problem["loc"]))
    if problem["type"] == "extra_forbidden":
        return f"no quantity {name!r}{nearest_name(name, flatten(_read('paper')))}"
    if problem["type"] == "missing":
        return f"{name} is missing"
    given = "" if isinstance(problem["input"], dict) else f" = {problem['input']!r}"
    said = problem["msg"].removeprefix("Value error, ")
    return said if said.startswith(f"{name}.") else ": ".join(filter(None, (name + given, said)))
