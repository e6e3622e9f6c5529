"""Builds the site: `python python/docs/build.py OUT`.

Pages are gathered in a folder that Sphinx reads: those that lie here, the notebooks of examples/ as they run now, sections of README.md, the records of the project, the command line's help, and an entry for everything public.
A warning is an error. Links between files of the repository become links between pages; a link to a file that no page is made of is left as text, one to nothing is an error.
"""

import argparse
import importlib
import inspect
import os
import pkgutil
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import docstrings

ROOT = HERE.parent.parent
RECORDS = {"bench/accuracy.md": "explanation/accuracy.md", "bench/README.md": "project/speed.md", "CHANGELOG.md": "project/changelog.md", "CONTRIBUTING.md": "project/contributing.md", "DECISIONS.md": "project/decisions.md"}
GROUPS = {
    "Matrices": ("codecs", "activations", "formats", "packing", "result"),
    "Layers": ("layer", "recipe", "gptq"),
    "Rotations": ("rotations", "transforms"),
    "Products": ("matmul", "prepack"),
    "Checkpoints": ("checkpoint",),
    "Installation": ("",),
}
"""What `mrgptq` exports, by the room that it comes from; a room that is not here gets a page of its own."""
MODULES = ("formats", "modules", "checkpoint", "plan", "hf", "jobs", "study", "reference")
"""Modules and packages whose public names have entries besides."""
README_PART = re.compile(r"<!-- README: (.*?) -->.*?<!-- end -->\n", re.DOTALL)


def build(out: Path, *, pages: Path | None = None) -> int:
    """Build the site to ``out``, which is replaced, and give Sphinx's exit status; ``pages``: a folder for what Sphinx reads, to look at."""
    from sphinx.cmd.build import build_main

    with tempfile.TemporaryDirectory() as folder:
        source = pages or Path(folder) / "pages"
        shutil.rmtree(source, ignore_errors=True)
        stage(source)
        shutil.rmtree(out, ignore_errors=True)
        status = build_main(["-W", "--keep-going", "-q", "-b", "html", "-d", f"{folder}/doctrees", str(source), str(out)])
    (out / ".buildinfo").unlink(missing_ok=True)
    return status


def stage(folder: Path) -> None:
    """Write all pages."""
    shutil.copytree(HERE, folder, ignore=shutil.ignore_patterns("__pycache__", "build.py"))
    with executed_notebooks(folder / "tutorials") as made:  # meanwhile
        (folder / "reference").mkdir()
        for name, text in reference_pages():
            (folder / "reference" / name).write_text(text, encoding="utf-8")
    sources = {ROOT / name: page for name, page in RECORDS.items()} | {path: path.relative_to(HERE).as_posix() for path in HERE.rglob("*.md")} | made
    sections = readme_sections()
    texts = {path: (folder / page if path in made else path).read_text(encoding="utf-8") for path, page in sources.items()}
    parts = [(match[1], sources[path]) for path, text in texts.items() for match in README_PART.finditer(text)]
    placed = {slug(heading): page for part, page in parts for heading in re.findall(r"^##+ (.*)$", sections[part], flags=re.MULTILINE)}
    for path, text in texts.items():
        text = README_PART.sub(lambda match: relink(sections[match[1]], ROOT / "README.md", sources[path], sources, placed), relink(text, path, sources[path], sources, placed))
        if path == HERE / "index.md":
            text = navigation(text, [(folder / page, page) for page in sorted(made.values())])
        (folder / sources[path]).parent.mkdir(exist_ok=True)
        (folder / sources[path]).write_text(text, encoding="utf-8")


# ---- Pages from the repository's own


