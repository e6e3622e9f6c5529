"""Our docstrings as reStructuredText: sections become fields of definition lists, signatures are what the source says, and what reST would misread is escaped."""

import ast
import copy
import dataclasses
import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from typing import Any

SECTIONS = ("Parameters", "Attributes", "Returns", "Yields", "Raises", "References", "Examples")
_LISTS = ("Parameters", "Attributes", "Raises")
_NAMES = r"\*{0,2}[A-Za-z_]\w*(?:, [A-Za-z_]\w*)*"
_ENTRY = re.compile(rf"({_NAMES}) :(?: |$)")
_NEXT_ENTRY = re.compile(rf"(?<=\.) (?={_NAMES} : )")  # several on one line: "rows : int. cols : int."
_KEPT = re.compile(r"``.+?``|:[\w:]+:`[^`]+`|`[^`]+`")
_SPECIAL = re.compile(r"[\\*|]|_(?!\w)")


def escape(line: str) -> str:
    """A line of prose with nothing in it that reST takes for markup but ``literals`` and :roles:`targets`; `commands` become literals."""
    parts, end = [], 0
    for kept in _KEPT.finditer(line):
        parts += [_SPECIAL.sub(r"\\\g<0>", line[end : kept.start()]), kept[0] if kept[0].startswith(("``", ":")) else f"`{kept[0]}`"]
        end = kept.end()
    return "".join([*parts, _SPECIAL.sub(r"\\\g<0>", line[end:])])


def sections(lines: list[str]) -> Iterator[tuple[str | None, list[str]]]:
    """(heading, lines) of a docstring; None for what stands before the first."""
    heads = [i for i in range(len(lines) - 1) if lines[i] in SECTIONS and re.fullmatch("-{3,}", lines[i + 1])]
    yield None, lines[: heads[0] if heads else None]
    for here, after in pairwise([*heads, len(lines)]):
        yield lines[here], lines[here + 2 : after]


def entries(lines: list[str]) -> list[tuple[str, list[str]]]:
    """(names, description) of a section's entries, of which one line may hold several; names are empty where text comes first."""
    found: list[tuple[str, list[str]]] = []
    listed = False
    for line in lines:
        indented = line.startswith(" ")
        listed = indented and (listed or line.lstrip().startswith("- ")) or listed and not line
        parts = [line[4:]] if listed else _NEXT_ENTRY.split(line.strip())
        for number, part in enumerate(parts):
            entry = None if listed or indented and number == 0 else _ENTRY.match(part)
            if entry:
                found.append((entry[1], [rest] if (rest := part[entry.end() :]) else []))
            elif found:
                found[-1][1].append(part)
            elif part:
                found.append(("", [part]))
    return found


def restructure(lines: list[str]) -> list[str]:
    """A docstring's lines as reStructuredText."""
    made: list[str] = []
    for heading, body in sections(lines):
        while body and not body[-1].strip():
            body = body[:-1]
        if heading is None:
            made += [*_prose(body), ""]
        elif heading == "Examples":
            made += [f":{heading}:", *(f"    {line}" for line in body), ""]
        elif heading in _LISTS:
            made += [f":{heading}:"]
            for names, description in entries(body):
                if names:
                    made += [f"    {', '.join(f'**{escape(name)}**' for name in names.split(', '))}", *(f"        {line}".rstrip() for line in _prose(description) or ["..."]), ""]
                else:
                    made += [*(f"    {line}" for line in _prose(description)), ""]
        else:
            typed = re.match(r"([\w.]+) : ", body[0]) if body else None
            text = [body[0][typed.end() :], *body[1:]] if typed else body
            prose = _prose([line.strip() if not line.strip().startswith("- ") else line for line in text])
            made += [f":{heading}:", *(f"    {line}".rstrip() for line in ([f"*{typed[1]}*: {prose[0]}", *prose[1:]] if typed else prose)), ""]
    return made


