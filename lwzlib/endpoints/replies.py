"""What a language model's reply holds: its text, wherever the endpoint puts it, and the JSON object in a text."""

import json
from collections.abc import Iterator
from typing import NamedTuple, TypeVar

from pydantic import BaseModel, BeforeValidator, ValidationError

Answer = TypeVar("Answer", bound=BaseModel)
_FIELD = {"chat": "content", "completions": "text"}
_ELSEWHERE = ("reasoning_content", "reasoning", "tool_calls", "function_call", "refusal")  # of a message without content


class NotAReply(ValueError):
    """A body that has no choice, such as an error object or a page to log in."""


class Reply(NamedTuple):
    """A reply as an endpoint gave it. Counts are 0 where the endpoint does not say."""

    text: str
    finish: str | None  # stop, length, ...: as the endpoint says
    tokens: int  # read and written
    written: int  # tokens of the reply alone
    error: str = ""  # why there is no text


def body_of(text: str) -> dict:
    """The JSON object that a server sent; {} for anything else."""
    try:
        return _mapping(json.loads(text))
    except (ValueError, RecursionError):
        return {}


def token_counts(body: dict) -> tuple[int, int]:
    """(tokens read and written, tokens written) that a body states, also one that is no reply: they were paid for."""
    usage = _mapping(body.get("usage"))
    total, written = usage.get("total_tokens"), usage.get("completion_tokens")
    return (total if isinstance(total, int) else 0), (written if isinstance(written, int) else 0)


def read_reply(body: dict, endpoint: str) -> Reply:
    """The first choice of a body of the `endpoint` chat or completions. Raises NotAReply without one."""
    choices = body.get("choices")
    choice = _mapping(choices[0] if isinstance(choices, list) and choices else None)
    message = choice if endpoint == "completions" else _mapping(choice.get("message"))
    if not message:
        raise NotAReply("HTTP 200 without a choice")
    text, error = _text(message, _FIELD[endpoint])
    return Reply(text, choice.get("finish_reason"), *token_counts(body), error)


class Chunk(NamedTuple):
    """A piece of a reply that is streamed: text, and what the server has parted from it as the model's reasoning."""

    text: str
    reasoning: str
    finish: str | None  # in the last one with text, or after it


def read_chunk(body: dict, endpoint: str) -> Chunk:
    """The first choice of a streamed body; empty for one without any, such as the last, which has the token counts."""
    choices = body.get("choices")
    choice = _mapping(choices[0] if isinstance(choices, list) and choices else None)
    delta = choice if endpoint == "completions" else _mapping(choice.get("delta"))
    text, reasoning = delta.get(_FIELD[endpoint]), delta.get("reasoning_content") or delta.get("reasoning")
    return Chunk(text if isinstance(text, str) else "", reasoning if isinstance(reasoning, str) else "",
                 choice.get("finish_reason"))


def _mapping(value) -> dict:
    return value if isinstance(value, dict) else {}


def _text(message: dict, field: str) -> tuple[str, str]:
    """(text, "") of a field that is a text or a list of parts, or ("", why there is none)."""
    content = message.get(field)
    parts = content if isinstance(content, list) else [content]
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    text = "".join(part for part in texts if isinstance(part, str))
    others = [name for name in _ELSEWHERE if message.get(name)]
    if text or (content == "" and not others):
        return text, ""
    where = f"; what came stands in {others[0]}: {str(message[others[0]])[:200]}" if others else ""
    return "", f"HTTP 200, but the reply's {field} is {json.dumps(content)[:200]}{where}"


def parse_json(text: str, answer: type[Answer], at_the_end: bool = False) -> Answer:
    """The last JSON object in a text that is valid as `answer`: bare, in a code fence, amid prose, or after a plan; only one
    that ends the text where it must stand `at_the_end`. Raises ValueError, which says what is wrong."""
    objects, plan_end, previous = list(_objects(text)), 0, 0
    for start, end in [*objects, (len(text), len(text))]:  # a closing tag inside an object is none
        plan_end, previous = max(plan_end, text.rfind("</think>", previous, start)), end
    plan_never_ends = text.lstrip().startswith("<think>") and not plan_end
    error = "it has no JSON object"
    for start, end in reversed([] if plan_never_ends else objects):
        if start >= plan_end and not (at_the_end and text[end:].strip("` \n")):
            try:
                return answer.model_validate_json(text[start:end], strict=True)
            except ValidationError as problem:
                error = explained(problem)
    raise ValueError(error)


def _objects(text: str) -> Iterator[tuple[int, int]]:
    """(start, end) of the JSON objects in a text, in order; none lies in another."""
    decoder, start = json.JSONDecoder(), text.find("{")
    while start >= 0:
        try:
            end = decoder.raw_decode(text, start)[1]
            yield start, end
        except (ValueError, RecursionError):
            end = start + 1
        start = text.find("{", end)


def explained(error: ValidationError) -> str:
    """The first problem, with its field and value."""
    first = error.errors()[0]
    field = ".".join(map(str, first["loc"]))
    return f"{field} = {repr(first['input'])[:200]}: {first['msg']}" if field else first["msg"]


def _whole(value):
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = BeforeValidator(_whole)  # of an integer: models write 8.0, and the benchmarks' own scripts take it
