"""Make token files from documents: read, clean, filter, take out copies and evaluation prompts, tokenise.

datatrove does the work, in four steps of its own kind: `clean` (read, filter, write, MinHash signatures), `buckets` (alike
signatures), `clusters` (which copies go), `tokens` (what stays, tokenised). Each step is cut into tasks; a task that is
done is not done again, one that was killed begins anew, so the files come out the same. Task `s * parts + p` works on
part p of source s. Departures from datatrove: our own words (a Han character is one), as its word splitters need models.
`packing` makes the shards from the token files.
"""

import hashlib
import json
from collections import Counter
from pathlib import Path

import numpy as np
import regex
from datatrove.data import Document
from datatrove.pipeline import dedup
from datatrove.pipeline.decont.n_grams import NGramsDecontConfig, NGramsDecontFilter
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer
from datatrove.pipeline.writers import JsonlWriter
from datatrove.utils.text import simplify_text
from datatrove.utils.word_tokenizers import WhitespaceTokenizer

from lwzlib.base.models import load_tokenizer
from lwzlib.base.quantities import Corpus
from lwzlib.base.recipe import Recipe
from lwzlib.base.rows import read_json, write_atomic
from lwzlib.base.run_folder import Run
from lwzlib.data.executors import run_tasks
from lwzlib.data.sources import fold_paragraphs, read_texts
from lwzlib.method.queries import load_queries
from lwzlib.method.text import count_words, normalise, split_words

_CONTROL = regex.compile(r"[[\p{Cc}\p{Cf}\p{Co}\p{Cn}]--[\n\t\u200c\u200d]]+", regex.V1)
_SHINGLES_AT_A_TIME = 20_000  # 112 hashes of each are held at once: a book would take gigabytes
_DOCUMENTS_AT_A_TIME = 50  # are tokenised together; datatrove's 10,000 would hold a whole part in memory
_SAMPLE_CHARS = 2_000  # of a document, by which its language is told
REASONS = ("too_short", "too_long", "other_language", "contaminated")  # why a document is left out
_DEDUP = dedup.MinhashConfig()  # 5-grams, 14 buckets of 8 hashes: two texts with Jaccard 0.8 are found in 92% of cases


class Words(WhitespaceTokenizer):
    """The kit's words for datatrove, which knows English and Chinese ones only with models that must be fetched."""

    def word_tokenize(self, text: str) -> list[str]:
        """Words as `text.count_words` counts them; datatrove makes its n-grams of them."""
        return split_words(text)


class Keep(BaseFilter):
    """Documents in the source's language and within the recipe's bounds."""

    name = "keep"

    def __init__(self, corpus: Corpus):
        super().__init__()
        self.languages = [source.language for source in corpus.sources]  # a folder may be named once for each language
        self.min_words, self.max_words = corpus.min_words, corpus.max_words

    def filter(self, document: Document):
        """True, or (False, one of the first three `REASONS`), as datatrove asks of a filter."""
        from py3langid import classify

        words = count_words(document.text)
        if words < self.min_words:
            return False, "too_short"
        if words > self.max_words:
            return False, "too_long"
        language = classify(document.text[:_SAMPLE_CHARS])[0]
        return language == self.languages[document.metadata["source"]] or (False, "other_language")


class Decontaminate(NGramsDecontFilter):
    """Documents that share no run of `words` words with an evaluation prompt; of as many as the shortest prompt has, if that
    is fewer (a prompt of less than five words is not looked for)."""

    name = "decontaminate"

    def __init__(self, prompts: list[str], words: int):
        normal = NGramsDecontConfig().norm_config
        self.prompts = [split_words(simplify_text(prompt, normal)) for prompt in prompts]
        size = min([words, *(len(prompt) for prompt in self.prompts if len(prompt) >= 5)])
        super().__init__(".", NGramsDecontConfig(n_grams=size), language=Words())

    def load_index_hashes(self):
        """Hash the prompts' n-grams; datatrove reads hashes from files here, before the first document."""
        size = self.config.n_grams
        self._index_hashes = {self.hash_func(" ".join(prompt[i : i + size])): "prompt"
                              for prompt in self.prompts for i in range(len(prompt) - size + 1)}


class Signature(dedup.MinhashDedupSignature):
    """datatrove's signatures; a long document is hashed piece by piece."""

    def get_signature(self, shingles: np.ndarray) -> list[list[int]]:
        """14 buckets of 8 hashes, each the minimum over the pieces: the same as of the whole."""
        pieces = range(0, len(shingles), _SHINGLES_AT_A_TIME)
        signatures = [super(Signature, self).get_signature(shingles[i : i + _SHINGLES_AT_A_TIME]) for i in pieces]
        return np.min(signatures, axis=0).tolist()


def clean(text: str) -> str:
    """Text in NFC, without control and invisible characters, in paragraphs of one line with a blank line between."""
    return "\n\n".join(fold_paragraphs(_CONTROL.sub("", normalise("NFC", text))))


