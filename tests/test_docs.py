"""The documentation: what its pages show runs, docstrings become what they mean, and the site holds together."""

import fcntl
import importlib
import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import mrgptq
from snippets import blocks, commands, run_page

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "python" / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


def load(name):
    """A module of python/docs."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


docstrings, build = load("docstrings"), load("build")


class Page(HTMLParser):
    """Of an HTML file: what it refers to, its anchors, its text."""

    def __init__(self, path):
        super().__init__()
        self.path, self.links, self.parts, self.anchors, self.text = path, [], [], set(), []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        if "id" in values:
            self.anchors.add(values["id"])
        if tag == "a" and values.get("href"):
            self.links.append(values["href"])
        elif tag == "link" and values.get("href"):
            self.parts.append(values["href"])
        for name in ("src", "srcset", "data", "poster"):
            if tag != "a" and values.get(name):
                self.parts.append(values[name])

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """{path: Page} of the site, built by its command: once, whichever of xdist's workers asks first."""
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    out, built = folder / "site", folder / "site-built"
    with open(folder / "site-lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not built.exists():
            done = subprocess.run([sys.executable, str(DOCS / "build.py"), str(out)], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[-4000:]
            built.touch()
    return {path.relative_to(out).as_posix(): Page(path) for path in out.rglob("*.html")}


# ---- Pages


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(DOCS).as_posix())
def test_what_a_page_shows_runs(path, tmp_path, leaf_folder, forks):
    (tmp_path / "leaf").symlink_to(leaf_folder)
    for name in ("calibration.txt", "test.txt"):  # enough for a few windows
        (tmp_path / name).write_text((ROOT / "examples" / "text" / name).read_text(encoding="utf-8")[:6000], encoding="utf-8")

    def command(arguments):
        done = forks.run(*arguments, cwd=tmp_path)
        assert done.returncode == 0, f"{' '.join(arguments)}\n{done.stderr}"

    shown = [text for language, _, text in blocks(path) if language == "python"], [line for language, _, text in blocks(path) if language == "sh" for line in commands(text)]
    assert run_page(path, tmp_path, command) == sum(map(len, shown))


def test_command_lines_are_found():
    assert commands("mrgptq quantize leaf out --recipe rtn     # plainly\nls out\nmrgptq generate out \"Once upon\" \\\n    --tokens 3\n") == [
        ["mrgptq", "quantize", "leaf", "out", "--recipe", "rtn"], ["mrgptq", "generate", "out", "Once upon", "--tokens", "3"],
    ]  # fmt: skip
    assert {language for path in PAGES for language, _, _ in blocks(path)} <= {"python", "sh", "text", "json"}  # json and text are not run


def test_pages_say_nothing_of_other_places():
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        assert not [place for place in (ROOT, Path.home(), tempfile.gettempdir()) if f"{place}/" in text], path


# ---- The site


def test_every_public_name_has_an_entry(site):
    anchors = set().union(*(page.anchors for page in site.values()))
    assert not {name for name in mrgptq.__all__ if f"mrgptq.{name}" not in anchors}
    for module in ("mrgptq.hf", "mrgptq.study.grids", "mrgptq.study.analysis", "mrgptq.study.methods", "mrgptq.jobs", "mrgptq.plan", "mrgptq.reference", "mrgptq.checkpoint"):
        found = importlib.import_module(module)
        names = getattr(found, "__all__", [name for name, value in vars(found).items() if not name.startswith("_") and inspect.isroutine(value) and value.__module__ == module])
        assert not {name for name in names if f"{module}.{name}" not in anchors and f"mrgptq.{name}" not in anchors}, module
    assert {"mrgptq.study.grids.E2M1", "mrgptq.study.grids.INT4", "mrgptq.study.grids.FORMATS", "mrgptq.study.bases.UNCHANGED", "mrgptq.study.findings.RULES"} <= anchors  # constants


def test_every_page_is_in_the_navigation(site):
    known = {name for name in site if name not in ("genindex.html", "py-modindex.html", "search.html")}
    listed = {(Path(page.path).parent / unquote(urlsplit(link).path)).resolve() for page in [site["index.html"]] for link in page.links if not urlsplit(link).scheme and urlsplit(link).path}
    assert {name for name in known if site[name].path.resolve() not in listed} <= {"index.html"}
    assert {path.relative_to(DOCS).with_suffix(".html").as_posix() for path in PAGES} <= known


def test_the_site_needs_no_other_host(site):
    assert not {part for page in site.values() for part in page.parts if urlsplit(part).scheme not in ("", "data") or part.startswith("//")}
    out = site["index.html"].path.parent
    for path in [*out.rglob("*.css"), *out.rglob("*.js")]:
        assert not re.search(r"""(?:url\(|@import|import\()\s*["']?(?:https?:)?//""", path.read_text(encoding="utf-8")), path


def test_links_inside_resolve(site):
    by_path = {page.path.resolve(): page for page in site.values()}
    wrong = []
    for page in site.values():
        for link in [*page.links, *page.parts]:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (page.path.parent / unquote(parts.path)).resolve() if parts.path else page.path.resolve()
            if not target.is_file() or parts.fragment and target in by_path and parts.fragment not in by_path[target].anchors | {"top"}:
                wrong.append((page.path.name, link))
    assert not wrong


@pytest.mark.filterwarnings("ignore:'myst_parser:PendingDeprecationWarning", "ignore:'myst_parser:DeprecationWarning")
def test_a_warning_is_an_error(tmp_path, monkeypatch):
    def stage(folder):
        folder.mkdir(parents=True)
        (folder / "conf.py").write_text("extensions = ['myst_parser']\n")
        (folder / "index.md").write_text("# A page\n\n[nowhere](nothing.md)\n" if faulty else "# A page\n")

    monkeypatch.setattr(build, "stage", stage)
    for faulty in (True, False):
        assert (build.build(tmp_path / "site") != 0) == faulty


def test_it_can_be_searched(site):
    index = (site["index.html"].path.parent / "searchindex.js").read_text(encoding="utf-8")
    found = json.loads(index[index.index("(") + 1 : index.rindex(")")])
    assert "alternating_tensor_scale" in json.dumps(found["objects"]) and len(found["docnames"]) > len(PAGES)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_shown_with_their_outputs(path, site):
    cells = [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    page = site[f"tutorials/{path.stem}.html"]
    printed = "print(" in "".join("".join(cell["source"]) for cell in cells)
    pictures = [part for part in page.parts if "_images/" in part or part.endswith(".png")]
    html = page.path.read_text(encoding="utf-8")
    assert pictures or printed and html.count('class="highlight-default') + html.count('class="highlight-none') > 0
    assert all((page.path.parent / part).is_file() for part in pictures)


def test_entries_show_types_lists_and_the_way_to_others(site):
    html = site["reference/mrgptq-matrices.html"].path.read_text(encoding="utf-8")
    entry = html[html.index('id="mrgptq.quantize"') : html.index('id="mrgptq.quantize_activations"')]
    text = " ".join(re.sub("<[^>]+>", "", entry).split())
    assert "scales: str | None = None" in text and "weight: ArrayLike" in text
    assert all(f"<dt><strong>{name}</strong></dt>" in entry for name in ("weight", "format", "scales", "mx_rule", "tensor_scale", "rotation", "dtype", "threads", "ValueError", "TypeError"))
    assert 'href="#mrgptq.QuantizedMatrix"' in entry  # of the annotation
    assert 'href="../reference/mrgptq-matrices.html#mrgptq.quantize"' in site["formats/blocks.html"].path.read_text(encoding="utf-8")  # of `mg.quantize` in prose
    assert "Σ|err|^2.4" in "".join(site["reference/mrgptq.reference.html"].text).replace("error", "err").replace(" ", "")  # nothing of it was taken for markup


# ---- Links of files as links of pages


def test_links_follow_files_to_their_pages():
    page, sources = DOCS / "howto" / "run.md", {DOCS / "howto" / "shapes.md": "howto/shapes.md", ROOT / "bench" / "accuracy.md": "explanation/accuracy.md"}

    def linked(text):
        return build.relink(text, page, "howto/run.md", sources, {"which-recipe": "howto/quantise.md"})

    assert linked("[a](shapes.md#experts), [b](../../../bench/accuracy.md)") == "[a](shapes.md#experts), [b](../explanation/accuracy.md)"
    assert linked("[c](../../../README.md), [d](../../../README.md#which-recipe)") == "[c](../index.md), [d](quantise.md#which-recipe)"
    assert linked("[of no page](../../../LICENSE), [there](https://example.org/x.md), [here](#transformers)") == "of no page, [there](https://example.org/x.md), [here](#transformers)"
    assert linked("```text\n[x](nothing.md)\n```\n") == "```text\n[x](nothing.md)\n```\n"
    with pytest.raises(FileNotFoundError, match="python/docs/howto/run.md links to nothing.md, which is not there"):
        linked("[x](nothing.md)")


# ---- Docstrings as reStructuredText


def test_entries_of_one_line_come_apart():
    lines = ["format : StudyFormat. distribution : what groups are drawn from.", "rotation : turns each, or not at all", "    where None. seed : of the draws.", "model, out : paths: both."]
    assert docstrings.entries(lines) == [
        ("format", ["StudyFormat."]), ("distribution", ["what groups are drawn from."]), ("rotation", ["turns each, or not at all", "where None."]), ("seed", ["of the draws."]), ("model, out", ["paths: both."]),
    ]  # fmt: skip


def test_lists_inside_an_entry_stay_lists():
    lines = ["name :", '    - "a": one. b : is not an entry', "      here.", "", "    - second", "size : int"]
    assert docstrings.entries(lines) == [("name", ['- "a": one. b : is not an entry', "  here.", "", "- second"]), ("size", ["int"])]


def test_what_rest_would_misread_is_escaped():
    assert docstrings.escape("|x| * |w_| of ``a|b*`` and :func:`f_` by `mrgptq evaluate`, P_g and x_") == r"\|x\| \* \|w\_\| of ``a|b*`` and :func:`f_` by ``mrgptq evaluate``, P_g and x\_"


def test_sections_become_fields():
    lines = ["Say it.", "", "Parameters", "----------", "x : (..., cols) array. y : int", "", "Returns", "-------", "float : |x|.", "", "Examples", "--------", ">>> 2 * 3", "6"]
    assert docstrings.restructure(lines) == [
        "Say it.", "", ":Parameters:", "    **x**", "        (..., cols) array.", "", "    **y**", "        int", "", ":Returns:", r"    *float*: \|x\|.", "", ":Examples:", "    >>> 2 * 3", "    6", "",
    ]  # fmt: skip


def test_signatures_are_the_sources():
    arguments, result = docstrings.signature(mrgptq.quantize)
    assert arguments.startswith("(weight: ArrayLike, format: str='nvfp4', *, scales: str | None=None") and result == "mrgptq.QuantizedMatrix"
    assert docstrings.signature(mrgptq.Hadamard)[0] == "(block_size: int)" and docstrings.signature(mrgptq.Hessian.merge)[0] == "(other: mrgptq.Hessian, *, threads: int | None=None)"


def functions():
    """Everything of the package that says what its parameters are."""
    for module in sorted(name for name in sys.modules if name.startswith("mrgptq.")):
        for name, value in vars(sys.modules[module]).items():
            if getattr(value, "__module__", None) == module and callable(value) and hasattr(value, "__qualname__"):
                yield value
                if inspect.isclass(value):
                    yield from (method for method in vars(value).values() if inspect.isfunction(method))


def test_parameters_in_docstrings_are_those_of_the_function():
    for module in ("hf", "jobs", "study.methods", "study.report"):
        importlib.import_module(f"mrgptq.{module}")
    checked = 0
    for value in functions():
        for heading, lines in docstrings.sections(inspect.cleandoc(value.__doc__ or "").splitlines()):
            if heading == "Parameters":
                named = {name.lstrip("*") for names, _ in docstrings.entries(lines) for name in names.split(", ") if name}
                assert named and named <= set(inspect.signature(value).parameters), value.__qualname__
                checked += 1
    assert checked > 30
