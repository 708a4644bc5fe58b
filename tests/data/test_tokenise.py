"""The corpus pipeline: what is left out and why, what stays, and that a kill changes nothing."""

import json
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from killing import killed_then_finished

from lwzlib.base.models import load_tokenizer
from lwzlib.base.recipe import RecipeError, load_recipe
from lwzlib.base.rows import DataError
from lwzlib.data import tokenise
from lwzlib.data.sources import read_texts
from lwzlib.method.queries import load_queries
from lwzlib.pipeline.stages import run_stage

FRENCH = ("La pluie tombe depuis le matin sur les toits de la ville, et les passants pressent le pas sous leurs parapluies. "
          "Au coin de la rue, une vieille dame vend des fleurs et regarde le ciel gris avec patience. ") * 3
CHINESE = "清晨的集市渐渐热闹起来，卖菜的老人把青菜摆得整整齐齐，来往的行人停下脚步，问一问价钱，又慢慢走远了。" * 3


def english(seed, words=120):
    """Sentences that no other seed has: nonsense, but English in its letters and small words."""
    draw = random.Random(seed)
    nouns = ["river", "market", "engine", "garden", "letter", "window", "harbour", "teacher", "violin", "mountain", "lantern"]
    verbs = ["carries", "follows", "remembers", "repairs", "crosses", "watches"]
    sentences = (f"The {draw.choice(nouns)} of the {draw.choice(nouns)} {draw.choice(verbs)} a {draw.choice(nouns)} "
                 f"and then {draw.choice(verbs)} the {draw.choice(nouns)}." for _ in range(words // 15))
    return " ".join(sentences)


def smoke_with(folder, languages=("en",), **more):
    sources = [{"at": str(folder), "language": language, "weight": 1.0} for language in languages]
    return load_recipe("smoke", {"corpus.sources": sources, "corpus.parts": 1, "pretrain.shards": 1} | more)


def prepared(r, root):
    return run_stage("corpus", r, root, 0)


def kept(r, folder, parts=None):
    """The documents as the tokens say them, in order."""
    tokenizer = load_tokenizer(r.model.name)
    texts = []
    for source in range(len(r.corpus.sources)):
        for path in tokenise.token_files(folder, source, parts or r.corpus.parts):
            ends = np.fromfile(f"{path}.index", "<u8").astype(int)
            tokens = np.fromfile(path, f"<u{path.stat().st_size // ends[-1]}") if len(ends) else []
            texts += [tokenizer.decode(tokens[a:b]) for a, b in zip([0, *ends], ends, strict=False)]
    return texts


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "books").mkdir()
    return tmp_path / "books"


def test_each_document_is_left_out_for_its_reason(smoke, folder, tmp_path):
    prompts = [q.query for q in load_queries(smoke.data.heldout) if q.language == "en"]
    prompt, shortest = (choose(prompts, key=lambda text: len(text.split())) for choose in (max, min))
    copied = english(3, 300)
    texts = {"good": english(1), "french": FRENCH, "short": "Too short.", "long": english(2, 9000), "first": copied,
             "second": copied.replace("river", "stream", 1), "chinese": CHINESE, "leak": f"{english(4)} {prompt.upper()}!",
             "short leak": f"{english(6)} {shortest} {english(7)}"}
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text)
    r = smoke_with(folder, **{"corpus.max_words": 5000, "corpus.heldout_share": 0.0})
    found = prepared(r, tmp_path / "run")
    report = json.loads((found / "report.json").read_text())[0]
    assert {name: report[name] for name in ("read", "too_short", "too_long", "other_language", "contaminated", "copies", "kept")
            } == {"read": 9, "too_short": 1, "too_long": 1, "other_language": 2, "contaminated": 2, "copies": 1, "kept": 2}
    stayed = kept(r, found)
    assert sum("<|im_end|>" in text for text in stayed) == 2, "each document ends as a text ends"
    assert {text.removesuffix("<|im_end|>") for text in stayed} <= {texts["good"], texts["first"], texts["second"]}
    assert report["tokens"] == sum(len(load_tokenizer(r.model.name)(t.removesuffix("<|im_end|>")).input_ids) + 1
                                   for t in stayed)


