"""Ask a language model behind any OpenAI-compatible endpoint (a provider, vLLM, llama.cpp) for JSON, or for a text as it
comes, many questions at once.

Every reply is a row of a cache on disk as soon as it comes, under a hash of what was asked. A process that was killed, or
stopped by its budget, loses nothing that it paid for: started again, it reads those rows and sends the rest (at most what
was in flight is paid for twice). The endpoint's address is not in the hash: a model behind another port says the same.
"""

import asyncio
import contextlib
import dataclasses
import hashlib
import json
import os
import re
import time
import urllib.parse
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, NamedTuple, TypeVar

import openai
from pydantic import BaseModel, Field, ValidationError
from tenacity import AsyncRetrying, retry_if_exception_type, stop_before_delay, wait_random_exponential

from lwzlib.base.quantities import Count, Positive, Section
from lwzlib.base.rows import RunError, append_rows, locked, read_rows

_PATHS = {"chat": "/chat/completions", "completions": "/completions"}
_REFUSED = {400, 413, 422}  # this question alone: too long, or filtered
_PASSING = {408, 409, 425, 429, *range(500, 600)}  # worth another try
_backoff = wait_random_exponential(multiplier=1, max=60)


class LLMError(RuntimeError):
    """Answers that cannot be had; the message names the endpoint and the cause. What was answered stays in the cache."""


class _Unavailable(Exception):
    """The cause, and the seconds that the endpoint asks to wait."""


class Settings(Section):
    """Who is asked, how, and for how much."""

    base_url: Annotated[str, Field(pattern=r"^https?://([\w.-]+|\[[\da-fA-F:]+\])(:\d{1,5})?(/[^\s@]*)?$")]
    model: Annotated[str, Field(min_length=1)]
    api_key_env: str = "OPENAI_API_KEY"  # the variable that holds the key; unset for a server that wants none
    endpoint: Literal["chat", "completions"] = "chat"  # completions: a base model, which has no chat template
    sampling: dict[str, Any] = Field({})  # goes into each request: temperature, max_tokens, ...; stop, for a base model
    json_schema: bool = False  # the endpoint holds the model to the answer's schema (vLLM and some providers can)
    reasks: Count = 2  # times that an answer which is not valid is sent back with its error
    concurrency: Positive = 8  # requests at once
    requests_per_minute: Count = 0  # 0 = no limit
    timeout_s: Annotated[float, Field(gt=0)] = 300.0  # of one request
    patience_s: Annotated[float, Field(gt=0)] = 900.0  # of one reply, with all tries and waits
    usd_per_million_read: Annotated[float, Field(ge=0)] = 0.0  # tokens; the price, to tell the cost; 0 = not known
    usd_per_million_written: Annotated[float, Field(ge=0)] = 0.0
    budget_requests: Count = 0  # of one `Spent`, every try counted; 0 = no limit
    budget_tokens: Count = 0  # read and written; what is in flight when it is reached still comes


class Written(NamedTuple):
    """A reply as it came, reasoning included; what a request gets whose `answer` is `Written`."""

    text: str
    finish: str | None  # stop, length, ...: as the endpoint says
    tokens: int  # of the reply alone; 0 where the endpoint does not say


Answer = TypeVar("Answer", bound=BaseModel | Written)


class Request(NamedTuple, Generic[Answer]):
    """A question whose answer is one JSON object, valid as `answer`, or any text. Another `sample` asks the same anew."""

    prompt: str | tuple[tuple[str, str], ...]  # a plain prompt, or (role, text) of each message
    answer: type[Answer]
    sample: int = 0


class NoAnswer(str):
    """Why a question has no valid answer."""


@dataclasses.dataclass
class Spent:
    """Totals of one `ask`, or of several that share it."""

    requests: int = 0
    cached: int = 0  # replies that had been paid for before
    tokens: int = 0  # read and written
    written: int = 0  # tokens of the replies
    usd: float = 0.0  # of the tokens, at the settings' prices
    replies: int = 0
    waited_s: float = 0.0  # for all replies together
    began: float = dataclasses.field(default_factory=time.monotonic)
    said_at: float = dataclasses.field(default_factory=time.monotonic)
    next_at: float = float("-inf")  # when requests_per_minute allows another request

    def __str__(self) -> str:
        cost = f" for {self.usd:,.2f} USD" if self.usd else ""
        pace = f" ({self.waited_s / self.replies:.1f} s a reply)" if self.replies else ""
        return (f"{self.requests:,} requests, {self.cached:,} replies from the cache, {self.tokens:,} tokens{cost}, "
                f"{time.monotonic() - self.began:,.0f} s{pace}")

    def say(self, text: str, every_s: float = 10) -> None:
        """Print `text` and the totals, unless something was printed less than `every_s` seconds ago."""
        if time.monotonic() - self.said_at >= every_s:
            self.said_at = time.monotonic()
            print(f"{text}: {self}", flush=True)


