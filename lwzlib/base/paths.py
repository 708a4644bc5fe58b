"""Where the kit's own files are: what ships inside the package, and what lies beside it in the repository."""

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent
QUERIES, TEXTS = PACKAGE / "queries", PACKAGE / "texts"
ROOT = PACKAGE.parent
RECIPES, NOTEBOOKS, FIGURES, DOCS, RUNS = (ROOT / name for name in ("recipes", "notebooks", "figures", "docs", "runs"))
CLUSTER_JOBS = ROOT / "cluster_jobs"
