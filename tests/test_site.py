"""The site of `make docs`, opened from its files in a browser: every page, at the width of a phone and of a laptop."""

import subprocess
import sys
from pathlib import Path

import browser
import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent


def pages(nav=None):
    """Places of the pages in the site's navigation."""
    nav = nav or yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    for entry in nav:
        target = next(iter(entry.values())) if isinstance(entry, dict) else entry
        if isinstance(target, str):
            yield target.replace("README.md", "index.md").removesuffix(".md") + ".html"
        else:
            yield from pages(target)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site; mkdocs is strict: a link or an anchor that leads nowhere fails the build."""
    folder = tmp_path_factory.mktemp("site")
    built = subprocess.run([sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", folder], cwd=ROOT,
                           capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return folder


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    browser.required()
    folder = tmp_path_factory.mktemp("browser")
    with browser.page(folder, folder) as found:
        yield found


def test_the_reference_has_a_page_for_each_module_of_the_method(site):
    modules = {path.stem for path in ROOT.glob("lwzlib/method/[a-z]*.py")}
    assert modules == {Path(page).stem for page in pages() if page.startswith("reference/")}
    for module in modules:
        text = (site / "reference" / f"{module}.html").read_text(encoding="utf-8")
        assert text.count("doc-heading") > 0, f"{module} has no member"


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("page", list(pages()))
def test_a_page_opens_without_errors_and_without_sideways_scrolling(site, tab, page, width):
    tab.size(width)
    tab.errors.clear()
    tab.open((site / page).as_uri())
    assert tab.js("document.querySelector('h1').textContent.trim().length") > 2
    assert tab.js("document.documentElement.scrollWidth - innerWidth") <= 0
    assert not tab.errors
    hidden = tab.js("[...document.querySelectorAll('article img')].filter(i => !i.naturalWidth || !i.alt).map(i => i.src)")
    assert not hidden, "a picture that does not show, or without alternative text"


@pytest.mark.parametrize("page", list(pages()))
def test_every_link_of_a_page_leads_to_a_file(site, tab, page):
    tab.open((site / page).as_uri())
    links = tab.js("[...document.querySelectorAll('a[href]')].map(a => a.href.split('#')[0])")
    local = [Path(link.removeprefix("file://").replace("%20", " ")) for link in links if link.startswith("file://")]
    assert len(local) > 10 and not [link for link in local if not link.is_file()]
