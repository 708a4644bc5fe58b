"""Commands about rewards, under `lwz`: score, hacks, serve-rm."""

import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.table import Table

from lwzlib.base.recipe import Recipe, load_recipe
from lwzlib.cli.options import Overrides, out
from lwzlib.endpoints.serve_rm import serve_command
from lwzlib.method.text import count_words, parse

app = typer.Typer()

RmFolder = Annotated[str, typer.Option(help="Folder of a trained Writing RM, such as runs/nano/writing-rm/model.")]


def _judged(recipe: str, writing_rm: str, *overrides) -> Recipe:
    """The recipe with this Writing RM; without one, and if the recipe would train its own, without the writing reward."""
    named = writing_rm or load_recipe(recipe, *overrides).reward.writing.model
    judged = {"reward.weights.writing": 0.0} if named == "stage" else {"reward.writing.model": named}
    return load_recipe(recipe, *overrides, judged)


@app.command()
def score(text: Path, lower: int, upper: int, sets: Overrides = None, recipe: str = "nano",
          style: Literal["think", "direct"] = "think", query: str = "", writing_rm: RmFolder = ""):
    """Rewards of a completion in a file, and the passages that repeat; the writing reward if a Writing RM is named."""
    from lwzlib.method.rewards import build_rewards

    loaded = _judged(recipe, writing_rm, sets)
    completion = text.read_text(encoding="utf-8", errors="replace")
    parsed, built = parse(completion, style), build_rewards(loaded)
    for name, reward in built.items():
        value = reward([completion], style=[style], word_range=[(lower, upper)], query=[query])[0]
        out.print(f"{name:7} {value:.3f}")
    out.print(f"answer  {count_words(parsed.answer)} words, plan {count_words(parsed.plan)} words, "
              f"form {'exact' if parsed.exact else 'broken'}")
    if "format" not in built:
        return
    overlap = built["format"].overlaps([parsed.answer], [parsed.plan])[0]
    for signal, passages in (("repeats", overlap.lexical), ("restates", overlap.semantic)):
        for later in list(passages)[:10]:
            out.print(f"{signal} {overlap.passages[later][:90]!r}", highlight=False)


@app.command()
def hacks(recipe: str = "nano", sets: Overrides = None, writing_rm: RmFolder = "",
          times: Annotated[float, typer.Option(help="Ask for so many times the words that the honest texts have.")] = 1):
    """Attacks on the rewards: honest against hacked, and the advantage that each would get inside an honest group."""
    from lwzlib.lab import hacks as suite
    from lwzlib.method.rewards import build_rewards

    loaded = _judged(recipe, writing_rm, {"reward.length.max_words": round(400 * max(1, times))}, sets)  # the texts: up to 200
    built = build_rewards(loaded)
    attacks = suite.attack_table(built, [getattr(loaded.reward.weights, name) for name in built], loaded.grpo.advantage,
                                 among=suite.asking(times, loaded.data.languages))
    names = [*built, "advantage"]
    table = Table("attack", "words", *names, "gain", "wins", title=f"recipe {recipe}: honest>hacked", box=None)
    for row in attacks.to_dict("records"):
        pairs = [f"{row[f'honest_{name}']:.2f}>{row[f'hacked_{name}']:.2f}" for name in names]
        table.add_row(row["attack"], f"{row['words']:.0f}", *pairs, f"{row['difference']:+.2f}", f"{row['wins']:.0%}",
                      style="bold" if row["wins"] else "")
    out.print(table, "Bold: the hacked completion gets more than the honest one it was made from, in some group.")


@app.command()
def serve_rm(model: Annotated[Path, typer.Argument(help="Folder of a trained Writing RM.")],
             options: Annotated[list[str] | None, typer.Argument(help="Of vLLM: -- --data-parallel-size 2")] = None,
             host: Annotated[str, typer.Option(help="Loopback unless you say otherwise; then set LWZ_RM_TOKEN.")] = "127.0.0.1",
             port: int = 8017, dtype: Annotated[str, typer.Option(help="Default: the recipe's model.dtype.")] = "",
             recipe: Annotated[str, typer.Option(help="For vllm.tensor_parallel and vllm.memory_share.")] = "nano",
             sets: Overrides = None):
    """Serve a Writing RM by vLLM, for reward.writing.url. On 4 GPUs: -s vllm.tensor_parallel=4."""
    from lwzlib.base.rm_client import token

    command = serve_command(model, load_recipe(recipe, sets), host, port, dtype, options or [])
    if not token() and host not in ("127.0.0.1", "::1", "localhost"):
        print(f"lwz: {host} is open WITHOUT AUTHENTICATION: whoever reaches it can use it; set LWZ_RM_TOKEN", file=sys.stderr)
    os.execv(command[0], command)