def configure(**values) -> Settings:
    """Settings; an LLMError names the one that is wrong."""
    try:
        return Settings(**values)
    except ValidationError as error:
        raise LLMError(f"settings: {_problem(error)}") from None


async def ask(requests: list[Request[Answer]], settings: Settings, cache: Path, spent: Spent | None = None,
              title: str = "asked") -> list[Answer | NoAnswer]:
    """What is answered to each request, in order; one that stands there twice is sent once. Prints progress.

    Raises LLMError when the budget is spent, or the endpoint cannot be used or refuses every question, and RunError when
    the cache cannot be written or another process has it; replies in flight are waited for and kept first.
    """
    questions, spent, answers, errors = dict.fromkeys(requests), spent or Spent(), {}, []
    left = iter(questions)

    async def work(post, rows):
        for request in left:
            try:
                answers[request] = await _answer(request, settings, post, rows, cache, spent)
            except (LLMError, RunError) as error:
                errors.append(error)
            if errors:
                return
            spent.say(f"{title} {len(answers):,}/{len(questions):,}")

    with _opened(cache) as rows:
        async with _endpoint(settings, spent) as post:
            await asyncio.gather(*(work(post, rows) for _ in range(settings.concurrency)))
    spent.say(f"{title} {len(answers):,}/{len(questions):,}", every_s=0)
    if not errors and answers and all(isinstance(said, NoAnswer) and said.startswith("HTTP") for said in answers.values()):
        errors = [LLMError(f"{settings.base_url} refused every question; the first: {answers[requests[0]]}")]
    if errors:
        raise errors[0]
    return [answers[request] for request in requests]


def _read(text: str, answer: type[BaseModel]) -> BaseModel:
    """The JSON object in `text`, bare, in a code fence or amid prose. Raises ValueError, which says what is wrong."""
    start, end = text.find("{"), text.rfind("}") + 1
    if not 0 <= start < end:
        raise ValueError("it has no JSON object")
    try:
        return answer.model_validate_json(text[start:end], strict=True)
    except ValidationError as error:
        raise ValueError(_problem(error)) from None


def _problem(error: ValidationError) -> str:
    first = error.errors()[0]
    field = ".".join(map(str, first["loc"]))
    return f"{field} = {repr(first['input'])[:200]}: {first['msg']}" if field else first["msg"]


@contextlib.contextmanager
def _opened(cache: Path):
    """The rows by key. A last line that a kill cut short is cut off, so that the next row starts a line of its own."""
    cache.parent.mkdir(parents=True, exist_ok=True)
    with locked(cache.with_name(f".{cache.name}.lock")):
        if cache.exists() and not (found := cache.read_bytes()).endswith(b"\n"):
            os.truncate(cache, found.rfind(b"\n") + 1)
        yield {row["key"]: row for row in read_rows(cache)}


async def _answer(request: Request, s: Settings, post, rows: dict, cache: Path,
                  spent: Spent) -> BaseModel | Written | NoAnswer:
    turns = (("user", request.prompt),) if isinstance(request.prompt, str) else request.prompt
    messages = asked = [{"role": role, "content": text} for role, text in turns]
    sampling = s.sampling | (_held_to(request.answer) if s.json_schema and request.answer is not Written else {})
    for attempt in range(s.reasks + 1):
        content = [s.model, s.endpoint, sampling, asked, request.sample, attempt]
        key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        spent.cached += key in rows
        if key not in rows:
            reply = await post(asked, sampling)
            if isinstance(reply, NoAnswer):
                return reply
            rows[key] = {"key": key} | reply
            append_rows(cache, [rows[key]])
        if request.answer is Written:
            return Written(rows[key]["text"], rows[key]["finish"], rows[key]["written"])
        said = _after_reasoning(rows[key]["text"])
        try:
            if rows[key]["finish"] == "length":
                raise ValueError("it was cut at its limit of tokens")
            return _read(said, request.answer)
        except ValueError as error:
            problem = str(error)
        complaint = f"That answer cannot be used: {problem}. Answer again, with the JSON object alone."
        asked = [*messages, {"role": "assistant", "content": said[:4000] or "-"}, {"role": "user", "content": complaint}]
    return NoAnswer(f"{s.reasks + 1} answers, none valid; of the last, {said[:200]!r}: {problem}")


def _held_to(answer: type[BaseModel]) -> dict:
    return {"response_format": {"type": "json_schema",
                                "json_schema": {"name": "answer", "schema": answer.model_json_schema(), "strict": True}}}


