"""What the method grid rounds weights and inputs to: the FP4 formats by the core, any other block format by NumPy."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..activations import round_activations
from ..codecs import nvfp4_tensor_scale
from ..formats import block_format
from ..layer import make_factor, quantize_layer, shared_tensor_scale
from ..recipe import Recipe
from .grids import StudyFormat
from .solver import gptq

Values = NDArray[np.float32]


class Rounding(Protocol):
    """A block format with absmax scales. group_size : columns that share a scale."""

    group_size: int

    def weights(self, weights: Sequence[Values], hessian: NDArray[np.float64] | None = None) -> list[Values]:
        """The values of layers that share an input, (rows, cols) each: the nearest, or GPTQ's where their inputs' (cols, cols) second moment is given. One tensor scale, where the format has such, serves all."""

    def inputs(self, x: Values, largest: float | None = None) -> Values:
        """The values of (..., cols) inputs; ``largest``: the magnitude that the tensor scale is made for, None for x's own."""


class Fp4:
    """ "nvfp4", or "mxfp4" by the rule even."""

    def __init__(self, format: str, threads: int | None = None) -> None:
        self.group_size, self._format, self._threads = block_format(format).group_size, format, threads

    def weights(self, weights: Sequence[Values], hessian: NDArray[np.float64] | None = None) -> list[Values]:
        """By the recipes "rtn" and "gptq"."""
        recipe = Recipe.named("rtn" if hessian is None else "gptq", self._format)
        factor = None if hessian is None else make_factor(hessian, recipe, threads=self._threads)
        tensor_scale = shared_tensor_scale(weights, recipe, threads=self._threads)
        return [quantize_layer(w, None, recipe, tensor_scale=tensor_scale, factor=factor, threads=self._threads).dequantize(threads=self._threads) for w in weights]

    def inputs(self, x: Values, largest: float | None = None) -> Values:
        """By :func:`round_activations`."""
        scale = nvfp4_tensor_scale(largest) if self._format == "nvfp4" and largest is not None else None
        return round_activations(x, self._format, tensor_scale=scale, threads=self._threads)


class Gridded:
    """A StudyFormat, in NumPy."""

    def __init__(self, format: StudyFormat) -> None:
        self.group_size, self._format = format.group_size, format

    def weights(self, weights: Sequence[Values], hessian: NDArray[np.float64] | None = None) -> list[Values]:
        """Steps are those of the weights as they are given, before GPTQ."""
        largest = max(float(np.abs(w).max()) for w in weights)
        if hessian is None:
            return [self.inputs(w, largest) for w in weights]
        answers = []
        for w in weights:
            steps = self._format.steps(np.abs(w.astype(np.float64)).reshape(len(w), -1, self.group_size).max(-1), largest)
            answers.append(gptq(w.astype(np.float64), hessian, self._format.grid, np.repeat(steps, self.group_size, axis=1)).astype(np.float32))
        return answers

    def inputs(self, x: Values, largest: float | None = None) -> Values:
        """By :meth:`StudyFormat.round`."""
        groups = x.astype(np.float64).reshape(*x.shape[:-1], -1, self.group_size)
        return self._format.round(groups, largest).reshape(x.shape).astype(np.float32)