def is_held_out(name: str, share: float) -> bool:
    """Whether a document is held out, by the hash of its name: the same documents in every run."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") < share * 2**64


def prepare_corpus(recipe: Recipe, run: Run) -> Path:
    """The stage `corpus`: token files of every source, and the documents held out. Returns its folder, with
    `tokens/<task>_unshuffled.ds` and `.index` (datatrove's form), `heldout/<task>.jsonl`, `tokenizer/`, `report.json`."""
    if run.finished:
        return run.folder
    corpus = recipe.corpus
    with run.work():
        prompts = [query.query for query in load_queries(recipe.data.heldout)]
        filters = [Keep(corpus), Decontaminate(prompts, corpus.decontaminate_words)]
        tokenise(recipe, [source.at for source in corpus.sources], run.folder, filters, corpus.heldout_share)
        rows = report(recipe, run.folder)
        write_atomic(run.folder / "report.json", json.dumps(rows, indent=1))
        run.update(tokens=sum(row["tokens"] for row in rows), documents=sum(row["kept"] for row in rows))
    return run.folder


def tokenise(recipe: Recipe, sources: list[str], folder: Path, filters: list | None = None, heldout_share: float = 0) -> None:
    """Write the token files of `sources` under `folder`. Near copies are sought over all of them: of each cluster one stays.
    Without `filters` the texts are taken as they stand (finished think/answer documents)."""
    parts, tokenizer = recipe.corpus.parts, load_tokenizer(recipe.model.name, recipe.model.trust_remote_code)
    tokenizer.save_pretrained(folder / "tokenizer")
    tasks = len(sources) * parts

    def read(_, rank, world):
        for name, text in read_texts(sources[rank // parts], rank % parts, parts):
            yield Document(clean(text) if filters else text, name, metadata={"source": rank // parts})

    def hold_out(documents, rank, world):
        with (folder / "heldout" / f"{rank:05d}.jsonl").open("w", encoding="utf-8") as file:
            for document in documents:
                if is_held_out(document.id, heldout_share):
                    file.write(json.dumps({"id": document.id, "text": document.text}, ensure_ascii=False) + "\n")
                else:
                    yield document

    def reread(_, rank, world):
        if (folder / "clean" / f"{rank:05d}.jsonl").exists():  # a task that kept nothing wrote nothing
            yield from JsonlReader(str(folder / "clean"), glob_pattern=f"{rank:05d}.jsonl", compression=None)()

    (folder / "heldout").mkdir(parents=True, exist_ok=True)
    signatures, pairs, removed = (str(folder / "dedup" / name) for name in ("signatures", "pairs", "removed"))
    steps = {
        "clean": (tasks, [read, *(filters or []), hold_out,
                          JsonlWriter(str(folder / "clean"), "${rank}.jsonl", compression=None),
                          Signature(signatures, _DEDUP, language=Words())]),
        "buckets": (_DEDUP.num_buckets, [dedup.MinhashDedupBuckets(signatures, pairs, config=_DEDUP)]),
        "clusters": (1, [dedup.MinhashDedupCluster(pairs, removed, config=_DEDUP)]),
        "tokens": (tasks, [reread, dedup.MinhashDedupFilter(removed), DocumentTokenizer(
            str(folder / "tokens"), str(folder / "tokenizer" / "tokenizer.json"), eos_token=tokenizer.eos_token,
            batch_size=_DOCUMENTS_AT_A_TIME, shuffle_documents=False)]),
    }
    for name, (count, pipeline) in steps.items():
        run_tasks(name, count, pipeline, folder / "steps" / name, recipe.corpus)


def token_files(folder: Path, source: int, parts: int) -> list[Path]:
    """Token files of one source, a file a part, as `tokenise` writes them."""
    return [folder / "tokens" / f"{source * parts + part:05d}_unshuffled.ds" for part in range(parts)]


def report(recipe: Recipe, folder: Path) -> list[dict]:
    """A row a source: documents read, left out by reason, held out, copies taken out, kept; tokens kept."""
    rows = []
    for number, source in enumerate(recipe.corpus.sources):
        counts = Counter()
        for task in range(number * recipe.corpus.parts, (number + 1) * recipe.corpus.parts):
            keep, decontaminate, written, _ = _stats(folder, "clean", task)
            copies, tokens = _stats(folder, "tokens", task)
            counts += Counter({"read": keep.get("total", 0), "copies": copies.get("dropped", 0),
                               "kept": copies.get("forwarded", 0), "tokens": tokens.get("tokens", {}).get("total", 0),
                               "held_out": decontaminate.get("forwarded", 0) - written.get("total", 0)})
            counts += Counter({reason: (keep | decontaminate).get(f"dropped_{reason}", 0) for reason in REASONS})
        rows.append({"source": source.at, "language": source.language} | {
            name: counts[name] for name in ("read", *REASONS, "held_out", "copies", "kept", "tokens")})
    return rows


def _stats(folder: Path, step: str, task: int) -> list[dict]:
    """datatrove's counts of a task, one for each part of the step that counts."""
    parts = read_json(folder / "steps" / step / "stats" / f"{task:05d}.json")
    return [part["stats"] for part in parts]
