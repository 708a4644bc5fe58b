"""The model card: what it says is what the run left, its code runs when pasted, and it is no part of the model."""

import ast
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from huggingface_hub import ModelCard
from scipy import stats
from smoke_runs import ARM

from lwzlib.base import kit, models
from lwzlib.base.quantities import Prompt
from lwzlib.base.recipe import departures, load_recipe
from lwzlib.base.rows import RunError, digest_of, write_rows
from lwzlib.exhibits import model_card
from lwzlib.exhibits.model_card import write_card, write_cards
from lwzlib.method import prompts
from lwzlib.pipeline.stages import run_stage, stage_run

BEFORE, AFTER = [0.1, 0.3, 0.2, 0.5, 0.4, 0.0], [0.9, 0.4, 0.8, 0.5, 0.7, 0.2]


def untrained(recipe, root, stage="grpo", arm=ARM):
    """What the stage leaves, with the tiny model as it is."""
    run = stage_run(stage, recipe, root, 0, arm)
    with run.work():
        shutil.copytree(kit.prepare(kit.TINY), run.folder / "model", ignore=shutil.ignore_patterns("sha256.json"))
    return run


def sampled(recipe, root, phase, scores, arm=ARM):
    run = stage_run(f"samples-{phase}", recipe, root, 0, arm)
    with run.work():
        write_rows(run.folder / "samples.jsonl", [
            {"step": i, "id": f"q{i}", "word_range": [50 + i, 70], "answer_words": 60 + i, "truncated": i == 0, "length": score}
            for i, score in enumerate(scores)])


@pytest.fixture(scope="module")
def unpaid(smoke):
    return load_recipe("smoke", "reward.weights.writing=0.0")


def code_of(card):
    return re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]


def test_a_card_before_and_after_its_samples(unpaid, tmp_path):
    untrained(unpaid, tmp_path)
    card = write_card(tmp_path, ARM).read_text()
    assert "Not measured yet: `lwz stage samples-before,samples-after RECIPE --run-dir RUN_DIR" in card
    assert "| length |" not in card and "it wrote" not in card
    sampled(unpaid, tmp_path, "before", BEFORE)
    assert "Not measured yet" in write_card(tmp_path, ARM).read_text(), "half of it shows no change"
    sampled(unpaid, tmp_path, "after", AFTER)
    assert "words asked for and words written is 1.00 before training and 1.00 after:" in write_card(tmp_path, ARM).read_text()
    card = write_card(tmp_path, ARM).read_text()
    cells = re.search(r"^\| length \| (.*) \| (.*) \| (.*) \|$", card, re.MULTILINE).groups()
    for cell, values in zip(cells, (BEFORE, AFTER, np.subtract(AFTER, BEFORE)), strict=True):
        mean, low, high = map(float, re.findall(r"[-+]?\d\.\d\d", cell))
        expected = stats.bootstrap((values,), np.mean, method="percentile", rng=1).confidence_interval
        assert mean == pytest.approx(np.mean(values), abs=0.006)
        assert (low, high) == pytest.approx((expected.low, expected.high), abs=0.03)
    assert "On 6 held-out queries" in card and "50 to 70 words; it wrote 62 words on average, and 17%" in card
    assert "for length and format alone" in card and "Judge." not in card


def test_the_header_is_the_hubs_and_states_only_what_is_known(unpaid, tmp_path):
    run = untrained(unpaid, tmp_path)
    card = ModelCard.load(write_card(tmp_path, ARM))
    data = card.data.to_dict()
    assert data == {"language": ["en"], "library_name": "transformers", "pipeline_tag": "text-generation",
                    "tags": ["longwriter-zero", "grpo", "trl"]}, "a random model of the kit has no base model, and no licence"
    made = json.loads((run.folder / "provenance.json").read_text())
    assert made["hardware"] in card.text and f"torch {made['versions']['torch']}" in card.text
    assert (made["commit"] or "unknown") in card.text and run.fingerprint in card.text
    listed = dict(re.findall(r"^\| `([\w.]+)` \| .* \| (.*) \|$", card.text, re.MULTILINE))
    asked = {name for name, *_ in departures(unpaid) if name.split(".")[0] in run.sections}
    assert set(listed) == {name for name in asked if not name.startswith("writing_rm.")} < asked, "it has no judge of writing"
    assert listed["grpo.steps"] == "4" and "26,976 weights" in card.text


def test_what_is_lost_is_unknown(smoke, tmp_path):
    run = untrained(smoke, tmp_path)
    (run.folder / "provenance.json").unlink()
    card = write_card(tmp_path, ARM).read_text()
    assert "so that its quality is unknown" in card and "an unknown number of short documents" in card
    assert "| commit of the kit | unknown |" in card and "| hardware | unknown |" in card


@pytest.mark.parametrize(("name", "hub"), [
    ("kit:smollm2-135m-instruct", "HuggingFaceTB/SmolLM2-135M-Instruct"), ("Qwen/Qwen2.5-32B", "Qwen/Qwen2.5-32B"),
    ("kit:tiny", ""), ("/models/mine", ""), ("a/b/c", "")])
