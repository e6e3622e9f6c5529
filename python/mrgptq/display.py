"""How a result shows itself: aligned lines in a terminal, a small table in a notebook."""

import html
from collections.abc import Collection, Sequence


def format_number(value: object) -> str:
    """Four significant digits, integers whole, None as a dash."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def format_bytes(count: float) -> str:
    """A size in bytes as a person reads it, decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.4g} {unit}"
        count /= 1000
    return f"{count:.4g} TB"


def printable(text: str) -> str:
    """The text with its control characters escaped, line ends apart: names out of a file must not steer the terminal that shows them."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def align(rows: Sequence[Sequence[str]], *, numeric: Collection[int] = ()) -> str:
    """Rows of strings as one text with aligned columns, control characters in them escaped; the columns listed in ``numeric`` stand to the right."""
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) if i in numeric else cell.ljust(width) for i, (cell, width) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


class Shown:
    """Base of everything that shows itself: a subclass gives ``_title()`` and ``_rows()``, a list of (name, value)."""

    __slots__ = ()

    def _title(self) -> str:
        raise TypeError(f"{type(self).__name__} does not say what it is called")

    def _rows(self) -> list[tuple[str, object]]:
        raise TypeError(f"{type(self).__name__} does not say what it holds")

    def __repr__(self) -> str:
        rows = [("  " + name, format_number(value)) for name, value in self._rows()]
        return self._title() + "\n" + align(rows)

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><th style='text-align:left'>{html.escape(name)}</th><td style='text-align:left'>{html.escape(format_number(value))}</td></tr>" for name, value in self._rows()
        )
        return f"<table><caption style='text-align:left'>{html.escape(self._title())}</caption>{rows}</table>"


def sentence(error: BaseException) -> str:
    """What an exception says, without the number of a system's error."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename} cannot be used: {error.strerror}" if error.filename else error.strerror
    return str(error) or ("not enough memory" if isinstance(error, MemoryError) else type(error).__name__)
