"""The command `lwz write`: a model's text for a request, as it is written."""

import re
import sys
import time
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import typer
import yaml
from pydantic import BaseModel, Field, model_validator

from lwzlib.base.processes import INTERRUPTED
from lwzlib.base.provenance import commit_of, provenance
from lwzlib.base.recipe import load_recipe
from lwzlib.base.rows import DataError, read_text, rows_of, validated, write_atomic
from lwzlib.cli.options import START, KeyEnv, Overrides, Seed, endpoint
from lwzlib.data.word_ranges import Range, stated, with_length
from lwzlib.method.text import count_words, parse, shown

app = typer.Typer()
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")  # a terminal would obey some of them


class _Asked(BaseModel):
    """A request, and the range of words that its text is measured against."""

    query: str = Field(pattern=r"\S")
    word_range: Range | None = None

    @model_validator(mode="after")
    def _bounds(self):
        if self.word_range and not 0 < self.word_range[0] <= self.word_range[1]:
            raise ValueError(f"word_range {list(self.word_range)} must satisfy 0 < lower <= upper")
        return self


class _Text(NamedTuple):
    """A completion and how it came. `problem`: why it is not whole, "" if it is; `exit_code`: of a command that ends here."""

    asked: _Asked
    completion: str
    seed: int
    tokens: int  # 0 where a server does not say
    took_s: float
    problem: str
    exit_code: int


@app.command(rich_help_panel=START)
def write(model: Annotated[str, typer.Argument(help="A run folder, a model's folder, kit:<name>, a hub name, or its name at "
                                                    "--base-url.")],
          request: Annotated[str, typer.Argument(help="What to write; or give --from.")] = "",
          arm: Annotated[str, typer.Option(help="Of a run: an arm, cold-start, pretrain, or base, the untrained model.")] = "",
          words: Annotated[str, typer.Option(help="300, or 200-400: added to the request, and measured.")] = "",
          source: Annotated[str, typer.Option("--from", help="Several requests: a .txt file with one per line, or JSONL rows "
                                                             "with `query`, and `word_range` if known.")] = "",
          base_url: Annotated[str, typer.Option(help="The model is served at this OpenAI-compatible address.")] = "",
          style: Annotated[Literal["think", "direct"] | None, typer.Option(help="Default: the arm's, else think.")] = None,
          recipe: Annotated[str, typer.Option(help="For prompt, frame, and samples.sampling. Default: the run's, else nano; "
                                                   "`paper` for LongWriter-Zero-32B.")] = "",
          sets: Overrides = None, seed: Seed = 0,
          fold: Annotated[bool, typer.Option(help="The plan as one line.")] = False,
          to: Annotated[Path | None, typer.Option(help="Also write Markdown, with what made it.")] = None,
          plan: Annotated[bool, typer.Option(help="The plan too in that file.")] = False,
          force: Annotated[bool, typer.Option(help="Replace that file.")] = False, api_key_env: KeyEnv = "OPENAI_API_KEY"):
    """Let a model write a text, and show it as it comes.

    The plan is dimmed. Where stdout is no terminal, only the answer goes there. With --base-url, -s sampling.<name>=<value>
    sets a field of the request. Ctrl-C keeps what was written."""
    requests = _requests(request, source, words)
    if to and (to.suffix != ".md" or not to.parent.is_dir()):
        raise DataError(f"--to {to}: must end in .md, in a folder that exists")
    if to and to.exists() and not force:
        raise DataError(f"--to {to} exists: give another name, or --force to replace it")
    author = _author(model, arm, base_url, style, recipe, sets, api_key_env)
    made, texts = provenance(), []
    for i, asked in enumerate(requests):
        screen = _Screen(fold)
        if i:
            typer.echo()
        if len(requests) > 1:
            screen.note(f"[{i + 1}/{len(requests)}] {asked.query}")
        texts.append(_written(author, asked, seed + i, screen))
        screen.close(texts[-1].completion)
        for line in _summary(texts[-1], author):
            screen.note(line)
        if to:
            write_atomic(to, _markdown(author.identity, made, texts, plan))
            screen.note(f"{to}: {len(texts)} of {len(requests)} texts")
        if texts[-1].exit_code:
            raise typer.Exit(texts[-1].exit_code)


def _requests(request: str, source: str, words: str) -> list[_Asked]:
    if bool(request.strip()) == bool(source):
        raise DataError("give a request that is not empty, or --from FILE" if not source else
                        f"give a request or --from {source}, not both")
    if source.endswith(".txt"):
        if not Path(source).is_file():
            raise DataError(f"no file {source}")
        lines = [line.strip() for line in read_text(source).split("\n")]
        requests = [_Asked(query=line) for line in lines if line]
    elif source:
        requests = [validated(place, row, _Asked) for place, row in rows_of(source)]
    else:
        requests = [_Asked(query=request.strip())]
    if not requests:
        raise DataError(f"{source} has no request")
    if not words:
        return [_Asked(query=asked.query, word_range=asked.word_range or stated(asked.query)) for asked in requests]
    with_words = [with_length(asked.query.strip(), words) for asked in requests]
    return [_Asked(query=query, word_range=word_range) for query, word_range in with_words]


def _author(model: str, arm: str, base_url: str, style, recipe: str, sets: list[str] | None, api_key_env: str):
    from lwzlib.pipeline import author

    if arm and (base_url or not author.is_run(model)):
        raise DataError(f"--arm {arm}: {model} is no run folder" + ", but a name at --base-url" * bool(base_url))
    if base_url:
        of_request = [one for one in sets or [] if one.startswith(("sampling.", "sampling="))]
        settings = endpoint(base_url, model, api_key_env, of_request)
        return author.of_server(settings, load_recipe(recipe or "nano", [one for one in sets or [] if one not in of_request]),
                                style or "think")
    if author.is_run(model):
        return author.of_run(Path(model).expanduser(), arm, recipe, sets, style)
    return author.of_model(model, load_recipe(recipe or "nano", sets), style or "think")


