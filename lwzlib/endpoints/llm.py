"""Ask a language model behind any OpenAI-compatible endpoint (a provider, vLLM, llama.cpp) for JSON, or for a text as it
comes, many questions at once.

Every reply is a row of a cache on disk as soon as it comes, under a hash of what was asked. A process that was killed, or
stopped by its budget, loses nothing that it paid for: started again, it reads those rows and sends the rest (at most what
was in flight is paid for twice). The endpoint's address is not in the hash: a model behind another port says the same.

A server that does not answer is waited for. A question that fails again and again while others are answered is set aside,
asked last, and reported; it keeps no other from being asked.
"""

import asyncio
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

from pydantic import BaseModel, ValidationError

from lwzlib.base.rows import RunError, append_rows, kept_rows
from lwzlib.endpoints.endpoint import Endpoint, LLMError, NoAnswer, SetAside, Settings, Spent
from lwzlib.endpoints.replies import explained, parse_json

_FIRST_REFUSED = 8  # questions, after which none of the others is asked


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


def configure(**values) -> Settings:
    """Settings; an LLMError names the one that is wrong."""
    try:
        return Settings(**values)
    except ValidationError as error:
        raise LLMError(f"settings: {explained(error)}") from None


async def ask(requests: list[Request[Answer]], settings: Settings, cache: Path, spent: Spent | None = None,
              title: str = "asked", answered: int = 0) -> list[Answer | NoAnswer]:
    """Answers to the requests, in order; a request that stands there twice is sent once. Prints progress. Raises LLMError when
    the budget is spent, or the endpoint cannot be used or refuses every question (or each of the first), and RunError when
    the cache cannot be written or another process has it; replies in flight are waited for and kept first. `answered`: how
    many other questions the endpoint has answered before."""
    questions, spent, errors = dict.fromkeys(requests), spent or Spent(), []
    answered += spent.replies + spent.cached
    answers: dict = {}
    aside: dict = {}

    async def work(left: Iterable[Request]) -> None:
        for request in left:
            try:
                answers[request] = await _answer(request, endpoint, replies, cache)
                if len(answers) == _FIRST_REFUSED and not answered and _all_refused(answers):
                    raise LLMError(f"{settings.base_url} refused each of the first {_FIRST_REFUSED} questions; the last: "
                                   f"{answers[request]}")
            except SetAside as cause:
                spent.say(f"{title}: set aside{'' if endpoint.last else ', to be asked last'}: {cause}", every_s=0)
                aside[request] = cause
            except (LLMError, RunError) as error:
                errors.append(error)
            if errors:
                return
            spent.say(f"{title} {len(answers):,}/{len(questions):,}")

    async def work_together(requests: Iterable[Request]) -> None:
        left = iter(requests)  # shared: each worker takes the next question
        await asyncio.gather(*(work(left) for _ in range(settings.concurrency)))

    with kept_rows(cache, in_order=False) as rows:
        replies = {row["key"]: row for row in rows}
        endpoint = Endpoint(settings, spent, len(questions) + answered == 1, answered)
        async with endpoint.client:
            await work_together(questions)
            last, aside, endpoint.last = aside, {}, True
            await work_together(() if errors else last)
    answers |= {request: NoAnswer(f"{cause} (again and again, while others were answered)") for request, cause in aside.items()}
    spent.say(f"{title} {len(answers):,}/{len(questions):,}", every_s=0)
    if errors:
        raise errors[0]
    if not answered and _all_refused(answers):
        raise LLMError(f"{settings.base_url} refused every question; the first: {answers[requests[0]]}")
    return [answers[request] for request in requests]


async def check(settings: Settings) -> None:
    """Raise LLMError as `Endpoint.check` does; asks for the list of models, which costs nothing."""
    endpoint = Endpoint(settings, Spent(), alone=True)
    async with endpoint.client:
        await endpoint.check()


def _all_refused(answers: dict) -> bool:
    return bool(answers) and all(isinstance(answer, NoAnswer) and answer.startswith("HTTP") for answer in answers.values())


async def _answer(request: Request, endpoint: "Endpoint", replies: dict, cache: Path) -> BaseModel | Written | NoAnswer:
    """Answer to one request, from `replies` or asked and kept; one that is not valid is sent back with its error."""
    s, wanted = endpoint.settings, endpoint.settings.sampling
    sampling = {name: value for name, value in wanted.items() if value is not None}
    if s.json_schema and request.answer is not Written:
        schema = {"name": "answer", "schema": request.answer.model_json_schema(), "strict": True}
        sampling = sampling | {"response_format": {"type": "json_schema", "json_schema": schema}}
    turns = (("user", request.prompt),) if isinstance(request.prompt, str) else request.prompt
    question = messages = [{"role": role, "content": text} for role, text in turns]
    for attempt in range(s.reasks + 1):
        sent = json.dumps([s.model, s.endpoint, sampling, messages, request.sample, attempt], sort_keys=True)
        key = hashlib.sha256(sent.encode()).hexdigest()
        endpoint.spent.cached += key in replies
        endpoint.answered += key in replies
        if key not in replies:
            reply = await endpoint.post(messages, sampling)
            if isinstance(reply, NoAnswer):
                return reply
            if reply.error and request.answer is Written and reply.finish != "length":  # else a plan that never ended
                return NoAnswer(reply.error)
            replies[key] = {"key": key} | reply._asdict()
            append_rows(cache, [replies[key]])
        row = replies[key]
        if request.answer is Written:
            return Written(row["text"], row["finish"], row["written"])
        text = row["text"].strip()
        try:
            return parse_json(text, request.answer, at_the_end=row["finish"] == "length")
        except ValueError as error:
            problem = row.get("error") or ("it was cut at its limit of tokens" if row["finish"] == "length" else str(error))
        complaint = f"That answer cannot be used: {problem}. Answer again, with the JSON object alone."
        messages = [*question, {"role": "assistant", "content": text[-4000:] or "-"}, {"role": "user", "content": complaint}]
    return NoAnswer(f"{s.reasks + 1} answers, none valid; of the last, {text[-200:]!r}: {problem}")
