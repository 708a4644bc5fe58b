"""Scores of tokenised texts by a loaded model with one output, in batches and over processes."""

import contextlib
import itertools
from collections.abc import Iterable, Sequence

from lwzlib.base.models import input_device
from lwzlib.base.parallel import dealt


@contextlib.contextmanager
def _padding(model, ids: Iterable[Sequence[int]]):
    """A token that stands in none of the texts, and is the model's padding inside the block: transformers reads a score at the
    last token that is no padding, and many public models have no other padding than the end of a message."""
    config, used = getattr(model, "module", model).config, set(itertools.chain.from_iterable(ids))
    own, config.pad_token_id = config.pad_token_id, next(token for token in itertools.count() if token not in used)
    try:
        yield config.pad_token_id
    finally:
        config.pad_token_id = own


def score_ids(model, ids: list[list[int]], batch_tokens: int) -> list[float]:
    """Scores in batches of texts of like length, at most `batch_tokens` tokens with padding (one text may be longer). Equal
    texts are scored once: in bfloat16 the company of a batch moves the last digits of a score."""
    with _padding(model, ids) as padding:
        return _scores(model, padding, ids, batch_tokens)


def _scores(model, padding: int, ids: list[list[int]], batch_tokens: int) -> list[float]:
    import torch

    different, scores = sorted(set(map(tuple, ids)), key=lambda text: (len(text), text)), {}
    device = input_device(model)
    while different:
        longest = len(different[-1])
        batch = [different.pop() for _ in range(min(len(different), max(1, batch_tokens // longest)))]
        padded = torch.tensor([text + (padding,) * (longest - len(text)) for text in batch], device=device)
        mask = torch.tensor([[1] * len(text) + [0] * (longest - len(text)) for text in batch], device=device)
        with torch.no_grad():
            values = model(input_ids=padded, attention_mask=mask).logits[:, 0].float().tolist()
        scores |= dict(zip(batch, values, strict=True))
    return [scores[tuple(text)] for text in ids]


def scores_together(model, ids: list[list[int]]) -> dict[tuple[int, ...], float]:
    """{token ids: score} of texts that all processes hold: each scores its share, texts of like length at the same time, and
    one in a pass where ZeRO-3 makes it a pass of all processes. Every process must call it."""
    from transformers.integrations import is_deepspeed_zero3_enabled

    different = sorted(set(map(tuple, ids)), key=lambda text: (len(text), text))
    batch_tokens = 0 if is_deepspeed_zero3_enabled() else 8192
    return dict(zip(different, dealt(different, lambda own: score_ids(model, own, batch_tokens)), strict=True))
