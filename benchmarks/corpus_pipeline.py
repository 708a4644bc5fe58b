"""The corpus pipeline (read, clean, filter, dedupe, tokenise, mix, pack) against `datasets.map` and TRL's packing.

Both get the same text, tokenizer, sequence length and number of processes. The peer tokenises and packs, no more: it does not
clean, filter, tell languages, look for copies or for evaluation prompts, or mix by weight. Text: documents of about 1,500
words, sentences drawn from the kit's English and Chinese books, one in fifty a near copy of another document.
Memory is the sum over the processes of what they do not share with others (proportional set size), sampled four times a second.

    python benchmarks/corpus_pipeline.py [--megabytes 1000] [--peer-megabytes 200] [--folder /tmp/lwz-corpus]

Stopped at any time, the same command goes on.
"""

import argparse
import itertools
import json
import multiprocessing
import random
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

from lwzlib.base.kit import SHAKESPEARE, SMOLLM2, THREE_KINGDOMS
from lwzlib.base.models import load_tokenizer
from lwzlib.base.provenance import hardware, provenance
from lwzlib.base.recipe import load_recipe
from lwzlib.base.rows import read_rows, write_atomic
from lwzlib.data.sources import read_documents
from lwzlib.method.text import split_sentences
from lwzlib.pipeline.stages import run_stage

HERE = Path(__file__).resolve().parent
FILES, PROCESSES, SEQUENCE_TOKENS = 8, 2, 2048
BOOKS = {"en": (SHAKESPEARE, "kit:python-docs"), "zh": (THREE_KINGDOMS,)}
CHARS = {"en": 8_000, "zh": 2_400}  # of a document: about the same number of bytes


def write_text(folder: Path, megabytes: float) -> None:
    """`<language>/<n>.jsonl`: three quarters of the bytes English, one quarter Chinese."""
    for language, share in (("en", 0.75), ("zh", 0.25)):
        books = itertools.chain.from_iterable(map(read_documents, BOOKS[language]))
        pool = [sentence for _, paragraphs in books for paragraph in paragraphs for sentence in split_sentences(paragraph)]
        (folder / language).mkdir(parents=True, exist_ok=True)
        for number in range(FILES):
            path, draw, size, last = folder / language / f"{number}.jsonl", random.Random(f"{language} {number}"), 0, []
            with path.open("w", encoding="utf-8") as file:
                while size < megabytes * 1e6 * share / FILES:
                    if last and draw.random() < 0.02:
                        last[draw.randrange(len(last))] = draw.choice(pool)  # a near copy
                    else:
                        last, chars = [], 0
                        while chars < CHARS[language]:
                            last.append(draw.choice(pool))
                            chars += len(last[-1])
                    size += file.write(json.dumps({"text": (" " if language == "en" else "").join(last)},
                                                  ensure_ascii=False) + "\n") * (1 if language == "en" else 3)


class Memory(threading.Thread):
    """Peak of this process and all that it started, in GB."""

    def __init__(self):
        super().__init__(daemon=True)
        self.peak, self.stop = 0.0, threading.Event()
        self.start()

    def run(self):
        me = psutil.Process()
        while not self.stop.wait(0.25):
            used = 0
            for process in [me, *me.children(recursive=True)]:
                try:
                    used += process.memory_full_info().pss
                except psutil.Error:
                    continue
            self.peak = max(self.peak, used / 1e9)


def timed(work, *args) -> dict:
    """Seconds, peak GB and what `work` says, in a process of its own, so that memory is its own."""
    def inside(pipe):
        memory, start = Memory(), time.perf_counter()
        said = work(*args)
        memory.stop.set()
        pipe.send({"seconds": round(time.perf_counter() - start, 1), "peak_gb": round(memory.peak, 2)} | said)

    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=inside, args=(theirs,))
    process.start()
    process.join()
    if process.exitcode:
        sys.exit(f"{work.__name__} ended with {process.exitcode}")
    return ours.recv()


