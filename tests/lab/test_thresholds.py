"""The data behind the thresholds of repetition: honest and repeated texts, and the scores of their units."""

import hashlib

import numpy as np
import pytest

from lwzlib.base.kit import SHAKESPEARE, THREE_KINGDOMS, is_prepared
from lwzlib.data.sources import read_documents
from lwzlib.lab import thresholds
from lwzlib.method.overlap import find_overlap
from lwzlib.method.rewards import FormatReward
from lwzlib.method.text import count_passages, count_words

KINDS = {"copied", "reworded", "templated", "paraphrased by hand"}


def _encode(texts):
    """Unit vectors that only equal texts share."""
    drawn = [np.random.default_rng(int(hashlib.sha256(t.encode()).hexdigest()[:8], 16)).normal(size=64) for t in texts]
    return np.array([each / np.linalg.norm(each) for each in drawn], dtype=np.float32)


@pytest.fixture(scope="module")
def honest():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(thresholds, "CORPORA", {"kit:python-docs": 2} | {
            name: 1 for name in (SHAKESPEARE, THREE_KINGDOMS) if is_prepared(name)})
        return thresholds.honest(700)


@pytest.fixture(scope="module")
def plain(honest):
    return [text for text in honest if text["kind"] == "plain"]


@pytest.fixture(scope="module")
def repeated(honest):
    return thresholds.repeated(honest, seed=3, times=2)


def test_honest_texts_are_long_ones_of_people_and_some_that_repeat_by_nature(honest, plain):
    assert 2 <= len(plain) <= 4 and len({text["id"] for text in honest}) == len(honest)
    for text in plain:
        total, last = count_words(text["text"]), count_passages(text["text"])[-1][1]
        assert total - last < 700 <= total, "cut at the sentence that brings it to the length"
        assert text["language"] == ("zh" if THREE_KINGDOMS in text["id"] else "en")
    natural = [text for text in honest if text["kind"] != "plain"]
    assert {text["language"] for text in natural} == {"en", "zh"} and len({text["kind"] for text in natural}) >= 3


def test_the_longest_documents_are_taken(plain):
    sizes = {name: sum(map(count_words, paragraphs)) for name, paragraphs in read_documents("kit:python-docs")}
    taken = [text["id"] for text in plain if text["id"] in sizes]
    assert taken == sorted(sizes, key=lambda name: -sizes[name])[:2]


def test_each_plain_text_is_repeated_in_each_way(plain, repeated):
    assert [(r["id"], r["kind"]) for r in repeated] == [
        (text["id"], kind) for text in plain for _ in range(2)
        for kind in ("copied", "reworded", "templated", "paraphrased by hand")]
    by_id = {text["id"]: text for text in plain}
    for row in repeated:
        text = by_id[row["id"]]["text"]
        assert (row["language"], row["text"]) == (by_id[row["id"]]["language"], text)
        stands_there = "".join(row["added"].split()) in "".join(text.split())
        assert count_words(row["added"]) >= 5 and stands_there == (row["kind"] == "copied")
        assert bool(row["before"]) == (row["kind"] in ("templated", "paraphrased by hand")), "what is repeated stands there"
        assert row["before"] not in text or not row["before"]


def test_the_seed_decides_what_is_repeated(plain):
    assert thresholds.repeated(plain, 1, 1) == thresholds.repeated(plain, 1, 1) != thresholds.repeated(plain, 2, 1)


def test_scores_of_honest_texts_have_a_row_for_each_unit_but_the_first(plain):
    found = thresholds.scores(plain, _encode)
    assert found.score.between(-1, 1.0001).all()
    for text in plain:
        own = found[found.id == text["id"]]
        passages = [p for p, _ in count_passages(text["text"])]
        assert (own.signal == "lexical").sum() == len(passages) - 1
        assert (own.signal == "semantic").sum() == (len(thresholds._runs_of(text["text"])) - 1) * (text["language"] == "en")
        flagged = find_overlap(text["text"], 0.6).lexical
        assert set(flagged) <= {i + 1 for i, score in enumerate(own.score[own.signal == "lexical"]) if score >= 0.6}


def test_what_was_copied_scores_1_in_both_signals(repeated):
    found = thresholds.scores(repeated, _encode)
    copied = found[found.kind == "copied"]
    assert (copied.score > 0.9999).all() and set(copied.signal) == {"lexical", "semantic"}
    others = found[found.kind != "copied"].groupby(["kind", "signal"]).score.median()
    assert (others < 0.95).all(), "what is said anew is no copy"
    assert others["templated", "lexical"] > others["paraphrased by hand", "lexical"]
    assert others["reworded", "lexical"] > others["paraphrased by hand", "lexical"]
    assert set(found.kind) == KINDS
    units = found[(found.kind == "reworded") & (found.signal == "semantic")]
    assert len(units) == 2 * sum(text["language"] == "en" for text in repeated) / 8, "one run for each that was added"


def test_what_is_added_is_compared_with_what_stands_before_it():
    text = {"kind": "k", "language": "en", "id": "i", "text": "Rain fell on the old town. Bread rose in the oven. " * 2}
    added = text | {"before": "A train left at six.", "added": "A train left at six."}
    assert thresholds.scores([added], _encode).score.tolist() == pytest.approx([1, 1], abs=1e-6)
    assert thresholds.scores([added | {"before": ""}], _encode).score.max() < 0.5
    assert set(thresholds.scores([text], _encode).signal) == {"lexical"}, "one run has nothing to repeat"


def test_shares_are_those_of_the_reward(honest):
    rewards = {"strict": FormatReward(0.3, 0.0), "usual": FormatReward(0.6, 0.05)}
    found = thresholds.shares(honest, rewards)
    assert list(found.columns) == ["kind", "language", "id", "strict", "usual"]
    assert list(found.id) == [text["id"] for text in honest]
    np.testing.assert_allclose(found.usual, [find_overlap(text["text"], 0.6).share for text in honest])
    assert (found.strict >= found.usual).all() and found.strict.sum() > found.usual.sum()
    assert found.usual[found.kind == "refrain"].max() > 0.1
