"""Rule rewards on long texts: the kit's LengthReward + FormatReward against the all-pairs way of finding duplicates.

The peer takes the same passages and the same character n-gram sets, and compares every passage with all earlier ones by
Jaccard similarity; no parsing, no word count, no reward. It is timed twice, comparing every pair and stopping at the
first match (the stronger peer on repetitive texts), on fewer completions and scaled up. Texts are random words, so
honest sentences do not repeat. The last table turns the semantic signal on (kit:minilm); its peer embeds each run of
sentences once, in one call, and does nothing else.

    python benchmarks/reward_throughput.py [--quick]
"""

import argparse
import dataclasses
import itertools
import random
import re
import statistics
import time
from pathlib import Path
from pydoc_data.topics import topics

from lwzlib.base.models import embed
from lwzlib.base.provenance import provenance
from lwzlib.base.recipe import load_recipe
from lwzlib.method import overlap, text
from lwzlib.method.rewards import build_rewards

HERE = Path(__file__).resolve().parent
KINDS = ("honest", "one paragraph repeated", "repeated, a word changed per sentence")
ADVERSARIAL = ("combining marks on one letter", "alike sentences of 39 words", "one giant line")
PARAGRAPH_SENTENCES = 6
PEER_COMPLETIONS = 2


def vocabulary(language: str) -> list[str]:
    if language == "en":
        return sorted(set(re.findall(r"\b[a-z]{2,12}\b", " ".join(topics.values()).lower())))
    queries = "".join(file.read_text("utf-8") for file in (HERE.parent / "lwzlib" / "queries").glob("*.jsonl"))
    return sorted(set(re.findall("[\u4e00-\u9fff]", queries)))


def write(language: str, kind: str, words: int, vocab: list[str], rng: random.Random) -> str:
    """A text of exactly `words` words, in sentences of 12 to 20 (the last may be shorter)."""
    paragraph, sentences, left = [], [], words
    while left > 0:
        if kind == KINDS[0] or len(paragraph) < PARAGRAPH_SENTENCES:
            paragraph.append(rng.choices(vocab, k=rng.randint(12, 20)))
        new = list(paragraph[-1] if kind == KINDS[0] else paragraph[len(sentences) % PARAGRAPH_SENTENCES])
        if kind == KINDS[2]:
            new[rng.randrange(len(new))] = rng.choice(vocab)
        sentences.append(new[:left])
        left -= len(sentences[-1])
    space, stop = (" ", ".") if language == "en" else ("", "。")
    return space.join(space.join(s).capitalize() + stop for s in sentences)


def complete(language: str, kind: str, words: int, count: int) -> list[str]:
    vocab, rng = vocabulary(language), random.Random(0)
    return [f"<think>{write(language, KINDS[0], 100, vocab, rng)}</think>"
            f"<answer>{write(language, kind, words, vocab, rng)}</answer>" for _ in range(count)]


def kit_seconds(components: dict, completions: list[str], words: int) -> float:
    ranges, styles = [(int(0.9 * words), int(1.1 * words))] * len(completions), ["think"] * len(completions)
    start = time.perf_counter()
    for reward in components.values():
        reward(completions=completions, word_range=ranges, style=styles)
    return time.perf_counter() - start


def ngrams(passage: str) -> frozenset:
    size = 2 if text.has_han(passage) else 5
    return frozenset(passage[i : i + size] for i in range(max(1, len(passage) - size + 1)))


def all_pairs(plan: str, answer: str, near_duplicate: float, first_only: bool) -> int:
    """The number of passages of the answer that nearly repeat an earlier passage."""
    earlier, own = text.split_passages(plan), text.split_passages(answer)
    grams, repeated = [ngrams(" ".join(passage.lower().split())) for passage in earlier + own], set()
    for i in range(len(earlier), len(grams)):
        for j in range(i):
            shared = len(grams[i] & grams[j])
            if shared >= near_duplicate * (len(grams[i]) + len(grams[j]) - shared):
                repeated.add(i)
                if first_only:
                    break
    return len(repeated)


def compare(components, language, kind, words, count) -> str:
    """A row of the first table."""
    near, completions = components["format"].near_duplicate, complete(language, kind, words, count)
    parsed = [text.parse(c, "think") for c in completions[:PEER_COMPLETIONS]]
    ours, peer = kit_seconds(components, completions, words), []
    for first_only in (False, True):
        start = time.perf_counter()
        theirs = sum(all_pairs(p.plan, p.answer, near, first_only) for p in parsed)
        peer.append((time.perf_counter() - start) * count / len(parsed))
    found = sum(len(overlap.find_overlap(p.answer, near, against=p.plan).lexical) for p in parsed)
    return (f"| {language} | {kind} | {words:,} | {ours:.3g} | {peer[0]:.3g} | {peer[0] / ours:.1f} | {peer[1]:.3g} | "
            f"{peer[1] / ours:.1f} | {found} / {theirs} |")