def kit(text: Path, out: Path) -> dict:
    size = sum(path.stat().st_size for path in text.rglob("*.jsonl"))
    sources = [{"at": str(text / language), "language": language, "weight": weight}
               for language, weight in (("en", 0.75), ("zh", 0.25))]
    asked = {"corpus.sources": sources, "corpus.parts": FILES, "corpus.workers": PROCESSES, "corpus.heldout_share": 0.001,
             "corpus.max_words": 100_000, "pretrain.shards": FILES, "pretrain.sequence_tokens": SEQUENCE_TOKENS,
             "pretrain.cot_token_fraction": 0.0}
    found = run_stage("corpus", load_recipe("nano", asked), out, 0)
    report = json.loads((found / "report.json").read_text())
    tokens = sum(row["tokens"] for row in report)
    packed = run_stage("pack", load_recipe("nano", asked, {"pretrain.tokens": tokens}), out, 0)
    rows = read_rows(packed / "shards.jsonl")
    made = sum(sum(row["tokens"].values()) for row in rows)
    return {"bytes": size, "tokens": tokens, "copies": sum(row["copies"] for row in report),
            "read": sum(row["read"] for row in report), "packed_tokens": made,
            "padding": 1 - made / sum(row["sequences"] * SEQUENCE_TOKENS for row in rows)}


def peer(text: Path, out: Path) -> dict:
    from datasets import load_dataset
    from trl import pack_dataset

    files = [str(path) for path in sorted(text.rglob("*.jsonl"))]
    tokenizer = load_tokenizer(SMOLLM2)
    end = tokenizer.eos_token
    loaded = load_dataset("json", data_files=files, split="train", cache_dir=str(out))
    tokenised = loaded.map(lambda rows: {"input_ids": tokenizer([t + end for t in rows["text"]]).input_ids}, batched=True,
                           num_proc=PROCESSES, remove_columns=loaded.column_names)
    tokens = sum(len(ids) for batch in tokenised.iter(1000) for ids in batch["input_ids"])
    packed = pack_dataset(tokenised, SEQUENCE_TOKENS, "bfd_split", {"num_proc": PROCESSES})
    return {"bytes": sum(Path(f).stat().st_size for f in files), "tokens": tokens, "read": len(loaded),
            "padding": 1 - tokens / (len(packed) * SEQUENCE_TOKENS)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=1000)
    parser.add_argument("--peer-megabytes", type=float, default=200)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "lwz-corpus")
    asked = parser.parse_args()
    lines = []
    for name, work, megabytes in (("kit, a tenth of the text", kit, asked.megabytes / 10), ("kit", kit, asked.megabytes),
                                  ("datasets.map + TRL", peer, asked.peer_megabytes)):
        text, out = asked.folder / f"text-{megabytes:g}", asked.folder / f"{work.__name__}-{megabytes:g}"
        if not text.exists():
            write_text(asked.folder / "part", megabytes)
            (asked.folder / "part").rename(text)
        record = asked.folder / f"{work.__name__}-{megabytes:g}.json"
        if not record.exists():
            write_atomic(record, json.dumps(timed(work, text, out)))
        found = json.loads(record.read_text())
        lines.append((name, found))
        print(name, found, flush=True)
    table = ["| what | text | tokens | time | tokens/s | padding | peak memory |", "|---|---|---|---|---|---|---|"]
    for name, f in lines:
        table.append(f"| {name} | {f['bytes'] / 1e6:,.0f} MB | {f['tokens']:,} | {f['seconds']:,.0f} s | "
                     f"{f['tokens'] / f['seconds']:,.0f} | {f['padding']:.2%} | {f['peak_gb']:.2f} GB |")
    (_, small), (_, large), (_, other) = lines
    ratio = (large["tokens"] / large["seconds"]) / (other["tokens"] / other["seconds"])
    said = (f"The kit makes {ratio:.2f} times the tokens a second of `datasets.map` and TRL's packing, and cleans, filters, "
            f"dedupes ({large['copies']:,} near copies of {large['read']:,} documents taken out), decontaminates and mixes "
            f"besides. Ten times the text takes {large['peak_gb'] / small['peak_gb']:.2f} times the memory.")
    about = f"{hardware()}, {PROCESSES} processes; commit {provenance()['commit'][:7]}"
    command = f"python benchmarks/corpus_pipeline.py --megabytes {asked.megabytes:g} --peer-megabytes {asked.peer_megabytes:g}"
    page = "\n".join(["# Corpus pipeline", "", f"`{command}`", "", about, "", *table, "", said, ""])
    (HERE / "corpus_pipeline.md").write_text(page)
    print(page)
    shutil.rmtree(asked.folder)


if __name__ == "__main__":
    main()
