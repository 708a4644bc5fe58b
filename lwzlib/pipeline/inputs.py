"""What a result depends on beside its recipe: the queries, and the files and folders that the recipe names."""

from pathlib import Path

from lwzlib.base.recipe import Recipe
from lwzlib.base.rows import DataError, digest_of
from lwzlib.method.queries import Query, load_queries


def inputs_of(recipe: Recipe, sections: tuple[str, ...]) -> dict:
    """Digests of the queries and files that a result depends on, and what the arm changes whose texts are distilled. Raises
    DataError."""
    rm, reward = recipe.writing_rm, recipe.reward
    files = {"model": [recipe.model.name], "writing_rm": [rm.model, rm.pairs, *rm.corpora], "sft": [recipe.sft.data],
             "reward": [reward.writing.model, reward.writing.prompts, reward.writing.criteria, reward.writing.references,
                        reward.format.encoder]}  # not corpus.sources: at scale they go once packed
    queries = [query.model_dump(mode="json") for query in queries_of_recipe(recipe)]
    inputs: dict = {"queries_digest": recipe.fingerprint("data", queries=queries)}
    if "cot" in sections:
        inputs |= {f"{name} changes": arm.change for name, arm in recipe.arms.items() if name == recipe.cot.arm and arm.change}
    for section in sections:
        for name in files.get(section, []):
            path = Path(name).expanduser()
            if name not in ("", "made", "stage") and path.exists():
                inputs[f"{name} holds"] = digest_of(path)
    return inputs


def queries_of_recipe(recipe: Recipe) -> list[Query]:
    """The training queries of a recipe, then the held-out ones. Raises DataError where they do not fit its settings."""
    data, step, length = recipe.data, recipe.grpo.queries_per_step, recipe.reward.length
    limited = recipe.reward.weights.length > 0 and not length.max_ratio
    train, heldout = load_queries(data.train, data.languages), load_queries(data.heldout, data.languages)
    if len(train) < step and any(arm.algorithm == "grpo" for arm in recipe.arms.values()):
        raise DataError(f"{data.train} has {len(train)} queries, and a step takes grpo.queries_per_step = {step}")
    for source, queries in ((data.train, train), (data.heldout, heldout)):
        for query in queries:
            if limited and query.word_range[1] >= length.max_words:
                raise DataError(f"{source}, query {query.id!r}: word_range {list(query.word_range)} must end below "
                                f"reward.length.max_words = {length.max_words}")
    trained_on = {query.query: query.id for query in train}
    for query in heldout:
        if query.query in trained_on:
            raise DataError(f"{data.heldout}, query {query.id!r} is also trained on (query {trained_on[query.query]!r} of "
                            f"{data.train}): held-out queries must be others")
    return [*train, *heldout]
