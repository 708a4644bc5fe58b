"""Training material that the kit makes itself where the paper's is not public: preference pairs, and long answers for SFT."""

import functools
import itertools
import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from lwzlib.base.quantities import Sampling
from lwzlib.base.recipe import Recipe
from lwzlib.base.rows import read_rows
from lwzlib.base.run_folder import Run
from lwzlib.data.damage import DAMAGES, plain, wordings
from lwzlib.data.sources import passages, read_documents
from lwzlib.method import prompts
from lwzlib.method.pairs import Pair, is_tie, split_by_source
from lwzlib.method.queries import load_queries
from lwzlib.method.sampling import completions
from lwzlib.method.text import count_words, language_of, split_sentences, whole_sentences

_SHOWN_WORDS = 40  # of the passage that a human text continues
_PASSAGES_PER_DOCUMENT = 4  # that SFT learns from
_WORD = {"en": r"\b[a-z]{6,}\b", "zh": r"[\u4e00-\u9fff]{2}"}
Texts = tuple[str, str, str] | None  # prompt, chosen, rejected; None where an original gives no such pair


@dataclass(frozen=True)
class Original:
    """A text worth preferring, the prompt it answers, and another text of a model for that prompt (or none)."""

    source: str
    prompt: str
    text: str
    human: bool
    alternative: str = ""

    @functools.cached_property
    def language(self) -> str:
        """Language of the text, `en` or `zh`."""
        return language_of(self.text)


def made_pairs(recipe: Recipe, run: Run) -> tuple[list[Pair], list[Pair]]:
    """(training pairs, held-out pairs) from originals that are split by their source."""
    settings = recipe.writing_rm
    train, heldout = split_by_source(_originals(recipe, run), settings.heldout_share, run.seed)
    return (build_pairs(train, settings.kinds, settings.pairs_per_kind, run.seed, settings.fold_layout),
            build_pairs(heldout, settings.kinds, settings.heldout_pairs_per_kind, run.seed, settings.fold_layout))


def _originals(recipe: Recipe, run: Run) -> list[Original]:
    """Human passages, each with the model's own continuation, and two answers of the model to each of some queries."""
    from lwzlib.base.trainers import load_policy

    settings, batch = recipe.writing_rm, recipe.samples.batch_completions
    seed = run.seed + 1  # else the pairs are drawn as the cold start draws
    model, tokenizer = load_policy(recipe, recipe.model.name, spread=True)
    human = human_originals(settings.corpora, settings.passage_words, settings.passages_per_corpus, seed)
    queries = load_queries(recipe.data.train, recipe.data.languages)[: settings.queries]
    requests = [original.prompt for original in human] + [query.query for query in queries for _ in range(2)]
    framed = [prompts.render_bare(request, recipe.model.frame, tokenizer) for request in requests]
    sampling = Sampling(temperature=0.8, top_p=0.95, max_new_tokens=settings.answer_tokens)
    texts = []
    for i, text, *_ in completions(model, tokenizer, framed, sampling, batch, seed):
        texts.append(whole_sentences(text))
        if (i + 1) % batch == 0 or i + 1 == len(framed):
            print(f"pairs: text {i + 1}/{len(framed)} for the pairs", flush=True)
    originals = [Original(o.source, o.prompt, o.text, True, text) for o, text in zip(human, texts, strict=False)]
    answers = iter(texts[len(human) :])
    for query, one, other in zip(queries, answers, answers, strict=True):
        originals += [Original(query.id, query.query, one, False, other), Original(query.id, query.query, other, False, one)]
    return originals


def human_originals(sources: Iterable[str], passage_words: int, most: int, seed: int) -> list[Original]:
    """At most `most` passages of each corpus, each with the end of the passage before it as its prompt."""
    originals = []
    for source in sources:
        candidates = []
        for name, paragraphs in read_documents(source):
            request = wordings(language_of(paragraphs[0]))["requests"]["continue"]
            for before, text in itertools.pairwise(passages(paragraphs, passage_words)):
                shown = before[-2 * _SHOWN_WORDS :] if language_of(before) == "zh" else " ".join(before.split()[-_SHOWN_WORDS:])
                candidates.append(Original(name, request.format(shown), text, human=True))
        originals += random.Random(seed).sample(candidates, min(most, len(candidates)))
    return originals


