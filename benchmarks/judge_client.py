"""The judge client against a server that answers each request after 1 s: the share of what 256 requests at once could do.

`llm.ask` keeps each reply on disk, validates it and retries. The peer does none of this: `openai.AsyncOpenAI` alone, behind a
semaphore. Both ask the same server, in a process of its own, in turns. Ideal: requests / concurrency x 1 s.

    python benchmarks/judge_client.py [--requests 2560] [--rounds 3]
"""

import argparse
import asyncio
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import openai
from pydantic import BaseModel

from lwzlib.base.provenance import hardware
from lwzlib.endpoints import llm

HERE = Path(__file__).resolve().parent
CONCURRENCY, LATENCY_S = 256, 1.0
SERVER = f"""
import asyncio, json, uvicorn
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Route
BODY = json.dumps({{"id": "1", "object": "chat.completion", "created": 0, "model": "m",
                   "choices": [{{"index": 0, "finish_reason": "stop", "message": {{
                       "role": "assistant", "content": json.dumps({{"score": 7, "reason": "x" * 200}})}}}}],
                   "usage": {{"prompt_tokens": 900, "completion_tokens": 60, "total_tokens": 960}}}})
async def complete(request):
    await request.body()
    await asyncio.sleep({LATENCY_S})
    return Response(BODY, media_type="application/json")
uvicorn.run(Starlette(routes=[Route("/v1/chat/completions", complete, methods=["POST"])]), port=0, access_log=False)
"""


class Judgment(BaseModel):
    score: int
    reason: str


def prompts(count: int) -> list[str]:
    return [f"Judgment {i}: " + "a text to be judged, word by word. " * 100 for i in range(count)]


async def kit(url: str, count: int, folder: Path) -> None:
    settings = llm.configure(base_url=url, model="m", concurrency=CONCURRENCY)
    asked = [llm.Request(prompt, Judgment) for prompt in prompts(count)]
    answers = await llm.ask(asked, settings, folder / f"{time.monotonic_ns()}.jsonl")
    assert all(isinstance(answer, Judgment) for answer in answers)


async def peer(url: str, count: int) -> None:
    gate = asyncio.Semaphore(CONCURRENCY)
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
        async def one(prompt):
            async with gate:
                reply = await client.chat.completions.create(model="m", messages=[{"role": "user", "content": prompt}])
            return Judgment.model_validate_json(reply.choices[0].message.content)

        await asyncio.gather(*map(one, prompts(count)))


def timed(coroutine) -> float:
    began = time.perf_counter()
    asyncio.run(coroutine)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=2560)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "log").open("w+") as log:
        server = subprocess.Popen([sys.executable, "-c", SERVER], stderr=log)
        try:
            while "running on" not in (said := (Path(folder) / "log").read_text()):
                assert server.poll() is None, said
                time.sleep(0.05)
            url = said.partition("running on ")[2].split()[0] + "/v1"
            taken = {"kit": [], "peer": []}
            for _ in range(asked.rounds):
                taken["kit"].append(timed(kit(url, asked.requests, Path(folder))))
                taken["peer"].append(timed(peer(url, asked.requests)))
        finally:
            server.kill()
            server.wait()
    ideal = asked.requests / CONCURRENCY * LATENCY_S
    rows = [f"| {name} | {statistics.median(seconds):.1f} | {ideal / statistics.median(seconds):.1%} | "
            f"{min(seconds):.1f} to {max(seconds):.1f} |" for name, seconds in
            (("`llm.ask`: kept, validated, retried", taken["kit"]), ("`openai` behind a semaphore", taken["peer"]))]
    ratio = statistics.median(taken["peer"]) / statistics.median(taken["kit"])
    text = "\n".join([
        "# Judge client", "", f"{asked.requests:,} requests, {CONCURRENCY} at once, {LATENCY_S:g} s each: ideal {ideal:.1f} s. "
        f"Median of {asked.rounds} rounds, in turns. {hardware()}.", "",
        "| client | seconds | share of the ideal | range |", "|---|--:|--:|---|", *rows, "",
        f"The kit's throughput is {ratio:.2f} times the peer's.", "",
        "    python benchmarks/judge_client.py", ""])
    (HERE / "judge_client.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
