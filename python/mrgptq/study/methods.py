"""The method grid: what each published way to four bits costs a model, in each format, with and without rounded inputs."""

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import hf
from ..arrays import choose
from ..checkpoint.reader import CheckpointReader
from ..gptq import Hessian
from ..plan import make_plan
from ..recipe import Recipe
from .analysis import Mean
from .bases import UNCHANGED, Basis, block_hadamard, full_hadamard, magnified, smoothing, turned_hessian
from .grids import FORMATS
from .roundings import Fp4, Gridded, Rounding
from .trial import Quantise, Trial, by_recipe

Values = NDArray[np.float32]
Group = tuple[str, ...]

SMOOTHING = 0.6
"""SmoothQuant's alpha."""
AWQ_ALPHAS = tuple(i / 20 for i in range(20))
"""The grid of AWQ's authors."""


class Seen:
    """What reaches layers that share an input, batch by batch. hessian : their second moment. largest : (cols,) largest magnitudes. turned : the largest magnitude in the basis that they are rounded in."""

    def __init__(self, cols: int) -> None:
        self.hessian, self.largest, self.turned, self._sum = Hessian(cols), np.zeros(cols), 0.0, np.zeros(cols)

    def update(self, x: Values, basis: Basis | None = None, threads: int | None = None) -> None:
        """(..., cols) inputs, and the basis where they are rounded."""
        self.hessian.update(x, threads=threads)
        if basis:
            self.turned = max(self.turned, float(np.abs(basis.inputs(x)).max(initial=0)))
        magnitudes = np.abs(x.reshape(-1, x.shape[-1]))
        self.largest = np.maximum(self.largest, magnitudes.max(0, initial=0))
        self._sum += magnitudes.sum(0, dtype=np.float64)

    @property
    def mean(self) -> NDArray[np.float64]:
        """(cols,) mean magnitudes."""
        return self._sum / max(self.hessian.tokens, 1)


@dataclass(frozen=True)
class Method:
    """A way to quantise layers that share an input: a change of basis, then codes.

    Attributes
    ----------
    basis : (weights, what reaches them, rounding) to the basis; what reaches them is None where ``looks`` is False.
    looks : whether the basis depends on the inputs. It is then found before they are rounded.
    solves : codes by GPTQ, with absmax scales of the weights in their basis and a static activation order; else the nearest.
    """

    basis: Callable[[Sequence[Values], Seen | None, Rounding], Basis]
    looks: bool = False
    solves: bool = False


def _unchanged(weights: Sequence[Values], seen: Seen | None, rounding: Rounding) -> Basis:
    return UNCHANGED


def _by_groups(weights: Sequence[Values], seen: Seen | None, rounding: Rounding) -> Basis:
    return block_hadamard(rounding.group_size)


def _over_all(weights: Sequence[Values], seen: Seen | None, rounding: Rounding) -> Basis:
    return full_hadamard(weights[0].shape[1])


def _smoothed(weights: Sequence[Values], seen: Seen | None, rounding: Rounding) -> Basis:
    assert seen
    return smoothing(weights, seen.largest, SMOOTHING)


def _activation_aware(weights: Sequence[Values], seen: Seen | None, rounding: Rounding) -> Basis:
    """The first of the grid under which plain rounding loses least, summed over the layers."""
    assert seen
    hessian = seen.hessian.matrix

    def lost(basis: Basis) -> float:
        return sum(_form(w - restored, hessian) for w, restored in zip(weights, _restored(weights, basis, rounding), strict=True))

    return min((magnified(seen.mean, alpha) for alpha in AWQ_ALPHAS), key=lost)


METHODS: Mapping[str, Method | None] = {
    "rtn": Method(_unchanged),
    "rtn-hadamard": Method(_by_groups),
    "smoothquant": Method(_smoothed, looks=True),
    "quarot": Method(_over_all),
    "awq": Method(_activation_aware, looks=True),
    "gptq": Method(_unchanged, solves=True),
    "mr-gptq": Method(_by_groups, solves=True),
    "best": None,
    "best-hadamard": None,
}
"""By name: plain rounding; a Hadamard over every group (16 columns in NVFP4, else 32); SmoothQuant's scales; a Hadamard over all columns, as QuaRot has it but turned back layer by layer, see :func:`full_hadamard`; AWQ's
scales, without its clipping; GPTQ; MR-GPTQ, for the FP4 formats the recipe with searched scales, for the others this; the recipe "best", and the same under a Hadamard over every group, which only those two have."""
METHOD_FORMATS = ("nvfp4", "mxfp4", "int4")
"""Those that are compared unless others are asked for: MXFP4 by the rule even; INT4 in groups of 32 with float16 scales and codes from -7 to 7. "mxint4" and "nvint4" are there, too."""
_CORE_FORMATS = ("nvfp4", "mxfp4")


