"""The baseline: supervised fine-tuning on long answers, by TRL's SFTTrainer.

The paper fine-tunes the base and the continually pretrained model on long answers in LongWriter's form (`messages`), and
finds that it does not profit from continual pretraining as RL does. Loss on the answer alone; documents are packed, and one
that is longer than a sequence is cut.
Small models cannot write LongWriter's answers. `sft.data: made` takes the best completions of the distilled arm, without
their plans, and passages written by people, with a request worded for each.
"""

import random
from pathlib import Path

from lwzlib import corpus, data, prompts
from lwzlib.data import DataError
from lwzlib.recipe import Recipe
from lwzlib.runs import Run, read_rows
from lwzlib.text import Style, count_words, language_of

_REQUEST = {
    "en": "Write a passage of about {words} words in the manner of the {name}.",
    "zh": "请仿照{name}的笔法，写一段约{words}字的文字。",
}


def train_sft(recipe: Recipe, run: Run, arm: str, start: str, distilled: Path | None) -> Path:
    """The stage `sft` of an arm; resumes from the last whole checkpoint. Returns the folder of the model."""
    if run.finished:
        return run.folder / "model"
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from lwzlib import train

    asked = recipe.sft
    with run.work():
        last = train.resumed(run, "metrics")
        config = SFTConfig(
            num_train_epochs=asked.epochs, learning_rate=asked.learning_rate, lr_scheduler_type="cosine",
            per_device_train_batch_size=asked.batch_sequences, max_length=asked.max_tokens, packing=True,
            packing_strategy="bfd", **train.checkpoints(asked.checkpoint_every_steps), **train.arguments(recipe, run))
        with config.main_process_first(local=False):
            if not run.rows("data"):
                run.write("data", _made(recipe, run.seed, distilled) if distilled else
                          (row for _, row in data.rows_of(asked.data)))
        model, tokenizer = train.load(recipe, start)
        documents = [_document(recipe, recipe.arm(arm).prompt, row, f"{asked.data}, row {i}", tokenizer)
                     for i, row in enumerate(run.rows("data"), 1)]
        read = tokenizer([row["prompt"] + row["completion"] + tokenizer.eos_token for row in documents]).input_ids
        cut = sum(len(ids) > asked.max_tokens for ids in read)
        print(f"sft: {len(documents)} documents; {cut} are cut, longer than sft.max_tokens = {asked.max_tokens}")
        trainer = SFTTrainer(model, args=config, train_dataset=Dataset.from_list(documents), processing_class=tokenizer,
                             callbacks=[train.Rows(run, train.SFT_COLUMNS)], peft_config=train.lora(asked.lora))
        train.save(train.go(trainer, last), trainer, run)
        run.update(documents=len(documents), documents_cut=cut)
    return run.folder / "model"


def _made(recipe: Recipe, seed: int, distilled: Path) -> list[dict]:
    """`messages` and where they come from: the arm's best answers, then human passages of a length it could write."""
    rows = [_row(row["query"], row["answer"], row["id"]) for row in read_rows(distilled / "documents.jsonl")
            if row["answer"]]
    passages = [(document.id, passage) for source in recipe.corpus.sources if source.language in recipe.data.languages
                for document in corpus.documents(source.at)
                for passage in corpus.passages(document, recipe.writing_rm.passage_words)[:4]]
    chosen = random.Random(seed).sample(passages, min(recipe.sft.human_passages, len(passages)))
    for name, passage in chosen:
        language = language_of(passage)
        source = name.removeprefix("kit:").replace("/", ", ").replace("-", " ")
        rows.append(_row(_REQUEST[language].format(words=round(count_words(passage), -1), name=source), passage, name))
    return rows


def _row(query: str, answer: str, source: str) -> dict:
    return {"messages": [{"role": "user", "content": query}, {"role": "assistant", "content": answer}], "source": source}


def _document(recipe: Recipe, style: Style, row, place: str, tokenizer) -> dict:
    """{prompt, completion}: the request in the arm's prompt, the answer in its form."""
    try:
        (asker, query), (writer, answer) = ((turn["role"], turn["content"]) for turn in row["messages"])
    except (TypeError, KeyError, ValueError):
        raise DataError(f"{place}: needs messages, two turns of role and content; got {str(row)[:100]}") from None
    if (asker, writer) != ("user", "assistant") or not query.strip() or not answer.strip():
        raise DataError(f"{place}: the turns must be of user and assistant, and not empty; got {asker}, {writer}")
    return {"prompt": prompts.render(query, style, recipe.model.frame, recipe.prompt, tokenizer),
            "completion": prompts.wrap("", answer, style)}
