"""Scores that a trained Writing RM gives to texts: in this process, or from vLLM at an address (`lwz serve-rm`).

The texts are tokenised here in both cases, so that the scores differ by rounding alone.
"""

import bisect
import functools
from collections.abc import Iterable
from pathlib import Path

from lwzlib.base.models import load_model, load_tokenizer
from lwzlib.base.recipe import Recipe
from lwzlib.base.rows import RunError, read_json
from lwzlib.base.scoring import score_ids, scores_together
from lwzlib.method import prompts

_tokenizer = functools.cache(load_tokenizer)


@functools.cache
def read_info(folder: str) -> dict:
    """`writing_rm.json` of the folder: identity (the fingerprint of its training), frame, fold_layout, max_tokens, floor (the
    lowest score it gave on held-out pairs), and model, where the weights stand elsewhere."""
    return read_json(Path(folder) / "writing_rm.json")


def weights_of(folder: str) -> str:
    """Name or folder of the weights and the tokenizer of the model that the folder describes."""
    return read_info(folder).get("model", folder)


def is_writing_rm(folder: str) -> bool:
    """Whether the folder holds a model that `Scorer` can score by."""
    return (Path(folder) / "writing_rm.json").is_file()


def is_public(recipe: Recipe) -> bool:
    """Whether the recipe's judge is a reward model that the kit did not train."""
    writing = recipe.reward.writing
    return writing.judge == "reward-model" and writing.model != "stage" and not is_writing_rm(writing.model)


class Scorer:
    """A trained Writing RM in this process. Beside a policy that ZeRO-3 shards it is sharded too: then all processes make
    it, and score, together."""

    def __init__(self, folder: str | Path, dtype: str, attention: str):
        import torch
        from transformers.integrations import is_deepspeed_zero3_enabled

        self.info = dict(read_info(str(folder)))
        self.sharded = is_deepspeed_zero3_enabled()
        with torch.random.fork_rng():  # in the midst of training: a resumed run must draw as if it had not been
            self.model, self.tokenizer = load_model(weights_of(str(folder)), dtype, attention, scorer=True, spread=True)
            if self.sharded:
                from accelerate import Accelerator
                from trl.models.utils import prepare_deepspeed

                self.model = prepare_deepspeed(self.model, Accelerator())

    def __call__(self, texts: list[tuple[str, str]], batch_tokens: int = 8192) -> list[float]:
        """A score for each (prompt, text), any real number. Raises RunError for one over `max_tokens` tokens."""
        from accelerate.utils import gather_object

        ids = bounded_ids(self.tokenizer, self.info, texts)
        if self.sharded:
            together = scores_together(self.model, gather_object(ids))
            return [together[tuple(text)] for text in ids]
        return score_ids(self.model, ids, batch_tokens)


def bounded_ids(tokenizer, info: dict, texts: Iterable[tuple[str, str]]) -> list[list[int]]:
    """`token_ids` for the model of `info`. Raises RunError for a text over its `max_tokens` tokens."""
    ids = token_ids(tokenizer, info["frame"], info["fold_layout"], texts)
    for i, tokens in enumerate(map(len, ids)):
        if tokens > info["max_tokens"]:
            raise RunError(f"text {i} has {tokens} tokens with its prompt; this Writing RM reads at most "
                           f"{info['max_tokens']} (writing_rm.max_tokens)")
    return ids


def cut_to_fit(folder: str, texts: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The (prompt, text) pairs, where a text that is too long for the model in `folder` is cut at its end."""
    info, tokenizer = read_info(folder), _tokenizer(weights_of(folder))

    def too_long(prompt: str, text: str) -> bool:
        return len(token_ids(tokenizer, info["frame"], info["fold_layout"], [(prompt, text)])[0]) > info["max_tokens"]

    return [(prompt, text[: bisect.bisect_left(range(len(text)), True, key=lambda last: too_long(prompt, text[: last + 1]))])
            if too_long(prompt, text) else (prompt, text) for prompt, text in texts]


def token_ids(tokenizer, frame: str, fold_layout: bool, texts: Iterable[tuple[str, str]]) -> list[list[int]]:
    """Each (prompt, text) in the model's frame, without any instruction and without an end token; at least one token. The
    frame `messages` is that of public reward models: the tokenizer's chat template with its ends."""
    folded = [(prompt, " ".join(text.split()) if fold_layout else text) for prompt, text in texts]
    framed = [tokenizer.apply_chat_template([{"role": "user", "content": prompt}, {"role": "assistant", "content": text}],
                                            tokenize=False) if frame == "messages"
              else prompts.render_bare(prompt, frame, tokenizer) + text for prompt, text in folded]
    whole = [text.encode("utf-8", "replace").decode() for text in framed]  # a lone surrogate breaks tokenizers
    return [ids or [tokenizer.pad_token_id] for ids in tokenizer(whole, add_special_tokens=False).input_ids] if whole else []


def remote_scores(folder: str, url: str, texts: list[tuple[str, str]], patience_s: float) -> list[float]:
    """Scores of the model in `folder` from vLLM at `url`, waited for `patience_s` seconds. Equal texts are sent once: their
    scores are equal then, whatever batches they would have come into. Raises as `bounded_ids` and `rm_client.ask` do."""
    from lwzlib.base import rm_client

    info = read_info(folder)
    ids = [tuple(text) for text in bounded_ids(_tokenizer(weights_of(folder)), info, texts)]
    different = list(dict.fromkeys(ids))
    scores = dict(zip(different, rm_client.ask(url, info["identity"], different, patience_s), strict=True))
    return [scores[text] for text in ids]
