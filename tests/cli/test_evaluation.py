"""The arena from the command line: judged by the run's own Writing RM, rated again from the file, and by a person."""

import json
import shutil

import pandas as pd
import pytest
from typer.testing import CliRunner

from lwzlib.base.recipe import RecipeError
from lwzlib.base.rows import DataError, read_rows, write_rows
from lwzlib.cli import main
from lwzlib.endpoints.llm import LLMError
from lwzlib.evaluate import arena, elo
from lwzlib.evaluate.elo import ArenaError


def lwz(*words):
    done = CliRunner().invoke(main.app, list(map(str, words)), catch_exceptions=False, env={"COLUMNS": "150"})
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture
def run_dir(smoke_rm, tmp_path):
    """Two arms that answered five queries, one of them nothing at all to the last."""
    shutil.copytree(smoke_rm / "writing-rm", tmp_path / "writing-rm")
    for arm, words in (("plain", "It rains."), ("loud", "RAIN! RAIN! RAIN! and thunder too")):
        for phase in ("before", "after"):
            folder = tmp_path / arm / f"samples-{phase}"
            folder.mkdir(parents=True)
            write_rows(folder / "samples.jsonl", (
                {"id": f"q{n}", "query": f"Write of {n}.", "type": "story",
                 "completion": f"<answer>{f'{n} {words} {phase}' if (arm, n) != ('loud', 4) else ''}</answer>"}
                for n in range(5)))
    return tmp_path


def test_arena_judges_every_pair_in_both_orders_and_elo_reads_the_file(run_dir):
    said = lwz("arena", run_dir, "--anchor", "plain before")
    judgments = read_rows(run_dir / "arena.jsonl")
    assert len(judgments) == 6 * 2 * 5 and {row["winner"] for row in judgments} <= {"first", "second", "tie"}
    assert "it shows what they learnt, not how" in said and "plain before = 1000" in said
    again = lwz("elo", run_dir / "arena.jsonl", "--anchor", "plain before")
    assert said.endswith(again), "the same table from the recorded judgments"
    rated = elo.ratings(arena.read_judgments(run_dir / "arena.jsonl"), "plain before").table
    assert all(f"{value:.0f}" in said for value in rated.elo)


def test_a_sheet_is_written_for_a_rater_and_its_export_becomes_judgments(run_dir):
    sheet = run_dir / "rate.html"
    lwz("rate", run_dir, "--to", sheet)
    key = json.loads((run_dir / "rate.key.json").read_text())
    assert len(key["pairs"]) == 5 and "samples" not in sheet.read_text()
    export = run_dir / "export.json"
    export.write_text(json.dumps({"sheet": key["sheet"], "rater": "Ann", "choices": dict.fromkeys(key["pairs"], "left")}))
    assert "5 judgments" in lwz("unblind", export, run_dir / "rate.key.json", "--to", run_dir / "ann.jsonl")
    found = arena.read_judgments(run_dir / "ann.jsonl")
    assert set(found.judge) == {"Ann"} and set(found.winner) == {"first"} and len(found) == 5
    other = run_dir / "bob.json"
    other.write_text(export.read_text().replace("Ann", "Bob"))
    with pytest.raises(DataError, match=r"ann.jsonl holds the judgments of Ann: give --to another file"):
        lwz("unblind", other, run_dir / "rate.key.json", "--to", run_dir / "ann.jsonl")
    lwz("unblind", other, run_dir / "rate.key.json")
    for name in ("Ann", "Bob"):
        assert set(arena.read_judgments(run_dir / f"{name.lower()}.jsonl").judge) == {name}


def test_a_folder_without_samples_says_so(tmp_path):
    with pytest.raises(ArenaError, match="no samples in"):
        lwz("rate", tmp_path)


@pytest.fixture
def scored(tmp_path):
    """A benchmark of one query and a folder of two score files."""
    rubric = {band: "text" for band in ("1-2", "3-4", "5-6", "7-8", "9-10")}
    write_rows(tmp_path / "bench.jsonl", [{"index": 1, "query": "Write of rain.", "checklist": [
        {"name": name, "criteria_description": "d"} | rubric for name in "AB"]}])
    (tmp_path / "scores").mkdir()
    for model, score in (("one-4.1", 7.0), ("two", 4)):
        write_rows(tmp_path / "scores" / f"{model}.jsonl", [{"index": 1, "scores": {"A": [{"score": score, "reason": ""}]}}])
    (tmp_path / "scores" / "one-4.1.replies.jsonl").write_text("{}\n")
    return tmp_path


