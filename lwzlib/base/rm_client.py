"""Scores of token ids from a Writing RM that vLLM serves (`lwz serve-rm`), through outages of the server."""

import itertools
import os
import re
import time
from collections.abc import Sequence

import httpx
from pydantic import BaseModel, FiniteFloat, ValidationError

_PAUSE_S = 0.25  # before the second try; doubles up to 4 s


class ScoringError(RuntimeError):
    """Scores that cannot be had; the message names the server and the cause."""


class _Row(BaseModel, strict=True):
    index: int
    data: tuple[FiniteFloat]


class _Answer(BaseModel, strict=True):
    model: str
    data: list[_Row]


def token() -> str:
    """`$LWZ_RM_TOKEN`, or "". Raises ScoringError, which does not show it, if no HTTP header can carry it."""
    value = os.environ.get("LWZ_RM_TOKEN", "")
    if not re.fullmatch("[!-~]*", value):
        raise ScoringError("LWZ_RM_TOKEN must be printable ASCII without spaces or line ends")
    return value


def ask(url: str, model: str, texts: Sequence[Sequence[int]], patience_s: float, batch_texts: int = 64) -> list[float]:
    """One raw score, any finite number, per text of token ids, from the server at `url`, which must serve `model`.

    A request has up to `batch_texts` texts. It is tried again until `patience_s` seconds (above 0) have passed, and each try
    may take as long: give more than a request needs, queueing included. Raises ScoringError.
    """
    secret, scores = token(), []
    headers = {"Authorization": f"Bearer {secret}"} if secret else {}
    # A client per call survives forks. A cluster's web proxy must not see the texts; plain http needs no certificates.
    with httpx.Client(headers=headers, timeout=httpx.Timeout(patience_s, connect=min(5.0, patience_s)), trust_env=False,
                      verify=url.startswith("https")) as client:
        for start in range(0, len(texts), batch_texts):
            part = texts[start : start + batch_texts]
            where = f"{url}, texts {start} to {start + len(part) - 1}"
            body = {"model": model, "input": part, "use_activation": False}  # a raw score, not a probability
            response = _post(client, url.rstrip("/"), body, patience_s, where)
            scores += _read(response, model, len(part), where)
    return scores


def _post(client: httpx.Client, url: str, body: dict, patience_s: float, where: str) -> httpx.Response:
    """The server's response; while the server is away or busy it is asked again."""
    began = time.monotonic()
    for tries in itertools.count():
        try:
            response = client.post(f"{url}/pooling", json=body)
            # vLLM answers 500 also while it ends, when its /health may still be well, and when its engine has died.
            away = response.status_code == 500 and (
                "after shutdown" in response.text or client.get(f"{url}/health").status_code != 200)
            if response.status_code not in (502, 503, 504) and not away:
                break
            cause, retry_after = _reply(response), response.headers.get("Retry-After", "")
        except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
            raise ScoringError(f"{where}: {error}") from None
        except httpx.TransportError as error:
            cause, retry_after = f"{type(error).__name__}: {error}", ""
        left_s = patience_s - (time.monotonic() - began)
        if left_s <= 0:
            raise ScoringError(f"{where}: no scores after {patience_s - left_s:.1f} s; last cause: {cause}")
        if tries == 0:
            print(f"{where}: waiting up to {patience_s:g} s: {cause}", flush=True)
        pause_s = _PAUSE_S * 2 ** min(tries, 4) + (int(retry_after) if re.fullmatch("[0-9]{1,9}", retry_after) else 0)
        time.sleep(min(left_s, pause_s))  # the last try comes when patience ends
    if tries:
        print(f"{where}: going on after {time.monotonic() - began:.1f} s", flush=True)
    return response


def _read(response: httpx.Response, model: str, texts: int, where: str) -> list[float]:
    if response.status_code != 200:
        hint = f": `lwz serve-rm` must serve the Writing RM {model!r} there" if response.status_code == 404 else ""
        raise ScoringError(f"{where}: {_reply(response)}{hint}")
    try:
        answer = _Answer.model_validate_json(response.content)
    except ValidationError as error:
        raise ScoringError(f"{where}: not finite scores: {error.errors()[0]['msg']}: {_reply(response)}") from None
    if answer.model != model:
        raise ScoringError(f"{where}: scored by {answer.model!r}, expected {model!r}, whose scale is another")
    if [row.index for row in answer.data] != list(range(texts)):
        raise ScoringError(f"{where}: {len(answer.data)} scores for {texts} texts: {_reply(response)}")
    return [row.data[0] for row in answer.data]


def _reply(response: httpx.Response) -> str:
    return f"HTTP {response.status_code} {response.text[:500]}"