def readme_sections() -> dict[str, str]:
    """{heading: text of the section} of README.md, its heading included; "introduction" is what stands below the title."""
    title, *parts = re.split(r"^(?=## )", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {"introduction": title.split("\n", 1)[1].strip() + "\n"} | {part.splitlines()[0].removeprefix("## "): part for part in parts}


def slug(heading: str) -> str:
    """The anchor that forges give a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def relink(text: str, path: Path, page: str, sources: dict[Path, str], placed: dict[str, str]) -> str:
    """Links of a file's text as links of its page. ``placed``: on which page each heading of the README stands."""

    def replace(link: re.Match[str]) -> str:
        label, target, anchor = link[1], link[2], link[3] or ""
        if re.match(r"\w+:|#", target) or not target:
            return link[0]
        file = (path.parent / target).resolve()
        if not file.exists():
            raise FileNotFoundError(f"{path.relative_to(ROOT)} links to {target}, which is not there")
        to = placed.get(anchor[1:], "index.md") if file == ROOT / "README.md" else sources.get(file) or ("reference/mrgptq.reference.rst" if file.name == "reference.py" else None)
        return f"[{label}]({os.path.relpath(to, Path(page).parent)}{anchor})" if to else label

    parts = re.split(r"(^```.*?^```$)", text, flags=re.DOTALL | re.MULTILINE)
    return "".join(part if part.startswith("```") else re.sub(r"(?<!!)\[((?:[^\[\]]|\[[^\]]*\])+)\]\(([^)\s#]*)(#[^)\s]*)?\)", replace, part) for part in parts)


def navigation(index: str, tutorials: list[tuple[Path, str]]) -> str:
    """The index with the list of tutorials, and each of its lists of pages as a part of the navigation."""
    titles = {page: next(line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("# ")).removeprefix("# ") for path, page in tutorials}
    index = index.replace("<!-- tutorials -->", "\n".join(f"- [{title}]({page})" for page, title in titles.items())).replace("<!-- reference -->", "- [API and command line](reference/index.rst)")
    parts = re.split(r"^## (.*)$", index, flags=re.MULTILINE)
    trees = []
    for heading, text in zip(parts[1::2], parts[2::2], strict=True):
        if pages := re.findall(r"^- \[[^\]]+\]\(([\w/.-]+)\)", text, flags=re.MULTILINE):
            trees.append("\n".join(["```{toctree}", ":hidden:", f":caption: {heading}", "", *(page.rsplit(".", 1)[0] for page in pages), "```", ""]))
    return "\n".join([index, *trees])


@contextmanager
def executed_notebooks(folder: Path) -> Iterator[dict[Path, str]]:
    """{notebook: page} of examples/. Each runs there, two at a time, beside what the block does; at its end they stand as Markdown and pictures, or one raises nbclient.exceptions.CellExecutionError."""
    paths = sorted((ROOT / "examples").glob("*.ipynb"))
    folder.mkdir()
    with tempfile.TemporaryDirectory() as own, ThreadPoolExecutor(2) as pool:
        os.environ.update(IPYTHONDIR=own, JUPYTER_RUNTIME_DIR=own, PYDEVD_DISABLE_FILE_VALIDATION="1")  # what IPython writes of itself
        running = [pool.submit(_execute, path, folder) for path in paths]
        yield {path: f"{folder.name}/{path.stem}.md" for path in paths}
        for notebook in running:
            notebook.result()


def _execute(path: Path, folder: Path) -> None:
    import nbformat
    from nbclient import NotebookClient
    from nbconvert import MarkdownExporter

    notebook = nbformat.read(path, as_version=4)
    folder_of_run = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", coalesce_streams=True, resources=folder_of_run, extra_arguments=["--IPKernelApp.log_level=40"]).execute()
    text, resources = MarkdownExporter().from_notebook_node(notebook, {"output_files_dir": path.stem})
    (folder / f"{path.stem}.md").write_text(text, encoding="utf-8")
    for name, content in resources["outputs"].items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)


# ---- The reference


def reference_pages() -> Iterator[tuple[str, str]]:
    """(file, reStructuredText): a page for each group of what mrgptq exports, one for each public module, one for the command line, and their index."""
    import mrgptq

    exported = {name: _home(name) for name in mrgptq.__all__}
    groups = dict(GROUPS)
    for home in exported.values():
        if not any(home in rooms for rooms in groups.values()):
            groups[_first_sentence(importlib.import_module(f"mrgptq.{home}"))] = (home,)
    front, seen = [], {id(getattr(mrgptq, name)) for name in mrgptq.__all__}
    for title, rooms in groups.items():
        names = sorted((name for name, home in exported.items() if home in rooms), key=lambda name: (rooms.index(exported[name]), name.lower()))
        page = f"mrgptq-{slug(title)}"
        front.append((page, title, ", ".join(f":py:obj:`~mrgptq.{name}`" for name in names)))
        yield f"{page}.rst", "\n".join([_heading(title), ".. currentmodule:: mrgptq", "", *(_entry("mrgptq", name) for name in names)])
    modules = []
    for module in public_modules():
        if entries := [_entry(module.__name__, name) for name in public_names(module) if id(getattr(module, name)) not in seen]:
            modules.append((module.__name__, module.__name__, docstrings.escape(_first_sentence(module))))
            source = ["The source", "----------", "", ".. literalinclude:: reference.py", "   :language: python", ""] if module.__name__ == "mrgptq.reference" else []
            yield f"{module.__name__}.rst", "\n".join([_heading(module.__name__), f".. automodule:: {module.__name__}", "", f".. currentmodule:: {module.__name__}", "", *entries, *source])
    yield "reference.py", (ROOT / "python/mrgptq/reference.py").read_text(encoding="utf-8")
    yield "command_line.rst", command_line()
    yield "index.rst", "\n".join([_heading("Reference"), "What ``import mrgptq as mg`` gives:", "", *_tree(front), "Modules to be imported by name:", "", *_tree(modules), "And outside Python:", "", *_tree([("command_line", "Command line", "the help of each command")])])


