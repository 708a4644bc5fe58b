"""Prompts: the twin of the query's language, both frames, and worked examples that obey the rules they teach."""

import copy

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lwzlib.base.kit import TINY, prepare
from lwzlib.base.quantities import Prompt
from lwzlib.base.recipe import load_recipe
from lwzlib.method import prompts, sft
from lwzlib.method.rewards import FormatReward, LengthReward, whole_completion
from lwzlib.method.text import TAGS, count_words, has_han, parse, shown

ENGLISH, CHINESE = "Write about the rain.", "写一写雨。"
STYLES, WORDINGS = ["think", "direct"], ["full", "brief"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from transformers import AutoTokenizer

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LWZ_CACHE", str(tmp_path_factory.mktemp("cache")))
        return AutoTokenizer.from_pretrained(prepare(TINY))


def _prompt(wording="full", worked_examples=0):
    return Prompt(wording=wording, worked_examples=worked_examples)


def _examples():
    return [pytest.param(language, plan, answer, id=f"{language}{i}")
            for language, examples in prompts.WORKED_EXAMPLES.items() for i, (_, plan, answer) in enumerate(examples)]


@pytest.mark.parametrize("wording", WORDINGS)
@pytest.mark.parametrize("style", STYLES)
def test_a_chinese_query_gets_the_chinese_twin(style, wording):
    english = prompts.render(ENGLISH, style, "plain", _prompt(wording, 2))
    chinese = prompts.render(CHINESE, style, "plain", _prompt(wording, 2))
    mixed = prompts.render("Write about 雨 (rain).", style, "plain", _prompt(wording, 2))
    mixed_chinese = prompts.render("写一篇关于 GPU 的短文。", style, "plain", _prompt(wording, 2))
    assert not has_han(english)
    assert "用户：" in chinese
    assert "User:" not in chinese
    assert "User:" in mixed and "用户：" in mixed_chinese, "the language of most of it"


@pytest.mark.parametrize("wording", WORDINGS)
@pytest.mark.parametrize("query", [ENGLISH, CHINESE])
def test_the_think_prompt_names_all_tags_and_the_direct_one_never_think(query, wording):
    think = prompts.render(query, "think", "plain", _prompt(wording, 2))
    direct = prompts.render(query, "direct", "plain", _prompt(wording, 2))
    assert all(tag in think for tag in TAGS["think"])
    assert all(tag in direct for tag in TAGS["direct"])
    assert "<think>" not in direct
    assert "</think>" not in direct


def test_the_plain_frame_ends_where_the_assistant_begins():
    text = prompts.render(ENGLISH, "think", "plain", _prompt())
    assert text.endswith(f"User: {ENGLISH}\n\nAssistant: ")
    assert prompts.render_bare(ENGLISH, "plain") == f"User: {ENGLISH}\n\nAssistant: "
    assert prompts.render_bare(CHINESE, "plain") == f"用户：{CHINESE}\n\n助手： "


@pytest.mark.parametrize("query", [ENGLISH, CHINESE])
def test_the_brief_wording_is_shorter(query):
    full, brief = (prompts.render(query, "think", "plain", _prompt(wording)) for wording in WORDINGS)
    assert len(brief) < len(full) / 2


@pytest.mark.parametrize("number", [0, 1, 2])
def test_as_many_worked_examples_are_shown_as_asked_for(number):
    text = prompts.render(ENGLISH, "think", "plain", _prompt("brief", number))
    assert [answer in text for _, _, answer in prompts.WORKED_EXAMPLES["en"]] == [i < number for i in range(2)]
    assert text.count("User: ") == number + 1


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(("language", "plan", "answer"), _examples())
def test_worked_examples_are_exact_clean_and_of_the_length_asked_for(language, plan, answer, style):
    text = prompts.wrap(plan, answer, style)
    assert parse(text, style).exact
    assert FormatReward(0.6, 0.05)([text], style=[style]) == [1.0]
    assert 45 <= count_words(answer) <= 80
    assert has_han(answer) == (language == "zh")


def test_worked_examples_are_not_among_the_queries():
    from lwzlib.method.queries import load_queries

    names = [f"kit:{name}{suffix}" for suffix in ("", "_short", "_lengths") for name in ("train", "heldout")]
    shipped = {q.query for name in names for q in load_queries(name)}
    assert not shipped & {query for examples in prompts.WORKED_EXAMPLES.values() for query, _, _ in examples}


def test_the_chat_frame_hands_the_turns_to_the_chat_template(tokenizer):
    (asked, plan, answer), _ = prompts.WORKED_EXAMPLES["en"]
    instruction = prompts.WORDINGS["brief"]["think", "en"]
    text = prompts.render(ENGLISH, "think", "chat", _prompt("brief", 1), tokenizer)
    shown = prompts.wrap(plan, answer, "think")
    turns = [("system", instruction), ("user", asked), ("assistant", shown), ("user", ENGLISH)]
    expected = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)
    assert text == expected + "<|im_start|>assistant\n"


