"""How much accuracy a model keeps under each recipe: layer error and perplexity, W4A16 and W4A4."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..display import align
from ..recipe import Recipe
from .trial import Trial, by_recipe


@dataclass(frozen=True)
class AccuracyRow:
    """One cell: a recipe on a model. ``relative_error`` is the unweighted mean over its layers; None, as is the format, for the unquantised model.

    ``far_perplexity`` is that of a text of another kind, ``far_tempered`` the same at the temperature, in tenths from 1 to 3, at which the original predicts that text best;
    ``divergence`` and ``far_divergence``: KL(original || quantised) in nats per token on both. None where not asked for.
    ``seconds``: quantising. ``window_divergences``: what ``divergence`` is the mean of, window by window.
    """

    recipe: str
    format: str | None
    activations: str | None
    rotation: int | None
    mx_rule: str | None
    relative_error: float | None
    perplexity: float
    far_perplexity: float | None = None
    far_tempered: float | None = None
    divergence: float | None = None
    far_divergence: float | None = None
    seconds: float = 0.0
    window_divergences: tuple[float, ...] = ()


def measure(
    folder: str | os.PathLike[str],
    calibration: str,
    text: str,
    recipes: Iterable[tuple[str, Recipe]],
    *,
    windows: int = 128,
    test_windows: int = 256,
    sequence: int = 512,
    skip: int = 0,
    far: str | None = None,
    far_windows: int | None = None,
    divergence: bool = False,
    device: str = "cpu",
    threads: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> Iterator[AccuracyRow]:
    """Quantise a model by each recipe, in memory, and measure it.

    Parameters
    ----------
    folder : model folder. calibration, text : str, from different sources.
    recipes : iterable of (label, Recipe).
    windows, test_windows : windows of ``sequence`` tokens for calibration and for the perplexity.
    skip : calibration windows to pass over, for another calibration set from one text.
    far : a text of another kind than both, whose perplexity is measured over ``far_windows`` windows (None: half as many as ``test_windows``). divergence : measure that too, over the first 64 windows of each. device : of the forward passes.
    progress : called as progress(label) before each measurement.

    Yields
    ------
    AccuracyRow, the unquantised model's first.
    """
    trial = Trial(folder, calibration, text, windows=windows, test_windows=test_windows, sequence=sequence, skip=skip, far=far, far_windows=far_windows, divergence=divergence, device=device)
    if progress:
        progress("original")
    yield AccuracyRow("original", None, None, None, None, **asdict(trial.original()))
    for label, recipe in recipes:
        if progress:
            progress(f"{label}, {recipe.format}, W4A{4 if recipe.activations else 16}")
        mx_rule = recipe.resolved_mx_rule if recipe.format == "mxfp4" else None
        yield AccuracyRow(label, recipe.format, recipe.activations, recipe.rotation, mx_rule, **asdict(trial.quantised(by_recipe(recipe, threads))))


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
