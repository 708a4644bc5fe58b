"""`lwz write`: arms, models and servers write; what a terminal, a pipe and a Markdown file get; Ctrl-C."""

import json
import os
import pty
import re
import select
import signal
import sys
import time

import pytest
import yaml
from typer.testing import CliRunner

from lwzlib.base.models import resolve
from lwzlib.base.recipe import RecipeError, load_recipe
from lwzlib.base.rows import DataError, RunError, write_rows
from lwzlib.cli import main
from lwzlib.endpoints.llm import LLMError
from lwzlib.method.text import count_words, shown
from lwzlib.pipeline import author

PLANNED = ["<thi", "nk>\nA plan.\n</think>\n", "<answer>\nIt rains ", "a lot here. </ans", "wer>"]
SHORT = ["-s", "samples.sampling.max_new_tokens=30"]


def lwz(*words, code=0):
    done = CliRunner().invoke(main.app, ["write", *map(str, words)], catch_exceptions=False)
    assert done.exit_code == code, done.output
    return done


@pytest.fixture
def server(llm_server):
    """server(turn) -> the options that name the server, which says this from now on."""
    def says(turn, *more):
        llm_server.script({"": [turn, *more]})
        return "m", "--base-url", llm_server.url
    return says


def front_matter(path):
    _, front, body = path.read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(front), body


def test_a_pipe_gets_the_answer_and_nothing_else(server, llm_server):
    model, *address = server({"pieces": [*PLANNED, " never seen"], "end": "never"})
    done = lwz(model, "Describe rain.", *address, "--words", "60")
    assert done.stdout == "It rains a lot here.\n"
    first, *rest = done.stderr.splitlines()
    assert first == "A plan." and not rest[1:]
    assert re.fullmatch(r"5 words written, 54 to 66 asked for: 49 too few; plan: 2 words; [\d.]+ s", rest[0])
    (request,) = llm_server.requests
    assert request["asked"].endswith("\n\nDescribe rain. Write about 60 words.") and "<think>" in request["asked"]


@pytest.mark.parametrize(("words", "request_", "said"), [
    ("4-6", "Describe rain", "4 to 6 asked for: inside"), ("2-3", "Describe rain", "2 to 3 asked for: 2 too many"),
    ("", "Describe rain in 100 words.", "90 to 110 asked for: 85 too few"), ("", "Describe rain", "5 words written; plan")])
def test_words_written_are_measured_against_words_asked_for(server, words, request_, said):
    model, *address = server({"pieces": PLANNED})
    assert said in lwz(model, request_, *address, *(("--words", words) if words else ())).stderr


def test_a_request_states_its_length_in_its_own_language(server, llm_server):
    model, *address = server({"pieces": ["<answer>雨从云里落下来。</answer>"]})
    done = lwz(model, "写一段关于雨的文字", *address, "--words", "200-400", "--style", "direct")
    assert llm_server.requests[0]["asked"].endswith("写一段关于雨的文字。写200到400字。")
    assert done.stdout == "雨从云里落下来。\n" and "7 words written, 200 to 400 asked for: 193 too few" in done.stderr


@pytest.mark.parametrize(("turn", "stdout", "said"), [
    ({"pieces": ["<think>on ", "and on"], "finish": "length"}, "\n",
     "max_new_tokens = 224, or at what the server allows: -s gives it more\nwarning: the plan never ended, so there is no"),
    ({"pieces": ["<think>on</think><answer>It ", "ra"], "finish": "length"}, "It ra\n", "warning: cut off at samples"),
    ({"pieces": ["<answer>It ra"], "finish": "content_filter"}, "It ra\n", "the server, finish_reason = 'content_filter'"),
    ({"pieces": ["It ", "rains."]}, "It rains.\n", "without an <answer>, all but the plan counts as one"),
    ({"pieces": ["Sure! <answer>It rains.</answer>"]}, "It rains.\n", "not in the exact form, <think>plan</think> <answer>"),
    ({"pieces": ["<answer>It \x1b[31mrains\x07.</answer>"]}, "It [31mrains.\n", "not in the exact form")])
def test_what_is_not_whole_or_has_no_form_is_shown_with_a_warning(server, turn, stdout, said):
    model, *address = server(turn)
    done = lwz(model, "Describe rain.", *address)
    assert (done.stdout, "\x1b" in done.output) == (stdout, False)
    assert said in done.stderr and "warning: " in done.stderr


