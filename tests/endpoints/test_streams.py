"""A completion that comes in pieces: cut at its tags as a whole one is, wherever the pieces end, and the same text as one that
nobody watched."""

import itertools
import signal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lwzlib.base.kit import TINY, prepare
from lwzlib.base.models import load_model
from lwzlib.base.quantities import Decoding
from lwzlib.endpoints import llm, streams
from lwzlib.endpoints.endpoint import LLMError
from lwzlib.endpoints.llm import Written
from lwzlib.method.prompts import opening_of
from lwzlib.method.sampling import completions
from lwzlib.method.text import TAGS, parse

GREEDY = Decoding(temperature=0.0, top_p=1.0, max_new_tokens=24, stop=["</answer>"])
CHAT = (("user", "Write of rain."),)
SCRAPS = [*TAGS["think"], "<", "</ans", "wer>", "<think", " ", "\n\n", "Rain fell", "雨", "a < b"]
TEXTS = st.lists(st.sampled_from(SCRAPS), max_size=12)


def fed(pieces):
    """(parts, their texts joined) of pieces, as a reader sees them."""
    parts = streams.Parts()
    shown = [one for i, piece in enumerate([*pieces, ""]) for one in parts.feed(piece, last=i == len(pieces))]
    return parts, {part: "".join(text for at, text in shown if at == part) for part in ("plan", "answer", "outside")}


@given(TEXTS, st.lists(st.integers(0, 80), max_size=6))
def test_parts_do_not_depend_on_where_pieces_end_and_are_those_of_the_whole(pieces, cuts):
    whole = "".join(pieces)
    ends = sorted({0, len(whole), *(cut for cut in cuts if cut < len(whole))})
    parts, shown = fed([whole[a:b] for a, b in itertools.pairwise(ends)])
    letters, by_letter = fed(list(whole))
    assert shown == by_letter and parts.text == letters.text == streams.ended(whole)
    parsed = parse(streams.ended(whole), "think")
    assert (shown["plan"], shown["answer"]) == (parsed.plan, parsed.answer)
    assert parts.over == ("</answer>" in whole)


def test_what_is_certain_is_shown_at_once():
    parts = streams.Parts()
    pieces = ("<thi", "nk>\nRain", " and", " <", " 3 ", "</think>\n<answer>", "It", " </ans", "wer> x")
    came = [parts.feed(piece) for piece in pieces]
    assert came == [[], [("plan", "Rain")], [("plan", " and")], [], [("plan", " < 3")], [], [("answer", "It")], [], []]
    assert parts.over and parts.text.endswith("It </answer>")


@pytest.fixture(scope="module")
def tiny():
    prepare(TINY)
    return load_model(TINY, "float32", "sdpa")


@pytest.mark.parametrize("text", ["Rain fell on <", "雨水从天上落下。\n", "User: hm\n\nAssistant: <think>\n"])
@pytest.mark.parametrize("decoding", [GREEDY, Decoding(temperature=2.0, top_p=1.0, max_new_tokens=300, stop=["</answer>"])])
def test_a_model_in_process_shows_the_completion_that_it_gives(tiny, text, decoding):
    pieces = []
    written = streams.in_process(*tiny, text, decoding, 3, pieces.append)
    _, completion, truncated, tokens = next(completions(*tiny, [text], decoding, 1, 3, decoding.stop))
    assert written == Written(completion, "length" if truncated else "stop", tokens)
    assert "".join(pieces) == completion and pieces[0] == opening_of(text)


def test_ctrl_c_stops_a_model_in_process_and_it_writes_again(tiny):
    long = GREEDY.model_copy(update={"temperature": 1.5})
    whole = next(completions(*tiny, ["Rain fell on <"], long, 1, 3))[1]
    pieces = []

    def show(piece):
        pieces.append(piece)
        if sum(map(len, pieces)) > 1:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        streams.in_process(*tiny, "Rain fell on <", long, 3, show)
    assert whole.startswith("".join(pieces))
    assert streams.in_process(*tiny, "Rain fell on <", long, 3, lambda _: False).text == whole


@pytest.fixture
def served(llm_server, monkeypatch):
    """served(turn, prompt, **settings) -> (pieces as they were shown, what was written)."""
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # nobody's: what goes there is lost

    def ask(turn, prompt=CHAT, **settings):
        llm_server.script({"": [turn]})
        given, pieces, parts = llm.configure(**{"base_url": llm_server.url, "model": "m"} | settings), [], streams.Parts()

        def show(piece):
            pieces.append(piece)
            parts.feed(piece)
            return parts.over
        return pieces, streams.from_server(given, prompt, GREEDY, 5, show)
    return ask


def test_a_server_streams_chat_or_completions_and_counts(served, llm_server):
    for prompt, path in ((CHAT, "/v1/chat/completions"), ("User: Write of rain.\n\nAssistant: ", "/v1/completions")):
        pieces, written = served({"pieces": ["Rain ", "fell."]}, prompt)
        assert pieces == ["Rain ", "fell."] and written == Written("Rain fell.", "stop", 3)
        (request,) = llm_server.requests
        assert request["path"] == path
        body = request["body"]
        assert (body["temperature"], body["max_tokens"], body["seed"], body["stream"]) == (0.0, 24, 5, True)
        assert "stop" not in body and "top_k" not in body, "a server would drop the tag, or refuse the field"
    served({"pieces": ["Rain"]}, sampling={"stream_options": None, "top_p": None})
    assert not {"stream_options", "top_p"} & set(llm_server.requests[0]["body"])


def test_a_server_is_left_at_the_end_of_the_answer_though_it_would_never_end(served):
    pieces, written = served({"pieces": ["<answer>Rain", ".</ans", "wer> And"], "end": "never"})
    assert pieces[-1] == "wer> And" and written.finish == "stop"
    assert streams.ended(written.text) == "<answer>Rain.</answer>"


def test_a_server_that_keeps_stop_strings_ends_by_itself_and_counts(served, llm_server):
    _, written = served({"pieces": ["<answer>Rain.</answer>"]}, sampling={"include_stop_str_in_output": True})
    assert written.tokens == 3 and llm_server.requests[0]["body"]["stop"] == ["</answer>"]


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
def test_reasoning_that_a_server_parts_from_the_text_is_the_plan(served, field):
    _, written = served({"pieces": [{field: "A "}, {field: "plan."}, "<answer>", "Rain.</answer>"]})
    assert written.text == "<think>A plan.</think><answer>Rain.</answer>"
    _, written = served({"pieces": [{field: "A "}, {field: "plan"}], "finish": "length"})
    assert written == Written("<think>A plan", "length", 3)
    _, written = served({"pieces": [{field: "A plan", "content": "Rain."}]})
    assert written.text == "<think>A plan</think>Rain."


def test_what_goes_wrong_is_one_error_without_the_key(served, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret-secret")
    with pytest.raises(LLMError, match=r"HTTP 401 .*\*\*\*.* \(the key was taken from OPENAI_API_KEY\)"):
        served({"status": 401, "text": "wrong key: {auth}"})
    with pytest.raises(LLMError, match=r"HTTP 404 .*no such.*; it has m, other"):
        served({"status": 404, "text": "no such"}, model="n")
    with pytest.raises(LLMError, match="the reply broke off: Connection error"):
        served({"pieces": ["<answer>Rain"], "end": "breaks"})
    with pytest.raises(LLMError, match="sent no piece of a text"):
        served({"raw": "data: {}\n\n"})
    with pytest.raises(LLMError, match=r"http://127.0.0.1:9/v1: no reply: Connection error"):
        served({}, base_url="http://127.0.0.1:9/v1")
