"""Completions of a list of prompts by a loaded model, with transformers in this process."""

from collections.abc import Iterator

from lwzlib.base.quantities import Sampling


def completions(model, tokenizer, texts: list[str], sampling: Sampling, batch: int, seed: int,
                stop: list[str] | None = None, first: int = 0) -> Iterator[tuple[int, str, bool]]:
    """Yield (index of the prompt, completion, truncated) in order, as `counted` does."""
    for i, text, truncated, _ in counted(model, tokenizer, texts, sampling, batch, seed, stop, first):
        yield i, text, truncated


def counted(model, tokenizer, texts: list[str], sampling: Sampling, batch: int, seed: int,
            stop: list[str] | None = None, first: int = 0) -> Iterator[tuple[int, str, bool, int]]:
    """Yield (index of the prompt, completion, truncated, its tokens) in order, `batch` prompts at a time.

    Special tokens are dropped; `truncated` is true where neither the end of the text nor a stop string came within
    `max_new_tokens`; the end counts as a token. A batch depends on `seed` and its own place only, so that `first` (an
    index) can resume. A temperature of 0 is greedy.
    """
    import torch

    how = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p,
           "top_k": getattr(sampling, "top_k", 0)} if sampling.temperature else {
           "do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if not hasattr(model, "hf_device_map"):  # else it lies on several GPUs
        model.to("cuda" if torch.cuda.is_available() else "cpu")
    ends_of = torch.tensor(sorted(_ends(model, tokenizer)), device=model.device)
    for start in range(first // batch * batch, len(texts), batch):
        with torch.random.fork_rng():
            torch.manual_seed(seed + start)
            chunk = tokenizer(texts[start : start + batch], return_tensors="pt", padding=True,
                              add_special_tokens=False).to(model.device)
            with torch.no_grad():
                output = model.generate(**chunk, **how, max_new_tokens=sampling.max_new_tokens, stop_strings=stop or None,
                                        tokenizer=tokenizer)
        for i, ids in enumerate(output[:, chunk["input_ids"].shape[1] :]):
            text = tokenizer.decode(ids, skip_special_tokens=True)
            stopped = any(s in text for s in stop or [])
            ends = torch.isin(ids, ends_of).nonzero()  # of a text that a stop string ended, the padding
            yield start + i, text, not (stopped or len(ends)), int(ends[0]) + (not stopped) if len(ends) else len(ids)


def _ends(model, tokenizer) -> set[int]:
    """Tokens that end a text, or pad it: a model may have other ends than its tokenizer."""
    said = model.generation_config.eos_token_id
    return {tokenizer.eos_token_id, tokenizer.pad_token_id, *(said if isinstance(said, list) else [said])} - {None}
