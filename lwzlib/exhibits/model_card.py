"""The model card of a trained arm, `model/README.md`, in the hub's format: made from what the run left, and from nothing else.

What was not measured is said to be so, with the command that measures it; what is not known, such as the licence of a base
model, is not stated. The card is made anew when there is more to say: it is no part of a model's digest (`rows.digest_of`).
"""

import math
import re
from pathlib import Path

import jinja2
import pandas as pd

from lwzlib.base import kit
from lwzlib.base.marks import shown
from lwzlib.base.models import load_tokenizer
from lwzlib.base.quantities import Prompt
from lwzlib.base.rows import CARD_MARK, RunError, read_json, read_yaml, write_atomic
from lwzlib.base.run_folder import has_model, provenance_of, status_of
from lwzlib.evaluate.intervals import bootstrap_mean
from lwzlib.evaluate.length_control import length_table
from lwzlib.exhibits.run_tables import (
    REWARDS,
    before_and_after,
    departures_of,
    held_out_table,
    made_by,
    mixture_table,
    stage_quantities,
)
from lwzlib.method import prompts

_SLOTS = {"en": "{request}", "zh": "{请求}"}  # stand for a request: its language chooses the instruction
_EXAMPLES = {"en": "Write a paragraph about rain.", "zh": "写一段关于雨的文字。"}


def trained_stage(root: str | Path, arm: str) -> Path:
    """Folder of the stage, `grpo` or `sft`, that trained an arm. Raises RunError if there is none, or it is not finished."""
    folders = [Path(root) / arm / name for name in ("grpo", "sft")]
    folder = next((folder for folder in folders if folder.is_dir()), None)
    if not folder:
        arms = sorted({path.parent.name for name in ("grpo", "sft") for path in Path(root).glob(f"*/{name}")})
        raise RunError(f"{root} has no trained arm {arm!r}; it has {', '.join(arms) or 'none'}")
    if (state := status_of(folder).get("state", "not started")) != "finished" or not (folder / "model").is_dir():
        raise RunError(f"{folder} is {state if state != 'finished' else 'without its model'}: `lwz run` goes on with it")
    return folder


def write_card(root: str | Path, arm: str, name: str = ".") -> Path:
    """Write the card of an arm beside its weights; returns its path. `name`: what a reader loads, "." is the card's own folder.
    Raises RunError as `trained_stage`."""
    from huggingface_hub import ModelCard, ModelCardData

    stage = trained_stage(root, arm)
    asked = read_yaml(stage / "recipe.yaml")
    base, algorithm = asked["model"]["name"], stage.name
    sources = [asked["data"]["train"], *([asked["sft"]["data"]] if algorithm == "sft" else [])]
    header = ModelCardData(
        base_model=on_hub(base) or None, language=asked["data"]["languages"], library_name="transformers",
        pipeline_tag="text-generation", tags=["longwriter-zero", algorithm, "trl"],
        datasets=[source.removeprefix("hub:").partition(":")[0] for source in sources if source.startswith("hub:")] or None)
    templates = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), undefined=jinja2.StrictUndefined,
                                   trim_blocks=True, lstrip_blocks=True)  # Markdown, not HTML: nothing to escape
    templates.filters["shown"] = _shown
    text = templates.get_template("model_card.md.j2").render(
        root=Path(root), arm=arm, name=name, algorithm=algorithm, asked=asked, base=_shown(base), base_on_hub=on_hub(base),
        style=asked["inputs"]["prompt"], start=asked["inputs"]["start"], parameters=_parameters(stage / "model"),
        code=_code(Path(root), arm, stage, asked, name), departures=_departures(stage),
        origin=made_by(stage) | provenance_of(stage) | {"commit": made_by(stage)["commit"]}, status=status_of(stage),
        mark=CARD_MARK, **_data(Path(root), arm, asked), **_measured(Path(root), arm))
    path = stage / "model" / "README.md"
    write_atomic(path, str(ModelCard(f"---\n{header.to_yaml()}\n---\n\n{text}")))
    return path


def _departures(stage: Path) -> list:
    """Departures from the paper, without where and how a judge was asked, which is nobody else's business, and without all of
    the judge's own for an arm that none has paid, neither its RL nor what it starts from or copies."""
    left_out = tuple(f"reward.writing.{name}" for name in ("url", "patience_s", "requests"))
    asked = stage_quantities([stage / "recipe.yaml"])
    arm = read_yaml(stage / "recipe.yaml")["inputs"]
    if asked.get("reward.weights.writing") == [0.0] and (arm.get("start"), arm.get("algorithm")) == ("base", "grpo"):
        left_out += ("writing_rm.", "reward.writing.")
    return [row for row in departures_of(asked) if not row[0].startswith(left_out)]


def on_hub(model: str) -> str:
    """Name on the hub of a recipe's model; "" for one that has none: a folder, the random model."""
    named = kit.ON_HUB.get(model, model)
    return named if re.fullmatch(r"[\w.-]+/[\w.-]+", named) and not Path(named).is_dir() else ""