@pytest.mark.parametrize("suffix", ["csv", "json"])
def test_a_folder_of_score_files_becomes_tables_and_one_unrounded_file(scored, suffix):
    command = ("aggregate", "writingbench", scored / "scores", "--source", scored / "bench.jsonl", "--to")
    said = lwz(*command, scored / f"t.{suffix}")
    assert said.count("note: 1 of 2 criteria have no judgment") == 2 and "no language is stated for 1 of 1 queries" in said
    table = pd.read_csv(scored / "t.csv") if suffix == "csv" else pd.DataFrame(json.loads((scored / "t.json").read_text()))
    overall = table[(table.scope == "overall") & (table.language == "all")].set_index("file").score
    assert overall.to_dict() == {"one-4.1.jsonl": 7.0, "two.jsonl": 4.0}
    with pytest.raises(DataError, match=r"--responses x belongs to one score file, and .*scores is a folder"):
        lwz(*command, scored / "u.csv", "--responses", "x")
    with pytest.raises(DataError, match=r"--to .*t.xlsx: must end in .csv or .json"):
        lwz(*command, scored / "t.xlsx")


@pytest.mark.parametrize(("sets", "sampling"), [
    (["sampling.temperature=null"], {"top_p": 0.95, "max_tokens": 2048}),
    (["sampling={temperature: null, top_k: 5}"], {"top_p": 0.95, "max_tokens": 2048, "top_k": 5}),
    (["sampling={temperature: 0.5}", "sampling.top_p=1"], {"temperature": 0.5, "top_p": 1, "max_tokens": 2048}),
    (["sampling.chat_template_kwargs.enable_thinking=false"],
     {"temperature": 1.0, "top_p": 0.95, "max_tokens": 2048, "chat_template_kwargs": {"enable_thinking": False}})])
@pytest.mark.parametrize("command", ["judge", "generate"])
def test_sampling_is_said_alike_to_every_command(scored, llm_server, command, sets, sampling):
    llm_server.script({"": [{"text": '{"score": 5, "reason": "x"}'}]})
    write_rows(scored / "responses.jsonl", [{"index": 1, "response": "Rain."}])
    words = [word for one in sets for word in ("-s", one)]
    files = ("writingbench", scored / "responses.jsonl") if command == "judge" else ("writingbench", "m", "--engine", "server")
    lwz(command, *files, "--to", scored / "out.jsonl", "--source", scored / "bench.jsonl", "--base-url", llm_server.url,
        *(("--model", "m") if command == "judge" else ()), *words)
    body = llm_server.requests[0]["body"]
    if command == "generate":
        sampling = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "max_tokens": 16_000, "seed": 0} | {
            name: value for name, value in sampling.items() if f"sampling.{name}" in str(sets) or f"{name}:" in str(sets)}
        sampling = {name: value for name, value in sampling.items() if name != "temperature" or "null" not in str(sets)}
        sampling |= {"chat_template_kwargs": {"enable_thinking": False}} if "chat_template" in str(sets) else {}
    assert {name: value for name, value in body.items() if name not in ("model", "messages")} == sampling


@pytest.mark.parametrize(("words", "said"), [
    (["-s", "sampling=0.5"], "sampling = 0.5"), (["-s", "sampling.top_p"], "not of the form name=value"),
    (["-s", "temprature=1"], "temprature"), (["--decoding", "temperature=-1"], "decoding: temperature = -1"),
    (["--decoding", "top=1"], "decoding: top = 1")])
def test_wrong_settings_are_named(scored, llm_server, words, said):
    with pytest.raises((LLMError, DataError, RecipeError), match=said):
        lwz("generate", "writingbench", "m", "--engine", "server", "--to", scored / "out.jsonl", "--base-url", llm_server.url,
            "--source", scored / "bench.jsonl", *words)
