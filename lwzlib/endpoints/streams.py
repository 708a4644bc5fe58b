"""A completion while it is written: by a model in this process, or behind an OpenAI-compatible server.

Both writers call `show` with each piece of text; it returns whether the completion is over, which ends a server's work too.
"""

import contextlib
import re
from collections.abc import Callable
from typing import Literal

from lwzlib.base.quantities import Decoding
from lwzlib.endpoints import llm
from lwzlib.endpoints.endpoint import Endpoint, LLMError, Spent
from lwzlib.endpoints.engines import request_fields
from lwzlib.endpoints.llm import Written
from lwzlib.endpoints.replies import read_chunk, token_counts
from lwzlib.method.prompts import Framed, opening_of
from lwzlib.method.sampling import completions
from lwzlib.method.text import TAGS

Part = Literal["plan", "answer", "outside"]
Show = Callable[[str], bool]
_TAGS = TAGS["think"]
_TAG = re.compile(f"({'|'.join(_TAGS)})")
_OPENS: dict[str, Part] = {"<think>": "plan", "<answer>": "answer"}


class Parts:
    """The parts of a completion that comes in pieces: those of `text.parse`, white space around them left out. `over` is true
    from the first `</answer>` on; what follows it is nobody's."""

    def __init__(self) -> None:
        self.over = False
        self._pieces: list[str] = []
        self._held = ""  # white space that may end a part, and what may be the beginning of a tag
        self._part: Part = "outside"
        self._had: set[Part] = set()  # parts with text, or opened before
        self._begun = False  # whether the part has text

    @property
    def text(self) -> str:
        """What came so far, tags included, up to the end."""
        return ended("".join(self._pieces))

    def feed(self, text: str, last: bool = False) -> list[tuple[Part, str]]:
        """(part, its next text) as far as it is certain; all of it with the `last` piece."""
        if self.over:
            return []
        self._pieces.append(text)
        *elements, self._held = _TAG.split(self._held + text)  # text, tag, text, tag, ..., rest
        ready: list[tuple[Part, str]] = []
        for piece, tag in zip(elements[::2], elements[1::2], strict=True):
            ready += self._next(piece.rstrip())
            if tag == "</answer>":
                self.over, self._held = True, ""
                return ready
            opened = _OPENS.get(tag, "outside")
            self._part, self._begun = "outside" if opened in self._had else opened, False
            self._had |= {opened} - {"outside"}
        at = self._held.rfind("<")
        is_tag = at >= 0 and not last and any(tag.startswith(self._held[at:]) for tag in _TAGS)
        certain = (self._held[:at] if is_tag else self._held).rstrip()
        self._held = self._held[len(certain) :]
        return ready + self._next(certain)

    def _next(self, text: str) -> list[tuple[Part, str]]:
        text = text if self._begun else text.lstrip()
        self._begun = self._begun or bool(text)
        return [(self._part, text)] if text else []


def ended(completion: str) -> str:
    """The completion up to its first `</answer>`."""
    before, end, _ = completion.partition("</answer>")
    return before + end


def in_process(model, tokenizer, text: str, decoding: Decoding, seed: int, show: Show) -> Written:
    """The completion of a prompt by a loaded model, as `sampling.completions` writes it; shown word by word."""
    from transformers import TextStreamer

    class Shown(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            show(text)

    show(opening_of(text))
    streamer = Shown(tokenizer, skip_prompt=True, skip_special_tokens=True)
    _, completion, truncated, tokens = next(completions(model, tokenizer, [text], decoding, 1, seed, decoding.stop,
                                                        streamer=streamer))
    return Written(completion, "length" if truncated else "stop", tokens)


def from_server(settings: llm.Settings, prompt: Framed, decoding: Decoding, seed: int, show: Show) -> Written:
    """A server's completion of a framed query: of messages by its chat, of a text by plain completions. `settings.sampling` is
    that of `engines.server`. What a server parts from the text as reasoning is the plan again. The tokens are 0 where the
    server is stopped at `</answer>`, or does not count. Raises LLMError."""
    turns = (("user", prompt),) if isinstance(prompt, str) else prompt
    own = settings.model_copy(update={"endpoint": "completions" if isinstance(prompt, str) else "chat"})
    wanted = {"stream_options": {"include_usage": True}} | request_fields(settings.sampling, decoding, seed)
    fields = {name: value for name, value in wanted.items() if value is not None}
    messages = [{"role": role, "content": text} for role, text in turns]
    pieces, finish, tokens, reasoning = [], None, 0, False
    with contextlib.closing(Endpoint(own, Spent(), alone=True).stream(messages, fields)) as bodies:
        for body in bodies:
            chunk = read_chunk(body, own.endpoint)
            tokens, finish = token_counts(body)[1] or tokens, chunk.finish or finish
            begins, ends = bool(chunk.reasoning) and not reasoning, bool(chunk.text) and (reasoning or bool(chunk.reasoning))
            reasoning = bool(chunk.reasoning or reasoning) and not chunk.text
            pieces.append(f"{'<think>' * begins}{chunk.reasoning}{'</think>' * ends}{chunk.text}")
            if pieces[-1] and show(pieces[-1]) and "stop" not in fields:
                return Written("".join(pieces), "stop", 0)  # else the server ends by itself, and counts
    if finish is None and not any(pieces):
        raise LLMError(f"{settings.base_url} sent no piece of a text: can it stream?")
    return Written("".join(pieces), finish, tokens)