def test_several_requests_go_into_one_file_in_order_with_what_made_them(server, llm_server, tmp_path):
    rows, lines, to = tmp_path / "asked.jsonl", tmp_path / "asked.txt", tmp_path / "out.md"
    write_rows(rows, [{"id": "a", "query": "Describe rain.", "word_range": [4, 6]}, {"query": "Describe\nsnow.", "other": 1}])
    model, *address = server({"pieces": PLANNED}, {"pieces": ["<think>Hm.</think><answer>Snow.</answer>"]})
    done = lwz(model, "--from", rows, *address, "--to", to, "--plan", "--seed", 7)
    assert done.stdout == "It rains a lot here.\n\nSnow.\n"
    assert "[2/2] Describe\nsnow." in done.stderr and f"{to}: 2 of 2 texts" in done.stderr
    front, body = front_matter(to)
    assert [text["seed"] for text in front["texts"]] == [request["body"]["seed"] for request in llm_server.requests] == [7, 8]
    assert [text["words"] for text in front["texts"]] == [5, 1] and front["texts"][0]["word_range"] == [4, 6]
    assert (front["model"], front["server"], front["style"]) == ("m", llm_server.url, "think")
    assert front["decoding"]["temperature"] == 0.6 and front["started"] and front["versions"]["torch"]
    plans = "<details><summary>Plan</summary>\n\n{}\n\n</details>\n\n"
    assert body.strip() == (f"> Describe rain.\n\n{plans.format('A plan.')}It rains a lot here.\n\n"
                            f"> Describe\n> snow.\n\n{plans.format('Hm.')}Snow.")
    before = to.read_bytes()
    with pytest.raises(DataError, match=r"out.md exists: give another name, or --force"):
        lwz(model, "Describe rain.", *address, "--to", to)
    assert to.read_bytes() == before
    lines.write_text("Describe rain.\n\n  Describe hail.\n")
    server({"pieces": PLANNED})
    lwz(model, "--from", lines, *address, "--to", to, "--force")
    assert re.findall(r"> (.*)", front_matter(to)[1]) == ["Describe rain.", "Describe hail."] and "A plan" not in to.read_text()


def test_a_reply_that_breaks_off_keeps_what_came(server, tmp_path):
    to = tmp_path / "out.md"
    model, *address = server({"pieces": ["<think>Hm.</think><answer>It rains", " and"], "end": "breaks"})
    done = lwz(model, "Describe rain.", *address, "--to", to, code=1)
    assert done.stdout == "It rains and\n" and "warning: http://127.0.0.1" in done.stderr
    front, body = front_matter(to)
    assert body.endswith("It rains and\n") and "the reply broke off" in front["texts"][0]["problem"]


def test_options_of_the_request_and_of_the_recipe(server, llm_server):
    model, *address = server({"pieces": PLANNED})
    lwz(model, "Describe rain.", *address, "-s", "sampling.top_k=5", "-s", "samples.sampling.temperature=0.1",
        "-s", "model.frame=plain")
    (request,) = llm_server.requests
    assert (request["path"], request["body"]["top_k"], request["body"]["temperature"]) == ("/v1/completions", 5, 0.1)
    assert request["body"]["prompt"].endswith("User: Describe rain.\n\nAssistant: ")


@pytest.mark.parametrize(("words", "error", "said"), [
    (["m", " "], DataError, "give a request that is not empty"), (["m", "x", "--from", "y.txt"], DataError, "not both"),
    (["m", "--from", "none.txt"], DataError, "no file none.txt"),
    (["m", "--from", "none.jsonl"], DataError, "no file none.jsonl"),
    (["m", "x", "--words", "400-200"], DataError, "'400-200' is no number of words: give one such as 300"),
    (["m", "x", "--words", "many"], DataError, "'many' is no number of words"),
    (["m", "Write 500 words on rain.", "--words", "300"], DataError, "the request states its own length, 400 to 600"),
    (["m", "x", "--to", "a.txt"], DataError, "--to a.txt: must end in .md"),
    (["m", "x", "--to", "none/a.md"], DataError, "in a folder that exists"),
    (["kit:tiny", "x", "--arm", "base"], DataError, "--arm base: kit:tiny is no run folder"),
    (["kit:tiny", "x", "-s", "samples.sampling.temprature=1"], RecipeError, "did you mean 'samples.sampling.temperature'"),
    (["m", "x", "--base-url", "127.0.0.1"], LLMError, "settings: base_url = '127.0.0.1'"),
    (["m", "x", "--base-url", "http://127.0.0.1:9/v1"], LLMError, "http://127.0.0.1:9/v1: no reply: Connection error")])
def test_a_wrong_call_is_one_clear_error(words, error, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=re.escape(said)):
        lwz(*words)


def test_a_row_of_requests_is_refused_by_line(tmp_path):
    write_rows(tmp_path / "asked.jsonl", [{"query": "Describe rain."}, {"query": "Describe snow.", "word_range": [70, 50]}])
    with pytest.raises(DataError, match=r"asked.jsonl, line 2: .*0 < lower <= upper"):
        lwz("kit:tiny", "--from", tmp_path / "asked.jsonl")


@pytest.fixture(scope="module")
def run_dir(alone):
    """A run folder of the smoke recipe, with one trained arm."""
    return alone.folder.parent.parent