def growth(components, kind, words) -> float:
    """Microseconds per word of one English completion, the median of three."""
    one = complete("en", kind, words, 1)
    return statistics.median(kit_seconds(components, one, words) for _ in range(3)) * 1e6 / words


def adversarial(kind: str, chars: int) -> str:
    """A completion whose answer is made to be slow: marks, alike sentences, or words without a line's end."""
    rng, vocab = random.Random(0), vocabulary("en")
    if kind == "combining marks on one letter":
        answer = "a" + "\u0301" * (chars // 2) + "\u0323" * (chars // 2)
    elif kind == "alike sentences of 39 words":
        base = rng.choices(vocab, k=39)
        sentences = (" ".join(rng.choice(vocab) if i in changed else word for i, word in enumerate(base)) + ". "
                     for changed in iter(lambda: set(rng.sample(range(39), 12)), None))
        answer = "".join(itertools.islice(sentences, chars // len(" ".join(base))))
    else:
        answer = " ".join(rng.choices(vocab, k=chars // 8))
    return f"<think>A plan.</think><answer>{answer[:chars]}</answer>"


def adversarial_row(components: dict, kind: str, sizes) -> str:
    """A row of the third table: nanoseconds per character at each size, the lowest of three, and its growth."""
    costs = [min(kit_seconds(components, [adversarial(kind, n)], 1000) for _ in range(3)) * 1e9 / n for n in sizes]
    return f"| {kind} | " + " | ".join(f"{cost:.0f}" for cost in costs) + f" | {costs[-1] / costs[0]:.2f} |"


def semantic(components, words, count) -> str:
    """A row of the last table."""
    completions = complete("en", KINDS[0], words, count)
    ours = kit_seconds(components, completions, words)
    counted = [text.count_passages(text.parse(c, "think").answer) for c in completions]
    runs_ = [" ".join(passages[i][0] for i in run) for passages in counted
             for run in overlap.runs_of([count for _, count in passages])]
    start = time.perf_counter()
    embed(runs_, components["format"].encoder)
    alone = time.perf_counter() - start
    return (f"| {words:,} | {count} | {len(runs_):,} | {ours:.3g} | {alone:.3g} | {ours / alone:.2f} | "
            f"{ours * 1e6 / words / count:.0f} |")


def main(quick: bool) -> None:
    both = build_rewards(load_recipe("nano", "reward.length.max_words=100000 reward.weights.writing=0.0"))
    components = both | {"format": dataclasses.replace(both["format"], encoder="")}
    count, words, sizes = (2, 1000, (500, 1000)) if quick else (32, 10_000, (1000, 5000, 10_000, 20_000, 50_000))
    made = provenance()
    versions = ", ".join(f"{name} {made['versions'][name]}" for name in ("torch", "trl", "transformers", "numpy"))
    lines = [
        "# Reward throughput", "", f"{made['hardware']}; {made['started']}; Python {made['python']}, {versions}.", "",
        f"Seconds for {count} completions, one process. All-pairs: timed on {PEER_COMPLETIONS} and scaled to {count}.",
        f"Ratio: all-pairs / kit. Repeated passages: found in those {PEER_COMPLETIONS}, kit / all-pairs.", "",
        "| language | kind | words | kit, s | all-pairs, every pair, s (scaled) | ratio | "
        "all-pairs, stops at first match, s (scaled) | ratio | repeated passages |", "|---|---|" + "--:|" * 7]
    lines += [compare(components, language, kind, words, count) for language in ("en", "zh") for kind in KINDS]
    lines += ["", "Growth of one English completion's time, microseconds per word (median of 3):", "",
              "| words | " + " | ".join(KINDS) + " |", "|--:|" + "--:|" * len(KINDS)]
    lines += [f"| {n:,} | " + " | ".join(f"{growth(components, kind, n):.1f}" for kind in KINDS) + " |" for n in sizes]
    chars = [n * 5 for n in sizes] if quick else [125_000, 250_000, 500_000, 1_000_000]
    lines += ["", "Adversarial texts: nanoseconds per character of one completion (lowest of 3), and their growth.", "",
              "| text | " + " | ".join(f"{n:,} characters" for n in chars) + " | growth |", "|---|" + "--:|" * (len(chars) + 1)]
    lines += [adversarial_row(components, kind, chars) for kind in ADVERSARIAL]
    embed(["warm up"], both["format"].encoder)
    lines += ["", "With the semantic signal, English, honest: length and format rewards against embedding each run once.", "",
              "| words | completions | runs | rewards, s | embedding alone, s | ratio | rewards, microseconds per word |",
              "|--:|--:|--:|--:|--:|--:|--:|"]
    lines += [semantic(both, n, k) for n, k in ([(words, count)] if quick else [(words, count), *((n, 1) for n in sizes)])]
    print("\n".join(lines))
    (HERE / "reward_throughput.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="2 completions of 1,000 words")
    main(parser.parse_args().quick)
