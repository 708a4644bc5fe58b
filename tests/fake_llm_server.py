"""An OpenAI-compatible server without a model, for tests: `python fake_llm_server.py FOLDER`.

PUT /script says what is said: {part of a prompt: [turn, ...]}, first part that fits, one turn after the other, the last
again and again. A turn is {text, status, headers, delay_s, finish, usage, raw}; `raw` is a body as it is, and {auth} in a
text the Authorization header. Where a stream is asked for: {pieces, end}, pieces being texts or whole deltas, and `end` what
comes after them: `breaks` (the connection) or `never` (" more", again and again). Each request becomes a line of
FOLDER/requests.jsonl as it comes.
"""

import asyncio
import contextlib
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import httpx
from polling import until

from lwzlib.base.rows import read_rows

USAGE = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}


class Server:
    """The running server, seen from a test."""

    def __init__(self, folder, url):
        self.folder, self.url = folder, url

    def script(self, script):
        """Says this from now on, and forgets the requests so far."""
        httpx.put(f"{self.url}/script", json=script, trust_env=False).raise_for_status()

    @property
    def requests(self):
        return read_rows(self.folder / "requests.jsonl")  # without a line that is being written


@contextlib.contextmanager
def running(folder):
    log = folder / "log.txt"
    with log.open("w") as file:
        process = subprocess.Popen([sys.executable, __file__, folder], stderr=file)
    try:
        found = until(lambda: re.search(r"running on (http://127.0.0.1:\d+)", log.read_text()), "the server")
        yield Server(folder, f"{found[1]}/v1")
    finally:
        process.kill()
        process.wait()


def main(folder):
    import uvicorn
    from starlette.applications import Starlette
    from starlette.responses import JSONResponse, Response, StreamingResponse
    from starlette.routing import Route

    script, busy, log = {}, [], folder / "requests.jsonl"

    async def set_script(request):
        script.clear()
        busy.clear()
        script.update(await request.json())
        log.write_text("")
        return Response()

    async def streamed(turn, body):
        def event(piece, finish=None):
            said = {"text": piece} if "prompt" in body else {"delta": piece if isinstance(piece, dict) else {"content": piece}}
            return f"data: {json.dumps({'choices': [said | {'index': 0, 'finish_reason': finish}]})}\n\n"

        for piece in turn.get("pieces", [turn.get("text", "")]):
            yield event(piece)
        while turn.get("end") == "never":
            yield event(" more")
            await asyncio.sleep(0.01)
        if turn.get("end") == "breaks":
            raise ConnectionError("on purpose")
        yield event("", turn.get("finish", "stop"))
        if body.get("stream_options", {}).get("include_usage"):
            yield f"data: {json.dumps({'choices': [], 'usage': turn.get('usage', USAGE)})}\n\n"
        yield "data: [DONE]\n\n"

    async def models(request):
        return JSONResponse({"object": "list", "data": [{"id": name, "object": "model"} for name in ("m", "other")]})

    async def complete(request):
        body, auth = await request.json(), request.headers.get("Authorization", "")
        asked = body["prompt"] if "prompt" in body else "\n\n".join(message["content"] for message in body["messages"])
        turns = next((turns for part, turns in script.items() if part in asked), [{}])
        turn = turns.pop(0) if len(turns) > 1 else turns[0]
        busy.append(asked)
        with log.open("a") as file:
            file.write(json.dumps({"path": request.url.path, "auth": auth, "asked": asked, "body": body, "busy": len(busy),
                                   "at": time.monotonic()}) + "\n")
        await asyncio.sleep(turn.get("delay_s", 0))
        with contextlib.suppress(ValueError):  # forgotten by a new script
            busy.remove(asked)
        status, text = turn.get("status", 200), turn.get("text", '{"n": 1}')
        if "raw" in turn:
            return Response(turn["raw"], status, media_type="text/html")
        if status != 200:
            return JSONResponse({"error": {"message": text.replace("{auth}", auth)}}, status, turn.get("headers"))
        if body.get("stream"):
            return StreamingResponse(streamed(turn, body), media_type="text/event-stream")
        said = {"text": text} if "prompt" in body else {"message": {"role": "assistant", "content": text}}
        return JSONResponse({"choices": [said | {"index": 0, "finish_reason": turn.get("finish", "stop")}],
                             "usage": turn.get("usage", USAGE)})

    uvicorn.run(Starlette(routes=[
        Route("/v1/script", set_script, methods=["PUT"]), Route("/v1/chat/completions", complete, methods=["POST"]),
        Route("/v1/completions", complete, methods=["POST"]), Route("/v1/models", models)]), port=0, access_log=False)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
