"""How much layer error recipes leave under the same Hessians, and under those of a text that calibration did not see."""

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..layer import make_factor, quantize_layer, shared_tensor_scale
from ..modules import fused_groups
from ..recipe import Recipe
from ..result import layer_report


@dataclass(frozen=True)
class LayerRow:
    """A recipe over all layers: unweighted means of the relative errors, and the seconds that factors and solves took."""

    recipe: str
    format: str
    rotation: int | None
    mx_rule: str
    relative_error: float
    held_out_error: float
    seconds: float


def compare_layers(
    layers: Mapping[str, NDArray[np.float32]],
    hessians: Mapping[str, ArrayLike],
    held_out: Mapping[str, ArrayLike],
    recipes: Iterable[tuple[str, Recipe]],
    *,
    threads: int | None = None,
) -> Iterator[LayerRow]:
    """Quantise layers by each recipe under the same Hessians and measure them under both.

    Parameters
    ----------
    layers : {module: (rows, cols) float32 weight}. hessians, held_out : {module: Hessian or (cols, cols) array}, see ``hf.collect_hessians``; modules that share an input share a factor.
    recipes : iterable of (label, Recipe).

    Yields
    ------
    LayerRow, one for each recipe.
    """
    groups = fused_groups(list(hessians))
    for label, recipe in recipes:
        errors, held_out_errors, seconds = [], [], 0.0
        for group in groups:
            _, rotation = recipe.fit(layers[group[0]].shape[1], group[0])
            weights = {name: layers[name] for name in group}
            start = time.perf_counter()
            factor = make_factor(hessians[group[0]], recipe, threads=threads) if recipe.solver == "gptq" else None
            tensor_scale = shared_tensor_scale(list(weights.values()), recipe, threads=threads)
            matrices = {name: quantize_layer(w, hessians[name], recipe, tensor_scale=tensor_scale, factor=factor, threads=threads) for name, w in weights.items()}
            seconds += time.perf_counter() - start
            for name, w in weights.items():
                h, rotated = rotation.apply_hessian(held_out[name]), rotation.apply(w).astype(np.float64)
                e = rotated - matrices[name].dequantize()
                errors.append(layer_report(matrices[name]).relative_error or 0.0)
                held_out_errors.append(float(np.einsum("ij,ij->", e @ h, e) / np.einsum("ij,ij->", rotated @ h, rotated)))
        yield LayerRow(label, recipe.format, recipe.rotation, recipe.resolved_mx_rule, float(np.mean(errors)), float(np.mean(held_out_errors)), seconds)
