"""Generate, judge and aggregate against a real OpenAI-compatible server: vLLM on CPU with the embedded model."""

import json
import os
import re
import socket
from pathlib import Path

import pytest
import vllm_cpu
from typer.testing import CliRunner

from lwzlib.base.fast_cpu import computed_in
from lwzlib.base.kit import SMOLLM2
from lwzlib.base.models import load_tokenizer
from lwzlib.base.policy import Policy
from lwzlib.base.recipe import load_recipe
from lwzlib.base.rows import read_rows, write_rows
from lwzlib.cli import main
from lwzlib.evaluate import arena, longbench, writingbench
from lwzlib.pipeline.stages import STAGES, Work, stage_run

pytestmark = vllm_cpu.needed
PROMPTS = [("Write a 60-word paragraph about bread.", 60),
           ("Describe a harbour in 80 words.", 80), ("写一段60字的短文，谈谈春天。", 60)]


@pytest.fixture(scope="module")
def url():
    with vllm_cpu.serving(vllm_cpu.make()) as address:
        yield address


@pytest.fixture
def lwz(url, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(*words, asks=True):
        server = ["--base-url", url, "-s", "concurrency=4"] if asks else []
        done = CliRunner().invoke(main.app, [*words, *server], catch_exceptions=False, env={"COLUMNS": "200"})
        assert done.exit_code == 0, done.output
        return done.output

    return run


def judging(*more):
    """The server holds a model of 135M parameters to the schema; without, it says hardly anything valid."""
    return ("--model", "smollm2", "-s", "json_schema=true", "-s", "sampling.max_tokens=400", "-s", "reasks=1", *more)


def writes(name, to, *more):
    return ("generate", name, "smollm2", "--engine", "server", "--to", to, "--decoding", "max_new_tokens=60", *more)


def test_longbench_write_from_requests_to_table(lwz):
    write_rows(Path("bench.jsonl"), [{"prompt": prompt, "type": "t", "length": words} for prompt, words in PROMPTS])
    assert "3 responses" in lwz(*writes("longbench", "r.jsonl", "--source", "bench.jsonl"))
    bench = longbench.read_benchmark("bench.jsonl")
    said = lwz("judge", "longbench", "r.jsonl", "--to", "s.jsonl", "--source", "bench.jsonl", *judging())
    found = longbench.read_scores("s.jsonl", bench)
    assert found and len(found) + len(read_rows(Path("s.missing.jsonl"))) == 3, "judged, or counted as missing"
    assert "S_l" in said and "S_q" in said
    before = Path("s.replies.jsonl").read_bytes()
    again = lwz("judge", "longbench", "r.jsonl", "--to", "s.jsonl", "--source", "bench.jsonl", *judging())
    assert Path("s.replies.jsonl").read_bytes() == before and " 0 requests" in again


def test_writingbench_scores_are_in_its_own_format(lwz):
    criteria = [{"name": name, "criteria_description": f"Is it {name}?"} | {
        f"{2 * i + 1}-{2 * i + 2}": f"{'not ' * (i < 2)}{name}" for i in range(5)} for name in ("clear", "lively")]
    write_rows(Path("bench.jsonl"), [{"index": 7, "domain1": "D", "domain2": "d", "lang": "en", "query": PROMPTS[0][0],
                                      "checklist": criteria}])
    lwz(*writes("writingbench", "r.jsonl", "--source", "bench.jsonl", "--style", "direct"))
    assert [row["index"] for row in read_rows(Path("r.jsonl"))] == [7]
    lwz("judge", "writingbench", "r.jsonl", "--to", "s.jsonl", "--source", "bench.jsonl", *judging("--samples", "3"))
    found = writingbench.read_scores("s.jsonl", writingbench.read_benchmark("bench.jsonl"))
    given = sum(len(each) for each in found.get(7, {}).values())
    assert given and given + len(read_rows(Path("s.missing.jsonl"))) == 6, "two criteria, each judged three times"
    assert "overall" in lwz("aggregate", "writingbench", "s.jsonl", "--source", "bench.jsonl", asks=False)


def test_arena_of_a_base_models_texts_and_a_baselines(lwz):
    baseline = json.dumps({"baseline": "Bread is flour, water and time."})
    write_rows(Path("bench.jsonl"), [{"idx": i, "question": prompt, "type": "t", "length": words, "baseline_response": baseline}
                                     for i, (prompt, words) in enumerate(PROMPTS[:2])])
    lwz(*writes("arena", "mine.jsonl", "--source", "bench.jsonl", "--style", "think", "--frame", "plain"))
    lwz("arena", "bench.jsonl", "--player", "mine=mine.jsonl", "--anchor", "baseline", *judging())
    judgments = arena.read_judgments("arena.jsonl")
    assert len(judgments) == 4 and set(judgments.judge) == {"smollm2"}
    assert judgments.winner.notna().any(), "at least one judgment is valid"


def test_a_stage_is_written_by_servers_that_it_starts_and_stops(tmp_path, monkeypatch, capsys):
    """`distil` of a recipe that colocates vLLM for GRPO: the real command, prompts, draws and stops."""
    program = tmp_path / "bin" / "vllm"  # `vllm serve` of vllm-cpu looks for a package named vllm; the module does not
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nmodel=$2\nshift 2\nexec {vllm_cpu.make()} -m vllm.entrypoints.openai.api_server '
                       '--model "$model" "$@"\n')
    program.chmod(0o755)
    for name, value in {"PATH": f"{program.parent}:{os.environ['PATH']}", **vllm_cpu.SETTINGS}.items():
        monkeypatch.setenv(name, value)
    r = load_recipe("smoke", [f"model.name={SMOLLM2}", f"model.dtype={computed_in('bfloat16')}", "reward.weights.writing=0.0",
                              "cold_start.queries=0", "cot.exact_only=false", "grpo.sampling.max_new_tokens=60",
                              "launch=subprocess", "distributed.start_s=800", "vllm.mode=colocate"])
    run = stage_run("distil", r, tmp_path, 0)
    with monkeypatch.context() as no_transformers:
        no_transformers.setattr(Policy, "load", None)
        STAGES["distil"].does(r, run, *STAGES["distil"].gets(Work(run, "", {"grpo": Path(SMOLLM2)})))
    rows = run.rows("completions")
    assert run.finished and len(rows) == 4 and len(run.rows("documents")) == 2
    assert rows[0]["id"] == rows[1]["id"] and rows[0]["completion"] != rows[1]["completion"], "two draws of a query"
    tokenizer = load_tokenizer(SMOLLM2)
    for row in rows:
        tokens = len(tokenizer(row["completion"], add_special_tokens=False).input_ids)
        assert row["truncated"] == (tokens >= 59 and not row["completion"].endswith("</answer>")), row
        assert "<|im_" not in row["completion"]
    port = int(re.search(r"vLLM answers at http://127.0.0.1:(\d+), 1 nodes", capsys.readouterr().out)[1])
    with pytest.raises(OSError, match="refused"), socket.create_connection(("127.0.0.1", port), 2):
        pass  # it was stopped
