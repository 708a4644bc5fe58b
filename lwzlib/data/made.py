"""Training material that the kit makes itself where the paper's is not public: preference pairs, and long answers for SFT."""

import itertools
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lwzlib.base.quantities import Sampling
from lwzlib.base.recipe import Recipe
from lwzlib.base.rows import read_rows
from lwzlib.base.run_folder import Run
from lwzlib.data.damage import DAMAGES, plain
from lwzlib.data.sources import passages, read_documents
from lwzlib.method import prompts
from lwzlib.method.pairs import Pair, split_by_source
from lwzlib.method.queries import load_queries
from lwzlib.method.sampling import completions
from lwzlib.method.text import count_words, has_han, language_of, split_sentences, whole_sentences

_SEED_OF_PAIRS = 1  # added to the run's seed, so that pairs are not drawn as the cold start draws
_CONTINUE = {"en": "Continue this text.\n\n{}", "zh": "请续写下文。\n\n{}"}
_MENTION = {"en": "{} Mention the word {}.", "zh": "{}文中须提到“{}”。"}
_SHOWN_WORDS = 40  # of the passage that a human text continues
_REQUEST = {
    "en": "Write a passage of about {words} words in the manner of the {name}.",
    "zh": "请仿照{name}的笔法，写一段约{words}字的文字。",
}


@dataclass(frozen=True)
class Original:
    """A text worth preferring, the prompt it answers, and another text of a model for that prompt (or none)."""

    source: str
    prompt: str
    text: str
    human: bool
    alternative: str = ""


def made_pairs(recipe: Recipe, run: Run) -> dict[str, list[Pair]]:
    """{train, heldout} of the stage `writing-rm`, from originals that are split by their source."""
    asked = recipe.writing_rm
    train, heldout = split_by_source(_originals(recipe, run), asked.heldout_share, run.seed)
    return {"train": build_pairs(train, asked.kinds, asked.pairs_per_kind, run.seed),
            "heldout": build_pairs(heldout, asked.kinds, asked.heldout_pairs_per_kind, run.seed)}


def _originals(recipe: Recipe, run: Run) -> list[Original]:
    """Human passages, each with the model's own continuation, and two answers of the model to each of some queries."""
    from lwzlib.base.trainers import load_policy

    asked, seed = recipe.writing_rm, run.seed + _SEED_OF_PAIRS
    model, tokenizer = load_policy(recipe, recipe.model.name, spread=True)
    human = human_originals(asked.corpora, asked.passage_words, asked.passages_per_corpus, seed)
    queries = load_queries(recipe.data.train, recipe.data.languages)[: asked.queries]
    requests = [o.prompt for o in human] + [q.query for q in queries for _ in range(2)]
    sampling = Sampling(temperature=0.8, top_p=0.95, max_new_tokens=asked.answer_tokens)
    framed = [prompts.render_bare(request, recipe.model.frame, tokenizer) for request in requests]
    written = []
    for i, text, *_ in completions(model, tokenizer, framed, sampling, recipe.samples.batch_completions, seed):
        written.append(whole_sentences(text))
        if (i + 1) % recipe.samples.batch_completions == 0 or i + 1 == len(framed):
            print(f"writing-rm: text {i + 1}/{len(framed)} for the pairs", flush=True)
    found = [Original(o.source, o.prompt, o.text, True, text) for o, text in zip(human, written, strict=False)]
    answers = written[len(human) :]
    return found + [Original(query.id, query.query, answers[2 * i + k], False, answers[2 * i + 1 - k])
                    for i, query in enumerate(queries) for k in (0, 1)]


def human_originals(sources: Iterable[str], passage_words: int, most: int, seed: int) -> list[Original]:
    """At most `most` passages of each corpus, each with the end of the passage before it as its prompt."""
    found = []
    for source in sources:
        own = []
        for document in read_documents(source):
            for before, text in itertools.pairwise(passages(document, passage_words)):
                prompt = _CONTINUE[document.language].format(_tail(before))
                own.append(Original(document.id, prompt, text, human=True))
        found += random.Random(seed).sample(own, min(most, len(own)))
    return found


def _tail(text: str) -> str:
    if has_han(text):
        return text[-2 * _SHOWN_WORDS :]
    return " ".join(text.split()[-_SHOWN_WORDS:])


def _damageable(text: str) -> bool:
    return len(set(split_sentences(text))) >= 3


def _damaged(name):
    def make(original, rng, other):
        if not (_damageable(original.text) and _damageable(other.text)):
            return None
        return original.prompt, plain(original.text), DAMAGES[name](original.text, rng, other.text)

    return make


def _human_model(original, rng, other):
    usable = original.human and original.alternative
    return (original.prompt, " ".join(original.text.split()), original.alternative) if usable else None


def _requirement(original, rng, other):
    """The query, with a word asked for that the text has and the alternative has not; the text was not written for it,
    so that nothing but the requirement tells the two apart."""
    if original.human or not original.alternative:
        return None
    language = language_of(original.text)
    pattern = r"[\u4e00-\u9fff]{2}" if language == "zh" else r"\b[a-z]{6,}\b"
    missing = sorted(set(re.findall(pattern, original.text)) - set(re.findall(pattern, original.alternative)))
    missing = [word for word in missing if word not in f"{original.prompt} {original.alternative}".lower()]
    if not missing:
        return None
    return _MENTION[language].format(original.prompt, rng.choice(missing)), original.text, original.alternative


KINDS = {name: _damaged(name) for name in DAMAGES} | {"human_model": _human_model, "requirement": _requirement}


def build_pairs(originals: list[Original], kinds: Sequence[str], per_kind: int, seed: int) -> list[Pair]:
    """At most `per_kind` pairs of each kind, spread over the originals, human and model-written in turn; each original
    gives at most one pair a kind."""
    rng = random.Random(seed)
    pairs = []
    for kind in kinds:
        human, written = ([o for o in originals if o.human == is_human] for is_human in (True, False))
        turns = itertools.zip_longest(*(rng.sample(some, len(some)) for some in (human, written)))
        ordered, found = [o for turn in turns for o in turn if o], []
        for original in ordered:
            others = [o for o in originals if o.source != original.source and has_han(o.text) == has_han(original.text)]
            usable = len(found) < per_kind and (others or kind not in DAMAGES)
            made = KINDS[kind](original, rng, rng.choice(others or [original])) if usable else None
            if made and made[1] != made[2]:
                found.append(Pair(prompt=made[0], chosen=made[1], rejected=made[2], source=original.source, kind=kind))
        pairs += found
    return pairs


def made_answers(recipe: Recipe, seed: int, distilled: Path) -> list[dict]:
    """`messages` and where they come from: the arm's best answers, then human passages of a length it could write."""
    rows = [_row(row["query"], row["answer"], row["id"]) for row in read_rows(distilled / "documents.jsonl")
            if row["answer"]]
    passages = [(document.id, passage) for source in recipe.corpus.sources if source.language in recipe.data.languages
                for document in read_documents(source.at)
                for passage in passages(document, recipe.writing_rm.passage_words)[:4]]
    chosen = random.Random(seed).sample(passages, min(recipe.sft.human_passages, len(passages)))
    for name, passage in chosen:
        language = language_of(passage)
        source = name.removeprefix("kit:").replace("/", ", ").replace("-", " ")
        rows.append(_row(_REQUEST[language].format(words=round(count_words(passage), -1), name=source), passage, name))
    return rows


def _row(query: str, answer: str, source: str) -> dict:
    return {"messages": [{"role": "user", "content": query}, {"role": "assistant", "content": answer}], "source": source}
