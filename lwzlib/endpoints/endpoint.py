"""An OpenAI-compatible server, asked within limits: of time, of requests at once and a minute, of a budget."""

import asyncio
import contextlib
import dataclasses
import json
import os
import re
import time
import urllib.parse
from collections.abc import Generator
from typing import Annotated, Any, Literal

import openai
from pydantic import Field
from tenacity import AsyncRetrying, retry_if_exception_type, stop_any, stop_before_delay, wait_random_exponential

from lwzlib.base.quantities import Count, Positive, Section
from lwzlib.endpoints.replies import NotAReply, Reply, body_of, read_reply, token_counts

_REFUSED = {400, 413, 422}  # this question alone: too long, or filtered
_PASSING = {408, 409, 425, 429, *range(500, 600)}  # worth another try
_ITS_OWN = {*range(500, 600)} - {502, 503, 504}  # may be a question's own fault; these three are a server's that is not there
_TRIES = 3  # of a question, before it is set aside
_MOST_ASIDE = 3  # questions set aside in a row; if the next fails too, it is the server's fault, and is waited for
_CONNECT_S = 10.0
_backoff = wait_random_exponential(multiplier=1, max=60)


class LLMError(RuntimeError):
    """Answers that cannot be had; the message names the endpoint and the cause. What was answered stays in the cache."""


class NoAnswer(str):
    """Why a question has no valid answer."""


class _Unavailable(Exception):
    """No reply, for a cause that may pass. `own`: the question may be the cause; `wait_s`: as long as the endpoint asks."""

    def __init__(self, cause: str, own: bool, wait_s: float = 0.0):
        super().__init__(cause)
        self.own, self.wait_s = own, wait_s


class SetAside(Exception):
    """A question that fails while others are answered; the message is the cause."""


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
    use_proxy: bool = True  # that of the environment, if it names one; never for a server of this machine
    timeout_s: Annotated[float, Field(gt=0)] = 300.0  # of one request
    patience_s: Annotated[float, Field(gt=0)] = 900.0  # of one reply, with all tries and waits
    usd_per_million_read: Annotated[float, Field(ge=0)] = 0.0  # tokens; the price, to tell the cost; 0 = not known
    usd_per_million_written: Annotated[float, Field(ge=0)] = 0.0
    budget_requests: Count = 0  # of one `Spent`, every try counted; 0 = no limit
    budget_tokens: Count = 0  # read and written; what is in flight when it is reached still comes


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

    def add(self, tokens: int, written: int, waited_s: float, settings: Settings) -> None:
        """Count a reply of so many tokens, read and `written`, that took `waited_s`."""
        self.tokens, self.written = self.tokens + tokens, self.written + written
        self.replies, self.waited_s = self.replies + 1, self.waited_s + waited_s
        self.usd += ((tokens - written) * settings.usd_per_million_read + written * settings.usd_per_million_written) / 1e6

    def say(self, text: str, every_s: float = 10) -> None:
        """Print `text` and the totals, unless something was printed less than `every_s` seconds ago."""
        if time.monotonic() - self.said_at >= every_s:
            self.said_at = time.monotonic()
            print(f"{text}: {self}", flush=True)


