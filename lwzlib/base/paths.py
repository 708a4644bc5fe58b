"""Where the kit's own files are: in the package, or, in a checkout of the repository, beside it; and where runs go.

In a checkout runs go beside the package; where the kit is installed as a wheel, into the working directory.
"""

import importlib.resources
from pathlib import Path

PACKAGE = Path(str(importlib.resources.files("lwzlib")))
QUERIES, TEXTS = PACKAGE / "queries", PACKAGE / "texts"
CHECKOUT = (PACKAGE.parent / "pyproject.toml").is_file()
ROOT = PACKAGE.parent if CHECKOUT else PACKAGE  # a wheel holds the folders beside the package too (pyproject.toml)
RECIPES, NOTEBOOKS, FIGURES, DOCS = (ROOT / name for name in ("recipes", "notebooks", "figures", "docs"))
CLUSTER_JOBS = ROOT / "cluster_jobs"
WORK = ROOT if CHECKOUT else Path.cwd()
RUNS = WORK / "runs"
