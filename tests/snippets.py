"""What a page of the documentation shows, carried out: its Python in one namespace, and its command lines."""

import os
import re
import shlex
from contextlib import contextmanager
from pathlib import Path

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
SHELL = ("sh", "console")


def blocks(path):
    """(language, line, text) of a page's fenced blocks."""
    text = path.read_text(encoding="utf-8")
    return [(match[1], text[: match.start(2)].count("\n"), match[2]) for match in FENCE.finditer(text)]


def commands(block):
    """Arguments of the lines of a block that call ``mrgptq``, without their comments."""
    return [shlex.split(line, comments=True) for line in block.replace("\\\n", " ").splitlines() if line.startswith("mrgptq ")]


@contextmanager
def inside(folder):
    """Work in a folder meanwhile."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def run_page(path, folder, command=None):
    """Run a page's blocks in their order, in ``folder``; ``command``: called with the arguments of each command line, None leaves them out. How many pieces there were."""
    names, count = {"__name__": "page"}, 0
    with inside(folder):
        for language, line, text in blocks(path):
            if language == "python":
                exec(compile("\n" * line + text, str(path), "exec"), names)
                count += 1
            elif language in SHELL and command:
                for arguments in commands(text):
                    command(arguments)
                    count += 1
    return count
