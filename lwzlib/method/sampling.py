"""Completions of a list of prompts by a loaded model, with transformers in this process.

The paper samples at temperature 0.8 and top-p 1.0 in training, at 0.6 and 0.95 afterwards; the recipe names both.
"""

from collections.abc import Iterator

from lwzlib.base.quantities import Sampling
from lwzlib.method.prompts import opening_of


def completions(model, tokenizer, texts: list[str], sampling: Sampling, batch: int, seed: int,
                stop: list[str] | None = None, first: int = 0, streamer=None) -> Iterator[tuple[int, str, bool, int]]:
    """Yield (index of the prompt, completion, truncated, its tokens) in order, `batch` prompts at a time.

    A completion begins with the tag that its prompt opens. Special tokens are dropped; `truncated` is true where neither the
    end of the text nor a stop string came within `max_new_tokens`; the end counts as a token. A batch depends on `seed` and
    its own place only, so that `first` (an index) can resume. A temperature of 0 is greedy. A `streamer` of transformers gets
    the tokens of a batch of one as they come.
    """
    import torch

    how: dict = dict(do_sample=False, temperature=None, top_p=None, top_k=None)
    if sampling.temperature:
        how = dict(do_sample=True, temperature=sampling.temperature, top_p=sampling.top_p, top_k=getattr(sampling, "top_k", 0))
    if not hasattr(model, "hf_device_map"):  # else it lies on several GPUs
        model.to("cuda" if torch.cuda.is_available() else "cpu")
    end_ids = torch.tensor(sorted(_end_ids(model, tokenizer)), device=model.device)
    for start in range(first // batch * batch, len(texts), batch):
        with torch.random.fork_rng():
            torch.manual_seed(seed + start)
            chunk = tokenizer(texts[start : start + batch], return_tensors="pt", padding=True,
                              add_special_tokens=False).to(model.device)
            with torch.no_grad():
                output = model.generate(**chunk, **how, max_new_tokens=sampling.max_new_tokens, stop_strings=stop or None,
                                        tokenizer=tokenizer, streamer=streamer)
        for i, ids in enumerate(output[:, chunk["input_ids"].shape[1] :]):
            text = tokenizer.decode(ids, skip_special_tokens=True)
            stopped = any(s in text for s in stop or [])
            ends = torch.isin(ids, end_ids).nonzero()  # after a stop string: the padding
            tokens = int(ends[0]) + (not stopped) if len(ends) else len(ids)
            yield start + i, opening_of(texts[start + i]) + text, not (stopped or len(ends)), tokens


def _end_ids(model, tokenizer) -> set[int]:
    """Ids of the tokens that end a text, or pad it: a model may have other ends than its tokenizer."""
    ends = model.generation_config.eos_token_id
    return {tokenizer.eos_token_id, tokenizer.pad_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
