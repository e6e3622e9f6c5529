"""Writes the tables of bench/README.md from the JSON of run.py.

    python bench/tables.py results.json [more.json]        each later file replaces the rooms it has, for the numbers of threads it has
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

BEGIN, END = "<!-- results: written by bench/tables.py -->", "<!-- end of results -->"


# What is read of a result, by where it stands. Older ones do without "installed" and "ggml".
NEEDED = {
    (): ("command", "machine", "quick", "rows"),
    ("machine",): ("blas", "build", "caches", "cores", "cpu", "flags", "governor", "hypervisor", "packages", "python", "revision"),
    ("machine", "build"): ("compiler", "isa", "version"),
}
OF_A_ROW = ("contender", "high", "low", "median", "room", "shape", "threads", "unit", "work")


def read(path: Path) -> dict:
    """A result of run.py."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SystemExit(f"{path} cannot be read as JSON, nothing was written: {error}") from None
    for place, names in NEEDED.items():
        part = result
        for name in place:
            part = part[name]
        require(path, ".".join(("the result", *place)), part, names)
    if not isinstance(result["rows"], list):
        raise SystemExit(f"{path} is no result of run.py: its rows are no list; nothing was written")
    for number, row in enumerate(result["rows"]):
        require(path, f"row {number}", row, OF_A_ROW)
        require(path, f"row {number}", row, ("note",) if row["median"] is None else ("ratios",))
    return result


def require(path: Path, what: str, part: object, names: Sequence[str]) -> None:
    """End with a sentence where a part of a file lacks what a result of run.py has."""
    missing = [name for name in names if name not in part] if isinstance(part, dict) else names
    if missing:
        raise SystemExit(f"{path} is no result of run.py: {what} lacks {', '.join(missing)}; nothing was written")


def number(value: float) -> str:
    """Three digits that count."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def about(machine: dict) -> str:
    """The machine and the software in a sentence or two."""
    caches = ", ".join(f"{level} {size}" for level, size in machine["caches"].items())
    kernels = sorted({f"{pool['internal_api']} {pool.get('version')} with the kernel {pool.get('architecture')}" for pool in machine["blas"]})
    versions = ", ".join(f"{name} {value or 'not installed'}" for name, value in machine["packages"].items() if name != "threadpoolctl")
    if ggml := machine.get("ggml"):
        versions += f", ggml {' '.join(filter(None, (ggml['version'], ggml['commit'])))} ({ggml['fingerprint']})"
    build, revision = f"mrgptq {machine['build']['version']}", f"at revision {machine['revision']}"
    if installed := machine.get("installed"):
        build += f" (extension {installed['extension']}, Python files {installed['python']})"
        revision = revision if installed["as_checkout"] else f"whose Python files are not those of the checkout {revision}"
    return (
        f"{machine['cores']} cores of {machine['cpu']}{' (virtual machine)' if machine['hypervisor'] else ''}, {' '.join(machine['flags'])}; caches {caches}; governor {machine['governor'] or 'not known'}. "
        f"{build} {revision}, ISA level {machine['build']['isa']}, {machine['build']['compiler']}. Python {machine['python']}; {versions}; {'; '.join(kernels)}."
    )


def table(rows: list[dict]) -> str:
    """Records of one room as Markdown: a line for each work, shape and contender, two columns for each number of threads."""
    threads = sorted({row["threads"] for row in rows})
    cells: dict[tuple, dict[int, dict]] = {}
    for row in rows:
        cells.setdefault((row["work"], row["shape"], row["contender"], row["unit"]), {})[row["threads"]] = row
    head = ["work", "shape", "contender", "unit", *(text for n in threads for text in (f"{n} thread{'s' if n > 1 else ''}", "speed, × another's"))]
    lines = [head, ["---"] * len(head)]
    for key, by_threads in cells.items():
        line = list(key)
        for n in threads:
            row = by_threads.get(n)
            if row is None:
                line += ["–", ""]
            elif row["median"] is None:
                line += ["–", row["note"]]
            else:
                line += [f"{number(row['median'])} ({number(row['low'])}–{number(row['high'])})", ", ".join(f"{ratio:.2f} {other}" for other, ratio in row["ratios"].items())]
        lines.append(line)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def text(results: list[dict]) -> str:
    """What stands between the markers: of each room and number of threads the last result that has it."""
    last: dict[str, dict[int, dict]] = {}
    for result in results:
        if result["quick"]:
            raise SystemExit("a --quick run measures nothing that a table should show")
        for row in result["rows"]:
            last.setdefault(row["room"], {})[row["threads"]] = result
    parts: list[str] = []
    said: list[dict] = []
    for room, by_threads in last.items():
        used = [result for result in results if any(result is mine for mine in by_threads.values())]
        if said != used:
            parts += [f"`{result['command']}`: {about(result['machine'])}" for result in used]
            said = used
        parts.append(f"**{room}**\n\n{table([row for result in used for row in result['rows'] if row['room'] == room and by_threads[row['threads']] is result])}")
    return "\n\n".join(parts)


def write(result: dict | list[dict], readme: Path) -> None:
    """Replace what stands between the markers of a file."""
    page = readme.read_text(encoding="utf-8")
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        raise SystemExit(f"{readme} must hold the lines {BEGIN!r} and {END!r} once each")
    before, rest = page.split(BEGIN)
    readme.write_text(f"{before}{BEGIN}\n\n{text(result if isinstance(result, list) else [result])}\n\n{END}{rest.split(END)[1]}", encoding="utf-8")


def main() -> None:
    """Read results, write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--readme", type=Path, default=Path(__file__).resolve().parent / "README.md")
    args = parser.parse_args()
    write([read(path) for path in args.results], args.readme)


if __name__ == "__main__":
    main()