def test_an_arm_writes_as_its_run_asks_it(run_dir, tmp_path):
    to = tmp_path / "out.md"
    done = lwz(run_dir, "Describe rain.", "--recipe", "smoke", *SHORT, "--to", to)
    front, body = front_matter(to)
    grpo = run_dir / "base-think" / "grpo"
    assert front["model"] == str(grpo / "model") and front["arm"] == "base-think"
    assert front["fingerprint"] == json.loads((grpo / "status.json").read_text())["fingerprint"]
    kept = yaml.safe_load((grpo / "recipe.yaml").read_text())
    assert (front["style"], front["frame"]) == (kept["inputs"]["prompt"], kept["model"]["frame"])
    assert front["wording"] == kept["prompt"]["wording"] and front["decoding"]["max_new_tokens"] == 30
    (text,) = front["texts"]
    assert 0 < text["tokens"] <= 30 and "tokens/s" in done.stderr
    assert done.stdout.strip() == body.partition("> Describe rain.\n\n")[2].strip().replace("(no answer)", "")
    again = lwz(run_dir, "Describe rain.", "--recipe", "smoke", *SHORT)
    other = lwz(run_dir, "Describe rain.", "--recipe", "smoke", *SHORT, "--seed", 1)
    assert again.stdout == done.stdout != other.stdout, "the seed alone decides"
    base = lwz(run_dir, "Describe rain.", "--recipe", "smoke", *SHORT, "--arm", "base")
    assert base.stdout == lwz("kit:tiny", "Describe rain.", "--recipe", "smoke", *SHORT).stdout != done.stdout


def test_a_model_folder_writes_what_completions_of_it_are(smoke):
    recipe = load_recipe("smoke", {"samples.sampling.max_new_tokens": 30})
    pieces = []
    wrote = author.of_model("kit:tiny", recipe, "think").write("Describe rain.", 3, pieces.append)
    done = lwz(resolve("kit:tiny"), "Describe rain.", "--recipe", "smoke", *SHORT, "--seed", 3)
    assert "".join(pieces) == wrote.text and f"{count_words(shown(wrote.text))} words written" in done.stderr


def test_arms_that_are_not_there_not_trained_or_not_named(run_dir, tmp_path):
    with pytest.raises(RunError, match=r"has no arm 'base-thnk'; did you mean 'base-think'\?; it has base-think, base"):
        lwz(run_dir, "x", "--arm", "base-thnk")
    with pytest.raises(RunError, match=r"arm 'sft' of .* is not trained yet: `lwz stage sft smoke --arm sft --run-dir "):
        lwz(run_dir, "x", "--arm", "sft", "--recipe", "smoke")
    two = tmp_path / "two"
    for name in ("one", "another"):
        (two / name).mkdir(parents=True)
        os.symlink(run_dir / "base-think" / "grpo", two / name / "grpo")
    with pytest.raises(RunError, match=r"two has several arms: give --arm, one of another, one, base"):
        lwz(two, "x")
    with pytest.raises(RunError, match=r"is neither a model .* nor a run folder"):
        lwz(tmp_path, "x")


def on_terminal(*words, wait_for="", keys=b""):
    """(exit code, what a terminal shows) of the command; the keys are pressed when it shows `wait_for`."""
    process, terminal = pty.fork()
    if not process:
        os.execv(sys.executable, [sys.executable, "-m", "lwzlib.cli.main", "write", *map(str, words)])
    seen, deadline = b"", time.monotonic() + 150
    while True:
        if time.monotonic() > deadline or not select.select([terminal], [], [], 60)[0]:
            os.kill(process, signal.SIGKILL)
            pytest.fail(f"it does not end; last: {seen[-2000:]!r}")
        try:
            seen += os.read(terminal, 4096)
        except OSError:  # its other end is closed
            break
        if keys and wait_for in seen.decode(errors="replace"):
            os.write(terminal, keys)
            keys = b""
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), seen.decode(errors="replace").replace("\r\n", "\n")


def test_a_terminal_shows_the_plan_dimmed_or_folded_and_no_tags(server):
    model, *address = server({"pieces": PLANNED})
    code, seen = on_terminal(model, "Describe rain.", *address)
    assert code == 0 and seen.startswith("\x1b[2mA plan.\x1b[0m\n\nIt rains") and "answer>" not in seen
    assert re.search(r"It rains a lot here\.\n\n\x1b\[2m5 words written; plan: 2 words", seen)
    _, seen = on_terminal(model, "Describe rain.", *address, "--fold")
    assert re.sub(r"\x1b\[\d+m", "", seen).startswith("planning ...\rplan: 2 words\n\nIt rains a lot here.\n\n5 words")


def test_ctrl_c_keeps_what_was_written(server, tmp_path):
    to = tmp_path / "out.md"
    model, *address = server({"pieces": ["<think>Hm.</think><answer>It rains"], "end": "never"})
    code, seen = on_terminal(model, "Describe rain.", *address, "--to", to, wait_for="rains more", keys=b"\x03")
    assert code == 130 and "warning: interrupted: this is what was written so far" in seen and "Traceback" not in seen
    front, body = front_matter(to)
    assert "It rains more" in body and front["texts"][0]["problem"].startswith("interrupted")
    assert front["texts"][0]["words"] == seen.count(" more") + 2
