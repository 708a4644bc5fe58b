"""LongWriter-Zero (arXiv 2506.18841), reproduced. This is the map, in reading order.

    method/     the paper and nothing else: prompts, rewards, advantage, GRPO, the Writing RM, pretraining, the SFT baseline
    base/       what every folder stands on: recipes and their quantities, rows, run folders, models, what trainers share
    pipeline/   the table of stages, and how they are launched, spread over processes, and run as notebooks
    data/       raw text to packed shards; raw queries to a query set; pairs and answers that the kit makes itself
    endpoints/  language models behind an OpenAI-compatible server, as writers and as judges
    evaluate/   Arena-Write, WritingBench, LongBench-Write, Elo, and how far a judge can be trusted
    lab/        what fools the rewards: attacks, thresholds, sliders
    exhibits/   tables, figures, claims and pages from committed rows
    cluster/    the papermill engine `slurm`, jobs and site profiles; what a recipe needs of GPUs
    cli/        the command `lwz`, a file for each group of verbs
    queries/    training and held-out queries that ship with the kit
    texts/      word lists, attacks and hand-written texts that ship with the kit

An import goes down these floors, never up or in a circle:
cli · cluster · pipeline · exhibits, lab · evaluate, data · endpoints · method · base.

Importing the package loads nothing heavy: torch, transformers and TRL are imported where a stage needs them.
"""

__version__ = "0.1.0"