def _prose(lines: list[str]) -> list[str]:
    """Escaped; the prompts of an example and their answers are left as they are."""
    example, made = False, []
    for line in lines:
        example = line.lstrip().startswith(">>>") or (example and bool(line.strip()))
        made.append(line if example else escape(line))
    return made


# ---- Signatures


@cache
def _tree(module: str) -> ast.Module:
    return ast.parse(inspect.getsource(importlib.import_module(module)))


def _definition(obj: Any) -> ast.AST | None:
    """Where the source defines a function or a class of ours."""
    node: ast.AST | None = _tree(obj.__module__)
    for name in obj.__qualname__.split("."):
        node = next((child for child in getattr(node, "body", ()) if isinstance(child, (ast.FunctionDef, ast.ClassDef)) and child.name == name), None)
    return node


def signature(obj: Any) -> tuple[str, str] | None:
    """(arguments, result) as the source has them: names of types and of constants, not what they stand for. None where there is no such source."""
    obj = inspect.unwrap(getattr(obj, "__func__", obj))
    if not getattr(obj, "__module__", "").startswith("mrgptq") or (node := _definition(obj)) is None:
        return None
    if isinstance(node, ast.ClassDef):
        if dataclasses.is_dataclass(obj) and "__init__" not in {getattr(child, "name", None) for child in node.body}:
            bodies = (getattr(_definition(base), "body", ()) for base in obj.__mro__[::-1] if base.__module__.startswith("mrgptq"))
            annotated = {ast.unparse(child.target): child for body in bodies for child in body if isinstance(child, ast.AnnAssign)}
            return f"({', '.join(_field(annotated[field.name], obj) for field in dataclasses.fields(obj) if field.init and not field.name.startswith('_'))})", ""
        init = next((child for child in node.body if isinstance(child, ast.FunctionDef) and child.name == "__init__"), None)
        if init is None:
            return None
        node, bound = init, True
    else:
        bound = "." in obj.__qualname__ and not any(ast.unparse(decorator) == "staticmethod" for decorator in node.decorator_list)
    assert isinstance(node, ast.FunctionDef)
    arguments = copy.deepcopy(node.args)
    if bound:
        (arguments.posonlyargs or arguments.args).pop(0)
    for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
        argument.annotation = _qualified(argument.annotation, obj)
    returns = None if node.name == "__init__" else _qualified(node.returns, obj)
    result = ast.unparse(returns) if returns else ""
    return f"({_plain(ast.unparse(arguments))})", _plain(result)


def _field(node: ast.AnnAssign, owner: Any) -> str:
    value = ast.unparse(node.value) if node.value else ""
    if value.startswith("field("):
        factory = re.search(r"default_factory=(\w+)", value)
        value = f"{factory[1]}()" if factory else "..."
    return f"{ast.unparse(node.target)}: {_plain(ast.unparse(_qualified(node.annotation, owner)))}{f' = {value}' if value else ''}"


def _plain(text: str) -> str:
    """Annotations as people say them."""
    return text.replace("np.", "").replace("os.PathLike[str]", "PathLike")


class _Qualify(ast.NodeTransformer):
    """Names of our classes as the site has them: of the package that exports them, else of their module."""

    def __init__(self, known: dict[str, Any]) -> None:
        self.known = known

    def visit_Name(self, node: ast.Name) -> ast.expr:
        value = self.known.get(node.id)
        if not inspect.isclass(value) or not value.__module__.startswith("mrgptq."):
            return node
        home = next((package for package in ("mrgptq", "mrgptq.hf") if getattr(sys.modules.get(package), node.id, None) is value), value.__module__)
        return ast.parse(f"{home}.{node.id}", mode="eval").body


def _qualified(annotation: ast.expr | None, owner: Any) -> ast.expr | None:
    """An annotation of ``owner`` with names that can be found; one in quotes as the expression that it is."""
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        annotation = ast.parse(annotation.value, mode="eval").body
    return None if annotation is None else _Qualify(vars(sys.modules[owner.__module__])).visit(copy.deepcopy(annotation))