class Endpoint:
    """A server, asked within the limits of the settings; what it costs is added to `spent`. `alone`: there is one question;
    `last`: those that were set aside are asked now."""

    def __init__(self, settings: Settings, spent: Spent, alone: bool, answered: int = 0):
        self.settings, self.spent, self.alone, self.last = settings, spent, alone, False
        self.answered, self.aside_in_a_row = answered, 0
        self._secret = os.environ.get(settings.api_key_env, "")
        if not re.fullmatch("[!-~]*", self._secret):
            raise LLMError(f"{settings.api_key_env} must be printable ASCII without spaces or line ends")
        is_local = urllib.parse.urlsplit(settings.base_url).hostname in ("127.0.0.1", "localhost", "::1")
        self._trust_env = settings.use_proxy and not is_local
        http = openai.DefaultAsyncHttpxClient(timeout=None, trust_env=self._trust_env)  # its own would bound each read alone
        self.client = openai.AsyncOpenAI(base_url=settings.base_url, api_key=self._secret or "none", timeout=None,
                                         max_retries=0, http_client=http)

    async def post(self, messages, sampling):
        """The reply, or NoAnswer where the endpoint refuses this question. Raises SetAside, LLMError."""
        s = self.settings
        retrying = AsyncRetrying(retry=retry_if_exception_type(_Unavailable), reraise=True,
                                 stop=stop_any(self._to_be_set_aside, stop_before_delay(s.patience_s)),
                                 wait=lambda state: state.outcome.exception().wait_s + _backoff(state),
                                 before_sleep=lambda state: self.spent.say(f"waiting: {state.outcome.exception()}"))
        try:
            reply = await retrying(self._post_once, messages, sampling)
        except _Unavailable as error:
            if error.own and self._works():
                self.aside_in_a_row += 1
                raise SetAside(str(error)) from None
            raise LLMError(f"{s.base_url}: no reply within patience_s = {s.patience_s:g}; last: {error}") from None
        self.answered, self.aside_in_a_row = self.answered + isinstance(reply, Reply), 0
        return reply

    def _works(self) -> bool:
        """Whether the server answers others (in the last pass), or has not just failed one question after another."""
        return self.answered > 0 if self.last else not self.alone and self.aside_in_a_row < _MOST_ASIDE

    def _to_be_set_aside(self, state) -> bool:
        return state.attempt_number >= _TRIES and state.outcome.exception().own and self._works()

    async def _post_once(self, messages: list[dict], sampling: dict) -> Reply | NoAnswer:
        s, spent = self.settings, self.spent
        if s.requests_per_minute:
            spent.next_at = max(time.monotonic(), spent.next_at + 60 / s.requests_per_minute)
            await asyncio.sleep(spent.next_at - time.monotonic())
        for unit, used, budget in (("requests", spent.requests, s.budget_requests), ("tokens", spent.tokens, s.budget_tokens)):
            if budget and used >= budget:
                raise LLMError(f"the budget of {budget:,} {unit} is spent ({used:,} used). Every reply is kept: the same "
                               "command goes on from here, with the same budget again")
        spent.requests += 1
        path, request = self._request(messages, sampling)
        sent_at = time.monotonic()
        try:
            async with self._in_time():
                sent_back = await self.client.post(path, body=request, cast_to=str)
        except openai.APIStatusError as error:
            return self._refused(error.response)
        text = self._without_secret(sent_back)
        body = body_of(text)
        tokens, written = token_counts(body)
        spent.add(tokens, written, time.monotonic() - sent_at, s)
        try:
            reply = read_reply(body, s.endpoint)
        except NotAReply as error:
            raise _Unavailable(f"{error}: {text[:500]}", own=True) from None
        if s.budget_tokens and not tokens:
            raise LLMError(f"{s.base_url} does not say how many tokens it used, so budget_tokens cannot be kept: "
                           "give budget_requests instead")
        return reply

    def _request(self, messages: list[dict], sampling: dict) -> tuple[str, dict]:
        """(path, body) of a request."""
        path, prompt = (("/chat/completions", {"messages": messages}) if self.settings.endpoint == "chat" else
                        ("/completions", {"prompt": "\n\n".join(message["content"] for message in messages)}))
        request = json.dumps(sampling | {"model": self.settings.model} | prompt, ensure_ascii=False)
        return path, json.loads(request.encode("utf-8", "replace"))  # a lone surrogate, which no tokenizer takes, becomes `?`

    def stream(self, messages: list[dict], sampling: dict) -> Generator[dict]:
        """Bodies of the chunks of one reply as they come. It is asked for once, since a person waits for it; `timeout_s` holds
        for each chunk. Raises LLMError."""
        s, began = self.settings, False
        path, request = self._request(messages, sampling | {"stream": True})
        with openai.OpenAI(base_url=s.base_url, api_key=self._secret or "none", max_retries=0,
                           timeout=openai.Timeout(s.timeout_s, connect=min(s.timeout_s, _CONNECT_S)),
                           http_client=openai.DefaultHttpxClient(trust_env=self._trust_env)) as client:
            try:
                with client.post(path, body=request, cast_to=object, stream=True, stream_cls=openai.Stream[object]) as chunks:
                    for chunk in chunks:
                        began = True
                        yield chunk if isinstance(chunk, dict) else {}
            except openai.APIStatusError as error:
                hint = f" (the key was taken from {s.api_key_env})" if error.status_code in (401, 403) else ""
                hint = self._models_there(client) if error.status_code == 404 else hint
                raise LLMError(f"{s.base_url}: HTTP {error.status_code} {self._without_secret(error.response.text)[:500]}{hint}"
                               ) from None
            except (openai.APIError, json.JSONDecodeError) as error:
                problem = "the reply broke off" if began else "no reply"
                raise LLMError(self._without_secret(f"{s.base_url}: {problem}: {error} {error.__cause__ or ''}")) from None

    def _models_there(self, client: openai.OpenAI) -> str:
        """End of an error that says which models a server has that does not know the one of the settings."""
        try:
            names = [model.id for model in client.models.list(timeout=_CONNECT_S)]
        except (openai.APIError, AttributeError, TypeError, ValueError):  # a web page, say
            return "; does the address lack a /v1 at its end?"
        return "" if self.settings.model in names else f"; it has {', '.join(names)}"

    @contextlib.asynccontextmanager
    async def _in_time(self):
        """Raise _Unavailable for a request that gets no response, or none in time."""
        try:
            async with asyncio.timeout(self.settings.timeout_s):
                yield
        except TimeoutError:
            raise _Unavailable(f"no reply within timeout_s = {self.settings.timeout_s:g}", own=True) from None
        except openai.APIConnectionError as error:
            raise _Unavailable(self._without_secret(f"{error} {error.__cause__ or ''}"), own=False) from None

    async def check(self) -> None:
        """Raise LLMError unless the server answers within `patience_s`, takes the key, and has the model in its list of models.
        A server without such a list passes."""
        s = self.settings
        retrying = AsyncRetrying(retry=retry_if_exception_type(_Unavailable), reraise=True, wait=_backoff,
                                 stop=stop_before_delay(s.patience_s),
                                 before_sleep=lambda state: print(f"waiting for {s.base_url}", flush=True))
        try:
            names = await retrying(self._models)
        except _Unavailable as error:
            raise LLMError(f"{s.base_url}: no reply within patience_s = {s.patience_s:g}; last: {error}") from None
        if names and not any(f"/{name}".endswith(f"/{s.model}") for name in names):  # some list `models/<name>`
            raise LLMError(f"{s.base_url} has no model {s.model!r}; it has {', '.join(names[:10])}")

    async def _models(self) -> list[str]:
        try:
            async with self._in_time():
                body = body_of(await self.client.get("/models", cast_to=str))
        except openai.APIStatusError as error:
            if error.response.status_code not in (404, 405, 501):
                self._refused(error.response)
            return []
        listed = body.get("data")
        return [str(row["id"]) for row in (listed if isinstance(listed, list) else []) if isinstance(row, dict) and "id" in row]

    def _refused(self, response) -> NoAnswer:
        """NoAnswer where this question alone is refused. Raises _Unavailable if it will pass, else LLMError."""
        s, status = self.settings, response.status_code
        problem = f"HTTP {status} {self._without_secret(response.text)[:500]}"
        if status in _REFUSED:
            return NoAnswer(problem)
        if status not in _PASSING or "insufficient_quota" in problem:
            raise LLMError(f"{s.base_url}: {problem} (the key was taken from {s.api_key_env})") from None
        wait_s = response.headers.get("Retry-After", "")
        wait_s = float(wait_s) if re.fullmatch(r"\d{1,9}(\.\d+)?", wait_s) else 0.0
        raise _Unavailable(problem, status in _ITS_OWN, wait_s) from None

    def _without_secret(self, text: str) -> str:  # some servers repeat the key; a short one, such as EMPTY, is no secret
        return text.replace(self._secret, "***") if len(self._secret) >= 8 else text
