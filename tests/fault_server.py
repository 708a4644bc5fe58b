"""A judge that fails on purpose: an OpenAI-compatible server in which a share of the requests meets 429, 500, silence, a body
that breaks off, text that is no JSON, or a score out of range. `python fault_server.py FOLDER SHARE PORT`; which request meets
what follows from what it asks and how often that was asked, its score and its winner from what it asks alone. It lists one
model, `fault`, and takes any. FOLDER/log.jsonl has a line for each request: what was asked (a hash), its attempt, its end."""

import asyncio
import contextlib
import hashlib
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

from polling import until

KINDS = ("429", "500", "silence", "cut body", "no JSON", "out of range")
PAID = ("no JSON", "out of range", "answered")  # ends of a request that came back as a reply
USAGE = {"prompt_tokens": 90, "completion_tokens": 10, "total_tokens": 100}


@contextlib.contextmanager
def running(folder: Path, share: float, port: int = 0):
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "stderr.txt"
    with log.open("w") as file:
        process = subprocess.Popen([sys.executable, __file__, folder, str(share), str(port)], stderr=file)
    try:
        yield until(lambda: re.search(r"running on (http://127.0.0.1:\d+)", log.read_text()), "the server", 90)[1] + "/v1"
    finally:
        process.kill()
        process.wait()


def fate(asked: str, attempt: int, time: int, share: float) -> str:
    drawn = int.from_bytes(hashlib.sha256(f"{asked} {attempt} {time}".encode()).digest()[:8], "big") / 2**64
    return KINDS[int(drawn / share * len(KINDS))] if drawn < share else "answered"


def main(folder: Path, share: float, port: int):
    import uvicorn
    from starlette.applications import Starlette
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route

    times, log = Counter(), (folder / "log.jsonl").open("a", buffering=1)

    async def complete(request):
        messages = (await request.json())["messages"]
        asked = hashlib.sha256(messages[0]["content"].encode()).hexdigest()[:16]
        attempt = len(messages) // 2
        times[asked, attempt] += 1
        end = fate(asked, attempt, times[asked, attempt], share)
        log.write(json.dumps({"asked": asked, "attempt": attempt, "end": end}) + "\n")
        if end in ("429", "500"):
            return JSONResponse({"error": {"message": end}}, int(end), {"Retry-After": "0.01"})
        if end == "silence":
            await asyncio.sleep(3600)
        score = 11 if end == "out of range" else int(asked, 16) % 10 + 1
        text = "Seven, I think." if end == "no JSON" else json.dumps(
            {"score": score, "reason": "because", "winner": ("A", "B", "tie")[int(asked, 16) % 3]})
        message = {"role": "assistant", "content": text}
        body = json.dumps({"choices": [{"index": 0, "finish_reason": "stop", "message": message}], "usage": USAGE})
        whole = {"Content-Length": str(len(body))}
        return Response(body[: len(body) // 2] if end == "cut body" else body, 200, whole, "application/json")

    async def models(request):
        return JSONResponse({"object": "list", "data": [{"id": "fault", "object": "model"}]})

    uvicorn.run(Starlette(routes=[Route("/v1/chat/completions", complete, methods=["POST"]), Route("/v1/models", models)]),
                port=port, access_log=False)


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]))
