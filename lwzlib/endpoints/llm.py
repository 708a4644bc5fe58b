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
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, NamedTuple, TypeVar

import openai
from pydantic import BaseModel, Field, ValidationError
from tenacity import AsyncRetrying, retry_if_exception_type, stop_before_delay, wait_random_exponential

from lwzlib.base.quantities import Count, Positive, Section
from lwzlib.base.rows import RunError, append_rows, locked, read_rows

_REFUSED = {400, 413, 422}  # this question alone: too long, or filtered
_PASSING = {408, 409, 425, 429, *range(500, 600)}  # worth another try
_backoff = wait_random_exponential(multiplier=1, max=60)


class LLMError(RuntimeError):
    """Answers that cannot be had; the message names the endpoint and the cause. What was answered stays in the cache."""


class _Unavailable(Exception):
    """No reply, for a cause that may pass; its arguments are the cause and the seconds that the endpoint asks to wait."""


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
    """A completion as a server or an engine gave it, reasoning included; what a request gets whose `answer` is `Written`."""

    text: str
    finish: str | None  # stop, length, ...: as the endpoint says
    tokens: int  # of the reply alone; 0 where the endpoint does not say
    error: str = ""  # why there is no text


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

    def add(self, row: dict, waited_s: float, settings: Settings) -> None:
        """Count a reply (its row in the cache) that took `waited_s`."""
        self.tokens, self.written = self.tokens + row["tokens"], self.written + row["written"]
        self.replies, self.waited_s = self.replies + 1, self.waited_s + waited_s
        self.usd += ((row["tokens"] - row["written"]) * settings.usd_per_million_read
                     + row["written"] * settings.usd_per_million_written) / 1e6

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
    """Answers to the requests, in order; a request that stands there twice is sent once. Prints progress. Raises LLMError when
    the budget is spent, or the endpoint cannot be used or refuses every question, and RunError when the cache cannot be
    written or another process has it; replies in flight are waited for and kept first."""
    questions, spent, answers, errors = dict.fromkeys(requests), spent or Spent(), {}, []
    left = iter(questions)  # shared: each worker takes the next question

    async def work():
        for request in left:
            try:
                answers[request] = await _answer(request, endpoint, replies, cache)
            except (LLMError, RunError) as error:
                errors.append(error)
            if errors:
                return
            spent.say(f"{title} {len(answers):,}/{len(questions):,}")

    with kept_rows(cache) as rows:
        endpoint, replies = _Endpoint(settings, spent), {row["key"]: row for row in rows}
        async with endpoint.client:
            await asyncio.gather(*(work() for _ in range(settings.concurrency)))
    spent.say(f"{title} {len(answers):,}/{len(questions):,}", every_s=0)
    if errors:
        raise errors[0]
    if answers and all(isinstance(answer, NoAnswer) and answer.startswith("HTTP") for answer in answers.values()):
        raise LLMError(f"{settings.base_url} refused every question; the first: {answers[requests[0]]}")
    return [answers[request] for request in requests]