def public_modules() -> Iterator[ModuleType]:
    """MODULES, and those of a package that has no list of its own of what is public."""
    for name in MODULES:
        module = importlib.import_module(f"mrgptq.{name}")
        yield module
        if hasattr(module, "__path__") and name == "study":
            yield from (importlib.import_module(found.name) for found in pkgutil.iter_modules(module.__path__, f"mrgptq.{name}."))


def public_names(module: ModuleType) -> list[str]:
    """What a module says is public, or what it defines and does not hide, in the order of the source."""
    if hasattr(module, "__all__"):
        return list(module.__all__)
    documented = {name for scope, name in _documented(module.__name__) if not scope}
    return [name for name, value in vars(module).items() if not name.startswith("_") and (name in documented or getattr(value, "__module__", None) == module.__name__ and callable(value) and hasattr(value, "__qualname__"))]


def _home(name: str) -> str:
    """The room that an exported name comes from, "" for the front door itself."""
    import mrgptq

    if module := getattr(getattr(mrgptq, name), "__module__", None):
        return module.removeprefix("mrgptq").lstrip(".").split(".")[0]
    return next(room for rooms in GROUPS.values() for room in rooms if room and ("", name) in _documented(f"mrgptq.{room}"))


@cache
def _documented(module: str) -> dict[tuple[str, str], list[str]]:
    """What stands below the constants of a module."""
    from sphinx.pycode import ModuleAnalyzer

    return ModuleAnalyzer.for_module(module).find_attr_docs()


def _entry(module: str, name: str) -> str:
    value = getattr(importlib.import_module(module), name)
    if inspect.isclass(value):
        return f".. autoclass:: {name}\n   :members:\n   :inherited-members: object, Protocol, Mapping, Generic, Module, tuple, Shown\n"
    if callable(value):
        return f".. autofunction:: {name}\n"
    docs = docstrings.restructure(_documented(f"mrgptq.{_home(name)}" if module == "mrgptq" else module)["", name])
    return f".. py:data:: {name}\n\n" + "".join(f"   {line}\n" for line in docs)


def _first_sentence(module: ModuleType) -> str:
    return (module.__doc__ or module.__name__).split("\n")[0].split(". ")[0].rstrip(".")


def _heading(title: str) -> str:
    return f"{title}\n{'=' * len(title)}\n"


def _tree(pages: list[tuple[str, str, str]]) -> list[str]:
    """A list of (page, title, what is there), and the same as a part of the navigation."""
    shown = [f"- :doc:`{title} <{page}>`: {what}" for page, title, what in pages]
    return [*shown, "", ".. toctree::", "   :hidden:", "", *(f"   {page}" for page, _, _ in pages), ""]


def command_line() -> str:
    """The help of ``mrgptq`` and of each command."""
    from mrgptq.arguments import build_parser

    os.environ["COLUMNS"] = "120"
    parser = build_parser()
    commands = next(action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    parts = [_heading("Command line")]
    for name, each in {"mrgptq": parser, **commands}.items():
        parts += [] if each is parser else [f"mrgptq {name}", "-" * len(f"mrgptq {name}"), ""]
        parts += [".. code-block:: text", "", *(f"   {line}".rstrip() for line in each.format_help().splitlines()), ""]
    return "\n".join(parts)


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("out", metavar="OUT", type=Path, help="folder to write; what is there is replaced")
    arguments.add_argument("--pages", metavar="FOLDER", type=Path, help="keep what Sphinx reads there")
    given = arguments.parse_args()
    if status := build(given.out, pages=given.pages):
        sys.exit(status)
    print(given.out / "index.html")
