"""Mix sources by tokens, and pack them into sequences: shards that a trainer reads from disk.

The paper: 30B tokens in packed 32K sequences, 1% of them long chain-of-thought documents. Its mixture is not published.
Documents are cut at the sequence length, drawn in a seeded order by the source that is furthest behind its share, and
packed by TRL (best fit decreasing, document boundaries kept). The share of the chain-of-thought documents is exact by
count of tokens: they stay whole, and the plain tokens are cut to fit them.

A shard is an Arrow file with a row a sequence: `input_ids`, `seq_lengths` (tokens of each document in it, from which
positions restart and attention is kept apart) and `source` (of each document: the number of its source; the last is CoT).
"""

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from lwzlib.base.recipe import Recipe
from lwzlib.base.rows import RunError, sha256
from lwzlib.base.run_folder import Run
from lwzlib.data import tokenise

COT = "cot"
_PACKED_AT_ONCE_TOKENS = 2**22  # memory stays flat; what does not fit a sequence is found room for among these
_SCHEMA = pa.schema([(name, pa.list_(pa.int32())) for name in ("input_ids", "seq_lengths", "source")])
Piece = tuple[int, np.ndarray]  # number of the source, token ids


class Pieces:
    """The documents of one source, cut at `longest` tokens, in a seeded order, again and again; `total` and `drawn` count
    tokens."""

    def __init__(self, files: list[Path], longest: int, seed: int):
        self._tokens, places = [], []  # a place is (file, start, end)
        for path in files:
            ends = np.fromfile(f"{path}.index", dtype="<u8").astype(np.int64)
            self._tokens.append(np.memmap(path, f"<u{path.stat().st_size // ends[-1]}", "r") if len(ends) else None)
            for start, end in itertools.pairwise([0, *ends.tolist()]):
                places += [(len(self._tokens) - 1, cut, min(cut + longest, end)) for cut in range(start, end, longest)]
        self._places = np.array(places, dtype=np.int64).reshape(-1, 3)
        self._order = np.random.default_rng(seed)
        self._queue: list[int] = []
        self.total, self.drawn = int((self._places[:, 2] - self._places[:, 1]).sum()), 0

    def draw(self, at_most: int | None = None) -> np.ndarray:
        """The next piece, cut to `at_most` tokens."""
        if not self._queue:
            self._queue = self._order.permutation(len(self._places)).tolist()
        file, start, end = self._places[self._queue.pop()]
        piece = np.asarray(self._tokens[file][start : end if at_most is None else min(end, start + at_most)], dtype=np.int32)
        self.drawn += len(piece)
        return piece


def pack(recipe: Recipe, run: Run, corpus: Path, cot: Path | None) -> Path:
    """The stage `pack`. Returns its folder: `00000.arrow` ..., and a row a shard in `shards.jsonl`: file, sha256, sequences,
    tokens by source, epochs by source, share of padding. `cot`: a folder with the token files of the chain-of-thought
    documents, or None. A shard that is missing or damaged is made again; one that comes out different raises RunError."""
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
            row = {"step": number, "file": name} | _shard(recipe, run, number - 1, run.folder / name, corpus, cot)
            if number not in broken:
                run.append("shards", row)
            elif row != rows[number]:
                raise RunError(f"{run.folder / name} was made again and came out different: the token files in {corpus} "
                               f"or {cot} were changed after it was first made. Remove {run.folder} to pack them anew")
            print(f"pack: shard {number}/{recipe.pretrain.shards}  {row['sequences']} sequences  "
                  f"padding {row['padding']:.1%}", flush=True)
    return run.folder


def _shard(recipe: Recipe, run: Run, number: int, path: Path, corpus: Path, cot: Path | None) -> dict:
    """Write shard `number`, from every `shards`-th part of each source; returns its row without step and file."""
    settings, sources = recipe.pretrain, recipe.corpus.sources

    def pieces_of(folder: Path, source: int) -> Pieces:
        files = tokenise.token_files(folder, source, recipe.corpus.parts)[number :: settings.shards]
        return Pieces(files, settings.sequence_tokens, run.seed + number)

    pieces = [pieces_of(corpus, source) for source in range(len(sources))]
    for source, own in zip(sources, pieces, strict=True):
        if not own.total:
            raise RunError(f"corpus source {source.at} has no tokens for shard {number}: take fewer pretrain.shards, or give "
                           "it more documents")
    tokens, chain = settings.tokens // settings.shards, []
    if settings.cot_token_fraction and cot:
        cot_pieces = pieces_of(cot, 0)
        chain = _whole(cot_pieces, tokens * settings.cot_token_fraction)
        tokens = round(sum(map(len, chain)) * (1 / settings.cot_token_fraction - 1))
    plans = quotas([source.weight for source in sources], tokens)
    sequences = _write(interleave(pieces, plans, chain), path, settings.sequence_tokens)
    names = [f"{source.at} ({source.language})" for source in sources]
    if chain:
        names, plans, pieces = [*names, COT], [*plans, sum(map(len, chain))], [*pieces, cot_pieces]
    return {"sha256": sha256(path), "sequences": sequences, "tokens": dict(zip(names, plans, strict=True)),
            "epochs": {name: round(own.drawn / own.total, 4) for name, own in zip(names, pieces, strict=True)},
            "padding": round(1 - sum(plans) / (sequences * settings.sequence_tokens), 6)}


