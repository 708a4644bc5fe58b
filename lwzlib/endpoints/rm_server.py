"""HTTP scoring: one process holds the Writing RM, and trainers ask it for scores (`rm_client`).

One worker takes queued texts in order, whichever requests they came in, and scores them in batches. The queue is bounded:
a request that does not fit is told to come again. No answer holds a score that the scorer did not give for that text.
"""

import asyncio
import contextlib
import hmac
import itertools
import logging
import math
import reprlib
from collections.abc import Callable
from dataclasses import dataclass

import uvicorn
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from lwzlib.method.writing_rm import token

log = logging.getLogger(__name__)
Texts = list[tuple[str, str]]  # (prompt, answer)
_COME_AGAIN = {"Retry-After": "1"}


class _Text(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    prompt: str
    answer: str


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    texts: list[_Text] = Field(min_length=1)


@dataclass(eq=False)
class _Item:
    text: tuple[str, str]
    name: str  # its place in the request, such as texts.3
    request: Request
    outcome: asyncio.Future  # a score or an HTTPException; cancelled when nobody waits for it any more


def app(score: Callable[[Texts], list[float]], max_tokens: int, count_tokens: Callable[[Texts], list[int]], batch_texts: int,
        queue_texts: int, identity: str, max_body_bytes: int = 32 << 20) -> Starlette:
    """The ASGI application: GET /health, POST /score. `$LWZ_RM_TOKEN`, if it is set now, is what /score asks for.

    `count_tokens` and then `score` get up to `batch_texts` texts, one call at a time, in a thread that is not the main one.
    """
    secret, queue = token(), asyncio.Queue()

    def judge(batch: list[_Item]) -> list[float | HTTPException]:
        try:
            counts = count_tokens([item.text for item in batch])
            fitting = [item.text for item, count in zip(batch, counts, strict=True) if count <= max_tokens]
            scores = [float(value) for value in score(fitting)] if fitting else []
            if len(scores) != len(fitting) or not all(map(math.isfinite, scores)):
                raise ValueError(f"{len(fitting)} texts, scores {reprlib.repr(scores)}; each needs one finite number")
        except Exception as error:
            groups = [list(items) for _, items in itertools.groupby(batch, key=lambda item: item.request)]
            if len(groups) > 1:  # a text that breaks the scorer must not fail requests that only shared its batch
                return [outcome for group in groups for outcome in judge(group)]
            log.exception("the scorer failed")
            return [HTTPException(500, f"the scorer failed: {type(error).__name__}: {error}") for _ in batch]
        left = iter(scores)
        return [next(left) if count <= max_tokens else
                HTTPException(413, f"{item.name} has {count} tokens; the limit is {max_tokens}")
                for item, count in zip(batch, counts, strict=True)]

    async def work() -> None:
        while True:
            batch = []
            while not batch or (len(batch) < batch_texts and not queue.empty()):
                if not (item := await queue.get()).outcome.done():
                    batch.append(item)
            for item, outcome in zip(batch, await asyncio.to_thread(judge, batch), strict=True):
                if not item.outcome.done():
                    item.outcome.set_result(outcome)

    async def scores_of(texts: list[_Text], request: Request) -> list[float]:
        if len(texts) > queue_texts:
            raise HTTPException(400, f"texts has {len(texts)} entries; at most {queue_texts} in one request")
        if queue.qsize() + len(texts) > queue_texts:
            raise HTTPException(503, f"the queue is full: {queue.qsize()} of {queue_texts} texts", _COME_AGAIN)
        outcomes = [asyncio.get_running_loop().create_future() for _ in texts]
        for i, (text, outcome) in enumerate(zip(texts, outcomes, strict=True)):
            queue.put_nowait(_Item((text.prompt, text.answer), f"texts.{i}", request, outcome))
        gone = asyncio.create_task(_disconnect(request))
        try:
            for outcome in outcomes:
                await asyncio.wait({outcome, gone}, return_when=asyncio.FIRST_COMPLETED)
                if not outcome.done():
                    raise ClientDisconnect
                if isinstance(outcome.result(), HTTPException):
                    raise outcome.result()
            return [outcome.result() for outcome in outcomes]
        finally:
            for waiting in (*outcomes, gone):
                waiting.cancel()

    async def answer(request: Request) -> Response:
        if secret and not hmac.compare_digest(request.headers.get("Authorization", "").encode(), f"Bearer {secret}".encode()):
            raise HTTPException(401, "this server asks for its LWZ_RM_TOKEN", {"WWW-Authenticate": "Bearer"})
        try:
            texts = _parse(await _read(request, max_body_bytes))
            return JSONResponse({"scores": await scores_of(texts, request), "model": identity})
        except ClientDisconnect:
            return Response(status_code=499)  # nobody reads it
        except asyncio.CancelledError:  # uvicorn would answer 500, which clients do not try again
            raise HTTPException(503, "the server is shutting down", _COME_AGAIN) from None

    async def health(_: Request) -> Response:
        return JSONResponse({"status": "ok", "model": identity, "max_tokens": max_tokens, "queued_texts": queue.qsize()})

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette):
        worker = asyncio.create_task(work())
        yield
        worker.cancel()

    return Starlette(routes=[Route("/health", health), Route("/score", answer, methods=["POST"])], lifespan=lifespan,
                     exception_handlers={HTTPException: _error})  # type: ignore[dict-item]  # its hint wants any Exception


def serve(application: Starlette, host: str = "127.0.0.1", port: int = 8017, grace_s: float = 5) -> None:
    """Serve until SIGTERM or Ctrl-C; requests then get `grace_s` seconds, and those left are told to come again.

    The process ends when the batch that is being scored is done. Port 0 takes a free one, which the log names.
    """
    if host not in ("127.0.0.1", "::1", "localhost") and not token():
        log.warning("listening on %s WITHOUT AUTHENTICATION: whoever reaches it can use it; set LWZ_RM_TOKEN", host)
    uvicorn.run(application, host=host, port=port, lifespan="on", access_log=False,
                timeout_graceful_shutdown=grace_s)  # type: ignore[arg-type]  # it waits for half a second too


async def _read(request: Request, limit: int) -> bytes:
    body, declared = bytearray(), int(request.headers.get("Content-Length", 0))
    async for chunk in request.stream():
        body += chunk
        if max(declared, len(body)) > limit:
            raise HTTPException(413, f"the body has more than {limit} bytes; send fewer texts in a request")
    return bytes(body)


def _parse(body: bytes) -> list[_Text]:
    try:
        return _Body.model_validate_json(body).texts
    except ValidationError as error:
        names = [(".".join(map(str, p["loc"])), p) for p in error.errors()[:3]]
        raise HTTPException(400, "; ".join(f"{name} = {reprlib.repr(p['input'])}: {p['msg']}" if name else
                                           f"body = {body[:60]!r}: {p['msg']}" for name, p in names)) from None


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _error(_: Request, error: HTTPException) -> Response:
    return JSONResponse({"error": error.detail}, error.status_code, error.headers)
