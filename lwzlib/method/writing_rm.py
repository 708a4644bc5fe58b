"""The Writing RM scores an answer to a query: in this process, or over HTTP."""

import json
import os
import re
import time
from collections.abc import Iterable
from pathlib import Path

import httpx
from pydantic import BaseModel, ConfigDict, FiniteFloat, ValidationError
from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_random_exponential

from lwzlib.base.rows import RunError
from lwzlib.method import prompts

_backoff = wait_random_exponential(multiplier=0.25, max=5)


class Scorer:
    """A trained Writing RM. `info` is what `writing_rm.json` says: identity, frame, fold_layout, max_tokens, floor.

    Beside a policy that ZeRO-3 shards it is sharded too: then all processes make it, and score, together."""

    def __init__(self, folder: str | Path, dtype: str, attention: str):
        import torch
        from transformers.integrations import is_deepspeed_zero3_enabled

        from lwzlib.base.models import load_model

        self.info = json.loads((Path(folder) / "writing_rm.json").read_text())
        self.sharded = is_deepspeed_zero3_enabled()
        with torch.random.fork_rng():  # in the midst of training: a resumed run must draw as if it had not been
            self.model, self.tokenizer = load_model(str(folder), dtype, attention, scorer=True, spread=True)
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
        return score_ids(self.model, self.tokenizer.pad_token_id, ids, batch_tokens)

    def _ids(self, texts) -> list[list[int]]:
        return token_ids(self.tokenizer, self.info["frame"], self.info["fold_layout"], texts)


def token_ids(tokenizer, frame: str, fold_layout: bool, texts: Iterable[tuple[str, str]]) -> list[list[int]]:
    """Each (prompt, text) in the model's frame, without any instruction and without an end token; at least one token."""
    framed = [prompts.render_bare(prompt, frame, tokenizer) + (" ".join(text.split()) if fold_layout else text)
              for prompt, text in texts]
    whole = [text.encode("utf-8", "replace").decode() for text in framed]  # a lone surrogate breaks tokenizers
    return [ids or [tokenizer.pad_token_id] for ids in tokenizer(whole, add_special_tokens=False).input_ids] if whole else []


def score_ids(model, pad_token_id: int, ids: list[list[int]], batch_tokens: int) -> list[float]:
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
    rows = gather_object([score_ids(model, pad_token_id, dealt[state.process_index :: state.num_processes], 0)])
    found = {each: rows[i % state.num_processes][i // state.num_processes] for i, each in enumerate(dealt)}
    return [found[tuple(each)] for each in ids]


class ScoringError(RuntimeError):
    """Scores that cannot be had; the message names the server and the cause."""


class _Unavailable(Exception):
    retry_after_s = 0


class _Answer(BaseModel):
    model_config = ConfigDict(strict=True)
    scores: list[FiniteFloat]
    model: str


def token() -> str:
    """`$LWZ_RM_TOKEN`, or "". Raises ScoringError, which does not show it, if no HTTP header can carry it."""
    value = os.environ.get("LWZ_RM_TOKEN", "")
    if not re.fullmatch("[!-~]*", value):
        raise ScoringError("LWZ_RM_TOKEN must be printable ASCII without spaces or line ends")
    return value


def remote_scores(url: str, texts: list[tuple[str, str]], patience_s: float, batch_texts: int = 64,
                  identity: str | None = None) -> list[float]:
    """One finite score per (prompt, answer), from `url`/score, asked for in requests of up to `batch_texts` texts.

    A request is tried again until `patience_s` seconds (above 0) have passed, and each try may take as long: more than a
    request needs, queueing included. Without `identity`, all answers must come from the model that gave the first. A lone
    surrogate, which no tokenizer takes, is sent as `?`. Raises ScoringError.
    """
    secret, scores = token(), []
    headers = {"Authorization": f"Bearer {secret}"} if secret else {}
    # A client per call survives forks. A cluster's web proxy must not see the texts; plain http needs no certificates.
    with httpx.Client(headers=headers, timeout=httpx.Timeout(patience_s, connect=min(5.0, patience_s)), trust_env=False,
                      verify=url.startswith("https")) as client:
        for start in range(0, len(texts), batch_texts):
            part = texts[start : start + batch_texts]
            where = f"{url}, texts {start} to {start + len(part) - 1}"
            body = json.dumps({"texts": [{"prompt": p, "answer": a} for p, a in part]}, ensure_ascii=False)
            answer = _ask_patiently(client, f"{url.rstrip('/')}/score", body.encode("utf-8", "replace"), patience_s, where)
            identity = identity or answer.model
            if answer.model != identity:
                raise ScoringError(f"{where}: scored by {answer.model!r}, expected {identity!r}, whose scale is another")
            if len(answer.scores) != len(part):
                raise ScoringError(f"{where}: {len(answer.scores)} scores for {len(part)} texts")
            scores += answer.scores
    return scores


def _ask_patiently(client: httpx.Client, endpoint: str, body: bytes, patience_s: float, where: str) -> _Answer:
    began = time.monotonic()

    def wait(state) -> float:  # the last try comes when patience ends
        return min(max(0.0, patience_s - state.seconds_since_start), state.outcome.exception().retry_after_s + _backoff(state))

    def say(state) -> None:
        if state.attempt_number == 1:
            print(f"{where}: waiting up to {patience_s:g} s: {state.outcome.exception()}", flush=True)

    retrying = Retrying(retry=retry_if_exception_type(_Unavailable), stop=stop_after_delay(patience_s), wait=wait,
                        before_sleep=say, reraise=True)
    try:
        answer = retrying(_ask, client, endpoint, body, where)
    except _Unavailable as error:
        raise ScoringError(f"{where}: no scores after {time.monotonic() - began:.1f} s; last cause: {error}") from None
    if retrying.statistics["attempt_number"] > 1:
        print(f"{where}: going on after {time.monotonic() - began:.1f} s", flush=True)
    return answer


def _ask(client: httpx.Client, endpoint: str, body: bytes, where: str) -> _Answer:
    try:
        response = client.post(endpoint, content=body)
    except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
        raise ScoringError(f"{where}: {error}") from None
    except httpx.TransportError as error:
        raise _Unavailable(f"{type(error).__name__}: {error}") from None
    said = f"HTTP {response.status_code} {response.text[:500]}"
    if response.status_code in (502, 503, 504):
        busy, asked = _Unavailable(said), response.headers.get("Retry-After", "")
        busy.retry_after_s = int(asked) if re.fullmatch("[0-9]{1,9}", asked) else 0
        raise busy
    if response.status_code != 200:
        raise ScoringError(f"{where}: {said}")
    try:
        return _Answer.model_validate_json(response.content)
    except ValidationError as error:
        raise ScoringError(f"{where}: not an answer with finite scores: {error.errors()[0]['msg']}: {said}") from None