def test_only_what_is_on_the_hub_is_named_as_base_model(name, hub):
    assert model_card.on_hub(name) == hub


def test_paths_of_the_machine_stay_here(tmp_path):
    queries = tmp_path / "mine.jsonl"
    queries.write_text('{"id": "a", "query": "Why does rain fall?", "word_range": [50, 70]}\n')
    mine = load_recipe("smoke", {
        "data.train": str(queries), "writing_rm.corpora": [str(queries)], "reward.writing.judge": "rubric",
        "reward.writing.model": "judge-7b", "reward.writing.url": "http://judge7.corp.internal:8000/v1",
        "reward.writing.requests.api_key_env": "CORP_KEY"})
    untrained(mine, tmp_path / "run")
    card = write_card(tmp_path / "run", ARM).read_text()
    assert "mine.jsonl" in card and str(tmp_path) not in card
    assert "corp.internal" not in card and "CORP_KEY" not in card
    assert "the language model `judge-7b`, by a rubric" in card and "Writing RM, the judge" not in card


def test_a_card_says_what_the_model_was_paid_for_and_how_the_kit_asks_it(tmp_path):
    alone = load_recipe("smoke", {"reward.weights.writing": 0.0, "reward.weights.format": 0.0, "model.frame": "plain"})
    untrained(alone, tmp_path)
    card = write_card(tmp_path, ARM).read_text()
    assert "paid for length alone" in card and "-s model.frame=plain -s prompt.wording=brief" in card


def test_its_code_runs_when_pasted_and_asks_as_the_training_did(unpaid, tmp_path):
    run = untrained(unpaid, tmp_path)
    code = code_of(write_card(tmp_path, ARM).read_text())
    done = subprocess.run([sys.executable, "-c", f"{code}\nprint(repr((request, prompt)))"], cwd=run.folder / "model",
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    request, prompt = ast.literal_eval(done.stdout.splitlines()[-1])
    tokenizer = models.load_tokenizer(kit.TINY)
    assert prompt == prompts.render(request, "think", unpaid.model.frame, unpaid.prompt, tokenizer)


@pytest.mark.parametrize("style", ["think", "direct"])
@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize(("frame", "wording", "examples"), [("chat", "full", 1), ("plain", "full", 0), ("plain", "brief", 2)])
def test_its_prompt_is_the_kits_in_every_form(unpaid, tmp_path, frame, wording, examples, style, language):
    run = untrained(unpaid, tmp_path)
    asked = {"data": {"languages": [language]}, "model": {"frame": frame, "trust_remote_code": False},
             "prompt": {"wording": wording, "worked_examples": examples}, "inputs": {"prompt": style}, "sft": {"max_tokens": 9}}
    code = ast.parse(model_card._code(tmp_path, ARM, run.folder, asked, "."))
    values = {}
    for node in code.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") in ("request", "prompt"):
            exec(compile(ast.Module([node], []), "card", "exec"), values)  # noqa: S102
    tokenizer = models.load_tokenizer(kit.TINY)
    assert values["prompt"] == prompts.render(values["request"], style, frame, Prompt(**asked["prompt"]), tokenizer)
    assert "max_new_tokens=9" in ast.unparse(code)


def test_a_card_is_no_part_of_the_model_but_another_readme_is(unpaid, tmp_path):
    run = untrained(unpaid, tmp_path)
    model = run.folder / "model"
    bare = digest_of(model)
    card = write_card(tmp_path, ARM)
    assert digest_of(model) == bare
    write_card(tmp_path, ARM, "ada/nano")
    assert digest_of(model) == bare and "name = 'ada/nano'\n" in card.read_text()
    card.write_text("somebody's notes")
    assert digest_of(model) != bare


def test_stages_leave_the_card_and_make_it_anew(smoke, tmp_path):
    asked = load_recipe("smoke", {"reward.weights.writing": 0.0, "sft.data": str(_answers(tmp_path))})
    run_stage("sft", asked, tmp_path, 0, "sft")
    card = tmp_path / "sft" / "sft" / "model" / "README.md"
    assert "Not measured yet" in card.read_text() and "1 documents, of `answers.jsonl`" in card.read_text()
    for stage in ("samples-before", "samples-after"):
        run_stage(stage, asked, tmp_path, 0, "sft")
    assert "On 2 held-out queries" in card.read_text() and "| length |" in card.read_text()
    assert stage_run("sft", asked, tmp_path, 0, "sft").finished
    card.unlink()
    assert write_cards(tmp_path) == [card] and card.exists()


def _answers(folder):
    row = {"messages": [{"role": "user", "content": "Why rain?"}, {"role": "assistant", "content": "It falls."}]}
    write_rows(folder / "answers.jsonl", [row])
    return folder / "answers.jsonl"


def test_what_is_not_trained_has_no_card(unpaid, tmp_path):
    with pytest.raises(RunError, match="has no trained arm 'base-think'; it has none"):
        write_card(tmp_path, ARM)
    run = untrained(unpaid, tmp_path)
    run.update(state="interrupted")
    with pytest.raises(RunError, match="grpo is interrupted: `lwz run` goes on with it"):
        write_card(tmp_path, ARM)
    assert write_cards(tmp_path) == []
