"""Ask a scoring server (`rm_server`) for scores, and wait out a server that is busy, restarting or not there yet."""

import json
import os
import re
import time

import httpx
from pydantic import BaseModel, ConfigDict, FiniteFloat, ValidationError
from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_random_exponential

_backoff = wait_random_exponential(multiplier=0.25, max=5)


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
