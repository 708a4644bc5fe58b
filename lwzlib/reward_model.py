"""The Writing RM: a Bradley-Terry reward model on preference pairs, trained by TRL's RewardTrainer.

Published: loss -E log sigmoid(r_chosen - r_rejected) on Qwen2.5-72B, human preference pairs on writing. Not published:
the pairs, their number, how good the model is. So every model trained here states its accuracy per kind of pair with an
interval, its calibration, and what else its score follows: length, markdown, language.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from lwzlib import data, pairs, prompts
from lwzlib.generate import completions
from lwzlib.quantities import Sampling
from lwzlib.recipe import Recipe
from lwzlib.runs import Run, RunError, main_process, write_atomic, write_rows
from lwzlib.text import count_words, whole_sentences

_EVERY = 4  # so many held-out pairs for one that is also scored with markdown
_SEED_OF_PAIRS = 1  # added to the run's seed, so that pairs are not drawn as the cold start draws


class Scorer:
    """A trained Writing RM. `info` is what `writing_rm.json` says: identity, frame, fold_layout, max_tokens, floor.

    Beside a policy that ZeRO-3 shards it is sharded too: then all processes make it, and score, together."""

    def __init__(self, folder: str | Path, dtype: str, attention: str):
        import torch
        from transformers.integrations import is_deepspeed_zero3_enabled

        from lwzlib import models

        self.info = json.loads((Path(folder) / "writing_rm.json").read_text())
        self.sharded = is_deepspeed_zero3_enabled()
        with torch.random.fork_rng():  # in the midst of training: a resumed run must draw as if it had not been
            self.model, self.tokenizer = models.load(str(folder), dtype, attention, scorer=True, spread=True)
            if self.sharded:
                from accelerate import Accelerator
                from trl.models.utils import prepare_deepspeed

                self.model = prepare_deepspeed(self.model, Accelerator())

    def count_tokens(self, texts: Iterable[tuple[str, str]]) -> list[int]:
        """Of each (prompt, text) in its frame: what `max_tokens` bounds."""
        return [len(ids) for ids in self._ids(texts)]

    def __call__(self, texts: list[tuple[str, str]], batch_tokens: int = 8192) -> list[float]:
        """A score for each (prompt, text), any real number. Raises RunError for one over `max_tokens` tokens."""
        ids = self._ids(texts)
        for i, each in enumerate(ids):
            if len(each) > self.info["max_tokens"]:
                raise RunError(f"text {i} has {len(each)} tokens with its prompt; this Writing RM reads at most "
                               f"{self.info['max_tokens']} (writing_rm.max_tokens)")
        if self.sharded:
            return scores_together(self.model, self.tokenizer.pad_token_id, ids)
        return scores(self.model, self.tokenizer.pad_token_id, ids, batch_tokens)

    def _ids(self, texts) -> list[list[int]]:
        return token_ids(self.tokenizer, self.info["frame"], self.info["fold_layout"], texts)


def token_ids(tokenizer, frame: str, fold_layout: bool, texts: Iterable[tuple[str, str]]) -> list[list[int]]:
    """Each (prompt, text) in the model's frame, without any instruction and without an end token; at least one token."""
    framed = [prompts.render_bare(prompt, frame, tokenizer) + (" ".join(text.split()) if fold_layout else text)
              for prompt, text in texts]
    whole = [text.encode("utf-8", "replace").decode() for text in framed]  # a lone surrogate breaks tokenizers
    return [ids or [tokenizer.pad_token_id] for ids in tokenizer(whole, add_special_tokens=False).input_ids] if whole else []