def _written(author, asked: _Asked, seed: int, screen: "_Screen") -> _Text:
    from lwzlib.endpoints import engines, llm, streams

    parts, began = streams.Parts(), time.monotonic()

    def show(text: str, last: bool = False) -> bool:
        for part, piece in parts.feed(text, last):
            screen.put(part, _UNSEEN.sub("", piece))
        return parts.over

    completion, tokens, problem, exit_code = "", 0, "", 0
    try:
        text, finish, tokens, _ = author.write(asked.query, seed, show)
        completion = streams.ended(text)
        if finish == "length" and not parts.over:
            most = author.recipe.samples.sampling.max_new_tokens
            problem = f"cut off at samples.sampling.max_new_tokens = {most:,}, or at what the server allows: -s gives it more"
        elif finish in (*engines.CUT, None) and not parts.over:
            problem = f"cut off by the server, finish_reason = {finish!r}"
    except KeyboardInterrupt:
        completion, problem, exit_code = parts.text, "interrupted: this is what was written so far", INTERRUPTED
    except llm.LLMError as error:
        if not parts.text:
            raise
        completion, problem, exit_code = parts.text, str(error), 1
    show("", last=True)
    return _Text(asked, _UNSEEN.sub("", completion), seed, tokens, time.monotonic() - began, problem, exit_code)


class _Screen:
    """Shows one completion: on a terminal all of it, the plan dimmed; else the answer on stdout, plan and notes on stderr."""

    def __init__(self, fold: bool):
        self.fold, self.terminal = fold, sys.stdout.isatty()
        self.part, self.plan, self.answered = "", "", False

    def put(self, part: str, text: str) -> None:
        """Show the next text of a part. What stands outside of the tags may be the answer of a model that knows none."""
        if part == "outside" and not self.terminal:
            return  # `close` shows it, if no answer comes
        if part != self.part:
            self._leave()
            if self.terminal and self.part:
                typer.echo()
            if part == "plan" and self.fold and self.terminal:
                typer.secho("planning ...", dim=True, nl=False)
        self.part = part
        if part == "plan" and self.fold:
            self.plan += text
            return
        self.answered = self.answered or part == "answer"
        aside = part == "plan" or (part == "outside" and self.answered)
        typer.echo(typer.style(text, dim=True) if aside else text, nl=False, err=aside and not self.terminal)

    def close(self, completion: str) -> None:
        """End the text."""
        self._leave()
        if self.terminal:
            typer.echo()
        elif "<answer>" not in completion:
            typer.echo(shown(completion))

    def note(self, line: str) -> None:
        """Show a line that is no part of the text."""
        typer.secho(line, dim=True, err=not self.terminal)

    def _leave(self) -> None:
        """End the line of the part."""
        if self.part == "plan" and self.fold:
            self.note(f"{chr(13) * self.terminal}plan: {count_words(self.plan):,} words")
        elif self.part:
            typer.echo(err=self.part == "plan" and not self.terminal)


def _measured(text: _Text) -> dict:
    """What is measured of a text, by name."""
    return {"words": count_words(shown(text.completion)), "word_range": text.asked.word_range and list(text.asked.word_range),
            "plan_words": count_words(parse(text.completion, "think").plan)}


def _summary(text: _Text, author) -> list[str]:
    """What was written against what was asked for, and warnings."""
    words, word_range, plan_words = _measured(text).values()
    parsed, asked = parse(text.completion, author.style), ""
    if word_range:
        lower, upper = word_range
        off = f"{lower - words:,} too few" if words < lower else f"{words - upper:,} too many" if words > upper else "inside"
        asked = f", {lower:,} to {upper:,} asked for: {off}"
    pace = f"{text.tokens / text.took_s:,.1f} tokens/s" if text.tokens else f"{text.took_s:.1f} s"
    lines = [f"{words:,} words written{asked}; plan: {plan_words:,} words; {pace}"]
    if text.problem:
        lines.append(f"warning: {text.problem}")
    if "<think>" in text.completion and not shown(text.completion):
        lines.append("warning: the plan never ended, so there is no answer")
    elif not parsed.exact and not text.problem:
        form = "<think>plan</think> <answer>text</answer>" if author.style == "think" else "<answer>text</answer>"
        lines.append(f"warning: not in the exact form, {form}" + ("" if "<answer>" in text.completion else
                                                                  "; without an <answer>, all but the plan counts as one"))
    return lines


def _markdown(identity: dict, made: dict, texts: list[_Text], plan: bool) -> str:
    """Requests as quotes, each before its answer, under a front matter in YAML that says what made them."""
    origin = {"started": made["started"], "commit": commit_of(made), "hardware": made["hardware"], "versions": made["versions"]}
    rows = [_measured(text) | {"tokens": text.tokens or None, "seed": text.seed, "problem": text.problem or None}
            for text in texts]
    front = yaml.safe_dump(identity | origin | {"texts": rows}, allow_unicode=True, sort_keys=False, width=120)
    blocks = [f"---\n{front}---"]
    for text in texts:
        blocks.append("\n".join(f"> {line}".rstrip() for line in text.asked.query.splitlines()))
        if plan and (planned := parse(text.completion, "think").plan):
            blocks.append(f"<details><summary>Plan</summary>\n\n{planned}\n\n</details>")
        blocks.append(shown(text.completion) or "(no answer)")
    return "\n\n".join(blocks) + "\n"
