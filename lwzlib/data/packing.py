"""Mix sources by tokens, and pack them into sequences: shards that a trainer reads from disk.

The paper: 30B tokens in packed 32K sequences, 1% of them long chain-of-thought documents. Its mixture is not published.
Documents are cut at the sequence length, drawn in a seeded order by the source that is furthest behind its share, and
packed by TRL (best fit decreasing, document boundaries kept). The share of the chain-of-thought documents is exact by
count of tokens: they stay whole, and the plain tokens are cut to fit them.

A shard is an Arrow file with a row a sequence: `input_ids`, `seq_lengths` (tokens of each document in it, from which
positions restart and attention is kept apart) and `source` (of each document: the number of its source; the last is CoT).
"""

import hashlib
import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from lwzlib.base.recipe import Recipe
from lwzlib.base.rows import RunError
from lwzlib.base.run_folder import Run
from lwzlib.data import tokenise

COT = "cot"
_PACKED_AT_ONCE_TOKENS = 2**22  # memory stays flat; what does not fit a sequence is found room for among these


class Pieces:
    """The documents of one source, cut at `longest` tokens, in a seeded order, again and again.

    `total` and `drawn` count tokens.
    """

    def __init__(self, files: list[Path], longest: int, bytes_per_token: int, seed: int):
        self._tokens, found = [], []
        for path in files:
            ends = np.fromfile(f"{path}.index", dtype="<u8").astype(np.int64)
            self._tokens.append(np.memmap(path, f"<u{bytes_per_token}", "r") if len(ends) else None)
            for start, end in itertools.pairwise([0, *ends.tolist()]):
                found += [(len(self._tokens) - 1, cut, min(cut + longest, end)) for cut in range(start, end, longest)]
        self._places = np.array(found, dtype=np.int64).reshape(-1, 3)
        self._order = np.random.default_rng(seed)
        self._queue: list[int] = []
        self.total, self.drawn = int((self._places[:, 2] - self._places[:, 1]).sum()), 0

    @property
    def epochs(self) -> float:
        """How often the source was gone through; 0 for one without tokens."""
        return self.drawn / self.total if self.total else 0.0

    def draw(self, at_most: int | None = None) -> np.ndarray:
        """The next piece, cut to `at_most` tokens."""
        if not self._queue:
            self._queue = self._order.permutation(len(self._places)).tolist()
        file, start, end = self._places[self._queue.pop()]
        piece = np.asarray(self._tokens[file][start : end if at_most is None else min(end, start + at_most)], dtype=np.int32)
        self.drawn += len(piece)
        return piece


def pack(recipe: Recipe, run: Run, corpus: Path, cot: Path | None) -> Path:
    """The stage `pack`. Returns its folder: `00000.arrow` ..., and a row a shard in `shards.jsonl`: file, sha256,
    sequences, tokens by source, epochs by source, share of padding.

    A shard that is missing or damaged is named and made again; one that then comes out different raises RunError.
    `cot`: a folder with the token files of the chain-of-thought documents; None where the recipe wants none.
    """
    rows = {row["step"]: row for row in run.rows("shards")}
    broken = [number for number, row in rows.items() if sha256(run.folder / row["file"]) != row["sha256"]]
    if run.finished and not broken:
        return run.folder
    with run.work():
        run.rewind(len(rows), "shards")
        for number in range(1, recipe.pretrain.shards + 1):
            name = f"{number - 1:05d}.arrow"
            if number in broken:
                print(f"pack: {run.folder / name} is damaged or missing; it is made again", flush=True)
            elif number in rows:
                continue
            made = {"step": number, "file": name} | _shard(recipe, run, number - 1, run.folder / name, corpus, cot)
            if number in broken and made != rows[number]:
                raise RunError(f"{run.folder / name} was made again and came out different: the token files in {corpus} "
                               f"or {cot} were changed after it was first made. Remove {run.folder} to pack them anew")
            if number not in broken:
                run.append("shards", made)
            print(f"pack: shard {number}/{recipe.pretrain.shards}  {made['sequences']} sequences  "
                  f"padding {made['padding']:.1%}", flush=True)
    return run.folder


