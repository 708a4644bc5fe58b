"""Scores that a trained Writing RM gives to texts: in this process, or from vLLM at an address (`lwz serve-rm`).

The texts are tokenised here in both cases, so that the scores differ by rounding alone.
"""

import functools
import json
from collections.abc import Iterable
from pathlib import Path

from lwzlib.base.models import load_model, load_tokenizer
from lwzlib.base.rows import RunError
from lwzlib.method import prompts

_tokenizer = functools.cache(load_tokenizer)


@functools.cache
def read_info(folder: str) -> dict:
    """`writing_rm.json` of the folder: identity (the fingerprint of its training), frame, fold_layout, max_tokens, and floor
    (the lowest score it gave on held-out pairs)."""
    return json.loads((Path(folder) / "writing_rm.json").read_text())


class Scorer:
    """A trained Writing RM in this process. Beside a policy that ZeRO-3 shards it is sharded too: then all processes make
    it, and score, together."""

    def __init__(self, folder: str | Path, dtype: str, attention: str):
        import torch
        from transformers.integrations import is_deepspeed_zero3_enabled

        self.info = dict(read_info(str(folder)))
        self.sharded = is_deepspeed_zero3_enabled()
        with torch.random.fork_rng():  # in the midst of training: a resumed run must draw as if it had not been
            self.model, self.tokenizer = load_model(str(folder), dtype, attention, scorer=True, spread=True)
            if self.sharded:
                from accelerate import Accelerator
                from trl.models.utils import prepare_deepspeed

                self.model = prepare_deepspeed(self.model, Accelerator())

    def __call__(self, texts: list[tuple[str, str]], batch_tokens: int = 8192) -> list[float]:
        """A score for each (prompt, text), any real number. Raises RunError for one over `max_tokens` tokens."""
        ids = bounded_ids(self.tokenizer, self.info, texts)
        if self.sharded:
            return scores_together(self.model, self.tokenizer.pad_token_id, ids)
        return score_ids(self.model, self.tokenizer.pad_token_id, ids, batch_tokens)


def bounded_ids(tokenizer, info: dict, texts: Iterable[tuple[str, str]]) -> list[list[int]]:
    """`token_ids` for the model of `info`. Raises RunError for a text over its `max_tokens` tokens."""
    ids = token_ids(tokenizer, info["frame"], info["fold_layout"], texts)
    for i, tokens in enumerate(map(len, ids)):
        if tokens > info["max_tokens"]:
            raise RunError(f"text {i} has {tokens} tokens with its prompt; this Writing RM reads at most "
                           f"{info['max_tokens']} (writing_rm.max_tokens)")
    return ids


def token_ids(tokenizer, frame: str, fold_layout: bool, texts: Iterable[tuple[str, str]]) -> list[list[int]]:
    """Each (prompt, text) in the model's frame, without any instruction and without an end token; at least one token."""
    framed = [prompts.render_bare(prompt, frame, tokenizer) + (" ".join(text.split()) if fold_layout else text)
              for prompt, text in texts]
    whole = [text.encode("utf-8", "replace").decode() for text in framed]  # a lone surrogate breaks tokenizers
    return [ids or [tokenizer.pad_token_id] for ids in tokenizer(whole, add_special_tokens=False).input_ids] if whole else []


def score_ids(model, pad_token_id: int, ids: list[list[int]], batch_tokens: int) -> list[float]:
    """Scores in batches of texts of like length, at most `batch_tokens` tokens with padding (one text may be longer). Equal
    texts are scored once: in bfloat16 the company of a batch moves the last digits of a score."""
    import torch

    different, scores = sorted(set(map(tuple, ids)), key=lambda text: (len(text), text)), {}
    while different:
        longest = len(different[-1])
        batch = [different.pop() for _ in range(min(len(different), max(1, batch_tokens // longest)))]
        padded = torch.tensor([text + (pad_token_id,) * (longest - len(text)) for text in batch], device=model.device)
        mask = torch.tensor([[1] * len(text) + [0] * (longest - len(text)) for text in batch], device=model.device)
        with torch.no_grad():
            values = model(input_ids=padded, attention_mask=mask).logits[:, 0].float().tolist()
        scores |= dict(zip(batch, values, strict=True))
    return [scores[tuple(text)] for text in ids]


def scores_together(model, pad_token_id: int, ids: list[list[int]]) -> list[float]:
    """`score_ids` where a forward pass is one of all processes at once: the texts of all are dealt out, so that each makes as
    many passes as the others, of one text, and those of like length together. Every process must call it."""
    from accelerate import PartialState
    from accelerate.utils import gather_object

    state = PartialState()
    different = sorted(set(map(tuple, gather_object(ids))), key=lambda text: (len(text), text))
    passes = -(-len(different) // state.num_processes)
    dealt = different + different[-1:] * (passes * state.num_processes - len(different))
    rows = gather_object([score_ids(model, pad_token_id, dealt[state.process_index :: state.num_processes], 0)])
    scores = {text: rows[i % state.num_processes][i // state.num_processes] for i, text in enumerate(dealt)}
    return [scores[tuple(text)] for text in ids]


def remote_scores(folder: str, url: str, texts: list[tuple[str, str]], patience_s: float) -> list[float]:
    """Scores of the model in `folder` from vLLM at `url`, waited for `patience_s` seconds. Equal texts are sent once: their
    scores are equal then, whatever batches they would have come into. Raises as `bounded_ids` and `rm_client.ask` do."""
    from lwzlib.base import rm_client

    info = read_info(folder)
    ids = [tuple(text) for text in bounded_ids(_tokenizer(folder), info, texts)]
    different = list(dict.fromkeys(ids))
    scores = dict(zip(different, rm_client.ask(url, info["identity"], different, patience_s), strict=True))
    return [scores[text] for text in ids]