@contextlib.asynccontextmanager
async def _endpoint(s: Settings, spent: Spent):
    """post(messages, sampling) -> {text, finish, tokens}, or NoAnswer where the endpoint refuses this question."""
    secret = os.environ.get(s.api_key_env, "")
    if not re.fullmatch("[!-~]*", secret):
        raise LLMError(f"{s.api_key_env} must be printable ASCII without spaces or line ends")

    def hidden(text: str) -> str:  # some servers repeat the key; a short one, such as EMPTY, is no secret
        return text.replace(secret, "***") if len(secret) >= 8 else text

    async def once(messages, sampling):
        if s.requests_per_minute:
            spent.next_at = max(time.monotonic(), spent.next_at + 60 / s.requests_per_minute)
            await asyncio.sleep(spent.next_at - time.monotonic())
        for what, most in (("requests", s.budget_requests), ("tokens", s.budget_tokens)):
            if most and (used := getattr(spent, what)) >= most:
                raise LLMError(f"the budget of {most:,} {what} is spent ({used:,} used). Every reply is kept: the same "
                               "command goes on from here, with the same budget again")
        spent.requests += 1
        asked = {"messages": messages} if s.endpoint == "chat" else {"prompt": "\n\n".join(m["content"] for m in messages)}
        body = json.dumps(sampling | {"model": s.model} | asked, ensure_ascii=False)
        body = json.loads(body.encode("utf-8", "replace"))  # a lone surrogate, which no tokenizer takes, becomes `?`
        sent_at = time.monotonic()
        try:
            async with asyncio.timeout(s.timeout_s):
                said = await client.post(_PATHS[s.endpoint], body=body, cast_to=str)
        except TimeoutError:
            raise _Unavailable(f"no reply within timeout_s = {s.timeout_s:g}", 0.0) from None
        except openai.APIConnectionError as error:
            raise _Unavailable(hidden(f"{error} {error.__cause__ or ''}"), 0.0) from None
        except openai.APIStatusError as error:
            said = f"HTTP {error.status_code} {hidden(error.response.text)[:500]}"
            if error.status_code in _REFUSED:
                return NoAnswer(said)
            if error.status_code not in _PASSING or "insufficient_quota" in said:
                raise LLMError(f"{s.base_url}: {said} (the key was taken from {s.api_key_env})") from None
            wait = error.response.headers.get("Retry-After", "")
            raise _Unavailable(said, float(wait) if re.fullmatch(r"\d{1,9}(\.\d+)?", wait) else 0.0) from None
        reply = _reply(hidden(said), s)
        spent.tokens += reply["tokens"]
        spent.written += reply["written"]
        spent.replies, spent.waited_s = spent.replies + 1, spent.waited_s + time.monotonic() - sent_at
        spent.usd += ((reply["tokens"] - reply["written"]) * s.usd_per_million_read
                      + reply["written"] * s.usd_per_million_written) / 1e6
        return reply

    async def post(messages, sampling):
        retrying = AsyncRetrying(retry=retry_if_exception_type(_Unavailable), stop=stop_before_delay(s.patience_s),
                                 wait=lambda state: state.outcome.exception().args[1] + _backoff(state), reraise=True,
                                 before_sleep=lambda state: spent.say(f"waiting: {state.outcome.exception().args[0]}"))
        try:
            return await retrying(once, messages, sampling)
        except _Unavailable as error:
            raise LLMError(f"{s.base_url}: no reply within patience_s = {s.patience_s:g}; last: {error.args[0]}") from None

    # Its own timeout bounds each read, not the whole.
    here = urllib.parse.urlsplit(s.base_url).hostname in ("127.0.0.1", "localhost", "::1")  # no proxy stands before them
    direct = openai.DefaultAsyncHttpxClient(timeout=None, trust_env=not here)
    async with openai.AsyncOpenAI(base_url=s.base_url, api_key=secret or "none", timeout=None, max_retries=0,
                                  http_client=direct) as client:
        yield post


def _after_reasoning(text: str) -> str:
    text = text.rpartition("</think>")[2].strip()
    return "" if text.startswith("<think>") else text  # reasoning that never ended


def _reply(body: str, s: Settings) -> dict:
    try:
        reply = json.loads(body)
        choice, usage = reply["choices"][0], reply.get("usage") or {}
        text = (choice["message"]["content"] if s.endpoint == "chat" else choice["text"]) or ""
        if not isinstance(text, str):
            raise TypeError
        row = {"text": text, "finish": choice.get("finish_reason"), "tokens": int(usage.get("total_tokens") or 0),
               "written": int(usage.get("completion_tokens") or 0)}
    except (ValueError, LookupError, TypeError, AttributeError):
        raise _Unavailable(f"HTTP 200 without a choice: {body[:500]}", 0.0) from None
    if s.budget_tokens and not row["tokens"]:
        raise LLMError(f"{s.base_url} does not say how many tokens it used, so budget_tokens cannot be kept: "
                       "give budget_requests instead")
    return row
