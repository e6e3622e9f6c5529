"""Layers that share an input, quantised together under what calibration knows of them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from numpy.typing import ArrayLike, NDArray

from .arrays import located
from .gptq import Hessian
from .layer import make_factor, quantize_layer, shared_tensor_scale
from .recipe import Recipe
from .result import Activations, QuantizedMatrix


@dataclass(frozen=True)
class Moments:
    """What calibration knows of layers that share an input; nothing of it where they are rounded without.

    Attributes
    ----------
    hessian : of their inputs. cross, streams, output_hessians : ``cross``, ``stream`` and ``output_hessian`` of :func:`quantize_layer`, the latter two by module, where there are any.
    activations : how their inputs will be rounded; None leaves that to the recipe.
    """

    hessian: Hessian | None = None
    cross: NDArray[Any] | None = None
    streams: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    output_hessians: Mapping[str, Hessian] = field(default_factory=dict)
    activations: Activations | None = None


def quantize_together(weights: Mapping[str, ArrayLike], moments: Moments, recipe: Recipe, *, threads: int | None = None) -> Iterator[tuple[str, QuantizedMatrix]]:
    """(module, QuantizedMatrix) of layers that share an input, one after the other: one factor and one tensor scale serve all of them.

    Parameters
    ----------
    weights : {module: (rows, cols) weight}. moments : what is known of them; where the caller keeps it nowhere, its Hessian is freed as soon as the factor is made. threads : same bytes for any number.

    Raises
    ------
    ValueError, TypeError : what :func:`quantize_layer` raises, behind the name of the weight.
    """
    with located(", ".join(f"{name}.weight" for name in weights)):
        tensor_scale = shared_tensor_scale(list(weights.values()), recipe, threads=threads)
        hessian, moments = moments.hessian, replace(moments, hessian=None)
        factor = None
        if hessian is not None and recipe.solver == "gptq":
            factor, hessian = make_factor(hessian, recipe, threads=threads), None  # the factor has all that is needed of it
    for name, weight in weights.items():
        with located(f"{name}.weight"):
            stream, outputs = moments.streams.get(name), moments.output_hessians.get(name)
            matrix = quantize_layer(weight, hessian, recipe, tensor_scale=tensor_scale, factor=factor, cross=moments.cross, stream=stream, output_hessian=outputs, threads=threads)
        yield name, replace(matrix, activations=moments.activations) if moments.activations else matrix