def scores(model, pad_token_id: int, ids: list[list[int]], batch_tokens: int) -> list[float]:
    """In batches of texts of like length, at most `batch_tokens` tokens with padding (one text may be longer). Equal texts
    are scored once: in bfloat16 the company of a batch moves the last digits of a score."""
    import torch

    different, found = sorted(set(map(tuple, ids)), key=lambda each: (len(each), each)), {}
    while different:
        longest = len(different[-1])
        batch = [different.pop() for _ in range(min(len(different), max(1, batch_tokens // longest)))]
        padded = torch.tensor([[*each, *[pad_token_id] * (longest - len(each))] for each in batch], device=model.device)
        lengths = torch.tensor([[len(each)] for each in batch], device=model.device)
        mask = (torch.arange(longest, device=model.device) < lengths).long()
        with torch.no_grad():
            values = model(input_ids=padded, attention_mask=mask).logits[:, 0].float().tolist()
        found |= dict(zip(batch, values, strict=True))
    return [found[tuple(each)] for each in ids]


def scores_together(model, pad_token_id: int, ids: list[list[int]]) -> list[float]:
    """As `scores`, where a forward pass is one of all processes at once: the texts of all are dealt out, so that each makes as
    many passes as the others, of one text, and those of like length together. Every process must call it."""
    from accelerate import PartialState
    from accelerate.utils import gather_object

    state = PartialState()
    different = sorted({tuple(each) for each in gather_object(ids)}, key=lambda each: (len(each), each))
    passes = -(-len(different) // state.num_processes)
    dealt = different + different[-1:] * (passes * state.num_processes - len(different))
    rows = gather_object([scores(model, pad_token_id, dealt[state.process_index :: state.num_processes], 0)])
    found = {each: rows[i % state.num_processes][i // state.num_processes] for i, each in enumerate(dealt)}
    return [found[tuple(each)] for each in ids]


def make_pairs(recipe: Recipe, run: Run) -> dict[str, list[pairs.Pair]]:
    """{train, heldout}: read from where the recipe says, or made; kept in the run's folder, so made once."""
    asked, files = recipe.writing_rm, {part: run.folder / f"pairs_{part}.jsonl" for part in ("train", "heldout")}
    if not all(file.exists() for file in files.values()):
        if asked.pairs == "made":
            train, heldout = pairs.split(_originals(recipe, run), asked.heldout_share, run.seed)
            made = {"train": pairs.build(train, asked.kinds, asked.pairs_per_kind, run.seed),
                    "heldout": pairs.build(heldout, asked.kinds, asked.heldout_pairs_per_kind, run.seed)}
        else:
            made = dict(zip(files, pairs.split(pairs.load(asked.pairs), asked.heldout_share, run.seed), strict=True))
        if asked.length_balanced:
            made["train"] = pairs.balance_lengths(made["train"], run.seed)
        if empty := [part for part, some in made.items() if not some]:
            raise RunError(f"no {empty[0]} pairs are left; give more sources, another writing_rm.heldout_share, or "
                           "writing_rm.length_balanced=false")
        pairs.card(made).to_csv(run.folder / "card.csv", index=False)
        for part, file in files.items():
            write_rows(file, [pair.model_dump() for pair in made[part]])
    return {part: pairs.load(str(file)) for part, file in files.items()}


def _originals(recipe: Recipe, run: Run) -> list[pairs.Original]:
    """Human passages, each with the model's own continuation, and two answers of the model to each of some queries."""
    from lwzlib import train

    asked, seed = recipe.writing_rm, run.seed + _SEED_OF_PAIRS
    model, tokenizer = train.load(recipe, recipe.model.name, spread=True)
    human = pairs.human_originals(asked.corpora, asked.passage_words, asked.passages_per_corpus, seed)
    queries = data.load(recipe.data.train, recipe.data.languages)[: asked.queries]
    requests = [o.prompt for o in human] + [q.query for q in queries for _ in range(2)]
    sampling = Sampling(temperature=0.8, top_p=0.95, max_new_tokens=asked.answer_tokens)
    framed = [prompts.render_bare(request, recipe.model.frame, tokenizer) for request in requests]
    written = []
    for i, text, _ in completions(model, tokenizer, framed, sampling, recipe.samples.batch_completions, seed):
        written.append(whole_sentences(text))
        if (i + 1) % recipe.samples.batch_completions == 0 or i + 1 == len(framed):
            print(f"writing-rm: text {i + 1}/{len(framed)} for the pairs", flush=True)
    found = [pairs.Original(o.source, o.prompt, o.text, True, text) for o, text in zip(human, written, strict=False)]
    answers = written[len(human) :]
    return found + [pairs.Original(query.id, query.query, answers[2 * i + k], False, answers[2 * i + 1 - k])
                    for i, query in enumerate(queries) for k in (0, 1)]


def train_rm(recipe: Recipe, run: Run) -> Path:
    """The folder of the trained model. Leaves the pairs, `card.csv`, `scores.jsonl` (each held-out pair) and
    `quality.json`; resumes from the last whole checkpoint."""
    if run.finished:
        return run.folder / "model"
    from datasets import Dataset
    from transformers import set_seed
    from trl import RewardConfig, RewardTrainer

    from lwzlib import models, train

    asked = recipe.writing_rm
    with run.work():
        last = train.resumed(run, "metrics")
        config = RewardConfig(
            num_train_epochs=asked.epochs, learning_rate=asked.learning_rate, lr_scheduler_type="cosine", warmup_steps=4,
            per_device_train_batch_size=asked.batch_pairs, max_length=None,
            **train.checkpoints(asked.checkpoint_every_steps), **train.arguments(recipe, run))
        with config.main_process_first(local=False), models.whole():
            parts = make_pairs(recipe, run)
        m = recipe.model
        set_seed(run.seed)  # the head is new
        model, tokenizer = models.load(asked.model, m.dtype, m.attention, m.trust_remote_code, scorer=True)
        rows = [dict(zip(("chosen_ids", "rejected_ids"),
                         token_ids(tokenizer, m.frame, asked.fold_layout, [(p.prompt, p.chosen), (p.prompt, p.rejected)]),
                         strict=True))
                for p in parts["train"]]
        fits = [row for row in rows if max(map(len, row.values())) <= asked.max_tokens]
        run.update(pairs=len(rows), pairs_too_long=len(rows) - len(fits))
        if not fits:
            raise RunError(f"all {len(rows)} training pairs are longer than writing_rm.max_tokens = {asked.max_tokens}")
        lora = train.lora(asked.lora, task_type="SEQ_CLS", modules_to_save=["score"])
        trainer = RewardTrainer(model, args=config, train_dataset=Dataset.from_list(fits), processing_class=tokenizer,
                                peft_config=lora, callbacks=[train.Rows(run, train.RM_COLUMNS)])
        trained = train.go(trainer, last).eval()
        quality = evaluate(recipe, run, trained, tokenizer, parts["heldout"])
        train.save(trained, trainer, run, {"writing_rm.json": {
            "identity": run.fingerprint, "frame": m.frame, "fold_layout": asked.fold_layout, "max_tokens": asked.max_tokens,
            "floor": quality["floor"]}})
    return run.folder / "model"


def evaluate(recipe: Recipe, run: Run, model, tokenizer, heldout: list[pairs.Pair]) -> dict:
    """Score held-out pairs and leave `scores.jsonl` and `quality.json` (see `quality`)."""
    marked = heldout[::_EVERY]
    asked = [(p.prompt, p.chosen) for p in heldout] + [(p.prompt, p.rejected) for p in heldout]
    asked += [(p.prompt, markdown(p.chosen)) for p in marked]
    ids = token_ids(tokenizer, recipe.model.frame, recipe.writing_rm.fold_layout, asked)
    values = scores(model, tokenizer.pad_token_id, [each[-recipe.writing_rm.max_tokens :] for each in ids], 8192)
    n = len(heldout)
    rows = [{"kind": p.kind, "source": p.source, "language": p.language, "chosen": a, "rejected": b,
             "chosen_words": count_words(p.chosen), "rejected_words": count_words(p.rejected)}
            for p, a, b in zip(heldout, values[:n], values[n : 2 * n], strict=True)]
    for row, value in zip(rows[::_EVERY], values[2 * n :], strict=True):
        row["markdown"] = value
    run.write("scores", rows)
    found = quality(rows)
    if main_process():
        write_atomic(run.folder / "quality.json", json.dumps(found, indent=1))
    return found


def markdown(text: str) -> str:
    """The same words with a heading's and a list's marks: a score should not move."""
    return "\n".join(f"- **{first}** {rest}" for first, _, rest in (s.partition(" ") for s in text.split("\n") if s))


def quality(rows: list[dict]) -> dict:
    """What held-out pairs say of a Writing RM: `accuracy` {kind or all: [share, low, high, pairs]} with Wilson's 95%
    interval, mean `margin`, `calibration` [[expected, observed win rate, pairs]] in fifths by expectation, and its gap,
    Spearman's correlation of score and words over the preferred texts, mean shift by markdown in standard deviations,
    `languages` {language: mean score}, and `floor`, the lowest score seen: that of an empty answer."""
    from scipy.stats import binomtest, spearmanr

    def share(some):
        wins = sum(row["chosen"] > row["rejected"] for row in some)
        interval = binomtest(wins, len(some)).proportion_ci(method="wilson")
        return [wins / len(some), interval.low, interval.high, len(some)]

    chosen, rejected = (np.array([row[name] for row in rows]) for name in ("chosen", "rejected"))
    moved = [row["markdown"] - row["chosen"] for row in rows if "markdown" in row]
    expected = 1 / (1 + np.exp(-np.abs(chosen - rejected)))
    observed = np.where(chosen == rejected, 0.5, chosen > rejected)
    fifths = [part for part in np.array_split(np.argsort(expected), 5) if len(part)]
    calibration = [[float(expected[part].mean()), float(observed[part].mean()), len(part)] for part in fifths]
    kinds = dict.fromkeys(row["kind"] for row in rows)
    return {
        "accuracy": {kind: share([r for r in rows if r["kind"] == kind]) for kind in kinds} | {"all": share(rows)},
        "margin": float((chosen - rejected).mean()),
        "calibration": calibration,
        "calibration_gap": float(sum(abs(e - o) * n for e, o, n in calibration) / len(rows)),
        "length_correlation": _finite(spearmanr(chosen, [row["chosen_words"] for row in rows]).statistic),
        "length_alone": float(np.mean([0.5 * (r["chosen_words"] == r["rejected_words"])
                                       + (r["chosen_words"] > r["rejected_words"]) for r in rows])),
        "markdown_shift": _finite(np.mean(moved) / max(np.concatenate([chosen, rejected]).std(), 1e-9)),
        "languages": {name: float(np.mean([r["chosen"] for r in rows if r["language"] == name]))
                      for name in sorted({r["language"] for r in rows})},
        "floor": float(min(chosen.min(), rejected.min())),
    }


def _finite(value) -> float | None:
    """JSON has no NaN: what cannot be computed is null."""
    return float(value) if np.isfinite(value) else None
