"""The site and the pages beside it: warnings, links, an entry for every public name."""

import inspect
import re
import subprocess
import sys
import zlib
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from filelock import FileLock
from markdown_it import MarkdownIt

import capsjax
import capsjax.bench
import capsjax.data
import capsjax.models
import capsjax.reproduce
import capsjax.training
import capsjax.viz
from capsjax import cli

ROOT = Path(__file__).parents[1]
MODULES = (
    capsjax,
    capsjax.nn,
    capsjax.routing,
    capsjax.models,
    capsjax.data,
    capsjax.training,
    capsjax.reproduce,
    capsjax.bench,
    capsjax.viz,
)
# Names that stand for a type, a module or a version, and need no page.
WITHOUT_PAGES = {"__version__", "nn", "routing", "ModelConfig", "Network"}


PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / ".github").rglob("*.md"), *(ROOT / "docs").rglob("*.md")]
)


@pytest.fixture(scope="module")
def site(tmp_path_factory, worker_id):
    """The folder of the built pages, which the processes of pytest-xdist build once."""
    base = tmp_path_factory.getbasetemp()
    built = (base if worker_id == "master" else base.parent) / "site"
    with FileLock(f"{built}.lock"):
        if not (built / "objects.inv").exists():
            command = [sys.executable, "-m", "sphinx", "-q", "-n", "-W", "-b", "html"]
            command += ["docs", str(built)]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, done.stderr
    return built


class Page(HTMLParser):
    """What a page links to, what of that it loads, and what can be linked to in it."""

    def __init__(self, path):
        super().__init__()
        self.links, self.loaded, self.anchors = set(), set(), {""}
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag, attrs):
        links = {value for name, value in attrs if name in ("href", "src") and value}
        self.links |= links
        self.loaded |= links if tag != "a" else set()
        self.anchors |= {value for name, value in attrs if name == "id"}


def local(path, links):
    """The files and anchors that links of this page lead to, except those of other sites."""
    for link in map(urlsplit, links):
        if not link.scheme and not link.netloc:
            target = path.parent / unquote(link.path) if link.path else path
            yield target.resolve(), unquote(link.fragment), f"{path.name} links to {link.geturl()}"


def test_every_page_is_reachable_its_links_resolve_and_it_needs_no_network(site):
    pages = {path.resolve(): Page(path) for path in site.rglob("*.html")}
    reached = {site.resolve() / "index.html"}
    for path, page in pages.items():
        for target, anchor, link in local(path, page.links):
            assert target.is_file(), link
            assert target not in pages or anchor in pages[target].anchors, link
            reached |= {target} - {path}
    assert set(pages) <= reached
    styles = "".join(path.read_text("utf-8") for path in site.rglob("*.css"))
    loaded = set(re.findall(r"""(?:url\(|@import)\s*["']?([^"')]+)""", styles))
    loaded |= set().union(*(page.loaded for page in pages.values()))
    assert {link for link in loaded if urlsplit(link).netloc} == set()


# Beside the other test of the site, so that no process waits for one that builds it.
def test_every_public_name_has_an_entry(site):
    packed = (site / "objects.inv").read_bytes().split(b"\n", 4)[4]
    names = {line.split(" ")[0] for line in zlib.decompress(packed).decode().splitlines()}
    entries = {name.rpartition(".")[2] for name in names if name.startswith("capsjax.")}
    public = {name for module in MODULES for name in module.__all__}
    assert public - WITHOUT_PAGES - entries == set()


def slugs(text):
    """The anchors of a Markdown page's headings, as forges and MyST make them."""
    tokens = MarkdownIt().parse(text)
    headings = [b.content for a, b in pairwise(tokens) if "heading" in a.type]
    return {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_local_links_of_markdown_resolve(path):
    text = path.read_text("utf-8")
    tokens = [t for block in MarkdownIt().parse(text) for t in block.children or []]
    links = [t.attrGet("href") or t.attrGet("src") for t in tokens]
    links += re.findall(r'(?:src|srcset)="([^"]+)"', text)
    for target, anchor, link in local(path, filter(None, links)):
        assert target.exists(), link
        if anchor and target.suffix == ".md":
            assert anchor in slugs(target.read_text("utf-8")), link


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 110


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.stem)
def test_an_example_has_a_page_with_its_output_and_picture(path):
    page = (ROOT / "docs" / "examples" / f"{path.stem}.md").read_text("utf-8")
    assert f"../../examples/{path.name}" in page
    assert f"{{literalinclude}} {path.stem}.txt" in page
    assert f"../images/{path.stem}-light.svg" in page


def test_every_command_is_on_the_page_of_commands():
    page = (ROOT / "docs" / "commands.rst").read_text("utf-8")
    shown = re.findall(r"^.. command-help:: (\w+)", page, re.MULTILINE)
    assert sorted(set(shown)) == sorted(cli._COMMANDS)


def test_the_version_is_the_same_everywhere():
    version = f"version: {capsjax.__version__}"
    assert version in (ROOT / "CITATION.cff").read_text("utf-8").splitlines()


PUBLIC = [getattr(capsjax, name) for name in capsjax.__all__]
# All but the one that computes nothing.
FUNCTIONS = [f for f in PUBLIC if inspect.isfunction(f) and f is not capsjax.load_pretrained]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_every_function_says_what_it_takes_gives_and_raises(function):
    text = inspect.getdoc(function)
    for part in ("Args:", "Returns:", "Raises:", "Example:", ">>> ", ".. math::"):
        assert part in text, part
    # The convolution is nobody's invention.
    assert function is capsjax.conv_general_dilated or "Reference:" in text
