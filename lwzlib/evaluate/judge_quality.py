"""Quality of a judge of writing on the held-out pairs of a run: the kit's Writing RM, a public one, or a language model.

The paper does not say how good its Writing RM is. Here each judge is measured on the same pairs, by kind of damage: how often
it prefers the better text, with a 95% interval. A public reward model is measured before anything is trained on its scores:
an answer that is empty gets the lowest score that the model gave on these pairs.
"""

import json
import math
from collections import Counter
from pathlib import Path

from lwzlib.base.awaited import scores_of
from lwzlib.base.kit import ModelError
from lwzlib.base.models import load_config, load_tokenizer
from lwzlib.base.recipe import Recipe
from lwzlib.base.rows import read_json, write_atomic
from lwzlib.base.run_folder import Run
from lwzlib.method.pairs import PAIR_FILES, load_pairs
from lwzlib.method.prompts import wrap
from lwzlib.method.rewards import build_rewards
from lwzlib.method.train_writing_rm import heldout_texts, judge_heldout
from lwzlib.method.writing_rm import is_public


def public_info(name: str) -> dict:
    """Content of `writing_rm.json`, without the floor, for a public reward model by folder or hub name: it reads a query and an
    answer in its own chat template. Raises ModelError for a model that is no sequence classifier with one label, or has code of
    its own, which a judge never gets to run."""
    config, tokenizer = load_config(name), load_tokenizer(name)
    kind = next(iter(config.architectures or ()), "a model of unknown kind")
    if not kind.endswith("ForSequenceClassification") or config.num_labels != 1:
        raise ModelError(f"reward.writing.model = {name!r} is {kind} with {config.num_labels} labels; a reward model is a "
                         "...ForSequenceClassification with one label")
    if not tokenizer.chat_template:
        raise ModelError(f"the tokenizer of reward.writing.model = {name!r} has no chat template, in which to read a query "
                         "and an answer")
    return {"model": name, "identity": name, "frame": "messages", "fold_layout": False,
            "max_tokens": getattr(config, "max_position_embeddings", None) or tokenizer.model_max_length}


def measure_judge(recipe: Recipe, run: Run, pairs: Path, writing_rm) -> Path:
    """Score the held-out pairs of the stage `pairs` by the recipe's judge: `scores.jsonl` and `quality.json`; for a public
    reward model also `writing_rm.json`, with which the folder stands for a Writing RM. Returns the run's folder."""
    if run.finished:
        return run.folder
    with run.work():
        info = public_info(recipe.reward.writing.model) if is_public(recipe) else None
        if info:  # described beside, until its floor is known: what is read of a folder once is kept in memory
            writing_rm = str(run.folder / "without-floor")
            Path(writing_rm).mkdir(exist_ok=True)
            write_atomic(Path(writing_rm) / "writing_rm.json", json.dumps(info))
        reward = build_rewards(recipe, writing_rm)["writing"]
        heldout = load_pairs(str(pairs / PAIR_FILES[1]))
        in_pairs = recipe.reward.by_language_model and recipe.reward.writing.judge == "pairwise"
        measured = judge_heldout(run, heldout, _scores(reward, heldout_texts(heldout), len(heldout), in_pairs))
        if info:
            write_atomic(run.folder / "writing_rm.json", json.dumps(info | {"floor": measured["floor"]}, indent=1))
    return run.folder


def _scores(reward, texts: list[tuple[str, str]], pairs: int, in_pairs: bool) -> list[float]:
    """Scores of `heldout_texts` in their order. The two texts of a pair are asked for beside each other, as a group, and the
    pairs of one prompt one after another, so that no text is compared with one of another pair. A judge that compares texts
    `in_pairs` gives the others none (NaN)."""
    rounds: dict[int, list[int]] = {}
    seen: Counter[str] = Counter()
    for i in range(pairs):
        rounds.setdefault(seen[texts[i][0]], []).extend((i, i + pairs))
        seen[texts[i][0]] += 1
    scores: dict[int, float] = dict.fromkeys(range(len(texts)), math.nan)
    for places in (*rounds.values(), [] if in_pairs else range(2 * pairs, len(texts))):
        columns = {"completions": [wrap("", texts[i][1], "direct") for i in places], "query": [texts[i][0] for i in places],
                   "style": ["direct"] * len(places)}
        found = scores_of(reward, **columns, log_metric=_say_share)
        scores |= {i: score for i, score in zip(places, found, strict=True) if score is not None}
    return list(scores.values())


def _say_share(name: str, share: float) -> None:
    if share:
        print(f"judge: {name} for {share:.0%} of the texts", flush=True)


def qualities(folder: Path) -> dict[str, dict]:
    """{name of a judge: its `quality.json`} of the judges that were measured in a run folder, the trained Writing RM first."""
    files = {"Writing RM of this run": folder / "writing-rm" / "quality.json"}
    files |= {"public reward model of this run": folder / "judge" / "quality.json"}
    files |= {file.parent.name: file for file in sorted((folder / "judges").glob("*/quality.json"))}
    return {name: read_json(file) for name, file in files.items() if file.is_file()}
