"""Commands about rewards, under `lwz`: score, hacks, judge-quality, serve-rm."""

import math
import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.table import Table

from lwzlib.base.awaited import scores_of
from lwzlib.base.kit import cache
from lwzlib.base.recipe import Recipe, load_recipe
from lwzlib.base.rows import read_text
from lwzlib.cli.options import JUDGE, Overrides, RunDir, Seed, out, recipe_and_folder, resumable
from lwzlib.endpoints.serve_rm import serve_command
from lwzlib.method.text import count_words, parse
from lwzlib.pipeline.stages import writing_judge

app = typer.Typer()

RmFolder = Annotated[str, typer.Option(help="Folder of a trained Writing RM, such as runs/nano/writing-rm/model, or "
                                          "of a public one that was measured, runs/mine/judge.")]


def _judged(recipe: str, writing_rm: str, *overrides) -> Recipe:
    """The recipe with this Writing RM; without one, and if the recipe would train its own, without the writing reward. Always
    without the overlong punishment: these texts have no tokens of a policy."""
    writing = load_recipe(recipe, *overrides).reward.writing
    named = writing_rm or writing.model
    judged: dict = {"reward.weights.writing": 0.0} if named == "stage" else {"reward.writing.model": named}
    if writing_rm and writing.judge != "reward-model":
        judged |= {"reward.writing.judge": "reward-model", "reward.writing.url": ""}
    return load_recipe(recipe, *overrides, judged, {"reward.weights.overlong": 0.0})


@app.command(rich_help_panel=JUDGE)
def score(text: Path, lower: int, upper: int, sets: Overrides = None, recipe: str = "nano",
          style: Literal["think", "direct"] = "think", query: str = "", writing_rm: RmFolder = ""):
    """Compute the rewards of a text in a file.

    Also the passages that repeat; the writing reward if a Writing RM is named."""
    from lwzlib.method.rewards import build_rewards

    loaded = _judged(recipe, writing_rm, sets)
    completion = read_text(text)
    parsed, built = parse(completion, style), build_rewards(loaded, writing_judge(loaded, cache() / "judge"))
    for name, reward in built.items():
        value = scores_of(reward, completions=[completion], style=[style], word_range=[(lower, upper)], query=[query])[0]
        out.print(f"{name:7} {'none' if value is None else f'{value:.3f}'}")
    out.print(f"answer  {count_words(parsed.answer)} words, plan {count_words(parsed.plan)} words, "
              f"form {'exact' if parsed.exact else 'broken'}")
    if "format" not in built:
        return
    overlap = built["format"].overlaps([parsed.answer], [parsed.plan])[0]
    for signal, passages in (("repeats", overlap.lexical), ("restates", overlap.semantic)):
        for later in list(passages)[:10]:
            out.print(f"{signal} {overlap.passages[later][:90]!r}", highlight=False)