def build_pairs(originals: list[Original], kinds: Sequence[str], per_kind: int, seed: int,
                fold_layout: bool = False) -> list[Pair]:
    """At most `per_kind` pairs of each kind, none a tie, spread over the originals, human and model-written in turn; each
    original gives at most one pair a kind."""
    rng, pairs = random.Random(seed), []
    for kind in kinds:
        built = []
        for original in _in_turn(originals, rng):
            if len(built) == per_kind:
                break
            others = [o for o in originals if o.source != original.source and o.language == original.language]
            if others or kind not in DAMAGES:
                texts = KINDS[kind](original, rng, rng.choice(others or [original]))
                if texts and not is_tie(texts[1], texts[2], fold_layout):
                    prompt, chosen, rejected = texts
                    built.append(Pair(prompt=prompt, chosen=chosen, rejected=rejected, source=original.source, kind=kind))
        pairs += built
    return pairs


def _in_turn(originals: list[Original], rng: random.Random) -> list[Original]:
    """The originals in a random order: human and model-written in turn, then the rest of the larger group."""
    human = [original for original in originals if original.human]
    written = [original for original in originals if not original.human]
    turns = itertools.zip_longest(rng.sample(human, len(human)), rng.sample(written, len(written)))
    return [original for turn in turns for original in turn if original]


def _damaged(damage: Callable, original: Original, rng: random.Random, other: Original) -> Texts:
    if any(len(set(split_sentences(text))) < 3 for text in (original.text, other.text)):
        return None
    return original.prompt, plain(original.text), damage(original.text, rng, other.text)


def _human_model(original: Original, rng: random.Random, other: Original) -> Texts:
    usable = original.human and original.alternative
    return (original.prompt, " ".join(original.text.split()), original.alternative) if usable else None


def _requirement(original: Original, rng: random.Random, other: Original) -> Texts:
    """The query, with a word required that the text has and the alternative has not; the text was not written for it, so that
    nothing but the requirement tells the two apart."""
    if original.human or not original.alternative:
        return None
    language, known = original.language, f"{original.prompt} {original.alternative}".lower()
    own = set(re.findall(_WORD[language], original.text)) - set(re.findall(_WORD[language], original.alternative))
    missing = [word for word in sorted(own) if word not in known]
    if not missing:
        return None
    request = wordings(language)["requests"]["mention"].format(original.prompt, rng.choice(missing))
    return request, original.text, original.alternative


KINDS: dict[str, Callable[[Original, random.Random, Original], Texts]] = {
    name: partial(_damaged, damage) for name, damage in DAMAGES.items()} | {
    "human_model": _human_model, "requirement": _requirement}


def made_answers(recipe: Recipe, seed: int, distilled: Path) -> list[dict]:
    """{messages, source}: the distilled arm's best answers, then human passages of a length it could write, with a request."""
    rows = [_conversation(row["query"], row["answer"], row["id"])
            for row in read_rows(distilled / "documents.jsonl") if row["answer"]]
    sources, candidates = [source.at for source in recipe.corpus.sources if source.language in recipe.data.languages], []
    for name, paragraphs in itertools.chain.from_iterable(map(read_documents, sources)):
        first = passages(paragraphs, recipe.writing_rm.passage_words)[:_PASSAGES_PER_DOCUMENT]
        candidates += [(name, passage) for passage in first]
    for name, passage in random.Random(seed).sample(candidates, min(recipe.sft.human_passages, len(candidates))):
        manner = name.removeprefix("kit:").replace("/", ", ").replace("-", " ")
        request = wordings(language_of(passage))["requests"]["imitate"]
        request = request.format(words=round(count_words(passage), -1), name=manner)
        rows.append(_conversation(request, passage, name))
    return rows


def _conversation(query: str, answer: str, source: str) -> dict:
    return {"messages": [{"role": "user", "content": query}, {"role": "assistant", "content": answer}], "source": source}
