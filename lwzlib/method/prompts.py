"""Prompts: think and direct-answer, English and Chinese; worded anew from what the paper says they ask for.

The paper frames the query as a conversation between a user and an assistant. The think prompt asks for a deep plan
(brainstorm, outline, style, audience, ambiguity, several perspectives), reviewed and refined, in `<think>`, and the
work in `<answer>`; the direct prompt asks for the work alone. The Chinese twin is used when the query has Han characters.

Departures, by recipe and off in `paper`: `prompt.wording: brief` (small models lose the thread of a long instruction and
a CPU pays for every token of it) and `prompt.worked_examples` (a model that never emits the tags cannot learn them).
"""

from typing import Literal

from lwzlib.base.quantities import Prompt
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
_SPEAKERS = {"en": ("User: ", "Assistant:"), "zh": ("用户：", "助手：")}
WORKED_EXAMPLES = {  # (query, plan, answer)
    "en": [
        ("In one paragraph, describe a market street in the rain.",
         "A market at noon, for general readers. Order: rain, stalls, one buyer, the end. About 60 words.",
         "Rain taps on the awnings and runs to the gutters. Under them the sellers stack pears and onions and call "
         "prices to people who hurry past. An old woman stops, shakes out her umbrella, and buys a single lemon. By "
         "evening the clouds have gone, the crates are empty, and the whole street smells of fruit and wet stone."),
        ("In one paragraph, explain why bread rises.",
         "For a curious pupil. Order: yeast eats, gas forms, dough stretches, the oven sets it. About 60 words.",
         "Bread rises because yeast is alive. It feeds on the sugar in flour and gives off tiny bubbles of gas. Dough is "
         "elastic, so it traps the bubbles and swells like a slow balloon. In the oven the bubbles grow once more, the "
         "heat sets the walls around them, and the loaf keeps the soft and airy shape that we like."),
    ],
    "zh": [
        ("用一小段话描写雨中的集市。",
         "写给一般读者。顺序：雨、摊位、一位买主、收尾。约六十字。",
         "雨点敲着雨棚，顺着檐角流进水沟。摊主把梨和洋葱码得整整齐齐，向匆匆走过的人报价。一位老太太停下来，抖了抖伞，"
         "只买了一个柠檬。傍晚雨停了，整条街都是果香和湿石头的气味。"),
        ("用一小段话说明面包为什么会发起来。",
         "写给好奇的小学生。顺序：酵母、气泡、面团、烤箱。约六十字。",
         "面包会发起来，是因为酵母是活的。它吃面粉里的糖，吐出细小的气泡。面团有弹性，把气泡裹在里面，像气球一样慢慢鼓起。"
         "进了烤箱，气泡再胀一次，面团随即定型，面包就松软了。"),
    ],
}


def wrap(plan: str, answer: str, style: Style) -> str:
    """A completion in the exact form of the style."""
    work = f"<answer>{answer}</answer>"
    return f"<think>{plan}</think>\n{work}" if style == "think" else work


def framed(query: str, style: Style | Literal["bare"], frame: str, prompt: Prompt | None = None) -> Framed:
    """What a model is asked: a plain-text frame for a base model, messages for an instruct model. `bare` is the query
    without any instruction, and needs no `prompt`."""
    language = language_of(query)
    instruction, turns = "", []
    if style != "bare":
        assert prompt, "a style needs the recipe's quantities of the prompt"
        instruction = WORDINGS[prompt.wording][style, language]
        turns = [(asked, wrap(plan, answer, style))
                 for asked, plan, answer in WORKED_EXAMPLES[language][: prompt.worked_examples]]
    if frame == "chat":
        shown = [message for asked, written in turns for message in (("user", asked), ("assistant", written))]
        return (*([("system", instruction)] if instruction else []), *shown, ("user", query))
    user, assistant = _SPEAKERS[language]
    before = "".join(f"{user}{asked}\n\n{assistant} {written}\n\n" for asked, written in turns)
    return f"{instruction}\n\n" * bool(instruction) + f"{before}{user}{query}\n\n{assistant} "


def as_text(framed: Framed, tokenizer=None) -> str:
    """The text that a model continues: messages by its tokenizer's chat template."""
    if isinstance(framed, str):
        return framed
    messages = [{"role": role, "content": text} for role, text in framed]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def render(query: str, style: Style, frame: str, prompt: Prompt, tokenizer=None) -> str:
    """The text that a model continues: a plain-text frame for a base model, the chat template for an instruct model."""
    return as_text(framed(query, style, frame, prompt), tokenizer)


def render_bare(query: str, frame: str, tokenizer=None) -> str:
    """The query in the model's frame, without any instruction."""
    return as_text(framed(query, "bare", frame), tokenizer)