def _shown(value) -> str:
    """A value as a cell of a table; of a path of this machine only its last part, which is nobody else's business."""
    return re.sub(r"\s+", " ", shown(_public(value))).replace("|", "\\|")


def _public(value):
    if isinstance(value, list):
        return [_public(one) for one in value]
    if isinstance(value, dict):
        return {name: _public(one) for name, one in value.items()}
    return Path(value).name if isinstance(value, str) and value.startswith(("/", "~")) else value


def _parameters(model: Path) -> int:
    """Number of weights, by the headers of the safetensors files."""
    from safetensors import safe_open

    total = 0
    for path in model.glob("*.safetensors"):
        with safe_open(path, "np") as file:
            total += sum(math.prod(file.get_slice(name).get_shape()) for name in file.offset_keys())
    return total


def _code(root: Path, arm: str, stage: Path, asked: dict, name: str) -> str:
    """Lines of Python that write as the kit does: its prompt, letter by letter, and its sampling."""
    language = asked["data"]["languages"][0]
    slot, request = _SLOTS[language], _EXAMPLES[language]
    prompt = prompts.render(slot, asked["inputs"]["prompt"], asked["model"]["frame"], Prompt(**asked["prompt"]),
                            load_tokenizer(str(stage / "model"), asked["model"]["trust_remote_code"]))
    before, _, after = (part.splitlines(keepends=True) for part in prompt.partition(slot))
    pieces = [*map(repr, before[:-1]), " + ".join([*map(repr, before[-1:]), "request", *map(repr, after[:1])])]
    written = ("\n          ").join([*pieces, *map(repr, after[1:])])
    samples = root / arm / "samples-before" / "recipe.yaml"
    sampled = read_yaml(samples)["samples"] if samples.exists() else asked.get("grpo", {})
    how = sampled.get("sampling") or {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": asked["sft"]["max_tokens"]}
    draws = {"do_sample": True, "top_k": 0} if how["temperature"] else {"do_sample": False, "temperature": None, "top_p": None}
    settings = ", ".join(f"{key}={value!r}" for key, value in (how | draws).items())
    stop = f", stop_strings={sampled['stop']!r}, tokenizer=tokenizer" if sampled.get("stop") else ""
    return "\n".join([
        "from transformers import AutoModelForCausalLM, AutoTokenizer", "",
        f"name = {name!r}" + ("  # the folder of this file" if name == "." else ""),
        "tokenizer, model = AutoTokenizer.from_pretrained(name), AutoModelForCausalLM.from_pretrained(name)",
        f"request = {request!r}", f"prompt = ({written})",
        'inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)',
        f"output = model.generate(**inputs{stop},", f"                        {settings})",
        'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))'])


def _data(root: Path, arm: str, asked: dict) -> dict:
    """What the arm learnt from, and what its judge did: numbers of other stages, None where a stage was not run."""
    def stage(name: str) -> Path:
        return next((folder for folder in (root / arm / name, root / name) if folder.is_dir()), root / name)

    paid = "reward" in asked and asked["reward"]["weights"]["writing"]
    quality = stage("writing-rm" if paid and asked["reward"]["writing"]["model"] == "stage" else "judge") / "quality.json"
    pretrained = asked["inputs"]["start"] == "continual-pretrain"
    weights = asked["reward"]["weights"] if "reward" in asked else {}
    return {"paid_for": [name for name in REWARDS if weights.get(name)],
            "taught_documents": status_of(stage("cold-start")).get("documents"),
            "judge": read_json(quality) if paid and quality.exists() else None,
            "mixture": mixture_table(stage("pack")).to_dict("records") if pretrained else []}


def _measured(root: Path, arm: str) -> dict:
    """Rewards on held-out queries before and after, each (mean, low, high) by bootstrap over queries, and their change, paired
    by query; what the model wrote, in words; and how far that followed what was asked for."""
    table = held_out_table(root)
    samples = table[table.arm == arm]
    rows = []
    for reward in (name for name in REWARDS if name in samples):
        pairs = before_and_after(samples, reward)
        if len(pairs):
            rows.append({"reward": reward, "queries": len(pairs), "before": bootstrap_mean(pairs.before),
                         "after": bootstrap_mean(pairs.after), "change": bootstrap_mean(pairs.after - pairs.before)})
    after, control = samples[samples.phase == "after"], length_table(samples).dropna(subset="correlation").set_index("phase")
    lengths = samples.asked_words.nunique() if len(samples) else 0
    ranges = pd.DataFrame(list(after.word_range)) if len(after) else None
    return {"rewards": rows, "wrote": None if ranges is None else {
        "queries": len(after), "low": int(ranges[0].min()), "high": int(ranges[1].max()), "words": after.answer_words.mean(),
        "truncated": after.truncated.mean()},
        "control": control.to_dict("index") if lengths > 4 else {}}


def write_cards(root: str | Path) -> list[Path]:
    """Write the card of every arm in a run folder whose training is finished."""
    stages = [stage for name in ("grpo", "sft") for stage in sorted(Path(root).glob(f"*/{name}"))]
    return [write_card(root, stage.parent.name) for stage in stages if has_model(stage)]