def test_near_copies_are_found_across_sources_and_languages_have_their_own(folder, tmp_path):
    (folder / "a.txt").write_text(CHINESE)
    (folder / "b.txt").write_text(english(5))
    (tmp_path / "again.txt").write_text(english(5) + " The end.")
    r = smoke_with(folder, ("en", "zh"))
    sources = [*r.model_dump()["corpus"]["sources"], {"at": str(tmp_path / "again.txt"), "language": "en", "weight": 1.0}]
    r = load_recipe("smoke", {"corpus.sources": sources, "corpus.parts": 2, "corpus.heldout_share": 0.0})
    rows = json.loads((prepared(r, tmp_path / "run") / "report.json").read_text())
    assert [row["other_language"] for row in rows] == [1, 1, 0]
    assert sum(row["copies"] for row in rows) == 1 and sum(row["kept"] for row in rows) == 2
    rows = [json.loads(line) for path in sorted((tmp_path / "run" / "corpus" / "clean").iterdir()) for line in path.open()]
    # Of the folder's two documents the first source took the English one, the second the Chinese one.
    assert [row["id"].rpartition("/")[2] for row in rows] == ["b", "a", "again"]


def test_held_out_documents_are_not_trained_on(smoke, tmp_path):
    r = load_recipe("smoke", {"corpus.heldout_share": 0.3})
    found = prepared(r, tmp_path)
    held = [json.loads(line) for path in (found / "heldout").glob("*.jsonl") for line in path.open()]
    read = {name for source in r.corpus.sources for name, _ in read_texts(source.at)}
    assert 0.15 * len(read) < len(held) < 0.45 * len(read)
    clean = {json.loads(line)["id"] for path in (found / "clean").glob("*.jsonl") for line in path.open()}
    assert clean and not clean & {row["id"] for row in held}


def test_killed_at_random_moments_gives_the_same_bytes(folder, tmp_path):
    for number in range(60):
        (folder / f"{number:02d}.txt").write_text("\n\n".join(english(number * 100 + p, 400) for p in range(12)))
    r = smoke_with(folder, **{"corpus.parts": 6, "corpus.workers": 2})
    whole = prepared(r, tmp_path / "whole")
    draw = random.Random(11)

    def done(count):
        return lambda run: len(list(run.folder.glob("steps/*/completions/*"))) >= count

    moments = [done(count) for count in sorted(draw.sample(range(1, 22), 3))]
    killed = killed_then_finished("corpus", r, tmp_path / "killed", moments).folder
    files = sorted(path.relative_to(whole) for path in (whole / "tokens").iterdir() if path.suffix in (".ds", ".index"))
    assert len(files) == 12
    assert all((whole / path).read_bytes() == (killed / path).read_bytes() for path in files)
    assert (whole / "report.json").read_bytes() == (killed / "report.json").read_bytes()


@given(st.text(max_size=300))
def test_cleaning_again_changes_nothing(text):
    once = tokenise.clean(text)
    assert tokenise.clean(once) == once


def test_cleaning_takes_out_what_one_cannot_see_and_keeps_paragraphs():
    assert tokenise.clean("A\u200bb\x00c  d\r\n\r\n\n e\u0301 ") == "Abc d\n\n\u00e9"


def test_long_documents_are_signed_in_pieces_as_if_whole(tmp_path):
    sign = tokenise.Signature(str(tmp_path), language=tokenise.Words())
    shingles = np.random.default_rng(0).integers(0, 2**60, (50_001, 1), dtype=np.uint64)
    assert sign.get_signature(shingles) == super(tokenise.Signature, sign).get_signature(shingles)


@pytest.mark.parametrize(("at", "said"), [("missing.jsonl", "no file .*missing.jsonl"), ("missing", "no corpus file .*missing"),
                                            ("empty", "holds no .txt")])
def test_a_source_that_cannot_be_read_is_named(tmp_path, at, said):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=said):
        run_stage("corpus", smoke_with(tmp_path / at), tmp_path / "run", 0)


def test_shards_must_take_whole_parts():
    with pytest.raises(RecipeError, match=r"corpus\.parts = 2 must be a multiple of pretrain\.shards = 3"):
        load_recipe("smoke", "pretrain.shards=3")