@dataclass(frozen=True)
class GridRow:
    """One cell: a method in a format, ``activations`` None for W4A16 and the format's name for W4A4.

    ``relative_error`` is tr(E H E^T) / tr(W H W^T), its unweighted mean over the layers, each under what reaches it; ``divergence`` KL(original || quantised) in nats per token, over 64 windows at most, the mean of ``window_divergences``; ``seconds``: quantising.
    The unquantised model's row has neither format nor error.
    """

    method: str
    format: str | None
    activations: str | None
    relative_error: float | None
    perplexity: float
    divergence: float
    seconds: float
    window_divergences: tuple[float, ...] = ()

    def divergence_over(self, other: "GridRow") -> Mean:
        """How much larger its divergence is than another cell's, window by window: what is hard in a window is hard for both, so the difference is known better than either."""
        return Mean.of(np.subtract(self.window_divergences, other.window_divergences))


def cells(methods: Sequence[str] | None = None, formats: Sequence[str] | None = None) -> list[tuple[str, str, str | None]]:
    """(method, format, activations) of each cell there is, in the order in which :func:`grid` measures them; None as there. ValueError for an unknown name, or where none is left."""
    for name in methods or ():
        choose("method", name, tuple(METHODS))
    for name in formats or ():
        choose("format", name, (*METHOD_FORMATS, "mxint4", "nvint4"))
    chosen = [(method, format) for format in dict.fromkeys(METHOD_FORMATS if formats is None else formats) for method in dict.fromkeys(METHODS if methods is None else methods)]
    found = [(method, format, activations) for method, format in chosen if METHODS[method] or format in _CORE_FORMATS for activations in (None, format)]
    if not found:
        raise ValueError(f"methods is {methods} and formats is {formats}; there is no such cell: best is a recipe of the FP4 formats")
    return found


def expected_memory(folder: str | os.PathLike[str], *, windows: int = 6, test_windows: int = 6, sequence: int = 512) -> int:
    """Peak bytes of :func:`grid`, of tensors alone: the original, held whole in float32, the costliest method's calibration, ``best``'s of a copy that is held whole, and what the figures are read with, which an allocator may not
    find room for in what calibration left. Reads headers; raises what the plan of a run raises."""
    with tempfile.TemporaryDirectory() as free:
        plan = make_plan(folder, os.path.join(free, "out"), Recipe.named("best"), tokens=windows * sequence, sequence=sequence)
    vocabulary = CheckpointReader(folder).config.get("vocab_size", 0)
    return plan.memory_bytes + plan.model_bytes * (2 if plan.streamed else 1) + hf.evaluation_bytes(vocabulary, test_windows, sequence)


