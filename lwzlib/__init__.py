"""LongWriter-Zero (arXiv 2506.18841), reproduced: the method, thin and whole.

Reading order is the order of the data: recipe, text, prompts, data, overlap, rewards, advantage, grpo, generate, runs.
Importing the package loads nothing heavy; torch, transformers and TRL are imported where a stage needs them.
"""

__version__ = "0.1.0"
