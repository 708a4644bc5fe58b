"""Prompts: think and direct-answer, English and Chinese, worded anew from what the paper says they ask for.

The paper frames the query as a conversation between a user and an assistant. The think prompt asks for a deep plan
(brainstorm, outline, style, audience, ambiguity, several perspectives), reviewed and refined, in `<think>`, and the
work in `<answer>`; the direct prompt asks for the work alone. The Chinese twin is used when most of the query is Chinese.

The chat templates of many reasoning models end with an opening `<think>`: the completion then begins inside the plan. Whoever
reads its form puts that tag before it (`opening_of`); a prompt that wants no plan closes it.

Departures, by recipe and off in `paper`: `prompt.wording: brief` (small models lose the thread of a long instruction and
a CPU pays for every token of it) and `prompt.worked_examples` (a model that never emits the tags cannot learn them).
"""

import re
from typing import Literal

from lwzlib.base.paths import TEXTS
from lwzlib.base.quantities import Prompt
from lwzlib.base.rows import read_yaml
from lwzlib.method.text import Style, language_of

Framed = str | tuple[tuple[str, str], ...]  # a text to continue, or (role, text) of each message of a chat
_FULL = {
    ("think", "en"): """A user asks for a piece of writing, and the assistant delivers it. Before writing a word of the \
piece, the assistant thinks hard: it gathers ideas, works out who will read the piece and why, settles anything the \
request leaves open, weighs several angles, chooses a tone and a style, decides how long the piece should be, and drafts \
an outline section by section. It then rereads this plan as a stern editor would and improves it. The plan stands \
between <think> and </think>. The finished piece, complete and ready to read, stands between <answer> and </answer>. \
The reply has no other text: <think>plan</think> <answer>piece</answer>""",
    ("direct", "en"): """A user asks for a piece of writing, and the assistant delivers it. The finished piece, complete \
and ready to read, stands between <answer> and </answer>. The reply has no other text: <answer>piece</answer>""",
    ("think", "zh"): """用户请助手写一篇文字，由助手完成。动笔之前，助手先认真构思：搜集想法，弄清读者是谁、为何而读，\
补足要求中含糊之处，从几个角度权衡取舍，定下语气、文体与篇幅，再逐节列出提纲；然后像严格的编辑那样重读这份构思并加以修改。\
构思写在 <think> 与 </think> 之间；完整的成稿写在 <answer> 与 </answer> 之间。回复中不出现其他文字：\
<think>构思</think> <answer>成稿</answer>""",
    ("direct", "zh"): """用户请助手写一篇文字，由助手完成。完整的成稿写在 <answer> 与 </answer> 之间。\
回复中不出现其他文字：<answer>成稿</answer>""",
}
_BRIEF = {
    ("think", "en"): "First plan in <think> </think>, then write in <answer> </answer>.",
    ("direct", "en"): "Write in <answer> </answer>.",
    ("think", "zh"): "先在 <think> </think> 中构思，再在 <answer> </answer> 中写作。",
    ("direct", "zh"): "在 <answer> </answer> 中写作。",
}
WORDINGS = {"full": _FULL, "brief": _BRIEF}
_OPENING = re.compile(r"<(?:think|answer)>\s*\Z")
_SPEAKERS = {"en": ("User: ", "Assistant:"), "zh": ("用户：", "助手：")}
_EXAMPLES = read_yaml(TEXTS / "worked_examples.yaml")
WORKED_EXAMPLES = {language: list(map(tuple, examples)) for language, examples in _EXAMPLES.items()}  # (query, plan, answer)


def wrap(plan: str, answer: str, style: Style) -> str:
    """A completion in the exact form of the style."""
    work = f"<answer>{answer}</answer>"
    return f"<think>{plan}</think>\n{work}" if style == "think" else work


def framed(query: str, style: Style | Literal["bare"], frame: str, prompt: Prompt | None = None) -> Framed:
    """A query in its frame: plain text for a base model, messages for an instruct model. `bare` is the query without any
    instruction, and needs no `prompt`."""
    language = language_of(query)
    instruction, examples = "", []
    if style != "bare":
        assert prompt, "a style needs the recipe's quantities of the prompt"
        instruction = WORDINGS[prompt.wording][style, language]
        examples = [(request, wrap(plan, answer, style))
                    for request, plan, answer in WORKED_EXAMPLES[language][: prompt.worked_examples]]
    if frame == "chat":
        messages = [("system", instruction)] if instruction else []
        for request, completion in examples:
            messages += [("user", request), ("assistant", completion)]
        return (*messages, ("user", query))
    user, assistant = _SPEAKERS[language]
    text = f"{instruction}\n\n" if instruction else ""
    for request, completion in examples:
        text += f"{user}{request}\n\n{assistant} {completion}\n\n"
    return f"{text}{user}{query}\n\n{assistant} "


def as_text(framed: Framed, tokenizer=None) -> str:
    """Text that a model continues: a framed query, its messages by the tokenizer's chat template."""
    if isinstance(framed, str):
        return framed
    messages = [{"role": role, "content": text} for role, text in framed]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def opening_of(prompt: str) -> str:
    """Tag that the prompt opens for its completion, with the white space after it; "" if it opens none."""
    opening = _OPENING.search(prompt)
    return opening[0] if opening else ""


def after_prompt(prompt: str, completion: str) -> str:
    """What of a whole completion follows the prompt: without the tag that the prompt itself opens."""
    tag = opening_of(prompt).rstrip()
    return completion.removeprefix(tag).lstrip() if tag and completion.startswith(tag) else completion


def render(query: str, style: Style, frame: str, prompt: Prompt, tokenizer=None) -> str:
    """Text that a model continues for a query in a style."""
    text = as_text(framed(query, style, frame, prompt), tokenizer)
    return text if style == "think" else _without_plan(text)


def render_bare(query: str, frame: str, tokenizer=None) -> str:
    """Text that a model continues for a query without any instruction, and without a plan."""
    return _without_plan(as_text(framed(query, "bare", frame), tokenizer))


def _without_plan(text: str) -> str:
    """The text with an empty plan in the place of an open one, as such templates write it where thinking is switched off."""
    return f"{text.rstrip()}\n\n</think>\n\n" if opening_of(text).startswith("<think>") else text