def grid(
    folder: str | os.PathLike[str],
    calibration: str,
    text: str,
    *,
    methods: Sequence[str] | None = None,
    formats: Sequence[str] | None = None,
    windows: int = 6,
    test_windows: int = 6,
    sequence: int = 512,
    device: str = "cpu",
    threads: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> Iterator[GridRow]:
    """Quantise a model in every way, in memory, and measure it.

    Parameters
    ----------
    folder : model folder, whose layers' columns the formats' groups divide. calibration, text : str, from different sources.
    methods : names from ``METHODS``. formats : names from ``METHOD_FORMATS``, "mxint4", "nvint4". None for all methods, and for ``METHOD_FORMATS``.
    windows, test_windows : windows of ``sequence`` tokens for calibration and for the figures.
    device : of the forward passes. threads : the core's. progress : called as progress(label) before each measurement.

    Yields
    ------
    GridRow, the unquantised model's first, then those of :func:`cells`.

    Raises
    ------
    ValueError : an unknown name, a combination that is not there, columns that no group divides, at once.
    """
    wanted = cells(methods, formats)
    roundings: dict[str, Rounding] = {name: Fp4(name, threads) if name in _CORE_FORMATS else Gridded(FORMATS[name]) for _, name, _ in wanted}
    trial = Trial(folder, calibration, text, windows=windows, test_windows=test_windows, sequence=sequence, divergence=True, device=device)
    for name, (_, cols) in trial.shapes.items():
        for format, rounding in roundings.items():
            if cols % rounding.group_size:
                raise ValueError(f"{name} has {cols} columns; {format} needs a multiple of {rounding.group_size}: leave the format out")
    return _rows(trial, wanted, roundings, threads, progress)


def _rows(trial: Trial, wanted: list[tuple[str, str, str | None]], roundings: Mapping[str, Rounding], threads: int | None, progress: Callable[[str], None] | None) -> Iterator[GridRow]:
    if progress:
        progress("original")
    yield GridRow("original", None, None, None, trial.original().perplexity, 0.0, 0.0)
    for name, format, activations in wanted:
        if progress:
            progress(f"{name}, {format}, W4A{4 if activations else 16}")
        method = METHODS[name]
        if method is None or (name == "mr-gptq" and format in _CORE_FORMATS):
            recipe = Recipe.named(name.removesuffix("-hadamard"), format, activations=activations)
            quantise = by_recipe(replace(recipe, rotation=roundings[format].group_size) if name == "best-hadamard" else recipe, threads)
        else:
            quantise = by_method(method, roundings[format], activations is not None, threads)
        figures = trial.quantised(quantise)
        yield GridRow(name, format, activations, figures.relative_error, figures.perplexity, figures.divergence or 0.0, figures.seconds, figures.window_divergences)


def by_method(method: Method, rounding: Rounding, inputs_too: bool, threads: int | None = None) -> Quantise:
    """As a method has it, block by block: each under the inputs that the quantised blocks before give it. ``inputs_too``: layers round their inputs; a block's Hessians are then of what reaches its layers while the others round."""

    def quantise(model: Any, tokens: Any, modules: list[str]) -> Iterator[float | None]:
        for block in hf.walk(model, tokens, modules):
            weights = {group: block.weights(group) for group in block.groups}
            seen: dict[Group, Seen] = {}
            if method.looks or not inputs_too:
                seen = {group: Seen(_cols(weights[group])) for group in block.groups}
                block.observe(partial(_watch, seen, threads=threads))
            bases = {group: method.basis(list(weights[group].values()), seen.get(group), rounding) for group in block.groups}
            if inputs_too:
                seen = {group: Seen(_cols(weights[group])) for group in block.groups}
                # Until the largest input is known each batch is rounded by its own.
                block.observe(partial(_watch, seen, bases=bases, threads=threads), {group: _rounder(basis, rounding, None) for group, basis in bases.items()})
            for group in block.groups:
                hessian = seen[group].hessian.matrix
                values = _restored(list(weights[group].values()), bases[group], rounding, hessian if method.solves else None)
                for (name, weight), replacement in zip(weights[group].items(), values, strict=True):
                    energy, lost = _form(weight, hessian), _form(weight - replacement, hessian)
                    block.replace(name, replacement)
                    yield lost / energy if energy else None
                if inputs_too:
                    block.replace_inputs(group, _rounder(bases[group], rounding, seen[group].turned or None))

    return quantise


def _watch(seen: Mapping[Group, Seen], group: Group, x: Values, *, bases: Mapping[Group, Basis] | None = None, threads: int | None = None) -> None:
    seen[group].update(x, bases[group] if bases else None, threads)


def _cols(weights: Mapping[str, Values]) -> int:
    return next(iter(weights.values())).shape[1]


def _restored(weights: Sequence[Values], basis: Basis, rounding: Rounding, hessian: NDArray[np.float64] | None = None) -> list[Values]:
    """Weights as they are after they were rounded in a basis and brought back."""
    return [basis.restore_weights(w) for w in rounding.weights([basis.weights(w) for w in weights], None if hessian is None else turned_hessian(basis, hessian))]


def _rounder(basis: Basis, rounding: Rounding, largest: float | None) -> Callable[[Values], Values]:
    return lambda x: basis.restore_inputs(rounding.inputs(basis.inputs(x), largest))


def _form(e: Values, hessian: NDArray[np.float64]) -> float:
    """tr(E H E^T) in float64."""
    wide = e.astype(np.float64)
    return float(np.einsum("ij,ij->", wide @ hessian, wide))