def sha256(path: Path) -> str:
    """Of a file; empty if there is none."""
    if not path.exists():
        return ""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _shard(recipe: Recipe, run: Run, number: int, path: Path, corpus: Path, cot: Path | None) -> dict:
    asked, parts = recipe.pretrain, range(number, recipe.corpus.parts, recipe.pretrain.shards)
    size = tokenise.bytes_per_token(corpus)
    sources = [Pieces([tokenise.token_files(corpus, s, recipe.corpus.parts)[p] for p in parts], asked.sequence_tokens, size,
                      run.seed + number) for s in range(len(recipe.corpus.sources))]
    if empty := [source.at for source, pieces in zip(recipe.corpus.sources, sources, strict=True) if not pieces.total]:
        raise RunError(f"corpus source {empty[0]} has no tokens for shard {number}: take fewer pretrain.shards, or give it "
                       "more documents")
    plans = quotas([source.weight for source in recipe.corpus.sources], asked.tokens // asked.shards)
    chain = []
    if asked.cot_token_fraction and cot:
        pieces = Pieces([tokenise.token_files(cot, 0, recipe.corpus.parts)[p] for p in parts], asked.sequence_tokens, size,
                        run.seed + number)
        chain = _whole(pieces, asked.tokens // asked.shards * asked.cot_token_fraction)
        plain = round(sum(map(len, chain)) * (1 / asked.cot_token_fraction - 1))
        plans = quotas([source.weight for source in recipe.corpus.sources], plain)
    documents = interleave(sources, plans, chain)
    sequences = _write(documents, path, asked.sequence_tokens)
    names = [f"{source.at} ({source.language})" for source in recipe.corpus.sources]
    tokens = dict(zip(names, plans, strict=True)) | ({COT: sum(map(len, chain))} if chain else {})
    gone_through = [*sources, *([pieces] if chain else [])]
    epochs = dict(zip(tokens, (round(source.epochs, 4) for source in gone_through), strict=True))
    return {"sha256": sha256(path), "sequences": sequences, "tokens": tokens, "epochs": epochs,
            "padding": round(1 - sum(tokens.values()) / (sequences * asked.sequence_tokens), 6)}


def quotas(weights: list[float], tokens: int) -> list[int]:
    """Whole tokens for each source, in proportion to the weights; they sum to `tokens`."""
    ends = np.round(np.cumsum(weights) / sum(weights) * tokens).astype(int)
    return np.diff(ends, prepend=0).tolist()


def _whole(pieces: Pieces, tokens: float) -> list[np.ndarray]:
    """Whole documents whose number of tokens comes nearest to `tokens`: at least one."""
    if not pieces.total:
        raise RunError("there is no chain-of-thought document for a shard: let cot.queries be more, or pretrain.shards fewer")
    taken = [pieces.draw()]
    while (missing := tokens - pieces.drawn) > 0:
        taken.append(pieces.draw())
    if len(taken) > 1 and len(taken[-1]) - missing > missing:
        taken.pop()
    return taken


def interleave(sources: list[Pieces], plans: list[int], chain: list[np.ndarray]) -> Iterator[tuple[int, np.ndarray]]:
    """(number of the source, tokens): always from the source that is furthest behind its plan; the last of each is cut."""
    drawn, left = [0] * (len(sources) + 1), list(reversed(chain))
    plans = [*plans, sum(map(len, chain))]
    while sum(drawn) < sum(plans):
        number = min((n for n, plan in enumerate(plans) if drawn[n] < plan), key=lambda n: drawn[n] / plans[n])
        piece = left.pop() if number == len(sources) else sources[number].draw(plans[number] - drawn[number])
        drawn[number] += len(piece)
        yield number, piece


def _write(documents: Iterator[tuple[int, np.ndarray]], path: Path, sequence_tokens: int) -> int:
    """Pack and write, a buffer at a time; the file appears when it is whole. Returns the number of sequences."""
    scratch, sequences = path.with_suffix(".part"), 0
    schema = pa.schema([("input_ids", pa.list_(pa.int32())), ("seq_lengths", pa.list_(pa.int32())),
                        ("source", pa.list_(pa.int32()))])
    with pa.OSFile(str(scratch), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for buffer in _buffers(documents):
            table = _packed(buffer, sequence_tokens).cast(schema)
            writer.write_table(table, max_chunksize=1000)
            sequences += len(table)
    scratch.rename(path)
    return sequences


def _buffers(documents) -> Iterator[list]:
    buffer, held = [], 0
    for document in documents:
        buffer.append(document)
        held += len(document[1])
        if held >= _PACKED_AT_ONCE_TOKENS:
            yield buffer
            buffer, held = [], 0
    if buffer:
        yield buffer


def _packed(documents: list[tuple[int, np.ndarray]], sequence_tokens: int) -> pa.Table:
    """Packed by TRL, with the source of each document beside its length."""
    from datasets import Dataset
    from trl import pack_dataset

    lengths = [len(tokens) for _, tokens in documents]
    ends = np.cumsum([0, *lengths], dtype=np.int32)
    flat = {"input_ids": np.concatenate([tokens for _, tokens in documents]),
            "source": np.repeat(np.array([number for number, _ in documents], dtype=np.int32), lengths)}
    table = pa.table({name: pa.ListArray.from_arrays(ends, pa.array(values)) for name, values in flat.items()})
    packed = pack_dataset(Dataset(table), sequence_tokens, "bfd", {"batch_size": None}).data.table.combine_chunks()
    in_sequence, of_tokens = (packed[name].chunk(0) for name in ("seq_lengths", "source"))
    starts = np.cumsum(in_sequence.flatten().to_numpy()) - in_sequence.flatten().to_numpy()
    by_document = pa.ListArray.from_arrays(in_sequence.offsets, of_tokens.flatten().take(pa.array(starts)))
    return packed.drop_columns("source").append_column("source", by_document)
