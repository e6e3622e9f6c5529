"""How much accuracy a model keeps under each recipe: layer error and perplexity, W4A16 and W4A4."""

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from .. import hf
from ..checkpoint.reader import CheckpointReader
from ..display import align
from ..modules import select_modules
from ..recipe import Recipe
from ..result import layer_report

_DIVERGENCE_WINDOWS = 64
"""Of the test's windows, at most: it needs the logits of two models, and tells methods apart on far fewer tokens than perplexity does."""

_TEMPERATURES = tuple(1 + i / 10 for i in range(21))
"""Tried on the far text; at the right one a perplexity is flat in it, so tenths are enough."""


@dataclass(frozen=True)
class AccuracyRow:
    """One cell: a recipe on a model. ``relative_error`` is the unweighted mean over its layers; None, as is the format, for the unquantised model.

    ``far_perplexity`` is that of a text of another kind, ``far_tempered`` the same at the temperature, in tenths from 1 to 3, at which the original predicts that text best;
    ``divergence`` and ``far_divergence``: KL(original || quantised) in nats per token on both. None where not asked for.
    ``seconds``: quantising.
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
    tokenizer = hf.load_tokenizer(folder)
    inputs = hf.token_windows(tokenizer, calibration, skip + windows, sequence)[skip:]
    if not len(inputs):
        raise ValueError(f"the calibration text has no window left after {skip}")
    test = hf.token_windows(tokenizer, text, test_windows, sequence, targets=True)
    far_test = None if far is None else hf.token_windows(tokenizer, far, far_windows or max(1, test_windows // 2), sequence, targets=True)
    reader = CheckpointReader(folder)
    modules = select_modules({name: reader.shape(name) for name in reader.names})
    if progress:
        progress("original")
    original = hf.load_model(folder, device=device)
    row = AccuracyRow("original", None, None, None, None, None, hf.perplexity(original, *test))
    temperature = 1.0
    if far_test is not None:
        tempered = dict(zip(_TEMPERATURES, hf.tempered_perplexities(original, *far_test, temperatures=_TEMPERATURES), strict=True))
        temperature = min(tempered, key=tempered.__getitem__)
        row = replace(row, far_perplexity=tempered[1.0], far_tempered=tempered[temperature])
    yield row
    for label, recipe in recipes:
        if progress:
            progress(f"{label}, {recipe.format}, W4A{4 if recipe.activations else 16}")
        model, start = hf.load_model(folder, device=device), time.perf_counter()
        errors = [layer_report(matrix).relative_error for _, matrix in hf.calibrate(model, inputs, recipe, modules, threads=threads)]
        known = [error for error in errors if error is not None]
        mean = sum(known) / len(known) if known else None
        seconds = time.perf_counter() - start
        near, far_plain, far_tempered = hf.perplexity(model, *test), None, None
        if far_test is not None:
            far_plain, far_tempered = hf.tempered_perplexities(model, *far_test, temperatures=(1.0, temperature))
        yield AccuracyRow(
            label,
            recipe.format,
            recipe.activations,
            recipe.rotation,
            recipe.resolved_mx_rule if recipe.format == "mxfp4" else None,
            mean,
            near,
            far_plain,
            far_tempered,
            hf.divergence(model, original, test[0][:_DIVERGENCE_WINDOWS]) if divergence else None,
            hf.divergence(model, original, far_test[0][:_DIVERGENCE_WINDOWS]) if divergence and far_test is not None else None,
            seconds,
        )


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
