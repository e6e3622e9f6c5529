"""What every measurement on a model goes through: quantise it in memory, then read perplexities and divergences from it."""

import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from .. import hf
from ..checkpoint.reader import CheckpointReader
from ..modules import select_modules
from ..recipe import Recipe
from ..result import layer_report

Quantise = Callable[[Any, Any, list[str]], Iterable[float | None]]
"""Quantises a model's modules in place under the calibration inputs: (model, (windows, sequence) tokens, names) to the layers' relative errors, None where a layer has none."""

_DIVERGENCE_WINDOWS = 64
"""Of the test's windows, at most: it needs the logits of two models, and tells methods apart on far fewer tokens than perplexity does."""

_TEMPERATURES = tuple(1 + i / 10 for i in range(21))
"""Tried on the far text; at the right one a perplexity is flat in it, so tenths are enough."""


@dataclass(frozen=True)
class Figures:
    """What :class:`AccuracyRow` says of a model, under the same names; ``window_divergences``: what ``divergence`` is the mean of."""

    relative_error: float | None
    perplexity: float
    far_perplexity: float | None
    far_tempered: float | None
    divergence: float | None
    far_divergence: float | None
    seconds: float
    window_divergences: tuple[float, ...] = ()


class Trial:
    """A model, and the texts that it is calibrated and measured on; parameters as those of ``measure``.

    Attributes
    ----------
    shapes : {module: (rows, cols)} of the layers to quantise.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        calibration: str,
        text: str,
        *,
        windows: int,
        test_windows: int,
        sequence: int,
        skip: int = 0,
        far: str | None = None,
        far_windows: int | None = None,
        divergence: bool = False,
        device: str = "cpu",
    ) -> None:
        tokenizer = hf.load_tokenizer(folder)
        self._folder, self._device, self._divergence = folder, device, divergence
        self._inputs = hf.token_windows(tokenizer, calibration, skip + windows, sequence)[skip:]
        if not len(self._inputs):
            raise ValueError(f"the calibration text has no window left after {skip}")
        self._test = hf.token_windows(tokenizer, text, test_windows, sequence, targets=True)
        self._far = None if far is None else hf.token_windows(tokenizer, far, far_windows or max(1, test_windows // 2), sequence, targets=True)
        self._temperature = 1.0
        reader = CheckpointReader(folder)
        shapes = {name: reader.shape(name) for name in reader.names}
        self.shapes = {name: shapes[f"{name}.weight"] for name in select_modules(shapes)}

    def original(self) -> Figures:
        """Of the model as it is: no errors and divergences, and the tempered perplexity at the temperature, in tenths from 1 to 3, that suits the far text best; quantised models take the same one. To be called before them."""
        self._original = hf.load_model(self._folder, device=self._device)
        near, far, tempered = hf.perplexity(self._original, *self._test), None, None
        if self._far is not None:
            tried = dict(zip(_TEMPERATURES, hf.tempered_perplexities(self._original, *self._far, temperatures=_TEMPERATURES), strict=True))
            self._temperature = min(tried, key=tried.__getitem__)
            far, tempered = tried[1.0], tried[self._temperature]
        return Figures(None, near, far, tempered, None, None, 0.0)

    def quantised(self, quantise: Quantise) -> Figures:
        """Of the model as ``quantise`` leaves it; ``relative_error`` is the unweighted mean over layers, ``seconds`` what it took."""
        model, start = hf.load_model(self._folder, device=self._device), time.perf_counter()
        known = [error for error in quantise(model, self._inputs, list(self.shapes)) if error is not None]
        seconds = time.perf_counter() - start
        near, far, tempered, far_divergence = hf.perplexity(model, *self._test), None, None, None
        windows = hf.window_divergences(model, self._original, self._test[0][:_DIVERGENCE_WINDOWS]) if self._divergence else None
        if self._far is not None:
            far, tempered = hf.tempered_perplexities(model, *self._far, temperatures=(1.0, self._temperature))
            far_divergence = hf.divergence(model, self._original, self._far[0][:_DIVERGENCE_WINDOWS]) if self._divergence else None
        divergence = None if windows is None else float(windows.mean())
        return Figures(sum(known) / len(known) if known else None, near, far, tempered, divergence, far_divergence, seconds, () if windows is None else tuple(windows.tolist()))


def by_recipe(recipe: Recipe, threads: int | None = None) -> Quantise:
    """As calibration carries a recipe out."""

    def quantise(model: Any, inputs: Any, modules: list[str]) -> Iterator[float | None]:
        return (layer_report(matrix).relative_error for _, matrix in hf.calibrate(model, inputs, recipe, modules, threads=threads))

    return quantise
