"""2,000 judgments by a server that fails in 30% of the requests, and a judge process that is killed twice on the way."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import textwrap
from collections import Counter

import fault_server
from polling import until

from lwzlib.base.rows import read_rows, write_rows
from lwzlib.endpoints import endpoint, llm
from lwzlib.evaluate import writingbench
from lwzlib.evaluate.writingbench import judge_responses

QUERIES, CONCURRENCY = 400, 64
JUDGE = textwrap.dedent("""
    import asyncio, pathlib, sys
    from lwzlib.endpoints import endpoint
    from test_faults import judged
    endpoint._backoff = lambda _: 0.01
    asyncio.run(judged(*sys.argv[1:]))
""")


def judged(url, bench, out):
    from pathlib import Path

    bench = writingbench.read_benchmark(bench)
    settings = llm.configure(base_url=url, model="m", concurrency=CONCURRENCY, timeout_s=6.0, patience_s=120.0)
    answers = {index: f"Answer {index}." for index in bench}
    return judge_responses(settings, bench, answers, Path(out))


def bench_of(folder):
    path = folder / "bench.jsonl"
    write_rows(path, [{"index": i, "domain1": "D", "domain2": "d", "query": f"Write of {i}.", "checklist": [
        {"name": f"criterion {n}", "criteria_description": "Is it good?"} | {f"{2 * k + 1}-{2 * k + 2}": "so" for k in range(5)}
        for n in range(5)]} for i in range(QUERIES)])
    return path


def replies(path):
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []


def test_every_judgment_ends_once_and_nothing_that_was_answered_is_asked_again(tmp_path, monkeypatch):
    monkeypatch.setattr(endpoint, "_backoff", lambda _: 0.01)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    bench, out = bench_of(tmp_path), tmp_path / "scores.jsonl"
    cache = tmp_path / "scores.replies.jsonl"
    path = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    with fault_server.running(tmp_path / "server", 0.3) as url:
        for enough in (600, 1400):
            process = subprocess.Popen([sys.executable, "-c", JUDGE, url, bench, out], env=os.environ | {"PYTHONPATH": path})
            until(lambda enough=enough: len(replies(cache)) >= enough, f"{enough} replies", 90)
            process.send_signal(signal.SIGKILL)
            process.wait()
        judgments, missing = asyncio.run(judged(url, bench, out))
        log = read_rows(tmp_path / "server" / "log.jsonl")
        asked = len(log)
        assert asyncio.run(judged(url, bench, out)) == (judgments, missing)
        assert len(read_rows(tmp_path / "server" / "log.jsonl")) == asked, "once more asks nothing"

    given = {(index, name) for index, names in judgments.items() for name in names}
    lost = {tuple(row["asked"][:2]) for row in missing}
    assert len(given) + len(lost) == 5 * QUERIES and not given & lost, "each ends once: a score, or a reason"
    assert all(len(each) == 1 and 1 <= each[0].score <= 10 for names in judgments.values() for each in names.values())
    ends = Counter(row["end"] for row in log)
    assert all(ends[kind] > 20 for kind in fault_server.KINDS), f"every fault came: {ends}"
    assert 0.25 < 1 - ends["answered"] / len(log) < 0.35
    kept = replies(cache)
    assert len(kept) == len({row["key"] for row in kept}), "no reply is kept twice"
    paid = sum(ends[end] for end in fault_server.PAID)
    assert 0 <= paid - len(kept) <= 2 * CONCURRENCY, "at most what was in flight at the two kills was paid for and lost"
    assert len(lost) <= 20, "three invalid answers in a row are rare"