def quotas(weights: list[float], tokens: int) -> list[int]:
    """Whole tokens for each source, in proportion to the weights; they sum to `tokens`."""
    ends = np.round(np.cumsum(weights) / sum(weights) * tokens).astype(int)
    return np.diff(ends, prepend=0).tolist()


def _whole(pieces: Pieces, tokens: float) -> list[np.ndarray]:
    """Whole documents whose number of tokens comes nearest to `tokens`: at least one."""
    if not pieces.total:
        raise RunError("there is no chain-of-thought document for a shard: let cot.queries be more, or pretrain.shards fewer")
    documents = [pieces.draw()]
    while (missing := tokens - pieces.drawn) > 0:
        documents.append(pieces.draw())
    if len(documents) > 1 and len(documents[-1]) - missing > missing:
        documents.pop()
    return documents


def interleave(sources: list[Pieces], plans: list[int], chain: list[np.ndarray]) -> Iterator[Piece]:
    """Pieces, always from the source that is furthest behind its plan; the last of each source is cut. `chain` is one more
    source, whose documents stay whole."""
    plans, drawn, left = [*plans, sum(map(len, chain))], [0] * (len(sources) + 1), list(reversed(chain))
    while sum(drawn) < sum(plans):
        number = min((n for n, plan in enumerate(plans) if drawn[n] < plan), key=lambda n: drawn[n] / plans[n])
        tokens = left.pop() if number == len(sources) else sources[number].draw(plans[number] - drawn[number])
        drawn[number] += len(tokens)
        yield number, tokens


def _write(pieces: Iterator[Piece], path: Path, sequence_tokens: int) -> int:
    """Pack and write, a buffer at a time; the file appears when it is whole. Returns the number of sequences."""
    scratch, sequences = path.with_suffix(".part"), 0
    with pa.OSFile(str(scratch), "wb") as file, pa.ipc.new_stream(file, _SCHEMA) as writer:
        for buffer in _buffers(pieces):
            table = _packed(buffer, sequence_tokens).cast(_SCHEMA)
            writer.write_table(table, max_chunksize=1000)
            sequences += len(table)
    scratch.rename(path)
    return sequences


def _buffers(pieces: Iterator[Piece]) -> Iterator[list[Piece]]:
    buffer, held_tokens = [], 0
    for piece in pieces:
        buffer.append(piece)
        held_tokens += len(piece[1])
        if held_tokens >= _PACKED_AT_ONCE_TOKENS:
            yield buffer
            buffer, held_tokens = [], 0
    if buffer:
        yield buffer


def _packed(pieces: list[Piece], sequence_tokens: int) -> pa.Table:
    """Sequences packed by TRL, with the source of each document beside its length."""
    from datasets import Dataset
    from trl import pack_dataset

    numbers, tokens = zip(*pieces, strict=True)
    lengths = list(map(len, tokens))
    ends = np.cumsum([0, *lengths], dtype=np.int32)
    columns = {"input_ids": np.concatenate(tokens), "source": np.repeat(np.array(numbers, dtype=np.int32), lengths)}
    table = pa.table({name: pa.ListArray.from_arrays(ends, pa.array(values)) for name, values in columns.items()})
    packed = pack_dataset(Dataset(table), sequence_tokens, "bfd", {"batch_size": None}).data.table.combine_chunks()
    in_sequence, of_tokens = packed["seq_lengths"].chunk(0), packed["source"].chunk(0)
    starts = np.cumsum(in_sequence.flatten().to_numpy()) - in_sequence.flatten().to_numpy()
    by_document = pa.ListArray.from_arrays(in_sequence.offsets, of_tokens.flatten().take(pa.array(starts)))
    return packed.drop_columns("source").append_column("source", by_document)
