"""A policy: a model by name, or a snapshot that RL kept of one."""

import gc
from pathlib import Path
from typing import NamedTuple

from lwzlib.base.models import resolve
from lwzlib.base.recipe import Recipe
from lwzlib.base.run_folder import Run


class Policy(NamedTuple):
    """The name of a model, or the folder of a snapshot that was trained from the model `start`."""

    name: str
    start: str = ""

    def load(self, recipe: Recipe):
        """(model, tokenizer), on all GPUs of the process."""
        from lwzlib.base import trainers

        if self.start:
            return trainers.load_snapshot(recipe, Path(self.name), self.start)
        return trainers.load_policy(recipe, self.name, spread=True)

    def folder(self, recipe: Recipe, run: Run) -> str:
        """Folder that vLLM can load; a snapshot that is an adapter is merged into its model, in the folder of the run."""
        if not (Path(self.name) / "adapter_config.json").is_file():
            return resolve(self.name)
        import torch

        merged = run.folder / ".policy"
        for part in self.load(recipe):
            part.save_pretrained(merged)
        del part
        gc.collect()
        torch.cuda.empty_cache()  # vLLM wants the room, in a process of its own
        return str(merged)
