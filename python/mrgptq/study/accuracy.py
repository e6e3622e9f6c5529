"""How much accuracy a model keeps under each recipe: layer error and perplexity, W4A16 and W4A4."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .. import hf
from ..checkpoint.reader import CheckpointReader
from ..display import align
from ..modules import select_modules
from ..recipe import Recipe
from ..result import layer_report


@dataclass(frozen=True)
class AccuracyRow:
    """One cell: a recipe on a model. ``relative_error`` is the unweighted mean over its layers; None, as is the format, for the unquantised model."""

    recipe: str
    format: str | None
    activations: str | None
    rotation: int | None
    mx_rule: str | None
    relative_error: float | None
    perplexity: float


def measure(
    folder: str | os.PathLike[str],
    calibration: str,
    text: str,
    recipes: Iterable[tuple[str, Recipe]],
    *,
    windows: int = 128,
    test_windows: int = 256,
    sequence: int = 512,
    threads: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> Iterator[AccuracyRow]:
    """Quantise a model by each recipe, in memory, and measure it.

    Parameters
    ----------
    folder : model folder. calibration, text : str, from different sources.
    recipes : iterable of (label, Recipe).
    windows, test_windows : windows of ``sequence`` tokens for calibration and for the perplexity.
    progress : called as progress(label) before each measurement.

    Yields
    ------
    AccuracyRow, the unquantised model's first.
    """
    tokenizer = hf.load_tokenizer(folder)
    inputs = hf.token_windows(tokenizer, calibration, windows, sequence)
    test = hf.token_windows(tokenizer, text, test_windows, sequence, targets=True)
    reader = CheckpointReader(folder)
    modules = select_modules({name: reader.shape(name) for name in reader.names})
    if progress:
        progress("original")
    yield AccuracyRow("original", None, None, None, None, None, hf.perplexity(hf.load_model(folder), *test))
    for label, recipe in recipes:
        if progress:
            progress(f"{label}, {recipe.format}, W4A{4 if recipe.activations else 16}")
        model = hf.load_model(folder)
        errors = [layer_report(matrix).relative_error for _, matrix in hf.calibrate(model, inputs, recipe, modules, threads=threads)]
        known = [error for error in errors if error is not None]
        mean = sum(known) / len(known) if known else None
        yield AccuracyRow(label, recipe.format, recipe.activations, recipe.rotation, recipe.resolved_mx_rule if recipe.format == "mxfp4" else None, mean, hf.perplexity(model, *test))


def table(rows: Sequence[AccuracyRow]) -> str:
    """Rows of W4A16 and W4A4 side by side, as aligned text: method, format, mean relative layer error, both perplexities."""
    original = next(row for row in rows if row.format is None)
    lines = [("method", "format", "rotation", "layer error", "W4A16 ppl", "W4A4 ppl"), ("original", "–", "–", "–", f"{original.perplexity:.3f}", f"{original.perplexity:.3f}")]
    cells: dict[tuple[Any, ...], dict[bool, AccuracyRow]] = {}
    for row in rows:
        if row.format:
            cells.setdefault((row.recipe, row.format, row.rotation, row.mx_rule), {})[bool(row.activations)] = row
    for (recipe, format, rotation, mx_rule), pair in cells.items():
        mean = next(iter(pair.values())).relative_error
        error = "–" if mean is None else f"{mean:.2e}"
        name = format.upper() + (f" {mx_rule}" if mx_rule else "")
        lines.append((recipe, name, f"Hadamard {rotation}" if rotation else "–", error, *(f"{pair[a].perplexity:.3f}" if a in pair else "–" for a in (False, True))))
    return align(lines, numeric=(3, 4, 5))


def as_json(rows: Sequence[AccuracyRow]) -> list[dict[str, Any]]:
    """Rows as plain dicts."""
    return [asdict(row) for row in rows]
