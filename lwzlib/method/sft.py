"""The baseline: supervised fine-tuning on long answers, by TRL's SFTTrainer.

The paper fine-tunes the base and the continually pretrained model on long answers in LongWriter's form (`messages`), and
finds that it does not profit from continual pretraining as RL does. Loss on the answer alone; documents are packed, and one
that is longer than a sequence is cut.
Small models cannot write LongWriter's answers. `sft.data: made` takes the best completions of the distilled arm, without
their plans, and passages written by people, with a request worded for each.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from lwzlib.base import trainers
from lwzlib.base.recipe import Recipe
from lwzlib.base.rows import DataError
from lwzlib.base.run_folder import Run
from lwzlib.method import prompts
from lwzlib.method.text import Style


def train_sft(recipe: Recipe, run: Run, arm: str, start: str, rows: Callable[[], Iterable[dict]]) -> Path:
    """Fine-tune an arm on `rows`, each with `messages` of two turns; returns the folder of the model. Resumes from the last
    whole checkpoint. Raises DataError for a row of another form."""
    if run.finished:
        return run.folder / "model"
    settings = recipe.sft
    with run.work():
        last = trainers.last_checkpoint(run, "metrics")
        config = SFTConfig(
            num_train_epochs=settings.epochs, learning_rate=settings.learning_rate, lr_scheduler_type="cosine",
            per_device_train_batch_size=settings.batch_sequences, max_length=settings.max_tokens, packing=True,
            packing_strategy="bfd", **trainers.trainer_arguments(recipe, run, settings.checkpoint_every_steps, settings.lora))
        with config.main_process_first(local=False):
            if not run.rows("data"):
                run.write("data", rows())
        model, tokenizer = trainers.load_trainee(recipe, start, settings.lora)
        documents = [_document(recipe, recipe.arm(arm).prompt, row, f"{settings.data}, row {i}", tokenizer)
                     for i, row in enumerate(run.rows("data"), 1)]
        token_ids = tokenizer([row["prompt"] + row["completion"] + tokenizer.eos_token for row in documents]).input_ids
        cut = sum(len(ids) > settings.max_tokens for ids in token_ids)
        print(f"sft: {len(documents)} documents; {cut} are cut, longer than sft.max_tokens = {settings.max_tokens}")
        trainer = SFTTrainer(model, args=config, train_dataset=Dataset.from_list(documents), processing_class=tokenizer,
                             peft_config=trainers.lora_config(settings.lora),
                             callbacks=[trainers.Rows(run, trainers.SFT_COLUMNS)])
        trainers.save_trained(trainers.train_to_end(trainer, last), trainer, run)
        run.update(documents=len(documents), documents_cut=cut)
    return run.folder / "model"


def _document(recipe: Recipe, style: Style, row, place: str, tokenizer) -> dict:
    """{prompt, completion}: the request in the arm's prompt, the answer in its form."""
    try:
        (asker, query), (writer, answer) = ((turn["role"], turn["content"]) for turn in row["messages"])
    except (TypeError, KeyError, ValueError):
        raise DataError(f"{place}: needs messages, two turns of role and content; got {str(row)[:100]}") from None
    if (asker, writer) != ("user", "assistant") or not query.strip() or not answer.strip():
        raise DataError(f"{place}: the turns must be of user and assistant, and not empty; got {asker}, {writer}")
    prompt = prompts.render(query, style, recipe.model.frame, recipe.prompt, tokenizer)
    return {"prompt": prompt, "completion": prompts.after_prompt(prompt, prompts.wrap("", answer, style))}