@app.command(rich_help_panel=JUDGE)
def hacks(recipe: str = "nano", sets: Overrides = None, writing_rm: RmFolder = "",
          times: Annotated[float, typer.Option(help="Ask for so many times the words that the honest texts have.")] = 1,
          fusions: Annotated[bool, typer.Option("--fusions", help="Only the gains, by each way to combine rewards.")] = False):
    """Attack the rewards, and show which attacks pay.

    Honest text against hacked text, and the advantage that each would get inside an honest group."""
    from lwzlib.lab import fusions as ways
    from lwzlib.lab import hacks as suite
    from lwzlib.method.advantage import Fusion
    from lwzlib.method.rewards import RewardError, build_rewards

    loaded = _judged(recipe, writing_rm, {"reward.length.max_words": round(400 * max(1, times))}, sets)  # the texts: up to 200
    if loaded.reward.by_language_model and loaded.reward.writing.judge == "pairwise":
        raise RewardError("reward.writing.judge = pairwise compares the answers of a group, and an attack needs a score of its "
                          "own: give reward.writing.judge=rubric reward.writing.prompts=kit:rubric")
    built = build_rewards(loaded, writing_judge(loaded, cache() / "judge"))
    weights, among = [getattr(loaded.reward.weights, name) for name in built], suite.asking(times, loaded.data.languages)
    if fusions:
        gains = ways.gains(built, weights, ways.of(loaded), among)
        table = Table("attack", *gains.columns, title=f"recipe {recipe}: gain in advantage over the honest text", box=None)
        for attack, row in gains.iterrows():
            table.add_row(str(attack), *(f"[bold]{text}[/]" if gain > ways.NOTHING else text
                                           for text, gain in zip(map(ways.shown, row), row, strict=True)))
        out.print(table, "Bold: the hacked completion gets more than the honest one it was made from, on average.")
        return
    attacks = suite.attack_table(built, weights, Fusion.of(loaded), among=among)
    names = [*built, "advantage"]
    table = Table("attack", "words", *names, "gain", "wins", title=f"recipe {recipe}: honest>hacked", box=None)
    for row in attacks.to_dict("records"):
        pairs = [f"{row[f'honest_{name}']:.2f}>{row[f'hacked_{name}']:.2f}" for name in names]
        table.add_row(row["attack"], f"{row['words']:.0f}", *pairs, f"{row['difference']:+.2f}", f"{row['wins']:.0%}",
                      style="bold" if row["wins"] else "")
    out.print(table, "Bold: the hacked completion gets more than the honest one it was made from, in some group.")


@app.command(rich_help_panel=JUDGE)
def judge_quality(recipe: str, sets: Overrides = None, seed: Seed = 0, run_dir: RunDir = None):
    """Measure a judge of writing on held-out pairs.

    How often it prefers the better text, by kind of damage, with 95% intervals, beside the judges that were measured in this
    run folder before."""
    from lwzlib.evaluate import judge_quality as quality
    from lwzlib.pipeline.stages import measure_judge

    loaded, folder = recipe_and_folder(recipe, sets, seed, run_dir)
    with resumable():
        measure_judge(loaded, folder, seed)
    judges = {name: found["accuracy"] for name, found in quality.qualities(folder).items()}
    table = Table("kind of pair", *judges, title=f"{folder}: share of pairs in which the better text is preferred", box=None)
    for kind in dict.fromkeys(kind for accuracy in judges.values() for kind in accuracy):
        shares = [accuracy.get(kind, [math.nan] * 4) for accuracy in judges.values()]
        table.add_row(kind, *(f"{share:.2f} [{low:.2f}, {high:.2f}] of {n}" for share, low, high, n in shares))
    out.print(table, "A coin has 0.50. In brackets: Wilson's 95% interval.")


@app.command(rich_help_panel=JUDGE)
def serve_rm(model: Annotated[Path, typer.Argument(help="Folder of a trained Writing RM.")],
             options: Annotated[list[str] | None, typer.Argument(help="Of vLLM: -- --data-parallel-size 2")] = None,
             host: Annotated[str, typer.Option(help="Loopback unless you say otherwise; then set LWZ_RM_TOKEN.")] = "127.0.0.1",
             port: int = 8017, dtype: Annotated[str, typer.Option(help="Default: the recipe's model.dtype.")] = "",
             recipe: Annotated[str, typer.Option(help="For vllm.tensor_parallel and vllm.memory_share.")] = "nano",
             sets: Overrides = None):
    """Serve a Writing RM by vLLM, for reward.writing.url.

    On 4 GPUs: -s vllm.tensor_parallel=4."""
    from lwzlib.base.rm_client import token

    command = serve_command(model, load_recipe(recipe, sets), host, port, dtype, options or [])
    if not token() and host not in ("127.0.0.1", "::1", "localhost"):
        print(f"lwz: {host} is open WITHOUT AUTHENTICATION: whoever reaches it can use it; set LWZ_RM_TOKEN", file=sys.stderr)
    os.execv(command[0], command)