def test_the_bare_chat_frame_has_the_query_alone(tokenizer):
    text = prompts.render_bare(CHINESE, "chat", tokenizer)
    assert text == f"<|im_start|>user\n{CHINESE}<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("query", [ENGLISH, CHINESE])
def test_a_rendered_prompt_survives_the_tokenizer(tokenizer, query):
    text = prompts.render(query, "think", "chat", _prompt("full", 2), tokenizer)
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


@pytest.fixture
def opening_tokenizer(tokenizer):
    """A tokenizer whose chat template opens the plan itself, as those of many reasoning models do."""
    opening = copy.deepcopy(tokenizer)
    opening.chat_template = ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
                             "{% if add_generation_prompt %}assistant: <think>\n{% endif %}")
    return opening


def test_a_prompt_that_opens_the_plan_is_part_of_the_form(opening_tokenizer):
    prompt = prompts.render(ENGLISH, "think", "chat", _prompt(), opening_tokenizer)
    written = "a plan</think>\n<answer>Rain fell.</answer>"
    columns = {"completions": [written], "style": ["think"]}
    assert FormatReward(0.6, 0.05)(**columns, prompts=[prompt]) == [1]
    assert FormatReward(0.6, 0.05)(**columns, prompts=[[{"role": "assistant", "content": prompt}]]) == [1], "as messages too"
    assert FormatReward(0.6, 0.05)(**columns, prompts=[ENGLISH]) == [0]
    assert FormatReward(0.6, 0.05)(["<think>" + written], ["think"], [prompt]) == [0], "a second opening is one too many"
    length = LengthReward(100)
    assert length([written], [(2, 2)], ["think"], [prompt]) == [1]
    assert shown(whole_completion("a plan that never ends", prompt)) == "", "a plan that never ends is no answer"


@pytest.mark.parametrize("style", ["direct", "bare"])
def test_a_prompt_that_wants_no_plan_closes_it(style, opening_tokenizer):
    prompt = (prompts.render(ENGLISH, "direct", "chat", _prompt(), opening_tokenizer) if style == "direct" else
              prompts.render_bare(ENGLISH, "chat", opening_tokenizer))
    assert prompt.endswith("<think>\n\n</think>\n\n") and prompts.opening_of(prompt) == ""


@pytest.mark.parametrize("end", ["", "<think>", "<think>\n", "<think>\n\n", "<answer>", "<answer> "])
@given(plan=st.sampled_from(["", "a plan", "计划"]), answer=st.text(st.characters(exclude_characters="<"), max_size=20))
def test_prompt_and_completion_join_to_one_text_of_the_form(end, plan, answer):
    style = "direct" if "answer" in end else "think"
    completion = prompts.wrap(plan, answer, style)
    after = prompts.after_prompt("User: x " + end, completion)
    joined = end + after
    assert parse(joined, style).exact and parse(joined, style) == parse(completion, style)
    assert parse(whole_completion(after, "User: x " + end), style) == parse(completion, style)


def test_documents_of_sft_have_the_opening_once(opening_tokenizer):
    recipe = load_recipe("smoke", {"model.frame": "chat"})
    row = {"messages": [{"role": "user", "content": ENGLISH}, {"role": "assistant", "content": "Rain fell."}]}
    document = sft._document(recipe, "think", row, "here", opening_tokenizer)
    whole = document["prompt"] + document["completion"]
    assert whole.endswith("assistant: <think>\n</think>\n<answer>Rain fell.</answer>")
