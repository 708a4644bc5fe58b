"""Cold start: which answers teach the form, what their plans say, and that epochs and adapters are what the recipe asks."""

import pytest
import torch

from lwzlib.base import kit
from lwzlib.base.models import load_model
from lwzlib.base.recipe import load_recipe
from lwzlib.base.rows import RunError
from lwzlib.method import cold_start
from lwzlib.method.queries import load_queries
from lwzlib.method.text import count_words, has_form, parse
from lwzlib.pipeline.stages import stage_run

SENTENCE = "The rain fell on the old town all night and nobody went out of the house. "  # 16 words


@pytest.fixture
def answered(monkeypatch):
    """The model's answers: as many sentences as are put into the list, one entry a query; a string as it stands."""
    answers = []

    def completions(model, tokenizer, texts, *_):
        for i in range(len(texts)):
            said = answers[i % len(answers)]
            yield i, said if isinstance(said, str) else SENTENCE * said, True, 9

    monkeypatch.setattr(cold_start, "completions", completions)
    return answers


def taught(recipe, folder):
    run = stage_run("cold-start", recipe, folder, 0)
    model, tokenizer = load_model(kit.TINY, "float32", "eager")
    with run.work():
        return cold_start._documents(recipe, run, model, tokenizer)


def recipe_of(**more):
    lengths = {"data.train": "kit:train_lengths", "data.heldout": "kit:heldout_lengths", "reward.length.max_ratio": 2.0}
    return load_recipe("smoke", lengths | {"cold_start.queries": 168} | {f"cold_start.{n}": value for n, value in more.items()})


def test_answers_of_another_length_than_was_asked_for_are_left_out(answered, tmp_path):
    answered += [4]
    queries = load_queries("kit:train_lengths", recipe_of().data.languages)
    asked = {query.query: query.word_range for query in queries}
    fit = sum(lower <= 64 <= upper for lower, upper in asked.values()) * 168 / len(queries)
    documents = taught(recipe_of(within_range=True), tmp_path / "within")
    assert 0 < len(documents) < 336 and len(documents) / 2 == pytest.approx(fit, rel=0.35)
    for document in documents:
        query = next(query for query in asked if query in document["prompt"])
        style = "think" if "<think>" in document["completion"] else "direct"
        parsed = parse(document["completion"].removesuffix("<eos>"), style)
        assert asked[query][0] <= count_words(parsed.answer) <= asked[query][1]
    assert len(taught(recipe_of(), tmp_path / "all")) == 336


def test_none_that_fits_is_an_error_before_anything_is_trained(answered, tmp_path):
    answered += [40]
    with pytest.raises(RunError, match=r"within_range: none of the 168 answers of kit:tiny has the length .*queries more"):
        taught(recipe_of(within_range=True), tmp_path)


@pytest.mark.parametrize(("text", "answer", "plan"), [
    ("Yeast makes gas. Gas  makes holes.", "Yeast makes gas. Gas makes holes.", "1 paragraph, 2 sentences"),
    ("Yeast makes gas.\n\nGas makes\nholes. The third", "Yeast makes gas.\n\nGas makes holes.", "2 paragraphs, 2 sentences"),
    ("Yeast makes gas. It rises.\n\nThe second thing that", "Yeast makes gas. It rises.", "1 paragraph, 2 sentences"),
    ("没有句号", "没有句号", "1 paragraph, 1 sentence")])
def test_a_document_is_whole_in_its_form_and_its_plan_tells_its_length(answered, tmp_path, text, answer, plan):
    answered += [text]
    think, direct = taught(recipe_of(queries=1), tmp_path)
    for document, style in ((think, "think"), (direct, "direct")):
        completion = document["completion"][: document["completion"].index("</answer>") + len("</answer>")]
        parsed = parse(completion, style)
        assert has_form(parsed, style, 5) and parsed.answer == answer
    assert f"<think>The answer has {plan}. " in think["completion"]


def test_epochs_and_an_adapter_are_those_of_the_recipe(answered, tmp_path):
    answered += [2]
    starts, steps = [], {}
    for rank in (0, 2):
        made = recipe_of(queries=4, epochs=3, batch_documents=2, learning_rate=0.01, **{
            "lora.rank": rank, "lora.targets": ["q_proj"]})
        run = stage_run("cold-start", made, tmp_path / str(rank), 0)
        end, _ = load_model(str(cold_start.cold_start(made, run)), "float32", "eager")
        start, _ = load_model(kit.TINY, "float32", "eager")
        pairs = zip(start.named_parameters(), end.parameters(), strict=True)
        starts.append({name.split(".")[-2] for (name, a), b in pairs if not torch.equal(a.bfloat16(), b.bfloat16())})
        steps[rank] = len(run.rows())
    assert steps == {0: 12, 2: 12} and starts[1] == {"q_proj"} and len(starts[0]) > 3