@contextlib.contextmanager
def kept_rows(path: Path) -> Iterator[list[dict]]:
    """Rows of a JSONL file to which this process alone adds, inside the block. A last line that a kill cut short is cut off, so
    that the next row starts a line of its own. Raises RunError if another process has the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.with_name(f".{path.name}.lock")):
        if path.exists() and not (content := path.read_bytes()).endswith(b"\n"):
            os.truncate(path, content.rfind(b"\n") + 1)
        yield read_rows(path)


async def _answer(request: Request, endpoint: "_Endpoint", replies: dict, cache: Path) -> BaseModel | Written | NoAnswer:
    """Answer to one request, from `replies` or asked and kept; one that is not valid is sent back with its error."""
    s, sampling = endpoint.settings, endpoint.settings.sampling
    if s.json_schema and request.answer is not Written:
        schema = {"name": "answer", "schema": request.answer.model_json_schema(), "strict": True}
        sampling = sampling | {"response_format": {"type": "json_schema", "json_schema": schema}}
    turns = (("user", request.prompt),) if isinstance(request.prompt, str) else request.prompt
    question = messages = [{"role": role, "content": text} for role, text in turns]
    for attempt in range(s.reasks + 1):
        sent = json.dumps([s.model, s.endpoint, sampling, messages, request.sample, attempt], sort_keys=True)
        key = hashlib.sha256(sent.encode()).hexdigest()
        endpoint.spent.cached += key in replies
        if key not in replies:
            reply = await endpoint.post(messages, sampling)
            if isinstance(reply, NoAnswer):
                return reply
            replies[key] = {"key": key} | reply
            append_rows(cache, [replies[key]])
        row = replies[key]
        if request.answer is Written:
            return Written(row["text"], row["finish"], row["written"])
        text = row["text"].rpartition("</think>")[2].strip()
        text = "" if text.startswith("<think>") else text  # reasoning that never ended
        try:
            if row["finish"] == "length":
                raise ValueError("it was cut at its limit of tokens")
            return _parsed(text, request.answer)
        except ValueError as error:
            problem = str(error)
        complaint = f"That answer cannot be used: {problem}. Answer again, with the JSON object alone."
        messages = [*question, {"role": "assistant", "content": text[:4000] or "-"}, {"role": "user", "content": complaint}]
    return NoAnswer(f"{s.reasks + 1} answers, none valid; of the last, {text[:200]!r}: {problem}")


def _parsed(text: str, answer: type[BaseModel]) -> BaseModel:
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


class _Endpoint:
    """A server, asked within the limits of the settings; what it costs is added to `spent`."""

    def __init__(self, settings: Settings, spent: Spent):
        self.settings, self.spent = settings, spent
        self._secret = os.environ.get(settings.api_key_env, "")
        if not re.fullmatch("[!-~]*", self._secret):
            raise LLMError(f"{settings.api_key_env} must be printable ASCII without spaces or line ends")
        is_local = urllib.parse.urlsplit(settings.base_url).hostname in ("127.0.0.1", "localhost", "::1")  # behind no proxy
        http = openai.DefaultAsyncHttpxClient(timeout=None, trust_env=not is_local)  # its timeout would bound each read alone
        self.client = openai.AsyncOpenAI(base_url=settings.base_url, api_key=self._secret or "none", timeout=None,
                                         max_retries=0, http_client=http)

    async def post(self, messages, sampling):
        """The reply as a row {text, finish, tokens, written}, or NoAnswer where the endpoint refuses this question."""
        s = self.settings
        retrying = AsyncRetrying(retry=retry_if_exception_type(_Unavailable), stop=stop_before_delay(s.patience_s),
                                 wait=lambda state: state.outcome.exception().args[1] + _backoff(state), reraise=True,
                                 before_sleep=lambda state: self.spent.say(f"waiting: {state.outcome.exception().args[0]}"))
        try:
            return await retrying(self._post_once, messages, sampling)
        except _Unavailable as error:
            raise LLMError(f"{s.base_url}: no reply within patience_s = {s.patience_s:g}; last: {error.args[0]}") from None

    async def _post_once(self, messages: list[dict], sampling: dict) -> dict | NoAnswer:
        s, spent = self.settings, self.spent
        if s.requests_per_minute:
            spent.next_at = max(time.monotonic(), spent.next_at + 60 / s.requests_per_minute)
            await asyncio.sleep(spent.next_at - time.monotonic())
        for unit, used, budget in (("requests", spent.requests, s.budget_requests), ("tokens", spent.tokens, s.budget_tokens)):
            if budget and used >= budget:
                raise LLMError(f"the budget of {budget:,} {unit} is spent ({used:,} used). Every reply is kept: the same "
                               "command goes on from here, with the same budget again")
        spent.requests += 1
        path, prompt = (("/chat/completions", {"messages": messages}) if s.endpoint == "chat" else
                        ("/completions", {"prompt": "\n\n".join(message["content"] for message in messages)}))
        body = json.dumps(sampling | {"model": s.model} | prompt, ensure_ascii=False)
        body = json.loads(body.encode("utf-8", "replace"))  # a lone surrogate, which no tokenizer takes, becomes `?`
        sent_at = time.monotonic()
        try:
            async with asyncio.timeout(s.timeout_s):
                reply = await self.client.post(path, body=body, cast_to=str)
        except TimeoutError:
            raise _Unavailable(f"no reply within timeout_s = {s.timeout_s:g}", 0.0) from None
        except openai.APIConnectionError as error:
            raise _Unavailable(self._without_secret(f"{error} {error.__cause__ or ''}"), 0.0) from None
        except openai.APIStatusError as error:
            return self._refused(error.response)
        row = _reply_row(self._without_secret(reply), s)
        spent.add(row, time.monotonic() - sent_at, s)
        return row

    def _refused(self, response) -> NoAnswer:
        """NoAnswer where this question alone is refused. Raises _Unavailable if it will pass, else LLMError."""
        s, status = self.settings, response.status_code
        problem = f"HTTP {status} {self._without_secret(response.text)[:500]}"
        if status in _REFUSED:
            return NoAnswer(problem)
        if status not in _PASSING or "insufficient_quota" in problem:
            raise LLMError(f"{s.base_url}: {problem} (the key was taken from {s.api_key_env})") from None
        wait_s = response.headers.get("Retry-After", "")
        raise _Unavailable(problem, float(wait_s) if re.fullmatch(r"\d{1,9}(\.\d+)?", wait_s) else 0.0) from None

    def _without_secret(self, text: str) -> str:  # some servers repeat the key; a short one, such as EMPTY, is no secret
        return text.replace(self._secret, "***") if len(self._secret) >= 8 else text


def _reply_row(body: str, s: Settings) -> dict:
    try:
        reply = json.loads(body)
        choice, usage = reply["choices"][0], reply.get("usage") or {}
        text = "" + ((choice["message"]["content"] if s.endpoint == "chat" else choice["text"]) or "")  # a text, or TypeError
        row = {"text": text, "finish": choice.get("finish_reason"), "tokens": int(usage.get("total_tokens") or 0),
               "written": int(usage.get("completion_tokens") or 0)}
    except (ValueError, LookupError, TypeError, AttributeError):
        raise _Unavailable(f"HTTP 200 without a choice: {body[:500]}", 0.0) from None
    if s.budget_tokens and not row["tokens"]:
        raise LLMError(f"{s.base_url} does not say how many tokens it used, so budget_tokens cannot be kept: "
                       "give budget_requests instead")
    return row
