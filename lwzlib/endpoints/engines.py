"""Completions for an evaluation from any engine, behind one call: transformers or vLLM in process, or an
OpenAI-compatible server (a base model by plain completions, an instruct model by chat).

Each benchmark gives its own `Decoding`. A row is written as soon as its completion is there, so a stopped process goes on
with the next. A completion begins with the tag that its prompt opens; a server that applies a chat template does not say
what that opens, so let it part the reasoning from the text. Every engine ends a completion with the first stop string, which
stays in the text: without its `</answer>` an answer would have no form. Rows serve as samples: {id, query, completion,
truncated, tokens, error, key}.

What cannot be the same everywhere: draws. With a temperature above 0 the same seed gives other texts on another engine.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from lwzlib.base import models
from lwzlib.base.awaited import finished
from lwzlib.base.kit import ModelError
from lwzlib.base.models import load_model, load_tokenizer
from lwzlib.base.quantities import Decoding
from lwzlib.base.rows import RunError, append_rows, kept_rows, write_rows
from lwzlib.endpoints import llm
from lwzlib.endpoints.llm import Written
from lwzlib.method.prompts import Framed, as_text, opening_of
from lwzlib.method.sampling import completions

CUT = {"length", "content_filter", "abort"}  # finish reasons of a completion that did not end by itself


class QueryPrompt(NamedTuple):
    """A prompt to complete; `id` and `query` go into its row as they are, and `id` must be unique in a call."""

    id: str
    query: str
    prompt: Framed  # of `prompts.framed`


class Engine(NamedTuple):
    """`write`(prompts, decoding, seed, first) yields (index, Written) in order, from index `first` or somewhat before it."""

    identity: dict  # what, beside prompt, decoding and seed, a completion depends on
    write: Callable[[list[Framed], Decoding, int, int], Iterator[tuple[int, Written]]]
    title: str = ""  # of a line of progress; none for an engine that tells its own


def generate(engine: Engine, prompts: list[QueryPrompt], decoding: Decoding, out: Path, seed: int = 0) -> list[dict]:
    """A row for each prompt, in order, in the JSONL file `out`; what stands there already is not written again. For several
    completions of a prompt call it with several seeds, each with its file. `truncated`: neither the end of the text nor a
    stop string came within `max_new_tokens`, or a server cut it off. `error`: why a server refused this prompt; its completion
    is empty, and the next call asks again. Raises RunError if `out` holds completions of another engine, decoding, seed or
    prompt, ModelError and LLMError as the engines do."""
    if len({prompt.id for prompt in prompts}) < len(prompts):
        raise RunError(f"{out}: ids must be unique; give each prompt its own")
    keys = [_key(engine.identity, prompt.prompt, decoding, seed) for prompt in prompts]
    with kept_rows(out, in_order=True) as rows:
        for number, (row, prompt, key) in enumerate(zip(rows, prompts, keys, strict=False), 1):
            if (row["id"], row["key"]) != (prompt.id, key):
                raise RunError(f"{out}, row {number}: {row['id']} was written by another engine, decoding, seed or prompt than "
                               f"{prompt.id} asks for now. Choose another file, or remove that one")
        refused = next((i for i, row in enumerate(rows) if row["error"]), len(rows))
        if refused < len(rows):  # asked again: replies to the others are kept
            del rows[refused:]
            write_rows(out, rows)
        if len(rows) >= len(prompts):
            return rows[: len(prompts)]
        outputs = engine.write([prompt.prompt for prompt in prompts], decoding, seed, len(rows))
        for i, output in _paced(outputs, engine.title, len(prompts)):
            if i >= len(rows):
                rows.append(_row(prompts[i], output, decoding.stop, keys[i]))
                append_rows(out, rows[-1:])
    return rows


def transformers(name: str, dtype: str, attention: str, batch: int, trust_remote_code: bool = False) -> Engine:
    """The model `name` (as in a recipe) in this process, `batch` completions at a time."""
    def write(prompts, decoding, seed, first):
        model, tokenizer = load_model(name, dtype, attention, trust_remote_code)
        texts = [as_text(prompt, tokenizer) for prompt in prompts]
        written = completions(model, tokenizer, texts, decoding, batch, seed, decoding.stop, first)
        for i, text, truncated, tokens in written:
            yield i, Written(text, "length" if truncated else "stop", tokens)

    identity = {"engine": "transformers", "model": name, "dtype": dtype, "attention": attention, "batch": batch}
    return Engine(identity, write, name)


def vllm(name: str, batch: int = 256, trust_remote_code: bool = False, **config) -> Engine:
    """The model `name` in vLLM, which schedules by itself; rows are saved every `batch` completions. `config` goes into
    `vllm.LLM`: dtype, tensor_parallel_size, max_model_len, ... Raises ModelError where vLLM is not installed."""
    def write(prompts, decoding, seed, first):
        try:
            from vllm import LLM, SamplingParams
        except ImportError as error:
            raise ModelError(f"this engine needs vLLM (the extra `gpu`, see environment.yml): {error}") from error
        tokenizer = load_tokenizer(name, trust_remote_code)
        model = LLM(model=models.resolve(name), trust_remote_code=trust_remote_code, seed=seed, **config)
        sampling = {"temperature": decoding.temperature, "top_p": decoding.top_p, "top_k": decoding.top_k,
                    "max_tokens": decoding.max_new_tokens, "stop": decoding.stop, "include_stop_str_in_output": True}
        for start in range(first, len(prompts), batch):
            texts = [as_text(prompt, tokenizer) for prompt in prompts[start : start + batch]]
            ids = [{"prompt_token_ids": tokenizer(text, add_special_tokens=False).input_ids} for text in texts]
            params = [SamplingParams(**sampling, seed=seed + i) for i in range(start, start + len(texts))]
            for i, result in enumerate(model.generate(ids, params), start):  # in the order of the prompts
                completion, opening = result.outputs[0], opening_of(texts[i - start])
                yield i, Written(opening + completion.text, completion.finish_reason, len(completion.token_ids))

    return Engine({"engine": "vllm", "model": name} | config, write, name)


def server(settings: llm.Settings, replies: Path) -> Engine:
    """A model behind an OpenAI-compatible server. Messages go to its chat endpoint, texts to plain completions (there a
    server may put a begin-of-text token first, which the other engines do not).

    `settings.sampling` has the last word on each field of a request, null leaves it out: {top_k: null} for a server that
    refuses it, {top_k: 0} against vLLM's habit to fill in what is missing from the model's own generation config. Stop
    strings are sent only with {include_stop_str_in_output: true} (vLLM), since most servers drop them from the text, and then
    nobody can tell them from an end; else they are found here, and what a model writes after them is paid for in vain.
    `settings.timeout_s` must suffice for a whole completion. Replies are kept in `replies`, so nothing is paid for twice.
    Raises LLMError, and ValueError for texts and messages in one call.
    """
    def write(prompts, decoding, seed, first):
        kinds = {"completions" if isinstance(prompt, str) else "chat" for prompt in prompts}
        if len(kinds) > 1:
            raise ValueError("texts and messages cannot be asked in one call")
        sampling = request_fields(settings.sampling, decoding, seed)
        own = settings.model_copy(update={"endpoint": kinds.pop(), "sampling": sampling})
        requests = [llm.Request(prompt, Written) for prompt in prompts[first:]]
        for i, reply in enumerate(finished(llm.ask(requests, own, replies, _Pace(), settings.model, first)), first):
            if isinstance(reply, llm.NoAnswer):
                yield i, Written("", None, 0, str(reply))
            else:
                yield i, reply._replace(text=opening_of(prompts[i]) + reply.text) if isinstance(prompts[i], str) else reply

    return Engine({"engine": "server", "model": settings.model, "sampling": settings.sampling}, write)


def request_fields(overrides: dict, decoding: Decoding, seed: int) -> dict:
    """Fields of a request, None for what it leaves out; stop strings only where the server keeps them in the text."""
    fields = {"temperature": decoding.temperature, "top_p": decoding.top_p, "max_tokens": decoding.max_new_tokens,
              "seed": seed, "top_k": decoding.top_k or None,
              "stop": (overrides.get("include_stop_str_in_output") and decoding.stop) or None}
    return fields | overrides


class _Pace(llm.Spent):
    def __str__(self) -> str:
        return f"{super().__str__()}, {self.written / max(time.monotonic() - self.began, 1e-9):,.0f} tokens/s"


def _paced(outputs: Iterator[tuple[int, Written]], title: str, total: int) -> Iterator[tuple[int, Written]]:
    """Pass on the outputs; with a title, print a line of progress every 10 seconds and at the end."""
    began = printed_at = time.monotonic()
    tokens = 0
    for i, output in outputs:
        yield i, output
        tokens, now = tokens + output.tokens, time.monotonic()
        if title and (now - printed_at >= 10 or i + 1 == total):
            printed_at, pace = now, tokens / (now - began)
            print(f"{title}: {i + 1:,}/{total:,} completions, {tokens:,} tokens, {pace:,.0f} tokens/s", flush=True)


def _row(prompt: QueryPrompt, output: Written, stop: list[str], key: str) -> dict:
    ends = [at + len(string) for string in stop if (at := output.text.find(string)) >= 0]
    return {"id": prompt.id, "query": prompt.query, "completion": output.text[: min(ends)] if ends else output.text,
            "truncated": output.finish in CUT and not ends, "tokens": output.tokens, "error": output.error, "key": key}


def _key(identity: dict, prompt: Framed, decoding: Decoding, seed: int) -> str:
    content = json.dumps([identity, prompt, decoding.model_dump(), seed], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]
