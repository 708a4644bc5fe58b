"""What the site of `make docs` has beside the pages of docs/: the README as its front page, the pages about clusters, and a
reference page for each module of the method."""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[2]
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "CONTRIBUTING.md"} | {
    f"cluster_jobs/{page.name}": f"cluster_jobs/{page.name}" for page in ROOT.glob("cluster_jobs/*.md")}
FILES = ("figures/nano_curves.png", "CITATION.cff", "LICENSE")


def on_files(files, config):
    """Add what lies outside of docs/ at its place in the site."""
    for path, place in PAGES.items():
        files.append(File.generated(config, place, content=_relinked((ROOT / path).read_text(encoding="utf-8"))))
    for path in FILES:
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    for module in ROOT.glob("lwzlib/method/[a-z]*.py"):
        page = f"# {module.stem}\n\n::: lwzlib.method.{module.stem}\n"
        files.append(File.generated(config, f"reference/{module.stem}.md", content=page))
    return files


def _relinked(page: str) -> str:
    """The page with links into docs/ as they are in the site, where docs/ is the root."""
    return re.sub(r"\]\((\.\./)?docs/", r"](\1", page)
